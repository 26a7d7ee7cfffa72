"""P-Tuning prefixes that are stored alone (glm_models/prefix.py): in training, beside their base, and written."""

import os
from collections.abc import Callable

import deepspeed
import torch
from torch import nn

from glm_models.checkpoint import CheckpointError, printable, read_json, write_json, write_side_files
from glm_models.prefix import Prefix, find_prefix, folder_of, prefix_config, read_prefix
from tuning.errors import UserError
from tuning.folders import MANIFEST, check_folder, file_hash
from tuning.hub import find_here
from tuning.lora.adapter import BASE_FILE, check_base, trained_bits
from tuning.lora.zero3 import is_partitioned
from utils import on_rank_0, once_per_node, print_rank_0

FILE = "pytorch_model.bin"  # what the official demos read


# Reading


def open_prefix(path: str) -> Prefix:
    """Read a prefix; of a folder that train.py wrote, all files are checked first.

    Raises:
        FolderError: a file of the folder differs from its manifest.
        CheckpointError: see read_prefix.
    """
    if os.path.isfile(os.path.join(path, MANIFEST)):
        check_folder(path)
    return read_prefix(path)


def load_with_prefix(load: Callable[..., nn.Module], prefix: Prefix, **config) -> nn.Module:
    """The model that `load` gives, with this prefix.

    Args:
        load: gives the base; keyword arguments change its config.
        config: more such keys.

    Raises:
        CheckpointError: see fill.
    """
    # a prefix that is read must not change the random numbers that follow
    with torch.random.fork_rng(devices=[]):
        model = load(**config | prefix.config)
    fill(model, prefix)
    return model


@torch.no_grad()
def fill(model: nn.Module, prefix: Prefix) -> None:
    """Copy a prefix into a model, in the model's type; also one on the meta device, to check shapes.

    Called on every rank if the model is partitioned.

    Raises:
        CheckpointError: a shape differs, or a value is too large for the model's type.
    """
    parameters = dict(model.transformer.prefix_encoder.named_parameters())
    for name, parameter in parameters.items():
        wanted = list(getattr(parameter, "ds_shape", parameter.shape))
        if list(prefix.weights[name].shape) != wanted:
            raise CheckpointError(
                f"the P-Tuning prefix {prefix.path} does not fit the base: {name} is "
                f"{list(prefix.weights[name].shape)}, the base needs {wanted}"
            )
    with deepspeed.zero.GatheredParameters(list(parameters.values()), 0, enabled=is_partitioned(model)):
        for name, parameter in parameters.items():
            if parameter.numel():  # under ZeRO-3 gathered on this rank
                parameter.copy_(prefix.weights[name])
                if not prefix.weights[name].to(parameter.dtype).isfinite().all():
                    raise CheckpointError(
                        f"the P-Tuning prefix {prefix.path}: {name} has values that {parameter.dtype} does not have; "
                        "use bf16 or float32"
                    )


# Training goes on from it


def take_prefix(args) -> None:
    """If --model_name_or_path is a prefix alone, and a P-Tuning training, go on from it beside its base.

    Raises:
        UserError: its base is not here.
    """
    path = args.model_name_or_path
    if args.train_type != "ptuning" or find_prefix(path) is None:
        return
    if args.ptuning_checkpoint:
        raise UserError(f"--model_name_or_path {path} is a P-Tuning prefix alone: name its base instead")
    named = prefix_config(path).get("_name_or_path")
    if (base := find_here(named)) is None:
        raise UserError(printable(
            f"--model_name_or_path {path} is a P-Tuning prefix alone and its base {named} is not here: name the base "
            f"with --model_name_or_path, and --ptuning_checkpoint {path}"
        ))  # fmt: skip
    args.model_name_or_path, args.ptuning_checkpoint = base, path


def start_from_prefix(args) -> dict[str, str]:
    """Check the prefix of --ptuning_checkpoint and its base, and print both; nothing without. Called on every rank.

    Returns:
        The name and the SHA-256 of the prefix's weights: part of what a run is.

    Raises:
        UserError: --pre_seq_len or --prefix_projection is not the prefix's.
        CheckpointError, FolderError: see open_prefix and adapter.check_base.
    """
    path = args.ptuning_checkpoint
    if not path:
        return {}
    config, digest = once_per_node(lambda: ((prefix := open_prefix(path)).config, file_hash(prefix.file)))
    wrong = {key: value for key, value in config.items() if getattr(args, key) != value}
    if wrong:
        asked = " ".join(f"--{key} {getattr(args, key)}" for key in wrong)
        there = " ".join(f"--{key} {value}" for key, value in wrong.items())
        raise UserError(f"{asked}: the prefix of --ptuning_checkpoint {path} keeps its length and kind: {there}")
    kind = ", ".join(f"{key} {value}" for key, value in config.items())
    lines = [f"P-Tuning starts from the prefix in {path} ({kind}); its base model is {args.model_name_or_path}"]
    lines.append(on_rank_0(lambda: check_base(folder_of(path), args.mode, args.model_name_or_path)))
    if (before := trained_bits(folder_of(path))) != (now := args.quantization_bit or 0):
        names = [f"quantised to {bits} bits" if bits else "not quantised" for bits in (before, now)]
        lines.append(f"warning: its base was {names[0]} in its training, and is {names[1]} here")
    print_rank_0("\n".join(map(printable, lines)))
    return {"SHA-256 of --ptuning_checkpoint": digest}


# Writing


def write_prefix(
    folder: str, model: nn.Module, tensors: dict[str, torch.Tensor], base: str, record: dict, stop_ids: list[int]
) -> None:
    """Write a prefix as the official scripts do, which the official demos load, and the record of its base.

    Args:
        tensors: the prefix's weights, by their names in the model.
        base: the base model's folder.
        record: see adapter.record_base.
        stop_ids: ids that end an answer.
    """
    dtype = next(iter(tensors.values())).dtype
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, os.path.join(folder, FILE))
    prefix = {key: getattr(model.config, key) for key in ("pre_seq_len", "prefix_projection")}
    write_side_files(folder, base, model.mode, dtype, stop_ids, **prefix)
    path = os.path.join(folder, "config.json")
    write_json(path, read_json(path) | {"_name_or_path": os.path.abspath(base)})
    write_json(os.path.join(folder, BASE_FILE), record)
