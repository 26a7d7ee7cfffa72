"""LoRA layers that read and write the large output once: peft's own take it through memory three times, in new tensors.

Names, initial values, dropout, saving and merging are peft's.
"""

import torch
from peft.tuners import lora
from torch import nn

from glm_models.ops import add_product


class AddedLinear(nn.Linear):
    """`lora_B`. A module's call all the same: under ZeRO-3 that is what gathers the weight."""

    def forward(self, x: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., rank] times the weight; with `total` [..., out] added to it, in place."""
        return super().forward(x) if total is None else add_product(total, x, self.weight)


class LoraLinear(lora.Linear):
    """peft's layer around an nn.Linear: base(x) + B(A(dropout(x)) * scaling)."""

    def update_layer(self, adapter_name, *args, **kwargs):
        super().update_layer(adapter_name, *args, **kwargs)
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
