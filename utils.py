"""What the scripts share: start-up, loading, logging, saving."""

import contextlib
import ctypes
import datetime
import fcntl
import functools
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import socket
import sys
import threading
import time
import traceback
import warnings

import deepspeed
import torch
import torch.utils.cpp_extension
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from tqdm import tqdm

from adapter import write_adapter
from errors import UserError
from folders import FolderError, new_folder, write_errors, write_file
from glm_models import MODE, CheckpointError, check_family
from glm_models.checkpoint import write_side_files, write_weights
from glm_models.families import check_ids
from glm_models.modeling import has_lost_prefix
from throughput import Flops
from zero3 import load_partitioned

# Start-up


def quiet(verbose: bool) -> None:
    """Leave the terminal to the run's own lines: what the libraries chatter is dropped, their errors are not."""
    if verbose:
        return
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for name in ("torch.distributed", "torch.utils.cpp_extension", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_distributed(verbose: bool) -> tuple[int, int]:
    """Join the launcher's other processes, or be a group of one without a launcher. Returns rank and world size."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.utils.cpp_extension.FileBaton = CompileLock
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):  # "built successfully"
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=verbose)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def keep_freed_memory() -> None:
    """On a CPU, let malloc keep what a step frees for the next one, as a GPU's allocator does.

    glibc's gives tensors above 32 MiB back to the system, and all that is free at the end of the heap: to fault it in
    again takes 5 % of a step. (Options of mallopt(3); other C libraries have none.)
    """
    libc = ctypes.CDLL(None)
    if get_accelerator().device_name() == "cpu" and hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never


class CompileLock:
    """In the place of torch's FileBaton, which keeps processes from compiling the same operation at once.

    Torch's is a file that is there or not: a process that is killed while it loads DeepSpeed's operations leaves it,
    and every later one waits for ever. This one is a lock on that file, which ends with the process that has it.
    """

    def __init__(self, path: str, *_, **__):
        self.path, self.handle = path, None

    def _acquire(self, wait: bool) -> bool:
        while True:
            handle = os.open(self.path, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(handle)
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    self.handle = handle
                    return True
            os.close(handle)  # the one before has just removed it

    def try_acquire(self) -> bool:
        """Whether this process has it now."""
        return self._acquire(wait=False)

    def wait(self) -> None:
        """Return when nobody has it."""
        self._acquire(wait=True)
        self.release()

    def release(self) -> None:
        """Give it back, and remove the file, for programs that use torch's."""
        os.remove(self.path)
        os.close(self.handle)


@functools.cache
def control_group() -> torch.distributed.ProcessGroup:
    """A group of all ranks for what they have to tell each other on the CPU, without a word to the devices."""
    # the devices' group waits ten minutes at most (NCCL), and a large file takes longer to prepare or to write
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def _once(action, runs_it: bool) -> list:
    """Outcomes of `action()` by rank, of those that run it; the others wait.

    Raises:
        Exception: of the first rank that failed, on all ranks.
    """
    result = error = None
    if runs_it:
        try:
            result = action()
        except Exception as caught:
            error = caught
    outcomes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, (result, error), control_group())
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def once_per_node(action):
    """What `action()` returns on the first process of this node, which alone runs it; the others wait for it.

    Raises:
        Exception: that of the first such process that failed, on all processes of all nodes.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    return _once(action, local_rank == 0)[torch.distributed.get_rank() - local_rank]


def on_rank_0(action):
    """What `action()` returns on rank 0, which alone runs it; the others wait for it.

    Raises:
        Exception: that of rank 0, on all.
    """
    return _once(action, torch.distributed.get_rank() == 0)[0]


def trim_deepspeed() -> None:
    """Let DeepSpeed's ZeRO-1 and 2 hold less of gradients. No number changes by it.

    Two copies of each, one at a time, go: 10 GiB for a weight of 592 million. One is float64, for the gradient's norm;
    float32 sums do for that. The other has the type of the buffer to which the gradient is then added; torch adds
    across types without it.

    A gradient that is larger than a bucket is reduced as soon as it is there, and freed as soon as it is reduced;
    see `_reduce_gradient`.
    """
    get_accelerator().is_fp64_supported = lambda: False

    def add(output, source):
        if output is not None:
            output.add_(source)

    DeepSpeedZeroOptimizer._add_to_grad_partition_buffer = staticmethod(add)
    DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads = _reduce_gradient


_put_in_bucket = DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads


def _reduce_gradient(self, param, group: int) -> None:
    """Take a gradient that is complete: into the bucket, or, if it is larger than that, over the ranks at once.

    DeepSpeed reduces such a one when the next gradient comes. What belongs to this rank it has then added to float32
    sums or copied to a buffer of its own, but beside the sums it keeps the gradient to the end of the backward pass.
    """
    _put_in_bucket(self, param, group)
    kind = self.get_param_comm_dtype(param)
    if kind not in self.extra_large_param_to_reduce:
        return
    if self.overlap_comm and not get_accelerator().resolves_data_dependency():
        # else its memory could be given to the backward pass while the other stream still reads it
        self.get_gradient_for_reduction(param).record_stream(self.reduction_stream)
    self.reduce_ipg_grads(comm_dtype=kind)
    # in float32 sums, or in main memory; in neither case the gradient itself is not in the autograd's memory any more
    if self.cpu_offload or self._use_compact_grad_partition_buffer(group):
        self.clear_grad_attribute(param)


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


ENDING = threading.Event()  # this process is about to end with an error that it tells itself
LATER = 75  # exit code of a run that can go on; "temporary failure" in sysexits.h


class StopTraining(Exception):
    """The run ends here.

    exit_code: of the process; stops.py has the list.
    everyone: all ranks end so, together, and rank 0 says why.
    """

    def __init__(self, exit_code: int, message: str, everyone: bool = True):
        super().__init__(message)
        self.exit_code, self.everyone = exit_code, everyone


@contextlib.contextmanager
def clear_errors(*kinds: type[Exception]):
    """End with one line and exit code 2 on errors that the user can put right, and as a StopTraining says; others keep
    their traceback.

    Most such errors meet every rank at once; then rank 0 speaks for all. One that meets a single other rank is told by
    that rank after a moment, in which the launcher would have ended it if rank 0 had failed too.
    """
    try:
        yield
        return
    except StopTraining as stop:
        code, message, everyone = stop.exit_code, f"{'error: ' * (stop.exit_code < LATER)}{stop}", stop.everyone
    except (UserError, CheckpointError, FolderError, *kinds) as error:
        code, message, everyone = 2, f"error: {error}", False
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        code, message, everyone = 1, traceback.format_exc().rstrip(), False
        if re.search("closed by peer|connection reset|broken pipe", str(error), re.IGNORECASE):
            message = "error: the connection to another process of this training is lost; see what that one says"
    ENDING.set()
    if is_main() or not everyone:
        if not is_main():
            time.sleep(3)
            message = f"[rank {os.environ['RANK']}] {message}"
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()  # else a report in a pipe would be lost
    # not sys.exit: a process group whose other ranks wait in a collective would not let the interpreter end
    os._exit(code)


def set_seed(seed: int) -> None:
    """Seed every generator in use."""
    random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def device() -> torch.device:
    """The device of this process."""
    return torch.device(get_accelerator().current_device_name())


def supports_bf16() -> bool:
    """Whether this device computes in bf16. GPUs before Ampere only emulate it: slowly, and without fused attention."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(get_accelerator().is_bf16_supported())


def supports_fp16() -> bool:
    """Whether this device computes in fp16. All GPUs do, and CPUs with AVX512-FP16 or AMX."""
    return bool(get_accelerator().is_fp16_supported())


# Loading


def load_tokenizer(mode: str, folder: str):
    """The tokenizer of a checkpoint folder, its ids held against those of config.json."""
    check_family(folder, mode)
    tokenizer = MODE[mode].tokenizer.from_pretrained(folder)
    for odd in check_ids(MODE[mode].config.from_pretrained(folder), tokenizer, folder):
        say(f"warning: {odd}")
    return tokenizer


def load_base(
    mode: str, folder: str, dtype: torch.dtype, ds_config: dict | None = None, attention: str = "sdpa", **config
):
    """The model of a checkpoint folder, in `dtype`; partitioned over the ranks while it loads under ZeRO-3.

    Args:
        ds_config: of the training run; None outside training.
        attention: implementation in transformers' registry.
        config: keys of config.json to set differently.
    """
    family = MODE[mode]
    check_family(folder, mode)
    # On Hopper and Blackwell torch would take cuDNN's attention first, which makes a plan for each new length, of tens
    # of milliseconds, and keeps all plans; on Blackwell it is wrong for fewer than 8 heads of keys (pytorch #193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    zero3 = bool(ds_config) and ds_config["zero_optimization"].get("stage") == 3
    new_prefix = config.get("pre_seq_len") is not None
    if new_prefix and has_lost_prefix(folder):
        say(f"warning: config.json of {folder} names a P-Tuning prefix that its weights lack; a new one is made")
    config = family.config.from_pretrained(folder, use_cache=ds_config is None, **config)
    try:
        if zero3:
            model = load_partitioned(family.model, folder, config, dtype, attention, ds_config, new_prefix)
        else:
            model = family.model.from_pretrained(
                folder, config=config, new_prefix=new_prefix, dtype=dtype, attn_implementation=attention
            )
    except ImportError as error:  # a package that the attention implementation needs
        raise UserError(f"--attn_implementation {attention}: {error}") from None
    model.zero3 = zero3
    return model


def named_device(name: str | None) -> torch.device:
    """The device of a --device flag: as cuda, cuda:1 or cpu, or a number; None for the accelerator, else the CPU.

    Raises:
        UserError: it is not there.
    """
    name = name or get_accelerator().current_device_name()
    try:
        found = torch.device(f"{get_accelerator().device_name()}:{name}" if name.isdigit() else name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(f"--device {name} is not there") from None
    return found


# Saving


def gathered(named_parameters):
    """Yield (name, whole tensor) of parameters that ZeRO-3 may have partitioned, one at a time; on every rank alike."""
    for name, parameter in named_parameters:
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        else:
            yield name, parameter.data


def save_model(model, tokenizer, base: str, folder: str, dtype: torch.dtype) -> None:
    """Write what training made: the adapter alone for LoRA, else a complete model folder. Called on every rank.

    All ZeRO stages write the same files. One tensor is gathered at a time, and rank 0 holds one shard.

    Args:
        model: beside an adapter goes its `base_record`, see adapter.record_base.
        base: the checkpoint folder that training started from; config, tokenizer and official code come from there.
    """
    if hasattr(model, "peft_config"):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in gathered(trained)}
        if is_main():
            with new_folder(folder) as partial:
                write_adapter(partial, model, tensors, base, model.base_record)
    else:
        save_full_model(model, tokenizer, base, folder, dtype)
    on_rank_0(lambda: None)  # the others wait, on the CPU: devices would give up before a large file is on a slow disk


def save_full_model(model, tokenizer, base: str, folder: str, dtype: torch.dtype) -> None:
    """Write a complete model folder in the official layout."""
    parameters = list(model.named_parameters(remove_duplicate=False))  # a tied output layer too: other tools want it
    buffers = model.official_buffers()
    count = sum(getattr(p, "ds_numel", p.numel()) for _, p in parameters)
    total = count * dtype.itemsize + sum(b.numel() * b.element_size() for b in buffers.values())
    whole = gathered(parameters)
    if not is_main():
        for _ in whole:  # takes part in gathering, and copies nothing
            pass
        return

    tensors = ((name, tensor.to("cpu", dtype)) for name, tensor in whole)
    keys = ("pre_seq_len", "prefix_projection") if model.config.pre_seq_len else ()
    prefix = {key: getattr(model.config, key) for key in keys}
    with new_folder(folder) as partial:
        write_weights(partial, itertools.chain(tensors, buffers.items()), total)
        write_side_files(partial, base, model.mode, dtype, tokenizer.stop_token_ids, **prefix)


# Logging


class JsonLines:
    """A file with a JSON object a line that grows as a run goes on, "step" among its keys. For rank 0 alone.

    Lines of an earlier run, or of steps after the one where this run goes on, go first.

    Args:
        first: the step where the run goes on; 0 for a new one.
    """

    def __init__(self, path: str, first: int):
        self.path = path
        with write_errors(path):
            kept = [line for line in self._read() if json.loads(line)["step"] <= first] if first else []
            write_file(path, "".join(kept))

    def _read(self) -> list[str]:
        """The lines that are whole: the last one may have been cut by a kill."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return [line for line in file if line.endswith("}\n")]

    def add(self, **values) -> None:
        """Append a line; what is no finite number is null.

        Raises:
            FolderError: it cannot be written.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


class RunLog:
    """Progress of a training run: a bar and lines on rank 0; log.jsonl and TensorBoard files under output_dir.

    Args:
        engine: DeepSpeed's; it counts the steps.
        total_steps: optimiser steps of the run.
        every: optimiser steps between two lines.
        flops: what the method needs.
        peak: operations a second that a device can do; utilisation is a share of it.
    """

    def __init__(self, engine, output_dir: str, total_steps: int, every: int, flops: Flops, peak: float):
        self.engine, self.every, self.total_steps, self.flops, self.peak = engine, every, total_steps, flops, peak
        self.output_dir = output_dir
        self.lr = engine.get_lr()[0]  # of the step under way
        self.losses: list[float] = []  # of the steps since the last line
        self.work = torch.zeros(3, dtype=torch.float64)  # tokens, samples, operations since the last line, this rank
        self.whole = torch.zeros(4, dtype=torch.float64)  # the same of the run, all ranks together; seconds
        self.history: list[tuple[int, float]] = []  # (step, loss), every line printed
        self.writer = self.bar = None

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
            from torch.utils.tensorboard import SummaryWriter

            folder = os.path.join(self.output_dir, "tensorboard")
            self.writer = SummaryWriter(folder, purge_step=self.first + 1 if self.first else None)
            self.file = JsonLines(os.path.join(self.output_dir, "log.jsonl"), self.first)
            self.bar = tqdm(
                total=self.total_steps, initial=self.first, unit="step", disable=not sys.stderr.isatty(), leave=False
            )

    @contextlib.contextmanager
    def paused(self):
        """Time within is not the training's."""
        before = time.perf_counter()
        yield
        away = time.perf_counter() - before
        self.start, self.last = self.start + away, self.last + away

    def write(self, group: str, values: dict[str, float], step: int) -> None:
        """Add values to the TensorBoard files."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

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
        if self.writer is None:
            return
        left = (now - self.start) / (steps - self.first) * (self.total_steps - steps)
        say(
            f"epoch {epoch} step {steps}/{self.total_steps} loss {loss:.4f} lr {self.lr:.3g} grad_norm {norm:.3g} "
            f"{speed:.0f} tokens/s {samples:.3g} samples/s {used:.0%} of peak, memory {memory / 2**30:.2f} GiB "
            f"left {time.strftime('%H:%M:%S', time.gmtime(left))}"
        )
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{self.lr:.3g}", tokens_s=f"{speed:.0f}")
        values = {"loss": loss, "lr": self.lr, "grad_norm": norm, "memory_gib": memory / 2**30}
        values |= {"tokens_per_second": speed, "samples_per_second": samples, "utilisation": used}
        self.write("train", values, steps)
        done = dict(zip(("tokens", "samples", "operations"), self.whole.tolist(), strict=False))
        seconds = self.whole[3].item() + now - self.start
        self.file.add(step=steps, epoch=epoch, **values, **done, seconds=seconds)

    def close(self) -> None:
        if self.writer is None:
            return
        self.bar.close()
        self.writer.close()
        tokens, samples, flops, before = self.whole.tolist()
        seconds = before + time.perf_counter() - self.start
        ranks = torch.distributed.get_world_size()
        say(
            f"done: {samples:.0f} samples, {tokens:.0f} tokens in {time.strftime('%H:%M:%S', time.gmtime(seconds))}, "
            f"{tokens / seconds:.0f} tokens/s, {flops / seconds / ranks / 1e12:.3g} TFLOP/s a device, "
            f"{flops / seconds / ranks / self.peak:.0%} of its {self.peak / 1e12:.3g} in a matrix product"
        )


def memory_used() -> float:
    """Most bytes of device memory allocated so far by this process; of main memory on a CPU."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return get_accelerator().max_memory_allocated()
