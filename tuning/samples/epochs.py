"""The order of an epoch: rows packed together and dealt to micro-batches, steps and ranks."""

import itertools
import random
from collections.abc import Sequence

from tuning.samples.batches import MicroBatch
from tuning.samples.dataset import InstructionData


def pack_rows(data: InstructionData, max_len: int, seed: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Put samples (rows; all of them for None) together, up to max_len tokens: the longest first, each where it leaves
    the least room."""
    packs: list[list[int]] = []
    room: dict[int, list[int]] = {}  # packs by the tokens that still fit
    rooms = 0  # bit n is set where room[n] holds a pack
    order = list(range(len(data)) if rows is None else rows)
    random.Random(seed).shuffle(order)  # so that chance says which of equal length come together
    for i in sorted(order, key=data.length, reverse=True):
        tokens = data.length(i)
        fitting = rooms >> tokens
        if fitting:
            left = tokens + (fitting & -fitting).bit_length() - 1
            pack = room[left].pop()
            if not room[left]:
                rooms &= ~(1 << left)
        else:
            left, pack = max_len, len(packs)
            packs.append([])
        packs[pack].append(i)
        left -= tokens
        room.setdefault(left, []).append(pack)
        rooms |= 1 << left
    return packs


def count_steps(rows: int, batch_size: int, accumulation: int, world_size: int) -> int:
    """Optimiser steps of an epoch; the last one may hold fewer rows."""
    return -(-rows // (batch_size * accumulation * world_size))


def plan_epoch(
    data: InstructionData,
    packs: list[list[int]],
    batch_size: int,
    accumulation: int,
    world_size: int,
    seed: int,
    epoch: int,
    by_length: bool = False,
) -> list[list[MicroBatch]]:
    """Deal an epoch's rows out to optimiser steps, micro-batches and ranks; the same on every rank.

    Every step has accumulation x world_size micro-batches, so that all ranks stay in step and the engine's own count of
    accumulated micro-batches ends with the epoch. A last step with fewer rows spreads them; where there are fewer rows
    than micro-batches, fillers without labels make up the number.

    The engine divides by accumulation and averages over ranks. With num_items = answer tokens of the step /
    (accumulation x world_size), the step's loss is the mean over all its answer tokens, however they are split.

    The first epoch begins with the longest rows of all, so that a lack of memory shows at once. In each step the
    largest micro-batches come first, so that ranks have about as much to do at the same time.

    Args:
        packs: what takes the place of a row: one sample each, or several with `pack_rows`.
        by_length: put rows of about the same length into a step.

    Returns:
        steps, each a list of micro-batches; rank r takes those at r, r + world_size, ...
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(packs)))
    rng.shuffle(order)
    parts = accumulation * world_size
    size = batch_size * parts

    def longest_first(some):
        return sorted(some, key=lambda i: (data.tokens(packs[i]), data.answer_tokens(packs[i])), reverse=True)

    if epoch == 1:
        first = longest_first(order)[:size]
        taken = set(first)
        order = first + [i for i in order if i not in taken]
    if by_length:
        window = 50 * size  # sorted within, so that chance still says who meets whom
        order = [i for a in range(0, len(order), window) for i in longest_first(order[a : a + window])]

    steps = [_deal_step(data, [packs[i] for i in order[a : a + size]], parts) for a in range(0, len(order), size)]
    if by_length:
        middle = steps[1 : len(order) // size]  # but the first, and a last one with fewer rows
        rng.shuffle(middle)
        steps[1 : 1 + len(middle)] = middle
    return steps


def _deal_step(data: InstructionData, packs: list[list[int]], parts: int) -> list[MicroBatch]:
    """One optimiser step as `parts` micro-batches, the largest first."""
    num_items = sum(map(data.answer_tokens, packs)) / parts
    cuts = [len(packs) * i // parts for i in range(parts + 1)]
    split = [[row for pack in packs[a:b] for row in pack] for a, b in itertools.pairwise(cuts)]
    split.sort(key=data.tokens, reverse=True)
    return [MicroBatch(rows or split[0][:1], num_items, is_filler=not rows) for rows in split]
