"""output_dir/run.json: what each start of a training was, so that its results can be explained and reproduced.

    {"format": 1, "starts": [{command, flags, run, ds_config, versions, git, devices, ..., ended, exit, best}, ...]}

A run that resumes from a state adds a start. A start without `ended` was killed, or is still running.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from glm_models.checkpoint import CheckpointError, read_json
from tuning import ROOT
from tuning.arguments.quantization import PACKAGE, missing_package
from tuning.arguments.train import fixed_flags
from tuning.errors import FolderError, UserError
from tuning.folders import lock_folder, sweep, write_errors, write_file
from tuning.run import results
from tuning.run.launch import is_shared
from tuning.run.nodes import first_here, several_nodes
from tuning.run.results import shorten
from tuning.run.resume import LAYOUT, STAGES, Run, check_run, find_state, step_of
from utils import data_parallel_size, is_rank_0, on_rank_0, once_per_node, print_rank_0, tell_all

FILE = "run.json"
FORMAT = 1
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "safetensors", "sentencepiece", "numpy")


# Describing a start


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the libraries on which results depend."""
    names = (*PACKAGES, *([] if missing_package() else [PACKAGE]))
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def describe_git() -> dict | None:
    """Commit of this project's code, and whether tracked files differ from it; None if that is not known."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*command: str) -> str:
        run = subprocess.run(
            ["git", "-C", ROOT, *command], env=environment, capture_output=True, text=True, timeout=20, check=True
        )
        return run.stdout.strip()

    try:
        if os.path.realpath(ask("rev-parse", "--show-toplevel")) != os.path.realpath(ROOT):
            return None  # a copy inside another project
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_devices() -> list[str]:
    """Host and device of each rank. Called on every rank."""
    name = get_accelerator().device_name()
    module = getattr(torch, name, None)
    model = module.get_device_name() if hasattr(module, "get_device_name") else platform.machine()
    return tell_all(f"{socket.gethostname()}: {get_accelerator().current_device_name()} ({model})")


def describe_start(args, run: Run, ds_config: dict, state: str | None) -> dict:
    """The entry of a start in FILE. Called on every rank.

    Args:
        args: of train.py.
        run: see resume.Run; includes hashes of data and base.
        ds_config: as DeepSpeed gets it, without "auto".
        state: folder of the training state from which the run resumes.
    """
    return {
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "flags": vars(args),
        "run": run._asdict(),
        "ds_config": ds_config,
        "versions": describe_versions(),
        "git": describe_git() if is_rank_0() else None,
        "devices": describe_devices(),
        "state": state,
        "started": now(),
        "ended": None,
        "exit": None,
        "best": None,
    }


def now() -> str:
    """The time as 2024-05-31T08:15:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# The file


def read_starts(output_dir: str) -> list[dict]:
    """The starts of the run in a folder, the first one first; empty without a valid file."""
    path = os.path.join(output_dir, FILE)
    try:
        content = read_json(path) if os.path.isfile(path) else {}
    except CheckpointError:
        return []
    starts = content.get("starts") if content.get("format") == FORMAT else []
    return starts if isinstance(starts, list) and all(isinstance(start, dict) for start in starts) else []


def check_restart(output_dir: str, traces: list[str], run: Run) -> None:
    """Make sure that a run that should resume, but has no state yet, is the run whose results are in its folder.

    Args:
        traces: of `results.find_traces`.

    Raises:
        UserError: it is another run, or that is not known.
    """
    if not traces:
        return
    starts = read_starts(output_dir)
    before = starts[-1].get("run") if starts else None
    if isinstance(before, dict) and before.get("settings") == json.loads(json.dumps(run.settings)):
        return
    what = "of a run with other settings" if before else f"of a run that left no {FILE}"
    raise UserError(
        f"--output_dir {output_dir} holds results {what} ({shorten(traces)}), and no training state to resume from: "
        "name another folder; --overwrite_output_dir, instead of --resume_from_checkpoint, removes them"
    )


class RunRecord:
    """Writes FILE for one start, on rank 0.

    Args:
        start: of `describe_start`.
    """

    def __init__(self, output_dir: str, start: dict):
        self.output_dir, self.start = output_dir, start
        goes_on = start["flags"]["resume_from_checkpoint"] and not start["flags"]["overwrite_output_dir"]
        self.starts = [*(read_starts(output_dir) if goes_on else []), start]

    def write(self) -> None:
        """Write the file.

        Raises:
            FolderError: it cannot be written.
        """
        path = os.path.join(self.output_dir, FILE)
        text = json.dumps({"format": FORMAT, "starts": self.starts}, ensure_ascii=False, indent=1, default=str)
        with write_errors(path):
            write_file(path, text + "\n")

    @contextlib.contextmanager
    def until_the_end(self):
        """Record how the block ends: "done", the error, or what the block has set as `start["exit"]`."""
        try:
            yield
        except BaseException as error:
            self.start["exit"] = f"{type(error).__name__}: {error}".splitlines()[0]
            try:
                self._end()
            except (FolderError, CheckpointError) as second:  # the first error is the one to report
                print_rank_0(f"warning: {second}")
            raise
        self.start["exit"] = self.start["exit"] or "done"
        self._end()

    def _end(self) -> None:
        if is_rank_0():
            path = os.path.join(self.output_dir, "best.json")
            self.start |= {"ended": now(), "best": read_json(path) if os.path.isfile(path) else None}
            self.write()


def describe_run(args, contents: dict, tokenizer, base: dict, ds_config: dict, layout: dict) -> Run:
    """All that losses depend on: flags, and the content of files that flags name.

    Args:
        contents: of the files that flags name, see `data_set.Sources`.
        base: of `adapter.record_base`.
        ds_config: resolved.
        layout: of `ds_config.zero_layout`.
    """
    settings = fixed_flags(args)
    # The total number of micro-batches counts, so the number of processes may change.
    del settings["--gradient_accumulation_steps"]
    settings |= contents
    settings |= {
        "--gradient_accumulation_steps x processes": args.gradient_accumulation_steps * data_parallel_size(),
        "weights of --model_name_or_path": base["fingerprint"],
        "config.json of --model_name_or_path": base["config"],
        "tokenizer of --model_name_or_path": tokenizer.fingerprint(),
    }
    for section in ("optimizer", "scheduler", "bf16", "fp16", "gradient_clipping"):
        settings[f"{section} of --ds_file"] = ds_config.get(section)
    settings[LAYOUT] = layout
    if args.pipeline_stages:
        settings[STAGES] = args.pipeline_stages
    # The end of a run changes its losses only through the schedule. A constant one may be continued beyond its end.
    if ds_config["scheduler"]["type"] == "WarmupLR":
        del settings["--num_train_epochs"], settings["--max_steps"]
    return Run(settings, torch.distributed.get_world_size(), ds_config["zero_optimization"]["stage"])


def open_output(args) -> str | None:
    """Prepare --output_dir, on rank 0. Returns the training state to resume from, or None.

    Raises:
        FolderError, UserError: see `folders.sweep`, `resume.find_state` and `results.check_second_run`.
    """
    for folder in (args.output_dir, os.path.join(args.output_dir, "states")):
        for path in sweep(folder):
            print_rank_0(f"{path}: tidied up after a run that was killed")
    state = None
    if args.resume_from_checkpoint:
        state, broken = find_state(args.resume_from_checkpoint, args.output_dir)
        for problem in broken:
            print_rank_0(f"warning: a newer state cannot be used: {problem}")
        print_rank_0(
            f"going on from {state}" if state else f"no training state in {args.output_dir} yet: from the start"
        )
    removed = results.list_removable(args.output_dir) if args.overwrite_output_dir else []
    removed = tuple(os.path.realpath(path) + os.sep for path in removed)
    for start in filter(None, (args.model_name_or_path, args.adapter_path, args.ptuning_checkpoint)):
        if (os.path.realpath(start) + os.sep).startswith(removed):
            raise UserError(
                f"--overwrite_output_dir would remove {start}, from which this run should start: name another "
                "--output_dir"
            )
    results.check_second_run(args.output_dir, state, args.resume_from_checkpoint == "auto", args.overwrite_output_dir)
    return state


class Output(NamedTuple):
    """--output_dir of this run.

    lock: lasts as long as this object.
    state: the training state to resume from, or None.
    shared: whether all nodes see it; else rank 0's node has all that a run writes.
    """

    lock: list
    state: str | None
    shared: bool


def claim_output(args) -> Output:
    """Lock --output_dir for this run, and prepare it. Called on every rank.

    Raises:
        FolderError, UserError: another run has the folder, or see `open_output`.
    """
    lock = []
    on_rank_0(lambda: lock.append(lock_folder(args.output_dir)))
    shared = is_shared(args.output_dir)
    if several_nodes():
        if shared:
            text = f"{args.output_dir} is on a disk that all nodes share"
        else:
            text = (
                f"{args.output_dir} is not on a shared disk: results, log and training states of all nodes are "
                f"gathered there on node {socket.gethostname()}, and sent from there to the others at a resume"
            )
        print_rank_0(text)
    if not shared:
        once_per_node(lambda: None if first_here() == 0 else sweep(os.path.join(args.output_dir, "states")))
    return Output(lock, on_rank_0(lambda: open_output(args)), shared)


def check_resume(args, state: str | None, run: Run, total_steps: int) -> None:
    """Make sure that this run may resume the earlier one; allowed changes are printed. Called on every rank.

    Args:
        total_steps: optimizer steps after which this run ends.

    Raises:
        UserError: the state is at or after that step; or see `resume.check_run` and `check_restart`.
    """
    if state and step_of(state) >= total_steps:
        raise UserError(
            f"{state} has done {step_of(state)} steps and this run ends after {total_steps}: nothing is left to train; "
            "ask for more steps or epochs"
        )
    for change in on_rank_0(lambda: check_run(state, run, args.resume_changed)) if state else ():
        print_rank_0(f"warning: changed since {state}: {change}")
    if args.resume_from_checkpoint and not state:
        on_rank_0(lambda: check_restart(args.output_dir, results.find_traces(args.output_dir), run))


def begin_output(args, state: str | None, record: RunRecord) -> None:
    """Remove what an earlier run left in --output_dir, on rank 0. Called last, when all checks have passed.

    Raises:
        FolderError: something cannot be removed or written.
    """
    if args.overwrite_output_dir:
        results.remove(results.list_removable(args.output_dir))
    if not state:
        results.remove_events(args.output_dir)
    results.remove_summary(args.output_dir)
    record.write()
