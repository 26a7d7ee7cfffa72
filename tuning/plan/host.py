"""Main memory and disk space that a training needs, and how much of both this machine has."""

import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from glm_models.quantized import count_numbers
from tuning.folders import free_space
from tuning.lora.starts import saved_sizes
from tuning.plan.zero import Zero12Simulator

MIB, GIB = 2**20, 2**30
PROCESS = 3 * GIB  # main memory of one process with torch and CUDA loaded, before any weights
READ = 2 * GIB  # size of a weight file of the official checkpoints, roughly
WRITTEN = 4 * GIB  # maximum size of a weight file of a result; rank 0 holds it in memory while writing


class HostPlan(NamedTuple):
    """What a training needs besides GPU memory, in bytes.

    memory: main memory of a node that runs all ranks, at its peak.
    phase: when that peak is.
    result: weights of one result.
    state: one training state.
    """

    memory: int
    phase: str
    result: int
    state: int


def plan_host(run: Zero12Simulator) -> HostPlan:
    """The main memory and disk space of a simulated training step."""
    model, gpus = run.setup.model, run.gpus
    # a quantised weight is on the GPU as soon as it is read
    size = sum(p.numel() for p in run.parameters) * run.item if not run.stored else 0
    trained = sum(p.numel() for p in run.trained)
    # a tied output layer is saved in addition to the embedding, because other programs expect it
    alone = run.setup.prefix_only or hasattr(model, "peft_config")
    saved = trained if alone else count_numbers(model, tied_twice=True)
    result = saved * saved_sizes(model) * run.item
    phases = {
        # ZeRO-3 maps the files and keeps partitions, quantisation maps them and goes on on the GPU; otherwise each rank
        # builds the whole model before moving it
        "loading": size + gpus * READ if run.stage == 3 or run.stored else gpus * size + READ,
        "setting up": gpus * (run.cpu + run.cpu_once),
        "training": gpus * run.cpu,
        "saving": gpus * run.cpu + min(result, WRITTEN),
    }
    phase = max(phases, key=phases.get)
    return HostPlan(gpus * PROCESS + phases[phase], phase, result, trained * (run.item + 3 * run.master_item) + MIB)


class Disk(NamedTuple):
    """Bytes that --output_dir will hold: results of epochs, the best one, training states."""

    results: int
    best: int
    states: int

    @property
    def total(self) -> int:
        return sum(self)


def plan_disk(host: HostPlan, args: argparse.Namespace) -> Disk:
    """Disk space for what the flags keep. A new best model or state is complete before an old one is deleted.

    With --max_steps the last result alone is counted: how many epochs there will be depends on the data.
    """
    validates = bool(args.eval_path) or args.eval_ratio is not None
    return Disk(
        math.ceil(args.num_train_epochs or 1) * host.result,
        2 * host.result if validates else 0,
        (args.save_total_limit + 1) * host.state if args.save_state_steps else 0,
    )


# This machine


def free_memory(root: str = "/") -> int:
    """Bytes of main memory available to this process: on the machine, and in the container or job it runs in.

    Args:
        root: of the file system; tests use another one.
    """
    return min([psutil.virtual_memory().available, *_cgroup_rooms(Path(root))])


def _cgroup_rooms(root: Path):
    """Free bytes of each control group of this process (Linux cgroups, version 1 and 2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            try:
                room = int((group / limit).read_text()) - int((group / used).read_text())
                cache = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max", or no such file
                continue
            yield room + int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))


# Output


def shown_size(size: float) -> str:
    """For example 7.4 MiB, 250 MiB, 11.63 GiB."""
    if size < GIB:
        return f"{size / MIB:.{1 if size < 100 * MIB else 0}f} MiB"
    return f"{size / GIB:.2f} GiB"


def lowered(by: float) -> str:
    """By how many bytes a change lowers the memory, in GiB: -0.42, or in words where two decimals would show -0.00."""
    return f"{-by / GIB:+.2f}" if by >= 0.005 * GIB else "by less than 0.01"


def _length_text(args: argparse.Namespace) -> str:
    """The results that `plan_disk` counts."""
    if args.max_steps:
        return f"the result after {args.max_steps} steps, plus one after each epoch before"
    return f"{args.num_train_epochs} epoch{'s' * (args.num_train_epochs != 1)}"


def host_text(host: HostPlan, args: argparse.Namespace) -> str:
    """Lines about main memory and disk, with a warning if this machine has less."""
    disk = plan_disk(host, args)
    kept = [f"{shown_size(disk.results)} for {_length_text(args)}"]
    if disk.best:
        kept.append(f"{shown_size(disk.best)} for the best model, old and new")
    if disk.states:
        kept.append(f"{shown_size(disk.states)} for {args.save_total_limit + 1} training states")
    if args.save_model_step:
        kept.append("plus the saves of --save_model_step")
    lines = [
        f"main memory of a node with all ranks: about {host.memory / GIB:.0f} GiB, at its peak while {host.phase}",
        f"disk: {shown_size(host.result)} per saved folder; {', '.join(kept)}"
        + (f"; {shown_size(disk.total)} in all" if disk.total > disk.results else ""),
    ]
    if not args.save_state_steps:
        lines.append(f"an interrupted run saves a training state: {shown_size(host.state)} more")
    return "\n".join([*lines, *_warnings(host, disk, args.output_dir)])


def _warnings(host: HostPlan, disk: Disk, folder: str) -> list[str]:
    memory, room = free_memory(), free_space(folder)
    less = []
    if memory < host.memory:
        less.append(f"{memory / GIB:.0f} GiB of main memory")
    if room < disk.total:
        less.append(f"{shown_size(room)} on the disk of {os.path.abspath(folder)}")
    return [f"warning: this machine has less free: {' and '.join(less)}"] if less else []
