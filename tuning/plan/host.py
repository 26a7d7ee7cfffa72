"""Main memory and disk that a training takes, and how much of both this machine has."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from tuning.folders import free_space
from tuning.plan.zero import Zero12Simulator

MIB, GIB = 2**20, 2**30
PROCESS = 3 * GIB  # main memory of one process with torch and CUDA loaded, before any weights
READ = 2 * GIB  # a weight file of the official checkpoints, about
WRITTEN = 4 * GIB  # a weight file of a result, at most; rank 0 holds it while it is written


class Host(NamedTuple):
    """What a training takes beside the GPUs, in bytes.

    memory: main memory of a node that runs all ranks.
    phase: when it is the most.
    result: weights of one result.
    state: one training state.
    """

    memory: int
    phase: str
    result: int
    state: int


def host_needs(run: Zero12Simulator) -> Host:
    """Of a training that has been played."""
    model, gpus = run.setup.model, run.gpus
    size = sum(p.numel() for p in run.parameters) * run.item
    trained = sum(p.numel() for p in run.trained)
    # a tied output layer is saved beside the embedding, for other programs want it
    saved = trained if hasattr(model, "peft_config") else sum(p.numel() for _, p in every_name(model))
    result = saved * run.item
    phases = {
        # ZeRO-3 maps the files and keeps parts; else each rank makes the whole model before it goes to the GPU
        "loading": size + gpus * READ if run.stage == 3 else gpus * size + READ,
        "setting up": gpus * (run.cpu + run.cpu_once),
        "training": gpus * run.cpu,
        "saving": gpus * run.cpu + min(result, WRITTEN),
    }
    phase = max(phases, key=phases.get)
    return Host(gpus * PROCESS + phases[phase], phase, result, trained * (run.item + 12) + MIB)


def every_name(model):
    """Names and parameters as they are saved: tied ones under each of their names."""
    return model.named_parameters(remove_duplicate=False)


class Disk(NamedTuple):
    """Bytes that --output_dir comes to hold: results of epochs, the best one, training states."""

    results: int
    best: int
    states: int

    @property
    def total(self) -> int:
        return sum(self)


def disk_needs(host: Host, args: argparse.Namespace) -> Disk:
    """What the flags keep at the same time. A new best model, or state, is whole before an old one goes."""
    validates = bool(args.eval_path) or args.eval_ratio is not None
    return Disk(
        args.num_train_epochs * host.result,
        2 * host.result if validates else 0,
        (args.save_total_limit + 1) * host.state if args.save_state_steps else 0,
    )


# This machine


def free_memory(root: str = "/") -> int:
    """Bytes of main memory that this process could take: of the machine, and of the container or job it runs in.

    Args:
        root: of the file system, for tests.
    """
    return min([psutil.virtual_memory().available, *_cgroup_rooms(Path(root))])


def _cgroup_rooms(root: Path):
    """What each control group around this process has left (Linux; version 1 and 2)."""
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


# What the user sees


def shown_size(size: float) -> str:
    """As 7.4 MiB, 250 MiB, 11.63 GiB."""
    if size < GIB:
        return f"{size / MIB:.{1 if size < 100 * MIB else 0}f} MiB"
    return f"{size / GIB:.2f} GiB"


def host_text(host: Host, args: argparse.Namespace) -> str:
    """Lines about main memory and disk, with a warning where this machine has less."""
    disk = disk_needs(host, args)
    kept = [f"{shown_size(disk.results)} for {args.num_train_epochs} epoch{'s' * (args.num_train_epochs > 1)}"]
    if disk.best:
        kept.append(f"{shown_size(disk.best)} for the best model, old and new")
    if disk.states:
        kept.append(f"{shown_size(disk.states)} for {args.save_total_limit + 1} training states")
    if args.save_model_step:
        kept.append("and what --save_model_step saves")
    lines = [
        f"main memory of a node with all ranks: about {host.memory / GIB:.0f} GiB, most of it while {host.phase}",
        f"disk: {shown_size(host.result)} a saved folder; {', '.join(kept)}"
        + (f"; {shown_size(disk.total)} in all" if disk.total > disk.results else ""),
    ]
    if not args.save_state_steps:
        lines.append(f"an interrupted run saves a training state: {shown_size(host.state)} more")
    return "\n".join([*lines, *_warnings(host, disk, args.output_dir)])


def _warnings(host: Host, disk: Disk, folder: str) -> list[str]:
    memory, room = free_memory(), free_space(folder)
    less = []
    if memory < host.memory:
        less.append(f"{memory / GIB:.0f} GiB of main memory")
    if room < disk.total:
        less.append(f"{shown_size(room)} on the disk of {os.path.abspath(folder)}")
    return [f"warning: this machine has less free: {' and '.join(less)}"] if less else []
