"""Which token sees which, and attention that never holds the scores of all pairs of tokens.

Training batches are rows of whole samples end to end, without padding, and each sample attends to itself alone
(`Segment`). Generation has rows with padding on the left, and masks (`visible_mask`).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .ops import choose


class Segment(NamedTuple):
    """One sample in a row of several samples."""

    tokens: int
    context: int = 0  # the first `context` tokens are seen by all tokens of the segment, the others by later ones only


class Spans(NamedTuple):
    """Where sequences lie end to end, for `varlen_attn`; the queries of each see its keys alone.

    queries, keys: where each sequence begins among all queries, and among all keys; then the end of the last one.
        int32 [sequences + 1], on the device.
    max_queries, max_keys: of the longest sequence; numbers of the CPU, so that it need not wait for the device.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    max_queries: int
    max_keys: int


class PackedRow(NamedTuple):
    """A row of segments for attention with one call for all of them; the same for all layers, see `pack_row`.

    causal: the segments; a prefix is the first keys of each.
    context: None where no segment has a context. Else the context of each segment, and its answer in pieces.
    in_context: which tokens are context, bool [tokens, 1, 1]; None as `context`.
    """

    causal: Spans
    context: Spans | None = None
    in_context: torch.Tensor | None = None


class LayerInputs(NamedTuple):
    """What a block needs beside hidden states; the same for all layers, except where `for_layer` selects.

    A tuple, because the hooks of ZeRO-3 look for tensors in the tuples and lists among a module's arguments.

    rotation: the matrices of the rotary positions, see rotary.rotation_matrices.
    mask: see `visible_mask`; None for plain causal attention.
    segments: the samples in the one row of a training batch; None for padded batches. Where given, mask is None.
    packed: the same for one call of attention; None where there is no kernel for it, see `why_one_by_one`.
    prefix: keys and values of P-Tuning, for each layer [2, batch or segments, groups, pre_seq_len, head_dim]; None
        without. For one layer: its tensor alone.
    cache: the key/value cache, or None.
    keep_positions: see `select_tokens`; acts in the last block only.
    """

    rotation: torch.Tensor
    mask: torch.Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    packed: PackedRow | None = None
    prefix: tuple[torch.Tensor, ...] | torch.Tensor | None = None
    cache: DynamicCache | None = None
    keep_positions: torch.Tensor | None = None

    def for_layer(self, layer: int, is_last: bool) -> "LayerInputs":
        """The inputs of one layer: its part of the prefix, and keep_positions only if it is the last layer."""
        return self._replace(
            prefix=self.prefix[layer] if self.prefix is not None else None,
            keep_positions=self.keep_positions if is_last else None,
        )


def as_segments(segments: torch.Tensor | Sequence[tuple[int, int]] | None) -> tuple[Segment, ...] | None:
    """Segments from pairs (tokens, context), or from the tensor that `segments_tensor` makes."""
    if segments is None:
        return None
    pairs = segments.tolist() if isinstance(segments, torch.Tensor) else segments
    return tuple(Segment(*pair) for pair in pairs)


def segments_tensor(segments: Sequence[tuple[int, int]], device: torch.device | str | None = None) -> torch.Tensor:
    """Segments as a tensor, int64 [segments, 2]: tokens and context. In this form they can be sent to other ranks."""
    return torch.tensor([tuple(segment) for segment in segments], dtype=torch.long, device=device).view(-1, 2)


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Some numbers on a device, int32. From pinned memory: otherwise the CPU would wait until the device is ready."""
    tensor = torch.tensor(numbers, dtype=torch.int32)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def token_places(segments: Sequence[Segment], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of a row [tokens]: the number of its segment, and its position in that segment."""
    ends = list(itertools.accumulate((segment.tokens for segment in segments), initial=0))
    token, ends = torch.arange(ends[-1], device=device), to_device(ends, device)
    number = torch.bucketize(token, ends[1:], right=True)
    return number, token - ends[number]


PIECE = 128  # tokens


def pack_row(segments: Sequence[Segment], prefix: int, device: torch.device) -> PackedRow:
    """Where the segments of a row lie, and their contexts.

    A context needs a second call, in which every query sees every key. So that this call takes the same tensors, the
    answers are sequences in it too; their results are dropped, and short pieces of them cost little.

    Args:
        prefix: number of keys in front of those of each segment.
    """
    causal = _make_spans([(segment.tokens, prefix + segment.tokens) for segment in segments], device)
    if not any(segment.context for segment in segments):
        return PackedRow(causal)
    pairs = []
    for tokens, context in segments:
        pieces = [min(PIECE, tokens - start) for start in range(context, tokens, PIECE)]
        first, *others = [context, *pieces] if context else pieces
        pairs += [(first, prefix + first), *((piece, piece) for piece in others)]
    number, place = token_places(segments, device)
    in_context = place < to_device([segment.context for segment in segments], device)[number]
    return PackedRow(causal, _make_spans(pairs, device), in_context[:, None, None])


def _make_spans(pairs: Sequence[tuple[int, int]], device: torch.device) -> Spans:
    queries, keys = zip(*pairs, strict=True)
    starts = (to_device(list(itertools.accumulate(lengths, initial=0)), device) for lengths in (queries, keys))
    return Spans(*starts, max(queries), max(keys))


def default_attention_mask(input_ids: torch.Tensor, pad_token_id: int | None, cached: int) -> torch.Tensor:
    """The attention mask of ids that came without one: [batch, cached + tokens]; padding on the left is hidden.

    Padding on the right need not be hidden: no earlier token sees it.
    """
    mask = (
        (input_ids != pad_token_id).long().cummax(1).values if pad_token_id is not None else torch.ones_like(input_ids)
    )
    return F.pad(mask, (cached, 0), value=1)


def visible_mask(
    queries: int,
    attention_mask: torch.Tensor | None,
    config,
    dtype: torch.dtype,
    prefix: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Which key each query may see, one mask for all layers.

    Args:
        queries: number of query tokens; they are the last of the keys.
        attention_mask: [batch, keys], 1 real, 0 padding; None where no key is hidden. Or the mask itself, without the
            prefix: bool [batch, 1, queries, keys].
        prefix: the P-Tuning prefix, [..., pre_seq_len, head_dim]; seen by every query.
        context: [batch], number of first tokens that every query sees.

    Returns:
        [batch or 1, 1, queries, pre_seq_len + keys]: bool for sdpa, additive of `dtype` for eager; None for plain
        causal attention.
    """
    if attention_mask is None and prefix is None and context is None:
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        mask = attention_mask
    else:
        mask = _causal_mask(queries, attention_mask, prefix, context)
    if prefix is not None:
        mask = F.pad(mask, (prefix.shape[-2], 0), value=True)
    if config._attn_implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def _causal_mask(queries: int, attention_mask, prefix, context) -> torch.Tensor:
    """The mask of `visible_mask`, bool, without the prefix."""
    keys = queries if attention_mask is None else attention_mask.shape[1]
    device = next(t.device for t in (attention_mask, context, prefix) if t is not None)
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    mask = (key <= query)[None]  # [1, queries, keys]
    if context is not None:
        mask = mask | (key < context[:, None, None])
    if attention_mask is not None:
        mask = mask & attention_mask[:, None].bool()
        # a padding query sees itself: softmax over nothing would be NaN
        mask = mask | (key == query)
    return mask[:, None]


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[batch, tokens, heads * head_dim] -> [batch, tokens, heads, head_dim]."""
    return x.unflatten(-1, (-1, head_dim))


def attention_forward(module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
    """Attention of one layer, by an implementation of transformers' registry.

    The prefix goes in front of the keys and values here, not through the cache: transformers drops the cache under
    gradient checkpointing, and the prefix would lose its gradient.

    Args:
        module: has config, layer_idx, scaling, is_causal.
        q, k, v: [batch, tokens, heads, head_dim]; k and v may have fewer heads (groups).
        inputs: of this layer; its cache is updated with k and v.

    Returns:
        [batch, tokens, heads * head_dim].
    """
    if inputs.packed is not None:
        return _packed_attention(module, q, k, v, inputs)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    prefix, cache = inputs.prefix, inputs.cache
    if inputs.segments is not None:
        return _segment_attention(module, q, k, v, inputs.segments, prefix).flatten(2)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    if prefix is not None:
        k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
    return _attention(module, q, k, v, inputs.mask).flatten(2)


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel that takes grouped keys and values and never holds the scores.

    On CUDA only flash attention does; it needs half precision and compute capability 8.0. The memory-efficient kernel,
    for older GPUs and float32, needs as many key heads as query heads; without it torch falls back to plain operations,
    which hold the scores in float32 several times: 1.5 GiB for 2,048 tokens and 32 heads.
    """
    if device.type != "cuda":
        return True
    return dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)


def why_one_by_one(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why attention is called for each segment of a row; None where `varlen_attn` takes the whole row.

    Args:
        implementation: that of the model, see --attn_implementation.
    """
    if implementation != "sdpa":
        return f"--attn_implementation is {implementation}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "the kernel for a whole row is for half precision"
    if head_dim % 8 or head_dim > 256:
        return f"the kernel for a whole row takes no heads of {head_dim}"
    return why_no_flash_attention(device)


def why_no_flash_attention(device: torch.device) -> str | None:
    """What keeps a device from torch's own flash attention, on which `varlen_attn` rests; None if nothing does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernel for a whole row is for NVIDIA's GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernel for a whole row needs a GPU of compute capability 8.0"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no kernel for a whole row"
    return None


# torch's fused kernels, as the dispatcher calls them
FUSED = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
]


class _Kept(TorchDispatchMode):
    """Notes what attention gives in the forward pass, and gives it again in place of computing it.

    torch's own contexts (create_selective_checkpoint_contexts) want the same operations both times. Under ZeRO-3 they
    differ: it gathers weights where they are not there.
    """

    def __init__(self, results: list, recomputes: bool):
        super().__init__()
        self.results, self.recomputes = results, recomputes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in FUSED:
            return func(*args, **(kwargs or {}))
        if self.recomputes:
            return self.results.pop(0)
        result = func(*args, **(kwargs or {}))
        # detached: autograd makes what is returned part of the graph, which would then keep itself
        self.results.append(tree_map_only(torch.Tensor, torch.Tensor.detach, result))
        return result


def keep_attention() -> tuple[_Kept, _Kept]:
    """Contexts of a layer's checkpoint that keeps what attention has given; all else in the layer is computed again.

    Kept are [tokens, heads * head_dim] and a float32 for each token and head. Attention alone grows with the square of
    a sample's length: in long ones it is most of what would be computed again.
    """
    results: list = []
    return _Kept(results, recomputes=False), _Kept(results, recomputes=True)


def _attention(module, q, k, v, mask, is_causal=None) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    sdpa = module.config._attn_implementation == "sdpa"
    if groups > 1 and mask is None and sdpa and not has_grouped_kernel(q.device, q.dtype):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        is_causal = q.shape[2] > 1 if is_causal is None else is_causal
        # transformers' function would still ask for grouped keys
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=module.scaling).transpose(1, 2)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    return function(module, q, k, v, mask, scaling=module.scaling, dropout=0.0, is_causal=is_causal)[0]


def _segment_attention(module, q, k, v, segments, prefix) -> torch.Tensor:
    """Each segment by itself. The kernels know two patterns only: every query sees every key, and square causal.

    A prefix becomes the first keys of a square whose first queries are zeros, and their outputs are dropped. A context
    is computed twice: as part of the square for the answer, and by itself. A mask would cost tokens^2 bytes instead.
    """
    outputs = []
    if prefix is not None:
        prefix = tuple(x.split(1) for x in prefix.unbind())
    # split, not slices: the gradient of a slice is as large as the whole tensor
    parts = zip(*(x.split([segment.tokens for segment in segments], dim=2) for x in (q, k, v)), strict=True)
    for i, ((tokens, context), (query, key, value)) in enumerate(zip(segments, parts, strict=True)):
        before = 0
        if prefix is not None:
            key, value = (torch.cat((prefix[n][i], x), dim=2) for n, x in enumerate((key, value)))
            before = prefix[0][i].shape[-2]
        if context:
            front = (x[:, :, : before + context] for x in (key, value))
            outputs.append(_attention(module, query[:, :, :context], *front, None, is_causal=False))
        if context < tokens:
            square = F.pad(query, (0, 0, before, 0)) if before else query
            outputs.append(_attention(module, square, key, value, None, is_causal=True)[:, before + context :])
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def _packed_attention(module, q, k, v, inputs: LayerInputs) -> torch.Tensor:
    """All segments in one call, in two where there is a context: the second sees in both directions."""
    packed = inputs.packed
    q, k, v = (x.squeeze(0) for x in (q, k, v))  # [tokens, heads, head_dim]
    if inputs.prefix is not None:
        k, v = (
            _behind_prefix(x, part, inputs.segments) for x, part in zip((k, v), inputs.prefix.unbind(), strict=True)
        )

    def attend(spans: Spans, right: int) -> torch.Tensor:
        # causal from the end: the last query of a sequence sees its last key, and all see the prefix
        window, groups = (-1, right), q.shape[1] > k.shape[1]
        return varlen_attn(q, k, v, *spans, scale=module.scaling, window_size=window, enable_gqa=groups)

    attended = attend(packed.causal, right=0)
    if packed.context is not None:
        attended = choose(packed.in_context, attend(packed.context, right=-1), attended)
    return attended.flatten(1)[None]


def _behind_prefix(x: torch.Tensor, prefix: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Keys or values [tokens, heads, head_dim], those of each segment behind its prefix.

    Args:
        prefix: [segments, heads, pre_seq_len, head_dim].
    """
    parts = zip(prefix.transpose(1, 2).unbind(), x.split([segment.tokens for segment in segments]), strict=True)
    return torch.cat(list(itertools.chain.from_iterable(parts)))


def eager_attention(module, query, key, value, mask, scaling, dropout=0.0, is_causal=None, **_):
    """Attention in plain operations, for --attn_implementation eager; arguments as in transformers' registry."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scaling) @ key.transpose(2, 3)  # scaled first: in float16 the product could overflow
    if mask is None and query.shape[2] > 1 and is_causal is not False:
        mask = torch.full(scores.shape[-2:], torch.finfo(scores.dtype).min, device=scores.device)
        mask = mask.triu(1 + scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
