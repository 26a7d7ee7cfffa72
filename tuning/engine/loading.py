"""Load a result of train.py or merge_lora.py, or an official model, in the right dtype. From Python:

    tokenizer, model = load_result("glm3", "output-glm3/epoch-2-step-750")
    answer, history = model.chat(tokenizer, "你好")

An adapter is loaded together with its base, which its config names.
"""

import functools
import os
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from transformers import initialization as init

from glm_models import MODE, check_family
from glm_models.checkpoint import CheckpointError, printable, weight_layout
from glm_models.convert.direct import model_skeleton, open_view, side_folder
from glm_models.families import NATIVE, convert_first, how_to_download
from glm_models.identify import check_ids, is_native_folder
from glm_models.prefix import Prefix, find_prefix
from glm_models.pretrained import has_lost_prefix
from glm_models.quantized import BITS
from tuning.arguments.quantization import needs_package
from tuning.engine.partitioned import load_partitioned
from tuning.engine.patches import avoid_cudnn_attention
from tuning.engine.pipeline import load_stage
from tuning.engine.quantized import load_quantized
from tuning.engine.source import Source
from tuning.errors import UserError
from tuning.hub import find_model
from tuning.lora.adapter import (
    CONFIG,
    add_adapter,
    check_base,
    find_base,
    open_adapter,
    read_config,
    trained_bits,
    unread_keys,
)
from tuning.lora.layers import more_than_plain
from tuning.lora.native import in_official_form
from tuning.lora.prefix import fill, load_with_prefix, open_prefix
from utils import print_rank_0, stage_rank, supports_bf16

# Keys of a LoRA config that prediction does not support, and why.
REFUSED = {
    "megatron_config": "leads to code or files elsewhere",
    "arrow_config": "leads to code or files elsewhere",
    "alora_invocation_tokens": "works for a part of each prompt only, which is not known here",
}


class Quantize(NamedTuple):
    """How a model's linear layers are quantised while it loads.

    bits: 4 or 8.
    device: where they are quantised, and stay.
    """

    bits: int
    device: torch.device


def stored_dtype(folder: str) -> torch.dtype | None:
    """The dtype of most numbers in a checkpoint's weight files; None if there are no float weights.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    counts: dict[torch.dtype, int] = {}
    for weights in weight_layout(folder).values():
        for dtype, shape in weights.values():
            if dtype.is_floating_point:
                counts[dtype] = counts.get(dtype, 0) + shape.numel()
    return max(counts, key=counts.get) if counts else None


def prediction_dtype(device_type: str, stored: torch.dtype | None, bf16: bool) -> tuple[torch.dtype, str]:
    """The dtype for prediction, and the reason as text.

    Args:
        device_type: as "cuda" or "cpu".
        stored: see stored_dtype.
        bf16: the device computes in bfloat16, see utils.supports_bf16.
    """
    if device_type == "cpu":
        return torch.float32, "as always on a CPU"
    if stored == torch.float16 or (stored == torch.bfloat16 and bf16):
        return stored, "the type of the checkpoint"
    name = str(stored).removeprefix("torch.")
    if bf16:
        return torch.bfloat16, f"rounded from {name}"
    return torch.float16, f"rounded from {name}; this device does not compute in bfloat16"


def choose_dtype(folder: str, device: torch.device) -> tuple[torch.dtype, str]:
    """`prediction_dtype` of a complete model's folder on a device of this machine."""
    return prediction_dtype(device.type, stored_dtype(folder), supports_bf16())


def load_result(
    mode: str,
    folder: str,
    base: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
):
    """Tokenizer and model of a result of train.py or merge_lora.py, or of an official folder, ready to generate.

    In float32 an adapter is merged, which loses nothing. In half precision it stays separate: merged into the weights
    it would be rounded to their precision, and most of the update would be lost. So it does on a quantised base.

    Args:
        folder: a full model, a P-Tuning result or a LoRA adapter; a P-Tuning prefix that was saved alone, as a folder
            or as a weights file; or the name of a model on a hub, see tuning.hub. `base` may be such a name too.
        base: the base model of an adapter or a prefix; None for the one that its config names.
        device: as "cuda:1" or "cpu"; None for the accelerator, else the CPU.
        dtype: None for the dtype of the checkpoint if the device supports it, and for float32 on a CPU.
        bits: quantise the linear layers of the base to 4 or 8 bits; 0: do not; None: as in the result's training.

    Raises:
        UserError: no such folder, device or base; or a package is missing.
        CheckpointError, FolderError: files are broken, or base and adapter do not belong together.
    """
    folder, base = find_model(folder), base and find_model(base)
    if not os.path.exists(folder):
        raise UserError(f"{folder}: no such folder; {how_to_download(mode)}")
    whole = find_base(folder, base)
    device = device if isinstance(device, torch.device) else named_device(device)
    prefix = read_beside(mode, folder, whole)
    tokenizer = load_tokenizer(mode, side_folder(whole))
    dtype, reason = (dtype, "as asked") if dtype else choose_dtype(whole, device)
    bits, precision = prediction_bits(folder, bits)
    quantize = Quantize(bits, device) if bits else None
    print_rank_0(f"{folder} on {device} in {str(dtype).removeprefix('torch.')} ({reason}){precision}")
    if prefix:
        model = load_with_prefix(functools.partial(load_base, mode, whole, dtype, quantize=quantize), prefix)
    elif whole == folder:
        model = load_base(mode, whole, dtype, quantize=quantize)
    else:
        with in_official_form(mode, folder, whole) as adapter:
            model = load_adapted(mode, adapter, whole, dtype, quantize)
    return tokenizer, model.to(device).eval()


def prediction_bits(folder: str, bits: int | None = None) -> tuple[int, str]:
    """To how many bits the base is quantised for prediction (0: not at all), and what to tell the user of it.

    Args:
        folder: of an adapter, or of a complete model.
        bits: as asked; None: as in training.

    Raises:
        UserError: the package for it is missing. CheckpointError: see trained_bits.
    """
    trained = trained_bits(folder)
    why = "as asked" if bits is not None else "as in its training"
    bits = trained if bits is None else bits
    name = f"quantised to {bits} bits ({BITS[bits]})" if bits else "not quantised"
    if problems := needs_package(f"{folder}, with linear layers {name},") if bits else []:
        raise UserError(problems[0])
    if bits != trained:
        before = f"quantised to {trained} bits" if trained else "not quantised"
        why += f"; in its training they were {before}"
    return bits, f", linear layers of the base {name} ({why})" if bits or trained else ""


def read_beside(mode: str, folder: str, base: str) -> Prefix | None:
    """Check an adapter, or a prefix alone, and that its base is the one recorded in training.

    Returns:
        The prefix. None for an adapter, and for a complete model, which is its own base.

    Raises:
        UserError, CheckpointError, FolderError: the two do not belong together, or what is in `folder` is broken.
    """
    if base == folder:
        return None
    if not find_prefix(folder):
        check_adapter(mode, folder, base)
        return None
    if is_native_folder(base):
        why = f"{folder} is a P-Tuning prefix alone, for which a {NATIVE} has no place"
        raise CheckpointError(f"{why}: {convert_first(mode, base)}")
    prefix = open_prefix(folder)
    kind = ", ".join(f"{key} {value}" for key, value in prefix.config.items())
    said = [f"{folder} is a P-Tuning prefix alone ({kind}); its base model is {base}", check_base(folder, mode, base)]
    check_family(base, mode, need=("config",))
    family = MODE[mode]
    with torch.device("meta"), init.no_init_weights():  # before the base is loaded
        fill(family.model(family.config.from_pretrained(base, **prefix.config)), prefix)
    for line in said:
        print_rank_0(printable(line))
    return prefix


def check_adapter(mode: str, folder: str, base: str) -> None:
    """Check that an adapter's config is supported, and that the base is the one recorded in training."""
    config = read_config(folder)
    for key, reason in REFUSED.items():
        if config.get(key):
            raise UserError(printable(f"{folder}: {key} in {CONFIG} {reason}; not loaded"))
    said = [f"{folder} is a LoRA adapter; its base model is {base}", check_base(folder, mode, base)]
    for line in said + unread_keys(folder, config):
        print_rank_0(printable(line))


def load_adapted(mode: str, folder: str, base: str, dtype: torch.dtype, quantize: Quantize | None = None):
    """Base and adapter as one model of the base's class.

    Raises:
        UserError: the base is to be quantised, and the adapter is more than plain LoRA.
        CheckpointError, FolderError: base and adapter do not belong together, or the adapter is broken.
    """
    if quantize and (key := more_than_plain(read_config(folder))):
        raise UserError(
            printable(f"{folder}: {key} in {CONFIG} makes it more than plain LoRA, which a quantised base needs here")
        )
    weights = open_adapter(folder)  # raises if the file is broken or empty
    # an output layer that was tied to the embedding no longer equals it
    changes = {"tie_word_embeddings": False} if any(".lm_head." in name for name in weights.names) else {}
    add_adapter(model_skeleton(mode, base, **changes), folder, weights)  # raises on a misfit before the base is loaded
    adapted = add_adapter(load_base(mode, base, dtype, quantize=quantize, **changes), folder, weights)
    merges = dtype == torch.float32 and not quantize
    return adapted.merge_and_unload() if merges else adapted.get_base_model()


def load_tokenizer(mode: str, folder: str):
    """The tokenizer of a checkpoint folder; warns if its ids differ from those in config.json."""
    check_family(folder, mode)
    tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
    for odd in check_ids(MODE[mode].config.from_pretrained(folder), tokenizer, folder):
        print_rank_0(f"warning: {odd}")
    return tokenizer


def load_base(
    mode: str,
    folder: str,
    dtype: torch.dtype,
    ds_config: dict | None = None,
    attention: str = "sdpa",
    quantize: Quantize | None = None,
    stages: list[range] | None = None,
    **config,
):
    """The model of a checkpoint folder in `dtype`; under ZeRO-3 it is partitioned over the ranks while it loads.

    Args:
        ds_config: of the training run; None outside training.
        attention: implementation in transformers' registry.
        quantize: see there; neither under ZeRO-3 nor in a pipeline.
        stages: numbers of the blocks of each stage of a pipeline: only this process's are loaded.
        config: changed keys of config.json.
    """
    family = MODE[mode]
    side, view = side_folder(folder), open_view(mode, folder)
    check_family(side, mode)
    avoid_cudnn_attention()
    zero3 = bool(ds_config) and ds_config["zero_optimization"].get("stage") == 3
    new_prefix = config.get("pre_seq_len") is not None
    if new_prefix and view is None and has_lost_prefix(folder):
        print_rank_0(
            f"warning: config.json of {folder} names a P-Tuning prefix that its weights lack; a new one is made"
        )
    config = family.config.from_pretrained(side, use_cache=ds_config is None, **config)
    source = Source(family.model, folder, config, dtype, attention, new_prefix, view)
    try:
        if zero3:
            model = load_partitioned(source, ds_config)
        elif quantize:
            model = load_quantized(source, *quantize)
        elif stages:
            model = load_stage(source, stages[stage_rank()])
        elif view:
            model = load_quantized(source, 0, torch.device("cpu"))
        else:
            model = family.model.from_pretrained(
                folder, config=config, new_prefix=new_prefix, dtype=dtype, attn_implementation=attention
            )
    except ImportError as error:  # a package that the attention implementation needs
        raise UserError(f"--attn_implementation {attention}: {error}") from None
    return model


def named_device(name: str | None) -> torch.device:
    """The device of --device: cuda, cuda:1, cpu or a number; None for the accelerator, otherwise the CPU.

    Raises:
        UserError: there is no such device.
    """
    name = name or get_accelerator().current_device_name()
    try:
        found = torch.device(f"{get_accelerator().device_name()}:{name}" if name.isdigit() else name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(f"--device {name} is not there") from None
    return found
