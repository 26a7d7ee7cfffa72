"""Logits of a model folder in float32, with or without a LoRA adapter, with one weight in memory at a time."""

import torch
import torch.nn.functional as F
from torch import nn

from glm_models import MODE
from glm_models.checkpoint import CheckpointError, FolderWeights, weight_layout
from glm_models.pretrained import check_prefix
from glm_models.quantized import quantized_names, round_trip
from tuning.lora.adapter import Adapter


def skeleton(mode: str, folder: str, **config) -> nn.Module:
    """The network of a model folder on the meta device, in eval mode.

    Args:
        config: keys of config.json to override.

    Raises:
        CheckpointError: the folder's weights do not fit its config.json.
    """
    with torch.device("meta"):
        model = MODE[mode].model(MODE[mode].config.from_pretrained(folder, **config)).eval().requires_grad_(False)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    found = {name: shape for names in weight_layout(folder).values() for name, (_, shape) in names.items()}
    check_prefix(folder, model.config, found)
    for name in sorted(expected.keys() | found.keys()):
        if name.endswith("inv_freq") or (name not in found and name in tied_weights(model)):
            continue
        if expected.get(name) != found.get(name):
            asked, there = (list(of[name]) if name in of else "nothing" for of in (expected, found))
            raise CheckpointError(f"{folder}: {name} is {there}, its config.json expects {asked}")
    return model


def quantized_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights that a quantised base keeps in few bits."""
    return frozenset(f"{name}.weight" for name in quantized_names(model))


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Weights that share the memory of others, with the names of these: an output layer tied to the embedding."""
    return (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


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
        return (whole[name] if name in whole else weights[tied.get(name, name)]).float()

    def fill(module: nn.Module, prefix: str) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            weight = read(prefix + key)
            if rounding is not None and (prefix + key in changed or prefix + key in weights.names):
                noise = torch.rand(weight.shape, generator=generator).sub_(0.5).mul_(torch.finfo(rounding).eps)
                weight = weight + noise.mul_(weight + adapter.update(prefix + key) if prefix + key in pairs else weight)
            setattr(module, key, nn.Parameter(weight, requires_grad=False))
            del parameter, weight

    def empty(module: nn.Module, prefix: str, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if prefix + "weight" in pairs:
            output = adapted(module, adapter, prefix + "weight", inputs[0], output)
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
        return output

    for name, module in model.named_modules():
        if list(module.named_parameters(recurse=False)):
            prefix = name + "."
            module.register_forward_pre_hook(lambda m, _, prefix=prefix: fill(m, prefix))
            module.register_forward_hook(lambda m, inputs, out, prefix=prefix: empty(m, prefix, inputs, out))
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


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
