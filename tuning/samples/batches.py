"""Puts samples together into the tensors of a micro-batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tuning.samples.encoding import IGNORE_INDEX, Sample


class MicroBatch(NamedTuple):
    """The samples of one forward pass on one rank."""

    rows: list[int]
    num_items: float  # divisor of the summed loss, see plan_epoch
    is_filler: bool = False  # keeps the ranks in step: its rows have no labels and add nothing to the loss


class Batch(dict):
    """The model's arguments: whole samples end to end in one row, without padding.

    input_ids and labels [1, tokens]; segments, the number of tokens and of context tokens of each sample;
    answer_positions [learnt tokens], where the labels are; num_items_in_batch.

    Args:
        rows: numbers of the samples in the data; none in a filler.
        samples: how many there are; 0 in a filler.
        arguments: of the model.
    """

    def __init__(self, rows: list[int], samples: int, **arguments):
        super().__init__(arguments)
        self.rows, self.samples = rows, samples
        self.tokens = arguments["input_ids"].numel() if samples else 0

    def to(self, device) -> dict:
        """The arguments with their tensors on `device`."""
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in self.items()}


def collate(samples: list[Sample], context_length: Callable[[list[int]], int], micro_batch: MicroBatch) -> Batch:
    """Put samples end to end; context_length is the tokenizer's."""
    input_ids = torch.tensor([[i for sample in samples for i in sample.input_ids]])
    positions, offset = [], 0
    for sample in samples:
        for start, end in () if micro_batch.is_filler else sample.spans:
            positions += range(offset + start, offset + end)
        offset += len(sample.input_ids)
    answer_positions = torch.tensor(positions, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[0, answer_positions] = input_ids[0, answer_positions]
    return Batch(
        rows=[] if micro_batch.is_filler else micro_batch.rows,
        samples=0 if micro_batch.is_filler else len(samples),
        input_ids=input_ids,
        labels=labels,
        segments=[(len(sample.input_ids), context_length(sample.input_ids)) for sample in samples],
        answer_positions=answer_positions,  # known here; to search for them on a GPU would be to wait for it
        num_items_in_batch=micro_batch.num_items,
    )
