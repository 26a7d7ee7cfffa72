"""Every change that this project makes to DeepSpeed, torch and the C library.

None of them changes a result, but for the rounding of the gradients' norm.

`PATCHES` is the table: what is replaced, who calls it, why, and in which version that was read. `apply` puts all of it
in place, once, before the processes meet. Two settings stand below the table: one is for prediction too, the other must
wait until the model is loaded. peft is left as it is: its LoraConfig accepts layers of other projects (lora/layers.py).
What torch reads before it is imported is in tuning/environment.py.
"""

import contextlib
import ctypes
import fcntl
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import deepspeed
import torch
import torch.utils.cpp_extension
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from utils import wait_for_all

comm_backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm it is torch itself


# Gradients of ZeRO-1 and 2. With DeepSpeed's own functions, two more copies of each gradient exist for a moment: 10 GiB
# for a weight of 592 million numbers.


def _add(output: torch.Tensor | None, source: torch.Tensor) -> None:
    """Add across types: DeepSpeed first makes a copy of `source` in the type of `output`, which torch does not need."""
    if output is not None:
        output.add_(source)


_put_in_bucket = DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads
# What `_reduce_gradient` takes for granted of the optimizer, besides what it replaces.
NEEDED_TO_REDUCE = (
    "get_param_comm_dtype",
    "get_gradient_for_reduction",
    "reduce_ipg_grads",
    "clear_grad_attribute",
    "_use_compact_grad_partition_buffer",
)


def _reduce_gradient(self, param, group: int) -> None:
    """Put a complete gradient into the bucket; one larger than the bucket is reduced over the ranks and freed at once.

    DeepSpeed reduces a large one only when the next gradient comes. It has then added this rank's part to float32 sums
    or copied it to a buffer, but it keeps the gradient beside the sums until the backward pass ends.
    """
    _put_in_bucket(self, param, group)
    kind = self.get_param_comm_dtype(param)
    if kind not in self.extra_large_param_to_reduce:
        return
    if self.overlap_comm and not get_accelerator().resolves_data_dependency():
        # otherwise its memory could be given to the backward pass while the other stream still reads it
        self.get_gradient_for_reduction(param).record_stream(self.reduction_stream)
    self.reduce_ipg_grads(comm_dtype=kind)
    # with float32 sums or with offload, the gradient itself is no longer in autograd's memory
    if self.cpu_offload or self._use_compact_grad_partition_buffer(group):
        self.clear_grad_attribute(param)


# Starting processes


class CompileLock:
    """A lock that ends with the process that holds it; in place of torch's FileBaton, with the same methods.

    It keeps processes from compiling the same operation at once. Torch's lock is a file that exists or not: a process
    that is killed while it loads DeepSpeed's operations leaves the file, and every later process waits forever. This
    one is a lock (flock) on that file.
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
            os.close(handle)  # the process before has just removed it

    def try_acquire(self) -> bool:
        """Whether this process holds the lock now."""
        return self._acquire(wait=False)

    def wait(self) -> None:
        """Return when no process holds the lock."""
        self._acquire(wait=True)
        self.release()

    def release(self) -> None:
        """Give the lock back, and remove the file for programs that use torch's."""
        os.remove(self.path)
        os.close(self.handle)


_norm_of = bf16_optimizer.get_global_norm_of_tensors


def _norm_of_any(input_tensors: list[torch.Tensor], **how):
    """DeepSpeed's function cannot be asked about no tensors."""
    nothing = [torch.zeros((), device=get_accelerator().current_device_name())]
    return _norm_of(input_tensors=input_tensors or nothing, **how)


# Waiting for files


def _barrier(group=None, **how) -> None:
    """DeepSpeed's barrier; that of all ranks has no timeout to speak of."""
    if group is None:
        wait_for_all()
    else:
        _barrier_of(group=group, **how)


_barrier_of = deepspeed.comm.barrier
_gather_small = DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue


def _gather_small_together(self) -> None:
    """Gather the small weights again when all ranks have read or written their files."""
    wait_for_all()
    _gather_small(self)


# The table


class Patch(NamedTuple):
    """A name of a library that is replaced.

    owner, name: the module, class or object, and its attribute.
    new: what takes its place.
    used_by: the library's function that calls it.
    needs: other attributes of `owner` that `new` relies on.
    version: package and release in which all of this was read; with another one, read it again.
    """

    owner: object
    name: str
    new: object
    used_by: Callable
    why: str
    version: tuple[str, str]
    needs: tuple[str, ...] = ()


DEEPSPEED, TORCH = ("deepspeed", "0.19"), ("torch", "2.13")
PATCHES = (
    Patch(
        get_accelerator(), "is_fp64_supported", lambda: False, zero_utils.get_norm_dtype,
        "ZeRO-1 and 2 copy each gradient to float64 for the norm; float32 sums are enough", DEEPSPEED,
    ),
    Patch(
        DeepSpeedZeroOptimizer, "_add_to_grad_partition_buffer", staticmethod(_add),
        DeepSpeedZeroOptimizer._add_full_reduction_to_compact_grad_partition,
        "a copy of each gradient in the type of the buffer is not needed", DEEPSPEED,
    ),
    Patch(
        DeepSpeedZeroOptimizer, "reduce_independent_p_g_buckets_and_remove_grads", _reduce_gradient,
        DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads,
        "gradients larger than a bucket are kept until the backward pass ends", DEEPSPEED, NEEDED_TO_REDUCE,
    ),
    Patch(
        bf16_optimizer, "get_global_norm_of_tensors", _norm_of_any, bf16_optimizer.BF16_Optimizer.step.__wrapped__,
        "a stage of a pipeline has no gradients for the norm if an earlier stage counts all that it trains", DEEPSPEED,
    ),
    Patch(
        comm_backend, "build_shm_op", lambda: None, comm_backend.TorchBackend.__init__,
        "sums through shared memory, which only tensor-parallel inference uses, need 66 MiB of /dev/shm per process "
        "and crash where there is less", DEEPSPEED, ("TorchBackend",),
    ),
    Patch(
        deepspeed.comm, "barrier", _barrier, DeepSpeedEngine.save_checkpoint,
        "ranks wait on the device for the one that writes or reads the largest file of a state, for ten minutes at "
        "most", DEEPSPEED,
    ),
    Patch(
        DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_epilogue", _gather_small_together,
        DeepSpeedEngine.save_checkpoint, "for the same reason", DEEPSPEED,
    ),
    Patch(
        torch.utils.cpp_extension, "FileBaton", CompileLock, torch.utils.cpp_extension._jit_compile,
        "the lock of a killed process would stop every later one", TORCH,
    ),
)  # fmt: skip


def apply() -> None:
    """Put all of PATCHES in place, and `avoid_cudnn_attention`. A second call changes nothing.

    Raises:
        RuntimeError: the installed library no longer has a name that is replaced or needed.
    """
    for patch in PATCHES:
        gone = [name for name in (patch.name, *patch.needs) if not hasattr(patch.owner, name)]
        if gone:
            package, version = patch.version
            raise RuntimeError(
                f"{patch.owner} has no {', '.join(gone)}, which tuning/engine/patches.py needs: it was written for "
                f"{package} {version}; install the versions of requirements.txt"
            )
        setattr(patch.owner, patch.name, patch.new)
    avoid_cudnn_attention()


# Settings


def avoid_cudnn_attention() -> None:
    """Keep torch from using cuDNN's attention; for prediction too, so load_base calls it.

    On Hopper and Blackwell torch 2.13 would prefer it. It makes a plan for each new length, which takes tens of
    milliseconds, and keeps all plans; on Blackwell it is wrong for fewer than 8 key-value heads (pytorch #193893).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def drop_copies_of_masters(optimizer) -> None:
    """With offload at ZeRO stage 1 and 2, send masters of the weights' type to the GPU as they are.

    DeepSpeed first copies them to a buffer of the weights' type in main memory: 12 GiB for a 6B model in bf16.
    """
    buffers = getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    for i, master in enumerate(getattr(optimizer, "single_partition_of_fp32_groups", [])[: len(buffers)]):
        if buffers[i].dtype == master.dtype:
            buffers[i] = master.detach()  # DeepSpeed's copy is one onto itself


def keep_freed_memory() -> None:
    """On a CPU, let malloc keep what a step frees for the next step, as a GPU's allocator does.

    Called when the model is loaded, so that memory used for loading goes back to the system first. glibc returns
    tensors above 32 MiB and free memory at the end of the heap; getting it back takes 5 % of a step. (Options of
    mallopt(3); other C libraries have none.)
    """
    libc = ctypes.CDLL(None)
    if get_accelerator().device_name() == "cpu" and hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)  # never
