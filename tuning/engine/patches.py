"""Every change that the project makes to DeepSpeed, torch and the C library."""

import ctypes

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


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
