"""Floating-point operations that a training needs, and how many the device can do: utilisation, for the log."""

import functools
import time
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from glm_models.modeling import Block, PrefixEncoder


class Flops(NamedTuple):
    """Floating-point operations of a method's forward and backward pass, without recomputation."""

    token: float
    answer_token: float  # in the output layer, and in the last block after attention
    pair: float  # per pair of a token and one that it attends to
    prefix: int  # length of the prefix, which every token attends to

    def of(self, segments: list[tuple[int, int]], answer_tokens: int) -> float:
        """Operations of one micro-batch.

        Args:
            segments: of each sample, its tokens and how many of them are context.
            answer_tokens: of all samples.
        """
        tokens = sum(length for length, _ in segments)
        # context sees all of itself, any other token itself and what lies before it
        pairs = sum(c * c + (n * (n + 1) - c * (c + 1)) / 2 for n, c in segments) + tokens * self.prefix
        return self.token * tokens + self.answer_token * answer_tokens + self.pair * pairs


def needed_flops(model: nn.Module) -> Flops:
    """Operations for a model in which the parameters to train require gradients.

    A product with a weight matrix takes 2 x inputs x outputs operations per token; the gradient of its input as many
    again, if something before it trains; the gradient of the weight too, if it trains. Attention has two products of
    2 x heads x head_dim operations per pair, and four more for the gradients.
    """
    prefixes = [module for module in model.modules() if isinstance(module, PrefixEncoder)]
    trained_prefix = any(p.requires_grad for prefix in prefixes for p in prefix.parameters())
    reached = any(p.requires_grad for p in model.get_input_embeddings().parameters())  # does anything so far train?
    token = answer_token = pair = 0.0

    def product(module) -> float:
        return 2.0 * module.in_features * module.out_features * (1 + reached + module.weight.requires_grad)

    def used(root) -> list[nn.Module]:  # peft keeps the original of a module that trains whole, and does not use it
        return [m for path, m in root.named_modules() if "original_module" not in path.split(".")]

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        answers_only = False
        attention = block.get_attention()
        for module in used(block):  # in the order of their use
            if module is attention.dense:  # its input is the output of attention
                reached = reached or trained_prefix
                pair += 4.0 * attention.num_heads * attention.head_dim * (1 + 2 * reached)
                answers_only = block is blocks[-1]
            if isinstance(module, nn.Linear) and answers_only:
                answer_token += product(module)
            elif isinstance(module, nn.Linear):
                token += product(module)
            reached = reached or any(p.requires_grad for p in module.parameters(recurse=False))
    answer_token += sum(product(m) for m in used(model.get_output_embeddings()) if isinstance(m, nn.Linear))
    return Flops(token, answer_token, pair, sum(prefix.embedding.num_embeddings for prefix in prefixes))


@functools.cache
def matmul_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations per second of this device in the product of two large square matrices: the best of several runs."""
    accelerator = get_accelerator()
    size = 2048 if accelerator.device_name() == "cpu" else 8192
    device = accelerator.current_device_name()
    own = torch.Generator(device).manual_seed(0)  # does not change the random numbers of the training
    a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        accelerator.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    del a, b
    accelerator.empty_cache()  # otherwise a GPU keeps 0.9 GiB in blocks that the training cannot use
    return 2.0 * size**3 / best
