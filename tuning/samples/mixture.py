"""Replay: rows of a general file beside those of the task, so that a model forgets less of what it could do.

Each epoch has all rows of the training file, and some of the replay file: other ones each time.
"""

import random

import numpy as np
from torch.utils.data import ConcatDataset

from tuning.samples.dataset import InstructionData


class Mixture(InstructionData):
    """The samples of two files, numbered one after another, and what of them an epoch takes.

    Args:
        task: has rows that every epoch has: those in task_packs.
        general: has rows that an epoch has some of: whole general_packs are drawn.
        ratio: share of general rows among all rows of an epoch, above 0 and below 1; where packs hold several rows, of
            the mean over epochs.
        longest: so many of the longest packs are in the first epoch, that a lack of memory shows at once; but at most
            half of what it draws.
        seed: of the draw, together with the epoch.
    """

    def __init__(
        self,
        task: InstructionData,
        task_packs: list[list[int]],
        general: InstructionData,
        general_packs: list[list[int]],
        ratio: float,
        longest: int,
        seed: int,
    ):
        self.context_length = task.context_length
        self.samples = ConcatDataset([task.samples, general.samples])
        self.lengths = np.concatenate((task.lengths, general.lengths))
        self.answer_lengths = np.concatenate((task.answer_lengths, general.answer_lengths))
        self.files = task.files + general.files
        self.task_packs = task_packs
        self.packs = sorted(([row + len(task) for row in some] for some in general_packs), key=self.tokens)
        task_rows = sum(map(len, task_packs))
        wanted = task_rows * ratio / (1 - ratio)  # general rows of an epoch
        self.drawn = max(1, round(wanted * len(self.packs) / len(general)))  # packs of an epoch
        self.longest, self.seed = min(longest, self.drawn // 2), seed
        rows = self.drawn * len(general) / len(self.packs)
        about = "" if len(self.packs) == len(general) else "about "
        self.text = f"{about}{rows:.0f} rows an epoch, {rows / (rows + task_rows):.1%} of all, of {general.summary()}"

    def summary(self) -> str:
        """One line on the replay file, and what an epoch has of it."""
        return self.text

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """All packs of the task, and some general ones: the same number in each epoch, counted from 1.

        None comes twice before each has come once.
        """
        rng = random.Random(f"replay {self.seed} {epoch}")
        whole, some = divmod(self.drawn, len(self.packs))
        first = self.longest if epoch == 1 and not whole else 0
        rest = len(self.packs) - first
        return self.task_packs + self.packs * whole + self.packs[rest:] + rng.sample(self.packs[:rest], some - first)
