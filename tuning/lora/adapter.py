"""LoRA adapters in peft's format: reading them as data, checking them and their base, writing them."""

import dataclasses
import math
import os
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from glm_models.checkpoint import CheckpointError, WeightFile, printable, read_json, write_json
from glm_models.convert.clients import PEFT_KEYS
from glm_models.convert.direct import describe_in_either_form
from glm_models.identify import describe_base
from glm_models.messages import short_repr
from glm_models.prefix import describe_prefix, find_prefix, folder_of, prefix_config
from glm_models.quantized import BITS
from tuning.errors import UserError
from tuning.folders import MANIFEST, check_folder
from tuning.hub import find_here
from tuning.lora.layers import PredictionLinear, has_plain_layers, more_than_plain, use_own_layers
from tuning.lora.starts import Start

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there
BASE_FILE = "base.json"  # in the adapter's folder: the base on which it was trained
QUANTIZATION = "quantization_bit"  # its key if that base was quantised; P-Tuning results have the file then, too
PREFIX = "base_model.model."  # peft adds it to the names of the base model's modules


class Adapter(NamedTuple):
    """A LoRA adapter: weight `name` of the base becomes weight + scale * B A, where A, B = pairs[name].

    With DoRA each row of the sum is given the length magnitudes[name] [out]. Weights in `whole` replace the base's.
    """

    folder: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # A [rank, in], B [out, rank], memory-mapped
    scale: float
    targets: list[str]  # target_modules of the config: names of modules, or ends of names
    file: WeightFile
    magnitudes: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]

    def changed(self) -> set[str]:
        """Names of all weights of the base that it changes."""
        return {*self.pairs, *self.whole}

    def update(self, name: str) -> torch.Tensor:
        """scale * B A of a weight, in float32."""
        a, b = self.pairs[name]
        return self.scale * (b.float() @ a.float())


# The base


def record_base(mode: str, folder: str, dtype: torch.dtype, bits: int | None = None) -> dict:
    """The content of BASE_FILE: `describe_base` of the model before training, its path, and its type in training.

    Args:
        bits: to which its linear layers were quantised in training; None: they were not.
    """
    record = describe_base(mode, folder) | {"path": folder, "dtype": str(dtype).removeprefix("torch.")}
    return record | ({QUANTIZATION: bits} if bits else {})


def trained_bits(folder: str) -> int:
    """To how many bits the base of an adapter or of a P-Tuning result was quantised in training; 0: it was not.

    Args:
        folder: or the weights file of a prefix alone.

    Raises:
        CheckpointError: the record is broken, or of a quantisation that is not known here.
    """
    path = os.path.join(folder_of(folder), BASE_FILE)
    bits = read_json(path).get(QUANTIZATION, 0) if os.path.isfile(path) else 0
    if bits not in (0, *BITS):
        raise CheckpointError(f"{path}: {QUANTIZATION} is {short_repr(bits)}; known are {', '.join(map(str, BITS))}")
    return bits


def check_base(adapter: str, mode: str, base: str) -> str:
    """Compare the base folder with the base that training recorded in the folder of an adapter or of a prefix alone.

    Returns:
        A sentence with the result.

    Raises:
        CheckpointError: it is not the same base, or the record is broken.
    """
    path = os.path.join(folder_of(adapter), BASE_FILE)
    if not os.path.isfile(path):
        return (
            f"{adapter} has no {BASE_FILE}: only names and shapes can show whether {base} is the base of its training"
        )
    record = read_json(path)
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("fingerprint"), str):
        raise CheckpointError(
            f"{path} is not a record of a base model; without this file, only names and shapes are checked"
        )
    trained = f"{adapter} was trained on {record.get('path')} (--mode {record.get('mode')})"
    if record.get("mode") != mode:
        raise CheckpointError(f"{trained}, not on a model of --mode {mode}")
    found = describe_in_either_form(mode, base)
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
    path = os.path.join(folder, CONFIG)
    if not os.path.isdir(folder):
        raise CheckpointError(f"no such adapter folder: {folder}")
    if not os.path.isfile(path):
        inside = adapters_inside(folder)
        hint = f". It contains adapters: name one of {', '.join(inside)}" if inside else ": not a LoRA result"
        if not inside and find_prefix(folder):
            raise CheckpointError(f"{folder} is not a LoRA adapter: {describe_prefix(folder)}")
        raise CheckpointError(f"{folder} has no {CONFIG}{hint}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}, not LORA")
    return config


def find_base(folder: str, base: str | None) -> str:
    """The folder of the complete model behind `folder`: itself, or the base of an adapter or of a prefix alone.

    Args:
        folder: or the weights file of a prefix alone.
        base: the base of an adapter or prefix; None for the one in its config.

    Raises:
        UserError: a folder does not exist.
        CheckpointError: the folder is both a model and an adapter.
    """
    if not os.path.exists(folder):
        raise UserError(f"{folder}: no such folder")
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        if find_prefix(folder):
            return _existing_base(folder, "P-Tuning prefix alone", base or prefix_config(folder).get("_name_or_path"))
        if os.path.isfile(folder):
            raise UserError(f"{folder} is a file, but not of a P-Tuning prefix alone; name the model's folder")
        return folder
    if os.path.isfile(os.path.join(folder, "config.json")):
        raise CheckpointError(
            f"{folder} holds a model and a LoRA adapter ({CONFIG}); move the adapter's files to a folder of their own"
        )
    return _existing_base(folder, "LoRA adapter", base or read_config(folder).get("base_model_name_or_path"))


def _existing_base(folder: str, what: str, base) -> str:
    found = find_here(base)
    if found is None:
        raise UserError(
            printable(f"{folder} is a {what} and its base model {base} is not here; name it with --ori_model_dir")
        )
    return found


def adapters_inside(folder: str) -> list[str]:
    """The adapters in the subfolders of a training's output: `best` first, then from the oldest to the newest."""
    found = [e for e in os.scandir(folder) if os.path.isfile(os.path.join(e.path, CONFIG))]
    found.sort(key=lambda entry: (entry.name != "best", entry.stat().st_mtime_ns))
    return [entry.path for entry in found]


def has_patterns(config: dict) -> bool:
    """Whether peft would use regular expressions from an adapter's config to find its layers."""
    names = config.get("target_modules"), config.get("exclude_modules")
    return any(isinstance(value, str) for value in names) or bool(config.get("layers_pattern"))


def unread_keys(folder: str, config: dict) -> list[str]:
    """A line for the user if an adapter's config has values for keys that this version of peft does not know."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    keys = sorted(key for key, value in config.items() if key not in known and value)
    return [f"{folder}: {CONFIG} has keys that this peft does not know: {', '.join(keys)}"] if keys else []


def open_adapter(folder: str) -> WeightFile:
    """The weights of an adapter, safetensors before .bin.

    Raises:
        FolderError: a file of the folder differs from its manifest.
        CheckpointError: there are no weights, they are broken or not finite, or all A or all B are zero.
    """
    if os.path.isfile(os.path.join(folder, MANIFEST)):  # written by train.py
        check_folder(folder)
    path = next((path for name in WEIGHTS if os.path.isfile(path := os.path.join(folder, name))), None)
    if path is None:
        raise CheckpointError(f"{folder} has no {' or '.join(WEIGHTS)}")
    file = WeightFile(path)
    for name in file.names:
        tensor = file[name]
        if not tensor.is_floating_point() or tensor.numel() == 0:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, not a LoRA weight")
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; the training went wrong, use an earlier result"
            )
    for part in ("lora_A", "lora_B"):
        parts = (f".{part}.", f".{part.replace('_', '_embedding_')}")
        if not any(file[name].any() for name in file.names if any(part in name for part in parts)):
            raise CheckpointError(f"{path}: every {part} is zero; the adapter was never trained, or saved empty")
    return file


READ = ("use_dora", "modules_to_save")  # keys of a config by which read_adapter may go beyond plain LoRA


def read_adapter(folder: str, use: str = "can be merged here") -> Adapter:
    """Read an adapter of plain LoRA or DoRA, which may have modules that were trained whole.

    Args:
        use: what only these can, for the message.

    Raises:
        CheckpointError: it is broken, all zeros, or of another kind.
    """
    config, path = read_config(folder), os.path.join(folder, CONFIG)
    key = more_than_plain(config, READ)
    if key == "init_lora_weights":
        raise CheckpointError(f"{path}: {key} is {config[key]!r}, which changes the base's weights as well")
    if key is not None:
        raise CheckpointError(f"{path}: {key} is {config[key]!r}; only plain LoRA and DoRA {use}")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r must be a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{path}: lora_alpha must be a number above 0, not {alpha!r}")
    for key in ("use_rslora", "use_dora"):
        if type(config.get(key, False)) is not bool:
            raise CheckpointError(f"{path}: {key} must be true or false, not {config[key]!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise CheckpointError(f"{path}: modules_to_save must be names of modules, not {saved!r}")
    if isinstance(targets, list):
        if not targets or not all(isinstance(name, str) and name for name in targets):
            raise CheckpointError(f"{path}: target_modules must be names of modules, not {targets!r}")
    elif not isinstance(targets, str):  # a string is a regular expression, which is not used
        raise CheckpointError(f"{path}: target_modules must be names of modules, not {targets!r}")

    file = open_adapter(folder)
    magnitudes, whole = _beyond_plain(file, bool(config.get("use_dora")), saved)
    if lost := [one for one in saved if not any(f".{name}".rpartition(".")[0].endswith(f".{one}") for name in whole)]:
        raise CheckpointError(f"{file.path} has no weights of {lost[0]}, which modules_to_save of {path} names")
    rest = [name for name in file.names if name not in {*magnitudes.values(), *whole.values()}]
    pairs = _read_pairs(file, rest, rank, path)
    if config.get("use_dora"):
        for name, (_, b) in pairs.items():
            if name not in magnitudes or file[magnitudes[name]].shape != b.shape[:1]:
                raise CheckpointError(f"{file.path}: {name} has no lora_magnitude_vector of {len(b)} numbers")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    opened = ({name: file[there] for name, there in names.items()} for names in (magnitudes, whole))
    return Adapter(folder, pairs, scale, targets if isinstance(targets, list) else [], file, *opened)


def _beyond_plain(file: WeightFile, dora: bool, saved: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the file of DoRA's magnitudes, by the weight that they scale, and of weights trained whole."""
    magnitudes, whole = {}, {}
    for name in file.names:
        path, _, last = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if dora and last == "lora_magnitude_vector":
            magnitudes[f"{path}.weight"] = name
        module = name.removeprefix(PREFIX).rpartition(".")[0]
        if name.startswith(PREFIX) and any(f".{module}".endswith(f".{one}") for one in saved):
            whole[name.removeprefix(PREFIX)] = name
    return magnitudes, whole


def _read_pairs(file: WeightFile, names: list[str], rank: int, config: str) -> dict[str, tuple]:
    """A and B of these names of a file, by the weight that they change.

    Raises:
        CheckpointError: one is not of LoRA, not in a pair, or of another rank.
    """
    pairs = {}
    for name in names:
        part = ".lora_A." if ".lora_A." in name else ".lora_B."
        other = name.replace(part, ".lora_B." if part == ".lora_A." else ".lora_A.")
        if not name.startswith(PREFIX) or not name.endswith(part + "weight"):
            raise CheckpointError(f"{file.path}: {name} is not a LoRA weight")
        if other not in file.names:
            raise CheckpointError(f"{file.path}: {name} has no {other.rsplit('.', 2)[1]} beside it")
        if part == ".lora_B.":
            continue
        a, b = file[name], file[other]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise CheckpointError(
                f"{file.path}: {name} and its lora_B are {shapes}, not of rank {rank} as {config} says"
            )
        pairs[name.removeprefix(PREFIX).replace(part, ".")] = (a, b)
    return pairs


# The adapter in a model


def add_adapter(model: nn.Module, folder: str, file: WeightFile) -> PeftModel:
    """Add an adapter to its base for prediction, with peft, so also adapters that are more than plain LoRA.

    Args:
        model: the base. On the meta device this only checks that everything fits.
        file: see open_adapter.

    Raises:
        CheckpointError: the model has no place for a weight of the adapter, a layer in the config has no weights,
            shapes differ, or peft rejects the config.
    """
    reasons = (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ImportError)
    where = model.name_or_path or "its base"
    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        use_own_layers(config, PredictionLinear)
        plain = has_plain_layers(config)
        if model.device.type == "meta":
            config.init_lora_weights = False  # some initialisations read the base's weights
        # plain LoRA in the model's type; peft's other layers compute in float32, as they did in training
        adapted = PeftModel(model, config, autocast_adapter_dtype=not plain)
        tensors = {name: file[name].to(model.device) for name in file.names}
        loaded = set_peft_model_state_dict(adapted, tensors)
    except reasons as error:
        raise CheckpointError(f"{folder} is not an adapter for {where}: {' '.join(str(error).split())[:300]}") from None
    lost = [name.replace(".default", "") for name in loaded.unexpected_keys]
    if lost:
        raise CheckpointError(
            f"{folder} is not an adapter for {where}: {_some(lost)} of its weights have no place there"
        )
    empty = [name.replace(".default", "") for name in loaded.missing_keys if "default" in name.split(".")]
    if empty:
        raise CheckpointError(f"{folder} is not a complete adapter for {where}: it lacks {_some(empty)} of the weights")
    return adapted.eval()


def _some(names: list[str]) -> str:
    return f"{len(names)} (first: {sorted(names)[0]})"


# Writing


def config_to_write(config: LoraConfig) -> dict:
    """The content of adapter_config.json for peft 0.5 to 0.21: later keys are there only if they are not default."""
    default, values = LoraConfig().to_dict(), config.to_dict()
    kept = {key: value for key, value in values.items() if key in PEFT_KEYS or value != default.get(key)}
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}
    return dict(sorted(kept.items())) | {"inference_mode": True}


def write_adapter(
    folder: str, model: PeftModel, tensors: dict[str, torch.Tensor], base: str, record: dict, start: Start | None = None
) -> None:
    """Write an adapter's three files: weights and config in peft's format, and the record of its base.

    Args:
        tensors: the trained weights, by their names in the model.
        base: the base model's folder.
        record: see record_base.
        start: initial values that were taken out of the base, if they were.
    """
    weights = get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
    config = model.peft_config["default"]
    if start:
        config, weights = start.as_plain(config, weights)
    path = os.path.join(folder, WEIGHTS[0])
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)  # save_file makes files that only the owner can read
    config = config_to_write(config) | {"base_model_name_or_path": os.path.abspath(base)}
    write_json(os.path.join(folder, CONFIG), config)
    write_json(os.path.join(folder, BASE_FILE), record)
