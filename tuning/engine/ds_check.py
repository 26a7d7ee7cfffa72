"""Checks a ds file, reports all problems at once, and fills in missing values."""

import copy
import difflib
import importlib.util
import inspect
import json
import os

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.op_builder import CPUAdamBuilder

from tuning.engine.ds_keys import (
    ADAM,
    COMMENTS,
    COUNT,
    EITHER,
    INTEGER,
    KEYS,
    OPTIMIZERS,
    PLANNED,
    POSITIVE,
    REFUSED,
    SCHEDULERS,
    UNTESTED,
    Key,
    Section,
    fits,
    is_one,
    walk,
)
from tuning.errors import UserError

START = "start from one of the ds_zero*.json files"
# values for "auto" and for missing keys that do not depend on flags; `values` of load_ds_config has the others
AUTO = {
    "gradient_clipping": 1.0,
    "optimizer.params.betas": [0.9, 0.95],
    "optimizer.params.eps": 1e-8,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_min_ratio": 0,
    "scheduler.params.cos_min_ratio": 0.0001,
    "scheduler.params.warmup_type": "linear",
}
# a number in the ds file must equal the one that these flags give
FLAGS = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "train_batch_size": "rows x accumulation x devices",
    "pipeline.stages": "--pipeline_stages",
    "optimizer.params.lr": "--learning_rate",
    "optimizer.params.weight_decay": "--weight_decay",
    "scheduler.type": "--lr_scheduler_type",
    "scheduler.params.warmup_max_lr": "--learning_rate",
    "scheduler.params.warmup_num_steps": "--warmup_ratio of all steps",
    "scheduler.params.total_num_steps": "all steps plus one, since the lr is 0 after the last one",
}
OF_ADAM = {"optimizer.params.betas", "optimizer.params.eps"}
OF_DEEPSPEED = {
    "torch_adam",
    "adam_w_mode",
    "fp32_optimizer_states",
    "max_grad_norm",
}  # not passed on to torch
# depend on the device, and on whether a flag is given
AUTO_LATER = {"bf16.enabled", "fp16.enabled", "data_types.grad_accum_dtype", "scheduler.type"}
PLACES = (("tensorboard", "output_path"), ("csv_monitor", "output_path"), ("flops_profiler", "output_file"))
OF_STEPS = {"scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps"}
STATES_IN_BF16 = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
# Above it, a moment that falls is rounded back to what it was: half the gap between numbers of bf16 is up to 1/256.
LARGEST_BETA = 1 - 2**-8
SHOWN = 5  # problems of a file in one message


class Check:
    """Collects the problems of a ds file, to report them all at once.

    Args:
        values: see load_ds_config.
    """

    def __init__(self, path: str, values: dict):
        self.path, self.values, self.wrong = path, AUTO | values, []
        self.params: dict[str, dict[str, Key]] = {}  # allowed keys of optimizer.params and scheduler.params

    def end(self) -> None:
        """Raise a UserError if there are problems."""
        if self.wrong:
            more = f"; and {len(self.wrong) - SHOWN} more" if len(self.wrong) > SHOWN else ""
            raise UserError(f"{self.path}: {'; '.join(self.wrong[:SHOWN])}{more}")

    def sections(self, config: dict) -> None:
        """Check names and values of all keys, except the params of optimizer and scheduler.

        Comments and keys that DeepSpeed has removed are deleted from the config.
        """
        for name in ("zero_optimization", "optimizer", "scheduler"):
            if config.get(name) is None:
                self.wrong.append(f'"{name}" is missing; {START}')
        zero = config.get("zero_optimization")
        if isinstance(zero, dict) and is_one(zero.get("stage"), (0,)):
            self.wrong.append("zero_optimization.stage 0 is refused: stage 1 trains the same with less memory")
            zero["stage"] = 1
        self.keys(config, KEYS, "")
        for name, key in (("zero_optimization", "stage"), ("optimizer", "type"), ("scheduler", "type")):
            if isinstance(config.get(name), dict) and not config[name].get(key):
                self.wrong.append(f"{name}.{key} is missing; {START}")

    def pipeline(self, config: dict) -> None:
        """Check what DeepSpeed's pipeline takes; ZeRO stage 2 becomes 1. Called where `sections` found nothing."""
        if "pipeline.stages" not in self.values:
            if "stages" in (config.get("pipeline") or {}):
                self.wrong.append("pipeline.stages is refused: without --pipeline_stages there is no pipeline")
            return
        zero = config["zero_optimization"]
        if zero.get("stage") == 3:
            self.wrong.append(
                "zero_optimization.stage 3 is refused with --pipeline_stages: DeepSpeed's pipeline takes 1, and 2 as 1"
            )
        if offloads_optimizer(config):
            self.wrong.append(
                "zero_optimization.offload_optimizer is refused with --pipeline_stages: it was never tried"
            )
        if zero.get("overlap_comm") is True:
            self.wrong.append('zero_optimization.overlap_comm true: DeepSpeed\'s pipeline does not overlap; use "auto"')
        if config.get("wall_clock_breakdown") and not config.get("steps_per_print"):
            self.wrong.append("wall_clock_breakdown needs steps_per_print in a pipeline")
        if zero.get("stage") == 2:
            zero["stage"] = 1
        config.setdefault("pipeline", {})

    def keys(self, section: dict, known: dict, prefix: str) -> None:
        """Check all keys of a section."""
        for name in list(section):
            key, dotted = known.get(name), prefix + name
            if name in COMMENTS:
                del section[name]
            elif key is None:
                self.wrong.append(_unknown(dotted, known, prefix))
            elif isinstance(key, Section):
                self.section(section, name, key, dotted)
            else:
                self.key(section, name, key, dotted)

    def section(self, outer: dict, name: str, known: Section, dotted: str) -> None:
        """Check a key whose value should be an object."""
        value = outer[name]
        if value is None:
            if dotted not in ("zero_optimization", "optimizer", "scheduler"):  # reported as missing above
                del outer[name]
        elif not isinstance(value, dict):
            self.wrong.append(f'"{dotted}" must be an object, not {shown(value)}')
        elif not known.why:
            if not dotted.endswith(".params"):  # their keys depend on the type
                self.keys(value, known.keys, f"{dotted}.")
        elif _is_on(value, known):
            self.wrong.append(f"{dotted} is refused: {known.why}")
        else:
            other = [one for one in value if one not in known.keys and one not in COMMENTS]
            self.wrong += [_unknown(f"{dotted}.{one}", known.keys, f"{dotted}.") for one in other]
            del outer[name]  # off: as if it were missing

    def key(self, section: dict, name: str, key: Key, dotted: str) -> None:
        """Check one value."""
        value, has_auto = section[name], dotted in self.values or dotted in AUTO_LATER
        if key.kind == REFUSED:
            if not is_one(value, key.harmless):
                self.wrong.append(f"{dotted} {shown(value)} is refused: {key.why}")
            elif key.removed:
                del section[name]
        elif isinstance(value, str) and value == "auto":
            if not has_auto:
                self.wrong.append(f'train.py does not know what "auto" means for {shown(dotted)}; give a value')
        elif value is None and key.default in (None, ...):
            del section[name]  # as if it were missing
        elif not fits(value, key.takes):
            takes = key.takes if isinstance(key.takes, str) else _one_of(key.takes)
            takes += ' or "auto"' * has_auto
            self.wrong.append(f"{dotted} must be {takes}, not {shown(value)}")
        elif key.takes in (COUNT, POSITIVE, INTEGER):
            section[name] = int(value)

    def optimizer(self, config: dict, as_gpu: bool) -> None:
        """Check name and params of the optimizer, and that it exists for this device."""
        section, every = config["optimizer"], OPTIMIZERS + UNTESTED
        # DeepSpeed ignores the case of its own names
        name = section["type"] = {one.lower(): one for one in OPTIMIZERS}.get(section["type"].lower(), section["type"])
        if name not in every:
            self.wrong.append(
                f"optimizer.type {shown(name)} is none that works on the parts into which ZeRO cuts weights; there are "
                f"{', '.join(every)}{_near(name, every)}"
            )
            return
        if name in UNTESTED and not config.get("zero_allow_untested_optimizer"):
            self.wrong.append(f'optimizer.type {name} needs "zero_allow_untested_optimizer": true')
        offload = offloads_optimizer(config)
        on_cpu = get_accelerator().device_name() == "cpu" and not as_gpu
        if not offload and (name == "Adagrad" or (name == "Lion" and on_cpu)):
            why = "DeepSpeed mixes up its groups of parameters" if name == "Adagrad" else "it is not there for a CPU"
            self.wrong.append(
                f'optimizer.type {name} goes with "offload_optimizer": {{"device": "cpu"}} alone: without, {why}; '
                "AdamW works"
            )
        params = section.setdefault("params", {})
        kind = optimizer_class(name, params, offload)
        taken = inspect.signature(kind).parameters.keys() - {"self", "params", "model_params", "adamw_mode"}
        if name in ("Adam", "AdamW"):
            taken |= {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "max_grad_norm"}
        known = {one: ADAM.get(one, Key(PLANNED, EITHER)) for one in sorted(taken)}
        self.params["optimizer"] = known
        self.keys(params, known, "optimizer.params.")
        if not self.wrong and getattr(torch.optim, kind.__name__, None) is kind:
            given = {k: v for k, v in params.items() if k in taken and k not in OF_DEEPSPEED and v != "auto"}
            try:
                kind([torch.zeros(1)], **given)
            except Exception as error:
                self.wrong.append(f"optimizer: {reason(error)}")

    def scheduler(self, section: dict) -> None:
        """Check name and params of the scheduler; an "auto" becomes that of --lr_scheduler_type, else linear decay."""
        name, params = section["type"], section.setdefault("params", {})
        if name == "auto":
            name = section["type"] = self.values.get("scheduler.type", "WarmupDecayLR")
            others = set().union(*SCHEDULERS.values()) - SCHEDULERS[name].keys()
            for other in others & {key for key, value in params.items() if value == "auto"}:
                del params[other]
        if name in SCHEDULERS:
            self.params["scheduler"] = SCHEDULERS[name]
            self.keys(params, SCHEDULERS[name], "scheduler.params.")
        else:
            self.wrong.append(
                f"scheduler.type {shown(name)} is none that follows --learning_rate and --warmup_ratio; there are "
                f"{', '.join(SCHEDULERS)}{_near(name, tuple(SCHEDULERS))}"
            )

    def monitors(self, config: dict) -> None:
        """Check that packages and folders exist that the sections for logs need."""
        for section, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")):
            if config.get(section, {}).get("enabled") and importlib.util.find_spec(package) is None:
                self.wrong.append(f"{section} is enabled and its package is not installed: pip install {package}")
        for section, name in PLACES:
            place = config.get(section, {}).get(name)
            if place and config[section].get("enabled") and not _can_write(place, is_file=name == "output_file"):
                self.wrong.append(f"{section}.{name} {shown(place)} cannot be written")

    def fill(self, config: dict) -> None:
        """Fill in values that are "auto", and missing values that have an "auto"."""
        config.setdefault("data_types", {})
        adam = config["optimizer"]["type"] in ("Adam", "AdamW")
        for dotted, value in self.values.items():
            holder, known, name = _place(config, dotted)
            if dotted.split(".")[-2:-1] == ["params"]:
                known = self.params[dotted.split(".")[0]]
            missing = name not in holder
            if missing and dotted in OF_ADAM and not adam:
                continue  # other optimizers have their own defaults
            if name in known and config["zero_optimization"]["stage"] in known[name].stages:
                if missing or holder[name] == "auto":
                    holder[name] = copy.copy(value)
            elif not missing and holder[name] == "auto":
                del holder[name]  # this stage does not read it

    def contradictions(self, config: dict, without_steps: bool) -> None:
        """Check that numbers in the file agree with the command line."""
        for dotted, flag in FLAGS.items():
            if dotted not in self.values or (without_steps and dotted in OF_STEPS):
                continue
            holder, _, name = _place(config, dotted)
            if name not in holder:
                continue
            if holder[name] != self.values[dotted]:
                self.wrong.append(
                    f'"{dotted}" is {shown(holder[name])}, the command line makes it {self.values[dotted]} ({flag}); '
                    'use "auto"'
                )

    def groups_of_ranks(self, config: dict) -> None:
        """Check that the groups of hpZeRO have the same number of ranks."""
        ranks = config["train_batch_size"] // (
            config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        )
        size = config["zero_optimization"].get("zero_hpz_partition_size", 1)
        if ranks % size:
            self.wrong.append(f"zero_optimization.zero_hpz_partition_size {size} does not divide {ranks} devices")

    def types_of_gradients(self, config: dict, precision: str) -> None:
        """Check that gradients have the dtype of the model or float32."""
        sums, sent = config["data_types"].get("grad_accum_dtype"), config.get("communication_data_type")
        for dotted, value in (("data_types.grad_accum_dtype", sums), ("communication_data_type", sent)):
            if value not in (None, "fp32", precision):
                self.wrong.append(f"{dotted} {value} would round gradients, which are {precision}: fp32 would not")

    def states_in_bf16(self, config: dict, precision: str, as_gpu: bool) -> None:
        """Check that DeepSpeed holds masters and moments in bf16 if the file says so, and that moments can fall."""
        asked = [name for name in STATES_IN_BF16 if config["bf16"].get(name)]
        if not asked:
            return
        params, offload = config["optimizer"]["params"], offloads_optimizer(config)
        kind = optimizer_class(config["optimizer"]["type"], params, offload)
        problem = None
        if len(asked) < len(STATES_IN_BF16):
            # with moments in float32, torch would load those of a training state as bf16
            problem = f"{' and '.join(STATES_IN_BF16)} go together: set both to true, or neither"
        elif precision != "bf16":
            problem = f'it needs "enabled": true beside it; this training computes in {precision}'
        elif config["zero_optimization"]["stage"] == 1:  # with float32 sums, DeepSpeed's optimizer for it reads no key
            problem = "not at ZeRO stage 1; stage 2 does the same with less memory, but not with --pipeline_stages"
        elif config["optimizer"]["type"] not in ("Adam", "AdamW"):
            problem = f"it goes with Adam and AdamW, not with {config['optimizer']['type']}"
        elif offload and kind is not DeepSpeedCPUAdam:
            problem = 'with offload_optimizer it goes with DeepSpeed\'s CPU Adam: leave out "torch_adam" and "fused"'
        elif offload and not as_gpu and CPUAdamBuilder().simd_width() == "-D__AVX256__":
            problem = "DeepSpeed's CPU Adam needs a processor with AVX-512 for it, and this one has AVX2"
        elif max(params["betas"]) > LARGEST_BETA:
            problem = f"optimizer.params.betas {params['betas']}: a moment in bf16 would never fall; at most 0.996"
        if problem:
            self.wrong.append(f"bf16.{asked[-1]} is refused: {problem}")


def offloads_optimizer(config: dict) -> bool:
    """Whether masters and moments are in main memory."""
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def _place(config: dict, dotted: str) -> tuple[dict, dict, str]:
    """The object that contains a key, the known keys of that object, and the name of the key in it."""
    *sections, name = dotted.split(".")
    known = KEYS
    for one in sections:
        config, known = config[one], known[one].keys
    return config, known, name


def optimizer_class(name: str, params: dict, offload: bool) -> type:
    """The optimizer class that DeepSpeed chooses for a name."""
    if name in ("Adam", "AdamW") and params.get("torch_adam") is not True:
        return DeepSpeedCPUAdam if offload else FusedAdam
    if name == "Lion":
        return DeepSpeedCPULion if offload else FusedLion
    if name == "Adagrad" and offload:
        return DeepSpeedCPUAdagrad
    if name == "Adam" and params.get("adam_w_mode") is not False:
        name = "AdamW"  # DeepSpeed's Adam is AdamW by default
    return getattr(torch.optim, name)


def _unknown(dotted: str, known: dict, prefix: str) -> str:
    """Message about an unknown key, with the most similar known one."""
    name = dotted.removeprefix(prefix)
    here = _near(name, tuple(known))
    if not here:
        elsewhere = [one for one, _ in walk() if one.rpartition(".")[2] == name]
        here = f"; there is {elsewhere[0]}" if elsewhere else ""
    return f"{shown(dotted)} is no key of DeepSpeed's{here}"


def shown(value) -> str:
    """A value in JSON, shortened for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _near(name: str, names: tuple[str, ...]) -> str:
    """A suggestion, as the end of a message."""
    lower = {one.lower(): one for one in names}
    found = difflib.get_close_matches(name.lower(), lower, n=1) or [
        one for one in lower if name and name.lower() in one
    ]
    return f"; did you mean {lower[found[0]]}?" if found else ""


def _one_of(choices: tuple) -> str:
    """The allowed values, for a message."""
    if all(type(one) is int for one in choices) and len(choices) > 3:
        return f"a whole number from {choices[0]} to {choices[-1]}"
    return " or ".join(f'"{one}"' if isinstance(one, str) else str(one) for one in choices)


def _can_write(place: str, is_file: bool) -> bool:
    """Whether a file or folder can be created at this path."""
    if os.path.exists(place) and is_file:
        return os.path.isfile(place) and os.access(place, os.W_OK)
    while place and not os.path.exists(place):
        place = os.path.dirname(place)
    return os.path.isdir(place or ".") and os.access(place or ".", os.W_OK)


def _is_on(value: dict, known: Section) -> bool:
    """Whether a section is on: by its switch; without one, by default or because a section in it is on."""
    if known.switch in value:
        return bool(value[known.switch])
    inner = [(value[name], one) for name, one in known.keys.items() if isinstance(one, Section) and name in value]
    return known.is_on or any(isinstance(one, dict) and _is_on(one, section) for one, section in inner)


def reason(error: Exception) -> str:
    """The message of a library's error, as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" For further information")[0][:300]
