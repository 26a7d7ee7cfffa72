"""What a training needs before it starts: `train.py ... --plan`. No GPU, no weights; seconds.

The model is built on the meta device, its real forward and backward run on the longest batch that the flags allow, and
every storage is followed (trace.py). What DeepSpeed adds is played around it (zero.py, zero3.py), all
of it through a model of CUDA's caching allocator. Nothing here was measured on a GPU.
"""

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from glm_models import MODE
from glm_models.ops import TILE
from tuning.engine.ds_config import compute_dtype, ds_notes, ds_values, fit_buckets, load_ds_config
from tuning.errors import UserError
from tuning.methods import build_model, parameter_groups
from tuning.plan.allocator import CachingAllocator
from tuning.plan.host import GIB, Host, host_needs, host_text
from tuning.plan.trace import Event, trace_step
from tuning.plan.zero import Setup, Zero12Simulator
from tuning.plan.zero3 import Zero3Simulator
from utils import is_main, say

CONTEXT = int(1.5 * GIB)  # CUDA's own, its kernels and NCCL's buffers: outside torch's allocator; assumed


class Needs(NamedTuple):
    """What a plan found, in bytes.

    parts: what lives when most is allocated, by kind.
    slack: what the caching allocator holds beyond that, at its own peak.
    peak: all of a GPU, context included.
    phase: when most is allocated.
    dtype: of weights and activations.
    host: main memory and disk.
    """

    parts: dict[str, int]
    slack: int
    peak: int
    phase: str
    dtype: torch.dtype
    host: Host


def longest_batch(args: argparse.Namespace, config) -> dict:
    """The longest batch that --max_len, --max_src_len and --per_device_train_batch_size allow."""
    rows = args.per_device_train_batch_size
    return MODE[args.mode].model.worst_case_batch(config, rows, args.max_len, args.max_src_len)


def run_trace(setup: Setup, on_gpu: bool = True) -> list[Event]:
    """What one micro-batch allocates, with marks for DeepSpeed; by the rules of a GPU's kernels or of a CPU's."""
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in setup.batch.items()}
    zero = setup.ds_config["zero_optimization"]
    # ZeRO-3 has a linear function of its own, that saves the parameter and not a view of what it holds
    linear = zero3_linear_wrap if zero["stage"] == 3 and zero.get("memory_efficient_linear", True) else None
    return trace_step(setup.model, batch, on_gpu, linear=linear)


EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def expandable() -> bool:
    """Whether torch is told to let the allocator's segments grow: then next to nothing is lost between blocks."""
    name, value = EXPANDABLE.split("=")
    return value in os.environ.get(name, "") + os.environ.get("PYTORCH_ALLOC_CONF", "")


def account(
    setup: Setup, trace: list[Event], gpus: int, capacity: float = float("inf"), grows: bool | None = None
) -> Needs:
    """Play a trace under DeepSpeed on so many GPUs.

    Args:
        capacity: bytes of a GPU that torch may reserve.
        grows: segments of the allocator do; None: see `expandable`.

    Raises:
        UserError: an optimizer that is not planned.
        MemoryError: more than `capacity` is needed.
    """
    stage = setup.ds_config["zero_optimization"]["stage"]
    memory = CachingAllocator(expandable() if grows is None else grows, capacity)
    run = (Zero3Simulator if stage == 3 else Zero12Simulator)(setup, gpus, memory)
    run.play(trace)
    return Needs(
        parts=memory.at_peak,
        slack=memory.peak_reserved - memory.peak_allocated,
        peak=memory.peak_reserved + CONTEXT,
        phase=run.peak_phase,
        dtype=run.parameters[0].dtype,
        host=host_needs(run),
    )


# Changes of the command line. A new flag that saves memory is a new row: what it costs (in points of trouble, to order
# the search), and a function that gives the changed flags, or None where it changes nothing.


def _single_rows(args, gpus):
    rows = args.per_device_train_batch_size
    steps = args.gradient_accumulation_steps * rows
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps} if rows > 1 else None


def _checkpointing(args, gpus):
    return None if args.gradient_checkpointing else {"gradient_checkpointing": True}


def _zero3(args, gpus):
    return {"ds_file": "ds_zero3_no_offload.json"} if gpus > 1 and "zero3" not in args.ds_file else None


def _offload(args, gpus):
    return {"ds_file": "ds_zero3_offload.json"} if "zero3_offload" not in args.ds_file else None


def _shorter(share: float):
    def change(args, gpus):
        lengths = {"max_len": int(args.max_len * share), "max_src_len": int(args.max_src_len * share)}
        return lengths if lengths["max_src_len"] >= 1 else None

    return change


def _tiled(args, gpus):
    return {"tiled_mlp": True} if args.max_len > TILE and not args.tiled_mlp else None


def _inputs(args, gpus):
    return {"offload_inputs": True} if args.gradient_checkpointing and not args.offload_inputs else None


CHANGES = [
    (1, _single_rows),
    (2, _checkpointing),
    (3, _zero3),
    (4, _tiled),
    (5, _inputs),
    (6, _offload),
    (10, _shorter(0.75)),
    (20, _shorter(0.5)),
    (30, _shorter(0.25)),
]

Build = Callable[[argparse.Namespace, int], Setup]


def flags(changes: dict) -> str:
    """Changes as they are typed."""
    return " ".join(f"--{name} {value}" for name, value in changes.items())


def changed(args: argparse.Namespace, changes: dict) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


class Plans:
    """Plans command lines that differ a little; those that differ in what DeepSpeed does alone share a trace.

    Args:
        build: makes a Setup of arguments and a number of GPUs.
    """

    def __init__(self, build: Build, gpus: int):
        self.build, self.gpus = build, gpus
        self.traces: dict[tuple, tuple[Setup, list[Event]]] = {}

    def __call__(self, args: argparse.Namespace, capacity: float = float("inf"), grows: bool | None = None) -> Needs:
        """See `account` for capacity, grows and errors."""
        setup = self.build(args, self.gpus)
        mine = {k: v for k, v in vars(args).items() if k not in ("ds_file", "gradient_accumulation_steps")}
        stage3 = setup.ds_config["zero_optimization"]["stage"] == 3
        key = (str(mine), next(setup.model.parameters()).dtype, stage3)
        if key not in self.traces:
            self.traces[key] = setup, run_trace(setup)
        traced, trace = self.traces[key]
        return account(traced._replace(ds_config=setup.ds_config), trace, self.gpus, capacity, grows)


def suggestions(args: argparse.Namespace, plans: Plans) -> list[tuple[str, Needs]]:
    """Single changes that lower the peak, planned anew each; the most helpful first."""
    before = plans(args).peak
    options = [change(args, plans.gpus) for _, change in CHANGES]
    found = [(flags(changes), plans(changed(args, changes))) for changes in options if changes]
    if not expandable():
        found.append((f"{EXPANDABLE} in front of the command", plans(args, grows=True)))
    return sorted((one for one in found if one[1].peak < before), key=lambda one: one[1].peak)


def cheapest(args: argparse.Namespace, plans: Plans, limit: float) -> tuple[dict, Needs] | None:
    """The changes of least cost with which a training fits into `limit` bytes of each GPU; None if none do."""
    candidates = []  # (cost, changes)
    for subset in range(1 << len(CHANGES)):
        rows = [row for i, row in enumerate(CHANGES) if subset >> i & 1]
        parts = [change(args, plans.gpus) for _, change in rows]
        names = [name for part in parts if part for name in part]
        if None not in parts and len(names) == len(set(names)):  # no two rows change the same flag
            candidates.append((sum(cost for cost, _ in rows), {k: v for part in parts for k, v in part.items()}))
    for _, changes in sorted(candidates, key=lambda one: one[0]):
        try:
            return changes, plans(changed(args, changes), limit - CONTEXT)
        except MemoryError:
            continue
    return None


# What the user sees

NAMES = {
    "weights": "weights",
    "gathered": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss",
    "buffers": "buffers",
}


def table(found: Needs) -> str:
    """The parts of a GPU's memory, in GiB."""
    rows = [
        (name, found.parts.get(part, 0)) for part, name in NAMES.items() if part != "gathered" or part in found.parts
    ]
    rows += [("allocator slack", found.slack), ("CUDA context", CONTEXT), ("peak", found.peak)]
    return "\n".join(f"  {name:<18}{size / GIB:8.2f}" for name, size in rows)


def describe(args: argparse.Namespace, found: Needs, gpus: int) -> str:
    """What was planned, and its table."""
    dtype = str(found.dtype).removeprefix("torch.")
    return (
        f"plan (simulated): {args.mode} {args.train_type} in {dtype}, {args.ds_file}, {gpus} GPU{'s' * (gpus > 1)}, "
        f"{args.per_device_train_batch_size} x {args.max_len} tokens each\n"
        f"GiB of each GPU; the most is allocated in the {found.phase}:\n{table(found)}\n"
        "CUDA context: what CUDA, its kernels and NCCL take beside torch, assumed. For GPUs of compute capability 8.0\n"
        "or newer (A100, A40, RTX 30xx, H100); older ones (V100, T4) have other attention kernels and need more."
    )


def advice(args: argparse.Namespace, plans: Plans) -> str:
    """What would lower the peak, a line each: GiB of a GPU with it, the difference, main memory, the flags."""
    before = plans(args).peak
    lines = [
        f"  {after.peak / GIB:6.2f} ({(after.peak - before) / GIB:+.2f}), {after.host.memory / GIB:4.0f}  {change}"
        for change, after in suggestions(args, plans)
    ]
    head = "what would lower it: GiB of each GPU, GiB of main memory"
    return "\n".join([head, *(lines or ["  nothing that train.py knows of"])])


def plan(args: argparse.Namespace, build: Build) -> None:
    """Print what `args` need, and what would lower it; with --max_memory, flags that fit, and what they need.

    Raises:
        UserError: flags that cannot be meant, or nothing fits.
    """
    gpus = args.plan_gpus if args.plan_gpus is not None else int(os.environ.get("WORLD_SIZE", 1))
    if gpus < 1:
        raise UserError(f"--plan_gpus must be at least 1, not {gpus}")
    if args.max_memory is not None and not args.max_memory * GIB > CONTEXT:
        raise UserError(f"--max_memory must be more than {CONTEXT / GIB} GiB, which CUDA itself takes")
    if not is_main():
        return
    plans = Plans(build, gpus)
    found = plans(args)
    for line in ds_notes(build(args, gpus).ds_config):
        say(line)
    say(describe(args, found, gpus))
    if args.max_memory is None:
        say(f"{host_text(found.host, args)}\n{advice(args, plans)}")
        return
    best = cheapest(args, plans, args.max_memory * GIB)
    if best is None:
        raise UserError(
            f"nothing fits into {args.max_memory:.4g} GiB of each GPU: fewer rows, checkpointing, ZeRO-3, offload and "
            "a quarter of --max_len were tried; use more GPUs (--plan_gpus), or a method that trains less"
        )
    changes, after = best
    what = flags(changes) or "no change"
    say(f"fits into {args.max_memory:.4g} GiB with: {what}  (peak {after.peak / GIB:.2f} GiB); so it takes")
    say(host_text(after.host, changed(args, changes)))


def plan_setup(args, gpus: int) -> Setup:
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
    return Setup(model, longest_batch(args, config), ds_config, groups)


def memory_advice(args) -> str:
    """What would need less memory, as --plan has it."""
    try:
        return advice(args, Plans(plan_setup, int(os.environ.get("WORLD_SIZE", 1))))
    except Exception as error:  # the error that this is said of must not be lost
        return f"--plan can tell what would need less memory ({error})"
