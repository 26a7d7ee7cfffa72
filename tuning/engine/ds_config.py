"""The ds file: read, checked key by key (ds_keys.py), and its "auto" values filled in."""

import copy
import json
import os

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig

from glm_models.checkpoint import CheckpointError, read_json
from tuning import ROOT
from tuning.arguments.train import SCHEDULES
from tuning.engine.ds_check import STATES_IN_BF16, Check, offloads_optimizer, optimizer_class, reason, shown
from tuning.engine.ds_keys import IDLE, KEYS, REFUSED, SAID, Section
from tuning.errors import UserError
from utils import data_parallel_size, supports_bf16, supports_fp16


def load_ds_config(path: str, values: dict, as_gpu: bool = False) -> dict:
    """Read a DeepSpeed config file, check every key and fill in what is "auto" or missing.

    Args:
        path: the file; beside the scripts if it is not in the current folder.
        values: batch size, lr and others from the command line, by dotted key of the ds file, such as
            "optimizer.params.lr".
        as_gpu: for --plan: resolve precision for a GPU with bf16, whatever this machine has, and do not compare
            numbers of steps, which --plan does not know.

    Raises:
        UserError: a key is unknown or refused; a value is not valid for its key or contradicts the command line; an
            "auto" is unknown; the device cannot do the precision; or DeepSpeed would fail on something else.
        CheckpointError: the file cannot be read.
    """
    if not os.path.exists(path):
        beside = os.path.join(ROOT, os.path.basename(path))
        path = beside if os.path.dirname(path) == "" and os.path.exists(beside) else path
    config = _read(path)
    check = Check(path, values)
    check.sections(config)
    check.end()
    check.pipeline(config)
    check.optimizer(config, as_gpu)
    check.scheduler(config["scheduler"])
    check.monitors(config)
    check.end()
    _resolve_precision(config, path, as_gpu)
    precision = "bf16" if config["bf16"]["enabled"] else "fp16" if config["fp16"]["enabled"] else "fp32"
    check.values["data_types.grad_accum_dtype"] = _sum_type(config, precision, values)
    check.fill(config)
    check.contradictions(config, as_gpu)
    check.types_of_gradients(config, precision)
    check.states_in_bf16(config, precision, as_gpu)
    check.end()
    check.groups_of_ranks(config)
    check.end()
    # DeepSpeed's throughput timer would wait for the device twice per micro-batch, and nothing reads it
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    _try(config, path)
    return config


def load_training_config(args, total_steps: int, hidden_size: int) -> dict:
    """The ds file of a training with these flags, resolved. Needs the process group.

    Raises:
        UserError, CheckpointError: see load_ds_config.
    """
    config = load_ds_config(args.ds_file, ds_values(args, data_parallel_size(), total_steps, hidden_size))
    check_quantization(args, config)
    return config


def check_quantization(args, config: dict) -> None:
    """Refuse ZeRO-3 for a quantised base.

    Raises:
        UserError: the ds file has it.
    """
    if args.quantization_bit and config["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"--quantization_bit {args.quantization_bit} does not go with ZeRO-3 ({args.ds_file}), which would cut the "
            "quantised weights into parts; use a ds file of stage 1 or 2, such as ds_zero2_no_offload.json"
        )


def ds_notes(config: dict) -> list[str]:
    """Lines to print about a resolved config: settings that --plan does not count, and those that do nothing."""
    lines = [*_notes(config, KEYS, "", config["zero_optimization"]["stage"]), *_losses_of_bf16(config)]
    return [f"ds file: {line}" for line in lines]


def compute_dtype(ds_config: dict) -> torch.dtype:
    """The dtype of weights and activations in training."""
    if ds_config["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if ds_config["fp16"]["enabled"] else torch.float32


def holds_states_in_bf16(ds_config: dict) -> bool:
    """Whether masters and moments are bf16, not float32."""
    return all(ds_config["bf16"].get(name) for name in STATES_IN_BF16)


def zero_layout(config: dict) -> dict:
    """Settings that decide which rank keeps which masters and moments: a training state fits only the same layout."""
    zero = config["zero_optimization"]
    names = ("round_robin_gradients", "parameter_alignment") if zero["stage"] < 3 else ("sub_group_size",)
    layout = {name: zero.get(name, KEYS["zero_optimization"].keys[name].default) for name in names}
    section = config["optimizer"]
    kind = optimizer_class(section["type"], section["params"], offloads_optimizer(config)).__name__
    return layout | {"ratio": zero.get("offload_optimizer", {}).get("ratio", 1.0), "optimizer": kind}


def _read(path: str) -> dict:
    """Read the object in a ds file; no key may occur twice."""
    read_json(path)  # errors of all kinds

    def once(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path}: {shown(twice[0])} occurs twice")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=once)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _try(config: dict, path: str) -> None:
    """Let DeepSpeed parse the config and make the scheduler, to find any remaining error now."""
    try:
        # without the batch size, which is checked already; --plan may assume more devices than processes
        DeepSpeedConfig({k: v for k, v in copy.deepcopy(config).items() if k != "train_batch_size"})
        optimizer, section = torch.optim.SGD([torch.zeros(1)], lr=1.0), config["scheduler"]
        getattr(lr_schedules, section["type"])(optimizer, **section["params"]).step()
    except Exception as error:  # pydantic, assertions, or any other failure in DeepSpeed
        raise UserError(f"{path}: {reason(error)}") from None


def _resolve_precision(config: dict, path: str, as_gpu: bool) -> None:
    """Replace "auto" of bf16 and fp16: bf16 if the GPU has it, otherwise fp16; float32 on a CPU."""
    on_cpu = get_accelerator().device_name() == "cpu" and not as_gpu
    can = {"bf16": as_gpu or supports_bf16(), "fp16": as_gpu or supports_fp16()}
    wish = {kind: config.setdefault(kind, {}).setdefault("enabled", "auto") for kind in can}
    for kind, enabled in wish.items():
        if enabled is True and not can[kind]:
            name = "this CPU" if on_cpu else f"this {get_accelerator().device_name()} device"
            raise UserError(f'{path}: {kind} is enabled, but {name} cannot do it; set it to "auto" or false')
    if wish["bf16"] is True and wish["fp16"] is True:
        raise UserError(f"{path}: bf16 and fp16 are both enabled; choose one")
    if wish["bf16"] == "auto":
        wish["bf16"] = can["bf16"] and not on_cpu and wish["fp16"] is not True
    if wish["fp16"] == "auto":
        wish["fp16"] = can["fp16"] and not on_cpu and not wish["bf16"]
    for kind, enabled in wish.items():
        config[kind]["enabled"] = enabled


def _sum_type(config: dict, precision: str, values: dict) -> str | None:
    """What "auto" means for the type in which gradients of micro-batches are summed."""
    if precision == "fp32":
        return None
    # the sum of one micro-batch is its gradient, which DeepSpeed rounds to the type of the masters before the update
    alone = values["gradient_accumulation_steps"] == 1 and holds_states_in_bf16(config)
    return precision if alone else "fp32"  # summed in half precision, they would be exact to three digits only


def _losses_of_bf16(config: dict):
    """Lines of `ds_notes` about what is rounded more than by default."""
    if holds_states_in_bf16(config):
        yield (
            "weights and moments are held in bf16 alone: a step that would change a weight by less than 1/512 of it "
            "leaves it as it is (for some weights 1/256); see docs/memory-and-speed.md"
        )
    if config["gradient_accumulation_steps"] > 1 and config["data_types"].get("grad_accum_dtype") in ("bf16", "fp16"):
        yield (
            f"gradients of {config['gradient_accumulation_steps']} micro-batches are summed in "
            f"{config['data_types']['grad_accum_dtype']}, rounded after each; fp32 sums them exactly"
        )


def _notes(section: dict, known: dict, prefix: str, stage: int):
    """Lines of `ds_notes` for one section."""
    for name, value in section.items():
        key, dotted = known[name], prefix + name
        if isinstance(key, Section):
            if key.switch and not value.get(key.switch):
                if key.switch not in value and value:
                    yield f'{dotted} does nothing without "{key.switch}": true'
            elif stage not in key.stages:
                if value.get("device", "none") != "none" or name == "leaf_module":
                    yield f"{dotted} does nothing at ZeRO stage {stage}"
            elif not dotted.endswith(".params"):
                yield from _notes(value, key.keys, f"{dotted}.", stage)
        elif value == key.default or key.kind == REFUSED:
            continue
        elif stage not in key.stages:
            yield f"{dotted} does nothing at ZeRO stage {stage}"
        elif dotted.startswith("aio.") or name in IDLE:
            yield f"{dotted} does nothing: it goes with NVMe or super_offload, which are refused"
        elif key.kind == SAID:
            yield f"{dotted} {shown(value)} is obeyed; --plan does not count it"


def ds_values(args, world_size: int, total_steps: int, hidden_size: int) -> dict:
    """Values for "auto" in a ds file, by dotted key.

    Args:
        world_size: see utils.data_parallel_size.
    """
    more = {"scheduler.type": SCHEDULES[args.lr_scheduler_type]} if args.lr_scheduler_type else {}
    if args.pipeline_stages:
        more["pipeline.stages"] = args.pipeline_stages
    # it keeps gradients, one process has nothing to overlap, and DeepSpeed's pipeline reduces at the end of a step
    overlaps = world_size > 1 and not args.pipeline_stages
    return more | {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.weight_decay": args.weight_decay,
        "scheduler.params.warmup_max_lr": args.learning_rate,
        "scheduler.params.warmup_num_steps": max(1, round(total_steps * args.warmup_ratio)),
        # one more than there are, so that the lr is 0 after the last step, not in it
        "scheduler.params.total_num_steps": total_steps + 1,
        # in elements, in two buffers per GPU; 20 MB are an efficient size to send; one process sends nothing
        "zero_optimization.reduce_bucket_size": 10_000_000 if world_size > 1 else 1_000_000,
        "zero_optimization.overlap_comm": overlaps,
        "zero_optimization.allgather_bucket_size": 200_000_000,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": hidden_size * hidden_size,
    }


LARGEST_GROUP = 500_000_000  # numbers: 1 GB in bf16


def split_groups(groups: list[dict], ds_config: dict) -> list[dict]:
    """Cut large parameter groups for ZeRO-2 with bf16 masters in main memory; what is computed stays the same.

    While DeepSpeed sets up, it copies each group as a whole on the GPU, and 24 GiB do not hold a 6B model twice.
    Other settings keep their groups: training states depend on them.
    """
    if not (holds_states_in_bf16(ds_config) and offloads_optimizer(ds_config)):
        return groups
    if ds_config["zero_optimization"]["stage"] == 3:
        return groups
    cut: list[dict] = []
    for group in groups:
        parts, numel = [[]], 0
        for parameter in group["params"]:
            if parts[-1] and numel + parameter.numel() > LARGEST_GROUP:
                parts.append([])
                numel = 0
            parts[-1].append(parameter)
            numel += parameter.numel()
        cut += [group | {"params": part} for part in parts]
    return cut


def fit_buckets(ds_config: dict, trained: int) -> None:
    """Limit bucket sizes to the size of all gradients, since buffers of these sizes are allocated."""
    for bucket in ds_config["zero_optimization"].keys() & {"reduce_bucket_size", "allgather_bucket_size"}:
        ds_config["zero_optimization"][bucket] = min(int(ds_config["zero_optimization"][bucket]), trained)


def fit_schedule(ds_config: dict, groups: list[dict]) -> None:
    """Let the schedule keep the peak learning rate that each parameter group has of its own, if they have any.

    WarmupLR and WarmupDecayLR take one rate for all groups, or a list. WarmupCosineLR multiplies each group's own.
    """
    rates, section = [group["lr"] for group in groups if "lr" in group], ds_config["scheduler"]
    if rates and section["type"] != "WarmupCosineLR":
        # a new section: the old one is part of what describes the run
        ds_config["scheduler"] = section | {"params": section["params"] | {"warmup_max_lr": rates}}
