"""Training states: all that a run needs to resume as if it had never stopped.

    output_dir/states/latest             name of the newest complete state
    output_dir/states/step-00000120/
        deepspeed/                       DeepSpeed's own files: trained weights, masters, moments, lr, loss scale
        rank-0.safetensors ...           of each rank: random generators, sums of the log
        run.json                         settings of the run: see `Run`
        manifest.json                    size and SHA-256 of all of these

The position in the data is the number of finished optimizer steps: the plan of an epoch follows from data, seed and
batch alone (epochs.plan_epoch), so nothing is read to get there. Frozen weights come from the base model.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from tuning.errors import FolderError, UserError
from tuning.folders import (
    MANIFEST,
    PARTIAL,
    check_folder,
    check_space,
    finish_folder,
    list_files,
    remove_folder,
    seal_files,
    start_folder,
    write_errors,
    write_file,
)
from tuning.run.nodes import file_sizes, first_here, gather_files, is_everywhere, spread_files
from utils import on_rank_0, once_per_node, print_rank_0, tell_all, wait_for_all

FORMAT = 1  # of run.json and the rank files
LATEST = "latest"
ENGINE = "deepspeed"  # folder of DeepSpeed's own files in a state


class Run(NamedTuple):
    """All settings of a run on which its losses depend.

    settings: by the name that the user knows: flags, sections of the ds file, hashes of data and base.
    ranks: number of processes.
    stage: ZeRO stage.
    """

    settings: dict
    ranks: int
    stage: int


# Random generators


def pack_generators() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state of every random generator of this process, as tensors and as strings."""
    _, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if get_accelerator().device_name() != "cpu":
        tensors["device"] = get_accelerator().get_rng_state().cpu()
    return tensors, {"python": json.dumps(random.getstate()), "numpy": json.dumps(rest)}


def unpack_generators(tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
    """Restore what `pack_generators` returned."""
    version, state, gauss = json.loads(texts["python"])
    random.setstate((version, tuple(state), gauss))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *json.loads(texts["numpy"])))
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors:
        get_accelerator().set_rng_state(tensors["device"])


# Finding


def step_of(folder: str) -> int:
    """Number of optimizer steps in the name of a state; -1 if the name is not that of a state."""
    match = re.fullmatch(r"step-(\d+)", os.path.basename(folder.rstrip("/")))
    return int(match[1]) if match else -1


def list_states(output_dir: str) -> list[str]:
    """Folders of all states of an output folder, the newest first; complete or not."""
    parent = os.path.join(output_dir, "states")
    names = os.listdir(parent) if os.path.isdir(parent) else []
    found = [os.path.join(parent, name) for name in names if step_of(name) >= 0]
    return sorted(found, key=step_of, reverse=True)


def find_state(requested: str, output_dir: str) -> tuple[str | None, list[str]]:
    """The state to resume from.

    Args:
        requested: folder of a state, an output folder with states, or "auto" for the output folder of this run.

    Returns:
        The newest complete state, or None for "auto" without any state; and a line for each newer state that cannot be
        used, with the reason.

    Raises:
        FolderError: the named state is not complete, or no state is.
        UserError: there is no state in the named folder.
    """
    if requested != "auto" and step_of(requested) >= 0:
        check_folder(requested, nothing_else=True)
        return requested, []
    folder = output_dir if requested == "auto" else requested
    broken = []
    for state in list_states(folder):
        try:
            check_folder(state, nothing_else=True)
            return state, broken
        except FolderError as error:
            broken.append(str(error))
    if broken:
        raise FolderError("\n       ".join(["no state can be used:", *broken]))
    if requested != "auto":
        raise UserError(f"--resume_from_checkpoint {requested}: no training state is there, nor in states/ below it")
    return None, []


def read_run(state: str) -> Run:
    """The run that saved a state.

    Raises:
        FolderError: another version of this project wrote it.
    """
    with open(os.path.join(state, "run.json"), encoding="utf-8") as file:
        content = json.load(file)
    if content["format"] != FORMAT:
        raise FolderError(f"{state} has the format {content['format']} of another version of this project")
    return Run(content["settings"], content["ranks"], content["stage"])


LAYOUT = "layout of ZeRO in --ds_file"  # a setting of a run; see ds_config.zero_layout


def check_layout(state: str, old: Run, run: Run) -> None:
    """Refuse a state that DeepSpeed would silently load into the wrong places, or could not convert.

    Raises:
        UserError: the layout differs; or the number of processes does, and layout or optimizer do not allow it.
    """
    layout, kind = run.settings.get(LAYOUT, {}), (run.settings.get("optimizer of --ds_file") or {}).get("type")
    before = old.settings.get(LAYOUT, layout)
    # DeepSpeed's conversion for another number of processes also converts moments for another optimizer class
    free = {"optimizer"} if old.ranks != run.ranks else set()
    if other := [f"{name} {before[name]}" for name in before if before[name] != layout.get(name) and name not in free]:
        raise UserError(f"{state} was saved with {', '.join(other)} in the ds file; use a ds file with the same values")
    needs = "round_robin_gradients" if layout.get("round_robin_gradients") else kind
    if old.ranks != run.ranks and needs not in (None, "Adam", "AdamW", "Lion"):
        raise UserError(f"{state} was saved by {old.ranks} processes; {needs} needs the same number again")


STAGES = "--pipeline_stages"  # a setting of a run in a pipeline


def check_stages(state: str, old: Run, run: Run) -> None:
    """Refuse a state of another pipeline: each stage saves its own layers and optimizer.

    Raises:
        UserError: the number of stages differs, or in a pipeline that of processes.
    """
    before, now = old.settings.get(STAGES), run.settings.get(STAGES)
    if before != now:
        again = f"start with {STAGES} {before} again" if before else f"start without {STAGES}"
        raise UserError(
            f"{state} was saved {f'by a pipeline of {before} stages' if before else 'without a pipeline'}: {again}, or "
            "begin a new run with the newest result as --model_name_or_path (LoRA: --adapter_path)"
        )
    if now and old.ranks != run.ranks:
        raise UserError(f"{state} was saved by {old.ranks} processes; a pipeline needs the same number again")


def check_run(state: str, run: Run, allow_changes: bool) -> list[str]:
    """Compare the run of a state with the one that resumes from it.

    Returns:
        A line for each change; empty unless changes are allowed.

    Raises:
        UserError: something changed that never may, or that may only if changes are allowed.
    """
    old = read_run(state)
    if old.stage != run.stage:
        raise UserError(f"{state} was saved under ZeRO stage {old.stage}; use a ds file of that stage")
    check_stages(state, old, run)
    check_layout(state, old, run)
    changed = []
    for name in [name for name in old.settings | run.settings if name != LAYOUT]:
        before, now = old.settings.get(name), run.settings.get(name)
        changed += _differences(name, before, now)
    if changed and not allow_changes:
        raise UserError(
            "\n       ".join(
                [f"{state} belongs to a run with other settings:", *changed]
                + ["start with the same settings, or resume anyway with --resume_changed True"]
            )
        )
    return changed


def _differences(name: str, before, now) -> list[str]:
    """A line for each difference of two settings; of dicts, for each part that differs."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in _differences(f"{name}, {key}", before.get(key), now.get(key))]
    return [f"{name}: {before} before, {now} now"] if before != now else []


# Saving and loading


class Checkpoints:
    """Saves the states of one run, and loads one. Each method is called on every rank.

    Args:
        engine: DeepSpeed's.
        model: with all parameters, though in a pipeline not with all values.
        parts: by name, other objects with a state: `state()` returns tensors, `set_state(tensors)` restores them.
        output_dir: as seen on rank 0.
        shared: whether all nodes see it; else the files of a state are gathered on rank 0's node.
        every: optimizer steps between two states; None: only at a signal.
        keep: number of states to keep.
    """

    def __init__(
        self, engine, model, parts: dict, run: Run, output_dir: str, every: int | None, keep: int, shared: bool = True
    ):
        self.shared = shared
        self.engine, self.model, self.parts, self.run, self.every, self.keep = engine, model, parts, run, every, keep
        self.parent = os.path.join(output_dir, "states")
        self.rank = torch.distributed.get_rank()

    def due(self) -> bool:
        """Whether a state is to be saved after this step."""
        return bool(self.every) and self.engine.global_steps % self.every == 0

    def size(self) -> int:
        """Approximate bytes of a state: trained weights, and masters and two moments."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        master = 2 if self.engine.bf16_optimizer_states() else 4
        return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 3 * master) for p in parameters) + 2**20

    def save(self) -> str:
        """Save a state; older ones are removed when it is complete. Returns its folder.

        Raises:
            FolderError: it cannot be written; earlier states are unchanged.
        """
        step = self.engine.global_steps
        folder = os.path.join(self.parent, f"step-{step:08d}")
        mine = folder if self.shared or first_here() == 0 else self._name_here(folder)
        with write_errors(mine):
            on_rank_0(lambda: check_space(self.parent, self.size(), "a training state"))
            partial = on_rank_0(lambda: start_folder(folder))
            own = once_per_node(lambda: partial if mine == folder else start_folder(mine))
            self.engine.save_checkpoint(own, tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
            tensors, texts = pack_generators()
            for part, owner in self.parts.items():
                tensors |= {f"{part}.{name}": tensor for name, tensor in owner.state().items()}
            save_file(tensors, os.path.join(own, f"rank-{self.rank}.safetensors"), metadata=texts)
            (on_rank_0 if self.shared else once_per_node)(lambda: _remove_programs(own))
            on_rank_0(lambda: write_file(os.path.join(partial, "run.json"), self._run_text()))
            if not self.shared:
                gather_files(own, partial)
            files = self._seal(partial)
            on_rank_0(lambda: self._publish(partial, folder, files))
            if not self.shared:
                once_per_node(lambda: None if mine == folder else shutil.rmtree(own))
        print_rank_0(f"state saved: {folder}")
        return folder

    def _run_text(self) -> str:
        return json.dumps({"format": FORMAT, **self.run._asdict()}, indent=1)

    def _seal(self, partial: str) -> dict[str, dict]:
        """Manifest of all files. Ranks share the work: hashing reads the tens of gigabytes of a large state again."""
        names = on_rank_0(lambda: list_files(partial))
        hands = self.run.ranks if self.shared else tell_all(first_here()).count(0)  # those that see the files
        mine = seal_files(partial, names[self.rank :: hands]) if self.rank < hands else {}
        return {name: one for part in tell_all(mine) for name, one in part.items()}

    def _publish(self, partial: str, folder: str, files: dict) -> None:
        finish_folder(partial, folder, files)
        write_file(os.path.join(self.parent, LATEST), os.path.basename(folder) + "\n")
        here = step_of(folder)
        others = list_states(os.path.dirname(self.parent))
        past = [state for state in others if step_of(state) <= here]
        # later ones are damaged, or became invalid when the run resumed from an earlier state
        for old in [*past[self.keep :], *(state for state in others if step_of(state) > here)]:
            if os.path.islink(old):
                print_rank_0(f"{old} is a link: only the link is removed, not its target")
            remove_folder(old)

    def load(self, state: str) -> None:
        """Load a state whose files were checked: weights, optimizer, schedule, generators, position, log.

        If another number of processes saved it (see `ds_section`), later losses are the same except for rounding and
        for dropout, since each process draws its own random numbers.
        """
        decay = [group["weight_decay"] for group in self.engine.optimizer.param_groups]
        ranks, everywhere = on_rank_0(lambda: read_run(state)).ranks, self._is_everywhere(state)
        there = state if everywhere else spread_files(state, self._name_here(state))
        if ranks == self.run.ranks:
            self._load_engine(there)
        else:
            converted = state.rstrip("/") + f".for-{self.run.ranks}-ranks{PARTIAL}"
            on_rank_0(lambda: _make_universal(state, converted))
            whole = converted if everywhere else spread_files(converted, self._name_here(converted))
            self._load_engine(whole)
            separate_steps(self.engine.optimizer.optimizer)
            wait_for_all()  # all have read it
            on_rank_0(lambda: shutil.rmtree(converted))
            once_per_node(lambda: None if whole == converted else shutil.rmtree(whole))
        # weight decay follows the flags, which may have changed (--resume_changed)
        for group, value in zip(self.engine.optimizer.param_groups, decay, strict=True):
            group["weight_decay"] = value
        self.engine.lr_scheduler.step(self.engine.lr_scheduler.last_batch_iteration)
        with safe_open(os.path.join(there, f"rank-{self.rank % ranks}.safetensors"), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            texts = file.metadata()
        for part, owner in self.parts.items():
            mine = [name for name in tensors if name.startswith(f"{part}.")]
            owner.set_state({name.removeprefix(f"{part}."): tensors[name] for name in mine})
        unpack_generators(tensors, texts)
        wait_for_all()  # all have read it
        once_per_node(lambda: None if there == state else shutil.rmtree(there))

    def _is_everywhere(self, state: str) -> bool:
        """Whether all nodes see a state."""
        if not self.shared or not is_everywhere(os.path.join(state, MANIFEST)):
            return False  # a copy of an earlier time may lie on another node
        try:
            mine = file_sizes(state)
        except OSError:  # a file that the manifest names is not here
            mine = None
        everyone = tell_all(mine)
        return mine is not None and all(sizes == everyone[0] for sizes in everyone)

    def _name_here(self, folder: str) -> str:
        """Where this node has its part of a state, or its copy, while that is needed."""
        name = os.path.basename(folder.rstrip("/")).removesuffix(PARTIAL)
        return os.path.join(self.parent, f"{name}.on-the-node-of-rank-{first_here()}")

    def _load_engine(self, folder: str) -> None:
        # DeepSpeed loads pickles with weights_only=False; the manifest has proved that this project wrote them
        path, _ = self.engine.load_checkpoint(folder, tag=ENGINE, load_module_strict=False)
        if path is None:
            raise FolderError(f"{folder} holds no DeepSpeed files")


def _remove_programs(folder: str) -> None:
    """Remove DeepSpeed's scripts that convert its files."""
    for name in os.listdir(folder):
        if name.endswith(".py"):
            os.unlink(os.path.join(folder, name))


def separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter its own step counter, on the device where Adam expects it.

    DeepSpeed's universal format gives all parameters the same tensor on the CPU. It would be increased once per
    parameter in every step, and fused kernels need the counter on the parameter's device.
    """
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            place = parameter.device if fused else "cpu"
            state["step"] = state["step"].detach().to(place, torch.float32, copy=True)


def ds_section(state: str | None, ranks: int) -> dict:
    """Section of the ds config for resuming: DeepSpeed's universal format, if another number of processes saved it."""
    other = state and on_rank_0(lambda: read_run(state)).ranks != ranks
    return {"checkpoint": {"load_universal": True}} if other else {}


def _make_universal(state: str, folder: str) -> None:
    """Convert DeepSpeed's files of a state to the universal format, which any number of processes can load."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", os.path.join(state, ENGINE), "--output_folder", os.path.join(folder, ENGINE)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise FolderError(
            f"{state} was saved by {read_run(state).ranks} processes, and DeepSpeed's conversion for another number "
            f"failed: {last}; start as many as before"
        )
