"""Plans of epochs as arrays: what `random` and plain lists give, in a small part of their time and memory."""

import itertools
import random

import numpy as np
import pytest

from tuning.samples.batches import MicroBatch
from tuning.samples.epochs import BatchShape, Packs, RankBatches, pack_rows, plan_epoch, stable_order
from tuning.samples.mixture import Mixture, add_replay, weigh
from tuning.samples.shuffle import Shuffler

# The plain way, with lists


def plain_packs(lengths, max_len, seed, rows):
    packs, room, rooms = [], {}, 0
    order = list(rows)
    random.Random(seed).shuffle(order)
    for i in sorted(order, key=lambda i: lengths[i], reverse=True):
        tokens = lengths[i]
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


def plain_plan(lengths, learnt, packs, shape, seed, epoch, by_length):
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(packs)))
    rng.shuffle(order)
    parts = shape.accumulation * shape.data_parallel
    size = shape.rows * parts

    def total(values, rows):
        return sum(values[row] for row in rows)

    def longest_first(some):
        return sorted(some, key=lambda i: (total(lengths, packs[i]), total(learnt, packs[i])), reverse=True)

    def deal(some):
        cuts = [len(some) * i // parts for i in range(parts + 1)]
        split = [[row for pack in some[a:b] for row in pack] for a, b in itertools.pairwise(cuts)]
        split.sort(key=lambda rows: total(lengths, rows), reverse=True)
        items = sum(total(learnt, pack) for pack in some) / parts
        return [MicroBatch(rows or split[0][:1], items, is_filler=not rows) for rows in split]

    if epoch == 1:
        first = longest_first(order)[:size]
        order = first + [i for i in order if i not in set(first)]
    if by_length:
        order = [i for a in range(0, len(order), 50 * size) for i in longest_first(order[a : a + 50 * size])]
    steps = [deal([packs[i] for i in order[a : a + size]]) for a in range(0, len(order), size)]
    if by_length:
        middle = steps[1 : len(order) // size]
        rng.shuffle(middle)
        steps[1 : 1 + len(middle)] = middle
    return steps


def plain_share(packs, count, lengths, longest, seed, epochs):
    """What each epoch has of some packs: all of them `whole` times, and the next ones of a queue, shuffled anew when it
    is empty."""
    whole, some = divmod(count, len(packs))
    queue, cycle, found = [], 0, []
    for _ in range(epochs):
        taken, queue = queue[:some], queue[some:]
        if len(taken) < some:
            cycle += 1
            numbers = list(range(len(packs)))
            random.Random(f"{seed} {cycle}").shuffle(numbers)
            first = []
            if cycle == 1 and not whole:
                by_length = sorted(range(len(packs)), key=lambda i: sum(lengths[row] for row in packs[i]))
                first = by_length[len(packs) - min(longest, count // 2) :]
            others = [i for i in numbers if i not in first and i not in taken]
            numbers = first + others + [i for i in numbers if i in taken]
            missing = some - len(taken)
            taken, queue = taken + numbers[:missing], numbers[missing:]
        found.append(packs * whole + [packs[i] for i in taken])
    return found


class Data:
    """Stands for InstructionData: random lengths, often equal ones."""

    context_length, files = None, []

    def __init__(self, rng, count):
        self.lengths = rng.integers(2, rng.integers(4, 150), count)
        self.answer_lengths = rng.integers(1, self.lengths)
        self.samples, self.texts = list(range(count)), np.zeros(count, np.int32)

    def __len__(self):
        return len(self.lengths)

    def summary(self):
        return ""


@pytest.mark.parametrize("seed", range(6))
def test_plans_are_those_of_the_plain_way(seed):
    rng = np.random.default_rng(seed)
    for count in (1, 2, 3, 7, 40, 333, 1200):
        data = Data(rng, count)
        lengths, learnt = data.lengths.tolist(), data.answer_lengths.tolist()
        max_len = max(lengths) + int(rng.integers(0, 80))
        some = rng.permutation(count)[: -(-count * 2 // 3)]
        packed = pack_rows(data, max_len, seed, some)
        plain_packed = plain_packs(lengths, max_len, seed, some.tolist())
        assert list(packed) == plain_packed
        assert list(pack_rows(data, max_len, seed)) == plain_packs(lengths, max_len, seed, range(count))
        shape = BatchShape(*rng.integers(1, 5, 3).tolist())
        for packs, plain in ((packed, plain_packed), (Packs(np.arange(count)), [[i] for i in range(count)])):
            for epoch, by_length in itertools.product((1, 2), (False, True)):
                plan = plan_epoch(data, packs, shape, seed, epoch, by_length)
                expected = plain_plan(lengths, learnt, plain, shape, seed, epoch, by_length)
                assert list(plan) == expected
                assert len(plan) == len(expected) == shape.count_steps(len(plain))
                for rank in range(shape.data_parallel):
                    batches = RankBatches(plan, rank, len(plan) // 3)
                    mine = [m for step in expected[len(plan) // 3 :] for m in step[rank :: shape.data_parallel]]
                    assert list(batches) == mine and len(batches) == len(mine)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.8])
def test_mixtures_are_those_of_the_plain_way(ratio, packing):
    rng = np.random.default_rng(5)
    for tasks, generals in ((1, 1), (40, 7), (30, 500), (400, 300)):
        task, general = Data(rng, tasks), Data(rng, generals)
        lengths = [*task.lengths.tolist(), *general.lengths.tolist()]
        both = [pack_rows(d, 200, 3) if packing else Packs(np.arange(len(d))) for d in (task, general)]
        files = Mixture([task])
        weigh(files, [1], np.arange(tasks), lambda rows, packs=both[0]: packs, 4, 3)
        mixture, _ = add_replay(files, general, both[1], ratio, 4, seed=3)
        packs = [[row + tasks for row in pack] for pack in both[1]]
        expected = plain_share(packs, mixture.shares[1].count, lengths, 4, "replay 3", 9)
        for epoch in (1, 2, 3, 9, 4):
            assert list(mixture.epoch_packs(epoch)) == list(both[0]) + expected[epoch - 1]


@pytest.mark.parametrize("packing", [False, True])
def test_weights_say_how_often_the_rows_of_a_file_come(packing):
    rng = np.random.default_rng(7)
    files = [Data(rng, count) for count in (30, 20, 40, 25)]
    weights = [1, 0.5, 2, 0.3]
    mixture = Mixture(files)
    rows = np.array([row for row in range(len(mixture)) if row % 7])  # as --eval_ratio leaves them
    weigh(mixture, weights, rows, lambda some: pack_rows(mixture, 200, 3, some) if packing else Packs(some), 4, 1)
    file = np.repeat(range(4), [len(one) for one in files])
    epochs = [[row for pack in mixture.epoch_packs(epoch) for row in pack] for epoch in range(1, 41)]
    assert len({len(mixture.epoch_packs(epoch)) for epoch in range(1, 41)}) == 1
    counts = np.array([np.bincount(some, minlength=len(file)) for some in epochs])
    assert not counts[:, 0::7].any()
    for number, weight in enumerate(weights):
        mine = counts[:, (file == number) & np.isin(np.arange(len(file)), rows)]
        assert (mine.max(1) <= max(1, weight)).all() and (weight < 1 or (mine == weight).all())
        total = np.cumsum(mine, axis=0)
        assert (total.max(1) - total.min(1) <= 1).all()  # none twice before each once
        assert packing or (mine.sum(1) == round(weight * mine.shape[1])).all()
    assert packing or mixture.rows == len(epochs[0])


@pytest.mark.parametrize("seed", ["1 1", 1234])
def test_the_shuffler_draws_what_random_draws(seed):
    plain, ours = random.Random(seed), Shuffler(seed)
    for count in (0, 1, 2, 3, 64, 65, 1000, 70000):
        order = list(range(count))
        plain.shuffle(order)
        assert ours.order(count).tolist() == order


def test_packs_are_lists_of_numbers():
    single, packs = Packs(np.array([5, 3, 9])), Packs(np.array([4, 1, 7, 2, 8, 0]), np.array([2, 3, 6]))
    assert list(single) == [[5], [3], [9]] and list(packs) == [[4, 1], [7], [2, 8, 0]]
    assert packs[-1] == [2, 8, 0] and packs[-3] == [4, 1]
    assert packs.sums(np.arange(10) ** 2).tolist() == [17, 49, 68]
    assert list(packs.select(np.array([2, 0, 2]))) == [[2, 8, 0], [4, 1], [2, 8, 0]]
    assert list(packs.select(np.array([], int))) == []
    assert list(single + packs) == list(single) + list(packs)
    assert list(packs + single.moved(10)) == [*packs, [15], [13], [19]]
    assert stable_order(np.array([3, -1, 3, 0])).tolist() == [1, 3, 0, 2]
    with pytest.raises(IndexError):
        packs[3]
