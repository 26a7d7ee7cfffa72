"""Which weights may be kept in 4 or 8 bits, and what is asked of them. The layers are in quantized_layers.py.

All linear layers of the blocks are quantised, by bitsandbytes: nf4 with double quantisation, or int8 with one scale per
row. Embedding, output layer, norms, biases and a prefix encoder keep the model's own type. bitsandbytes is imported
only where something is quantised.
"""

import torch
from torch import nn

from .modeling import Block

BITS = {4: "nf4", 8: "int8"}


class QuantizedLinear(nn.Linear):
    """What both kinds of layers have in common: a frozen weight that is dequantised for each product.

    compute_dtype: of inputs and outputs.
    """

    compute_dtype: torch.dtype

    def quantize(self, weight: torch.Tensor) -> None:
        """Keep `weight` [out, in] in few bits, on its device. The meta device gives the same layout without values."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that the layer computes with."""
        raise NotImplementedError

    def stored(self) -> list[torch.Tensor]:
        """All tensors in which the weight is kept."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self.infer(x)

    def infer(self, x: torch.Tensor) -> torch.Tensor:
        """The product where no gradient is needed."""
        return nn.functional.linear(x, self.dequantized(x.dtype), self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # as of any linear layer: bitsandbytes would add its scales, also to a state that leaves frozen weights out
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


class _Product(torch.autograd.Function):
    """The weight is dequantised again for the backward pass, and nothing else is kept.

    bitsandbytes' own function for int8 keeps its input, and keeps it where autograd's hooks do not see it: gradient
    checkpointing would save almost nothing.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantized(grad.dtype), None


def quantized_names(model: nn.Module) -> list[str]:
    """Names of the linear layers that are quantised, or would be."""
    inside = [(name, block) for name, block in model.named_modules() if isinstance(block, Block)]
    return [
        f"{outer}.{name}"
        for outer, block in inside
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def use_quantized_layers(model: nn.Module, bits: int, dtype: torch.dtype) -> None:
    """Put quantised layers in the place of the blocks' linear layers.

    Args:
        model: on the meta device the new layers have no values either.
        bits: 4 or 8.
        dtype: compute dtype.
    """
    from .quantized_layers import KINDS

    for name in quantized_names(model):
        layer = model.get_submodule(name)
        new = KINDS[bits](layer.in_features, layer.out_features, layer.bias is not None, dtype)
        new.quantize(layer.weight.detach())
        new.bias = layer.bias
        model.set_submodule(name, new)


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    """The quantised layers of a model."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def count_numbers(model: nn.Module, tied_twice: bool = False) -> int:
    """How many numbers the weights stand for; bitsandbytes keeps two in a byte. Under ZeRO-3 those of all ranks.

    Args:
        tied_twice: count tied weights under each of their names.
    """
    packed = {id(layer.weight): layer.in_features * layer.out_features for layer in quantized_layers(model)}
    parameters = model.named_parameters(remove_duplicate=not tied_twice)
    return sum(packed.get(id(p), getattr(p, "ds_numel", p.numel())) for _, p in parameters)


def round_trip(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight [out, in] after quantisation and back, in float32: what a model with a quantised base computes with."""
    from .quantized_layers import KINDS

    out, size = weight.shape
    layer = KINDS[bits](size, out, False, torch.float32)
    layer.quantize(weight)
    return layer.dequantized(torch.float32)
