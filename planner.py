"""What a training needs before it starts: `train.py ... --plan`. No GPU, no weights; seconds.

The model is built on the meta device, its real forward and backward run on the longest batch that the flags allow, and
every storage is followed (memory_trace.py). This file adds what one process on no GPU cannot show, as DeepSpeed 0.19
has it (runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py): partitions, float32 masters and
moments, gradient buckets, gathered parameters, the temporaries of a step, offload. All of it goes through a model of
CUDA's caching allocator. Nothing here was measured on a GPU.
"""

import argparse
import math
import os
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype

from data_set import Batch, MicroBatch, Sample, collate
from ds_config import ds_notes
from glm_models.ops import TILE
from memory_trace import CachingAllocator, Event, host_bytes, trace_step
from utils import UserError, is_main, say

GIB = 2**30
CONTEXT = int(1.5 * GIB)  # CUDA's own, its kernels and NCCL's buffers: outside torch's allocator
CUBLAS = 8519680  # workspace of cuBLAS, from torch's allocator: ":4096:2:16:8" KiB, torch's default
PROCESS = 3 * GIB  # main memory of one process with torch and CUDA loaded, before any weights
SHARD = 2 * GIB  # a file of the official checkpoints, about


class Setup(NamedTuple):
    """A training as train.py would start it.

    model: on the meta device, in the compute type, in training mode.
    batch: of `longest_batch`.
    ds_config: resolved, no "auto" left.
    groups: the optimiser's parameter groups.
    """

    model: torch.nn.Module
    batch: Batch
    ds_config: dict
    groups: list[dict]


class Needs(NamedTuple):
    """What a plan found, in bytes.

    parts: what lives when most is allocated, by kind.
    slack: what the caching allocator holds beyond that, at its own peak.
    peak: all of a GPU, context included.
    phase: when most is allocated.
    cpu: main memory of a node that runs all ranks.
    folder: one saved folder.
    """

    parts: dict[str, int]
    slack: int
    peak: int
    phase: str
    cpu: int
    folder: int


def longest_batch(args: argparse.Namespace, config) -> Batch:
    """The longest batch that --max_len, --max_src_len and --per_device_train_batch_size allow.

    All its tokens are answers but the first: the shorter the prompts, the more has to be kept of the last block.
    """
    ids = [1] * args.max_len
    if hasattr(config, "gmask_token_id"):  # ChatGLM-6B's prompts end so, and its attention depends on it
        ids[max(0, args.max_src_len - 2) : args.max_src_len] = [config.gmask_token_id, config.bos_token_id]
    sample = Sample(ids, 1, False, False)
    rows = [sample] * args.per_device_train_batch_size
    context = args.max_src_len - 1 if hasattr(config, "gmask_token_id") else 0
    return collate(rows, lambda _: context, MicroBatch(list(range(len(rows))), 1.0))


def run_trace(setup: Setup, on_gpu: bool = True) -> list[Event]:
    """What one micro-batch allocates, with marks for DeepSpeed; by the rules of a GPU's kernels or of a CPU's."""
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in setup.batch.items()}
    zero = setup.ds_config["zero_optimization"]
    # ZeRO-3 has a linear function of its own, that saves the parameter and not a view of what it holds
    linear = zero3_linear_wrap if zero.get("stage") == 3 and zero.get("memory_efficient_linear", True) else None
    return trace_step(setup.model, batch, on_gpu, linear=linear)


# DeepSpeed


def dtype_of(name: str) -> torch.dtype:
    """A type by its name in a ds file."""
    try:
        return DtypeEnum(name).value
    except ValueError:
        raise UserError(f"data_types.grad_accum_dtype: {name!r} is no type") from None


class DeepSpeed:
    """Replays a trace into a caching allocator and adds what DeepSpeed allocates around it.

    One optimiser step from the second on is played: moments exist, and with gradient accumulation the gradients of
    earlier micro-batches. Stage 0 to 2; see `DeepSpeed3`.

    Args:
        gpus: ranks; the one that needs most is planned.
        memory: takes all allocations.
    """

    def __init__(self, setup: Setup, gpus: int, memory: CachingAllocator):
        self.gpus, self.setup = gpus, setup
        self.parameters = list(setup.model.parameters())  # tied ones come once
        self.trained = [p for group in setup.groups for p in group["params"]]
        config = setup.ds_config
        self.zero = config["zero_optimization"]
        self.stage = self.zero.get("stage", 0)
        self.item = self.parameters[0].element_size()
        kind = config.get("data_types", {}).get("grad_accum_dtype")
        self.sum_item = self.item if kind is None else dtype_of(kind).itemsize  # gradients are summed in this size
        self.sums_apart = self.sum_item == 4 != self.item  # straight into one float32 buffer of this rank's part
        # DeepSpeed makes each addend float32 before it adds it, if nobody has put in a function that does not
        self.sum_copies = DeepSpeedZeroOptimizer._add_to_grad_partition_buffer.__module__.startswith("deepspeed.")
        # and it reduces a gradient larger than a bucket when the next one comes, likewise
        reduces = DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads
        self.reduces_late = reduces.__module__.startswith("deepspeed.")
        self.accumulates = config.get("gradient_accumulation_steps", 1) > 1
        self.takes_norm = config.get("gradient_clipping", 0) > 0 or self.zero.get("compute_grad_norm", True)
        norm = get_norm_dtype().itemsize  # gradients are copied to this type, float64, one by one
        self.norm_item = norm if norm != self.sum_item else 0
        kind = str(config["optimizer"].get("type"))
        if kind.lower() not in ("adam", "adamw"):
            raise UserError(f"--plan knows the optimizers Adam and AdamW, not {kind}")
        optimizer = config["optimizer"].get("params", {})
        # torch's AdamW without "fused" works on lists, and so needs a copy in between
        self.step_copy = 4 if optimizer.get("torch_adam") and not optimizer.get("fused") else 0
        self.offload = self._device("offload_optimizer")
        self.bucket_size = int(self.zero.get("reduce_bucket_size", 5e8))
        self.memory = memory
        self.cpu = 0  # bytes of this rank in main memory
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
        """Count main memory; torch rounds pinned memory up to a power of two."""
        self.cpu += 2 ** math.ceil(math.log2(size)) if pinned and size >= 1 else int(size)

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

    # Stages 0 to 2

    def start(self) -> None:
        trained = set(map(id, self.trained))
        for parameter in self.parameters:
            if id(parameter) not in trained:
                self.take("weights", parameter.numel() * self.item)
        ranks = self.gpus if self.stage else 1
        self.partitions = []  # elements of each group that this rank updates
        for group in self.setup.groups:
            numel = sum(p.numel() for p in group["params"])
            numel = -(-numel // (2 * self.gpus)) * 2 * self.gpus  # aligned for NCCL
            self.take("weights", numel * self.item)  # DeepSpeed moves what trains into one flat buffer a group
            self.partitions.append(numel // ranks)
            masters = 2 if self.stage == 0 and self.item == 4 else 3  # float32 copy, and two moments
            for _ in range(masters):
                if self.offload:
                    self.spare(4 * numel / ranks, pinned=self.zero["offload_optimizer"].get("pin_memory"))
                else:
                    self.take("optimizer", 4 * numel / ranks)
            if self.offload:  # float32 gradients, and a buffer for the way back
                self.spare((4 + self.item) * numel / ranks, pinned=self.zero["offload_optimizer"].get("pin_memory"))
        self.slices, self.touched = self._worst_rank(ranks)
        if self.offload:
            self.take("buffers", self.item * max(p.numel() for p in self.trained))
            if self.accumulates:
                self.spare(self.item * sum(p.numel() for p in self.trained))
        # what earlier micro-batches of the step left
        self.sums = None
        if self.accumulates and (self.sums_apart or not self.offload):
            self.sums = self.take("gradients", self._sum_size())
        self.buckets, self.part = [], None
        self.in_bucket: list = []

    def _worst_rank(self, ranks: int) -> tuple[list[int], int]:
        """Of the rank that holds most: elements of its piece of each parameter, and of all parameters it touches.

        A partition cuts through parameters, and without float32 sums the buffer has room for the whole of each.
        """
        worst: tuple[list[int], int] = ([], -1)
        for rank in range(ranks):
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
        if self.stage < 2:
            return self.sum_item * sum(p.numel() for p in self.trained)
        return 4 * sum(self.partitions) if self.sums_apart else self.item * self.touched

    def gradient(self, parameter, block) -> None:
        """A gradient is complete; autograd's block of it is given back right after this, unless it is held."""
        if self.stage == 0:
            if not self.accumulates:  # it stays on its parameter; else it is added to the one that is there
                self.held.add(block)
            return
        if not self.buckets:
            for _ in range(2 if self.zero.get("overlap_comm") else 1):
                self.buckets.append(self.take("buffers", self.bucket_size * self.item))
        if sum(p.numel() for p, _ in self.in_bucket) + parameter.numel() > self.bucket_size:
            self.flush()
        large = parameter.numel() > self.bucket_size  # such a one is reduced where it is
        self.in_bucket.append((parameter, block if large else None))
        if large:
            self.held.add(block)
            if not self.reduces_late:
                self.flush()

    def flush(self) -> None:
        """Reduce a bucket over the ranks and keep this rank's part."""
        if not self.in_bucket:
            return
        numel = sum(p.numel() for p, _ in self.in_bucket)
        largest = max(p.numel() for p, _ in self.in_bucket)
        temporary = []
        if self.gpus > 1 or (self.sums_apart and len(self.in_bucket) > 1):
            temporary.append(self.take("buffers", numel * self.item))  # slices for several ranks, made contiguous
        largest = min(largest, max(self.slices))
        if self.sums_apart:
            if self.sums is None:
                self.sums = self.take("gradients", self._sum_size())
            if self.sum_copies:
                self.drop(self.take("buffers", 4 * largest))
        if self.offload:
            # one gradient at a time: the norm's copy, then a float32 one for the way to the CPU
            self.drop(self.take("buffers", self.norm_item * largest))
            self.drop(self.take("buffers", 0 if self.sums_apart else 4 * largest))
        elif self.part is None and not self.sums_apart:
            self.part = self.take("gradients", self.item * self.touched)
        self.drop(*temporary)
        self.held -= {block for _, block in self.in_bucket}
        self.in_bucket = []

    def module(self, event: Event) -> None:
        pass

    def end_of_backward(self) -> None:
        if self.stage == 0:
            if self.gpus > 1:  # all-reduced in buckets of 500 million
                self.drop(self.take("buffers", self.item * min(5e8, sum(p.numel() for p in self.trained))))
            return
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
        if self.stage == 0:  # torch's optimiser as it is, or one that makes all gradients float32 first
            single = self.take("gradients", 4 * sum(self.partitions) if self.item != 4 else 0)
            self.drop(self.take("optimizer", self.step_copy * sum(self.partitions)))
            self.drop(single)
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


class DeepSpeed3(DeepSpeed):
    """ZeRO-3: parameters are partitioned too, and gathered around the modules that use them."""

    def start(self) -> None:
        gpus, item = self.gpus, self.item
        offload_param = self._device("offload_param")
        pin_param = (self.zero.get("offload_param") or {}).get("pin_memory")
        pin = (self.zero.get("offload_optimizer") or {}).get("pin_memory")
        threshold = self.zero.get("stage3_param_persistence_threshold", 1e5)
        self.offload_param = offload_param

        trained = set(map(id, self.trained))
        part = {p: -(-p.numel() // gpus) for p in self.parameters}
        self.part_numel = part
        frozen = [part[p] * item for p in self.parameters if id(p) not in trained]
        flat = [item * sum(part[p] for p in group["params"]) for group in self.setup.groups]
        for size in (*frozen, *flat):
            if offload_param:
                self.spare(size, pin_param)
            else:
                self.take("weights", size)
        self.always = {p for p in self.parameters if p.numel() <= threshold or gpus == 1}
        if gpus > 1:
            for parameter in self.always:
                self.take("weights", parameter.numel() * item)
        elif offload_param:  # nothing to gather from others, but it must come from main memory
            self.always = {p for p in self.parameters if p.numel() <= threshold}

        self.sub_groups = []  # the step goes through them one by one
        limit = self.zero.get("sub_group_size", 1e9)
        for group in self.setup.groups:
            pieces: list[int] = []
            for parameter in group["params"]:
                pieces.append(part[parameter])
                if sum(pieces) >= limit:
                    self.sub_groups.append(pieces)
                    pieces = []
            if pieces:
                self.sub_groups.append(pieces)
        for pieces in self.sub_groups:
            for _ in range(3):
                if self.offload:
                    self.spare(4 * sum(pieces), pin)
                else:
                    self.take("optimizer", 4 * sum(pieces))
            if self.offload:
                self.spare(4 * sum(pieces), pin)
        sums = self.sum_item * sum(map(sum, self.sub_groups))
        if self.offload:
            self.spare(sums, pin)
        else:
            self.take("gradients", sums)
        self.take("buffers", self.bucket_size * item)
        self.in_bucket = []

        self.live: dict = {}  # gathered parameter -> its memory
        self.flying: dict = {}  # prefetched together, not yet cut apart: parameter -> (their memory, all of them)
        self.leaving: torch.nn.Module | None = None  # module whose backward is under way
        self.at = 0

    def play(self, trace: list[Event]) -> None:
        # DeepSpeed knows the order of modules from the first step
        self.order = [list(e.key.parameters(recurse=False)) for e in trace if e.what in ("forward", "backward")]
        self.queue = deque((i, p) for i, parameters in enumerate(self.order) for p in parameters)
        self.fetched_for: dict = {}
        super().play(trace)

    def module(self, event: Event) -> None:
        if event.what == "done":
            self.release(event.key)
            return
        # No mark tells the end of a module's backward but the begin of the next one's. Forwards in between recompute a
        # checkpoint, at whose end this module stands.
        if event.what == "backward":
            if self.leaving is not None:
                self.release(self.leaving)
            self.leaving = event.key
        self.fetch(list(event.key.parameters(recurse=False)))

    def gather(self, parameters: list, wait: bool) -> None:
        """One coalesced all-gather: a flat buffer, cut into parameters once it has come; one alone is not copied."""
        parameters = [p for p in parameters if p not in self.always and p not in self.live and p not in self.flying]
        if len(parameters) == 1:
            self.live[parameters[0]] = self.take("gathered", parameters[0].numel() * self.item)
        elif parameters:
            flat = self.take("gathered", sum(p.numel() for p in parameters) * self.item)
            self.flying |= dict.fromkeys(parameters, (flat, parameters))
            if wait:
                self.land(parameters[0])

    def land(self, parameter) -> None:
        flat, parameters = self.flying[parameter]
        for one in parameters:
            self.live[one] = self.take("gathered", one.numel() * self.item)
            del self.flying[one]
        self.drop(flat)

    def fetch(self, parameters: list) -> None:
        self.gather(parameters, wait=True)
        for parameter in parameters:
            if parameter in self.flying:
                self.land(parameter)
        if self.gpus == 1 and not self.offload_param:
            self.at += 1
            return
        while self.queue and self.queue[0][0] <= self.at:
            step, parameter = self.queue.popleft()
            self.fetched_for[parameter] = step
        room = self.zero.get("stage3_max_live_parameters", 1e9) - sum(p.numel() for p in (*self.live, *self.flying))
        room = min(room, self.zero.get("stage3_prefetch_bucket_size", 5e7))
        coming, numel = {}, 0  # a dict as an ordered set
        while self.queue and numel < room:
            step, parameter = self.queue.popleft()
            self.fetched_for[parameter] = max(step, self.fetched_for.get(parameter, -1))
            if not any(parameter in there for there in (self.always, self.live, self.flying, coming)):
                coming[parameter] = True
                numel += parameter.numel()
        self.gather(list(coming), wait=False)
        self.at += 1

    def release(self, module) -> None:
        """Let go of a module's parameters, except for those that are needed soon or were passed by the prefetch."""
        leaving = [
            p for p in module.parameters(recurse=False) if p in self.live and self.fetched_for.get(p, -1) <= self.at
        ]
        if not leaving:
            return
        soon, distance = set(), 0
        for parameters in self.order[self.at :]:
            if distance >= self.zero.get("stage3_max_reuse_distance", 1e9):
                break
            soon.update(parameters)
            distance += sum(p.numel() for p in parameters)
        for parameter in leaving:
            if parameter not in soon:
                self.drop(self.live.pop(parameter))

    def gradient(self, parameter, block) -> None:
        filled = sum(p.numel() for p, _ in self.in_bucket)
        if self.in_bucket and filled + parameter.numel() > self.bucket_size:
            self.flush()
            filled = 0
        fits = filled + parameter.numel() <= self.bucket_size
        self.in_bucket.append((parameter, None if fits else block))
        if not fits:
            self.held.add(block)

    def flush(self) -> None:
        if not self.in_bucket:
            return
        numel = sum(self.part_numel[p] for p, _ in self.in_bucket)
        if len(self.in_bucket) > 1 or self.in_bucket[0][0].numel() % self.gpus:
            flat = self.take("buffers", numel * self.gpus * self.item)  # interleaved by rank
        else:
            flat = None
        if self.sum_item != self.item:
            self.drop(self.take("buffers", numel * self.sum_item))
        self.drop(flat)
        self.held -= {block for _, block in self.in_bucket}
        self.in_bucket = []

    def end_of_backward(self) -> None:
        self.flush()
        for key in {*self.live.values(), *(flat for flat, _ in self.flying.values())}:
            self.drop(key)

    def step(self) -> None:
        if self.offload:
            return
        if self.takes_norm:
            self.drop(self.take("buffers", self.norm_item * max(map(max, self.sub_groups))))
        for pieces in self.sub_groups:
            size = sum(pieces)
            # flattened, then made float32
            flat = self.take("gradients", self.sum_item * size) if len(pieces) > 1 else None
            self.update(flat, size)


EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def expandable() -> bool:
    """Whether torch is told to let the allocator's segments grow: then next to nothing is lost between blocks."""
    name, value = EXPANDABLE.split("=")
    return value in os.environ.get(name, "") + os.environ.get("PYTORCH_ALLOC_CONF", "")


def account(
    setup: Setup, trace: list[Event], gpus: int, capacity: float = float("inf"), grows: bool | None = None
) -> Needs:
    """Play a trace under DeepSpeed on so many GPUs.

    Args:
        capacity: bytes of a GPU that torch may reserve.
        grows: segments of the allocator do; None: see `expandable`.

    Raises:
        UserError: an unknown ZeRO stage.
        MemoryError: more than `capacity` is needed.
    """
    stage = setup.ds_config["zero_optimization"].get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    memory = CachingAllocator(expandable() if grows is None else grows, capacity)
    run = (DeepSpeed3 if stage == 3 else DeepSpeed)(setup, gpus, memory)
    run.play(trace)
    size = sum(p.numel() for p in run.parameters) * run.item
    adapter = hasattr(setup.model, "peft_config")
    # while loading: stage 3 keeps a part a rank and one shard; the others the whole model a rank
    loading = size + gpus * SHARD if stage == 3 else gpus * size + SHARD
    return Needs(
        parts=memory.at_peak,
        slack=memory.peak_reserved - memory.peak_allocated,
        peak=memory.peak_reserved + CONTEXT,
        phase=run.peak_phase,
        cpu=gpus * PROCESS + max(loading, gpus * run.cpu),
        folder=sum(p.numel() for p in run.trained) * run.item if adapter else size,
    )


# Changes of the command line. A new flag that saves memory is a new row: what it costs (in points of trouble, to order
# the search), and a function that gives the changed flags, or None where it changes nothing.


def _single_rows(args, gpus):
    rows = args.per_device_train_batch_size
    steps = args.gradient_accumulation_steps * rows
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps} if rows > 1 else None


def _checkpointing(args, gpus):
    return None if args.gradient_checkpointing else {"gradient_checkpointing": True}


def _zero3(args, gpus):
    return {"ds_file": "ds_zero3_no_offload.json"} if gpus > 1 and "zero3" not in args.ds_file else None


def _offload(args, gpus):
    return {"ds_file": "ds_zero3_offload.json"} if "zero3_offload" not in args.ds_file else None


def _shorter(share: float):
    def change(args, gpus):
        lengths = {"max_len": int(args.max_len * share), "max_src_len": int(args.max_src_len * share)}
        return lengths if lengths["max_src_len"] >= 1 else None

    return change


def _tiled(args, gpus):
    return {"tiled_mlp": True} if args.max_len > TILE and not args.tiled_mlp else None


def _inputs(args, gpus):
    return {"offload_inputs": True} if args.gradient_checkpointing and not args.offload_inputs else None


CHANGES = [
    (1, _single_rows),
    (2, _checkpointing),
    (3, _zero3),
    (4, _tiled),
    (5, _inputs),
    (6, _offload),
    (10, _shorter(0.75)),
    (20, _shorter(0.5)),
    (30, _shorter(0.25)),
]

Build = Callable[[argparse.Namespace, int], Setup]


def flags(changes: dict) -> str:
    """Changes as they are typed."""
    return " ".join(f"--{name} {value}" for name, value in changes.items())


def changed(args: argparse.Namespace, changes: dict) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


class Plans:
    """Plans command lines that differ a little; those that differ in what DeepSpeed does alone share a trace.

    Args:
        build: makes a Setup of arguments and a number of GPUs.
    """

    def __init__(self, build: Build, gpus: int):
        self.build, self.gpus = build, gpus
        self.traces: dict[tuple, tuple[Setup, list[Event]]] = {}

    def __call__(self, args: argparse.Namespace, capacity: float = float("inf"), grows: bool | None = None) -> Needs:
        """See `account` for capacity, grows and errors."""
        setup = self.build(args, self.gpus)
        mine = {k: v for k, v in vars(args).items() if k not in ("ds_file", "gradient_accumulation_steps")}
        stage3 = setup.ds_config["zero_optimization"].get("stage") == 3
        key = (str(mine), next(setup.model.parameters()).dtype, stage3)
        if key not in self.traces:
            self.traces[key] = setup, run_trace(setup)
        traced, trace = self.traces[key]
        return account(traced._replace(ds_config=setup.ds_config), trace, self.gpus, capacity, grows)


def suggestions(args: argparse.Namespace, plans: Plans) -> list[tuple[str, Needs]]:
    """Single changes that lower the peak, planned anew each; the most helpful first."""
    before = plans(args).peak
    options = [change(args, plans.gpus) for _, change in CHANGES]
    found = [(flags(changes), plans(changed(args, changes))) for changes in options if changes]
    if not expandable():
        found.append((f"{EXPANDABLE} in front of the command", plans(args, grows=True)))
    return sorted((one for one in found if one[1].peak < before), key=lambda one: one[1].peak)


def cheapest(args: argparse.Namespace, plans: Plans, limit: float) -> tuple[dict, Needs] | None:
    """The changes of least cost with which a training fits into `limit` bytes of each GPU; None if none do."""
    lists = {0: {}}  # cost -> changes
    for subset in range(1 << len(CHANGES)):
        rows = [row for i, row in enumerate(CHANGES) if subset >> i & 1]
        parts = [change(args, plans.gpus) for _, change in rows]
        names = [name for part in parts if part for name in part]
        if None not in parts and len(names) == len(set(names)):  # no two rows change the same flag
            lists[sum(cost for cost, _ in rows)] = {k: v for part in parts for k, v in part.items()}
    for _, changes in sorted(lists.items()):
        try:
            return changes, plans(changed(args, changes), limit - CONTEXT)
        except MemoryError:
            continue
    return None


# What the user sees

NAMES = {
    "weights": "weights",
    "gathered": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss",
    "buffers": "buffers",
}


def table(found: Needs) -> str:
    """The parts of a GPU's memory, in GiB."""
    rows = [
        (name, found.parts.get(part, 0)) for part, name in NAMES.items() if part != "gathered" or part in found.parts
    ]
    rows += [("allocator slack", found.slack), ("context", CONTEXT), ("peak", found.peak)]
    return "\n".join(f"  {name:<18}{size / GIB:8.2f}" for name, size in rows)


def advice(args: argparse.Namespace, plans: Plans) -> str:
    """What would lower the peak, a line each: GiB of a GPU with it, the difference, the flags."""
    before = plans(args).peak
    lines = [
        f"  {after.peak / GIB:6.2f} ({(after.peak - before) / GIB:+.2f})  {change}"
        for change, after in suggestions(args, plans)
    ]
    return "\n".join(["what would lower it:", *(lines or ["  nothing that train.py knows of"])])


def plan(args: argparse.Namespace, build: Build) -> None:
    """Print what `args` need, and what would lower it; with --max_memory, flags that fit.

    Raises:
        UserError: flags that cannot be meant, or nothing fits.
    """
    gpus = args.plan_gpus if args.plan_gpus is not None else int(os.environ.get("WORLD_SIZE", 1))
    if gpus < 1:
        raise UserError(f"--plan_gpus must be at least 1, not {gpus}")
    if args.max_memory is not None and not args.max_memory * GIB > CONTEXT:
        raise UserError(f"--max_memory must be more than {CONTEXT / GIB} GiB, which CUDA itself takes")
    if not is_main():
        return
    plans = Plans(build, gpus)
    found = plans(args)
    for line in ds_notes(build(args, gpus).ds_config):
        say(line)
    say(
        f"plan (simulated): {args.mode} {args.train_type}, {args.ds_file}, {gpus} GPU{'s' * (gpus > 1)}, "
        f"{args.per_device_train_batch_size} x {args.max_len} tokens each\n"
        f"GiB of each GPU; the most is allocated in the {found.phase}:\n{table(found)}"
    )
    epochs, folder = args.num_train_epochs, found.folder / GIB
    say(
        f"main memory of a node with all ranks: about {found.cpu / GIB:.0f} GiB; "
        f"disk: {folder:.2f} GiB a saved folder, {epochs * folder:.2f} GiB for {epochs} epoch{'s' * (epochs > 1)}"
        + (", and what --save_model_step saves" if args.save_model_step else "")
    )
    if args.max_memory is None:
        say(advice(args, plans))
        return
    best = cheapest(args, plans, args.max_memory * GIB)
    if best is None:
        raise UserError(
            f"nothing fits into {args.max_memory} GiB of each GPU: fewer rows, checkpointing, ZeRO-3, offload and a "
            "quarter of --max_len were tried; use more GPUs (--plan_gpus), or a method that trains less"
        )
    changes, after = best
    what = flags(changes) or "no change"
    say(f"fits into {args.max_memory} GiB with: {what}  (peak {after.peak / GIB:.2f} GiB)")
