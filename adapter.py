"""LoRA adapters as peft writes them: read as data, checked, and held against the base that they were trained on."""

import math
import os
from typing import NamedTuple

import torch

from folders import MANIFEST, check_folder
from glm_models.checkpoint import CheckpointError, WeightFile, describe_base, read_json

BASE_FILE = "base.json"  # beside the adapter: what it was trained on
PREFIX = "base_model.model."  # what peft puts before the names of the base model

# A plain LoRA adapter has these values; peft knows others, which are more than a product added to a weight.
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
# How A and B began; any other way changed the base's weights too.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class Adapter(NamedTuple):
    """A LoRA adapter: weight `name` of the base becomes weight + scale * B A, where A, B = pairs[name]."""

    folder: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # A [rank, in], B [out, rank], memory-mapped, as they are saved
    scale: float
    targets: list[str]  # names of modules, or ends of names, that the config says it adapts


# The base


def record_base(mode: str, folder: str, dtype: torch.dtype) -> dict:
    """What BASE_FILE says of the model that training starts from: see describe_base, and path and type in training."""
    return describe_base(mode, folder) | {"path": folder, "dtype": str(dtype).removeprefix("torch.")}


def check_base(adapter: str, mode: str, base: str) -> str:
    """Hold the base folder against what training recorded in the adapter's folder.

    Returns:
        A sentence on what was found.

    Raises:
        CheckpointError: it is another base, or the record is broken.
    """
    path = os.path.join(adapter, BASE_FILE)
    if not os.path.isfile(path):
        return f"{adapter} has no {BASE_FILE}, so only names and shapes tell whether {base} is the base of its training"
    record = read_json(path)
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("fingerprint"), str):
        raise CheckpointError(
            f"{path} is no record of a base model; without the file, only names and shapes are checked"
        )
    trained = f"{adapter} was trained on {record.get('path')} (--mode {record.get('mode')})"
    if record.get("mode") != mode:
        raise CheckpointError(f"{trained}, not on a model of --mode {mode}")
    found = describe_base(mode, base)
    for key in sorted(found["config"].keys() | record["config"].keys()):
        there, here = record["config"].get(key), found["config"].get(key)
        if there != here:
            raise CheckpointError(f"{trained}, another base than {base}: config.json has {key} {here}, not {there}")
    if found["fingerprint"] != record["fingerprint"]:
        raise CheckpointError(
            f"{trained}, another base than {base}: names, types or values of the weights differ. If that is meant, "
            f"remove {BASE_FILE} and {MANIFEST} from {adapter}"
        )
    return f"{base} has the fingerprint of the base that {adapter} was trained on"


# The adapter


def read_config(folder: str) -> dict:
    """adapter_config.json of a LoRA adapter.

    Raises:
        CheckpointError: there is none, or it is not LoRA.
    """
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} has no adapter_config.json: not a LoRA result")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}, not LORA")
    return config


def open_adapter(folder: str) -> WeightFile:
    """The weights of an adapter, safetensors before .bin.

    Raises:
        FolderError: a file of the folder is not as its manifest says.
        CheckpointError: there are no weights, they are broken, not finite, or A or B is zero throughout.
    """
    if os.path.isfile(os.path.join(folder, MANIFEST)):  # what train.py saved has one
        check_folder(folder)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            break
    else:
        raise CheckpointError(f"{folder} has no adapter_model.safetensors or adapter_model.bin")
    file = WeightFile(path)
    for name in file.names:
        tensor = file[name]
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, no LoRA weight")
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; the training went wrong, use an earlier result"
            )
    for part in ("lora_A", "lora_B"):
        if not any(file[name].any() for name in file.names if f".{part}." in name):
            raise CheckpointError(f"{path}: every {part} is zero; the adapter was never trained, or saved empty")
    return file


def read_adapter(folder: str) -> Adapter:
    """A plain LoRA adapter.

    Raises:
        CheckpointError: broken, all zeros, or of a kind that is more than a product added to weights.
    """
    config, path = read_config(folder), os.path.join(folder, "adapter_config.json")
    for key, value in PLAIN.items():
        if (config.get(key) or value) != value:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; only plain LoRA can be merged here")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise CheckpointError(f"{path}: init_lora_weights is {start!r}, which changes the base's weights as well")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r must be a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{path}: lora_alpha must be a number above 0, not {alpha!r}")
    if type(config.get("use_rslora", False)) is not bool:
        raise CheckpointError(f"{path}: use_rslora must be true or false, not {config['use_rslora']!r}")
    if isinstance(targets, list):
        if not targets or not all(isinstance(name, str) and name for name in targets):
            raise CheckpointError(f"{path}: target_modules must be names of modules, not {targets!r}")
    elif not isinstance(targets, str):  # a regular expression, which is not run
        raise CheckpointError(f"{path}: target_modules must be names of modules, not {targets!r}")

    file = open_adapter(folder)
    pairs = {}
    for name in file.names:
        part = ".lora_A." if ".lora_A." in name else ".lora_B."
        other = name.replace(part, ".lora_B." if part == ".lora_A." else ".lora_A.")
        if not name.startswith(PREFIX) or not name.endswith(part + "weight"):
            raise CheckpointError(f"{file.path}: {name} is no LoRA weight")
        if other not in file.names:
            raise CheckpointError(f"{file.path}: {name} has no {other.rsplit('.', 2)[1]} beside it")
        if part == ".lora_B.":
            continue
        a, b = file[name], file[other]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise CheckpointError(f"{file.path}: {name} and its lora_B are {shapes}, not of rank {rank} as {path} says")
        pairs[name.removeprefix(PREFIX).replace(part, ".")] = (a, b)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(folder, pairs, scale, targets if isinstance(targets, list) else [])
