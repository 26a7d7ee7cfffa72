"""Rotary position embedding: the angles of each family, and the rotation of queries and keys."""

import torch
from torch.autograd.function import once_differentiable


def rotation_matrices(angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrices that turn pairs of numbers by `angles`, [2, 2, *angles.shape], of `dtype`; made once a micro-batch.

    matrices[i, j]: the share of number i of the old pair in number j of the new one.
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, sin, -sin, cos)).to(dtype).unflatten(0, (2, 2))


def _rotate(mixed: torch.Tensor, matrices: torch.Tensor, pairs) -> torch.Tensor:
    old = pairs(mixed)
    if old.numel() == mixed.numel():  # into a new tensor; nothing has to be copied
        result = torch.empty_like(mixed)
        torch.mul(old[:1], matrices[0], out=pairs(result)).addcmul_(old[1:], matrices[1])
        return result
    rotated = old[:1] * matrices[0]
    old.copy_(rotated.addcmul_(old[1:], matrices[1]))
    return mixed


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, matrices, pairs):
        ctx.save_for_backward(matrices)
        ctx.pairs = pairs
        return _rotate(mixed.detach(), matrices, pairs)  # detached for the reason in ops._AddedProduct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (matrices,) = ctx.saved_tensors
        # transposed: the inverse of a rotation. This gradient, put together from q's, k's and v's, may be overwritten
        return _rotate(grad, matrices.transpose(0, 1), ctx.pairs), None, None


def apply_rotary(mixed: torch.Tensor, matrices: torch.Tensor, pairs) -> torch.Tensor:
    """Rotate the queries and keys in the output of the query-key-value projection; at most three kernels on a GPU.

    The result may overwrite `mixed`, which nothing else may use, and its gradient that of the result.

    Args:
        mixed: [batch, tokens, size].
        matrices: see rotation_matrices.
        pairs: the family's function; gives the pairs to rotate as a view of mixed, [2, batch, tokens, ...]. Where it
            gives all of mixed, two kernels write a new tensor; else a third writes the pairs back.
    """
    return _Rotation.apply(mixed, matrices, pairs)


# ChatGLM-6B: one or two axes of positions


def glm_angles(config, position_ids: torch.Tensor) -> torch.Tensor:
    """The rotary angles.

    The inverse frequencies are rounded to float16 once, as in the code with which the official weights were trained;
    everything after that is float32.

    Args:
        position_ids: [batch, axes, tokens]; of 2 axes, each rotates half of every head; 1 axis rotates the whole head.

    Returns:
        [batch, tokens, 1, 3, axes, head_dim / axes / 2], float32: of queries, keys and values; values are not turned,
        their angles are 0.
    """
    axes = position_ids.shape[1]
    dim = config.hidden_size // config.num_attention_heads // axes
    steps = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = (1.0 / 10000 ** (steps / dim)).half().float()
    frequencies = torch.stack((inv_freq, inv_freq, torch.zeros_like(inv_freq)))[:, None]
    return position_ids.transpose(1, 2)[:, :, None, None, :, None] * frequencies


def glm_pairs(mixed: torch.Tensor, config) -> torch.Tensor:
    """The pairs in mixed [batch, tokens, heads * 3 * head_dim], laid out head by head [q | k | v].

    Each axis has its part of every head; the first half of the part pairs with the second half. Those of values are
    among the pairs, though not turned: a rotation of all is two kernels, of queries and keys alone three.

    Returns:
        [2, batch, tokens, heads, 3, axes, head_dim / axes / 2].
    """
    axes = 2 if config.position_encoding_2d else 1
    half = config.hidden_size // config.num_attention_heads // axes // 2
    return mixed.unflatten(-1, (-1, 3, axes, 2, half)).movedim(-2, 0)


# ChatGLM2-6B and ChatGLM3-6B: half of each head


def glm2_frequencies(config, base: float = 10000, device: torch.device | None = None) -> torch.Tensor:
    """Inverse frequencies of the rotary pairs: [kv_channels / 4], float32."""
    dim = config.kv_channels // 2
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def glm2_angles(config, position_ids: torch.Tensor) -> torch.Tensor:
    """The rotary angles, computed in float32: at float16, positions above 2048 would collapse.

    Args:
        position_ids: [batch, tokens].

    Returns:
        [batch, tokens, 1, 1, kv_channels / 4].
    """
    device = position_ids.device
    if config.rope_ratio_scales_base:
        inv_freq = glm2_frequencies(config, 10000 * config.rope_ratio, device)
    else:
        inv_freq, position_ids = glm2_frequencies(config, device=device), position_ids.float() / config.rope_ratio
    return position_ids[:, :, None, None, None] * inv_freq


def glm2_pairs(mixed: torch.Tensor, config) -> torch.Tensor:
    """The pairs of queries and keys in mixed [batch, tokens, size].

    The first half of each head is rotated, in pairs of neighbours; the second half stays as it is.

    Returns:
        [2, batch, tokens, heads, 2, kv_channels / 4], or with multi-query attention [..., heads + groups, 1, ...].
    """
    if config.multi_query_attention:  # [all q heads | k groups | v groups]
        heads = mixed.unflatten(-1, (-1, 1, config.kv_channels))[:, :, : config.num_attention_heads + config.num_groups]
    else:  # head by head [q | k | v]
        heads = mixed.unflatten(-1, (-1, 3, config.kv_channels))[:, :, :, :2]
    return heads[..., : config.kv_channels // 2].unflatten(-1, (-1, 2)).movedim(-1, 0)
