"""Weights under their official names, and under those of GlmForCausalLM."""

from typing import NamedTuple

import torch

from ..checkpoint import CheckpointError

FUSED, PARTS = ".self_attention.query_key_value.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")
OUTSIDE = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
}
LAYERS, NATIVE_LAYERS = "transformer.encoder.layers.", "model.layers."
IN_LAYER = {  # the gate comes first in both
    ".self_attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
    ".input_layernorm.": ".input_layernorm.",
    ".post_attention_layernorm.": ".post_attention_layernorm.",
}


def native_names(name: str) -> list[str]:
    """The names that an official weight has in GlmForCausalLM: three for query_key_value.

    Raises:
        CheckpointError: it has none.
    """
    for official, native in OUTSIDE.items():
        if name.startswith(official):
            return [native + name.removeprefix(official)]
    if name.startswith(LAYERS):
        inside = NATIVE_LAYERS + name.removeprefix(LAYERS)
        if FUSED in inside:
            return [inside.replace(FUSED, part) for part in PARTS]
        for official, native in IN_LAYER.items():
            if official in inside:
                return [inside.replace(official, native)]
    raise CheckpointError(f"{name} has no place in GlmForCausalLM")


def official_name(name: str) -> str:
    """The official name of a weight of GlmForCausalLM; of q_proj, k_proj and v_proj that of query_key_value.

    Raises:
        CheckpointError: it has none.
    """
    for official, native in OUTSIDE.items():
        if name.startswith(native):
            return official + name.removeprefix(native)
    if name.startswith(NATIVE_LAYERS):
        inside = LAYERS + name.removeprefix(NATIVE_LAYERS)
        for official, native in (*((FUSED, part) for part in PARTS), *IN_LAYER.items()):
            if native in inside:
                return inside.replace(native, official)
    raise CheckpointError(f"{name} is not a weight of GlmForCausalLM")


class Heads(NamedTuple):
    """How the rows of query_key_value are laid out.

    interleaved: head by head [q | k | v], else all q, all k, all v.
    """

    queries: int
    groups: int
    size: int
    interleaved: bool

    @classmethod
    def of(cls, config) -> "Heads":
        return cls(config.num_attention_heads, config.num_groups, config.kv_channels, not config.multi_query_attention)

    @property
    def rows(self) -> list[int]:
        """Rows of q, k and v."""
        return [self.queries * self.size, self.groups * self.size, self.groups * self.size]

    def split(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v [rows, ...] of a weight, bias, or other tensor with the rows of query_key_value."""
        if self.interleaved:
            return [part.flatten(0, 1) for part in fused.unflatten(0, (self.queries, 3, self.size)).unbind(1)]
        return list(fused.split(self.rows))

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The opposite of `split`."""
        if self.interleaved:
            return torch.stack([part.unflatten(0, (self.queries, self.size)) for part in parts], 1).flatten(0, 2)
        return torch.cat(parts)
