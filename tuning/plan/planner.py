"""How much memory a training needs, before it starts: `train.py ... --plan`. Takes seconds, no GPU and no weights.

The model is built on the meta device, its real forward and backward run on the longest batch that the flags allow, and
every allocation is recorded (trace.py). The trace is replayed into a simulated CUDA caching allocator (allocator.py),
together with the allocations of DeepSpeed (zero.py, zero3.py). Nothing here was measured on a GPU.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from glm_models import MODE
from glm_models.ops import TILE
from glm_models.quantized import BITS, use_quantized_layers
from tuning.arguments.quantization import training_problems
from tuning.engine.ds_config import (
    check_quantization,
    compute_dtype,
    ds_notes,
    ds_values,
    fit_buckets,
    load_ds_config,
    split_groups,
)
from tuning.errors import UserError
from tuning.lora.earlier import take_lora_flags
from tuning.methods import build_model, check_zero3, parameter_groups, zero3_problem
from tuning.plan.allocator import CachingAllocator
from tuning.plan.host import GIB, HostPlan, host_text, lowered, plan_host
from tuning.plan.trace import Event, trace_step
from tuning.plan.traffic import describe_traffic
from tuning.plan.zero import Setup, Zero12Simulator
from tuning.plan.zero3 import Zero3Simulator
from utils import is_rank_0, print_rank_0

CONTEXT = int(1.5 * GIB)  # CUDA context, kernels and NCCL buffers, outside torch's allocator; an assumption
# DeepSpeed versions whose allocations the simulators were compared with, see tests/plan/test_planner.py
TESTED_DEEPSPEED = ("0.19.8",)


class MemoryPlan(NamedTuple):
    """The memory that a training needs, in bytes.

    parts: allocated memory at its peak, by kind.
    slack: memory that the caching allocator reserves beyond that, at its own peak.
    peak: memory of a GPU, including the CUDA context.
    phase: part of the step in which the peak is.
    dtype: of weights and activations.
    host: main memory and disk space.
    """

    parts: dict[str, int]
    slack: int
    peak: int
    phase: str
    dtype: torch.dtype
    host: HostPlan


def longest_batch(args: argparse.Namespace, config) -> dict:
    """The longest batch that --max_len, --max_src_len and --per_device_train_batch_size allow."""
    rows = args.per_device_train_batch_size
    return MODE[args.mode].model.worst_case_batch(config, rows, args.max_len, args.max_src_len)


def run_trace(setup: Setup, on_gpu: bool = True) -> list[Event]:
    """Trace of one micro-batch, with the events that DeepSpeed reacts to, as on a GPU or on a CPU."""
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in setup.batch.items()}
    zero = setup.ds_config["zero_optimization"]
    # ZeRO-3 has its own linear function, which saves the parameter instead of a view of its data
    linear = zero3_linear_wrap if zero["stage"] == 3 and zero.get("memory_efficient_linear", True) else None
    return trace_step(setup.model, batch, on_gpu, linear=linear)


EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def expandable() -> bool:
    """Whether torch uses expandable segments, with almost no loss between blocks."""
    name, value = EXPANDABLE.split("=")
    return value in os.environ.get(name, "") + os.environ.get("PYTORCH_ALLOC_CONF", "")


def simulate(
    setup: Setup, trace: list[Event], gpus: int, capacity: float = float("inf"), grows: bool | None = None
) -> MemoryPlan:
    """Simulate an optimizer step under DeepSpeed.

    Args:
        trace: of `run_trace`.
        gpus: number of GPUs.
        capacity: bytes of a GPU that torch may reserve.
        grows: whether the segments of the allocator are expandable; None: see `expandable`.

    Raises:
        UserError: the optimizer is not supported.
        MemoryError: more than `capacity` is needed.
    """
    stage = setup.ds_config["zero_optimization"]["stage"]
    memory = CachingAllocator(expandable() if grows is None else grows, capacity)
    run = (Zero3Simulator if stage == 3 else Zero12Simulator)(setup, gpus, memory)
    run.replay(trace)
    return MemoryPlan(
        parts=memory.at_peak,
        slack=memory.peak_reserved - memory.peak_allocated,
        peak=memory.peak_reserved + CONTEXT,
        phase=run.peak_phase,
        dtype=run.parameters[0].dtype,
        host=plan_host(run),
    )


# Changes of the command line. A new flag that saves memory is a new row: a cost that orders the search, and a function
# that returns the changed flags, or None if it changes nothing or does not go with the flags that there are.


def _single_rows(args, gpus):
    rows = args.per_device_train_batch_size
    steps = args.gradient_accumulation_steps * rows
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps} if rows > 1 else None


def _checkpointing(args, gpus):
    return None if args.gradient_checkpointing else {"gradient_checkpointing": True}


def _zero3(args, gpus):
    fits = gpus > 1 and "zero3" not in args.ds_file and _takes_zero3(args)
    return {"ds_file": "ds_zero3_no_offload.json"} if fits else None


def _takes_zero3(args) -> bool:
    return not args.quantization_bit and not zero3_problem(args)


def _nf4(args, gpus):
    changes = {"quantization_bit": 4}
    fits = args.quantization_bit != 4 and "zero3" not in args.ds_file
    return changes if fits and not training_problems(changed(args, changes)) else None


def _offload(args, gpus):
    fits = "zero3_offload" not in args.ds_file and _takes_zero3(args)
    return {"ds_file": "ds_zero3_offload.json"} if fits else None


def _bf16_states(args, gpus):
    fits = "zero3_bf16_states" not in args.ds_file and _takes_zero3(args)
    return {"ds_file": "ds_zero3_bf16_states.json"} if fits else None


def _offload_bf16_states(args, gpus):
    if "offload_bf16_states" in args.ds_file:
        return None
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    # float32 sums of several micro-batches would be on the GPU
    whole = {"per_device_train_batch_size": rows * steps, "gradient_accumulation_steps": 1} if steps > 1 else {}
    return {"ds_file": "ds_zero2_offload_bf16_states.json"} | whole


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
    (6, _nf4),
    (7, _offload),
    (8, _bf16_states),
    (9, _offload_bf16_states),
    (10, _shorter(0.75)),
    (20, _shorter(0.5)),
    (30, _shorter(0.25)),
]

ROUNDS = "  (rounds: weights and moments in bf16 alone)"
Build = Callable[[argparse.Namespace, int], Setup]


def flags(changes: dict) -> str:
    """Changes as typed on the command line."""
    return " ".join(f"--{name} {value}" for name, value in changes.items())


def costs_precision(changes: dict) -> bool:
    return "bf16_states" in changes.get("ds_file", "")


def marked(changes: dict) -> str:
    """Changes as typed, and what they lose."""
    return flags(changes) + ROUNDS * costs_precision(changes)


def changed(args: argparse.Namespace, changes: dict) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


class Plans:
    """Plans several command lines; those that differ only in what DeepSpeed does share a trace.

    Args:
        build: makes a Setup from arguments and a number of GPUs.
    """

    def __init__(self, build: Build, gpus: int):
        self.build, self.gpus = build, gpus
        self.traces: dict[tuple, tuple[Setup, list[Event]]] = {}

    def __call__(
        self, args: argparse.Namespace, capacity: float = float("inf"), grows: bool | None = None
    ) -> MemoryPlan:
        """The plan of a command line; see `simulate` for capacity, grows and errors."""
        setup = self.build(args, self.gpus)
        settings = {k: v for k, v in vars(args).items() if k not in ("ds_file", "gradient_accumulation_steps")}
        stage3 = setup.ds_config["zero_optimization"]["stage"] == 3
        key = (str(settings), next(setup.model.parameters()).dtype, stage3)
        if key not in self.traces:
            self.traces[key] = setup, run_trace(setup)
        traced, trace = self.traces[key]
        return simulate(traced._replace(ds_config=setup.ds_config), trace, self.gpus, capacity, grows)


def suggestions(args: argparse.Namespace, plans: Plans) -> list[tuple[str, MemoryPlan]]:
    """Single changes that lower the peak, with their plans; the most effective first."""
    before = plans(args).peak
    options = [change(args, plans.gpus) for _, change in CHANGES]
    found = [(marked(changes), plans(changed(args, changes))) for changes in options if changes]
    if not expandable():
        found.append((f"{EXPANDABLE} in front of the command", plans(args, grows=True)))
    return sorted((one for one in found if one[1].peak < before), key=lambda one: one[1].peak)


def all_changes(args: argparse.Namespace, gpus: int) -> list[dict]:
    """All sets of flag changes, the cheapest first."""
    found = []  # (cost, changes)
    for subset in range(1 << len(CHANGES)):
        rows = [row for i, row in enumerate(CHANGES) if subset >> i & 1]
        changes: dict | None = {}
        for _, change in rows:
            part = change(changed(args, changes), gpus)
            if part is None or part.keys() & changes.keys():  # no two rows change the same flag
                changes = None
                break
            changes |= part
        if changes is not None:
            found.append((sum(cost for cost, _ in rows), changes))
    return [changes for _, changes in sorted(found, key=lambda one: one[0])]


def least_memory(args: argparse.Namespace, plans: Plans) -> tuple[dict, MemoryPlan]:
    """The flag changes that need least, with their plan: among the sets to which no change can be added."""
    found = all_changes(args, plans.gpus)
    most = [one for one in found if not any(one.items() < other.items() for other in found)]
    shortest = min(one.get("max_len", args.max_len) for one in most)
    most = [one for one in most if one.get("max_len", args.max_len) == shortest]
    return min(((one, plans(changed(args, one))) for one in most), key=lambda pair: pair[1].peak)


def search_flags(args: argparse.Namespace, plans: Plans, limit: float) -> Iterator[tuple[dict, MemoryPlan]]:
    """Sets of flag changes that fit into `limit` bytes per GPU, with their plans; the cheapest first.

    Raises:
        UserError: none fits; says what the least is.
    """
    changes, least = least_memory(args, plans)  # first, because there are many sets to try
    if least.peak > limit:
        raise UserError(
            f"nothing fits into {limit / GIB:.4g} GiB per GPU: the least that train.py's flags give is "
            f"{least.peak / GIB:.2f} GiB, with {marked(changes) or 'no change'}; use more GPUs (--plan_gpus), or a "
            "method that trains less"
        )
    found = False
    for some in all_changes(args, plans.gpus):
        try:
            fitting = some, plans(changed(args, some), limit - CONTEXT)
        except MemoryError:
            continue
        found = True
        yield fitting
    if not found:  # the allocator's own retries may fail where the peak alone fits
        yield changes, least


# Output

NAMES = {
    "weights": "weights",
    "gathered": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss",
    "buffers": "buffers",
}


def memory_table(found: MemoryPlan) -> str:
    """The parts of a GPU's memory as a table, in GiB."""
    rows = [
        (name, found.parts.get(part, 0)) for part, name in NAMES.items() if part != "gathered" or part in found.parts
    ]
    rows += [("allocator slack", found.slack), ("CUDA context", CONTEXT), ("peak", found.peak)]
    return "\n".join(f"  {name:<18}{size / GIB:8.2f}" for name, size in rows)


def describe(args: argparse.Namespace, found: MemoryPlan, gpus: int) -> str:
    """The planned setting and its memory table."""
    dtype = str(found.dtype).removeprefix("torch.")
    if args.quantization_bit:
        dtype += f" on {BITS[args.quantization_bit]}"
    return (
        f"plan (simulated): {args.mode} {args.train_type} in {dtype}, {args.ds_file}, {gpus} GPU{'s' * (gpus > 1)}, "
        f"{args.per_device_train_batch_size} x {args.max_len} tokens each\n"
        f"GiB per GPU at the peak, which is in the {found.phase}:\n{memory_table(found)}\n"
        "CUDA context: memory of CUDA, its kernels and NCCL outside torch, an assumption. For GPUs of compute\n"
        "capability 8.0 or newer (A100, A40, RTX 30xx, H100); older ones (V100, T4) have other attention kernels\n"
        "and need more."
    )


def advice(args: argparse.Namespace, plans: Plans) -> str:
    """Changes that lower the peak, one per line: GiB per GPU, the difference, main memory, the flags."""
    before = plans(args).peak
    lines = [
        f"  {after.peak / GIB:6.2f} ({lowered(before - after.peak)}), {after.host.memory / GIB:4.0f}  {change}"
        for change, after in suggestions(args, plans)
    ]
    head = "what would lower it: GiB per GPU, GiB of main memory"
    return "\n".join([head, *(lines or ["  none known to train.py"])])


def advice_within(args: argparse.Namespace, plans: Plans) -> str:
    """The cheapest changes that fit into --max_memory; if these offload, also ones that need less main memory.

    Raises:
        UserError: nothing fits.
    """
    fitting = search_flags(args, plans, args.max_memory * GIB)
    changes, after = next(fitting)
    found = f"{marked(changes) or 'no change'}  (peak {after.peak / GIB:.2f} GiB)"
    lines = [
        f"fits into {args.max_memory:.4g} GiB with: {found}; it then needs",
        host_text(after.host, changed(args, changes)),
    ]
    if "_offload" in changes.get("ds_file", "") and not costs_precision(changes):
        more = (one for one in fitting if costs_precision(one[0]) and one[1].host.memory < after.host.memory)
        for other, plan_of in itertools.islice(more, 1):
            lines.append(
                f"or, with {plan_of.host.memory / GIB:.0f} GiB of main memory: {marked(other)}  "
                f"(peak {plan_of.peak / GIB:.2f} GiB)"
            )
    return "\n".join(lines)


def check_deepspeed() -> None:
    """Refuse a DeepSpeed version with which the simulators were not compared.

    Raises:
        UserError: the installed version is not one of TESTED_DEEPSPEED.
    """
    if deepspeed.__version__.split("+")[0] not in TESTED_DEEPSPEED:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is installed, but --plan simulates the allocations of DeepSpeed "
            f"{', '.join(TESTED_DEEPSPEED)} and was not tested with others: install that version to plan"
        )


def plan(args: argparse.Namespace, build: Build) -> None:
    """Print the memory that `args` need and changes that lower it; with --max_memory, flags that fit.

    Raises:
        UserError: the installed DeepSpeed is not one of TESTED_DEEPSPEED; invalid flags; nothing fits.
    """
    check_deepspeed()
    gpus = args.plan_gpus if args.plan_gpus is not None else int(os.environ.get("WORLD_SIZE", 1))
    if gpus < 1:
        raise UserError(f"--plan_gpus must be at least 1, not {gpus}")
    if args.max_memory is not None and not args.max_memory * GIB > CONTEXT:
        raise UserError(f"--max_memory must be more than {CONTEXT / GIB} GiB, which the CUDA context needs")
    if not is_rank_0():
        return
    take_lora_flags(args)
    plans, setup = Plans(build, gpus), build(args, gpus)
    found = plans(args)
    for line in (*ds_notes(setup.ds_config), describe(args, found, gpus), *describe_traffic(setup, gpus)):
        print_rank_0(line)
    if args.max_memory is None:
        print_rank_0(f"{host_text(found.host, args)}\n{advice(args, plans)}")
        return
    print_rank_0(advice_within(args, plans))


def plan_setup(args, gpus: int) -> Setup:
    """The training that train.py would start on `gpus` GPUs, with the model on the meta device.

    Args:
        gpus: in a pipeline, those that have the same stage.
    """
    family = MODE[args.mode]
    config = family.config.from_pretrained(args.model_name_or_path)
    ds_config = load_ds_config(args.ds_file, ds_values(args, gpus, 1, config.hidden_size), as_gpu=True)
    check_zero3(args, ds_config["zero_optimization"]["stage"])
    check_quantization(args, ds_config)
    dtype = compute_dtype(ds_config)

    def load(**changes):
        model = family.model(family.config.from_pretrained(args.model_name_or_path, use_cache=False, **changes))
        if args.quantization_bit:
            use_quantized_layers(model, args.quantization_bit, dtype)
        return model

    with torch.device("meta"):
        model = build_model(args, load).to(dtype).train()
    groups = split_groups(parameter_groups(model, args), ds_config)
    fit_buckets(ds_config, sum(p.numel() for group in groups for p in group["params"]))
    return Setup(model, longest_batch(args, config), ds_config, groups, args.save_prefix_only)


def memory_advice(args) -> str:
    """Changes that need less memory, for the message of a training that ran out of it."""
    try:
        check_deepspeed()
        if args.pipeline_stages:
            return "what would lower it: --gradient_checkpointing, shorter rows, more --pipeline_stages; see --plan"
        return advice(args, Plans(plan_setup, int(os.environ.get("WORLD_SIZE", 1))))
    except Exception as error:  # must not hide the error that it is appended to
        return f"--plan could not tell what would need less memory ({error})"
