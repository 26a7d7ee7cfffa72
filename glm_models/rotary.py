"""Rotary position embedding: the angles of each family, and the rotation of queries and keys."""

import torch
from torch.autograd.function import once_differentiable

from .attention import split_heads


class _RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, rotate):
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(mixed, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, -sin), None, None, None  # rotated back: the inverse of a rotation


def apply_rotary(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate) -> torch.Tensor:
    """Rotate the queries and keys in the output of the query-key-value projection; keeps only the angles.

    The result is one tensor, so that attention keeps this one and the projection's output is freed.

    Args:
        mixed: [batch, tokens, size].
        rotate: the family's rotation, a linear map: (mixed, cos, sin) -> [batch, tokens, size].
    """
    return _RotaryFunction.apply(mixed, cos, sin, rotate)


# ChatGLM-6B: one or two axes of positions


def glm_angles(config, position_ids: torch.Tensor, dtype: torch.dtype):
    """Cosine and sine of the rotary angles.

    The inverse frequencies are rounded to float16 once, as in the code with which the official weights were trained;
    everything after that is float32.

    Args:
        position_ids: [batch, axes, tokens]; of 2 axes, each rotates half of every head; 1 axis rotates the whole head.

    Returns:
        cos, sin: [batch, tokens, 1, axes, head_dim / axes / 2], of `dtype`.
    """
    axes = position_ids.shape[1]
    dim = config.hidden_size // config.num_attention_heads // axes
    steps = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = (1.0 / 10000 ** (steps / dim)).half().float()
    angles = position_ids.transpose(1, 2)[:, :, None, :, None] * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def glm_rotate(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the queries and keys in mixed [batch, tokens, heads * 3 * head_dim], laid out head by head [q | k | v].

    Each axis has its part of every head; the first half of the part pairs with the second half.
    """
    *_, axes, half = cos.shape
    rotated = mixed.clone()
    old, new = (x.unflatten(-1, (-1, 3, axes, 2, half))[:, :, :, :2] for x in (mixed, rotated))
    (first, second), (new_first, new_second) = old.unbind(-2), new.unbind(-2)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [batch, tokens, 1, 1, axes, half]
    torch.sub(first * cos, second * sin, out=new_first)
    torch.add(second * cos, first * sin, out=new_second)
    return rotated


# ChatGLM2-6B and ChatGLM3-6B: half of each head


def glm2_frequencies(config, base: float = 10000) -> torch.Tensor:
    """Inverse frequencies of the rotary pairs: [kv_channels / 4], float32."""
    dim = config.kv_channels // 2
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def glm2_angles(config, position_ids: torch.Tensor, dtype: torch.dtype):
    """Cosine and sine of the rotary angles, computed in float32: at float16, positions above 2048 would collapse.

    Args:
        position_ids: [batch, tokens].

    Returns:
        cos, sin: [batch, tokens, 1, kv_channels / 4], of `dtype`.
    """
    if config.rope_ratio_scales_base:
        inv_freq = glm2_frequencies(config, 10000 * config.rope_ratio)
    else:
        inv_freq, position_ids = glm2_frequencies(config), position_ids.float() / config.rope_ratio
    angles = position_ids[:, :, None, None] * inv_freq.to(position_ids.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def glm2_rotate(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, config) -> torch.Tensor:
    """Rotate the queries and keys in mixed [batch, tokens, size].

    The first half of each head is rotated, in pairs of neighbours; the second half stays as it is.
    """
    rotated = mixed.clone()
    if config.multi_query_attention:  # [all q heads | k groups | v groups]
        heads = config.num_attention_heads + config.num_groups
        old, new = (split_heads(x, config.kv_channels)[:, :, :heads] for x in (mixed, rotated))
    else:  # head by head [q | k | v]
        old, new = (x.unflatten(-1, (-1, 3, config.kv_channels))[:, :, :, :2] for x in (mixed, rotated))
        cos, sin = cos[:, :, None], sin[:, :, None]
    (even, odd), (new_even, new_odd) = (
        x[..., : config.kv_channels // 2].unflatten(-1, (-1, 2)).unbind(-1) for x in (old, new)
    )
    torch.sub(even * cos, odd * sin, out=new_even)
    torch.add(odd * cos, even * sin, out=new_odd)
    return rotated
