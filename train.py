"""Fine-tune ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B with DeepSpeed: freeze, P-Tuning v2, LoRA or all parameters.

    deepspeed train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ --train_path data/spo_0.json

`main` is the order of events. `TRAIN_TYPE` has one function a method.
"""

import argparse
import math
import os
from collections.abc import Callable
from typing import NamedTuple

# Set before torch is imported: fragmentation otherwise costs 2 to 5 GiB of a GPU. Torch reads the older name first, so
# it must not hide what a user has set under the newer one.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Large tensors in large pages: page faults would take 7 % of a CPU's time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model

import data_cache
import data_check
import planner
from adapter import record_base
from data_set import DataError, InstructionData, count_steps, epoch_loader, pack_rows, plan_epoch, prepare
from errors import UserError
from evaluation import FROM_LOSS, Validation, split_rows
from exits import clear_errors
from folders import check_space, free_space, lock_folder, sweep
from glm_models import MODE
from glm_models.ops import TiledMLP
from launch import check_shared, describe_devices, end_distributed, start_distributed
from log import RunLog, next_steps
from lora import LoraLinear
from metrics import HEADLINE, missing
from replay import Mixture
from states import Run, States, check_run, ds_section, find_state, list_states
from stops import Peers, Watch, told_clearly
from throughput import matmul_peak, needed_flops
from utils import (
    compute_dtype,
    device,
    is_main,
    keep_freed_memory,
    load_base,
    load_ds_config,
    load_tokenizer,
    on_rank_0,
    once_per_node,
    quiet,
    save_model,
    say,
    set_seed,
    trim_deepspeed,
    true_or_false,
)

# Methods: each takes the arguments and a function that loads the base model, and returns a model in which exactly the
# parameters to train require gradients.


def freeze(args, load):
    """Train the parameters whose name holds one of --freeze_module_name, freeze the rest (the original's meaning)."""
    model = load()
    wanted = split_names(args.freeze_module_name, "--freeze_module_name")
    names = [name for name, _ in model.named_parameters()]
    unknown = [part for part in wanted if not any(part in name for name in names)]
    if unknown:
        raise UserError(
            f"--freeze_module_name {', '.join(unknown)}: no parameter has it in its name. Names look like\n  "
            + "\n  ".join(shorten(names))
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in wanted))
    return model


def ptuning(args, load):
    """Train keys and values that stand before the tokens' own in every layer (P-Tuning v2); freeze the model."""
    if args.pre_seq_len < 1:
        raise UserError(f"--pre_seq_len {args.pre_seq_len}: at least 1 is needed")
    prefix = {key: getattr(args, key) for key in ("pre_seq_len", "prefix_projection", "prefix_dropout")}
    model = load(**prefix)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prefix_encoder." in name)
    return model


def lora(args, load):
    """Train low-rank additions to the weights of the modules named in --lora_module_name (peft); freeze the model."""
    if args.lora_dim < 1 or not 0 <= args.lora_dropout < 1:
        raise UserError("--lora_dim must be at least 1 and --lora_dropout at least 0 and less than 1")
    model = load()
    wanted = split_names(args.lora_module_name, "--lora_module_name")
    linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        raise UserError(f"--lora_module_name {', '.join(unknown)}: no such linear layer; there are {', '.join(linear)}")
    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_alpha,
        target_modules=wanted,
        lora_dropout=args.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({torch.nn.Linear: LoraLinear})
    model.name_or_path = os.path.abspath(args.model_name_or_path)  # goes into the adapter: its base
    # in the model's type: DeepSpeed keeps float32 masters, and ZeRO-3 does not cast what differs from it
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def train_all(args, load):
    """Train every parameter."""
    return load().requires_grad_(True)


TRAIN_TYPE = {"freeze": freeze, "ptuning": ptuning, "lora": lora, "all": train_all}


def split_names(text: str, flag: str) -> list[str]:
    """A comma-separated list."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{flag} is empty")
    return names


def shorten(names: list[str]) -> list[str]:
    """Parameter names of the first layer stand for those of all."""
    return [name for name in names if "layers." not in name or "layers.0." in name]


# Arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = {"type": true_or_false, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}

    group = parser.add_argument_group("model and data")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument("--model_name_or_path", required=True, help="checkpoint folder of that family")
    group.add_argument("--train_path", required=True, help="JSON lines or array of instruction, input, output")
    group.add_argument("--max_len", type=int, default=1024, help="most tokens of a sample; longer answers are cut")
    group.add_argument("--max_src_len", type=int, default=512, help="most tokens of its prompt; longer queries are cut")
    group.add_argument("--is_skip", **flag, help="leave out samples that would be cut")
    group.add_argument("--allow_empty_output", **flag, help="train rows with an empty output to answer nothing")
    group.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error", help="end at a broken row, or train without it"
    )
    group.add_argument("--check_data", **flag, help="start nothing: report all that is wrong or odd in the data")
    group.add_argument("--test_path", help="with --check_data: report its rows that stand in the training file too")
    group.add_argument("--packing", **flag, help="a row of a batch is several samples, up to max_len tokens together")
    group.add_argument("--group_by_length", **flag, help="steps of rows of about the same length: ranks wait less")
    group.add_argument("--replay_path", help="general rows, some of which come into each epoch, against forgetting")
    group.add_argument("--replay_ratio", type=float, help="share of them among all rows of an epoch, as 0.1")
    group.add_argument(
        "--data_cache", help="folder that keeps encoded data (default: ~/.cache/chatglm-tuning), or none"
    )
    group.add_argument("--output_dir", default="./output", help="where results go")

    group = parser.add_argument_group("method")
    group.add_argument("--train_type", choices=TRAIN_TYPE, default="lora", help="what to train (default: lora)")

    group = parser.add_argument_group("freeze")
    top = ",".join(f"layers.{i}." for i in (27, 26, 25, 24))
    group.add_argument("--freeze_module_name", default=top, help="parts of parameter names to TRAIN; others freeze")

    group = parser.add_argument_group("ptuning")
    group.add_argument("--pre_seq_len", type=int, default=16, help="length of the prefix")
    group.add_argument("--prefix_projection", **{**flag, "default": True}, help="make the prefix by a small network")

    group.add_argument("--prefix_dropout", type=float, default=0.1, help="dropout on the prefix")

    group = parser.add_argument_group("lora")
    group.add_argument("--lora_dim", type=int, default=8, help="rank")
    group.add_argument("--lora_alpha", type=float, default=30, help="scale: additions are multiplied by alpha / rank")
    group.add_argument("--lora_dropout", type=float, default=0.1, help="dropout on the input of the additions")
    group.add_argument(
        "--lora_module_name", default="query_key_value", help="names of the linear layers, comma between"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--num_train_epochs", type=int, default=1, help="passes over the data")
    group.add_argument(
        "--per_device_train_batch_size", type=int, default=1, help="rows of a micro-batch, on each device"
    )
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of an optimiser step")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="highest learning rate, after warm-up")
    group.add_argument("--weight_decay", type=float, default=0.1, help="AdamW's; none on biases and norms")
    group.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps in which the lr rises")
    group.add_argument("--seed", type=int, default=1234, help="of data order, initial weights and dropout")

    group = parser.add_argument_group("memory and devices")
    group.add_argument("--ds_file", default="ds_zero2_no_offload.json", help="DeepSpeed config; see the README")
    group.add_argument("--gradient_checkpointing", **flag, help="keep one activation a layer, recompute the rest")
    group.add_argument("--tiled_mlp", **flag, help="MLPs of long rows take some tokens at a time")
    group.add_argument(
        "--offload_inputs", **flag, help="what gradient checkpointing keeps of long rows waits in main memory"
    )
    group.add_argument(
        "--attn_implementation",
        choices=("sdpa", "eager", "flash_attention_2"),
        default="sdpa",
        help="torch's own kernels, plain operations, or the flash-attn package's kernels",
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by the launcher")

    group = parser.add_argument_group("planning")
    group.add_argument("--plan", **flag, help="start nothing: print what the training would need of each GPU")
    group.add_argument("--max_memory", type=float, help="with --plan: find flags that fit into so many GiB of a GPU")
    group.add_argument("--plan_gpus", type=int, help="with --plan: number of GPUs (default: as the launcher says)")

    group = parser.add_argument_group("reports and results")
    group.add_argument("--show_loss_step", type=int, default=10, help="optimiser steps between two lines")
    group.add_argument(
        "--save_model_step", type=int, help="also save every so many optimiser steps (always: each epoch)"
    )
    group = parser.add_argument_group("validation")
    group.add_argument("--eval_path", help="validate on this file; a row's output may be a list of references")
    group.add_argument(
        "--eval_ratio", type=float, help="validate on this share of --train_path, as 0.1; not trained on"
    )
    group.add_argument("--eval_steps", type=int, help="optimiser steps between validations (default: each epoch)")
    group.add_argument("--eval_at_start", **flag, help="validate before the first step too")
    group.add_argument("--eval_batch_size", type=int, default=8, help="most rows of a validation batch, on each device")
    group.add_argument(
        "--eval_generate",
        choices=["off", "auto", *HEADLINE],
        default="off",
        help="also answer rows and score them: as the references look, or as one of these kinds",
    )
    group.add_argument("--eval_generate_rows", type=int, default=200, help="answer at most so many, evenly spaced")
    group.add_argument(
        "--eval_max_new_tokens",
        type=int,
        help="most tokens of an answer (default: the longest reference, and a quarter)",
    )
    group.add_argument(
        "--best_metric", default="loss", help="figure by which the best model is kept in output_dir/best"
    )
    group.add_argument("--early_stopping_patience", type=int, help="end after so many validations without improvement")

    group = parser.add_argument_group("interruptions")
    group.add_argument("--save_state_steps", type=int, help="save a training state every so many optimiser steps")
    group.add_argument(
        "--save_total_limit", type=int, default=2, help="training states to keep (default: the newest 2)"
    )
    group.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from the newest whole state of --output_dir (auto; from the start if there is none), or from PATH",
    )
    group.add_argument("--resume_changed", **flag, help="go on although flags or data differ from those of the state")
    group.add_argument(
        "--skip_nonfinite", type=int, default=0, help="pass over so many steps whose loss or gradients are not finite"
    )
    group.add_argument("--verbose", **flag, help="show what the libraries have to say")
    return parser.parse_args(argv)


def check_args(args) -> None:
    """Raise one UserError that lists all that is wrong with the arguments."""
    wrong = []
    counts = ["num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "show_loss_step"]
    counts += ["save_model_step", "save_state_steps", "save_total_limit", "eval_steps", "eval_batch_size"]
    counts += ["eval_generate_rows", "eval_max_new_tokens", "early_stopping_patience"]
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            wrong.append(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.skip_nonfinite < 0:
        wrong.append(f"--skip_nonfinite must not be below 0, not {args.skip_nonfinite}")
    if not 0 < args.learning_rate < float("inf"):
        wrong.append(f"--learning_rate must be above 0, not {args.learning_rate}")
    if not 0 <= args.weight_decay < float("inf"):
        wrong.append(f"--weight_decay must not be below 0, not {args.weight_decay}")
    if not 0 <= args.warmup_ratio < 1:
        wrong.append(f"--warmup_ratio must be at least 0 and less than 1, not {args.warmup_ratio}")
    if not 0 <= args.prefix_dropout < 1:
        wrong.append(f"--prefix_dropout must be at least 0 and less than 1, not {args.prefix_dropout}")
    if not 0 < args.max_src_len < args.max_len:
        wrong.append(f"--max_src_len {args.max_src_len} must be above 0 and less than --max_len {args.max_len}")
    if (args.replay_path is None) != (args.replay_ratio is None):
        wrong.append("--replay_path and --replay_ratio go together; 0.1 is a ratio to begin with")
    if args.replay_ratio is not None and not 0 < args.replay_ratio < 1:
        wrong.append(f"--replay_ratio must be above 0 and less than 1, not {args.replay_ratio}")
    if args.max_memory is not None and not args.plan:
        wrong.append("--max_memory goes with --plan")
    if args.test_path is not None and not args.check_data:
        wrong.append("--test_path goes with --check_data")
    if args.plan and args.check_data:
        wrong.append("--plan and --check_data exclude each other")
    if args.test_path is not None and not os.path.isfile(args.test_path):
        wrong.append(f"--test_path {args.test_path}: no such file")
    if args.eval_path and args.eval_ratio is not None:
        wrong.append("--eval_path and --eval_ratio exclude each other")
    if args.eval_ratio is not None and not 0 < args.eval_ratio < 1:
        wrong.append(f"--eval_ratio must be above 0 and less than 1, not {args.eval_ratio}")
    if args.eval_path and not os.path.isfile(args.eval_path):
        wrong.append(f"--eval_path {args.eval_path}: no such file")
    if not validates(args):
        for name in ("eval_steps", "eval_max_new_tokens", "early_stopping_patience"):
            if getattr(args, name) is not None:
                wrong.append(f"--{name} needs --eval_path or --eval_ratio")
        if args.eval_at_start or args.eval_generate != "off" or args.best_metric != "loss":
            wrong.append("--eval_at_start, --eval_generate and --best_metric need --eval_path or --eval_ratio")
    if missing(args.eval_generate):
        wrong.append(f"--eval_generate {args.eval_generate} needs more packages: {missing(args.eval_generate)}")
    needed = {"model_name_or_path": os.path.isdir}
    files = {name: os.path.isfile for name in ("train_path", "replay_path") if getattr(args, name) is not None}
    for name, what in (files | needed).items():
        if not what(getattr(args, name)):
            wrong.append(f"--{name} {getattr(args, name)}: no such {'file' if what is os.path.isfile else 'folder'}")
    if args.offload_inputs and not args.gradient_checkpointing:
        wrong.append("--offload_inputs needs --gradient_checkpointing: it moves what that keeps")
    if args.packing and args.group_by_length:
        wrong.append("--packing and --group_by_length exclude each other: packed rows are all about max_len long")
    if wrong:
        raise UserError("\n       ".join(wrong))


def validates(args) -> bool:
    """Whether there are rows to validate on."""
    return bool(args.eval_path) or args.eval_ratio is not None


# Training


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """The parameters to train, with weight decay but on biases and norms."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if name.endswith("bias") or "layernorm" in name else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def ds_values(args, world_size: int, total_steps: int, hidden_size: int) -> dict:
    """What "auto" means in a ds file."""
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.weight_decay": args.weight_decay,
        "scheduler.params.warmup_max_lr": args.learning_rate,
        "scheduler.params.warmup_num_steps": max(1, round(total_steps * args.warmup_ratio)),
        # one more than there are: the lr is 0 after the last step, not in it
        "scheduler.params.total_num_steps": total_steps + 1,
        # in numbers, of which a GPU has two buffers; 20 MB are sent well, and alone there is nothing to send
        "zero_optimization.reduce_bucket_size": 10_000_000 if world_size > 1 else 1_000_000,
        "zero_optimization.overlap_comm": world_size > 1,  # alone there is nothing to overlap, and it keeps gradients
        "zero_optimization.allgather_bucket_size": 200_000_000,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": hidden_size * hidden_size,
    }


def load_data(args, tokenizer, path: str, several_outputs: bool = False) -> InstructionData:
    """A file's samples: prepared by one process a node, or taken from the cache, and then mapped into all of them."""
    settings = (path, tokenizer, args.max_len, args.max_src_len, args.is_skip, args.allow_empty_output)
    keep = args.data_cache != "none"
    cache_dir = (args.data_cache or data_cache.default_folder()) if keep else None
    more = {"skip_bad": args.on_bad_row == "skip", "several_outputs": several_outputs}
    prepared = once_per_node(lambda: prepare(*settings, cache_dir=cache_dir, progress=is_main(), **more))
    data = InstructionData(*settings, prepared=prepared)
    if not keep:
        on_rank_0(lambda: None)  # all have mapped it
        once_per_node(lambda: os.unlink(prepared))  # what is mapped stays readable
    return data


class Sources(NamedTuple):
    """The rows of a run.

    packs: of an epoch, what it takes of `data`: lists of samples' numbers, the same number of lists in each epoch.
    held_out: has the rows to validate on, held_out_rows; none without validation.
    contents: SHA-256 of each file, by the flag that names it.
    """

    data: InstructionData
    packs: Callable[[int], list[list[int]]]
    held_out: InstructionData
    held_out_rows: list[int]
    contents: dict[str, str]


def load_sources(args, tokenizer) -> Sources:
    """All files that flags name."""
    task = held_out = load_data(args, tokenizer, args.train_path)
    say(f"data: {task.summary()}")
    contents = {"--train_path": task.content}
    rows, held_out_rows = range(len(task)), []
    if args.eval_ratio is not None:
        rows, held_out_rows = split_rows(task, args.eval_ratio)
    elif args.eval_path:
        held_out = load_data(args, tokenizer, args.eval_path, several_outputs=True)
        held_out_rows, contents["--eval_path"] = list(range(len(held_out))), held_out.content
        say(f"validation data: {held_out.summary()}")

    def pack(data, rows):
        return pack_rows(data, args.max_len, args.seed, rows) if args.packing else [[i] for i in rows]

    packs = pack(task, rows)
    if not args.replay_path:
        return Sources(task, lambda epoch: packs, held_out, held_out_rows, contents)
    general = load_data(args, tokenizer, args.replay_path)
    contents["--replay_path"] = general.content
    general_packs = pack(general, range(len(general)))
    longest = args.per_device_train_batch_size
    mixture = Mixture(task, packs, general, general_packs, args.replay_ratio, longest, args.seed)
    say(f"replay: {mixture.summary()}")
    return Sources(mixture, mixture.epoch_packs, held_out, held_out_rows, contents)


def check(args) -> None:
    """--check_data: needs the tokenizer, and neither other processes nor the model."""
    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    limits = (args.max_len, args.max_src_len, args.is_skip, args.allow_empty_output, args.on_bad_row == "skip")
    data_check.check_data(args.train_path, tokenizer, *limits, args.test_path, args.output_dir)


def build_model(args, load):
    """What the method makes of the base model that `load` gives, with the flags that save memory."""

    def load_lean(**config):
        model = load(**config)
        model.save_memory(args.tiled_mlp, args.offload_inputs)
        return model

    model = TRAIN_TYPE[args.train_type](args, load_lean)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # transformers asks for them, and layers below those that train would pay
    return model


def fit_buckets(ds_config: dict, trained: int) -> None:
    """Make buckets no larger than all gradients together: buffers of their size are allocated."""
    for bucket in ds_config["zero_optimization"].keys() & {"reduce_bucket_size", "allgather_bucket_size"}:
        ds_config["zero_optimization"][bucket] = min(int(ds_config["zero_optimization"][bucket]), trained)


def plan_setup(args, gpus: int) -> planner.Setup:
    """What `train` would start on so many GPUs, with the model on the meta device."""
    family = MODE[args.mode]
    config = family.config.from_pretrained(args.model_name_or_path)
    ds_config = load_ds_config(args.ds_file, ds_values(args, gpus, 1, config.hidden_size), as_gpu=True)
    dtype = compute_dtype(ds_config)

    def load(**changes):
        return family.model(family.config.from_pretrained(args.model_name_or_path, use_cache=False, **changes))

    with torch.device("meta"):
        model = build_model(args, load).to(dtype).train()
    groups = parameter_groups(model, args.weight_decay)
    fit_buckets(ds_config, sum(p.numel() for group in groups for p in group["params"]))
    return planner.Setup(model, planner.longest_batch(args, config), ds_config, groups)


# Flags that a run may go on without: they change no loss, but for rounding. All others are part of what it is.
MAY_CHANGE = {
    *("train_path", "eval_path", "replay_path", "model_name_or_path", "ds_file"),  # their content is compared
    *("output_dir", "data_cache"),
    *("gradient_checkpointing", "tiled_mlp", "offload_inputs", "attn_implementation", "local_rank"),
    *("plan", "max_memory", "plan_gpus", "show_loss_step", "save_model_step", "save_state_steps", "save_total_limit"),
    *("resume_from_checkpoint", "resume_changed", "skip_nonfinite", "verbose", "check_data", "test_path"),
    *("eval_batch_size", "eval_at_start"),
}
# These too, unless the best model is chosen by answers.
OF_ANSWERS = {"eval_generate", "eval_generate_rows", "eval_max_new_tokens"}


def describe_run(args, contents: dict, tokenizer, base: dict, ds_config: dict, world_size: int) -> Run:
    """What losses depend on: flags, and the content of what flags name; contents are SHA-256 of data, by flag, and base
    is of `adapter.record_base`.
    """
    may_change = MAY_CHANGE | (OF_ANSWERS if args.best_metric in FROM_LOSS else set())
    settings = {f"--{name}": value for name, value in vars(args).items() if name not in may_change}
    # micro-batches count, whoever has them: so the number of processes may change
    del settings["--gradient_accumulation_steps"]
    settings |= {f"SHA-256 of {flag}": content for flag, content in contents.items()}
    settings |= {
        "--gradient_accumulation_steps x processes": args.gradient_accumulation_steps * world_size,
        "weights of --model_name_or_path": base["fingerprint"],
        "config.json of --model_name_or_path": base["config"],
        "tokenizer of --model_name_or_path": tokenizer.fingerprint(),
    }
    for section in ("optimizer", "scheduler", "bf16", "fp16", "gradient_clipping"):
        settings[f"{section} of --ds_file"] = ds_config.get(section)
    return Run(settings, world_size, ds_config["zero_optimization"].get("stage", 0))


def open_output(args) -> str | None:
    """Make --output_dir ready, on rank 0. Returns the state to go on from, if there is one.

    Raises:
        FolderError, UserError: see `folders.sweep` and `states.find_state`; or there are states and the run is new.
    """
    for folder in (args.output_dir, os.path.join(args.output_dir, "states")):
        for path in sweep(folder):
            say(f"{path}: tidied up after a run that was killed")
    if args.resume_from_checkpoint:
        state, broken = find_state(args.resume_from_checkpoint, args.output_dir)
        for problem in broken:
            say(f"warning: a newer state cannot be used: {problem}")
        say(f"going on from {state}" if state else f"no training state in {args.output_dir} yet: from the start")
        return state
    if there := list_states(args.output_dir):
        raise UserError(
            f"--output_dir {args.output_dir} holds training states of an earlier run (newest: {there[0]}): "
            "--resume_from_checkpoint goes on from it; or remove them, or name another folder"
        )
    return None


def train(args) -> list[tuple[int, float]]:
    """The whole run. Returns (step, loss) of every line it showed."""
    check_args(args)
    trim_deepspeed()
    _, world_size = start_distributed(args.verbose, args.local_rank)
    peers = Peers()
    set_seed(args.seed)
    locks = []  # held until this function returns
    on_rank_0(lambda: locks.append(lock_folder(args.output_dir)))
    check_shared(args.output_dir)
    state = on_rank_0(lambda: open_output(args))

    tokenizer = load_tokenizer(args.mode, args.model_name_or_path)
    config = MODE[args.mode].config.from_pretrained(args.model_name_or_path)
    # the ds file first without the number of steps, which only the data tells: reading that may take long
    dtype = compute_dtype(load_ds_config(args.ds_file, ds_values(args, world_size, 1, config.hidden_size)))
    say(describe_devices(dtype))
    sources = load_sources(args, tokenizer)
    split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size)
    epoch_steps = count_steps(len(sources.packs(1)), *split)
    total_steps = args.num_train_epochs * epoch_steps

    ds_config = load_ds_config(args.ds_file, ds_values(args, world_size, total_steps, config.hidden_size))
    base = on_rank_0(lambda: record_base(args.mode, args.model_name_or_path, dtype))
    run = describe_run(args, sources.contents, tokenizer, base, ds_config, world_size)
    for change in check_run(state, run, args.resume_changed) if state else ():
        say(f"warning: changed since {state}: {change}")

    def load(**config):
        return load_base(args.mode, args.model_name_or_path, dtype, ds_config, args.attn_implementation, **config)

    model = build_model(args, load)
    model.base_record = base
    if args.tiled_mlp and model.zero3:
        deepspeed.utils.set_z3_leaf_modules(model, [TiledMLP])  # see there
    groups = parameter_groups(model, args.weight_decay)
    trained = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
    every = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(f"model: {trained:,} of {every:,} parameters train ({trained / every:.2%}), in {dtype}")

    fit_buckets(ds_config, trained)
    ds_config |= ds_section(state, world_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    engine.lr_scheduler.step(1)  # else the first two steps would have lr 0: DeepSpeed's schedulers count from -1
    log = RunLog(
        engine, args.output_dir, args.num_train_epochs, total_steps, args.show_loss_step, needed_flops(model),
        matmul_peak(dtype),
    )  # fmt: skip
    watch = Watch(engine, sources.data.files, math.log(config.vocab_size), args.skip_nonfinite)
    parts = {"log": log, "watch": watch}

    def keep(name):
        save(args, model, tokenizer, name, dtype)

    validation = None
    if validates(args):
        rows = (sources.held_out, sources.held_out_rows, args.eval_path or args.train_path)
        steps = (args.eval_steps or epoch_steps, total_steps)
        validation = parts["validation"] = Validation(engine, tokenizer, *rows, args, *steps, log, lambda: keep("best"))
    states = States(engine, parts, run, args.output_dir, args.save_state_steps, args.save_total_limit)
    on_rank_0(lambda: check_room(args, model, dtype, states))
    if state:
        states.load(state)
    say(f"training: {args.num_train_epochs} epochs, {total_steps} steps of {ds_config['train_batch_size']} rows")

    keep_freed_memory()
    engine.train()
    result = f"epoch-{args.num_train_epochs}-step-{total_steps}"
    log.begin()
    with watch:
        if validation:
            validation.begin()
        for epoch, batch in training_batches(args, engine, sources, split, epoch_steps):
            loss = engine(**watch.begin(batch).to(device())).loss
            engine.backward(loss)
            engine.step()

            step = watch.end(loss)  # None until all micro-batches of an optimiser step are through
            if step is None:
                continue
            log.add(step, epoch)
            done, result = engine.global_steps, f"epoch-{epoch}-step-{engine.global_steps}"
            wanted = done % epoch_steps == 0 or (args.save_model_step and done % args.save_model_step == 0)
            if wanted:
                keep(result)
            if validation and validation.due() and validation.run(epoch):
                if not wanted:
                    keep(result)
                break
            if done < total_steps and (states.due() or watch.interrupted):
                watch.end_if_interrupted(states.save())
    peers.close()
    if validation:
        validation.close()
    log.close()
    best = validation.describe_best() if validation else None
    for line in next_steps(args, os.path.join(args.output_dir, result), best):
        say(line)
    return log.history


def training_batches(args, engine, sources: Sources, split, epoch_steps: int):
    """Yield epoch and batch, each of this rank from where the engine is to the end of the run."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pin = get_accelerator().device_name() != "cpu"
    for epoch in range(engine.global_steps // epoch_steps + 1, args.num_train_epochs + 1):
        plan = plan_epoch(sources.data, sources.packs(epoch), *split, args.seed, epoch, args.group_by_length)
        todo = plan[engine.global_steps % epoch_steps :]
        for batch in epoch_loader(sources.data, todo, rank, world_size, pin):
            yield epoch, batch


def result_size(model, dtype) -> int:
    """Bytes of the weights of one result."""
    parameters = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters) * dtype.itemsize


def check_room(args, model, dtype, states: States) -> None:
    """Make sure that the disk has room for one result and the states; warn if not for all results."""
    result = result_size(model, dtype)
    # a new state is there before an old one goes
    kept = states.size() * (args.save_total_limit + 1) if args.save_state_steps else 0
    check_space(args.output_dir, result + kept, "a result and the training states" if kept else "a result")
    results = args.num_train_epochs + 2 * validates(args)  # a new best one is there before the old one goes
    if free_space(args.output_dir) < results * result + kept:
        say(f"warning: the disk of {args.output_dir} has no room for the results of all epochs")


def save(args, model, tokenizer, name: str, dtype) -> None:
    """Write the model to a folder of that name in --output_dir."""
    folder = os.path.join(args.output_dir, name)
    on_rank_0(lambda: check_space(args.output_dir, result_size(model, dtype), folder))
    save_model(model, tokenizer, args.model_name_or_path, folder, dtype)
    say(f"saved {folder}")


def memory_advice(args) -> str:
    """What would need less memory, as --plan has it."""
    try:
        return planner.advice(args, planner.Plans(plan_setup, int(os.environ.get("WORLD_SIZE", 1))))
    except Exception as error:  # the error that this is said of must not be lost
        return f"--plan can tell what would need less memory ({error})"


def main(argv=None) -> None:
    args = parse_args(argv)
    quiet(args.verbose)
    with clear_errors(DataError), told_clearly(lambda: memory_advice(args)):
        if args.plan:
            check_args(args)
            trim_deepspeed()
            planner.plan(args, plan_setup)
        elif args.check_data:
            check_args(args)
            if is_main():
                check(args)
        else:
            train(args)
            end_distributed()


if __name__ == "__main__":
    main()
