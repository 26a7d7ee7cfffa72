"""LoRA adapters in both directions.

query_key_value has one A for queries, keys and values; q_proj, k_proj and v_proj have one each. So towards
GlmForCausalLM A is repeated and the rank stays; on the way back the rank stays if the three A are equal, else it is
their sum, with zeros in the blocks between them.
"""

import math
import os
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from ..checkpoint import CheckpointError, write_json
from .names import FUSED, Heads, native_names, official_name

Pair = tuple[torch.Tensor, torch.Tensor]  # A [rank, in], B [out, rank]


class Update(NamedTuple):
    """What an adapter adds: A and B, and with DoRA the lengths of the rows, by the names of the weights."""

    pairs: dict[str, Pair]
    magnitudes: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        return len(next(iter(self.pairs.values()))[0])


def native_update(update: Update, heads: Heads) -> Update:
    """An official adapter for GlmForCausalLM, of the same rank."""
    pairs, magnitudes = {}, {}
    for name, (a, b) in update.pairs.items():
        names, rows = native_names(name), [b]
        if len(names) > 1:
            _check_rows(name, b, heads)
            rows = heads.split(b)
        pairs |= {native: (a.clone(), part.contiguous()) for native, part in zip(names, rows, strict=True)}
    for name, magnitude in update.magnitudes.items():
        names = native_names(name)
        parts = heads.split(magnitude) if len(names) > 1 else [magnitude]
        magnitudes |= {native: part.contiguous() for native, part in zip(names, parts, strict=True)}
    return Update(pairs, magnitudes)


def official_update(update: Update, heads: Heads) -> Update:
    """An adapter of GlmForCausalLM for the official model.

    Where q_proj, k_proj and v_proj have different A, or not all are adapted, the rank grows; then all other pairs get
    rows of zeros, because an adapter has one rank.

    Raises:
        CheckpointError: with DoRA, some of the three are not adapted: their rows have no lengths.
    """
    pairs, magnitudes = {}, {}
    for name in dict.fromkeys(map(official_name, update.pairs)):
        names = native_names(name)
        if len(names) == 1:
            pairs[name] = update.pairs[names[0]]
            if names[0] in update.magnitudes:
                magnitudes[name] = update.magnitudes[names[0]]
            continue
        pairs[name] = _join([update.pairs.get(part) for part in names], heads)
        if update.magnitudes:
            if missing := [part for part in names if part not in update.magnitudes]:
                raise CheckpointError(f"DoRA without {missing[0]} cannot become an adapter of query_key_value")
            magnitudes[name] = heads.join([update.magnitudes[part] for part in names])
    rank = max(len(a) for a, _ in pairs.values())
    return Update({name: _widen(pair, rank) for name, pair in pairs.items()}, magnitudes)


def _join(parts: list[Pair | None], heads: Heads) -> Pair:
    """A and B of query_key_value from those of q, k and v; None for one that is not adapted."""
    given = [part for part in parts if part is not None]
    first = given[0]
    if len(given) == len(parts) and all(torch.equal(first[0], a) for a, _ in given):
        return first[0], heads.join([b for _, b in parts])
    ranks = [0 if part is None else len(part[0]) for part in parts]
    blocks, start = [], 0
    for part, rank, rows in zip(parts, ranks, heads.rows, strict=True):
        block = first[1].new_zeros(rows, sum(ranks))
        if part is not None:
            block[:, start : start + rank] = part[1]
        blocks.append(block)
        start += rank
    return torch.cat([a for a, _ in given]), heads.join(blocks)


def _widen(pair: Pair, rank: int) -> Pair:
    """A and B with zeros up to a rank."""
    a, b = pair
    more = rank - len(a)
    if not more:
        return a.contiguous(), b.contiguous()
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), more)], 1)


def _check_rows(name: str, b: torch.Tensor, heads: Heads) -> None:
    if len(b) != sum(heads.rows):
        raise CheckpointError(
            f"the adapter adds {len(b)} rows to {name}, its base has {sum(heads.rows)}: another base?"
        )


def check_fit(update: Update, shapes: dict[str, torch.Size], base: str) -> None:
    """Check that a converted adapter fits the base on which it will be used.

    Args:
        shapes: of the base's weights, by name.

    Raises:
        CheckpointError: it does not.
    """
    for name, (a, b) in update.pairs.items():
        shape = (b.shape[0], a.shape[1])
        if shapes.get(name) != shape:
            there = list(shapes[name]) if name in shapes else "nothing"
            raise CheckpointError(
                f"the adapter adds {list(shape)} to {name}, which is {there} in {base}: another base?"
            )


def targets(update: Update, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """target_modules: the last part of the names of the adapted modules, or whole names where others end so too."""
    ends = {name.split(".")[-2] for name in update.pairs}
    reached = {name for name in shapes if name.endswith(".weight") and name.split(".")[-2] in ends}
    return sorted(ends if reached == update.pairs.keys() else (name.removesuffix(".weight") for name in update.pairs))


def is_native_adapter(update: Update) -> bool:
    """Whether an adapter is for a GlmForCausalLM.

    Raises:
        CheckpointError: it is neither for that nor for the official model.
    """
    native = [name.startswith("model.") or name.startswith("lm_head.") for name in update.pairs]
    if all(native):
        return True
    for name in update.pairs:
        native_names(name)  # raises for a name that is not official
    return False


def same_update(official: Update, native: Update, heads: Heads) -> bool:
    """Whether both adapters add the same to the weights, but for rounding in float64."""
    for name, (a, b) in official.pairs.items():
        whole = b.double() @ a.double()
        names = native_names(name)
        parts = []
        for part, rows in zip(names, heads.rows if FUSED in name else [len(b)], strict=True):
            pair = native.pairs.get(part)
            parts.append(whole.new_zeros(rows, whole.shape[1]) if pair is None else pair[1].double() @ pair[0].double())
        found = heads.join(parts) if len(parts) > 1 else parts[0]
        if not torch.allclose(found, whole, rtol=0, atol=1e-9 * whole.abs().max().item()):
            return False
    return {part for name in official.pairs for part in native_names(name)} >= native.pairs.keys()


def converted_config(config: dict, source: Update, made: Update, shapes: dict[str, tuple[int, ...]]) -> dict:
    """adapter_config.json of a converted adapter: other modules, and as strong as before if the rank has grown.

    Args:
        shapes: of the weights of its base, by name.
    """
    growth = made.rank / source.rank
    alpha = config["lora_alpha"] * (math.sqrt(growth) if config.get("use_rslora") else growth)
    return config | {"target_modules": targets(made, shapes), "r": made.rank, "lora_alpha": alpha}


def write_plain_adapter(folder: str, config: dict, update: Update) -> None:
    """Write an adapter's weights and config in peft's format."""
    tensors = {}
    for name, (a, b) in update.pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    for name, magnitude in update.magnitudes.items():
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = magnitude
    path = os.path.join(folder, "adapter_model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)  # save_file makes files that only the owner can read
    write_json(os.path.join(folder, "adapter_config.json"), config)
