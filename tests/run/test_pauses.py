"""Rank 0 alone takes longer than ranks wait for each other on the device: to prepare, save or validate. Nobody dies."""

import datetime
import os
import time

import deepspeed
import pytest
import torch
from runs import STAGES, Launched, command, make_base, make_rows

import glm_models.checkpoint
import train
from tuning.run import resume, validation
from tuning.samples import cache

SHORT = datetime.timedelta(seconds=4)  # how long ranks wait for each other on the device; ten minutes without a test
PAUSE = 6.0  # seconds


def shorten_waits() -> None:
    """All groups of processes but the control group fail after SHORT."""
    connect, new_group = deepspeed.init_distributed, torch.distributed.new_group

    def any_group(ranks=None, timeout=None, *args, **kwargs):
        return new_group(ranks, timeout or SHORT, *args, **kwargs)

    deepspeed.init_distributed = lambda **how: connect(**how, timeout=SHORT)
    torch.distributed.new_group = any_group


def pause_once(owner, name: str, marks) -> None:
    """Let rank 0 pause in the first call of a function."""
    real, mark = getattr(owner, name), marks / f"{owner.__name__}.{name}"

    def slow(*args, **kwargs):
        if os.environ["RANK"] == "0" and not mark.exists():
            mark.touch()
            time.sleep(PAUSE)
        return real(*args, **kwargs)

    setattr(owner, name, slow)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pauses")
    return make_base("glm3", folder / "base"), make_rows(folder / "rows.json", 24)


# What rank 0 does alone, or longer than others, in preparing, saving and validating.
PLACES = (
    (cache, "write_cache"), (train, "build_model"),
    (glm_models.checkpoint, "save_file"), (torch, "save"), (resume, "save_file"),
    (validation.Validation, "_score"), (validation.Validation, "_tell"),
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_pauses_of_rank_0_kill_nothing(stage, inputs, tmp_path):
    base, rows = inputs
    argv = command("glm3", "all", stage, False, base, rows, tmp_path / "output")
    argv[argv.index("--num_train_epochs") + 1] = "1"
    argv[argv.index("--data_cache") + 1] = str(tmp_path / "cache")
    argv[argv.index("--save_state_steps") + 1] = "1"
    argv += ["--eval_ratio", "0.2", "--eval_generate", "auto", "--eval_steps", "1", "--eval_max_new_tokens", "4"]

    def prepare():
        shorten_waits()
        glm_models.checkpoint.write_weights.__defaults__ = (30_000,)  # bytes of a file: a model is many files
        for owner, name in PLACES:
            pause_once(owner, name, tmp_path)

    run = Launched(argv, 2, tmp_path / "losses", tmp_path / "log", prepare)
    codes, made = run.wait(), {path.name for path in tmp_path.glob("*.*")}
    assert codes == {0: 0, 1: 0}, (made, (tmp_path / "log").read_text()[-3000:])
    assert {f"{owner.__name__}.{name}" for owner, name in PLACES} <= made
