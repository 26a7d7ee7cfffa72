"""Trainings in forked processes, for tests that break them.

Forked from one process that has imported everything, since start-up would else take most of the time.
"""

import functools
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cpuinfo
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - DeepSpeed gets it late, which takes seconds
import torch
import torch.utils.tensorboard
from conftest import TEXT, make_lively_checkpoint
from deepspeed.accelerator import get_accelerator

import train
from glm_models import MODE
from glm_models.tiny import make_tiny_checkpoint
from tuning import folders
from tuning.run.health import StepHooks

METHOD_FLAGS = {
    "freeze": "--freeze_module_name layers.1.",
    "ptuning": "--pre_seq_len 4",
    "lora": "--lora_dim 4 --lora_module_name query_key_value,dense_h_to_4h",
    "all": "",
}
STAGES = {2: "ds_zero2_no_offload.json", 3: "ds_zero3_no_offload.json"}
# Hooks of the run in this process, see StepHooks: `prepare` adds its own.
BEFORE_STEP, AFTER_STEP = [], []
# Most of a tiny run's start would be measuring the device's speed, which stands in the log alone, and asking a dozen
# programs about the processor, as DeepSpeed does.
train.matmul_peak = lambda dtype: 1e12
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
LIMIT = 300  # seconds after which a run counts as one that hangs; most take a few, a busy machine far longer


def make_base(mode: str, folder: Path, layers: int = 2, hidden_size: int = 32, heads: int = 2) -> Path:
    """A tiny checkpoint."""
    make_tiny_checkpoint(mode, str(folder), TEXT, layers=layers, hidden_size=hidden_size, heads=heads, vocab_size=1000)
    return folder


def make_lively_bases(folder: Path) -> dict[str, Path]:
    """A base of each family as `make_base` makes it, but with lively weights, else a prefix would hardly be felt."""
    for mode in MODE:
        make_lively_checkpoint(mode, str(folder / mode), layers=2, hidden_size=32, heads=2, vocab_size=1000)
    return {mode: folder / mode for mode in MODE}


def make_rows(path: Path, count: int = 48) -> Path:
    rows = [{"instruction": "写一句话：", "input": TEXT[i], "output": TEXT[i + 1]} for i in range(count)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def make_conversations(path: Path, mode: str, count: int = 24) -> Path:
    """Conversations of up to three turns, not all of them learnt, with tool calls for ChatGLM3; plain text between."""
    rows = []
    for i in range(count):
        messages = []
        for turn in range(1 + i % 3):
            question, answer = TEXT[3 * i + turn][:24], TEXT[3 * i + turn + 1]
            messages.append({"role": "user", "content": question})
            if mode == "glm3" and (i + turn) % 2:
                call = {"role": "tool", "name": "find", "parameters": {"text": question[:4], "at": [i, None]}}
                messages.append(call | {"observation": {"found": turn}, "loss": bool(i % 4)})
            messages.append({"role": "assistant", "content": answer, "loss": turn != 1 or i % 5 > 1})
        tools = {"system": "可用工具：", "tools": [{"name": "find"}]} if mode == "glm3" and i % 2 else {}
        rows += [{"conversations": messages, **tools}] + [{"text": TEXT[i] + TEXT[-i]}] * (i % 4 == 0)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def command(mode: str, method: str, stage: int, packing: bool, base: Path, rows: Path, output: Path) -> list[str]:
    fixed = f"""
        --mode {mode} --train_type {method} {METHOD_FLAGS[method]} --ds_file {STAGES[stage]} --model_name_or_path {base}
        --train_path {rows} --output_dir {output} --data_cache {rows.parent}/cache --max_len 160 --max_src_len 96
        --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 5e-3
        --save_state_steps 2 --show_loss_step 3 --resume_from_checkpoint auto
    """
    return [*fixed.split(), *(["--packing"] if packing else [])]


def write_bf16_file(stage: int, path: Path) -> Path:
    """The project's ds file of a ZeRO stage, in bf16."""
    content = json.loads((ROOT / STAGES[stage]).read_text())
    content["bf16"]["enabled"] = True
    path.write_text(json.dumps(content))
    return path


def allow_bf16() -> None:
    """A CPU can compute in it, if slowly. A `prepare` of a run, or called by one."""
    get_accelerator().is_bf16_supported = lambda: True


# Runs


class Forked:
    """Processes forked from this one, each a rank of a group, that do `action`; their output goes to `log`."""

    def __init__(self, ranks: int, log: Path, action: Callable[[int], None]):
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.pids = [self._fork(rank, group, action) for rank in range(ranks)]
        self.codes: dict[int, int] = {}  # rank -> exit code, negative for a signal

    def _fork(self, rank: int, group: dict[str, str], action: Callable[[int], None]) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        try:
            gc.freeze()  # what was imported stays: DeepSpeed looks for garbage at its start, for a second
            os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's own would keep what is printed
            torch.set_num_threads(1)
            action(rank)
            os._exit(0)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr, flush=True)
            os._exit(end.code if isinstance(end.code, int) else bool(end.code))  # as Python would end
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(99)

    def running(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def wait(self, limit: float = LIMIT) -> dict[int, int]:
        """Exit codes by rank. AssertionError: it hangs."""
        end = time.monotonic() + limit
        while self.running():
            assert time.monotonic() < end, f"still running after {limit} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.01)
        return self.codes

    def kill(self, number=signal.SIGKILL, ranks=None) -> None:
        for rank in ranks if ranks is not None else range(len(self.pids)):
            if rank not in self.codes:
                os.kill(self.pids[rank], number)


class Launched(Forked):
    """A training in forked processes, one a rank; its losses go to `losses`, a line a step."""

    def __init__(self, argv: list[str], ranks: int, losses: Path, log: Path, prepare=lambda: None):
        def training(rank: int) -> None:
            BEFORE_STEP.clear()
            AFTER_STEP[:] = [record_losses(losses)] if rank == 0 else []
            prepare()
            train.main(argv, step_hooks())

        super().__init__(ranks, log, training)


def step_hooks() -> StepHooks:
    """Hooks that call all of BEFORE_STEP and AFTER_STEP."""
    return StepHooks(*(lambda *args, some=some: [hook(*args) for hook in some] for some in (BEFORE_STEP, AFTER_STEP)))


def record_losses(path: Path):
    """A hook after each step that writes its loss to a file, to the last bit."""

    def record(watch, step):
        with open(path, "a") as file:
            file.write(json.dumps([watch.engine.global_steps, step.loss.hex()]) + "\n")

    return record


def read_losses(path: Path) -> list[tuple[int, str]]:
    """(step, loss) of all runs together, in the order they came; a line cut by a kill is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def result_bytes(output: Path) -> dict[str, str]:
    """SHA-256 of every file of the results, by path."""
    found = {}
    for folder in sorted(output.glob("epoch-*")):
        assert not folder.name.endswith((folders.PARTIAL, folders.REPLACED))
        manifest = json.loads((folder / folders.MANIFEST).read_text())
        folders.check_folder(str(folder))
        found |= {f"{folder.name}/{name}": file["sha256"] for name, file in manifest["files"].items()}
    return found
