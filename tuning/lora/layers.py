"""LoRA layers that read and write the large output once: peft's own take it through memory three times, in new tensors.

Names, initial values, dropout, saving and merging are peft's. What is more than plain LoRA on a plain linear layer
(DoRA, a quantised base, ...) gets peft's own layers.
"""

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from glm_models.ops import OutputLayer, add_product

# A plain LoRA adapter has these values; peft knows others, which are more than a product added to a weight.
PLAIN = {
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}
# How A and B began; any other way changed the base's weights too, or is another kind of layer.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def more_than_plain(config: dict) -> str | None:
    """The first key of an adapter's config that makes it more than plain LoRA; None if there is none."""
    for key, value in PLAIN.items():
        if (config.get(key) or value) != value:
            return key
    return None if config.get("init_lora_weights", True) in PLAIN_STARTS else "init_lora_weights"


class AddedLinear(nn.Linear):
    """`lora_B`. A module's call all the same: under ZeRO-3 that is what gathers the weight."""

    def forward(self, x: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., rank] times the weight; with `total` [..., out] added to it, in place."""
        return super().forward(x) if total is None else add_product(total, x, self.weight)


class LoraLinear(lora.Linear):
    """peft's layer around an nn.Linear: base(x) + B(A(dropout(x)) * scaling)."""

    def update_layer(self, adapter_name, *args, **kwargs):
        super().update_layer(adapter_name, *args, **kwargs)
        if self.lora_variant or self.lora_bias[adapter_name]:
            raise ValueError(f"{type(self).__name__} computes plain LoRA; others need peft's own layer")
        self.lora_B[adapter_name].__class__ = AddedLinear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x)
        result = self.base_layer(x)
        for name in self.active_adapters:
            # scaled where it is small
            low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            result = self.lora_B[name](low, result)
        return result


class PredictionLinear(LoraLinear):
    """For prediction in half precision: the base's product is added to the adapter's, not the other way round.

    A matrix product adds in float32 and rounds its result once. So the sum has one rounding error of its size, as the
    base's output alone; added the usual way it would have two, and merged into the weight the small one is mostly lost.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x)
        rows, total = x.reshape(-1, x.shape[-1]), self.base_layer.bias
        for name in self.active_adapters:
            low, weight = self.lora_A[name](rows) * self.scaling[name], self.lora_B[name].weight.t()
            total = low @ weight if total is None else torch.addmm(total, low, weight)
        return total.addmm_(rows, self.base_layer.weight.t()).view(*x.shape[:-1], -1)


def use_own_layers(config: LoraConfig, kind: type[LoraLinear] = LoraLinear) -> None:
    """Let peft make layers of `kind` where they compute what its own would: plain LoRA on a plain linear layer.

    peft asks for layers of others first, and would take them for every subclass of nn.Linear, quantised ones too.
    """
    plain = more_than_plain(config.to_dict()) is None

    def make(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> LoraLinear | None:
        # None: peft asks on, at last for its own layer
        return kind(target, adapter_name, config=config, **kwargs) if type(target) in (nn.Linear, OutputLayer) else None

    if plain:
        config._register_custom_module({nn.Linear: make})
