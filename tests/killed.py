"""Kill trainings at random moments, let them go on, and compare with one that was never killed: every loss and every
byte of the result must be the same.

    python tests/killed.py --kills 20                # every family, method, ZeRO stage, 1 and 2 ranks, packed or not
    python tests/killed.py --kills 50 --in-save      # always while a state is being written, which is slowed down

Runs are forked from one process that has imported everything, else start-up would take most of the time.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from conftest import TEXT

import folders
import states
import stops
import train
import utils
from glm_models import MODE
from glm_models.tiny import make_tiny_checkpoint

METHOD_FLAGS = {
    "freeze": "--freeze_module_name layers.1.",
    "ptuning": "--pre_seq_len 4",
    "lora": "--lora_dim 4 --lora_module_name query_key_value,dense_h_to_4h",
    "all": "",
}
STAGES = {2: "ds_zero2_no_offload.json", 3: "ds_zero3_no_offload.json"}
LIMIT = 120  # seconds that a run may take


def make_base(mode: str, folder: Path) -> Path:
    """A tiny checkpoint: what is tested here is not its size."""
    make_tiny_checkpoint(mode, str(folder), TEXT, layers=2, hidden_size=32, heads=2, vocab_size=1000)
    return folder


def make_rows(path: Path, count: int = 48) -> Path:
    rows = [{"instruction": "写一句话：", "input": TEXT[i], "output": TEXT[i + 1]} for i in range(count)]
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


# Runs


class Launched:
    """A training in forked processes, one a rank; its losses go to `losses`, a line a step."""

    def __init__(self, argv: list[str], ranks: int, losses: Path, log: Path, prepare=lambda: None):
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(rank, ranks, port, argv, losses, prepare) for rank in range(ranks)]
        self.codes: dict[int, int] = {}  # rank -> exit code, negative for a signal

    def _fork(self, rank, ranks, port, argv, losses, prepare) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            record_losses(losses, rank)
            prepare()
            train.main(argv)
            os._exit(0)
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


def record_losses(path: Path, rank: int) -> None:
    """Write each step's loss to a file, to the last bit."""
    end = stops.Watch.end

    def recorded(self, loss):
        step = end(self, loss)
        if step is not None and rank == 0:
            with open(path, "a") as file:
                file.write(json.dumps([self.steps, step.loss.hex()]) + "\n")
        return step

    stops.Watch.end = recorded


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


def slow_saving() -> None:
    """Make the writing of a state take long, so that kills fall into it."""
    described = folders._describe
    publish = states.States._publish

    def slowly(path, flush=False):
        time.sleep(0.05)
        return described(path, flush)

    def slow_publish(self, *args):
        time.sleep(0.1)
        publish(self, *args)
        time.sleep(0.1)

    folders._describe, states.States._publish = slowly, slow_publish


def compare(folder: Path, argv, ranks: int, kills: int, seed: str, in_save: bool = False) -> dict[str, int]:
    """Kill and resume until there were so many kills, and the last run has come to its end.

    Returns:
        kills, resumes, rounds from the start to the end; differences of losses or results are an AssertionError.
    """
    chance = random.Random(seed)
    log = folder / "log"
    whole = folder / "whole"
    assert Launched(argv(whole), ranks, folder / "whole-losses", log).wait() == dict.fromkeys(range(ranks), 0), log
    expected = read_losses(folder / "whole-losses")
    expected_bytes = result_bytes(whole)
    assert len(expected) == expected[-1][0] and len(expected_bytes) > 3
    counts = {"kills": 0, "resumes": 0, "rounds": 0, "steps_again": 0}
    while counts["kills"] < kills:
        output, losses = folder / "killed", folder / "killed-losses"
        shutil.rmtree(output, ignore_errors=True)
        losses.unlink(missing_ok=True)
        codes, first = None, True
        while codes is None:
            counts["resumes"] += not first
            first = False
            before = len(read_losses(losses))
            run = Launched(argv(output), ranks, losses, log, slow_saving if in_save else lambda: None)
            if counts["kills"] < kills:
                wait_for_moment(run, chance, output, losses, before, in_save)
            else:
                run.wait()
            if run.running():
                run.kill()
                run.wait(30)
                counts["kills"] += 1
                continue
            codes = run.wait()
        assert codes == dict.fromkeys(range(ranks), 0), log.read_text()[-3000:]
        counts["rounds"] += 1
        seen = read_losses(losses)
        counts["steps_again"] += len(seen) - len(expected)
        wanted = dict(expected)
        assert {step for step, _ in seen} == set(wanted)
        assert all(wanted[step] == loss for step, loss in seen), "a loss differs"
        assert result_bytes(output) == expected_bytes, "a result differs"
    return counts


def wait_for_moment(
    run: Launched, chance: random.Random, output: Path, losses: Path, before: int, in_save: bool
) -> None:
    """Wait until it is time to kill: while a state is written, or anywhere: one time in four before the first step."""
    end = time.monotonic() + LIMIT
    if in_save:
        while run.running() and not list(output.glob(f"states/*{folders.PARTIAL}")) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.6))
        return
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 3))
        return
    while run.running() and len(read_losses(losses)) == before and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.25))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each setting")
    parser.add_argument("--in-save", action="store_true", help="kill while a state is written; one setting only")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    args = parser.parse_args()
    utils.quiet(verbose=False)
    settings = list(itertools.product(MODE, train.TRAIN_TYPE, STAGES, (1, 2), (False, True)))
    if args.in_save:
        settings = [("glm3", "all", 2, 2, False)]
    with tempfile.TemporaryDirectory() as work:
        bases = {mode: make_base(mode, Path(work, mode)) for mode in MODE}
        rows = make_rows(Path(work, "rows.json"))
        total: dict[str, int] = {}
        for mode, method, stage, ranks, packing in settings:
            name = f"{mode} {method} ZeRO-{stage} {ranks} rank{'s' * (ranks > 1)}{' packed' * packing}"
            if args.only not in name:
                continue
            folder = Path(work, name.replace(" ", "-"))
            folder.mkdir()

            def argv(output, mode=mode, method=method, stage=stage, packing=packing):
                return command(mode, method, stage, packing, bases[mode], rows, output)

            start = time.monotonic()
            counts = compare(folder, argv, ranks, args.kills, name, args.in_save)
            for key, value in counts.items():
                total[key] = total.get(key, 0) + value
            print(f"{name}: {counts}, 0 differences, {time.monotonic() - start:.0f} s", flush=True)
            shutil.rmtree(folder)
        print(f"all: {total}, 0 differences")


if __name__ == "__main__":
    main()
