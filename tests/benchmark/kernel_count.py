"""How many kernels one micro-batch launches on a GPU, counted without one.

    python tests/benchmark/kernel_count.py --json kernels.json

The CPU launches each kernel, which takes it some microseconds; with short rows a fast GPU waits for that.

The official model (28 layers, bf16) runs forward and backward on the meta device: gradient checkpointing, one row of 13
samples. Every ATen operation that autograd dispatches on a tensor of the device counts as one kernel, except views and
allocations; a copy from or to main memory counts too. What CUDA computes by one fused operation (attention, RMSNorm,
dropout) counts as one, also where the meta device has only a stand-in of several. So a few operations that launch
several kernels, as the backward pass of flash attention does, are counted too low. Not counted: DeepSpeed and the
optimizer. The GPU is one whose kernel takes a whole row of samples in one call: compute capability 8.0, half precision.

Waits: operations for which the CPU would wait until the device has done all before. They read a value or a size that
the device computes, or copy to or from main memory without non_blocking.
"""

import argparse
import collections
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train
import utils
from glm_models import MODE, ops
from tuning.plan import planner, trace

SAMPLES = 13
METHODS = {
    "lora": "--lora_module_name query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    "all": "",
    "ptuning": "--pre_seq_len 128 --prefix_projection True",
}
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_KERNELS = (*ALLOCATIONS, "_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
# stand-ins on the meta device, and this project's own functions, for what is one operation on CUDA
FUSED = (trace.FusedAttention, trace.FusedDropout, ops._RMSNorm)


class KernelCounter(TorchDispatchMode):
    """Counts the operations on a device by name; `waits` are those of them for which the CPU waits."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.paused = device, False
        self.kernels, self.waits = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            tensors = [x for x in tree_iter((args, kwargs, result)) if torch.is_tensor(x)]
            self.count(func, {x.device.type for x in tensors}, bool(kwargs and kwargs.get("non_blocking")))
        return result

    def count(self, func, devices: set[str], non_blocking: bool) -> None:
        name = func.overloadpacket.__name__
        if self.device not in devices or func.is_view or name in NO_KERNELS:
            return
        self.kernels[name] += 1
        if name in WAITS or (len(devices) > 1 and "copy" in name and not non_blocking):
            self.waits[name] += 1

    def as_one(self, name: str, function):
        """The function, counted as one kernel."""

        def call(*args):
            if self.paused:
                return function(*args)
            self.kernels[name] += 1
            self.paused = True
            try:
                return function(*args)
            finally:
                self.paused = False

        return staticmethod(call)


def count_kernels(model, batch: dict) -> KernelCounter:
    """Forward and backward of one micro-batch on the meta device."""
    counter = KernelCounter()
    with contextlib.ExitStack() as stack:
        for kind in FUSED:
            # attention's forward pass is an operation of its own: --keep_attention leaves it out where layers recompute
            for way in ("backward",) if kind is trace.FusedAttention else ("forward", "backward"):
                one = counter.as_one(f"{kind.__name__}.{way}", getattr(kind, way))
                stack.enter_context(mock.patch.object(kind, way, one))
        stack.enter_context(trace.meta_kernels(on_gpu=True))
        stack.enter_context(counter)
        model(**batch).loss.backward()
    return counter


def count_method(mode: str, method: str, tokens: int, layers: int | None = None, more: str = "") -> KernelCounter:
    """The count for one family and method.

    Args:
        tokens: of each sample; two thirds are the prompt.
        layers: None for the official number.
        more: flags of train.py.
    """
    config = MODE[mode].config(**({} if layers is None else {"num_layers": layers}))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        flags = f"--mode {mode} --train_type {method} --model_name_or_path {folder} --train_path {__file__} --plan "
        flags += f"--per_device_train_batch_size {SAMPLES} --max_len {tokens} --max_src_len {tokens * 2 // 3} "
        args = train.parse_args([*flags.split(), "--gradient_checkpointing", *METHODS[method].split(), *more.split()])
        setup = planner.plan_setup(args, 1)
    batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in setup.batch.items()}
    return count_kernels(setup.model, batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODE), choices=list(MODE), help="families")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="training methods")
    parser.add_argument("--tokens", type=int, default=150, help="tokens of each sample")
    parser.add_argument("--layers", type=int, help="layers of the model (default: the official number)")
    parser.add_argument("--keep_attention", action="store_true", help="as train.py's flag")
    parser.add_argument("--names", type=int, default=0, help="also list so many of the most frequent operations")
    parser.add_argument("--json", help="write all figures here")
    args = parser.parse_args()
    utils.silence_libraries(verbose=False)
    found = []
    print("| family | method | kernels | waits |\n|---|---|---|---|")
    for mode in args.modes:
        for method in args.methods:
            more = "--keep_attention" if args.keep_attention else ""
            counter = count_method(mode, method, args.tokens, args.layers, more)
            kernels, waits = counter.kernels.total(), counter.waits.total()
            found.append({"mode": mode, "method": method, "kernels": kernels, "waits": waits, **counter.kernels})
            print(f"| {mode} | {method} | {kernels:,} | {waits} |", flush=True)
            for name, count in counter.kernels.most_common(args.names):
                print(f"{count:>10,}  {name}")
            for name, count in counter.waits.items() if args.names else ():
                print(f"{count:>10,}  waits: {name}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
