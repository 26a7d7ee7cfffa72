"""The order of an epoch: rows packed together and dealt to micro-batches, steps and ranks.

All of it is arrays; an optimizer step becomes lists only when it is asked for. So a million rows take well under a
second and 100 MiB in each process.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tuning.samples.batches import MicroBatch
from tuning.samples.dataset import InstructionData
from tuning.samples.shuffle import Shuffler


@dataclass(frozen=True)
class BatchShape:
    """How many rows an optimizer step has.

    Args:
        rows: of a micro-batch (packs, with packing).
        accumulation: micro-batches of a rank in a step.
        data_parallel: ranks that have different rows.
    """

    rows: int
    accumulation: int = 1
    data_parallel: int = 1

    @property
    def micro_batches(self) -> int:
        """Of a step, on all ranks together."""
        return self.accumulation * self.data_parallel

    @property
    def step_rows(self) -> int:
        """Rows of a step, on all ranks together."""
        return self.rows * self.micro_batches

    def count_steps(self, rows: int) -> int:
        """Optimizer steps of an epoch of so many rows; the last one may hold fewer."""
        return -(-rows // self.step_rows)


class RunLength(NamedTuple):
    """How long a run is, in optimizer steps; it may end within an epoch."""

    epoch_steps: int
    total_steps: int

    @property
    def epochs(self) -> int:
        """Epochs that begin."""
        return -(-self.total_steps // self.epoch_steps)

    def text(self) -> str:
        """As "3 epochs, 72 steps" or "0.42 epochs, 21 steps"."""
        whole, rest = divmod(self.total_steps, self.epoch_steps)
        return f"{f'{self.total_steps / self.epoch_steps:.3g}' if rest else whole} epochs, {self.total_steps} steps"


def run_length(num_train_epochs: float | None, max_steps: int | None, epoch_steps: int) -> RunLength:
    """The length that the flags ask for; a part of an epoch is rounded up to whole optimizer steps.

    Args:
        max_steps: takes the place of num_train_epochs.
    """
    # exact: as a float, 0.07 of 100 steps would be a little more than 7
    total = max_steps or math.ceil(Fraction(str(num_train_epochs)) * epoch_steps)
    return RunLength(epoch_steps, total)


class Packs(Sequence):
    """Lists of sample numbers, each of which takes the place of a row; kept as two arrays.

    Args:
        samples: int [samples], of all packs one after another.
        ends: int [packs], where each ends in `samples`; None where each has one sample.
    """

    def __init__(self, samples: np.ndarray, ends: np.ndarray | None = None):
        self.samples, self.ends = samples, ends

    def __len__(self) -> int:
        return len(self.samples if self.ends is None else self.ends)

    def __getitem__(self, pack: int) -> list[int]:
        if not -len(self) <= pack < len(self):
            raise IndexError(pack)
        pack %= len(self)
        if self.ends is None:
            return [int(self.samples[pack])]
        return self.samples[self.ends[pack - 1] if pack else 0 : self.ends[pack]].tolist()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Of each pack the sum of its samples' values: int64 [packs]."""
        each = values[self.samples]
        if self.ends is None:
            return each.astype(np.int64, copy=False)
        return np.diff(np.cumsum(each, dtype=np.int64)[self.ends - 1], prepend=0)

    def select(self, packs: np.ndarray) -> "Packs":
        """Some of the packs, in this order."""
        if self.ends is None:
            return Packs(self.samples[packs])
        sizes = np.diff(self.ends, prepend=0)[packs]
        ends = np.cumsum(sizes)
        first = np.repeat(self.ends[packs] - ends, sizes)  # what takes a place in the result to the one in `samples`
        return Packs(self.samples[first + np.arange(len(first))], ends)

    def moved(self, offset: int) -> "Packs":
        """The same with `offset` added to each number."""
        return Packs(self.samples + offset, self.ends)

    def __add__(self, other: "Packs") -> "Packs":
        samples = np.concatenate((self.samples, other.samples))
        if self.ends is None and other.ends is None:
            return Packs(samples)
        one, two = (np.arange(1, len(some) + 1) if some.ends is None else some.ends for some in (self, other))
        return Packs(samples, np.concatenate((one, two + len(self.samples))))


def pack_rows(data: InstructionData, max_len: int, seed: int, rows: np.ndarray | None = None) -> Packs:
    """Put samples together, up to max_len tokens: the longest first, each where it leaves the least room.

    Samples of the same length are placed together. The pack with the least room takes as many of them as fit, then the
    next one: just as if they came one by one, since a pack that was filled has even less room than the others.

    Args:
        rows: numbers of the samples; all for None.
    """
    rows = np.arange(len(data)) if rows is None else np.asarray(rows)
    rows = rows[Shuffler(seed).order(len(rows))]  # so that chance says which of equal length come together
    lengths = data.lengths[rows].astype(np.int64)
    order = stable_order(-lengths)
    rows, lengths = rows[order], lengths[order]
    stacks: dict[int, _Stack] = {}  # packs by the tokens that still fit, the last one to be taken first
    rooms = 0  # bit n is set where stacks[n] holds a pack
    pack_of = np.empty(len(rows), np.int32)
    packs = 0
    borders = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(rows)] if len(rows) else [0]
    for start, end in itertools.pairwise(borders):
        tokens = int(lengths[start])
        while start < end:
            fitting = rooms >> tokens
            room = tokens + (fitting & -fitting).bit_length() - 1 if fitting else max_len
            each = room // tokens  # samples that fit into such a pack
            wanted = -(-(end - start) // each)
            if fitting:
                taken = stacks[room].pop(wanted)
                if not len(stacks[room]):
                    rooms &= ~(1 << room)
            else:
                taken = np.arange(packs, packs + wanted, dtype=np.int32)
                packs += wanted
            count = min(end - start, each * len(taken))
            pack_of[start : start + count] = np.repeat(taken, each)[:count]
            full, rest = divmod(count, each)
            for some, left in ((taken[:full], room - each * tokens), (taken[full:], room - rest * tokens)):
                if len(some):
                    stacks.setdefault(left, _Stack()).push(some)
                    rooms |= 1 << left
            start += count
    members = stable_order(pack_of)
    return Packs(rows[members], np.cumsum(np.bincount(pack_of, minlength=packs)))


class _Stack:
    """Numbers, of which the last ones are taken first; pushed and popped as arrays."""

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def push(self, numbers: np.ndarray) -> None:
        """Put numbers on top, the last one highest."""
        self.arrays.append(numbers)
        self.count += len(numbers)

    def pop(self, most: int) -> np.ndarray:
        """Take at most so many, the highest first."""
        taken = []
        missing = min(most, self.count)
        self.count -= missing
        while missing:
            top = self.arrays.pop()
            if len(top) > missing:
                self.arrays.append(top[:-missing])
                top = top[-missing:]
            taken.append(top[::-1])
            missing -= len(top)
        return np.concatenate(taken)


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Places in ascending order of their keys, as a stable argsort has them: int64.

    Key and place are sorted as one number of 64 bits, which numpy does several times as fast.

    Args:
        keys: whole numbers; highest minus lowest below 2**31, at most 2**32 of them.
    """
    if not len(keys):
        return np.zeros(0, np.int64)
    both = ((keys.astype(np.int64) - int(keys.min())) << 32) | np.arange(len(keys))
    both.sort()
    return both & 0xFFFFFFFF


class EpochPlan(Sequence):
    """The optimizer steps of an epoch: lists of micro-batches, the same on every rank; see `plan_epoch`.

    Rank r has the micro-batches at r, r + data_parallel, ... of each step.
    """

    def __init__(self, packs: Packs, tokens: np.ndarray, learnt: np.ndarray, order: np.ndarray, shape: BatchShape):
        self.packs, self.tokens, self.learnt, self.order, self.shape = packs, tokens, learnt, order, shape
        self.steps = np.arange(shape.count_steps(len(order)))  # which part of `order` each step is

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        start = int(self.steps[step]) * self.shape.step_rows
        return self._deal(self.order[start : start + self.shape.step_rows])

    def _deal(self, packs: np.ndarray) -> list[MicroBatch]:
        """One step, the largest micro-batches first."""
        parts = self.shape.micro_batches
        num_items = int(self.learnt[packs].sum()) / parts
        cuts = [len(packs) * i // parts for i in range(parts + 1)]
        tokens = [0, *np.cumsum(self.tokens[packs]).tolist()]
        sizes = [tokens[b] - tokens[a] for a, b in itertools.pairwise(cuts)]
        numbers = packs.tolist()
        split = [[row for i in numbers[a:b] for row in self.packs[i]] for a, b in itertools.pairwise(cuts)]
        split = [split[i] for i in sorted(range(parts), key=sizes.__getitem__, reverse=True)]
        return [MicroBatch(rows or split[0][:1], num_items, is_filler=not rows) for rows in split]


@dataclass(frozen=True)
class RankBatches:
    """The micro-batches of one rank in an epoch, from a step on (counted from 0): a sampler for a DataLoader."""

    plan: EpochPlan
    rank: int
    first_step: int = 0

    def __len__(self) -> int:
        return (len(self.plan) - self.first_step) * self.plan.shape.accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self.first_step, len(self.plan)):
            yield from self.plan[step][self.rank :: self.plan.shape.data_parallel]


def plan_epoch(
    data: InstructionData, packs: Packs, shape: BatchShape, seed: int, epoch: int, by_length: bool = False
) -> EpochPlan:
    """Deal an epoch's rows out to optimizer steps, micro-batches and ranks; the same on every rank.

    Every step has accumulation x data_parallel micro-batches, so that all ranks stay in step and the engine's own count
    of accumulated micro-batches ends with the epoch. A last step with fewer rows spreads them; where there are fewer
    rows than micro-batches, fillers without labels make up the number.

    The engine divides by accumulation and averages over ranks. With num_items = learnt tokens of the step /
    (accumulation x data_parallel), the step's loss is the mean over all its learnt tokens, however they are split.

    The first epoch begins with the longest rows of all, so that a lack of memory shows at once. In each step the
    largest micro-batches come first, so that ranks have about as much to do at the same time.

    Args:
        packs: what takes the place of a row: one sample each, or several with `pack_rows`.
        by_length: put rows of about the same length into a step.
    """
    shuffler = Shuffler(f"{seed} {epoch}")
    order = shuffler.order(len(packs))
    tokens, learnt = packs.sums(data.lengths), packs.sums(data.answer_lengths)
    size = shape.step_rows
    if epoch == 1:
        first = _longest(tokens, learnt, order, size)
        rest = np.ones(len(order), bool)
        rest[first] = False
        order = np.concatenate((order[first], order[rest]))
    if by_length:
        # sorted within windows, so that chance still says who meets whom
        for start in range(0, len(order), 50 * size):
            window = order[start : start + 50 * size]
            window[:] = window[np.lexsort((-learnt[window], -tokens[window]))]
    plan = EpochPlan(packs, tokens, learnt, order, shape)
    if by_length:
        middle = plan.steps[1 : len(order) // size]  # all but the first, and a last one with fewer rows
        middle[:] = middle[shuffler.order(len(middle))]
    return plan


def _longest(tokens: np.ndarray, learnt: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Places in `order` of the longest packs, the longest first; of equal ones those with more learnt tokens."""
    by_place = tokens[order]
    places = np.arange(len(order))
    if count < len(order):  # few are worth sorting
        places = np.flatnonzero(by_place >= np.partition(by_place, -count)[-count])
    return places[np.lexsort((-learnt[order[places]], -by_place[places]))][:count]
