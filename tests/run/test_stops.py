"""Trainings that are stopped, broken or lied to: each ends soon, says why in one message with the documented exit code,
and leaves what was saved before as it was. Exactness under random kills is the matter of killed.py.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import killed
import pytest
import torch
from runs import (
    AFTER_STEP,
    BEFORE_STEP,
    LIMIT,
    STAGES,
    Launched,
    command,
    make_base,
    make_rows,
    read_losses,
    result_bytes,
)

from tuning import folders
from tuning.run import health
from tuning.run.resume import find_state, list_states

ROOT = Path(__file__).resolve().parents[2]
TOTAL = {1: 36, 2: 18}  # optimizer steps of a run as `command` has it, by ranks


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def base(work):
    return make_base("glm3", work / "base")


@pytest.fixture(scope="module")
def rows(work):
    return make_rows(work / "rows.json")


class Trial:
    """Runs of one training, each with something done to it."""

    def __init__(self, folder: Path, base: Path, rows: Path, ranks: int = 1, stage: int = 2):
        self.folder, self.ranks = folder, ranks
        self.output, self.losses = folder / "output", folder / "losses"
        self.argv = command("glm3", "lora", stage, False, base, rows, self.output)
        self.log = folder / "log"

    def start(self, *more: str, prepare=lambda: None, ranks: int | None = None) -> Launched:
        self.log.unlink(missing_ok=True)
        return Launched([*self.argv, *more], ranks or self.ranks, self.losses, self.log, prepare)

    def run(self, *more: str, prepare=lambda: None, ranks: int | None = None, limit: float = LIMIT) -> tuple[dict, str]:
        """Exit codes by rank, and all that was printed."""
        codes = self.start(*more, prepare=prepare, ranks=ranks).wait(limit)
        return codes, self.log.read_text()

    def wait_for_step(self, run: Launched, step: int) -> None:
        while run.running() and len(read_losses(self.losses)) < step:
            time.sleep(0.005)

    def states(self) -> list[str]:
        return [Path(path).name for path in list_states(str(self.output))]


@pytest.fixture(scope="module")
def whole(work, base, rows):
    """A run on two ranks that nothing was done to."""
    (work / "whole").mkdir()
    trial = Trial(work / "whole", base, rows, ranks=2)

    def prepare():
        take_apart = deepspeed.comm.destroy_process_group

        def noted():
            take_apart()
            (trial.folder / f"group-of-{os.environ['RANK']}").write_text(str(torch.distributed.is_initialized()))

        deepspeed.comm.destroy_process_group = noted

    codes, text = trial.run(
        prepare=prepare, limit=600
    )  # the first of all compiles DeepSpeed's operations, if nobody has
    assert codes == {0: 0, 1: 0}, text
    return trial


@pytest.fixture
def trial(whole, tmp_path, base, rows):
    return Trial(tmp_path, base, rows)


@pytest.fixture
def two(whole, tmp_path, base, rows):
    return Trial(tmp_path, base, rows, ranks=2)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error:" in line]


def before_step(step: int, action, rank: int = 0):
    """A `prepare` that does something when a rank is about to take a step's first micro-batch through the model."""

    def prepare():
        def act(watch, batches):
            if watch.engine.global_steps + 1 == step and int(os.environ["RANK"]) == rank:
                action()

        BEFORE_STEP.append(act)

    return prepare


def loss_times(factor: float, step: int, rank: int = 0):
    """A `prepare` that multiplies a loss, and so its gradients."""
    from glm_models import modeling

    def action():
        real = modeling.summed_cross_entropy

        def changed(*args):
            modeling.summed_cross_entropy = real
            return real(*args) * factor

        modeling.summed_cross_entropy = changed

    return before_step(step, action, rank)


def test_a_run_that_ends_well_takes_its_process_group_apart(whole):
    """NCCL would warn of it at the end."""
    assert [(whole.folder / f"group-of-{rank}").read_text() for rank in range(2)] == ["False", "False"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_a_state_and_the_run_goes_on_bit_for_bit(two, whole, number):
    run = two.start("--save_state_steps", "1000")
    two.wait_for_step(run, 3)
    run.kill(number, [1])
    assert run.wait() == {0: 75, 1: 75}
    text = two.log.read_text()
    (state,) = two.states()
    assert f"; --resume_from_checkpoint goes on from {two.output}/states/{state}" in text
    assert not errors(text)
    codes, text = two.run()
    assert codes == {0: 0, 1: 0}
    assert f"going on from {two.output}/states/{state}" in text
    expected = dict(read_losses(whole.losses))
    seen = read_losses(two.losses)
    assert [step for step, _ in seen] == list(range(1, TOTAL[2] + 1))  # none twice: the state is of the last step
    assert dict(seen) == expected
    assert result_bytes(two.output) == result_bytes(whole.output)


def test_a_second_signal_ends_at_once(trial):
    clock, waits = trial.folder / "clock", trial.folder / "waits"
    clock.write_text("0")

    def wait():
        waits.touch()
        time.sleep(2 * LIMIT)

    def prepare():
        health.time = SimpleNamespace(monotonic=lambda: float(clock.read_text()))  # however slow the machine is
        before_step(3, wait)()

    run = trial.start(prepare=prepare)
    while run.running() and not waits.exists():
        time.sleep(0.005)
    run.kill(signal.SIGTERM)
    while run.running() and "a second signal ends at once" not in trial.log.read_text():
        time.sleep(0.005)
    clock.write_text(str(health.SAME_REQUEST))
    run.kill(signal.SIGTERM)  # the launcher's: the same request once more
    time.sleep(0.5)
    assert run.running()
    clock.write_text(str(health.SAME_REQUEST + 1))
    run.kill(signal.SIGTERM)
    assert run.wait() == {0: 128 + signal.SIGTERM}
    assert trial.run()[0] == {0: 0}  # from the state of step 2


# Ranks that die


def test_a_rank_that_is_killed_ends_the_others(two):
    run = two.start()
    two.wait_for_step(run, 3)
    run.kill(signal.SIGKILL, [1])
    codes = run.wait()  # half of the time that the process group itself would wait
    assert codes[0] not in (0, 75) and codes[1] == -signal.SIGKILL
    text = two.log.read_text()
    assert "Traceback" not in text
    assert len(errors(text)) == 1 and ("another process" in text or "rank 1, is gone" in text)


def test_a_rank_that_waits_on_a_device_for_a_dead_one_ends_too(two):
    def prepare():
        before_step(
            4, lambda: time.sleep(2 * LIMIT), rank=0
        )()  # as in a kernel: no Python code runs, no connection is used

    run = two.start(prepare=prepare)
    two.wait_for_step(run, 3)
    time.sleep(0.5)
    run.kill(signal.SIGKILL, [1])
    assert run.wait()[0] == 1
    assert f"error: process {run.pids[1]}, rank 1, is gone; this one ends too" in two.log.read_text()


def fail():
    raise LookupError("a bug of this rank")


def test_a_rank_that_raises_ends_the_run_with_its_message(two):
    codes, text = two.run(prepare=before_step(3, fail, rank=1))
    assert 0 not in codes.values()
    assert text.count("LookupError: a bug of this rank") == 1
    assert "[rank 1] Traceback" in text


SABOTEUR = """
import sys
sys.path[:0] = [{tests!r}, {root!r}, {root!r} + '/tests/support', {root!r} + '/tests']
import runs, test_stops, train
test_stops.before_step(3, test_stops.{what}, rank=1)()
train.main(hooks=runs.step_hooks())
"""


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("what", ["fail", "kill_myself"])
def test_under_the_launcher_a_broken_rank_ends_all(two, what):
    script = two.folder / "saboteur.py"
    script.write_text(SABOTEUR.format(tests=str(ROOT / "tests" / "run"), root=str(ROOT), what=what))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29677"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        [*launcher, str(script), *two.argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert run.returncode != 0
    if what == "fail":
        assert "LookupError: a bug of this rank" in run.stderr
    else:
        assert "another process" in run.stderr or "is gone" in run.stderr


# Numbers that go wrong


def lines_named(text: str) -> list[int]:
    (part,) = [
        line.partition("rank 0: line ")[2].partition(".")[0] for line in text.splitlines() if "rank 0: line" in line
    ]
    return [int(number) for number in part.split(";")[0].split(",")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_names_the_rows(trial, rows, value):
    codes, text = trial.run(prepare=loss_times(value, 5))
    assert codes == {0: 3}
    (error,) = errors(text)
    assert error.startswith(f"error: step 5: the loss is {value}. Rows of {rows}, rank 0: line ")
    assert len(lines_named(text)) == 2  # one micro-batch of two rows
    assert "--skip_nonfinite" in error
    assert trial.states() == ["step-00000004", "step-00000002"]


def test_of_two_ranks_the_one_with_the_bad_batch_is_named(two):
    codes, text = two.run(prepare=loss_times(float("nan"), 4, rank=1))
    assert codes == {0: 3, 1: 3}
    (error,) = errors(text)
    assert "step 4: the loss is nan" in error and "rank 1: line" in error and "rank 0" not in error


def test_gradients_that_are_no_numbers_stop(trial):
    def prepare():
        from glm_models import modeling

        real = modeling.summed_cross_entropy
        state = {"calls": 0}

        class Spoilt(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient * float("nan")

        def changed(*args):
            state["calls"] += 1
            loss = real(*args)
            return Spoilt.apply(loss) if state["calls"] == 5 else loss  # two a step: the third step's first

        modeling.summed_cross_entropy = changed

    codes, text = trial.run(prepare=prepare)
    assert codes == {0: 3}
    (error,) = errors(text)
    assert "step 3: gradients are not finite, though the loss is" in error
    assert len(lines_named(text)) == 4  # any row of the step may be to blame


def test_a_loss_beyond_reason_stops(trial):
    codes, text = trial.run("--skip_nonfinite", "5", prepare=loss_times(1e4, 6))
    assert codes == {0: 3}
    (error,) = errors(text)
    assert "step 6: the loss is " in error and "training has diverged" in error


def test_so_many_bad_steps_are_passed_over(trial, work, base, rows):
    codes, text = trial.run("--skip_nonfinite", "1", prepare=loss_times(float("nan"), 5))
    assert codes == {0: 0}
    assert "warning: step 5: the loss is nan" in text and "Step skipped (1 of at most 1, --skip_nonfinite)" in text
    losses = dict(read_losses(trial.losses))
    assert losses[5] == "nan" and "nan" not in [losses[step] for step in losses if step != 5]
    assert f"step {TOTAL[1]}/{TOTAL[1]}" in text and "loss nan" not in text
    for tensor in _weights(trial.output / "epoch-3-step-36").values():
        assert tensor.isfinite().all()


def test_one_bad_step_too_many_stops(trial):
    def prepare():
        loss_times(float("nan"), 3)()
        loss_times(float("nan"), 5)()

    codes, text = trial.run("--skip_nonfinite", "1", prepare=prepare)
    assert codes == {0: 3}
    assert "1 such steps were skipped (--skip_nonfinite)" in errors(text)[0]


def test_the_loss_scale_at_its_floor_stops(trial):
    def overflow():
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        scaler = DynamicLossScaler(
            init_scale=1, scale_window=1000, min_scale=1, delayed_shift=1,
            consecutive_hysteresis=False, raise_error_at_min_scale=True,
        )  # fmt: skip
        scaler.update_scale(True)

    codes, text = trial.run(prepare=before_step(3, overflow))
    assert codes == {0: 3}
    (error,) = errors(text)
    assert "float16 gradients overflow at the smallest loss scale" in error and "in a micro-batch of 2 samples" in error


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_says_which_batch_and_what_would_help(trial):
    codes, text = trial.run("--max_len", "4000", prepare=before_step(3, out_of_memory))
    assert codes == {0: 4}
    (error,) = errors(text)
    assert "out of memory in a micro-batch of 2 samples, " in error and "Tried to allocate 2.00 GiB" in error
    advice = text[text.index("what would lower it:") :]
    assert "--gradient_checkpointing True" in advice and "--max_len 1000" in advice
    assert "Traceback" not in text


# The disk


def test_a_full_disk_while_saving_is_one_error_and_costs_nothing(trial):
    trial.run("--save_total_limit", "9", prepare=before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = {name: tree(trial.output / "states" / name) for name in trial.states()}
    assert len(before) == 4

    def prepare():  # a file may have so many bytes and no more, as if the disk were full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    codes, text = trial.run("--save_total_limit", "9", prepare=prepare)
    assert codes == {0: 2}
    (error,) = errors(text)
    assert f"cannot write {trial.output}/states/step-00000008: " in error and "is unchanged" in error
    assert "Traceback" not in text
    assert {name: tree(trial.output / "states" / name) for name in trial.states()} == before
    assert trial.run()[0] == {0: 0}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_too_little_room_is_said_before_training(trial):
    def prepare():
        real = shutil.disk_usage
        shutil.disk_usage = lambda path: real(path)._replace(free=1000)

    codes, text = trial.run(prepare=prepare)
    assert codes == {0: 2}
    (error,) = errors(text)
    assert "no room for a result and the training states" in error and "0.00 GiB are free" in error
    assert "step 1/" not in text


@pytest.mark.parametrize("where", ["a file in its place", "below a file"])
def test_an_output_folder_that_cannot_be_is_one_error(trial, where):
    (trial.folder / "file").write_text("")
    path = trial.folder / "file" / ("below" if where == "below a file" else "")
    codes, text = trial.run("--output_dir", str(path))
    assert codes == {0: 2}
    (error,) = errors(text)
    assert f"cannot write to {path}" in error


def test_two_runs_do_not_share_an_output_folder(trial):
    first = trial.start(prepare=before_step(3, lambda: time.sleep(2 * LIMIT)))
    trial.wait_for_step(first, 2)
    second = Launched(trial.argv, 1, trial.losses, trial.folder / "other-log")
    assert second.wait() == {0: 2}
    first.kill()
    first.wait()
    assert "another training is writing to" in (trial.folder / "other-log").read_text()


# States that were tampered with, and runs that are not theirs


@pytest.fixture
def stopped(trial):
    """A run that was stopped after seven steps, with states of steps 4, 6 and 7."""
    prepare = before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trial.run("--save_total_limit", "3", prepare=prepare)[0] == {0: 75}
    assert trial.states() == [f"step-0000000{step}" for step in (7, 6, 4)]
    return trial


def damage(state: Path, kind: str) -> None:
    file = next(state.glob("deepspeed/*optim_states.pt"))
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(content[:-100])
    elif kind == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "file gone":
        file.unlink()
    elif kind == "no manifest":
        (state / folders.MANIFEST).unlink()
    elif kind == "stranger":
        (state / "deepspeed" / "more.pt").write_bytes(b"evil")
    elif kind == "other writer":
        path = state / folders.MANIFEST
        path.write_text(path.read_text().replace(folders.WRITTEN_BY, "somebody else"))
    else:
        (state / folders.MANIFEST).write_text("[]")


DAMAGES = ["truncated", "a bit", "file gone", "no manifest", "stranger", "other writer", "broken manifest"]


def test_damaged_states_are_never_loaded(stopped):
    states = stopped.output / "states"
    for kind in DAMAGES:
        copy = stopped.folder / kind.replace(" ", "-")
        shutil.copytree(states, copy / "states")
        damage(copy / "states" / "step-00000007", kind)
        state, broken = find_state("auto", str(copy))
        assert state == str(copy / "states" / "step-00000006"), kind
        assert len(broken) == 1 and "step-00000007" in broken[0], kind
        with pytest.raises(folders.FolderError, match="step-00000007"):
            find_state(str(copy / "states" / "step-00000007"), str(copy))
        for name in ("step-00000006", "step-00000004"):
            damage(copy / "states" / name, kind)
        with pytest.raises(folders.FolderError, match="no state can be used"):
            find_state("auto", str(copy))


def test_the_run_says_which_state_it_takes_and_why(stopped):
    damage(stopped.output / "states" / "step-00000007", "a bit")
    codes, text = stopped.run()
    assert codes == {0: 0}
    assert "warning: a newer state cannot be used: " in text and "SHA-256 differs" in text
    assert f"going on from {stopped.output}/states/step-00000006" in text


def test_a_run_that_goes_back_keeps_what_it_saves(stopped):
    back = stopped.output / "states" / "step-00000004"
    stop = before_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    flags = ["--resume_from_checkpoint", str(back), "--save_total_limit", "1", "--save_state_steps", "5"]
    assert stopped.run(*flags, prepare=before_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))[0] == {0: 75}
    assert stopped.states() == ["step-00000006"]  # 7 is of the course that was left
    assert stopped.run(prepare=stop)[0] == {0: 75}


def test_what_killed_writers_left_is_tidied_up(stopped):
    states = stopped.output / "states"
    (states / "step-00000008.partial").mkdir()
    (states / "step-00000008.partial" / "half").write_text("")
    (states / "step-00000006").rename(states / "step-00000006.replaced")
    assert len(folders.sweep(str(states))) == 2
    assert stopped.states() == [f"step-0000000{step}" for step in (7, 6, 4)]


def test_another_run_does_not_go_on_from_a_state(stopped, base, rows):
    other_rows = make_rows(stopped.folder / "rows.json", 40)
    for flags, message in [
        (["--learning_rate", "1e-3"], "--learning_rate: 0.005 before, 0.001 now"),
        (["--seed", "1"], "--seed: 1234 before, 1 now"),
        (["--train_path", str(other_rows)], "SHA-256 of --train_path"),
        (["--train_path", f"{rows}:2", str(other_rows)], "\n       weights of --train_path: None before, [2.0, 1"),
        (["--ds_file", STAGES[3]], "was saved under ZeRO stage 2"),
    ]:
        codes, text = stopped.run(*flags)
        assert codes == {0: 2}
        (error,) = errors(text)
        assert message in text[text.index(error) :]
    codes, text = stopped.run(ranks=2)
    assert set(codes.values()) == {2} and "--gradient_accumulation_steps x processes: 2 before, 4 now" in text
    assert stopped.states() == [f"step-0000000{step}" for step in (7, 6, 4)]
    codes, text = stopped.run("--learning_rate", "1e-3", "--resume_changed", "True")
    assert codes == {0: 0}
    assert "warning: changed since" in text and "--learning_rate: 0.005 before, 0.001 now" in text


def check_adam_steps():
    """After each step of this process: every parameter counts its steps by itself, rightly, where fused Adam looks."""

    def check(watch, step):
        states = watch.engine.optimizer.optimizer.state
        steps = [state["step"] for state in states.values()]
        least = 2 if watch.engine.zero_optimization_stage() == 3 else 1
        assert len({id(step) for step in steps}) == len(steps) >= least
        assert {step.item() for step in steps} == {watch.engine.global_steps}
        assert all(state["step"].device == parameter.device for parameter, state in states.items())

    AFTER_STEP.append(check)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(whole, tmp_path, base, stage, ranks):
    before, after = ranks
    rows = make_rows(tmp_path / "rows.json", 16)  # four steps an epoch, so the stop is in the second of three
    ds_config = json.loads((ROOT / STAGES[stage]).read_text())
    if stage == 3:
        ds_config["zero_optimization"]["sub_group_size"] = 200  # several, which share what they are given
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    plain = ["--lora_dropout", "0", "--ds_file", str(tmp_path / "ds.json")]
    losses = {}
    for name, stop in (("unbroken", None), ("broken", 6)):
        trial = Trial(tmp_path / name, base, rows, ranks=before, stage=stage)
        trial.folder.mkdir()
        parts = {rank: ["--gradient_accumulation_steps", str(2 // rank)] for rank in ranks}
        if stop is None:
            assert trial.run(*plain, *parts[before])[0] == dict.fromkeys(range(before), 0)
        else:
            prepare = before_step(stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert trial.run(*plain, *parts[before], prepare=prepare)[0] == dict.fromkeys(range(before), 75)
            codes, text = trial.run(*plain, *parts[after], ranks=after, prepare=check_adam_steps)
            assert codes == dict.fromkeys(range(after), 0), text
            assert [step for step, _ in read_losses(trial.losses)] == list(range(1, 13))
            assert not list(trial.output.rglob(f"*{folders.PARTIAL}"))
        losses[name] = [float.fromhex(loss) for _, loss in read_losses(trial.losses)]
    assert losses["broken"] == pytest.approx(losses["unbroken"], rel=1e-5)


def test_a_new_run_does_not_mix_with_states_of_an_earlier_one(stopped):
    argv = [word for word in stopped.argv if word not in ("--resume_from_checkpoint", "auto")]
    stopped.argv = argv
    codes, text = stopped.run()
    assert codes == {0: 2}
    assert "holds results of an earlier run (states/step-00000007" in errors(text)[0]


def test_a_changed_learning_rate_counts_from_the_first_step_on(stopped):
    codes, text = stopped.run("--learning_rate", "0.1", "--show_loss_step", "1", "--resume_changed")
    assert codes in ({0: 0}, {0: 3})
    rate = float(text[text.index("step 8/") :].split(" lr ")[1].split()[0])
    assert 0.05 < rate <= 0.1


def test_a_state_of_a_lora_run_is_small(whole, tmp_path, rows):
    base = make_base("glm3", tmp_path / "base", layers=4, hidden_size=256, heads=4)
    trial = Trial(tmp_path, base, rows)
    stop = before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trial.run("--lora_dim", "16", prepare=stop)[0] == {0: 75}
    state = trial.output / "states" / "step-00000003"
    size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    trained = 4 * 16 * sum(4 * (256 + out) for out in (_rows(base, "query_key_value"), _rows(base, "dense_h_to_4h")))
    assert f"model: {trained // 4:,} of " in trial.log.read_text()
    assert 3 * trained < size < 5 * trained
    assert trained < 0.1 * (base / "model.safetensors").stat().st_size


def _rows(base: Path, name: str) -> int:
    from safetensors import safe_open

    part = "self_attention" if name == "query_key_value" else "mlp"
    with safe_open(base / "model.safetensors", "pt") as file:
        key = next(key for key in file.keys() if f"layers.0.{part}.{name}.weight" in key)  # noqa: SIM118
        return file.get_slice(key).get_shape()[0]


# Random kills: the short form of `python tests/killed.py`


@pytest.mark.parametrize("flags", [["--kills", "1", "--sample", "--conversations"], ["--kills", "6", "--in-save"]])
def test_random_kills_change_no_bit(flags, capsys):
    killed.main(flags)
    last = capsys.readouterr().out.splitlines()[-1]
    assert ", 0 differences" in last
    assert json.loads(last.split("all: ")[1].split(", 0 diff")[0].replace("'", '"'))["kills"] >= 6
