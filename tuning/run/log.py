"""What a training tells of itself: a bar and lines on the terminal, log.jsonl, TensorBoard's files, the last lines.

None of these may end a training: where one cannot be written, that is said, and the training goes on.
"""

import contextlib
import errno
import json
import math
import os
import resource
import shlex
import sys
import time

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from tuning import ROOT
from tuning.folders import write_errors, write_file
from tuning.run.flops import Flops
from utils import control_group, is_main, say

SUMMARY = "summary.json"  # of a training that reached its end


class JsonLines:
    """A file with a JSON object a line that grows as a run goes on, "step" among its keys. For rank 0 alone.

    Lines of an earlier run, or of steps after the one where this run goes on, go first. Lines that a full disk does not
    take are kept, and tried again with the next one.

    Args:
        first: the step where the run goes on; 0 for a new one.

    Raises:
        FolderError: the file cannot be made.
    """

    def __init__(self, path: str, first: int):
        self.path, self.waiting, self.warned = path, "", False
        with write_errors(path):
            kept = [line for line in self._read() if _step_of(line) <= first] if first else []
            write_file(path, "".join(kept))
        self.size = os.path.getsize(path)  # of the lines that are whole

    def _read(self) -> list[str]:
        """The lines that are whole: the last one may have been cut by a kill."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return [line for line in file if line.endswith("}\n")]

    def add(self, **values) -> None:
        """Append a line; what is no finite number is null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.waiting += json.dumps(values, ensure_ascii=False) + "\n"
        try:
            self._append()
        except OSError as error:
            if not self.warned:
                say(f"warning: {self.path} cannot be written ({error.strerror}); its lines are kept and tried again")
            self.warned = True

    def _append(self) -> None:
        if not self.waiting:
            return
        content = self.waiting.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.size)  # half a line would make the next one unreadable too
            raise
        self.size += len(content)
        self.waiting = ""

    def close(self) -> None:
        """Try what is left once more, and say if it is lost."""
        try:
            self._append()
        except OSError as error:
            say(f"warning: {self.path} lacks its last {self.waiting.count(chr(10))} lines ({error.strerror})")


def _step_of(line: str) -> float:
    """Of a line of such a file; infinite if it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


class Curves:
    """TensorBoard's files below a training's folder; without them the training goes on. For rank 0 alone.

    Args:
        first: the step where the run goes on; 0 for a new one.
    """

    def __init__(self, folder: str, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.writer = folder, None
        with self._errors():
            self.writer = SummaryWriter(folder, purge_step=first + 1 if first else None)

    def add(self, group: str, values: dict[str, float], step: int) -> None:
        """Add values under group/name."""
        if self.writer is None:
            return
        with self._errors():
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            with self._errors():
                self.writer.close()

    @contextlib.contextmanager
    def _errors(self):
        """TensorBoard writes in a thread of its own, whose error is raised here, now or by the next call."""
        try:
            yield
        except OSError as error:
            self.writer = None
            say(
                f"warning: TensorBoard's files in {self.folder} cannot be written ({error.strerror or error}); the "
                "training goes on without them, log.jsonl has the same figures"
            )


class RunLog:
    """Progress of a training run: a bar and lines on rank 0; log.jsonl and TensorBoard files under output_dir.

    Args:
        engine: DeepSpeed's; it counts the steps.
        args: of train.py.
        total_steps: optimiser steps of the run.
        flops: what the method needs.
        peak: operations a second that a device can do; utilisation is a share of it.
    """

    def __init__(self, engine, args, total_steps: int, flops: Flops, peak: float):
        self.engine, self.total_steps, self.flops, self.peak = engine, total_steps, flops, peak
        self.output_dir, self.epochs, self.every = args.output_dir, args.num_train_epochs, args.show_loss_step
        self.lr = engine.get_lr()[0]  # of the step under way
        self.losses: list[float] = []  # of the steps since the last line
        self.work = torch.zeros(3, dtype=torch.float64)  # tokens, samples, operations since the last line, this rank
        self.whole = torch.zeros(4, dtype=torch.float64)  # the same of the run, all ranks together; seconds
        self.history: list[tuple[int, float]] = []  # (step, loss), every line printed
        self.curves = self.file = self.bar = None  # but on rank 0

    def state(self) -> dict[str, torch.Tensor]:
        """What a training state keeps."""
        whole = self.whole.clone()
        whole[3] += time.perf_counter() - self.start
        return {"losses": torch.tensor(self.losses, dtype=torch.float64), "work": self.work, "whole": whole}

    def set_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Undo `state`, after the engine has gone to its place."""
        self.losses, self.work, self.whole = tensors["losses"].tolist(), tensors["work"], tensors["whole"]
        self.lr = self.engine.get_lr()[0]

    def begin(self) -> None:
        """Start the clock."""
        self.start = self.last = time.perf_counter()
        self.first = self.engine.global_steps  # 0, or where the run goes on
        if is_main():
            self.curves = Curves(os.path.join(self.output_dir, "tensorboard"), self.first)
            self.file = JsonLines(os.path.join(self.output_dir, "log.jsonl"), self.first)
            # without the bar's own guess of the time left: the lines have the better one, and the two would disagree
            self.bar = tqdm(
                total=self.total_steps, initial=self.first, disable=not sys.stderr.isatty(), leave=False,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}", dynamic_ncols=True,
            )  # fmt: skip

    @contextlib.contextmanager
    def paused(self):
        """Time within is not the training's."""
        before = time.perf_counter()
        yield
        away = time.perf_counter() - before
        self.start, self.last = self.start + away, self.last + away

    def write(self, group: str, values: dict[str, float], step: int) -> None:
        """Add values to the TensorBoard files."""
        if self.curves is not None:
            self.curves.add(group, values, step)

    def add(self, step, epoch: int) -> None:
        """Take note of an optimiser step (stops.Step)."""
        if not math.isnan(step.loss):
            self.losses.append(step.loss)
        for batch in step.batches:
            if batch.samples:
                flops = self.flops.of(batch["segments"], len(batch["answer_positions"]))
                self.work += torch.tensor((batch.tokens, batch.samples, flops), dtype=torch.float64)
        if self.bar is not None:
            self.bar.update(1)
        done = self.engine.global_steps
        if done % self.every == 0 or done == self.total_steps:
            self._line(epoch)
        self.lr = self.engine.get_lr()[0]

    def _line(self, epoch: int) -> None:
        """Gather the figures since the last line from all ranks, then print and write them."""
        steps, ranks = self.engine.global_steps, torch.distributed.get_world_size()
        torch.distributed.all_reduce(self.work, group=control_group())
        self.whole[:3] += self.work
        now = time.perf_counter()
        speed, samples, flops = (self.work / (now - self.last)).tolist()
        used = flops / ranks / self.peak
        loss = sum(self.losses) / len(self.losses) if self.losses else math.nan
        norm = self.engine.get_global_grad_norm()
        norm = float(norm) if norm is not None else math.nan
        memory = memory_used()
        self.history.append((steps, loss))
        self.losses = []
        self.work.zero_()
        self.last = now
        if self.file is None:
            return
        left = duration((now - self.start) / (steps - self.first) * (self.total_steps - steps))
        say(
            f"epoch {epoch}/{self.epochs} step {steps}/{self.total_steps} loss {loss:.4f} lr {self.lr:.3g} "
            f"grad_norm {norm:.3g} {speed:.0f} tokens/s {memory / 2**30:.2f} GiB left {left}"
        )
        self.bar.set_postfix_str(f"loss {loss:.4f}, left {left}")
        values = {"loss": loss, "lr": self.lr, "grad_norm": norm, "memory_gib": memory / 2**30}
        values |= {"tokens_per_second": speed, "samples_per_second": samples, "utilisation": used}
        self.write("train", values, steps)
        done = dict(zip(("tokens", "samples", "operations"), self.whole.tolist(), strict=False))
        seconds = self.whole[3].item() + now - self.start
        self.file.add(step=steps, epoch=epoch, **values, **done, seconds=seconds)

    def close(self, **more) -> None:
        """The last line of figures; the same and `more` for programs, in SUMMARY."""
        if self.file is None:
            return
        self.bar.close()
        self.curves.close()
        self.file.close()
        tokens, samples, flops, before = self.whole.tolist()
        seconds = before + time.perf_counter() - self.start
        ranks = torch.distributed.get_world_size()
        more |= {"steps": self.engine.global_steps, "samples": samples, "tokens": tokens, "seconds": seconds}
        more |= {"tokens_per_second": tokens / seconds, "memory_gib": memory_used() / 2**30}
        path = os.path.join(self.output_dir, SUMMARY)
        try:
            write_file(path, json.dumps(more, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            say(f"warning: {path} cannot be written ({error.strerror})")
        say(
            f"done: {samples:.0f} samples, {tokens:.0f} tokens in {duration(seconds)}, "
            f"{tokens / seconds:.0f} tokens/s, {flops / seconds / ranks / 1e12:.3g} TFLOP/s a device, "
            f"{flops / seconds / ranks / self.peak:.0%} of its {self.peak / 1e12:.3g} in a matrix product"
        )


def next_steps(args, last: str, best: str | None) -> list[str]:
    """What to type after a training: lines for the terminal.

    Args:
        args: of train.py.
        last: folder of the last result.
        best: what makes the best one in output_dir/best that; None without validation.
    """
    folder = os.path.join(args.output_dir, "best") if best else last
    here = os.path.relpath(ROOT)
    result = ["--mode", args.mode, "--model_path", folder]
    answers = args.eval_path or "FILE"
    commands = [["predict.py", *result, "--predict_path", answers, "--max_src_len", str(args.max_src_len)]]
    if args.train_type == "lora":
        model = ["--ori_model_dir", args.model_name_or_path, "--model_dir", folder]
        commands.append(["merge_lora.py", "--mode", args.mode, *model])
    typed = [shlex.join(["python", os.path.normpath(os.path.join(here, script)), *rest]) for script, *rest in commands]
    lines = [f"{best}, in {folder}"] if best else []
    return [*lines, f"last: {last}", "next: " + "\n      ".join(typed)]


def duration(seconds: float) -> str:
    """As 0:01:05 or 123:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def memory_used() -> float:
    """Most bytes of device memory allocated so far by this process; of main memory on a CPU."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return get_accelerator().max_memory_allocated()
