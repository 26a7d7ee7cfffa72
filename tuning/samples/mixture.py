"""Several data files as one: their samples are numbered one after another, and each epoch has a share of each.

A file may come more than once in an epoch, or with some of its rows only, other ones each time. Replay is a share too:
rows of a general file, so that the model forgets less of what it could do.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import ConcatDataset

from tuning.samples import cache
from tuning.samples.dataset import InstructionData
from tuning.samples.epochs import Packs, stable_order
from tuning.samples.shuffle import Shuffler


class Share:
    """Packs of which each epoch has the same number; none comes again before each of them came.

    Args:
        packs: all of them.
        count: how many an epoch has; more than there are makes some or all come several times.
        lengths: tokens of each sample.
        longest: so many of the longest packs are in the first epoch, so that a lack of memory shows at once; but at
            most half of what is drawn.
        seed: of the random draw.
    """

    def __init__(self, packs: Packs, count: int, lengths: np.ndarray, longest: int = 0, seed: str = ""):
        self.packs, self.count, self.seed = packs, count, seed
        self.whole, self.some = divmod(count, len(packs))
        self.first = np.zeros(0, np.int64)  # packs that come first of all
        if self.some and not self.whole:
            self.first = stable_order(packs.sums(lengths))[len(packs) - min(longest, count // 2) :]
        self.cycle, self.order = -1, np.zeros(0, np.int64)  # see _draw_cycle

    @property
    def rows(self) -> float:
        """Samples in an epoch, on average."""
        return self.count * len(self.packs.samples) / len(self.packs)

    def epoch_packs(self, epoch: int) -> Packs:
        """The packs of an epoch, from 1 on."""
        every = np.tile(np.arange(len(self.packs)), self.whole)
        return self.packs.select(np.concatenate((every, self._drawn(epoch))))

    def _drawn(self, epoch: int) -> np.ndarray:
        """What an epoch has besides all packs, `whole` times: the next `some` of the cycles."""
        start, end = (epoch - 1) * self.some, epoch * self.some
        parts = [np.zeros(0, np.int64)]
        while start < end:
            cycle, place = divmod(start, len(self.packs))
            parts.append(self._draw_cycle(cycle)[place : place + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _draw_cycle(self, cycle: int) -> np.ndarray:
        """All packs in the order in which they come in a cycle. Each begins with others than the last one ended with,
        so that an epoch in which two meet has none twice."""
        if cycle < self.cycle:
            self.cycle = -1
        while self.cycle < cycle:
            self.cycle += 1
            order = Shuffler(f"{self.seed} {self.cycle + 1}").order(len(self.packs))
            before = (
                self.order[len(self.order) - self.cycle * len(self.packs) % self.some :] if self.cycle else order[:0]
            )
            ahead, behind = (self.first, order[:0]) if not self.cycle else (order[:0], before)
            others = order[~np.isin(order, np.concatenate((ahead, behind)))]
            self.order = np.concatenate((ahead, others, order[np.isin(order, behind)]))
        return self.order


class Mixture(InstructionData):
    """The samples of several files, and what an epoch has of them.

    Args:
        parts: their samples are numbered one after another.
        shares: of packs, in these numbers.
    """

    def __init__(self, parts: Sequence[InstructionData], shares: Sequence[Share] = ()):
        self.context_length = parts[0].context_length
        self.samples = ConcatDataset([one.samples for one in parts])
        self.lengths = np.concatenate([one.lengths for one in parts])
        self.answer_lengths = np.concatenate([one.answer_lengths for one in parts])
        self.texts = np.concatenate([one.texts for one in parts])
        self.files = [where for one in parts for where in one.files]
        self.parts, self.shares = parts, shares

    def prompts(self) -> Iterator[memoryview]:
        """See InstructionData."""
        for one in self.parts:
            yield from one.prompts()

    @property
    def rows(self) -> float:
        """Samples in an epoch, on average."""
        return sum(share.rows for share in self.shares)

    def epoch_packs(self, epoch: int) -> Packs:
        """The packs of an epoch, from 1 on; each epoch has as many."""
        first, *others = (share.epoch_packs(epoch) for share in self.shares)
        return sum(others, start=first)


def weigh(
    task: Mixture,
    weights: Sequence[float],
    rows: np.ndarray,
    pack: Callable[[np.ndarray], Packs],
    longest: int,
    seed: int,
) -> None:
    """Give an epoch each row as often as the weight of its file says, on average.

    Args:
        weights: of the parts.
        rows: numbers of the samples to train on, ascending.
        pack: puts some of them into packs: all those with weight 1 together, those of any other file by themselves.
        longest: see Share.
    """
    file = np.repeat(np.arange(len(weights)), [len(one) for one in task.parts])[rows]
    weight = np.array(weights)[file]
    groups = [("", 1.0, rows[weight == 1])]
    groups += [(f"file {i + 1}", one, rows[file == i]) for i, one in enumerate(weights) if one != 1]
    task.shares = []
    for name, one, some in groups:
        if len(some):
            packs = pack(some)
            count = max(1, round(one * len(packs)))
            task.shares.append(Share(packs, count, task.lengths, longest, f"{name} {seed}"))


def add_replay(
    task: Mixture, general: InstructionData, packs: Packs, ratio: float, longest: int, seed: int
) -> tuple[Mixture, str]:
    """The task, with some rows of a general file in each epoch; and a line about these.

    Args:
        packs: of the general file.
        ratio: share of general rows among all rows of an epoch, above 0 and below 1; on average over epochs where
            packs hold several rows.
        longest: see Share.
    """
    both = Mixture([task, general])
    count = max(1, round(task.rows * ratio / (1 - ratio) * len(packs) / len(general)))
    share = Share(packs.moved(len(task)), count, both.lengths, longest, f"replay {seed}")
    both.shares = [*task.shares, share]
    about = "" if len(packs) == len(general) else "about "
    part = f"{share.rows / both.rows:.1%} of all"
    return both, f"{about}{share.rows:.0f} rows an epoch, {part}, of {general.summary()}"


def shared_samples(files: Sequence[InstructionData], folder: str | None) -> list[str]:
    """A warning for each file that has samples which an earlier one has too.

    Args:
        folder: where the counts are kept, beside the prepared files; None to count at each start.
    """
    if len(files) < 2:
        return []
    names = [os.path.basename(one.samples.ids.filename) for one in files]
    kept = cache.cache_file(folder, *names, ending="shared") if folder else None
    counts = _read_counts(kept, len(files)) if kept else None
    if counts is None:
        counts = _count_shared(files)
        with contextlib.suppress(OSError):  # they are counted again next time
            if kept:
                with cache.whole_file(kept, "x", encoding="utf-8") as file:
                    json.dump(counts, file)
    warnings = []
    for later, earlier, count in counts:
        path, before = files[later].files[0][0], files[earlier].files[0][0]
        if files[later].content == files[earlier].content:
            warnings.append(f"warning: {path} has the very rows of {before}: they come from both")
        else:
            warnings.append(f"warning: {count} samples of {path} are in {before} too")
    return warnings


def _read_counts(path: str, files: int) -> list[list[int]] | None:
    """What `_count_shared` counted before; None if that is not known."""
    try:
        with open(path, encoding="utf-8") as file:
            counts = json.load(file)
        whole = all(0 <= earlier < later < files and count > 0 for later, earlier, count in counts)
        return counts if whole else None
    except (OSError, ValueError, TypeError):
        return None


def _count_shared(files: Sequence[InstructionData]) -> list[list[int]]:
    """For each pair of files that share samples: the later one, the earlier one, how many of the later one's."""
    counts, hashes = [], []
    for later, data in enumerate(files):
        content = memoryview(data.samples.ids).cast("B")
        ends = 4 * data.samples.records["end"]
        starts = ends - 4 * data.lengths
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        hashes.append(np.fromiter((hash(bytes(content[start:end])) for start, end in spans), np.int64, len(data)))
        for earlier in range(later):
            if count := int(np.count_nonzero(np.isin(hashes[later], hashes[earlier]))):
                counts.append([later, earlier, count])
    return counts
