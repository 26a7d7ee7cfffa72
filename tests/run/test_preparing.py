"""Trainings whose rows are prepared by several processes, forked from a rank that already talks to the others."""

import os
import signal
import time
from pathlib import Path

import pytest
from endings import assert_they_end
from runs import STAGES, Launched, allow_bf16, command, make_base, make_rows, read_losses, write_bf16_file

from tuning.samples import dataset, row_files, workers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("glm3", tmp_path_factory.mktemp("preparing") / "base")


def several_processes() -> None:
    """As for a large file and three CPUs."""
    allow_bf16()
    dataset.LARGE, row_files.PIECE_ROWS = 0, 5
    workers.available_cpus = lambda: 3


def one_process() -> None:
    allow_bf16()
    dataset.LARGE = 1 << 40


def argv(stage: int, base: Path, folder: Path) -> list[str]:
    """A training in bf16, of whose rows nothing is kept."""
    file = write_bf16_file(stage, folder / "ds.json")
    words = command("glm3", "lora", stage, False, base, make_rows(folder / "rows.json"), folder / "output")
    return [*words, "--data_cache", "none", "--ds_file", str(file), "--num_train_epochs", "0.5"]


@pytest.mark.parametrize("stage", STAGES)
def test_it_trains_as_with_one_process(stage, base, tmp_path):
    losses = []
    for prepare in (one_process, several_processes):
        folder = tmp_path / prepare.__name__
        folder.mkdir()
        run = Launched(argv(stage, base, folder), 2, folder / "losses", folder / "log", prepare)
        assert run.wait() == {0: 0, 1: 0}, run.log.read_text()
        losses.append(read_losses(folder / "losses"))
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_rank_that_is_killed_meanwhile_takes_its_processes_with_it(base, tmp_path):
    """They have copies of its connections: as long as one lives, the other ranks would wait for it."""
    log = tmp_path / "workers"

    def prepare():
        several_processes()

        def stays(*_):
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(600)

        dataset.encode_piece = stays

    run = Launched(argv(2, base, tmp_path), 2, tmp_path / "losses", tmp_path / "log", prepare)
    while run.running() and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.05)
    pids = list(map(int, log.read_text().split()))
    run.kill(signal.SIGKILL, [0])
    codes = run.wait(60)
    assert codes[1] not in (0, 75)
    text = run.log.read_text()
    assert "Traceback" not in text and "error:" in text
    assert_they_end(pids)
