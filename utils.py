"""What the scripts share: processes, loading, saving."""

import contextlib
import datetime
import functools
import logging
import os
import random
import sys
import warnings

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from tuning.terminal import drop_output, visible

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


def data_parallel_size() -> int:
    """How many processes, or groups of them that share one copy of the model, take different rows.

    All counts of rows and micro-batches use this, not the number of processes.
    """
    return torch.distributed.get_world_size()


def data_parallel_rank() -> int:
    """Number of this process, or of its group, among those that take different rows."""
    return torch.distributed.get_rank()


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print on rank 0, above the progress bar if there is one. Where that fails, nothing is printed any more."""
    if not is_main():
        return
    try:
        tqdm.write(visible(message), file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:  # a pipe whose reader is gone, a full disk: no reason to end a training
        drop_output()
        with contextlib.suppress(OSError):
            print(f"warning: nothing more is printed: {error.strerror}", file=sys.stderr, flush=True)


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


# Saving
