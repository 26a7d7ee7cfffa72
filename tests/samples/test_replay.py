"""Replay: what an epoch takes of the general file, and trainings that are stopped with it."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT
from runs import Launched, command, make_base, make_rows, read_losses, result_bytes
from test_stops import before_step, errors, loss_times

from glm_models import MODE
from tuning.arguments.train import parse_args
from tuning.errors import UserError
from tuning.samples.dataset import DataSettings, InstructionData
from tuning.samples.epochs import BatchShape, Packs, pack_rows, plan_epoch
from tuning.samples.mixture import Mixture, add_replay, weigh

# What an epoch takes


def single_rows(data):
    return Packs(np.arange(len(data)))


def mix(task, general, ratio, pack, longest, seed):
    return mixed(task, general, ratio, pack, longest, seed)[0]


def mixed(task, general, ratio, pack, longest, seed):
    """The mixture, and the line about it."""
    files = Mixture([task])
    weigh(files, [1], np.arange(len(task)), lambda rows: pack(task), longest, seed)
    return add_replay(files, general, pack(general), ratio, longest, seed)


def write_rows(path: Path, count: int, first: int) -> str:
    rows = [{"instruction": "写：", "input": TEXT[first + i], "output": TEXT[first + i][: 3 + i]} for i in range(count)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    return write_rows(folder / "task.json", 40, 1), write_rows(folder / "general.json", 30, 41)


@pytest.fixture(scope="module")
def parts(files, tokenizers):
    return [InstructionData(DataSettings(path, 120, 60), tokenizers["glm3"]) for path in files]


def packing(data):
    return pack_rows(data, 160, 1)


def drawn(mixture: Mixture, epoch: int) -> list[int]:
    """Rows of the general file in an epoch, counted from 0."""
    rows = [row for pack in mixture.epoch_packs(epoch) for row in pack]
    assert sorted(rows)[:40] == list(range(40))  # the whole task, once
    return sorted(row - 40 for row in rows if row >= 40)


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 10), (0.09, 4), (0.4, 27), (0.001, 1)])
def test_an_epoch_has_its_share_of_general_rows_none_twice(parts, ratio, count):
    mixture = mix(*parts, ratio, single_rows, 2, seed=1)
    epochs = [drawn(mixture, epoch) for epoch in range(1, 6)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == count
    assert len(set(map(tuple, epochs))) > 1  # other ones each time
    assert epochs == [drawn(mix(*parts, ratio, single_rows, 2, seed=1), epoch) for epoch in range(1, 6)]
    assert epochs[1:] != [drawn(mix(*parts, ratio, single_rows, 2, seed=2), epoch) for epoch in range(2, 6)]


def test_each_general_row_comes_about_as_often(parts):
    mixture = mix(*parts, 0.2, single_rows, 2, seed=1)
    counts = np.bincount(np.concatenate([drawn(mixture, epoch) for epoch in range(2, 902)]), minlength=30)
    assert counts.sum() == 9000
    assert abs(counts - 300).max() < 5 * (900 * 1 / 3 * 2 / 3) ** 0.5  # five deviations


def test_no_general_row_comes_twice_before_each_came_once(parts):
    rows = drawn(mix(*parts, 0.7, single_rows, 2, seed=1), 1)  # 93 of 30
    counts = np.bincount(rows)
    assert len(rows) == 93 and sorted(counts) == [3] * 27 + [4] * 3


def test_the_longest_rows_of_both_files_are_in_the_first_step(parts):
    for files in (parts, parts[::-1]):
        mixture = mix(*files, 0.2, single_rows, 2, seed=1)
        steps = plan_epoch(mixture, mixture.epoch_packs(1), BatchShape(2, 2), seed=1, epoch=1)
        every = np.sort(np.concatenate([data.lengths for data in files]))
        assert mixture.tokens(steps[0][0].rows) == every[-2:].sum()


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("pack", [single_rows, packing])
def test_epochs_have_as_many_steps_each_and_batches_the_rows_of_both_files(parts, pack, by_length):
    mixture = mix(*parts, 0.3, pack, 2, seed=1)
    share = []
    for epoch in range(1, 30):
        packs = mixture.epoch_packs(epoch)
        steps = plan_epoch(mixture, packs, BatchShape(2, 2), 1, epoch, by_length)
        assert len(steps) == BatchShape(2, 2).count_steps(len(mixture.epoch_packs(1)))
        rows = [row for step in steps for m in step if not m.is_filler for row in m.rows]
        assert sorted(rows) == sorted(row for pack in packs for row in pack)
        share.append(sum(row >= 40 for row in rows) / len(rows))
    assert abs(np.mean(share[1:]) - 0.3) < (0.05 if pack is packing else 0.005)
    batch = mixture[steps[0][0]]
    expected = [(parts[row >= 40].samples[row - 40 * (row >= 40)]).input_ids for row in steps[0][0].rows]
    assert batch["input_ids"][0].tolist() == [token for ids in expected for token in ids]


def test_the_summary_says_what_an_epoch_has(parts):
    assert "10 rows an epoch, 20.0% of all, of 30 samples" in mixed(*parts, 0.2, single_rows, 2, 1)[1]
    assert mixed(*parts, 0.2, packing, 2, 1)[1].startswith("about ")


def test_flags_that_cannot_be_meant_are_refused(files):
    flags = ["--mode", "glm3", "--model_name_or_path", ".", "--train_path", files[0]]
    for more, message in [
        (["--replay_path", files[1]], "does nothing without --replay_ratio"),
        (["--replay_ratio", "0.1"], "does nothing without --replay_path"),
        (["--replay_path", files[1], "--replay_ratio", "1"], "--replay_ratio 1: must be above 0 and below 1"),
        (["--replay_path", files[1] + "x", "--replay_ratio", "0.1"], f"--replay_path {files[1]}x: no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_args([*flags, *more])
    parse_args([*flags, "--replay_path", files[1], "--replay_ratio", "0.1"])


# Trainings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("glm3", tmp_path_factory.mktemp("base") / "base")


class Run:
    """One training with replay, in a folder of its own."""

    def __init__(self, folder: Path, base: Path, ranks: int, packing: bool):
        folder.mkdir()
        self.ranks, self.losses, self.log, self.output = ranks, folder / "losses", folder / "log", folder / "output"
        rows, self.general = make_rows(folder / "rows.json", 20), make_rows(folder / "general.json", 30)
        self.argv = command("glm3", "lora", 2, packing, base, rows, self.output)
        self.argv += ["--replay_path", str(self.general), "--replay_ratio", "0.4"]

    def start(self, *more, prepare=lambda: None) -> tuple[dict, str]:
        self.log.unlink(missing_ok=True)
        codes = Launched([*self.argv, *more], self.ranks, self.losses, self.log, prepare).wait()
        return codes, self.log.read_text()


@pytest.mark.parametrize(("ranks", "packing", "step"), [(1, False, 13), (2, True, 3)])
def test_a_run_goes_on_bit_for_bit_with_replay(tmp_path, base, ranks, packing, step):
    whole, broken = Run(tmp_path / "whole", base, ranks, packing), Run(tmp_path / "broken", base, ranks, packing)
    codes, text = whole.start()
    assert set(codes.values()) == {0}, text[-2000:]
    assert ("replay: about" if packing else "replay: 13 rows an epoch, 39.4% of all, of 30 samples") in text
    codes, _ = broken.start(prepare=before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert set(codes.values()) == {75}
    codes, text = broken.start()
    assert set(codes.values()) == {0} and "going on from" in text
    losses = read_losses(broken.losses)
    assert len(losses) > step and losses == read_losses(whole.losses)
    assert result_bytes(broken.output) == result_bytes(whole.output)


def test_another_replay_file_is_another_run(tmp_path, base):
    run = Run(tmp_path / "run", base, 1, False)
    codes, _ = run.start(prepare=before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert codes == {0: 75}
    make_rows(run.general, 31)
    codes, text = run.start()
    assert codes == {0: 2}
    assert "SHA-256 of --replay_path: " in text and "--train_path" not in "".join(errors(text))


def test_bad_rows_are_named_with_their_file(tmp_path, base):
    run = Run(tmp_path / "run", base, 1, False)
    rows, general = str(run.general.parent / "rows.json"), str(run.general)
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(base)
    mixture = mix(
        *(InstructionData(DataSettings(path, 160, 96), tokenizer) for path in (rows, general)),
        0.4,
        single_rows,
        2,
        1234,
    )
    plan = plan_epoch(mixture, mixture.epoch_packs(1), BatchShape(2, 2), 1234, 1)
    step, (mine, other) = next(
        (i, sorted(s[0].rows)) for i, s in enumerate(plan, 1) if min(s[0].rows) < 20 <= max(s[0].rows)
    )
    codes, text = run.start(prepare=loss_times(float("nan"), step))
    assert codes == {0: 3}
    (error,) = errors(text)
    assert (
        f"Rows of {rows}, rank 0: line {mine + 1}. Rows of {general}, rank 0: line {other - 20 + 1}. Stopped" in error
    )
