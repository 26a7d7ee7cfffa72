"""Logits of a model folder in float32, with or without a LoRA adapter on top, and one weight in memory at a time."""

import torch
import torch.nn.functional as F
from torch import nn

from glm_models import MODE
from glm_models.checkpoint import CheckpointError, WeightFile, weight_layout
from glm_models.modeling import check_prefix
from tuning.lora.adapter import Adapter


def skeleton(mode: str, folder: str, **config) -> nn.Module:
    """The network of a model folder, its weights without storage.

    Args:
        config: keys of config.json to set differently.

    Raises:
        CheckpointError: the folder's weights are not those that its config.json asks for.
    """
    with torch.device("meta"):
        model = MODE[mode].model(MODE[mode].config.from_pretrained(folder, **config)).eval().requires_grad_(False)
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    found = {name: shape for names in weight_layout(folder).values() for name, (_, shape) in names.items()}
    check_prefix(folder, model.config, found)
    for name in sorted(wanted.keys() | found.keys()):
        if name.endswith("inv_freq") or (name not in found and name in _tied(model)):
            continue
        if wanted.get(name) != found.get(name):
            asked, there = (list(of[name]) if name in of else "nothing" for of in (wanted, found))
            raise CheckpointError(f"{folder}: {name} is {there}, config.json asks for {asked}")
    return model


def _tied(model: nn.Module) -> dict[str, str]:
    """Weights that are others: an output layer that is the embedding."""
    return (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


@torch.no_grad()
def logits(
    mode: str, folder: str, batch, adapter: Adapter | None = None, rounding: torch.dtype | None = None
) -> torch.Tensor:
    """Logits of all tokens of a batch, padding left out: [tokens, vocabulary], float32.

    Each module reads its weights when it is called and gives them back: the most that is held is the largest weight.

    Args:
        batch: input_ids and attention_mask, as the tokenizer's `pad` gives them.
        adapter: added to the outputs of the modules it adapts, as in training; the weights stay as they are.
        rounding: move each adapted weight by a random share of what rounding to this type may move it.
    """
    model = skeleton(mode, folder)
    tied = _tied(model)
    where = {name: path for path, names in weight_layout(folder).items() for name in names}
    opened: dict[str, WeightFile] = {}  # one at a time
    pairs = adapter.pairs if adapter else {}
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        path = where[name := tied.get(name, name)]
        if path not in opened:
            opened.clear()
            opened[path] = WeightFile(path)
        return opened[path][name].float()

    def fill(module: nn.Module, prefix: str) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            weight = read(prefix + key)
            if rounding is not None and prefix + key in pairs:
                a, b = pairs[prefix + key]
                noise = torch.rand(weight.shape, generator=generator).sub_(0.5).mul_(torch.finfo(rounding).eps)
                weight = weight + noise.mul_(weight + adapter.scale * (b.float() @ a.float()))
            setattr(module, key, nn.Parameter(weight, requires_grad=False))
            del parameter, weight

    def empty(module: nn.Module, prefix: str, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
        if prefix + "weight" in pairs:
            a, b = pairs[prefix + "weight"]
            output = output + adapter.scale * F.linear(F.linear(inputs[0], a.float()), b.float())
        return output

    for name, module in model.named_modules():
        if list(module.named_parameters(recurse=False)):
            prefix = name + "."
            module.register_forward_pre_hook(lambda m, _, prefix=prefix: fill(m, prefix))
            module.register_forward_hook(lambda m, inputs, out, prefix=prefix: empty(m, prefix, inputs, out))
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
