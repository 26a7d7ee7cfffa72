"""What DeepSpeed allocates in addition to a model's own forward and backward pass, on one of several GPUs.

Taken from its runtime/zero/stage_1_and_2.py, stage3.py and partitioned_param_coordinator.py, and replayed into the
simulated caching allocator: partitions, master weights and moments, gradient buckets, gathered parameters,
temporary buffers of a step, offload. DeepSpeed is simulated with the patches of `tuning.engine.patches.apply`. Nothing
here was measured on a GPU.
"""

import itertools
from typing import NamedTuple

import torch
from deepspeed.runtime.config import DtypeEnum

from glm_models.quantized import quantized_layers
from tuning.engine.ds_config import holds_states_in_bf16
from tuning.errors import UserError
from tuning.plan.allocator import CachingAllocator
from tuning.plan.trace import Event, host_bytes, pinned_size

CUBLAS = 32 * 2**20  # workspace of cuBLAS on Hopper, from torch's allocator; 8 MiB on other GPUs


class Setup(NamedTuple):
    """A training as train.py would start it.

    model: on the meta device, in the compute dtype, in training mode.
    batch: arguments of the model, see `longest_batch`.
    ds_config: resolved, without "auto".
    groups: parameter groups of the optimizer.
    prefix_only: whether results are saved without the model, see --save_prefix_only.
    """

    model: torch.nn.Module
    batch: dict
    ds_config: dict
    groups: list[dict]
    prefix_only: bool = False


class Zero12Simulator:
    """Replays a trace into a caching allocator and adds the allocations of DeepSpeed, for ZeRO stages 1 and 2.

    Simulates an optimizer step that is not the first one: moments exist, and with gradient accumulation the gradients
    of earlier micro-batches. For stage 3 see zero3.py, which replaces the hooks from `allocate_states` on.

    Args:
        gpus: number of ranks; the rank that needs most memory is simulated.
        memory: the allocator.
        on_gpu: simulate a GPU; otherwise a CPU, for tests that compare with measurements: it adds numbers of
            different dtypes by way of a copy, and gloo copies what it sends.
    """

    def __init__(self, setup: Setup, gpus: int, memory: CachingAllocator, on_gpu: bool = True):
        self.gpus, self.setup, self.on_gpu = gpus, setup, on_gpu
        self.parameters = list(setup.model.parameters())  # tied ones once
        self.trained = [p for group in setup.groups for p in group["params"]]
        # the tensors of quantised weights, by the id of the parameter
        self.stored = {id(layer.weight): layer.stored() for layer in quantized_layers(setup.model)}
        config = setup.ds_config
        self.zero = config["zero_optimization"]
        self.stage = self.zero["stage"]
        self.item = self.parameters[0].element_size()
        kind = config.get("data_types", {}).get("grad_accum_dtype")
        # bytes per number in which gradients are accumulated
        self.sum_item = self.item if kind is None else DtypeEnum(kind).value.itemsize
        self.sums_apart = self.sum_item == 4 != self.item  # accumulated in one float32 buffer of this rank's partition
        self.master_item = 2 if holds_states_in_bf16(config) else 4  # bytes per master weight and per moment
        self.accumulates = config.get("gradient_accumulation_steps", 1) > 1
        self.takes_norm = config.get("gradient_clipping", 0) > 0 or self.zero.get("compute_grad_norm", True)
        self.norm_item = 4 if self.sum_item != 4 else 0  # the norm copies gradients to float32 one by one
        kind = str(config["optimizer"].get("type"))
        if kind.lower() not in ("adam", "adamw"):
            raise UserError(f"--plan supports the optimizers Adam and AdamW, not {kind}")
        optimizer = config["optimizer"].get("params", {})
        # torch's AdamW without "fused" works on lists of tensors and needs a temporary copy
        self.step_copy = self.master_item if optimizer.get("torch_adam") and not optimizer.get("fused") else 0
        self.offload = self._device("offload_optimizer")
        self.pin = (self.zero.get("offload_optimizer") or {}).get("pin_memory", True)
        self.bucket_size = int(self.zero.get("reduce_bucket_size", 5e8))
        self.memory = memory
        self.cpu = 0  # bytes of this rank in main memory
        self.cpu_once = 0  # additional ones while DeepSpeed sets up
        self.phase, self.peak_phase, self.seen_peak = "start", "", 0
        self.keys = itertools.count()
        self.held: set = set()  # gradient blocks that DeepSpeed still holds when autograd frees them
        self.in_bucket: list = []  # gradients that wait to be reduced
        # stages 1 and 2 only
        self.partitions: list[int] = []  # numbers of each group that this rank updates
        self.sums = self.part = None  # accumulated gradients of earlier micro-batches; those of this one
        self.buckets: list = []

    def _device(self, key: str) -> bool:
        return (self.zero.get(key) or {}).get("device", "none") != "none"

    def allocate(self, tag: str, size: float) -> tuple:
        """Allocate `size` bytes. Returns the key to free them."""
        key = ("deepspeed", next(self.keys))
        self.memory.alloc(key, int(size), tag)
        self._note()
        return key

    def free(self, *keys) -> None:
        for key in keys:
            self.memory.free(key)

    def count_host(self, size: float, pinned: bool = False) -> None:
        """Count main memory of this rank."""
        self.cpu += pinned_size(size) if pinned else int(size)

    def _note(self) -> None:
        if self.memory.peak_allocated > self.seen_peak:
            self.seen_peak, self.peak_phase = self.memory.peak_allocated, self.phase

    def replay(self, trace: list[Event]) -> None:
        """Simulate one optimizer step whose last micro-batch is the trace."""
        self.memory.alloc("cublas", CUBLAS, "buffers")
        for tensor in [*self.setup.model.buffers(), *filter(torch.is_tensor, self.setup.batch.values())]:
            self.allocate("buffers", tensor.numel() * tensor.element_size())
        self.allocate_states()
        self.phase = "forward and backward"
        late: set = set()  # blocks to free as soon as DeepSpeed no longer holds them
        self.cpu += host_bytes(trace)
        for event in trace:
            if event.tag == "host":
                continue
            if event.what == "alloc":
                self.memory.alloc(event.key, event.size, event.tag)
                self._note()
            elif event.what == "free":
                if event.key in self.held:
                    late.add(event.key)
                else:
                    self.memory.free(event.key)
            elif event.what == "gradient":
                self.on_gradient(event.key, event.block)
                self.free(*(late - self.held))
                late &= self.held
            else:
                self.on_module(event)
        self.end_of_backward()
        self.free(*(late - self.held))
        self.phase = "optimizer step"
        self.optimizer_step()
        self.free(*late)

    # Stages 1 and 2

    def allocate_states(self) -> None:
        """Allocate what exists before the step: weights, optimizer states, accumulated gradients."""
        trained = set(map(id, self.trained))
        for parameter in self.parameters:
            if id(parameter) not in trained:
                for tensor in self.stored.get(id(parameter), [parameter]):
                    self.allocate("weights", tensor.numel() * tensor.element_size())
        for group in self.setup.groups:
            numel = sum(p.numel() for p in group["params"])
            numel = -(-numel // (2 * self.gpus)) * 2 * self.gpus  # alignment for NCCL
            self.allocate("weights", numel * self.item)  # one flat buffer per group for trained weights
            self.partitions.append(numel // self.gpus)
            if self.offload:
                self.offload_group(numel // self.gpus)
                continue
            for _ in range(3):  # master weights and two moments
                self.allocate("optimizer", self.master_item * numel / self.gpus)
        self.slices, self.touched = self._worst_rank()
        if self.offload:
            largest = self.item * max(p.numel() for p in self.trained)
            self.allocate("buffers", largest)
            self.count_host(largest, self.pin)
            if self.accumulates and not self.sums_apart and self.master_item == 4:  # else in the masters' gradients
                for parameter in self.trained:
                    self.count_host(self.item * parameter.numel(), self.pin)
        if self.accumulates and (self.sums_apart or not self.offload):
            self.sums = self.allocate("gradients", self._sum_size())

    def offload_group(self, numel: int) -> None:
        """Main memory for this rank's partition of a parameter group."""
        for pinned in (self.pin, False, False):  # master weights and two moments
            self.count_host(self.master_item * numel, pinned)
        self.count_host(self.master_item * numel, self.pin)  # gradients
        copy = self.item * numel  # updated weights on their way to the GPU; see patches.drop_copies_of_masters
        if self.pin or self.item != self.master_item:  # torch keeps pinned memory that is freed
            self.count_host(copy, self.pin)
        if self.pin:  # created in pageable memory first
            self.cpu_once = max(self.cpu_once, self.master_item * numel)

    def _worst_rank(self) -> tuple[list[int], int]:
        """For the rank with most numbers: sizes of its pieces of parameters, and of all these parameters as a whole.

        A partition may start and end inside a parameter. Without float32 sums the buffer holds these as a whole.
        """
        worst: tuple[list[int], int] = ([], -1)
        for rank in range(self.gpus):
            slices, touched = [], 0
            for group, size in zip(self.setup.groups, self.partitions, strict=True):
                at, low, high = 0, rank * size, (rank + 1) * size
                for parameter in group["params"]:
                    piece = min(at + parameter.numel(), high) - max(at, low)
                    if piece > 0:
                        slices.append(piece)
                        touched += parameter.numel()
                    at += parameter.numel()
            if touched > worst[1]:
                worst = slices, touched
        return worst

    def _sum_size(self) -> int:
        """Bytes of this rank's accumulated gradients."""
        if self.stage == 1:
            return self.sum_item * sum(p.numel() for p in self.trained)
        return 4 * sum(self.partitions) if self.sums_apart else self.item * self.touched

    def on_gradient(self, parameter, block) -> None:
        """A gradient is complete. Autograd frees its block right after this, unless it is in `held`."""
        if not self.buckets:
            for _ in range(2 if self.zero.get("overlap_comm") else 1):
                self.buckets.append(self.allocate("buffers", self.bucket_size * self.item))
        if sum(p.numel() for p in self.in_bucket) + parameter.numel() > self.bucket_size:
            self.reduce_bucket()
        self.in_bucket.append(parameter)
        if parameter.numel() > self.bucket_size:  # reduced in place at once, then freed; cloned for offload
            clone = self.allocate("gradients", parameter.numel() * self.item if self.offload else 0)
            self.reduce_bucket()
            self.free(clone)

    def reduce_bucket(self) -> None:
        """Reduce the bucket over the ranks and keep this rank's part."""
        if not self.in_bucket:
            return
        numel = sum(p.numel() for p in self.in_bucket)
        largest = max(p.numel() for p in self.in_bucket)
        temporary = []
        if self.gpus > 1 or (self.sums_apart and len(self.in_bucket) > 1):
            temporary.append(self.allocate("buffers", numel * self.item))  # contiguous slices for several ranks
        largest = min(largest, max(self.slices))
        if self.sums_apart:
            if self.sums is None:
                self.sums = self.allocate("gradients", self._sum_size())
            if not self.on_gpu:
                self.free(self.allocate("buffers", 4 * largest))
        if self.offload:
            # one gradient at a time: a copy for the norm, then one in the masters' type to send to the CPU
            self.free(self.allocate("buffers", self.norm_item * largest))
            self.free(self.allocate("buffers", self.master_item * largest if self.master_item != self.sum_item else 0))
        elif self.part is None and not self.sums_apart:
            self.part = self.allocate("gradients", self.item * self.touched)
        self.free(*temporary)
        self.in_bucket = []

    def on_module(self, event: Event) -> None:
        """A module begins or ends its forward or backward pass. Stages 1 and 2 do nothing then."""

    def end_of_backward(self) -> None:
        """Reduce the last bucket and add this micro-batch to the accumulated gradients."""
        self.reduce_bucket()
        self.free(*self.buckets)
        if self.sums is None or self.stage == 1:  # stage 1 accumulates whole gradients, and keeps its part at the end
            self.free(self.sums)
            self.sums, self.part = self.part, None
        elif self.part is not None:
            self.free(self.part)  # added to the accumulated ones

    def optimizer_step(self) -> None:
        """The optimizer step; with offload it runs on the CPU."""
        if self.offload:
            return
        if self.takes_norm:
            self.free(self.allocate("buffers", self.norm_item * max(self.slices)))
        for size, group in zip(self.partitions, self.setup.groups, strict=True):
            if self.sums_apart:
                self.adam_update(None, size)
                continue
            # a single tensor without padding is flat already
            alone = len(group["params"]) == 1 and group["params"][0].numel() == size
            flat = None if alone else self.allocate("gradients", self.sum_item * size)
            self.adam_update(flat, size)

    def adam_update(self, flat, size: int) -> None:
        """Adam on `size` masters. flat: key of their flattened gradients, or None if none were needed."""
        single = flat
        if self.sum_item != self.master_item:
            single = self.allocate("gradients", self.master_item * size)
            self.free(flat)
        self.free(self.allocate("optimizer", self.step_copy * size))
        self.free(single)
