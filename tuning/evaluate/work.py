"""The rows of a file as work for all ranks: groups of rows, of which a free rank takes the next."""

import itertools
from collections.abc import Iterator, Set

import torch

GROUP_TOKENS = 1024  # of prompts that are computed together, with padding
NUMBERS = itertools.count()  # of the Works of this process, the same on all ranks: each counts for itself


def plan_groups(lengths: list[int], rows: int, tokens: int | None = GROUP_TOKENS) -> list[list[int]]:
    """Groups of rows with prompts of similar length, the longest first: what does not fit in memory shows at once.

    The same on every rank and in every run, because a prompt's numbers depend, within rounding, on its group.

    Args:
        lengths: tokens of each row's prompt.
        rows: maximum rows of a group.
        tokens: maximum tokens of a group with more than one row, with padding; None for any number.
    """
    groups: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not room:
            groups.append([])
            room = rows if tokens is None else max(1, min(rows, tokens // max(1, lengths[row])))
        groups[-1].append(row)
        room -= 1
    return groups


class Work:
    """Deals groups of rows to the ranks, and counts the answers of all of them.

    Args:
        groups: of all rows; the same on every rank.
        answered: rows that have an answer already; groups that hold no others are left out.
    """

    def __init__(self, groups: list[list[int]], answered: Set[int]):
        self.groups = [group for group in groups if not answered >= set(group)]
        if torch.distributed.is_initialized():
            store = torch.distributed.distributed_c10d._get_default_store()
            self.store = torch.distributed.PrefixStore(f"predict-{next(NUMBERS)}", store)
            self.store.add("taken", 0)  # where the rank with the store has gone, this fails before a file is touched
        else:
            self.store = torch.distributed.HashStore()

    def take(self) -> Iterator[list[int]]:
        """The groups for this rank: each is taken when it is asked for."""
        while (number := self.store.add("taken", 1) - 1) < len(self.groups):
            yield self.groups[number]

    def count(self, more: int = 0) -> int:
        """Add to the number of answers. Returns how many all ranks have made so far."""
        return self.store.add("answers", more)
