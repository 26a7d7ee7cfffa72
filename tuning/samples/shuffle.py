"""What `random.Random` draws, many numbers at a time: the same bit for bit, in a fraction of the time."""

import random

import numpy as np

WORDS = 1 << 16  # that are drawn from the generator at once, at least


class Shuffler:
    """Draws what `random.Random(seed)` would draw.

    Args:
        seed: a string.
    """

    def __init__(self, seed: str | int):
        _, state, _ = random.Random(seed).getstate()
        self._generator = np.random.MT19937()
        self._generator.state = {
            "bit_generator": "MT19937",
            "state": {"key": np.array(state[:-1], np.uint32), "pos": state[-1]},
        }
        self._words = np.zeros(0, np.uint32)  # drawn and not yet used

    def order(self, count: int) -> np.ndarray:
        """range(count) as `shuffle` would leave it: int64 [count].

        shuffle swaps each place, from the last to the second, with one that is drawn from the places up to itself.
        """
        partners = np.zeros(count, np.int64)  # place -> the one it is swapped with
        partners[1:] = self._below(np.arange(count, 1, -1))[::-1]
        return apply_swaps(partners)

    def _below(self, bounds: np.ndarray) -> np.ndarray:
        """A number below each bound, as `randrange` draws them one after another.

        It draws as many bits as the bound has, and again where they make a number that is not below it.

        Args:
            bounds: none above the one before it.
        """
        numbers = np.zeros(len(bounds), np.int64)
        done = 0
        while done < len(bounds):
            bits = int(bounds[done]).bit_length()
            # the bounds that have as many bits
            end = len(bounds) - int(np.searchsorted(bounds[::-1], 1 << (bits - 1)))
            done += self._accept(bounds[done:end], bits, numbers[done:end])
        return numbers

    def _accept(self, bounds: np.ndarray, bits: int, numbers: np.ndarray) -> int:
        """Fill the first of `numbers`, and return how many; all bounds have so many bits."""
        if not len(self._words):
            self._words = self._generator.random_raw(WORDS).astype(np.uint32)
        drawn = (self._words[: 2 * len(bounds)] >> np.uint32(32 - bits)).astype(np.int64)
        # The bound of a number depends on how many before it were accepted. A guess is right at least up to the first
        # place where it is wrong, and nearly all places do not depend on it: a few rounds settle them all.
        accepted = drawn < bounds[0]
        while True:
            before = np.cumsum(accepted) - accepted
            again = drawn < bounds[np.minimum(before, len(bounds) - 1)]
            if np.array_equal(again, accepted):
                break
            accepted = again
        places = np.flatnonzero(accepted)[: len(bounds)]
        numbers[: len(places)] = drawn[places]
        used = places[-1] + 1 if len(places) == len(bounds) else len(drawn)
        self._words = self._words[used:]
        return len(places)


def apply_swaps(partners: np.ndarray) -> np.ndarray:
    """range(len(partners)) after each place, from the last to the first, was swapped with its partner: int64.

    At its turn a place gets what its partner holds: what was put there by the last of the earlier swaps that had the
    same partner, or else the partner itself. What a place puts there is what it holds at its turn, found in the same
    way, until a place that no swap has changed yet.

    Args:
        partners: [places], each at most the place itself.
    """
    count = len(partners)
    keys = (partners << 32) | np.arange(count)  # swaps with the same partner together; sorts faster than an argsort
    keys.sort()
    sorted_partners, swaps = keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32)
    del keys
    first = np.ones(count, bool)
    np.not_equal(sorted_partners[1:], sorted_partners[:-1], out=first[1:])
    earlier = np.full(count, -1, np.int32)  # swap -> the one before it with the same partner, at a later place
    earlier[swaps[:-1][~first[1:]]] = swaps[1:][~first[1:]]
    holds = np.arange(count, dtype=np.int32)  # place -> what it holds at its turn, as the place that held it before
    holds[sorted_partners[first]] = swaps[first]
    with_itself = np.flatnonzero(partners == np.arange(count))
    holds[with_itself] = np.where(earlier[with_itself] < 0, with_itself, earlier[with_itself])
    while not np.array_equal(further := holds[holds], holds):
        holds = further
    return np.where(earlier < 0, partners, holds[earlier])
