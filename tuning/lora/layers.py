"""LoRA layers that read and write the large output once; peft's layers do so three times and allocate new tensors.

Names, initial values, dropout, saving and merging are peft's. Only plain LoRA uses these layers, on an exact nn.Linear
or on a linear layer that this project has quantised: DoRA and all else get peft's own.
"""

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from glm_models.ops import OutputLayer, add_product, fork_dropped
from glm_models.quantized import QuantizedLinear
from tuning.lora.starts import starts_from_base

# Values of a plain LoRA adapter, which adds a product of two matrices to a weight. Other values make it something else.
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
# Initial values of A and B that leave the base as it is; other ways change its weights too, or need another layer.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def more_than_plain(config: dict, besides: tuple[str, ...] = ()) -> str | None:
    """The first config key of an adapter that makes it more than plain LoRA, or None.

    Args:
        besides: keys that may have any value.
    """
    for key, value in PLAIN.items():
        if (config.get(key) or value) != value and key not in besides:
            return key
    plain = config.get("init_lora_weights", True) in PLAIN_STARTS or "init_lora_weights" in besides
    return None if plain else "init_lora_weights"


def has_plain_layers(config: LoraConfig) -> bool:
    """Whether the layers of an adapter compute plain LoRA; other modules may be trained whole besides."""
    besides = ("modules_to_save",)
    if starts_from_base(config):  # the layer computes as any other, only weights differ
        besides += ("init_lora_weights",)
    return more_than_plain(config.to_dict(), besides) is None


class AddedLinear(nn.Linear):
    """`lora_B`, added in place. Still called as a module, since under ZeRO-3 the call gathers the weight."""

    def forward(self, x: torch.Tensor, total: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        """x [..., rank] times the transposed weight: [..., out]. With `total` [..., out], `scale` times that, added to
        it in place."""
        return super().forward(x) if total is None else add_product(total, x, self.weight, scale)


class LoraLinear(lora.Linear):
    """peft's layer around an nn.Linear: base(x) + B(A(dropout(x))) * scaling."""

    def update_layer(self, adapter_name, *args, **kwargs):
        super().update_layer(adapter_name, *args, **kwargs)
        if self.lora_variant or self.lora_bias[adapter_name]:
            raise ValueError(f"{type(self).__name__} computes plain LoRA; others need peft's own layer")
        self.lora_B[adapter_name].__class__ = AddedLinear
        base = self.get_base_layer()
        if isinstance(base, QuantizedLinear):  # peft takes the type from the base's weight, which is none to train in
            for part in (self.lora_A, self.lora_B):
                part[adapter_name].to(base.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x)
        inputs = {}
        for name in self.active_adapters:
            dropout = self.lora_dropout[name]
            drops = self.training and isinstance(dropout, nn.Dropout)  # an Identity where the adapter has none
            x, inputs[name] = fork_dropped(x, dropout.p) if drops else (x, x)
        result = self.base_layer(x)
        for name, dropped in inputs.items():
            result = self.lora_B[name](self.lora_A[name](dropped), result, self.scaling[name])
        return result


ROWS = 4096  # of which PredictionLinear makes copies at a time


class PredictionLinear(LoraLinear):
    """For prediction in half precision: each output is rounded once, as the base's output alone would be.

    One matrix product of [x, low] and [weight, B] computes the sum, in float32 within. `low`, the small product of x
    and A, stands there twice: rounded, and what the rounding lost. In the usual order base, low, product and sum would
    be rounded each; merged into the weight, most of the small update would be lost.
    """

    wide: torch.Tensor | None = None  # [out, in + 2 * ranks]; the base's weight is a view of it
    wide_adapters: tuple[str, ...] = ()  # whose B it holds

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters or self.merged or isinstance(self.base_layer, QuantizedLinear):
            return super().forward(x)
        wide, bias, rows = self.wide_weight().t(), self.base_layer.bias, x.reshape(-1, x.shape[-1])
        result = rows.new_empty(len(rows), wide.shape[1])
        for some, out in zip(rows.split(ROWS), result.split(ROWS), strict=True):
            wide_rows = torch.cat([some, *self.low_products(some)], -1)
            if bias is None:
                torch.mm(wide_rows, wide, out=out)
            else:
                torch.addmm(bias, wide_rows, wide, out=out)
        return result.view(*x.shape[:-1], -1)

    def low_products(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """For each adapter, x A^T times its scaling [rows, rank]: rounded, and what the rounding lost."""
        found = []
        for name in self.active_adapters:
            low = nn.functional.linear(rows.float(), self.lora_A[name].weight.float()) * self.scaling[name]
            rounded = low.to(rows.dtype)
            found += [rounded, (low - rounded).to(rows.dtype)]
        return found

    def wide_weight(self) -> torch.Tensor:
        """The base's weight and B of each adapter, twice; made at the first call, and again where the weight moved."""
        weight, adapters = self.base_layer.weight, tuple(self.active_adapters)
        if self.wide is None or self.wide.data_ptr() != weight.data_ptr() or self.wide_adapters != adapters:
            parts = [self.lora_B[name].weight for name in adapters for _ in range(2)]
            self.wide, self.wide_adapters = (
                torch.cat([weight.detach(), *(part.detach() for part in parts)], 1),
                adapters,
            )
            weight.data = self.wide[:, : weight.shape[1]]  # not kept twice
        return self.wide


def use_own_layers(config: LoraConfig, kind: type[LoraLinear] = LoraLinear) -> None:
    """Let peft use layers of `kind` where they compute the same as its own: plain LoRA on an exact nn.Linear, or
    on a layer of glm_models/quantized.py.

    peft asks registered layers first, and by isinstance: it would use them for other subclasses of nn.Linear too.
    """

    def make(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> LoraLinear | None:
        # with None, peft asks its own dispatchers
        fits = type(target) in (nn.Linear, OutputLayer) or isinstance(target, QuantizedLinear)
        return kind(target, adapter_name, config=config, **kwargs) if fits else None

    if has_plain_layers(config):
        config._register_custom_module({nn.Linear: make})
