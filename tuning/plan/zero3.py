"""What ZeRO-3 allocates beside what zero.py has for the other stages: gathered parameters, other buckets."""

from collections import deque

import torch

from tuning.plan.trace import Event
from tuning.plan.zero import Zero12Simulator


class Zero3Simulator(Zero12Simulator):
    """ZeRO-3: parameters are partitioned too, and gathered around the modules that use them."""

    def start(self) -> None:
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
                self.spare(size, pin_param)
            else:
                self.take("weights", size)
        if offload_param and pin_param:  # loaded one by one before they go into flat buffers; torch keeps pinned memory
            for parameter in self.trained:
                self.spare(part[parameter] * item, pin_param)
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
            for _ in range(3):  # float32 copy, and two moments
                if self.offload:
                    self.spare(4 * sum(pieces))
                else:
                    self.take("optimizer", 4 * sum(pieces))
            if self.offload:  # gradients
                self.spare(4 * sum(pieces), self.pin)
        sums = self.sum_item * sum(map(sum, self.sub_groups))
        if self.offload:
            self.spare(sums, self.pin)
            self.cpu_once = sums if self.pin else 0  # made in common memory first
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
        if not self.on_gpu:  # gloo's copy
            self.drop(self.take("buffers", numel * self.gpus * self.item))
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
