"""The optimizer step as a unit: what training_steps yields, what train_step does with it, how an error is placed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_set
import train
from tuning.engine.saving import count_results, is_save_step
from tuning.run import health
from tuning.run.health import StepHooks, StepMonitor
from tuning.samples.batches import Batch
from tuning.samples.epochs import Packs, RunLength, run_length


class Rows:
    """Ten samples; a batch is the micro-batch itself."""

    files = [("rows.json", range(1, 11))]
    lengths = answer_lengths = np.ones(10, dtype=np.int64)

    def __getitem__(self, micro_batch):
        return micro_batch


SOURCES = SimpleNamespace(data=Rows(), packs=lambda epoch: Packs(np.arange(10)))
ARGS = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=2, seed=1, group_by_length=False)
EPOCH_STEPS = 3  # 10 rows in steps of 1 x 2 x 2 ranks


def steps(monkeypatch, rank: int, first: int = 0, total: int = 2 * EPOCH_STEPS):
    """All (epoch, rows of each micro-batch) that a rank gets, the engine being at step `first`."""
    monkeypatch.setattr(data_set, "data_parallel_rank", lambda: rank)
    monkeypatch.setattr(data_set, "data_parallel_size", lambda: 2)
    engine, found = SimpleNamespace(global_steps=first), []
    for epoch, batches in data_set.training_steps(engine, SOURCES, ARGS, RunLength(EPOCH_STEPS, total)):
        found.append((epoch, [(batch.rows, batch.is_filler) for batch in batches]))
        engine.global_steps += 1
    return found


def test_steps_are_whole_and_ranks_share_each_epoch(monkeypatch):
    ranks = [steps(monkeypatch, rank) for rank in range(2)]
    for found in ranks:
        assert [epoch for epoch, _ in found] == [1] * EPOCH_STEPS + [2] * EPOCH_STEPS
        assert {len(batches) for _, batches in found} == {2}
    for epoch in (1, 2):
        batches = [batch for found in ranks for number, step in found if number == epoch for batch in step]
        assert sorted(row for rows, is_filler in batches if not is_filler for row in rows) == list(range(10))


@pytest.mark.parametrize("first", [1, 3, 5, 6])
def test_steps_go_on_where_the_engine_is(monkeypatch, first):
    assert steps(monkeypatch, 1, first) == steps(monkeypatch, 1)[first:]


@pytest.mark.parametrize(("first", "total"), [(0, 2), (0, 4), (1, 2), (3, 4), (2, 5), (0, 11), (10, 11), (4, 4)])
def test_a_run_may_end_within_an_epoch(monkeypatch, first, total):
    assert steps(monkeypatch, 1, first, total) == steps(monkeypatch, 1, 0, 12)[first:total]


def test_parts_of_an_epoch_are_whole_steps():
    totals = [run_length(epochs, None, 100).total_steps for epochs in (1, 3, 1.5, 0.42, 0.07, 0.001, 0.021, 1e-9)]
    assert totals == [100, 300, 150, 42, 7, 1, 3, 1]
    assert run_length(None, 3000, 7) == (7, 3000)
    assert [RunLength(10, total).epochs for total in (1, 9, 10, 11, 20)] == [1, 1, 1, 2, 2]
    assert RunLength(10, 30).text() == "3 epochs, 30 steps"
    assert RunLength(1600, 3000).text() == "1.88 epochs, 3000 steps"


@pytest.mark.parametrize("every", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("length", [RunLength(4, 12), RunLength(4, 13), RunLength(4, 1), RunLength(1, 5)])
def test_results_are_counted_as_they_are_saved(length, every):
    args = SimpleNamespace(save_model_step=every)
    saved = [step for step in range(1, length.total_steps + 1) if is_save_step(args, step, length)]
    assert len(saved) == count_results(args, length) and saved[-1] == length.total_steps
    assert set(saved) >= set(range(length.epoch_steps, length.total_steps + 1, length.epoch_steps))


class Engine:
    """Stands for DeepSpeed's: counts as it does, and notes its calls."""

    def __init__(self, accumulation: int, fails_at: int = -1):
        self.calls, self.accumulation, self.fails_at = [], accumulation, fails_at
        self.device, self.global_steps, self.micro_steps = torch.device("cpu"), 0, 0
        self.optimizer, self.module = SimpleNamespace(overflow=False), None

    def __call__(self, input_ids, segments):
        if self.micro_steps == self.fails_at:
            raise torch.OutOfMemoryError
        self.calls.append("forward")
        return SimpleNamespace(loss=input_ids.sum() * torch.ones((), requires_grad=True))

    def backward(self, loss):
        self.calls.append("backward")

    def step(self):
        self.calls.append("step")
        self.micro_steps += 1
        self.global_steps += self.micro_steps % self.accumulation == 0


def batches(*lengths):
    return [Batch([0], 1, input_ids=torch.ones(1, length), segments=[(length, 0)]) for length in lengths]


def test_a_step_runs_every_micro_batch_and_keeps_no_graph():
    engine = Engine(accumulation=2)
    losses = train.train_step(engine, batches(4, 3))
    assert engine.calls == ["forward", "backward", "step"] * 2 and engine.global_steps == 1
    assert [loss.item() for loss in losses] == [4, 3] and not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize(("fails_at", "tokens"), [(2, 7), (3, 5)])
def test_an_error_names_the_micro_batch_in_which_it_was(fails_at, tokens):
    engine, seen = Engine(accumulation=2, fails_at=fails_at), []
    watch = StepMonitor(engine, Rows.files, 5.0, hooks=StepHooks(before=lambda watch, step: seen.append(len(step))))
    with pytest.raises(torch.OutOfMemoryError) as error, watch:
        train.train_step(engine, batches(9, 9))  # the step before
        watch.begin_step(batches(7, 5))
        train.train_step(engine, watch.batches)
    assert error.value.__notes__ == [f"in a micro-batch of 1 samples, {tokens} tokens, the longest {tokens}"]
    assert seen == [2]


def test_an_error_in_a_pipeline_names_all_micro_batches_of_the_step(monkeypatch):
    """Several are under way at once, and the engine counts them when the step is done."""
    monkeypatch.setattr(health, "stage_count", lambda: 2)
    watch = StepMonitor(Engine(accumulation=2), Rows.files, 5.0)
    with pytest.raises(torch.OutOfMemoryError) as error, watch:
        watch.begin_step([*batches(7, 5), Batch([0], 1, input_ids=torch.ones(1, 10), segments=[(4, 0), (6, 0)])])
        raise torch.OutOfMemoryError
    assert error.value.__notes__ == [
        "in a step of 3 micro-batches, of at most 2 samples and 10 tokens, the longest sample 7"
    ]
