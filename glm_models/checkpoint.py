"""Official checkpoint folders: which family one belongs to, and writing one.

All three official configs say `"model_type": "chatglm"`, so the family is read off the config's keys and the name of
the vocabulary file. ChatGLM2 and ChatGLM3 are one network with one vocabulary; only the names in their json files and
the tokenizer code that lies beside the weights tell them apart.
"""

import json
import os
import pickle
import re
import shutil

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used as asked; the message names the folder and what to do."""


def read_json(path: str) -> dict:
    """A json file that must hold an object.

    Raises:
        CheckpointError: unreadable, not json, or not an object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # json and UTF-8 errors alike
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def possible_modes(folder: str) -> set[str]:
    """The families that a checkpoint or tokenizer folder may belong to, judged by what lies in it; all if unknown."""
    from . import MODE  # here, not above: the families' modules import this one

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
        CheckpointError: no such folder, a file is missing, or the folder belongs to another family (which is named).
    """
    from . import MODE

    if not os.path.isdir(folder):
        raise CheckpointError(f"no such model folder: {folder}")
    title = MODE[mode].config.title
    modes = possible_modes(folder)
    if mode not in modes:
        fits = " or ".join(f"--mode {m} ({MODE[m].config.title})" for m in sorted(modes))
        raise CheckpointError(f"{folder} is not a {title} folder (--mode {mode}); what lies in it fits {fits}")
    wanted = {"config": "config.json", "vocabulary": MODE[mode].tokenizer.vocab_files_names["vocab_file"]}
    for what in need:
        if not os.path.isfile(os.path.join(folder, wanted[what])):
            raise CheckpointError(f"{folder} has no {wanted[what]}: not a complete {title} folder")


def weight_files(folder: str) -> list[str]:
    """The weight files of a checkpoint folder, safetensors before .bin.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        for path, is_index in ((single, False), (single + ".index.json", True)):
            path = os.path.join(folder, path)
            if not os.path.isfile(path):
                continue
            if not is_index:
                return [path]
            names = sorted(set(read_json(path).get("weight_map", {}).values()))
            files = [os.path.join(folder, os.path.basename(name)) for name in names]
            missing = [file for file in files if not os.path.isfile(file)]
            if missing or not files:
                raise CheckpointError(f"{path} names {missing[0] if missing else 'no file'}, which is not there")
            return files
    raise CheckpointError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index")


def read_weights(folder: str):
    """Yield (name, tensor) of all weights of a folder, one file open at a time; nothing is unpickled but tensors.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    for path in weight_files(folder):
        try:
            if path.endswith(".safetensors"):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        yield name, file.get_tensor(name)
            else:
                yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
        except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path} is broken or not a weights file: {error}") from None


def write_json(path: str, content) -> None:
    """Write json as the official folders have it: indented, Chinese as it is."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_weights(folder: str, tensors, total_bytes: int, max_shard_bytes: int = 4 * 2**30) -> None:
    """Write safetensors in the layout that transformers reads: one file, or shards with an index.

    Args:
        tensors: an iterator of (name, tensor on the CPU). Only one shard is held at a time.
        total_bytes: size of all tensors together, for the index.
    """
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []  # of the tensors in each file written
    size = 0

    def flush():
        names.append(list(shard))
        path = os.path.join(folder, f"shard-{len(names)}")
        save_file(shard, path, metadata={"format": "pt"})
        os.chmod(path, 0o644)  # save_file makes files that only their owner may read
        shard.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > max_shard_bytes:
            flush()
            size = 0
        # a copy: save_file refuses views of shared memory, and the caller may reuse a gathered buffer
        shard[name] = tensor.detach().clone().contiguous()
        size += nbytes
    flush()

    if len(names) == 1:
        os.replace(os.path.join(folder, "shard-1"), os.path.join(folder, "model.safetensors"))
        return
    weight_map = {}
    for i, in_file in enumerate(names, 1):
        file = f"model-{i:05d}-of-{len(names):05d}.safetensors"
        os.replace(os.path.join(folder, f"shard-{i}"), os.path.join(folder, file))
        weight_map.update(dict.fromkeys(in_file, file))
    write_json(
        os.path.join(folder, "model.safetensors.index.json"),
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_side_files(folder: str, base: str, dtype: torch.dtype, stop_ids: list[int], **config) -> None:
    """Write all that a model folder holds besides weights: config, tokenizer, generation config, official code.

    config.json is the base's own with the given keys changed, so that official code and other tools find every key,
    `architectures` and `auto_map` where they look for them.
    """
    content = read_json(os.path.join(base, "config.json"))
    content.pop("dtype", None)
    content |= {"torch_dtype": str(dtype).removeprefix("torch."), **config}
    write_json(os.path.join(folder, "config.json"), content)

    path = os.path.join(base, "generation_config.json")
    generation = read_json(path) if os.path.isfile(path) else {}
    generation |= {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    for key in ("bos_token_id", "pad_token_id"):
        if content.get(key) is not None:
            generation.setdefault(key, content[key])
    write_json(os.path.join(folder, "generation_config.json"), generation)

    for name in os.listdir(base):
        if name.endswith((".py", ".model")) or name in ("tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(os.path.join(base, name), os.path.join(folder, name))
