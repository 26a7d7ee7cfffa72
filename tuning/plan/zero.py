"""What DeepSpeed 0.19 allocates around a model's own forward and backward pass, on one of several GPUs.

Read in runtime/zero/stage_1_and_2.py, stage3.py and partitioned_param_coordinator.py, and played into a model of CUDA's
caching allocator: partitions, float32 masters and moments, gradient buckets, gathered parameters, the temporaries of a
step, offload. DeepSpeed is taken as `tuning.engine.patches.apply` leaves it. Nothing here was measured on a GPU.
"""

from typing import NamedTuple

import torch
from deepspeed.runtime.config import DtypeEnum

from tuning.errors import UserError
from tuning.plan.allocator import CachingAllocator
from tuning.plan.trace import Event, host_bytes, pinned_size

CUBLAS = 32 * 2**20  # workspace of cuBLAS, from torch's allocator: Hopper's; other GPUs take 8 MiB


class Setup(NamedTuple):
    """A training as train.py would start it.

    model: on the meta device, in the compute type, in training mode.
    batch: the model's arguments, see `longest_batch`.
    ds_config: resolved, no "auto" left.
    groups: the optimiser's parameter groups.
    """

    model: torch.nn.Module
    batch: dict
    ds_config: dict
    groups: list[dict]


class Zero12Simulator:
    """Replays a trace into a caching allocator and adds what DeepSpeed allocates around it.

    One optimiser step from the second on is played: moments exist, and with gradient accumulation the gradients of
    earlier micro-batches. Stages 1 and 2; see zero3.py.

    Args:
        gpus: ranks; the one that needs most is planned.
        memory: takes all allocations.
        on_gpu: what is planned; else a CPU, for comparison with what can be measured: it adds across types by way of
            a copy, and gloo copies what it sends.
    """

    def __init__(self, setup: Setup, gpus: int, memory: CachingAllocator, on_gpu: bool = True):
        self.gpus, self.setup, self.on_gpu = gpus, setup, on_gpu
        self.parameters = list(setup.model.parameters())  # tied ones come once
        self.trained = [p for group in setup.groups for p in group["params"]]
        config = setup.ds_config
        self.zero = config["zero_optimization"]
        self.stage = self.zero["stage"]
        self.item = self.parameters[0].element_size()
        kind = config.get("data_types", {}).get("grad_accum_dtype")
        # gradients are summed in numbers of this size
        self.sum_item = self.item if kind is None else DtypeEnum(kind).value.itemsize
        self.sums_apart = self.sum_item == 4 != self.item  # straight into one float32 buffer of this rank's part
        self.accumulates = config.get("gradient_accumulation_steps", 1) > 1
        self.takes_norm = config.get("gradient_clipping", 0) > 0 or self.zero.get("compute_grad_norm", True)
        self.norm_item = 4 if self.sum_item != 4 else 0  # for the norm, gradients are copied to float32 one by one
        kind = str(config["optimizer"].get("type"))
        if kind.lower() not in ("adam", "adamw"):
            raise UserError(f"--plan knows the optimizers Adam and AdamW, not {kind}")
        optimizer = config["optimizer"].get("params", {})
        # torch's AdamW without "fused" works on lists, and so needs a copy in between
        self.step_copy = 4 if optimizer.get("torch_adam") and not optimizer.get("fused") else 0
        self.offload = self._device("offload_optimizer")
        self.pin = (self.zero.get("offload_optimizer") or {}).get("pin_memory", True)
        self.bucket_size = int(self.zero.get("reduce_bucket_size", 5e8))
        self.memory = memory
        self.cpu = 0  # bytes of this rank in main memory
        self.cpu_once = 0  # and beside them, while DeepSpeed sets up
        self.phase, self.peak_phase, self.seen_peak = "start", "", 0
        self.fresh = 0

    def _device(self, key: str) -> bool:
        return (self.zero.get(key) or {}).get("device", "none") != "none"

    # Each call names its memory by a new key, so that it can be given back.
    def take(self, tag: str, size: float) -> tuple:
        self.fresh += 1
        key = ("deepspeed", self.fresh)
        self.memory.alloc(key, int(size), tag)
        self._note()
        return key

    def drop(self, *keys) -> None:
        for key in keys:
            self.memory.free(key)

    def spare(self, size: float, pinned: bool = False) -> None:
        """Count main memory."""
        self.cpu += pinned_size(size) if pinned else int(size)

    def _note(self) -> None:
        if self.memory.peak_allocated > self.seen_peak:
            self.seen_peak, self.peak_phase = self.memory.peak_allocated, self.phase

    def play(self, trace: list[Event]) -> None:
        """One optimiser step."""
        self.memory.alloc("cublas", CUBLAS, "buffers")
        for tensor in [*self.setup.model.buffers(), *filter(torch.is_tensor, self.setup.batch.values())]:
            self.take("buffers", tensor.numel() * tensor.element_size())
        self.start()
        self.phase = "forward and backward"
        self.held: set = set()  # gradients that DeepSpeed still holds when autograd lets go
        late: set = set()
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
                self.gradient(event.key, event.block)
                self.drop(*(late - self.held))
                late &= self.held
            else:
                self.module(event)
        self.end_of_backward()
        self.drop(*(late - self.held))
        self.phase = "optimiser step"
        self.step()
        self.drop(*late)

    # Stages 1 and 2

    def start(self) -> None:
        trained = set(map(id, self.trained))
        for parameter in self.parameters:
            if id(parameter) not in trained:
                self.take("weights", parameter.numel() * self.item)
        self.partitions = []  # elements of each group that this rank updates
        for group in self.setup.groups:
            numel = sum(p.numel() for p in group["params"])
            numel = -(-numel // (2 * self.gpus)) * 2 * self.gpus  # aligned for NCCL
            self.take("weights", numel * self.item)  # DeepSpeed moves what trains into one flat buffer a group
            self.partitions.append(numel // self.gpus)
            if self.offload:
                self.offload_group(numel // self.gpus)
                continue
            for _ in range(3):  # float32 copy, and two moments
                self.take("optimizer", 4 * numel / self.gpus)
        self.slices, self.touched = self._worst_rank()
        if self.offload:
            largest = self.item * max(p.numel() for p in self.trained)
            self.take("buffers", largest)
            self.spare(largest, self.pin)
            if self.accumulates and not self.sums_apart:
                for parameter in self.trained:
                    self.spare(self.item * parameter.numel(), self.pin)
        # what earlier micro-batches of the step left
        self.sums = None
        if self.accumulates and (self.sums_apart or not self.offload):
            self.sums = self.take("gradients", self._sum_size())
        self.buckets, self.part = [], None
        self.in_bucket: list = []

    def offload_group(self, numel: int) -> None:
        """Main memory for this rank's part of a parameter group."""
        for pinned in (self.pin, False, False):  # float32 copy, and two moments
            self.spare(4 * numel, pinned)
        self.spare(4 * numel, self.pin)  # gradients
        self.spare(self.item * numel, self.pin)  # for the way back to the GPU
        if self.pin:  # made in common memory first
            self.cpu_once = max(self.cpu_once, 4 * numel)

    def _worst_rank(self) -> tuple[list[int], int]:
        """Of the rank that holds most: elements of its piece of each parameter, and of all parameters it touches.

        A partition cuts through parameters, and without float32 sums the buffer has room for the whole of each.
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
        """Bytes of this rank's summed gradients."""
        if self.stage == 1:
            return self.sum_item * sum(p.numel() for p in self.trained)
        return 4 * sum(self.partitions) if self.sums_apart else self.item * self.touched

    def gradient(self, parameter, block) -> None:
        """A gradient is complete; autograd's block of it is given back right after this, unless it is held."""
        if not self.buckets:
            for _ in range(2 if self.zero.get("overlap_comm") else 1):
                self.buckets.append(self.take("buffers", self.bucket_size * self.item))
        if sum(p.numel() for p in self.in_bucket) + parameter.numel() > self.bucket_size:
            self.flush()
        self.in_bucket.append(parameter)
        if parameter.numel() > self.bucket_size:  # reduced where it is, at once, then freed; for offload it is cloned
            clone = self.take("gradients", parameter.numel() * self.item if self.offload else 0)
            self.flush()
            self.drop(clone)

    def flush(self) -> None:
        """Reduce a bucket over the ranks and keep this rank's part."""
        if not self.in_bucket:
            return
        numel = sum(p.numel() for p in self.in_bucket)
        largest = max(p.numel() for p in self.in_bucket)
        temporary = []
        if self.gpus > 1 or (self.sums_apart and len(self.in_bucket) > 1):
            temporary.append(self.take("buffers", numel * self.item))  # slices for several ranks, made contiguous
        largest = min(largest, max(self.slices))
        if self.sums_apart:
            if self.sums is None:
                self.sums = self.take("gradients", self._sum_size())
            if not self.on_gpu:
                self.drop(self.take("buffers", 4 * largest))
        if self.offload:
            # one gradient at a time: the norm's copy, then a float32 one for the way to the CPU
            self.drop(self.take("buffers", self.norm_item * largest))
            self.drop(self.take("buffers", 0 if self.sums_apart else 4 * largest))
        elif self.part is None and not self.sums_apart:
            self.part = self.take("gradients", self.item * self.touched)
        self.drop(*temporary)
        self.in_bucket = []

    def module(self, event: Event) -> None:
        pass

    def end_of_backward(self) -> None:
        self.flush()
        self.drop(*self.buckets)
        if self.sums is None or self.stage == 1:  # stage 1 sums whole gradients, and keeps its part of them in the end
            self.drop(self.sums)
            self.sums, self.part = self.part, None
        elif self.part is not None:
            self.drop(self.part)  # added to the earlier ones

    def step(self) -> None:
        if self.offload:
            return
        if self.takes_norm:
            self.drop(self.take("buffers", self.norm_item * max(self.slices)))
        for size, group in zip(self.partitions, self.setup.groups, strict=True):
            if self.sums_apart:
                self.drop(self.take("optimizer", self.step_copy * size))
                continue
            # one tensor that needs no padding is flat as it is
            alone = len(group["params"]) == 1 and group["params"][0].numel() == size
            flat = None if alone else self.take("gradients", self.sum_item * size)
            self.update(flat, size)

    def update(self, flat, size: int) -> None:
        """Adam on `size` numbers whose gradients are `flat` already (or need not be): in float32."""
        single = flat
        if self.sum_item != 4:
            single = self.take("gradients", 4 * size)
            self.drop(flat)
        self.drop(self.take("optimizer", self.step_copy * size))
        self.drop(single)
