"""What the scripts share: processes and ranks, printing on rank 0, seeds, devices."""

import contextlib
import datetime
import functools
import logging
import os
import random
import socket
import sys
import warnings

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from tuning.errors import UserError
from tuning.terminal import drop_output, visible


def silence_libraries(verbose: bool) -> None:
    """Silence the libraries, except for their errors, so that the terminal shows this project's lines alone."""
    if verbose:
        return
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for name in ("torch.distributed", "torch.utils.cpp_extension", "peft", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


DIFFERENCES = 5  # of two nodes, shown in a message


@functools.cache
def control_group() -> torch.distributed.ProcessGroup:
    """Gloo group for CPU-side messages between all ranks."""
    # NCCL's group times out after ten minutes; preparing or writing a large file can take longer
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def local_rank() -> int:
    """Number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _once(action, runs_it: bool) -> list:
    """Run `action()` on the ranks with `runs_it`, while the others wait. Returns the results by rank.

    Raises:
        Exception: that of the first rank that failed, on all ranks.
    """
    if not torch.distributed.is_initialized():  # one process without a launcher
        return [action()]
    result = error = None
    if runs_it:
        try:
            result = action()
        except Exception as caught:
            error = caught
    outcomes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, (result, error, socket.gethostname()), control_group())
    for _, error, host in outcomes:
        if error is not None:
            if host != outcomes[0][2] and error.args and isinstance(error.args[0], str):
                error.args = (f"on node {host}: {error.args[0]}", *error.args[1:])
            raise error
    return [result for result, _, _ in outcomes]


def once_per_node(action):
    """Run `action()` on the first process of each node, while the others wait. Returns its result on this node.

    Raises:
        Exception: that of the first such process that failed, on all processes of all nodes.
    """
    if not torch.distributed.is_initialized():  # one process without a launcher
        return action()
    return _once(action, local_rank() == 0)[torch.distributed.get_rank() - local_rank()]


def on_rank_0(action):
    """Run `action()` on rank 0, while the others wait. Returns its result on all ranks.

    Raises:
        Exception: that of rank 0, on all ranks.
    """
    return _once(action, is_rank_0())[0]


def tell_all(mine) -> list:
    """What each rank has said, by rank."""
    if not torch.distributed.is_initialized():  # one process without a launcher
        return [mine]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine, control_group())
    return everyone


def check_same(mine: dict[str, str]) -> None:
    """Compare the nodes by what their first processes say. Called on every rank.

    Args:
        mine: by the name that the user knows, as that of a file, what must be the same on all nodes.

    Raises:
        UserError: on all ranks; names the node and what differs there.
    """
    everyone = tell_all((socket.gethostname(), mine) if local_rank() == 0 else None)
    first, expected = everyone[0]
    for host, found in filter(None, everyone):
        lines = [
            f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} on {first}"
            for name in dict.fromkeys([*expected, *found])
            if found.get(name) != expected.get(name)
        ]
        if lines:
            more = [f"and {len(lines) - DIFFERENCES} more"] if len(lines) > DIFFERENCES else []
            raise UserError(
                "\n       ".join([f"node {host} differs from node {first}:", *lines[:DIFFERENCES], *more])
                + "\n       make them the same on all nodes, or use a disk that they share"
            )


def wait_for_all() -> None:
    """Wait until all ranks are here: before ranks meet on the device, after one of them may have worked alone.

    A collective of the device's group fails after ten minutes, and one rank can read or write longer.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier(control_group())


_stages = 1  # of the pipeline of this run, see cut_into_stages


def cut_into_stages(stages: int | None) -> None:
    """Say for this run that so many processes share one copy of the model, in the order of DeepSpeed's pipelines.

    Args:
        stages: None or 1 without a pipeline; else a divisor of the number of processes.
    """
    global _stages
    _stages = stages or 1


def stage_count() -> int:
    """How many processes share one copy of the model; 1 without a pipeline."""
    return _stages


def data_parallel_size() -> int:
    """How many processes, or groups of them that share one copy of the model, take different rows.

    All counts of rows and micro-batches use this, not the number of processes.
    """
    return torch.distributed.get_world_size() // _stages


def data_parallel_rank() -> int:
    """Number of this process, or of its group, among those that take different rows."""
    return torch.distributed.get_rank() % data_parallel_size()


def stage_rank() -> int:
    """Number of this process's stage of the pipeline, from 0 on; 0 without a pipeline."""
    return torch.distributed.get_rank() // data_parallel_size()


def is_rank_0() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def print_rank_0(message: str) -> None:
    """Print on rank 0, above the progress bar if there is one. If that fails, nothing is printed from then on."""
    if not is_rank_0():
        return
    try:
        tqdm.write(visible(message), file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:  # closed pipe or full disk: no reason to stop a training
        drop_output()
        with contextlib.suppress(OSError):
            print(f"warning: output stops here: {error.strerror}", file=sys.stderr, flush=True)


def set_seed(seed: int) -> None:
    """Seed the random generators of Python, torch and the device."""
    random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def device() -> torch.device:
    """The device of this process."""
    return torch.device(get_accelerator().current_device_name())


def supports_bf16() -> bool:
    """Whether this device computes in bf16. GPUs before Ampere emulate it: slowly, and without fused attention."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(get_accelerator().is_bf16_supported())


def supports_fp16() -> bool:
    """Whether this device computes in fp16. All GPUs do, and CPUs with AVX512-FP16 or AMX."""
    return bool(get_accelerator().is_fp16_supported())
