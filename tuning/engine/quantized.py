"""Loading with quantised linear layers: each weight is quantised as it is read, so no more than one is there whole."""

import torch
from torch import nn
from transformers import initialization as init

from glm_models.pretrained import read_generation_config
from glm_models.quantized import QuantizedLinear, use_quantized_layers
from tuning.engine.partitioned import initialise, tie
from tuning.engine.source import Source


def load_quantized(source: Source, bits: int, device: torch.device | str):
    """Like `from_pretrained`, but the blocks' linear layers are quantised (glm_models/quantized.py).

    The files are read once, one after the other; a weight goes to the device and is quantised there.

    Args:
        bits: 4 or 8; 0: the layers stay as they are.
        device: where the model is wanted.

    Raises:
        CheckpointError: see Source.open.
    """
    source.open()
    with torch.device("meta"), init.no_init_weights():
        model = source.model_class(source.config)
    if bits:
        use_quantized_layers(model, bits, source.dtype)
    missing, unknown = fill(model, source.read(), source.dtype, device)
    tie(model, missing)
    model.check_fit(source.folder, missing, unknown, [])
    if missing:  # on the CPU, so that a new prefix is the same on all devices
        for name in missing:
            put(model, name, torch.empty(model.get_parameter(name).shape, dtype=source.dtype))
        initialise(model, missing)
    model.generation_config = read_generation_config(source.folder, source.config)
    return model.to(device).eval()


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make a tensor the parameter of this name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


@torch.no_grad()
def fill(model: nn.Module, weights, dtype: torch.dtype, device) -> tuple[set[str], list[str]]:
    """Read the model's weights, (name, tensor) each. Returns the names of those that they lack, and the model lacks."""
    missing, unknown = set(dict(model.named_parameters(remove_duplicate=False))), []
    for name, tensor in weights:
        if name not in missing:
            unknown += [] if model.is_computed(name) else [name]
            continue
        missing.discard(name)
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if leaf == "weight" and isinstance(layer, QuantizedLinear):
            layer.quantize(tensor.to(device))
        else:
            put(model, name, tensor.to(device, dtype, copy=True))  # a copy: files are mapped into memory
    return missing, unknown
