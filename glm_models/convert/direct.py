"""A GlmForCausalLM written from a model in memory, and one read as the official model, without a converted copy."""

import hashlib
import os

import torch
from safetensors.torch import save_file

from .. import MODE
from ..checkpoint import (
    CheckpointError,
    FolderWeights,
    read_weights,
    weight_files,
    write_generation_config,
    write_json,
    write_side_files,
    write_weights,
)
from ..identify import describe_base, describe_weights, is_native_folder
from ..streamed import as_bytes, meta_network, skeleton
from .model import KEPT, Official, compare_outputs, compare_tokenizers, official_files, open_native
from .names import native_names
from .tokenizer import check_names, make_tokenizer, write_tokenizer
from .weights import OfficialView

# Writing


def check_convertible(mode: str, base: str) -> None:
    """Check that models trained from a base can be written by `write_model`, before the training.

    Raises:
        CheckpointError: it has a P-Tuning prefix, or a tokenizer of a kind that is not converted.
    """
    config, tokenizer = MODE[mode].config.from_pretrained(base), MODE[mode].tokenizer.from_pretrained(base)
    if config.pre_seq_len is not None:
        raise CheckpointError(
            f"--save_format native: {base} has a P-Tuning prefix, for which GlmForCausalLM has no place; leave the "
            "flag out"
        )
    check_names(tokenizer)
    make_tokenizer(tokenizer.vocab_file, tokenizer.special_tokens)


def write_model(
    folder: str, base: str, mode: str, dtype: torch.dtype, stop_ids: list[int], tensors, total: int, computed: dict
) -> list[str]:
    """Write an official model as the folder of a GlmForCausalLM, with the official files below it.

    Args:
        base: the folder of the base model; config, tokenizer and official code are copied from there.
        dtype: of the weights.
        tensors: an iterator of (official name, tensor on the CPU). Only one shard is held in memory.
        total: bytes of all of them.
        computed: tensors by name that official files have and the model computes.

    Returns:
        Lines for the user: what was verified.

    Raises:
        CheckpointError: the base's files are of a kind that is not converted, or the written folder is wrong.
    """
    kept = os.path.join(folder, KEPT)
    os.makedirs(kept)
    write_side_files(kept, base, mode, dtype, stop_ids)
    official = Official(kept, mode, MODE[mode].config.from_pretrained(kept), MODE[mode].tokenizer.from_pretrained(kept))
    content = official.native(dtype)
    write_tokenizer(folder, official.tokenizer, official.config.seq_length)
    write_json(os.path.join(folder, "config.json"), content)
    write_generation_config(folder, kept, stop_ids, content)

    digests: dict[str, str] = {}
    write_weights(folder, _as_native(tensors, official, digests), total)
    if computed:
        copy = os.path.join(kept, os.path.basename(weight_files(folder)[-1]))
        save_file({name: tensor.clone() for name, tensor in computed.items()}, copy, metadata={"format": "pt"})
        os.chmod(copy, 0o644)  # save_file makes files that only the owner can read
    return _verify(folder, official, digests)


def _as_native(tensors, official: Official, digests: dict[str, str]):
    """Yield the tensors of GlmForCausalLM; their digests are put into `digests`."""
    for name, tensor in tensors:
        names = native_names(name)
        parts = official.heads.split(tensor) if len(names) > 1 else [tensor]
        for native, part in zip(names, parts, strict=True):
            digests[native] = _digest(part)
            yield native, part


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor.detach()).numpy()).hexdigest()


def _verify(folder: str, official: Official, digests: dict[str, str]) -> list[str]:
    """Compare a written folder with what was written, and both forms' logits. Returns lines, raises CheckpointError."""
    weights = FolderWeights(folder)
    for name in sorted(digests.keys() | weights.where.keys()):
        if name not in digests or name not in weights.where or _digest(weights[name]) != digests[name]:
            raise CheckpointError(f"{name} in {folder} is not as it was written; the disk or the memory is at fault")
    network = meta_network(official.mode, official.folder)
    open_native(folder, official)  # names and shapes, before the logits
    checked = compare_tokenizers(folder, official.tokenizer)
    return [
        f"verified: the {len(digests)} weights on disk are those of the model, bit for bit; tokenizer.json gives the "
        f"official ids ({checked} texts), chat_template.jinja the official prompts",
        compare_outputs(official, network, OfficialView(folder, official.heads), folder),
    ]


# Reading


def side_folder(folder: str) -> str:
    """Where config and tokenizer of a model are in official form: in its folder, or inside that of a GlmForCausalLM.

    Raises:
        CheckpointError: a GlmForCausalLM that this project has not written.
    """
    if not is_native_folder(folder):
        return folder
    kept = os.path.join(folder, KEPT)
    if not os.path.isdir(kept):
        raise CheckpointError(
            f"{folder} is a GlmForCausalLM without the folder {KEPT}, which has the official config and tokenizer; "
            "convert it first: python -m glm_models.convert, with an official folder as --ori_model_dir"
        )
    return kept


def open_view(mode: str, folder: str) -> OfficialView | None:
    """The weights of a GlmForCausalLM under official names; None for an official folder.

    Raises:
        CheckpointError: it is not the network that its official files describe, or a file is broken.
    """
    if side_folder(folder) == folder:
        return None
    return open_native(folder, official_files(mode, folder, None))


def read_model(mode: str, folder: str):
    """An iterator of (official name, tensor) of a model in either form. Raises CheckpointError: see open_view."""
    view = open_view(mode, folder)
    return read_weights(folder) if view is None else view.items()


def describe_in_either_form(mode: str, folder: str) -> dict:
    """`describe_base` of a model in either form: the same for both."""
    side = side_folder(folder)
    if side == folder:
        return describe_base(mode, folder)
    return describe_weights(mode, MODE[mode].config.from_pretrained(side), read_model(mode, folder))


def model_skeleton(mode: str, folder: str, **config) -> torch.nn.Module:
    """`streamed.skeleton` of a model in either form."""
    side = side_folder(folder)
    if side == folder:
        return skeleton(mode, folder, **config)
    official = official_files(mode, folder, None)
    open_native(folder, official)
    return meta_network(mode, official.folder, **config)
