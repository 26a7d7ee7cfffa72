"""Which token sees which, and attention that never holds their scores.

Training batches are rows of whole samples end to end, without padding, and each sample attends to itself alone
(`Segment`). Generation has rows with padding on the left, and masks (`visible_mask`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Segment(NamedTuple):
    """One sample in a row of several."""

    tokens: int
    context: int = 0  # so many first ones are seen by all tokens of the segment; the rest by later ones


def real_tokens(input_ids: torch.Tensor, pad_token_id: int, cached: int) -> torch.Tensor:
    """The attention mask of ids that came without one: [batch, cached + tokens]; padding on the left is hidden.

    Padding on the right needs no hiding: no earlier token sees it.
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
        queries: number of query tokens, the last of the keys.
        attention_mask: [batch, keys], 1 real, 0 padding; None where no key is hidden.
        prefix: the P-Tuning prefix; seen by every query.
        context: [batch], so many first tokens are seen by every query.

    Returns:
        [batch or 1, 1, queries, pre_seq_len + keys]: bool for sdpa, additive of `dtype` for eager; None where plain
        causal attention is meant.
    """
    if attention_mask is None and prefix is None and context is None:
        return None
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
    mask = mask[:, None]
    if prefix is not None:
        mask = F.pad(mask, (prefix.shape[-2], 0), value=True)
    if config._attn_implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[batch, tokens, heads * head_dim] -> [batch, tokens, heads, head_dim]."""
    return x.unflatten(-1, (-1, head_dim))


def attend(module, q, k, v, mask, prefix, cache) -> torch.Tensor:
    """Attention of one layer through transformers' registry of implementations.

    Args:
        module: has config, layer_idx, scaling, is_causal.
        q, k, v: [batch, tokens, heads, head_dim]; k and v may have fewer heads (groups).
        mask: of `visible_mask`, or a list of Segments that fills the one row there is.
        prefix: [2, batch or segments, groups, pre_seq_len, head_dim] or None. It goes in front of the keys and
            values here, and never through the cache: transformers drops a cache under gradient checkpointing, and its
            gradient with it.
        cache: updated with k and v.

    Returns:
        [batch, tokens, heads * head_dim].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, list):
        return _attend_segments(module, q, k, v, mask, prefix).flatten(2)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    if prefix is not None:
        k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
    return _attention(module, q, k, v, mask).flatten(2)


def takes_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel that takes grouped keys and values and never holds the scores.

    On CUDA that is flash attention alone, which needs half precision and compute capability 8.0. The memory-efficient
    kernel, which older GPUs and float32 have, wants as many heads of keys as of queries; without it torch takes plain
    operations, which hold the scores in float32 several times: 1.5 GiB for 2,048 tokens and 32 heads.
    """
    if device.type != "cuda":
        return True
    return dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)


def _attention(module, q, k, v, mask, is_causal=None) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    sdpa = module.config._attn_implementation == "sdpa"
    if groups > 1 and mask is None and sdpa and not takes_groups(q.device, q.dtype):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        is_causal = q.shape[2] > 1 if is_causal is None else is_causal
        # transformers' function would ask for groups all the same
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=module.scaling).transpose(1, 2)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    return function(module, q, k, v, mask, scaling=module.scaling, dropout=0.0, is_causal=is_causal)[0]


def _attend_segments(module, q, k, v, segments, prefix) -> torch.Tensor:
    """Each segment by itself, with kernels that know two patterns only: all see all, and the square causal one.

    A prefix becomes the first keys of a square whose first queries are zeros and are dropped. A context is attended to
    twice, as part of the square for the answer's sake and by itself; a mask would cost tokens^2 bytes instead.
    """
    outputs = []
    # split, not sliced: the gradient of a slice is as large as the whole
    parts = zip(*(x.split([segment.tokens for segment in segments], dim=2) for x in (q, k, v)), strict=True)
    for i, ((tokens, context), (query, key, value)) in enumerate(zip(segments, parts, strict=True)):
        before = 0
        if prefix is not None:
            key, value = (torch.cat((prefix[n, i : i + 1], x), dim=2) for n, x in enumerate((key, value)))
            before = prefix.shape[-2]
        if context:
            front = (x[:, :, : before + context] for x in (key, value))
            outputs.append(_attention(module, query[:, :, :context], *front, None, is_causal=False))
        if context < tokens:
            square = F.pad(query, (0, 0, before, 0)) if before else query
            outputs.append(_attention(module, square, key, value, None, is_causal=True)[:, before + context :])
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def eager_attention(module, query, key, value, mask, scaling, dropout=0.0, is_causal=None, **_):
    """Attention spelled out, for --attn_implementation eager; arguments as the registry's other functions take them."""
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
