"""What a training step allocates and frees, recorded without a GPU.

`trace_step` runs the real forward and backward of a model and records when every tensor storage is allocated and freed.
On the meta device this needs neither memory nor arithmetic. allocator.py replays such a trace.
"""

import contextlib
import math
import weakref
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from glm_models import attention as model_attention
from glm_models import ops as model_ops
from glm_models.quantized import quantized_layers


class Event(NamedTuple):
    """One entry of a trace.

    what: "alloc", "free" (key is the number of the block), or an event that DeepSpeed reacts to: "gradient" (key is a
    parameter whose gradient is complete), "forward", "done", "backward" (key is a module).
    """

    what: str
    key: object
    size: int = 0  # bytes, of an allocation
    tag: str = ""  # kind of memory it counts as
    block: int | None = None  # number of the block that holds a gradient


# The tracker


class StorageTracker(TorchDispatchMode):
    """Records when each storage is allocated and freed. Works on any device, including meta.

    A storage counts once, however many views it has, and only if it was allocated in this context: `known` tensors
    (weights, inputs) and their views do not count. Storages on another device than that of `known` count as "host".

    Args:
        known: tensors that already exist.
        vocab_size: tensors with this size of the last dimension count as "loss", all others as "activations".
    """

    def __init__(self, known, vocab_size: int | None = None):
        super().__init__()
        self.events: list[Event] = []
        self.vocab_size = vocab_size
        self.numbers: dict[int, int] = {}  # address of an allocated storage -> its number
        self.references = {}  # weak references must be kept for their callbacks to run
        self.tags: dict[int, str] = {}  # tags that became known after the allocation
        self.device = known[0].device.type
        for tensor in known:
            self._add(tensor, silent=True)

    def _add(self, tensor: torch.Tensor, silent: bool = False) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.numbers:
            return
        number = len(self.references)

        def died(_):
            if self.numbers.get(address) == number:
                del self.numbers[address]
            self.references[number] = None
            if not silent:
                self.events.append(Event("free", number))

        self.numbers[address] = number
        self.references[number] = weakref.ref(storage, died)
        if not silent:
            tag = "loss" if tensor.dim() and tensor.shape[-1] == self.vocab_size else "activations"
            tag = "host" if tensor.device.type != self.device else tag
            self.events.append(Event("alloc", number, storage.nbytes(), tag))

    def retag(self, tensor: torch.Tensor, tag: str) -> int:
        """Change the tag of an allocated storage. Returns its number."""
        number = self.numbers[tensor.untyped_storage()._cdata]
        self.tags[number] = tag
        return number

    def mark(self, what: str, key, block: int | None = None) -> None:
        self.events.append(Event(what, key, block=block))

    def trace(self) -> list[Event]:
        """The events, with tags that became known later."""
        return [
            e._replace(tag=self.tags[e.key]) if e.what == "alloc" and e.key in self.tags else e for e in self.events
        ]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device == "meta" and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # this machine may have no device to pin it for
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            result = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # offloaded; never read
        elif func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            result = args[0]
        else:
            result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result


# Kernels that do not exist on the meta device


def attention_outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log of the softmax denominator."""
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=torch.float32)


# one operation, so that selective checkpointing can keep its outputs
fused_attention = torch.library.custom_op("memory_plan::attention", attention_outputs, mutates_args=())
fused_attention.register_fake(attention_outputs)


class FusedAttention(torch.autograd.Function):
    """What torch's fused attention kernels allocate: the output and one float32 per query and head, but no scores.

    On the meta device torch uses the implementation that computes all scores. The fused kernels save q, k, v, the mask,
    the output and the log of the softmax denominator (aten/src/ATen/native/transformers).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, on_gpu):  # q: [batch, heads, tokens, head_dim]
        out, log_sum = fused_attention(q, v)
        ctx.save_for_backward(q, k, v, mask, out, log_sum)
        ctx.on_gpu = on_gpu
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _mask, _out, log_sum = ctx.saved_tensors
        # the GPU kernel accumulates the query gradient in float32, and stores sum(grad * out) of each query
        accumulator = torch.empty_like(q, dtype=torch.float32) if ctx.on_gpu else None
        row_sums = torch.empty_like(log_sum) if ctx.on_gpu else None
        # where queries share keys, it stores the gradients of keys and values for each query head, before it sums them
        shared = ctx.on_gpu and k.shape[1] < q.shape[1]
        unsummed = [x.new_empty(len(x), q.shape[1], *x.shape[2:]) for x in (k, v)] if shared else None
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del accumulator, row_sums, unsummed
        return *grads, None, None


class FusedDropout(torch.autograd.Function):
    """Dropout as on a GPU: output and a bool mask. On other devices torch saves a mask in the dtype of the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return torch.empty_like(grad + mask)


@contextlib.contextmanager
def meta_kernels(on_gpu: bool):
    """Replace functions by the fused kernels for tensors on the meta device; other tensors are not affected.

    Functions are patched, because a TorchFunctionMode is inactive while autograd recomputes a checkpoint.

    Args:
        on_gpu: allocate like GPU kernels; otherwise like CPU kernels.
    """
    real_attention, real_dropout = F.scaled_dot_product_attention, F.dropout
    real_missing, real_fused = model_attention.why_no_flash_attention, model_ops.has_fused_dropout

    def attention(query, key, value, attn_mask=None, *args, **kwargs):
        if not query.is_meta:
            return real_attention(query, key, value, attn_mask, *args, **kwargs)
        if on_gpu and query.dtype == torch.float32:  # its kernel does not support groups, see glm_models.attention
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # kernels add masks: torch converts a bool mask to numbers in each layer, with aligned rows on a GPU
            step = 16 if on_gpu else 1
            keys = -(-attn_mask.shape[-1] // step) * step
            attn_mask = torch.empty(*attn_mask.shape[:-1], keys, dtype=query.dtype, device="meta")
        return FusedAttention.apply(query, key, value, attn_mask, on_gpu)

    def packed_attention(query, key, value, *_, **__):  # [tokens, heads, head_dim]
        torch.zeros(2, dtype=torch.uint64, device=query.device)  # varlen_attn's state of random numbers
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return FusedAttention.apply(*heads, None, on_gpu).squeeze(0).transpose(0, 1)

    def missing(device):
        return None if on_gpu and device.type == "meta" else real_missing(device)

    def dropout(input, p=0.5, training=True, inplace=False):
        if input.is_meta and on_gpu:
            return FusedDropout.apply(input) if training and p else input
        return real_dropout(input, p, training, inplace)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "dropout", dropout),
        mock.patch.object(model_ops, "has_fused_dropout", lambda x: on_gpu if x.type == "meta" else real_fused(x)),
        mock.patch.object(model_attention, "varlen_attn", packed_attention),
        mock.patch.object(model_attention, "why_no_flash_attention", missing),
        mock.patch.object(model_attention, "FUSED", [*model_attention.FUSED, torch.ops.memory_plan.attention.default]),
    ):
        yield


# A step


def trace_step(model, batch: dict, on_gpu: bool = True, engine: bool = True, linear=None) -> list[Event]:
    """Run forward and backward of one micro-batch and return the trace.

    Args:
        model: in training mode; on the device of the batch (meta for a plan).
        batch: arguments of the model.
        on_gpu: which kernels the meta device imitates.
        engine: as under DeepSpeed, a complete gradient is marked and removed from its parameter at once, and every
            module with parameters of its own is marked; otherwise gradients stay on the parameters.
        linear: replaces torch's F.linear.
    """
    parameters = list(model.parameters())
    known = [*parameters, *model.buffers(), *(t for layer in quantized_layers(model) for t in layer.stored())]
    known += (x for x in batch.values() if isinstance(x, torch.Tensor))
    tracker = StorageTracker(known, getattr(model.config, "vocab_size", None))
    with contextlib.ExitStack() as stack:
        if engine:
            for hook in _engine_hooks(model, tracker):
                stack.callback(hook.remove)
        if parameters[0].is_meta:
            stack.enter_context(meta_kernels(on_gpu))
        if linear is not None:
            stack.enter_context(mock.patch.object(F, "linear", linear))
        stack.enter_context(tracker)
        loss = model(**batch).loss
        loss.backward()
        del loss
    trace = tracker.trace()
    tracker.references.clear()  # stop recording
    return trace


def _engine_hooks(model, tracker):
    def gradient_ready(parameter):
        tracker.mark("gradient", parameter, tracker.retag(parameter.grad, "gradients"))
        parameter.grad = None

    def before(module, _):
        tracker.mark("forward", module)

    def after(module, _, output):
        tracker.mark("done", module)
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _: tracker.mark("backward", module))

    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(gradient_ready)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield module.register_forward_pre_hook(before)
            yield module.register_forward_hook(after)


def peak_bytes(trace: list[Event]) -> int:
    """Peak of the bytes allocated on the device, without rounding by an allocator."""
    return _peak(trace, host=False)


def host_bytes(trace: list[Event]) -> int:
    """Peak of the bytes that the model moved to main memory: pinned, so rounded up to powers of two."""
    return _peak([e._replace(size=pinned_size(e.size)) for e in trace], host=True)


def pinned_size(size: float) -> int:
    """Bytes of main memory that torch allocates for a pinned tensor of `size` bytes."""
    return 2 ** math.ceil(math.log2(size)) if size >= 1 else 0


def _peak(trace: list[Event], host: bool) -> int:
    sizes, now, most = {}, 0, 0
    for event in trace:
        if event.what == "alloc" and (event.tag == "host") == host:
            sizes[event.key] = event.size
            now += event.size
            most = max(most, now)
        elif event.what == "free":
            now -= sizes.pop(event.key, 0)
    return most
