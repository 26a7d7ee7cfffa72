"""Initial values of LoRA that are taken out of the base: PiSSA and OLoRA (--init_lora_weights).

There A0 and B0 come from the weight W, and W becomes W - scale B0 A0, so that the model is the same before the first
step. A result is for the original base: W - scale B0 A0 + scale B A = W + scale [B, -B0] [A; A0], which is plain LoRA
of twice the rank. peft converts in the same way (`path_initial_model_for_weight_conversion`).
"""

import copy
import math

import torch
from peft import LoraConfig

from glm_models.checkpoint import read_weights
from tuning.arguments.lora import changes_base


def starts_from_base(config: LoraConfig) -> bool:
    """Whether A and B start with a part of the base's weights."""
    return isinstance(config.init_lora_weights, str) and changes_base(config.init_lora_weights)


def saved_sizes(model) -> int:
    """How many times as large as the trained matrices a result is: twice the rank, or 1."""
    return 2 if hasattr(model, "peft_config") and starts_from_base(model.peft_config["default"]) else 1


def make_start(args, model) -> "Start | None":
    """The initial values of a training's model, if they were taken out of the base."""
    return Start(model, args.model_name_or_path) if saved_sizes(model) > 1 else None


class Start:
    """A0 and B0 of every adapted layer: a part of the training's states (see resume.Checkpoints).

    They are made from the base again when a run resumes. Where another machine or library finds other ones, the state's
    are used, and the base is changed by these.

    Args:
        model: a peft model before its first step; not partitioned.
        base: the base model's folder.
    """

    def __init__(self, model, base: str):
        self.model, self.base = model.get_base_model(), base
        layers = self.model.named_modules()
        self.pairs = {path: self._pair(layer) for path, layer in layers if hasattr(layer, "lora_A")}

    @staticmethod
    def _pair(layer) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(part["default"].weight.detach().cpu().clone() for part in (layer.lora_A, layer.lora_B))

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a training state."""
        parts = ("A", "B")
        return {f"{path}.{part}": t for path, pair in self.pairs.items() for part, t in zip(parts, pair, strict=True)}

    @torch.no_grad()
    def set_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        stored = {path: (tensors[f"{path}.A"], tensors[f"{path}.B"]) for path in self.pairs}
        differing = {path for path in stored if not all(map(torch.equal, stored[path], self.pairs[path]))}
        self.pairs = stored
        if not differing:
            return
        for name, weight in read_weights(self.base):
            path = name.removesuffix(".weight")
            if name.endswith(".weight") and path in differing:
                layer, (a, b) = self.model.get_submodule(path), stored[path]
                found = layer.base_layer.weight
                rest = weight.to(found.dtype).float() - layer.scaling["default"] * (b.float() @ a.float())
                found.copy_(rest)

    def as_plain(self, config: LoraConfig, weights: dict[str, torch.Tensor]) -> tuple[LoraConfig, dict]:
        """Config and weights, by their names in an adapter's file, of the same adapter for the original base."""
        config, weights = copy.deepcopy(config), dict(weights)
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
        for path, (a, b) in self.pairs.items():
            name_a, name_b = (f"base_model.model.{path}.lora_{part}.weight" for part in "AB")
            weights[name_a] = torch.cat([weights[name_a], a.to(weights[name_a])], dim=0)
            weights[name_b] = torch.cat([weights[name_b], -b.to(weights[name_b])], dim=1)
        return config, weights
