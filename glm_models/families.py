"""What tells the families apart, and whether the parts of a checkpoint folder belong together.

All three official configs say `"model_type": "chatglm"`, so the family is read off the config's keys and the name of
the vocabulary file. ChatGLM2 and ChatGLM3 are one network with one vocabulary; only the names in their json files and
the tokenizer code that lies beside the weights tell them apart.
"""

import os
import re

from . import MODE
from .checkpoint import CheckpointError, read_json

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SPARE_ROWS = 1000  # official embeddings have 184 to 230 rows more than their vocabularies have tokens
OTHER_RELEASE = "vocabulary and weights are of different releases; take all files from one"


def how_to_download(mode: str) -> str:
    """Where a family's official model comes from, for messages about a folder that is not there."""
    name = MODE[mode].config.title.lower()
    return (
        f"only folders on this machine are read. To download the official model (its data files are enough): "
        f"`modelscope download --model ZhipuAI/{name} --local_dir {name}` or "
        f"`huggingface-cli download THUDM/{name} --local-dir {name}`"
    )


def possible_modes(folder: str) -> set[str]:
    """The families that a checkpoint or tokenizer folder may belong to, judged by what lies in it; all if unknown."""
    files = set(os.listdir(folder))
    config = read_json(os.path.join(folder, "config.json")) if "config.json" in files else {}
    names = [config.get("_name_or_path")]  # where the json files say the folder came from
    if "tokenizer_config.json" in files:
        names.append(read_json(os.path.join(folder, "tokenizer_config.json")).get("name_or_path"))
    code = ""
    if "tokenization_chatglm.py" in files:  # read as text, never run
        with open(os.path.join(folder, "tokenization_chatglm.py"), encoding="utf-8", errors="replace") as file:
            code = file.read()

    signs = [  # strongest first; each narrows the choice where it says anything
        lambda family: not family.config.telling_keys.isdisjoint(config),
        lambda family: family.tokenizer.vocab_files_names["vocab_file"] in files,
        lambda family: any(re.search(rf"\b{family.config.title}\b", str(name), re.IGNORECASE) for name in names),
        lambda family: family.tokenizer.code_sign in code,
    ]
    modes = set(MODE)
    for sign in signs:
        modes = {mode for mode in modes if sign(MODE[mode])} or modes
    return modes


def check_family(folder: str, mode: str, need: tuple[str, ...] = ("config", "vocabulary")) -> None:
    """Make sure that `folder` exists and holds what `mode` needs.

    Raises:
        CheckpointError: no such folder, a file is missing, the folder is an adapter's or a run's, or belongs to another
            family (which is named).
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"no such model folder: {folder}; {how_to_download(mode)}")
    if "config" in need:
        _check_one_model(folder, mode)
    title = MODE[mode].config.title
    modes = possible_modes(folder)
    if mode not in modes:
        fits = " or ".join(f"--mode {m} ({MODE[m].config.title})" for m in sorted(modes))
        raise CheckpointError(f"{folder} is not a {title} folder (--mode {mode}); what lies in it fits {fits}")
    wanted = {"config": "config.json", "vocabulary": MODE[mode].tokenizer.vocab_files_names["vocab_file"]}
    for what in need:
        if not os.path.isfile(os.path.join(folder, wanted[what])):
            raise CheckpointError(f"{folder} has no {wanted[what]}: not a complete {title} folder")


def _check_one_model(folder: str, mode: str) -> None:
    """Refuse folders that hold an adapter, or several models, where one model is wanted.

    transformers would add an adapter that lies beside the weights to them, without a word.
    """
    has_config = os.path.lexists(os.path.join(folder, "config.json"))
    adapter = [name for name in ADAPTER_FILES if os.path.lexists(os.path.join(folder, name))]
    if adapter and has_config:
        raise CheckpointError(
            f"{folder} holds a model and a LoRA adapter ({adapter[0]}): move the adapter's files to a folder of their "
            "own, and merge it with merge_lora.py if it is meant to be part of the model"
        )
    if adapter:
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model: merge it first (python merge_lora.py --mode {mode} "
            f"--ori_model_dir BASE --model_dir {folder}) and give the merged folder"
        )
    results = [] if has_config else _models_inside(folder)
    if results:
        names = ", ".join(results[:5]) + (f" and {len(results) - 5} more" if len(results) > 5 else "")
        raise CheckpointError(f"{folder} has no config.json, but models or adapters inside: name one of them ({names})")


def _models_inside(folder: str) -> list[str]:
    """Folders inside that hold a config.json or an adapter: a run's results, or a hub's snapshots."""
    found = []
    for inside in ("", "snapshots"):
        top = os.path.join(folder, inside)
        for name in sorted(os.listdir(top)) if os.path.isdir(top) else []:
            files = (os.path.join(top, name, file) for file in ("config.json", ADAPTER_FILES[0]))
            found += [os.path.join(inside, name)] if any(map(os.path.isfile, files)) else []
    return found


def check_ids(config, tokenizer, folder: str) -> list[str]:
    """Make sure that the tokenizer's ids are those of the model, as far as config.json tells.

    Args:
        folder: for messages.

    Returns:
        What is odd and may be right, as sentences.

    Raises:
        CheckpointError: an id differs, or the embedding has fewer rows than the vocabulary has tokens.
    """
    path = os.path.join(folder, "config.json")
    for key, right in tokenizer.config_ids().items():
        given = getattr(config, key)
        if given is not None and not set(given if isinstance(given, list) else [given]) <= right:
            ids = " or ".join(map(str, sorted(right)))
            name = os.path.basename(tokenizer.vocab_file)
            raise CheckpointError(f"{path}: {key} is {given}, {name} has {ids} for it: {OTHER_RELEASE}")
    rows, tokens = config.vocab_size, tokenizer.vocab_size
    if tokens > rows:
        raise CheckpointError(
            f"{path}: the embedding has {rows} rows, the largest id of {tokenizer.vocab_file} is {tokens - 1}: "
            f"{OTHER_RELEASE}"
        )
    if rows - tokens > SPARE_ROWS:
        return [
            f"the embedding in {folder} has {rows} rows, its vocabulary {tokens} tokens; official ones differ by "
            "less than 300, so the vocabulary may be another model's"
        ]
    return []
