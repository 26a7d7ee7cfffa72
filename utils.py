"""What the scripts share: processes, the ds file, loading, saving."""

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import inspect
import itertools
import logging
import math
import os
import random
import sys
import warnings

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import ADAM_OPTIMIZER, ADAMW_OPTIMIZER, DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from peft import PeftModel
from tqdm import tqdm

from adapter import BASE_FILE, check_base, open_adapter, read_config
from errors import UserError
from exits import drop_output, visible
from folders import new_folder
from glm_models import MODE, check_family
from glm_models.checkpoint import read_json, write_json, write_side_files, write_weights
from glm_models.config import shown
from zero3 import load_partitioned


# Start-up


def quiet(verbose: bool) -> None:
    """Leave the terminal to the run's own lines: what the libraries chatter is dropped, their errors are not."""
    if verbose:
        return
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for name in ("torch.distributed", "torch.utils.cpp_extension", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """On a CPU, let malloc keep what a step frees for the next one, as a GPU's allocator does.

    glibc's gives tensors above 32 MiB back to the system, and all that is free at the end of the heap: to fault it in
    again takes 5 % of a step. (Options of mallopt(3); other C libraries have none.)
    """
    libc = ctypes.CDLL(None)
    if get_accelerator().device_name() == "cpu" and hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


@functools.cache
def control_group() -> torch.distributed.ProcessGroup:
    """A group of all ranks for what they have to tell each other on the CPU, without a word to the devices."""
    # the devices' group waits ten minutes at most (NCCL), and a large file takes longer to prepare or to write
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def _once(action, runs_it: bool) -> list:
    """Outcomes of `action()` by rank, of those that run it; the others wait.

    Raises:
        Exception: of the first rank that failed, on all ranks.
    """
    result = error = None
    if runs_it:
        try:
            result = action()
        except Exception as caught:
            error = caught
    outcomes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, (result, error), control_group())
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def once_per_node(action):
    """What `action()` returns on the first process of this node, which alone runs it; the others wait for it.

    Raises:
        Exception: that of the first such process that failed, on all processes of all nodes.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    return _once(action, local_rank == 0)[torch.distributed.get_rank() - local_rank]


def on_rank_0(action):
    """What `action()` returns on rank 0, which alone runs it; the others wait for it.

    Raises:
        Exception: that of rank 0, on all.
    """
    return _once(action, torch.distributed.get_rank() == 0)[0]


def trim_deepspeed() -> None:
    """Let DeepSpeed's ZeRO-1 and 2 hold less of gradients.

    Two copies of each, one at a time, go: 10 GiB for a weight of 592 million. One is float64, for the gradient's norm;
    float32 sums do for that. The other has the type of the buffer to which the gradient is then added; torch adds
    across types without it.

    A gradient that is larger than a bucket is reduced as soon as it is there, not when the next one is there as well.
    """
    get_accelerator().is_fp64_supported = lambda: False

    def add(output, source):
        if output is not None:
            output.add_(source)

    DeepSpeedZeroOptimizer._add_to_grad_partition_buffer = staticmethod(add)
    DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads = _reduce_gradient


_put_in_bucket = DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads


def _reduce_gradient(self, param, group: int) -> None:
    _put_in_bucket(self, param, group)
    kind = self.get_param_comm_dtype(param)
    if kind in self.extra_large_param_to_reduce:
        self.reduce_ipg_grads(comm_dtype=kind)


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print on rank 0, above the progress bar if there is one. Where that fails, nothing is printed any more."""
    if not is_main():
        return
    try:
        tqdm.write(visible(message), file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:  # a pipe whose reader is gone, a full disk: no reason to end a training
        drop_output()
        with contextlib.suppress(OSError):
            print(f"warning: nothing more is printed: {error.strerror}", file=sys.stderr, flush=True)


def set_seed(seed: int) -> None:
    """Seed every generator in use."""
    random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def true_or_false(text: str) -> bool:
    """argparse type of flags that take True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def device() -> torch.device:
    """The device of this process."""
    return torch.device(get_accelerator().current_device_name())


# The ds file


def load_ds_config(path: str, values: dict, as_gpu: bool = False) -> dict:
    """Read a DeepSpeed config file and fill in its "auto" values.

    Args:
        path: the file; beside the scripts if it is not in the current folder.
        values: what the command line says of batch, lr and the rest, by the ds file's dotted key, as
            "optimizer.params.lr".
        as_gpu: resolve precision for a GPU with bf16, whatever this machine has.

    Raises:
        UserError: a section is missing, an unknown "auto", a precision that the device cannot do, a number that
            contradicts the command line, or a value that DeepSpeed cannot take.
        CheckpointError: unreadable.
    """
    if not os.path.exists(path):
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.path.basename(path))
        path = beside if os.path.dirname(path) == "" and os.path.exists(beside) else path
    config = read_json(path)
    if not isinstance(config.get("zero_optimization"), dict):
        raise UserError(f'{path}: "zero_optimization" is missing; start from one of the ds_zero*.json files')
    for section in ("bf16", "fp16", "optimizer", "scheduler"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f'{path}: "{section}" must be an object, as in the ds_zero*.json files')
    _resolve_precision(config, path, as_gpu)
    # bf16 sums of gradients would be exact to three digits, and be copied to float32 at each step
    values = values | {"data_types.grad_accum_dtype": "fp32" if config["bf16"]["enabled"] else None}
    try:
        _fill_auto(config, values, path)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        if config.setdefault(key, values[key]) != values[key]:
            raise UserError(
                f'{path}: "{key}" is {shown(config[key])}, the command line makes it {values[key]}; use "auto"'
            )
    for section in ("optimizer", "scheduler"):
        if section not in config:
            raise UserError(f'{path}: "{section}" is missing; start from one of the ds_zero*.json files')
    _check_ds_config(config, path)
    return config


# Keys of the ds file that DeepSpeed takes as they are, and trips over in the middle of a training.
DS_TYPES = dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), (int, float))
DS_TYPES |= dict.fromkeys(("steps_per_print", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"), (int,))
DS_TYPES |= dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients"), (bool,))
DS_TYPES |= dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), (bool,))
GRADIENT_TYPES = (None, "fp32", "fp16", "bf16")


def _check_ds_config(config: dict, path: str) -> None:
    """Let DeepSpeed read the config, and make the scheduler and, as far as torch has it, the optimiser."""
    for key, kinds in DS_TYPES.items():
        value = config.get(key)
        if value is not None and (type(value) not in kinds or not 0 <= value < math.inf):
            raise UserError(f"{path}: {key} must be {' or '.join(k.__name__ for k in kinds)}, not {shown(value)}")
    stage = config["zero_optimization"].get("stage")
    if type(stage) is not int:
        raise UserError(f"{path}: zero_optimization.stage must be 1, 2 or 3, not {shown(stage)}")
    try:
        part = "what DeepSpeed reads"
        # the batch is checked already, and for --plan of more devices than there are processes
        whole = DeepSpeedConfig({k: v for k, v in copy.deepcopy(config).items() if k != "train_batch_size"})
        part = "zero_optimization"
        for key, value in config["zero_optimization"].items():
            if isinstance(value, str) and isinstance(getattr(whole.zero_config, key, None), int | float):
                raise ValueError(f"{key} must be a number or true or false, not {shown(value)}")
        part = "data_types"
        if whole.grad_accum_dtype not in GRADIENT_TYPES:
            raise ValueError(f"grad_accum_dtype {shown(whole.grad_accum_dtype)} is none of {GRADIENT_TYPES}")
        part = "optimizer"
        _try_optimizer(config["optimizer"])
        part = "scheduler"
        _try_scheduler(config["scheduler"])
    except Exception as error:  # DeepSpeed checks by pydantic, by assertions, and by what happens to fail
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.split(" For further information")[0]
        raise UserError(f"{path}: {part}: {reason[:300]}") from None


def _try_optimizer(section: dict) -> None:
    name, params = section["type"], dict(section.get("params", {}))
    known = [torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam]
    if name.lower() in (ADAM_OPTIMIZER, ADAMW_OPTIMIZER):
        names = {parameter for kind in known for parameter in inspect.signature(kind).parameters}
        if unknown := sorted(params.keys() - names - {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}):
            raise ValueError(f"{unknown[0]} is no parameter of {name}")
        params = {key: params[key] for key in ("lr", "betas", "eps", "weight_decay") if key in params}
        kind = torch.optim.AdamW
    elif name.lower() in DEEPSPEED_OPTIMIZERS:
        return
    else:
        kind = getattr(torch.optim, name)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(f"{name} is no optimizer")
    kind([torch.zeros(1)], **params)


def _try_scheduler(section: dict) -> None:
    name = section["type"]
    kind = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)
    if not isinstance(kind, type):
        raise ValueError(f"{name} is no scheduler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind(torch.optim.SGD([torch.zeros(1)], lr=1.0), **section.get("params", {})).step()


def _resolve_precision(config: dict, path: str, as_gpu: bool) -> None:
    """Turn "auto" of bf16 and fp16 into true or false: bf16 where a GPU has it, else fp16, and float32 on a CPU."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu" and not as_gpu
    can = {
        "bf16": as_gpu or bool(accelerator.is_bf16_supported()),
        "fp16": as_gpu or bool(accelerator.is_fp16_supported()),
    }
    wish = {kind: config.setdefault(kind, {}).setdefault("enabled", "auto") for kind in can}
    for kind, enabled in wish.items():
        if type(enabled) is not bool and enabled != "auto":
            raise UserError(f'{path}: {kind}.enabled must be true, false or "auto", not {shown(enabled)}')
        if enabled is True and not can[kind]:
            name = "this CPU" if on_cpu else accelerator.device_name()
            raise UserError(f'{path}: {kind} is enabled, but {name} cannot do it; set it to "auto" or false')
    if wish["bf16"] is True and wish["fp16"] is True:
        raise UserError(f"{path}: bf16 and fp16 are both enabled; choose one")
    if wish["bf16"] == "auto":
        wish["bf16"] = can["bf16"] and not on_cpu and wish["fp16"] is not True
    if wish["fp16"] == "auto":
        wish["fp16"] = can["fp16"] and not on_cpu and not wish["bf16"]
    for kind, enabled in wish.items():
        config[kind]["enabled"] = enabled


def _fill_auto(config: dict, values: dict, path: str, prefix: str = "") -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _fill_auto(value, values, path, f"{prefix}{key}.")
        elif value == "auto":
            if prefix + key not in values:
                raise UserError(
                    f'{path}: train.py does not know what "auto" means for {shown(prefix + key)}; give a value'
                )
            config[key] = values[prefix + key]


def compute_dtype(ds_config: dict) -> torch.dtype:
    """The type that weights and activations have during training."""
    if ds_config["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if ds_config["fp16"]["enabled"] else torch.float32


# Loading


def load_tokenizer(mode: str, folder: str):
    """The tokenizer of a checkpoint folder."""
    check_family(folder, mode)
    return MODE[mode].tokenizer.from_pretrained(folder)


def load_base(
    mode: str, folder: str, dtype: torch.dtype, ds_config: dict | None = None, attention: str = "sdpa", **config
):
    """The model of a checkpoint folder, in `dtype`; partitioned over the ranks while it loads under ZeRO-3.

    Args:
        ds_config: of the training run; None outside training.
        attention: implementation in transformers' registry.
        config: keys of config.json to set differently.
    """
    family = MODE[mode]
    check_family(folder, mode)
    # On Hopper and Blackwell torch would take cuDNN's attention first, which makes a plan for each new length, of tens
    # of milliseconds, and keeps all plans; on Blackwell it is wrong for fewer than 8 heads of keys (pytorch #193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    zero3 = bool(ds_config) and ds_config["zero_optimization"].get("stage") == 3
    config = family.config.from_pretrained(folder, use_cache=ds_config is None, **config)
    try:
        if zero3:
            model = load_partitioned(family.model, folder, config, dtype, attention, ds_config)
        else:
            model = family.model.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    except ImportError as error:  # a package that the attention implementation needs
        raise UserError(f"--attn_implementation {attention}: {error}") from None
    model.zero3 = zero3
    return model


def named_device(name: str | None) -> torch.device:
    """The device of a --device flag: as cuda, cuda:1 or cpu, or a number; None for the accelerator, else the CPU.

    Raises:
        UserError: it is not there.
    """
    name = name or get_accelerator().current_device_name()
    try:
        found = torch.device(f"{get_accelerator().device_name()}:{name}" if name.isdigit() else name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(f"--device {name} is not there") from None
    return found


def load_result(mode: str, folder: str, base: str | None, device: torch.device):
    """Tokenizer and model of a result of train.py or merge_lora.py, ready to generate.

    Args:
        base: the base model of an adapter; None for the one that the adapter's config names.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    # float32 on a CPU: half precision is slow there
    dtype = (
        torch.float32
        if device.type == "cpu"
        else torch.bfloat16
        if get_accelerator().is_bf16_supported()
        else torch.float16
    )
    config_path = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(config_path):
        return load_tokenizer(mode, folder), load_base(mode, folder, dtype).to(device).eval()
    config = read_config(folder)
    if foreign := [key for key in ("megatron_config", "arrow_config") if config.get(key)]:
        raise UserError(f"{config_path}: {foreign[0]} leads to code or files elsewhere; not loaded")
    weights = open_adapter(folder)  # broken or empty ones end here
    base = base or config.get("base_model_name_or_path")
    if not isinstance(base, str) or not os.path.isdir(base):
        raise UserError(
            f"{folder} is a LoRA adapter and its base model {base} is not here; name it with --ori_model_dir"
        )
    print(f"{folder} is a LoRA adapter; its base model is {base}")
    print(check_base(folder, mode, base))
    # an output layer that was tied to the embedding no longer equals it
    changes = {"tie_word_embeddings": False} if any(".lm_head." in name for name in weights.names) else {}
    model = load_base(mode, base, dtype, **changes)
    try:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # shapes, modules or keys that do not go together
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} is no adapter for {base}: {reason}") from None
    return load_tokenizer(mode, base), model.to(device).eval()


# Saving


def gathered(named_parameters):
    """Yield (name, whole tensor) of parameters that ZeRO-3 may have partitioned, one at a time; on every rank alike."""
    for name, parameter in named_parameters:
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        else:
            yield name, parameter.data


def save_model(model, tokenizer, base: str, folder: str, dtype: torch.dtype) -> None:
    """Write what training made: the adapter alone for LoRA, else a complete model folder. Called on every rank.

    All ZeRO stages write the same files. One tensor is gathered at a time, and rank 0 holds one shard.

    Args:
        model: beside an adapter goes its `base_record`, see adapter.record_base.
        base: the checkpoint folder that training started from; config, tokenizer and official code come from there.
    """
    if hasattr(model, "peft_config"):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in gathered(trained)}
        if is_main():
            with new_folder(folder) as partial:
                model.save_pretrained(partial, state_dict=tensors, save_embedding_layers=False)
                write_json(os.path.join(partial, BASE_FILE), model.base_record)
    else:
        save_full_model(model, tokenizer, base, folder, dtype)
    on_rank_0(lambda: None)  # the others wait, on the CPU: devices would give up before a large file is on a slow disk


def save_full_model(model, tokenizer, base: str, folder: str, dtype: torch.dtype) -> None:
    """Write a complete model folder in the official layout."""
    parameters = list(model.named_parameters(remove_duplicate=False))  # a tied output layer too: other tools want it
    buffers = model.official_buffers()
    count = sum(getattr(p, "ds_numel", p.numel()) for _, p in parameters)
    total = count * dtype.itemsize + sum(b.numel() * b.element_size() for b in buffers.values())
    whole = gathered(parameters)
    if not is_main():
        for _ in whole:  # takes part in gathering, and copies nothing
            pass
        return

    tensors = ((name, tensor.to("cpu", dtype)) for name, tensor in whole)
    keys = ("pre_seq_len", "prefix_projection") if model.config.pre_seq_len else ()
    prefix = {key: getattr(model.config, key) for key in keys}
    with new_folder(folder) as partial:
        write_weights(partial, itertools.chain(tensors, buffers.items()), total)
        write_side_files(partial, base, dtype, tokenizer.stop_token_ids, **prefix)
