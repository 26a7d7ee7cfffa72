"""Allocations of ZeRO-3: zero.py with partitioned and gathered parameters and other buckets."""

from collections import deque

import torch

from tuning.lora.zero3 import read_elsewhere
from tuning.plan.trace import Event
from tuning.plan.zero import Zero12Simulator


class Zero3Simulator(Zero12Simulator):
    """ZeRO stage 3: parameters are partitioned too, and gathered for the modules that use them."""

    def allocate_states(self) -> None:
        gpus, item = self.gpus, self.item
        offload_param = self._device("offload_param")
        pin_param = (self.zero.get("offload_param") or {}).get("pin_memory", True)
        threshold = self.zero.get("stage3_param_persistence_threshold", 1e5)
        self.offload_param = offload_param

        trained = set(map(id, self.trained))
        part = {p: -(-p.numel() // gpus) for p in self.parameters}
        self.part_numel = part
        frozen = [part[p] * item for p in self.parameters if id(p) not in trained]
        flat = [item * sum(part[p] for p in group["params"]) for group in self.setup.groups]
        for size in (*frozen, *flat):
            if offload_param:
                self.count_host(size, pin_param)
            else:
                self.allocate("weights", size)
        if offload_param and pin_param:  # loaded one by one before flattening; torch keeps pinned memory
            for parameter in self.trained:
                self.count_host(part[parameter] * item, pin_param)
        self.always = {p for p in self.parameters if p.numel() <= threshold or gpus == 1}
        if gpus > 1:
            for parameter in self.always:
                self.allocate("weights", parameter.numel() * item)
        elif offload_param:  # gathered from main memory, not from other ranks
            self.always = {p for p in self.parameters if p.numel() <= threshold}

        self._allocate_optimizer()
        self.allocate("buffers", self.bucket_size * item)
        self.live: dict = {}  # gathered parameter -> its memory
        self.flying: dict = {}  # prefetched parameter that is not unpacked yet -> (flat buffer, all parameters in it)
        self.leaving: torch.nn.Module | None = None  # module whose backward is running
        self.at = 0

    def _allocate_optimizer(self) -> None:
        """Master weights, moments and accumulated gradients, in the sub-groups that the optimizer steps through."""
        part = self.part_numel
        self.sub_groups = []
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
        # masters of the weights' type are the weights themselves, if both are on the GPU
        shared = self.master_item == self.item and not (self.offload or self.offload_param)
        for pieces in self.sub_groups:
            for _ in range(2 if shared else 3):  # two moments, and master weights
                if self.offload:
                    self.count_host(self.master_item * sum(pieces))
                else:
                    self.allocate("optimizer", self.master_item * sum(pieces))
            if self.offload:  # gradients
                self.count_host(self.master_item * sum(pieces), self.pin)
        sums = self.sum_item * sum(map(sum, self.sub_groups))
        if self.offload:
            self.count_host(sums, self.pin)
            self.cpu_once = sums if self.pin else 0  # created in pageable memory first
        else:
            self.allocate("gradients", sums)

    def replay(self, trace: list[Event]) -> None:
        self.elsewhere = read_elsewhere(self.setup.model)
        # DeepSpeed recorded the order of modules in the first step
        self.order = [self.parameters_of(e.key) for e in trace if e.what in ("forward", "backward")]
        self.queue = deque((i, p) for i, parameters in enumerate(self.order) for p in parameters)
        self.fetched_for: dict = {}
        super().replay(trace)

    def parameters_of(self, module) -> list:
        """What is gathered for a module."""
        return [*module.parameters(recurse=False), *self.elsewhere.get(module, [])]

    def on_module(self, event: Event) -> None:
        if event.what == "done":
            self.release(event.key)
            return
        # A module's backward ends where the next one's begins. Forwards in between recompute a checkpoint that ends
        # with this module.
        if event.what == "backward":
            if self.leaving is not None:
                self.release(self.leaving)
            self.leaving = event.key
        self.fetch(self.parameters_of(event.key))

    def gather(self, parameters: list, wait: bool) -> None:
        """One coalesced all-gather into a flat buffer, unpacked on arrival; a single parameter is not copied."""
        parameters = [p for p in parameters if p not in self.always and p not in self.live and p not in self.flying]
        if len(parameters) == 1:
            self.live[parameters[0]] = self.allocate("gathered", parameters[0].numel() * self.item)
        elif parameters:
            flat = self.allocate("gathered", sum(p.numel() for p in parameters) * self.item)
            self.flying |= dict.fromkeys(parameters, (flat, parameters))
            if wait:
                self.unpack_gathered(parameters[0])

    def unpack_gathered(self, parameter) -> None:
        """Copy the parameters of a flat buffer that has arrived out of it."""
        flat, parameters = self.flying[parameter]
        for one in parameters:
            self.live[one] = self.allocate("gathered", one.numel() * self.item)
            del self.flying[one]
        self.free(flat)

    def fetch(self, parameters: list) -> None:
        """Gather the parameters of a module that begins, and prefetch those of the next ones."""
        self.gather(parameters, wait=True)
        for parameter in parameters:
            if parameter in self.flying:
                self.unpack_gathered(parameter)
        if self.gpus == 1 and not self.offload_param:
            self.at += 1
            return
        while self.queue and self.queue[0][0] <= self.at:
            step, parameter = self.queue.popleft()
            self.fetched_for[parameter] = step
        room = self.zero.get("stage3_max_live_parameters", 1e9) - sum(p.numel() for p in (*self.live, *self.flying))
        room = min(room, self.zero.get("stage3_prefetch_bucket_size", 5e7))
        coming, numel = {}, 0  # used as an ordered set
        while self.queue and numel < room:
            step, parameter = self.queue.popleft()
            self.fetched_for[parameter] = max(step, self.fetched_for.get(parameter, -1))
            if not any(parameter in there for there in (self.always, self.live, self.flying, coming)):
                coming[parameter] = True
                numel += parameter.numel()
        self.gather(list(coming), wait=False)
        self.at += 1

    def release(self, module) -> None:
        """Free a module's gathered parameters, except those that are needed again soon or already prefetched."""
        leaving = [p for p in self.parameters_of(module) if p in self.live and self.fetched_for.get(p, -1) <= self.at]
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
                self.free(self.live.pop(parameter))

    def on_gradient(self, parameter, block) -> None:
        filled = sum(p.numel() for p, _ in self.in_bucket)
        if self.in_bucket and filled + parameter.numel() > self.bucket_size:
            self.reduce_bucket()
            filled = 0
        fits = filled + parameter.numel() <= self.bucket_size
        self.in_bucket.append((parameter, None if fits else block))
        if not fits:
            self.held.add(block)

    def reduce_bucket(self) -> None:
        if not self.in_bucket:
            return
        numel = sum(self.part_numel[p] for p, _ in self.in_bucket)
        if len(self.in_bucket) > 1 or self.in_bucket[0][0].numel() % self.gpus:
            flat = self.allocate("buffers", numel * self.gpus * self.item)  # interleaved by rank
        else:
            flat = None
        if not self.on_gpu:  # gloo's copy
            self.free(self.allocate("buffers", numel * self.gpus * self.item))
        if self.sum_item != self.item:
            self.free(self.allocate("buffers", numel * self.sum_item))
        self.free(flat)
        self.held -= {block for _, block in self.in_bucket}
        self.in_bucket = []

    def end_of_backward(self) -> None:
        self.reduce_bucket()
        for key in {*self.live.values(), *(flat for flat, _ in self.flying.values())}:
            self.free(key)

    def optimizer_step(self) -> None:
        if self.offload:
            return
        if self.takes_norm:
            self.free(self.allocate("buffers", self.norm_item * max(map(max, self.sub_groups))))
        for pieces in self.sub_groups:
            size = sum(pieces)
            # flattened, then converted to the masters' type
            flat = self.allocate("gradients", self.sum_item * size) if len(pieces) > 1 else None
            self.adam_update(flat, size)
