"""The log of a training: progress bar and lines on the terminal, log.jsonl, TensorBoard files, summary.json.

None of these can stop a training: if one cannot be written, a warning says so and the training goes on.
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
from tuning.samples.data_files import find_files
from tuning.samples.epochs import RunLength
from utils import control_group, is_rank_0, print_rank_0, stage_rank

SUMMARY = "summary.json"  # of a finished training


class JsonLines:
    """A file that gets one JSON object per line, with "step" among its keys. On rank 0 only.

    Lines of an earlier run, and of steps after the one where this run resumes, are removed at the start. Lines that
    cannot be written, to a full disk for example, are kept and written with the next one.

    Args:
        first: the step from which the run resumes; 0 for a new run.

    Raises:
        FolderError: the file cannot be made.
    """

    def __init__(self, path: str, first: int):
        self.path, self.waiting, self.warned = path, "", False
        with write_errors(path):
            kept = [line for line in self._read() if _step_of(line) <= first] if first else []
            write_file(path, "".join(kept))
        self.size = os.path.getsize(path)  # of all complete lines

    def _read(self) -> list[str]:
        """All complete lines: a kill may have cut the last one."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return [line for line in file if line.endswith("}\n")]

    def add(self, **values) -> None:
        """Append a line; numbers that are not finite become null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.waiting += json.dumps(values, ensure_ascii=False) + "\n"
        try:
            self._append()
        except OSError as error:
            if not self.warned:
                print_rank_0(
                    f"warning: {self.path} cannot be written ({error.strerror}); its lines are kept and written later"
                )
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
                os.truncate(self.path, self.size)  # half a line would make the next line unreadable too
            raise
        self.size += len(content)
        self.waiting = ""

    def close(self) -> None:
        """Write the remaining lines; print a warning if they are lost."""
        try:
            self._append()
        except OSError as error:
            print_rank_0(f"warning: {self.path} lacks its last {self.waiting.count(chr(10))} lines ({error.strerror})")


def _step_of(line: str) -> float:
    """The step of a line; infinite if the line is not valid."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


class Curves:
    """TensorBoard files of a training; if they cannot be written, the training goes on. On rank 0 only.

    Args:
        first: the step from which the run resumes; 0 for a new run.
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
        """TensorBoard writes in its own thread, whose error is raised here by this call or the next one."""
        try:
            yield
        except OSError as error:
            self.writer = None
            print_rank_0(
                f"warning: TensorBoard's files in {self.folder} cannot be written ({error.strerror or error}); the "
                "training goes on without them, log.jsonl has the same figures"
            )


class RunLog:
    """Progress of a training: a bar and lines on rank 0; log.jsonl and TensorBoard files in output_dir.

    Args:
        engine: DeepSpeed's; it counts the steps.
        args: of train.py.
        length: epochs and optimizer steps of the run.
        flops: operations that the method needs.
        peak: operations per second of one device; utilisation is the share of it that is used.
    """

    def __init__(self, engine, args, length: RunLength, flops: Flops, peak: float):
        self.engine, self.flops, self.peak = engine, flops, peak
        self.total_steps, self.epochs = length.total_steps, length.epochs
        self.output_dir, self.every = args.output_dir, args.show_loss_step
        self.lr = engine.get_lr()[0]  # of the current step
        self.losses: list[float] = []  # of the steps since the last line
        self.work = torch.zeros(3, dtype=torch.float64)  # tokens, samples, operations since the last line
        self.whole = torch.zeros(4, dtype=torch.float64)  # of the whole run, on all ranks: the same, and seconds
        self.history: list[tuple[int, float]] = []  # (step, loss) of every printed line
        self.curves = self.file = self.bar = None  # set on rank 0

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for a training state."""
        whole = self.whole.clone()
        whole[3] += time.perf_counter() - self.start
        return {"losses": torch.tensor(self.losses, dtype=torch.float64), "work": self.work, "whole": whole}

    def set_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned, after the engine was restored."""
        self.losses, self.work, self.whole = tensors["losses"].tolist(), tensors["work"], tensors["whole"]
        self.lr = self.engine.get_lr()[0]

    def begin(self) -> None:
        """Start the clock."""
        self.start = self.last = time.perf_counter()
        self.first = self.engine.global_steps  # 0, or the step from which the run resumes
        if is_rank_0():
            self.curves = Curves(os.path.join(self.output_dir, "tensorboard"), self.first)
            self.file = JsonLines(os.path.join(self.output_dir, "log.jsonl"), self.first)
            # without the bar's own estimate of the time left, which would differ from the better one in the lines
            self.bar = tqdm(
                total=self.total_steps, initial=self.first, disable=not sys.stderr.isatty(), leave=False,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}", dynamic_ncols=True,
            )  # fmt: skip

    @contextlib.contextmanager
    def paused(self):
        """Do not count the time of the block as training time."""
        before = time.perf_counter()
        yield
        away = time.perf_counter() - before
        self.start, self.last = self.start + away, self.last + away

    def write(self, group: str, values: dict[str, float], step: int) -> None:
        """Add values to the TensorBoard files."""
        if self.curves is not None:
            self.curves.add(group, values, step)

    def add(self, step, epoch: int) -> None:
        """Add an optimizer step (health.Step) to the figures; each --show_loss_step steps, print and write them."""
        if not math.isnan(step.loss):
            self.losses.append(step.loss)
        for batch in step.batches:
            if batch.samples and stage_rank() == 0:  # the other stages of a pipeline have the same ones
                flops = self.flops.of(batch["segments"], len(batch["answer_positions"]))
                self.work += torch.tensor((batch.tokens, batch.samples, flops), dtype=torch.float64)
        if self.bar is not None:
            self.bar.update(1)
        done = self.engine.global_steps
        if done % self.every == 0 or done == self.total_steps:
            self._line(epoch)
        self.lr = self.engine.get_lr()[0]

    def _line(self, epoch: int) -> None:
        """Sum up the figures since the last line over all ranks, then print and write them."""
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
        print_rank_0(
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
        """Print the totals; write them and `more` to summary.json, for other programs."""
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
            print_rank_0(f"warning: {path} cannot be written ({error.strerror})")
        print_rank_0(
            f"done: {samples:.0f} samples, {tokens:.0f} tokens in {duration(seconds)}, "
            f"{tokens / seconds:.0f} tokens/s, {flops / seconds / ranks / 1e12:.3g} TFLOP/s per device, "
            f"{flops / seconds / ranks / self.peak:.0%} of its {self.peak / 1e12:.3g} in a matrix product"
        )


def next_steps(args, last: str, best: str | None) -> list[str]:
    """Lines that tell the user which commands come next.

    Args:
        args: of train.py.
        last: folder of the last result.
        best: why output_dir/best is the best result; None without validation.
    """
    folder = os.path.join(args.output_dir, "best") if best else last
    here = os.path.relpath(ROOT)
    result = ["--mode", args.mode, "--model_path", folder]
    answers = find_files(args.eval_path)[0][0].path if args.eval_path else "FILE"
    commands = [["predict.py", *result, "--predict_path", answers, "--max_src_len", str(args.max_src_len)]]
    if args.train_type == "lora":
        model = ["--ori_model_dir", args.model_name_or_path, "--model_dir", folder]
        commands.append(["merge_lora.py", "--mode", args.mode, *model])
    typed = [shlex.join(["python", os.path.normpath(os.path.join(here, script)), *rest]) for script, *rest in commands]
    lines = [f"{best}, in {folder}"] if best else []
    return [*lines, f"last: {last}", "next: " + "\n      ".join(typed)]


def duration(seconds: float) -> str:
    """Seconds as text: 0:01:05 or 123:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def memory_used() -> float:
    """Peak bytes of device memory that this process has allocated; of main memory on a CPU."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return get_accelerator().max_memory_allocated()
