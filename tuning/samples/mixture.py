"""Replay: rows of a general file are mixed into the training data, so that the model forgets less of what it could do.

Each epoch has all rows of the training file and some of the replay file, different ones each time.
"""

import numpy as np
from torch.utils.data import ConcatDataset

from tuning.samples.dataset import InstructionData
from tuning.samples.epochs import Packs, stable_order
from tuning.samples.shuffle import Shuffler


class Mixture(InstructionData):
    """The samples of two files, numbered one after another, and the choice of them for each epoch.

    Args:
        task: every epoch has its rows that are in task_packs.
        general: every epoch has some of its rows: whole general_packs are drawn.
        ratio: share of general rows among all rows of an epoch, above 0 and below 1; on average over epochs where
            packs hold several rows.
        longest: so many of the longest packs are in the first epoch, so that a lack of memory shows at once; but at
            most half of what it draws.
        seed: of the random draw, together with the epoch.
    """

    def __init__(
        self,
        task: InstructionData,
        task_packs: Packs,
        general: InstructionData,
        general_packs: Packs,
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
        general_packs = general_packs.moved(len(task))
        self.packs = general_packs.select(stable_order(general_packs.sums(self.lengths)))  # the longest last
        task_rows = len(task_packs.samples)
        general_rows = task_rows * ratio / (1 - ratio)  # per epoch
        self.drawn = max(1, round(general_rows * len(self.packs) / len(general)))  # general packs per epoch
        self.longest, self.seed = min(longest, self.drawn // 2), seed
        rows = self.drawn * len(general) / len(self.packs)
        about = "" if len(self.packs) == len(general) else "about "
        self.text = f"{about}{rows:.0f} rows an epoch, {rows / (rows + task_rows):.1%} of all, of {general.summary()}"

    def summary(self) -> str:
        """One line: the replay file, and how much of it is in an epoch."""
        return self.text

    def epoch_packs(self, epoch: int) -> Packs:
        """All packs of the task and some general ones: the same number in each epoch; epochs count from 1.

        None is drawn twice before each was drawn once.
        """
        whole, some = divmod(self.drawn, len(self.packs))
        first = self.longest if epoch == 1 and not whole else 0
        rest = len(self.packs) - first
        drawn = Shuffler(f"replay {self.seed} {epoch}").sample(rest, some - first)
        every = np.tile(np.arange(len(self.packs)), whole)
        return self.task_packs + self.packs.select(np.concatenate((every, np.arange(rest, len(self.packs)), drawn)))
