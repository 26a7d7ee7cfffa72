"""Logits of a model folder in float32, with or without a LoRA adapter, with one weight in memory at a time."""

import torch
import torch.nn.functional as F
from torch import nn

from glm_models.checkpoint import FolderWeights
from glm_models.quantized import quantized_names, round_trip
from glm_models.streamed import skeleton, stream_logits, tied_weights
from tuning.lora.adapter import Adapter


def quantized_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights that a quantised base keeps in few bits."""
    return frozenset(f"{name}.weight" for name in quantized_names(model))


class BaseWeights:
    """The weights of a base model's folder by name, those of quantised layers after quantisation and back.

    Args:
        bits: see quantized.round_trip; 0: as they are in the files.
        names: of the weights that are quantised.

    Raises:
        CheckpointError: see weight_layout.
    """

    def __init__(self, folder: str, bits: int = 0, names: frozenset[str] = frozenset()):
        self.weights, self.bits, self.names = FolderWeights(folder), bits, names if bits else frozenset()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.weights[name]
        return round_trip(weight, self.bits) if name in self.names else weight


@torch.no_grad()
def logits(
    mode: str,
    folder: str,
    batch,
    adapter: Adapter | None = None,
    rounding: torch.dtype | None = None,
    bits: int = 0,
) -> torch.Tensor:
    """Logits of all tokens of a batch, padding left out: [tokens, vocabulary], float32.

    Each module reads its weights when it is called and frees them after: at most one module's weights are in memory.

    Args:
        batch: input_ids and attention_mask, as from the tokenizer's `pad`.
        adapter: added to the outputs of the modules that it adapts, as in training, not merged into weights; weights
            that were trained whole replace those of the folder.
        rounding: change each adapted or quantised weight at random by up to the rounding error of this type.
        bits: of the base's linear layers in the blocks; 0: not quantised.
    """
    model = skeleton(mode, folder)
    tied, weights = tied_weights(model), BaseWeights(folder, bits, quantized_weights(model))
    pairs, whole, changed = (adapter.pairs, adapter.whole, adapter.changed()) if adapter else ({}, {}, set())
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        weight = (whole[name] if name in whole else weights[tied.get(name, name)]).float()
        if rounding is not None and (name in changed or name in weights.names):
            noise = torch.rand(weight.shape, generator=generator).sub_(0.5).mul_(torch.finfo(rounding).eps)
            weight = weight + noise.mul_(weight + adapter.update(name) if name in pairs else weight)
        return weight

    def change(module: nn.Module, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return adapted(module, adapter, name, x, output) if name in pairs else output

    return stream_logits(model, batch, read, change)


def adapted(layer: nn.Linear, adapter: Adapter, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer with its adapter, from that without."""
    a, b = (matrix.float() for matrix in adapter.pairs[name])
    added = adapter.scale * F.linear(F.linear(x, a), b)
    if name not in adapter.magnitudes:
        return output + added
    # DoRA: the rows of weight + update get the lengths of the adapter; the bias stays as it is
    factor = adapter.magnitudes[name].float() / (layer.weight + adapter.update(name)).norm(dim=1)
    bias = 0 if layer.bias is None else layer.bias
    return factor * (output - bias + added) + bias
