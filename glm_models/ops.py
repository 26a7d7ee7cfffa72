"""Steps of the networks whose plain autograd would keep more for the backward pass than it needs.

Each computes in its forward pass just what the plain expression beside it computes, keeps one tensor of its input at
most, and computes the rest again in the backward pass, where that costs a few passes over memory and no matrix product.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (weight * (x32 * scale)).to(x.dtype)  # rounded once, as in the official models

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            toward = grad.float() * weight
            # the part of the gradient along the normed vector is lost: its length is always the same
            along = (toward * normed).mean(-1, keepdim=True)
            grad_x = toward.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 and rounded once; keeps x."""
    if x.is_cuda:  # one kernel forward and one or two backward, which keep the same; elsewhere torch has none
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        toward = grad * up
        # over x, the widest tensor there is: nobody needs it any more, and a second backward pass is refused
        torch.mul(F.silu(gate), grad, out=up)
        torch.ops.aten.silu_backward.grad_input(toward, gate, grad_input=gate)
        return x.detach()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension; keeps x.

    x must be nobody else's: its gradient is written over it.
    """
    return _SwiGLU.apply(x)


def through(function, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(function(x)); what it would keep of function(x) is computed again in the backward pass.

    Not for use inside a checkpoint: that has hooks of its own on what is kept, and these would take their place.
    """
    middle = function(x)
    storage, numbers = middle.untyped_storage()._cdata, middle.numel()

    def pack(tensor):
        whole = tensor.untyped_storage()._cdata == storage and tensor.numel() == numbers
        return tensor.shape if whole else tensor

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return function(x).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module(middle)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, rotate):
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(mixed, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, -sin), None, None, None  # turned back: the inverse of a rotation


def rotary(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate) -> torch.Tensor:
    """Queries, keys and values as they come from their projection, with queries and keys rotated; keeps the angles.

    One tensor comes out, so that what attention keeps of queries, keys and values is this one and not the projection's.

    Args:
        mixed: [batch, tokens, size].
        rotate: the family's rotation of such a tensor, a linear map: (mixed, cos, sin) -> [batch, tokens, size].
    """
    return _Rotary.apply(mixed, cos, sin, rotate)


class _AddedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, x, weight):
        ctx.save_for_backward(x, weight)
        # detached, since in place autograd refuses what comes out of another function, as under ZeRO-3 it does
        total = total.detach()
        total.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        tokens = grad.flatten(0, -2)
        # both the other way round: with so few rows or columns a CPU is three times as fast then
        grad_x = (weight.t() @ tokens.t()).t().view(x.shape) if ctx.needs_input_grad[1] else None
        grad_weight = (x.flatten(0, -2).t() @ tokens).t() if ctx.needs_input_grad[2] else None
        return grad, grad_x, grad_weight


def add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total + x @ weight.t(), for x and weight of a low rank; written over `total`, which must be nobody else's.

    Args:
        total: [..., out], contiguous.
        x: [..., rank].
        weight: [out, rank].
    """
    return _AddedProduct.apply(total, x, weight)


# Long rows

TILE = 1024  # tokens


class TiledMLP(nn.Module):
    """An MLP that may take some tokens at a time, keeping its input alone for the backward pass.

    The tiles are made in here, in one call of the module: under ZeRO-3 a call gathers the weights from all ranks, and
    ranks have different numbers of tokens. (There it must be a leaf module, see deepspeed.utils.set_z3_leaf_modules.)
    """

    tiled = False

    def transform(self, x: torch.Tensor, in_checkpoint: bool) -> torch.Tensor:
        """[batch, tokens, hidden] -> the same, token by token."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, in_checkpoint: bool = False) -> torch.Tensor:
        if not (self.tiled and self.training and torch.is_grad_enabled() and x.shape[1] > TILE):
            return self.transform(x, in_checkpoint)
        parts = [checkpoint(self.transform, part, True, use_reentrant=False) for part in x.split(TILE, dim=1)]
        return torch.cat(parts, dim=1)


def input_in_main_memory(x: torch.Tensor):
    """Context for the call of a checkpointed layer: what it keeps of its input x waits in pinned main memory.

    Only the copy that is kept moves; x itself and its gradient stay on the device. Nothing changes on a CPU.
    """
    return contextlib.nullcontext() if x.device.type == "cpu" else kept_in_main_memory(x)


def kept_in_main_memory(x: torch.Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """Context in which what autograd keeps of x, and of nothing else, is copied to main memory until it is needed."""
    storage, shape = x.untyped_storage()._cdata, x.shape

    def pack(kept: torch.Tensor):
        if kept.untyped_storage()._cdata != storage or kept.shape != shape:
            return kept
        copy = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
        return kept.device, copy.copy_(kept, non_blocking=True)

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        device, copy = packed
        return copy.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# Loss

CHUNK = 2**25  # logits at a time: 128 MiB in float32


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, chunk by chunk, so that logits are never kept nor computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        to_hidden, to_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)  # of maybe a million tokens
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight) if to_weight else None
        rows = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows]
            target = targets[start : start + rows, None]
            logits = (part @ weight.t()).float()
            logits -= logits.amax(-1, keepdim=True)
            wanted = logits.gather(-1, target)
            logits.exp_()
            whole = logits.sum(-1, keepdim=True)
            total += (whole.log() - wanted).sum(dtype=torch.float64)
            if not (to_hidden or to_weight):
                continue
            # probability, less 1 at the target; in float32, for the difference is small where the model is sure
            logits.div_(whole).scatter_add_(-1, target, whole.new_full((1, 1), -1.0).expand_as(target))
            grad = logits.to(hidden.dtype)
            del logits
            if to_hidden:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if to_weight:
                grad_weight.addmm_(grad.t(), part)
            del grad
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # in place: grad_weight is as large as the output layer; and with the factor in float32, not rounded before
        return *(saved if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), None


class OutputLayer(nn.Linear):
    """From hidden states to logits; given targets, to the summed loss without ever holding all logits."""

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]; with targets [n] of hidden states [n, hidden] the
        cross entropy in float32, summed."""
        if targets is None:
            return super().forward(hidden_states)
        # autograd says that a weight needs a gradient whether or not gradients are wanted now
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _SummedCrossEntropy.apply(hidden_states, weight, targets)


def summed_cross_entropy(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy in float32, summed, of what `head` makes of hidden_states [n, hidden], in chunks.

    A head that is not an OutputLayer (one with LoRA on it) is a function that only autograd knows: its chunks are
    computed again in the backward pass.
    """
    if isinstance(head, OutputLayer):
        return head(hidden_states, targets)

    def loss(part, target):
        return F.cross_entropy(head(part).float(), target, reduction="sum")

    chunks = max(1, -(-len(targets) * head.out_features // CHUNK))
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        # ZeRO-3 gathers weights from all ranks at every call: each must make as many, some perhaps with nothing in them
        most = torch.tensor(chunks, device=targets.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks = most.item()
    parts = zip(hidden_states.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()
