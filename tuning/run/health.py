"""What can stop a training early: a signal, a bad loss or gradients, a full memory, a dead rank.

All ranks stop together, and one line says why. Exit codes: errors.ExitCode.
"""

import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tuning.errors import ExitCode, StopTraining
from tuning.exits import ENDING
from tuning.run.launch import machine
from tuning.run.nodes import NodeWatch
from tuning.samples.batches import Batch
from tuning.terminal import print_error
from utils import control_group, data_parallel_size, is_rank_0, print_rank_0, stage_count, tell_all, wait_for_all

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 5.0  # seconds: a terminal or Slurm signals all processes, and then the launcher repeats the signal
FAR = 5.0  # a loss this many times that of a uniform guess, or of the first step, will not recover
LINES_SHOWN = 20
NO_MEMORY = re.compile("can't allocate memory|[Cc]annot allocate memory|can't start new thread")


# Signals


class Signals:
    """Notes a signal for the training loop; a second one ends the process at once.

    A context manager: outside it, signals do what they did before.
    """

    def __init__(self):
        self.number = 0  # of the first one, 0 for none yet
        self.since = 0.0
        self.before = {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        now = time.monotonic()
        if not self.number:
            self.number, self.since = number, now
            if is_rank_0():  # not print(): the signal may have interrupted a print
                text = (
                    f"{signal.Signals(number).name}: a state is saved after this step; a second signal ends at once\n"
                )
                text = "\n" * sys.stderr.isatty() + text  # the progress bar is in the current line
                with contextlib.suppress(OSError):  # nobody reads stderr
                    os.write(sys.stderr.fileno(), text.encode())
        elif now - self.since > SAME_REQUEST:
            os._exit(128 + number)


class PeerWatchdog:
    """Ends this process when another process of the run has died; those of other nodes are watched by NodeWatch.

    Gloo notices a dead process, NCCL does not: this process could wait for it for a long time.
    """

    def __init__(self):
        mine = (machine(), os.getpid())
        everyone = tell_all(mine)
        me = torch.distributed.get_rank()
        self.others = {rank: pid for rank, (host, pid) in enumerate(everyone) if host == mine[0] and rank != me}
        self.over = False
        self.nodes = NodeWatch() if any(host != mine[0] for host, _ in everyone) else None
        if self.others:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while not self.over:
            for rank, pid in self.others.items():
                if not _runs(pid):
                    time.sleep(2)  # if waiting for it raises an error in this process, that is the better message
                    if self.over or ENDING.is_set():
                        return
                    ENDING.set()
                    print_error(f"error: process {pid}, rank {rank}, is gone; this one ends too")
                    os._exit(1)
            time.sleep(1)

    def close(self):
        """From now on other processes may end."""
        self.over = True
        if self.nodes:
            self.nodes.close()
        wait_for_all()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # a zombie has died too
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:
        return True  # no /proc, or another user's process: it exists


# Losses


class Step(NamedTuple):
    """A finished optimizer step.

    loss: mean over its answer tokens on all ranks; NaN if the step was skipped.
    batches: micro-batches of this rank.
    """

    loss: float
    batches: list[Batch]


def _nothing(*_) -> None:
    pass


class StepHooks(NamedTuple):
    """Functions that tests and benchmarks have called around each optimizer step, on every rank.

    before: gets the StepMonitor and the step's micro-batches, before the model has them.
    after: gets the StepMonitor and the Step.
    """

    before: Callable[["StepMonitor", list[Batch]], None] = _nothing
    after: Callable[["StepMonitor", Step], None] = _nothing


NO_HOOKS = StepHooks()


class StepMonitor:
    """Checks each optimizer step of this rank, and stops all ranks when training on is useless.

    A context manager: inside it signals are noted, and an error that passes through says in which micro-batch it was.

    Args:
        engine: DeepSpeed's; it does not change the weights in a step with non-finite gradients.
        files: path and line numbers [samples] of each file with rows; row numbers continue from file to file.
        guess: loss of a uniform guess: log of the vocabulary size.
        may_skip: how many non-finite steps may be skipped.
        hooks: see StepHooks.
    """

    def __init__(
        self,
        engine,
        files: list[tuple[str, Sequence[int]]],
        guess: float,
        may_skip: int = 0,
        hooks: StepHooks = NO_HOOKS,
    ):
        self.engine, self.files, self.may_skip, self.hooks = engine, files, may_skip, hooks
        self.signals, self.interrupted = Signals(), False
        self.skipped, self.limit = 0, FAR * guess
        self.batches: list[Batch] = []  # of the current step

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a training state."""
        return {"skipped": torch.tensor(self.skipped), "limit": torch.tensor(self.limit, dtype=torch.float64)}

    def set_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned, after the engine was restored."""
        self.skipped, self.limit = int(tensors["skipped"]), float(tensors["limit"])

    def __enter__(self):
        self.signals.__enter__()

    def __exit__(self, kind, error, traceback):
        self.signals.__exit__()
        if isinstance(error, StopTraining) and error.everyone:
            ENDING.set()  # now: the other ranks may be gone before rank 0 has written its record
        if error is not None and not isinstance(error, StopTraining):
            error.add_note(self.shape())

    def begin_step(self, batches: list[Batch]) -> None:
        """Note the micro-batches of an optimizer step before the model gets them, when all ranks have theirs."""
        self.batches = batches
        wait_for_all()  # rank 0 may have written a log line, a result or a validation's figures
        self.hooks.before(self, batches)

    def end_step(self, losses: list[torch.Tensor]) -> Step:
        """Check an optimizer step that the engine has finished.

        Args:
            losses: of its micro-batches, on the device. They are read here for the first time, which waits for it.

        Raises:
            StopTraining: loss or gradients are not finite, or the loss is far too high.
        """
        batches, self.batches = self.batches, []
        step = self._check(torch.stack(losses).double().cpu(), batches)
        self.hooks.after(self, step)
        return step

    def _check(self, losses: torch.Tensor, batches: list[Batch]) -> Step:
        broken = ~losses.isfinite()
        # one all-reduce for all: mean loss, broken micro-batches, signals
        totals = torch.stack((losses.mean(), broken.double().sum(), torch.tensor(float(self.signals.number > 0))))
        torch.distributed.all_reduce(totals, group=control_group())
        mean, any_broken, interrupted = totals.tolist()
        mean /= data_parallel_size()  # of a pipeline's stages, only the last one has losses
        self.interrupted = interrupted > 0

        # The same on all ranks. With float16, an overflow can simply mean that the engine lowers the loss scale.
        norm = self.engine.get_global_grad_norm()
        overflow = bool(getattr(self.engine.optimizer, "overflow", False)) or not math.isfinite(norm or 0)
        if any_broken:
            self._give_up(f"the loss is {mean}", batches, broken)
        elif overflow and not self.engine.fp16_enabled():
            self._give_up("gradients are not finite, though the loss is", batches, losses.isfinite())
        elif mean > self.limit:
            high = losses > self.limit
            text = f"the loss is {mean:.4g}, above the limit of {self.limit:.4g}: training has diverged"
            self._give_up(text, batches, high, False)
        else:
            if self.engine.global_steps == 1:
                self.limit = max(self.limit, FAR * mean)
            return Step(mean, batches)
        return Step(math.nan, batches)

    def _give_up(self, what: str, batches: list[Batch], bad: torch.Tensor, skippable: bool = True) -> None:
        """Stop all ranks, or print a warning if this step may be skipped."""
        rows = [row for batch, is_bad in zip(batches, bad.tolist(), strict=True) if is_bad for row in batch.rows]
        everyone = tell_all(self._lines(rows))
        text = f"step {self.engine.global_steps}: {what}."
        for (path, _), ranks in zip(self.files, zip(*everyone, strict=True), strict=True):
            where = "; ".join(f"rank {rank}: line {_list(some)}" for rank, some in enumerate(ranks) if some)
            text += f" Rows of {path}, {where}." if where else ""
        self.skipped += skippable
        if skippable and self.skipped <= self.may_skip:
            print_rank_0(f"warning: {text} Step skipped ({self.skipped} of at most {self.may_skip}, --skip_nonfinite)")
            return
        hint = "a lower --learning_rate or a longer warm-up often helps; look at the rows"
        if skippable and self.may_skip:
            hint = f"{self.may_skip} such steps were skipped (--skip_nonfinite); {hint}"
        elif skippable:
            hint += "; --skip_nonfinite N skips N such steps"
        raise StopTraining(ExitCode.DIVERGED, f"{text} Stopped; folders saved earlier are unchanged: {hint}")

    def _lines(self, rows: list[int]) -> list[list[int]]:
        """Line numbers of some rows, by file."""
        found = []
        for _, lines in self.files:
            found.append(sorted({int(lines[row]) for row in rows if row < len(lines)}))
            rows = [row - len(lines) for row in rows if row >= len(lines)]
        return found

    def exit_if_interrupted(self, state: str) -> None:
        """End all ranks if any of them got a signal.

        Args:
            state: folder of the training state to resume from.

        Raises:
            StopTraining: there was a signal.
        """
        if self.interrupted:
            name = signal.Signals(self.signals.number).name if self.signals.number else "a signal to another rank"
            text = f"stopped by {name} after step {self.engine.global_steps}; --resume_from_checkpoint goes on from"
            raise StopTraining(ExitCode.RESUMABLE, f"{text} {state}")

    def shape(self) -> str:
        """The current micro-batch, in words; in a pipeline, where several are under way, those of the current step."""
        if not self.batches:
            done = self.engine.global_steps
            return f"after step {done}" if done else "before the first batch"
        lengths = [[tokens for tokens, _ in batch["segments"]] for batch in self.batches]
        if stage_count() > 1:
            return (
                f"in a step of {len(lengths)} micro-batches, of at most {max(map(len, lengths))} samples and "
                f"{max(map(sum, lengths))} tokens, the longest sample {max(map(max, lengths))}"
            )
        # the engine counts the micro-batches of all steps
        lengths = lengths[self.engine.micro_steps % len(lengths)]
        return f"in a micro-batch of {len(lengths)} samples, {sum(lengths)} tokens, the longest {max(lengths)}"


def _list(lines: list[int]) -> str:
    more = f" and {len(lines) - LINES_SHOWN} more" if len(lines) > LINES_SHOWN else ""
    return ", ".join(map(str, lines[:LINES_SHOWN])) + more


# Errors of the libraries


@contextlib.contextmanager
def explain_oom(advice: Callable[[], str]):
    """Tell the user what to do when memory runs out, or when the float16 loss scale cannot go lower.

    Args:
        advice: gives lines on what would need less memory.

    Raises:
        StopTraining: instead of these errors.
    """
    try:
        yield
    except Exception as error:
        text, where = str(error), " ".join(getattr(error, "__notes__", ["before the first step"]))
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(text):
            first = (text.splitlines() or [type(error).__name__])[0]
            text = f"out of memory {where} ({first})\n{advice()}"
            raise StopTraining(ExitCode.OUT_OF_MEMORY, text, everyone=False) from error
        if "loss scale already at minimum" in text:
            raise StopTraining(
                ExitCode.DIVERGED,
                f"float16 gradients overflow at the smallest loss scale, {where}. Stopped; folders saved earlier are "
                "unchanged: use bf16 if the GPU has it, or a lower --learning_rate",
            ) from error
        raise
