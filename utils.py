"""What the scripts share: processes, loading, saving."""

import contextlib
import ctypes
import datetime
import functools
import itertools
import logging
import os
import random
import sys
import warnings

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from tqdm import tqdm

from adapter import write_adapter
from errors import UserError
from exits import drop_output, visible
from folders import new_folder
from glm_models import MODE, check_family
from glm_models.checkpoint import write_side_files, write_weights
from glm_models.families import check_ids
from glm_models.modeling import has_lost_prefix
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
