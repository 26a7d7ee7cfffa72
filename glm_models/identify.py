"""Which family a checkpoint folder belongs to, whether its files belong together, and which base model it is."""

import hashlib
import os
import re

import torch

from . import MODE
from .checkpoint import CheckpointError, read_json, read_weights
from .families import FAMILIES, convert_first, how_to_download, is_native

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SPARE_ROWS = 1000  # official embeddings have 184 to 230 rows more than the vocabulary has tokens
OTHER_RELEASE = "vocabulary and weights are of different releases; take all files from one"


def possible_modes(folder: str) -> set[str]:
    """The families to which a checkpoint or tokenizer folder may belong, judged by its files; all if unknown."""
    files = set(os.listdir(folder))
    config = read_json(os.path.join(folder, "config.json")) if "config.json" in files else {}
    names = [config.get("_name_or_path")]  # the origin of the folder, according to its json files
    if "tokenizer_config.json" in files:
        names.append(read_json(os.path.join(folder, "tokenizer_config.json")).get("name_or_path"))
    code = ""
    if "tokenization_chatglm.py" in files:  # read as text, never run
        with open(os.path.join(folder, "tokenization_chatglm.py"), encoding="utf-8", errors="replace") as file:
            code = file.read()

    tests = [  # strongest first; a test that no family passes says nothing
        lambda signs: not signs.config_keys.isdisjoint(config),
        lambda signs: signs.vocabulary in files,
        lambda signs: any(re.search(rf"\b{signs.title}\b", str(name), re.IGNORECASE) for name in names),
        lambda signs: signs.code in code,
    ]
    modes = set(FAMILIES)
    for test in tests:
        modes = {mode for mode in modes if test(FAMILIES[mode])} or modes
    return modes


def check_family(folder: str, mode: str, need: tuple[str, ...] = ("config", "vocabulary")) -> None:
    """Check that `folder` exists and is a folder of family `mode`.

    Args:
        need: the parts that must be there.

    Raises:
        CheckpointError: no such folder, a file is missing, it holds an adapter or a run's results, or it belongs to
            another family (the message names it).
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"no such model folder: {folder}; {how_to_download(mode)}")
    if "config" in need:
        _check_one_model(folder, mode)
    title = FAMILIES[mode].title
    modes = possible_modes(folder)
    if mode not in modes:
        fits = " or ".join(f"--mode {m} ({FAMILIES[m].title})" for m in sorted(modes))
        raise CheckpointError(f"{folder} is not a {title} folder (--mode {mode}); its files fit {fits}")
    wanted = {"config": "config.json", "vocabulary": FAMILIES[mode].vocabulary}
    for what in need:
        if not os.path.isfile(os.path.join(folder, wanted[what])):
            raise CheckpointError(f"{folder} has no {wanted[what]}: not a complete {title} folder")


def _check_one_model(folder: str, mode: str) -> None:
    """Refuse a folder that holds an adapter, or several models, where one model is needed.

    transformers would silently add an adapter that lies beside the weights.
    """
    has_config = os.path.lexists(os.path.join(folder, "config.json"))
    if is_native_folder(folder):
        raise CheckpointError(convert_first(mode, folder))
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


def is_native_folder(folder: str) -> bool:
    """Whether a folder is that of a GlmForCausalLM. Raises CheckpointError if its config.json is broken."""
    path = os.path.join(folder, "config.json")
    return os.path.isfile(path) and is_native(read_json(path))


def _models_inside(folder: str) -> list[str]:
    """Subfolders that hold a config.json or an adapter: a run's results, or the snapshots of a hub's cache."""
    found = []
    for inside in ("", "snapshots"):
        top = os.path.join(folder, inside)
        for name in sorted(os.listdir(top)) if os.path.isdir(top) else []:
            files = (os.path.join(top, name, file) for file in ("config.json", ADAPTER_FILES[0]))
            found += [os.path.join(inside, name)] if any(map(os.path.isfile, files)) else []
    return found


def check_ids(config, tokenizer, folder: str) -> list[str]:
    """Check that the tokenizer's ids are the model's, as far as config.json names them.

    Args:
        folder: for messages.

    Returns:
        Warnings: what looks wrong but may be right.

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


# Keys of a config that change what the network computes from its weights.
CONFIG_KEYS = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size")
CONFIG_KEYS += ("ffn_hidden_size", "kv_channels", "multi_query_attention", "multi_query_group_num", "rope_ratio")
CONFIG_KEYS += ("layernorm_epsilon", "position_encoding_2d", "gmask_token_id", "mask_token_id")
CONFIG_KEYS += ("tie_word_embeddings", "pre_seq_len", "prefix_projection")
BLOCKS, BLOCK = 16, 64  # number and length of the samples of each weight


def describe_base(mode: str, folder: str) -> dict:
    """Identify a checkpoint, independent of its shards and of its file format (safetensors or .bin).

    The fingerprint is a hash of the names, shapes, types and samples of all weights: 16 evenly spaced runs of 64 values
    each, a few thousand pages of a 12 GB checkpoint. It differs where all values of a weight differ, as after any
    training; a difference in a few values or rows may fall between the samples.

    Returns:
        mode, config (the keys that change what the network computes), fingerprint.

    Raises:
        CheckpointError: of another family, or broken.
    """
    check_family(folder, mode, need=("config",))
    return describe_weights(mode, MODE[mode].config.from_pretrained(folder), read_weights(folder))


def describe_weights(mode: str, config, weights) -> dict:
    """`describe_base` of any weights.

    Args:
        weights: iterator of (name, tensor), in any order.
    """
    digests = {}
    for name, tensor in weights:
        if name.endswith("inv_freq"):  # computed by the model; some official files have them, some do not
            continue
        flat = tensor.reshape(-1)
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for i in range(BLOCKS):
            start = max(0, len(flat) - BLOCK) * i // (BLOCKS - 1)
            digest.update(flat[start : start + BLOCK].contiguous().view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    fingerprint = hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()
    values = {key: getattr(config, key) for key in CONFIG_KEYS if hasattr(config, key)}
    return {"mode": mode, "config": values, "fingerprint": fingerprint}
