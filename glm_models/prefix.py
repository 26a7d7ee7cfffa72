"""P-Tuning prefixes that are stored alone: what the official scripts save, in place of a whole model.

Such a folder has config.json with pre_seq_len and prefix_projection, the base in `_name_or_path`, and weights
`transformer.prefix_encoder.*` alone. A weights file without a folder around it will do, and one whose names have no
`transformer.prefix_encoder.` before them, as the official demos use them.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .checkpoint import CheckpointError, WeightFile, read_json, weight_files
from .messages import short_repr

PREFIX = "prefix_encoder."  # in the names of a prefix's weights
FULL_PREFIX = f"transformer.{PREFIX}"
# The weights of a prefix encoder, without and with prefix_projection.
PARTS = {False: {"embedding.weight"}}
PARTS[True] = {"embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}


class Prefix(NamedTuple):
    """A P-Tuning prefix that was stored alone.

    path: the folder or the weights file, as the user named it.
    file: the weights file.
    weights: by their names in a prefix encoder, memory-mapped.
    """

    path: str
    file: str
    weights: dict[str, torch.Tensor]

    @property
    def config(self) -> dict:
        """The keys of a model's config.json that this prefix needs."""
        return {"pre_seq_len": len(self.weights["embedding.weight"]), "prefix_projection": len(self.weights) > 1}


def inner_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a prefix encoder -> name in the file, for the weights of a prefix that is stored alone; empty if there
    are weights of a model too, or none of a prefix."""
    names = [name for name in names if not name.endswith("inv_freq")]  # computed by the model
    if names and all(PREFIX in name for name in names):
        return {name.rpartition(PREFIX)[2]: name for name in names}
    stripped = "embedding.weight" in names and PARTS[True].issuperset(names)
    return {name: name for name in names} if stripped else {}


def find_prefix(path: str) -> str | None:
    """The weights file of a prefix that is stored alone; None for all else, also for a folder without weights.

    Raises:
        CheckpointError: the weights file is broken.
    """
    if os.path.isfile(path):
        return path if inner_names(WeightFile(path).names) else None
    try:
        files = weight_files(path)
    except CheckpointError:  # those who need weights say so
        return None
    return files[0] if len(files) == 1 and inner_names(WeightFile(files[0]).names) else None


def folder_of(path: str) -> str:
    """The folder of a model or prefix, of which a weights file may have been named."""
    return os.path.dirname(path) or "." if os.path.isfile(path) else path


def prefix_config(path: str) -> dict:
    """config.json beside a prefix's weights; empty if there is none, as of a file that was copied elsewhere."""
    config = os.path.join(folder_of(path), "config.json")
    return read_json(config) if os.path.isfile(config) else {}


def read_prefix(path: str) -> Prefix:
    """Read a prefix that is stored alone: a folder, or its weights file.

    Raises:
        CheckpointError: it is not one, a weight is missing, unknown or not finite, or config.json says another length
            or kind.
    """
    file = find_prefix(path)
    if file is None:
        raise CheckpointError(
            f"{path} does not hold a P-Tuning prefix alone: {FULL_PREFIX}embedding.weight and no weights of a model"
        )
    stored = WeightFile(file)
    names = inner_names(stored.names)
    if lost := set(filter(lambda name: PREFIX in name, stored.names)) - set(names.values()):
        raise CheckpointError(f"{file} holds more than one P-Tuning prefix: {_list([*lost, *names.values()])}")
    weights = {inner: stored[name] for inner, name in names.items()}
    if weights.keys() not in PARTS.values():
        raise CheckpointError(f"{file}: a P-Tuning prefix is {_list(PARTS[False])} or {_list(PARTS[True])}; it has "
                              f"{_list(weights)}")  # fmt: skip
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.ndim != (1 if name.endswith("bias") else 2) or not len(tensor):
            raise CheckpointError(f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, not a weight of a prefix")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name} holds NaN or infinity; the training went wrong, use an earlier one")
    prefix = Prefix(path, file, weights)
    said = prefix_config(path)
    for key, value in prefix.config.items():
        if said.get("pre_seq_len") is not None and key in said and said[key] != value:
            where = os.path.join(folder_of(path), "config.json")
            raise CheckpointError(f"{where}: {key} is {short_repr(said[key])}, but the prefix beside it has {value}")
    return prefix


def describe_prefix(path: str) -> str:
    """What a prefix that is stored alone is, and what takes it; for messages where a whole model is needed."""
    return (
        f"{path} holds a P-Tuning prefix alone, as the official scripts save it, and not the model that it was trained "
        f"on ({short_repr(prefix_config(path).get('_name_or_path'))}). predict.py answers with it beside that model "
        "(--ori_model_dir), and train.py --train_type ptuning goes on from it (--ptuning_checkpoint)"
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
