"""Histories of ChatGLM-6B and ChatGLM2-6B: their form, and which turns are lost of one that is too long."""

from collections.abc import Callable

import numpy as np

from .checkpoint import short_repr

BETWEEN = 8  # characters, about, that the template has beside the texts of a turn


def check_pairs(history) -> None:
    """Check that earlier turns are pairs of texts, the history of ChatGLM-6B and ChatGLM2-6B.

    Raises:
        ValueError: they are not.
    """
    expected = "the history of this family is a list of pairs (question, answer)"
    if not isinstance(history, (list, tuple)):
        raise ValueError(f"{expected}, not {short_repr(history)}")
    for number, turn in enumerate(history):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"{expected} of texts; history[{number}] is {short_repr(turn)}")


def encode_fitting(
    encode_each: Callable,
    queries: list[str],
    histories: list,
    max_src_len: int | None,
    rooms: list[int] | None,
    threads: int,
) -> list:
    """Prompts, whose histories lose as few turns from their beginning as necessary to fit.

    A prompt that does not fit without any history is cut, as a question alone is.

    Args:
        encode_each: the tokenizer's, of queries, histories, max_src_len and threads.
        rooms: maximum ids of each whole prompt; None for no limit.
    """
    if not any(histories) or (max_src_len is None and rooms is None):
        return encode_each(queries, histories, max_src_len, threads)

    def excess(i, prompt) -> int:
        """How many ids are too many; not above 0 where it fits."""
        most = 0 if max_src_len is None else len(prompt.text) - max_src_len
        whole = len(prompt.begin) + len(prompt.text) + len(prompt.end)
        return most if rooms is None else max(most, whole - rooms[i])

    histories = [history or [] for history in histories]
    prompts = encode_each(queries, histories, None, threads)
    # prompts that do not fit -> turns to drop next, the most that are known to be too few
    search = {
        i: (_turns_of(histories[i], over / max(1, len(prompt.text))), 0)  # (a text may leave no ids)
        for i, prompt in enumerate(prompts)
        if (over := excess(i, prompt)) > 0
    }
    fitting = {}
    while search:
        still = {}
        for i, (drop, too_few) in search.items():
            history = histories[i][drop:]
            (prompt,) = encode_each([queries[i]], [history], None if history else max_src_len)
            if not history or excess(i, prompt) <= 0:
                fitting[i] = prompt._replace(dropped=drop)
                if drop - 1 > too_few:
                    still[i] = (drop - 1, too_few)
            elif i not in fitting:
                still[i] = (drop + 1, drop)
        search = still
    return [fitting.get(i, prompt) for i, prompt in enumerate(prompts)]


def _turns_of(history: list, share: float) -> int:
    """How many first turns have about this share of the characters of a history; at least one, if there is one."""
    if not history:
        return 0
    lengths = np.cumsum([len(question) + len(answer) + BETWEEN for question, answer in history])
    return min(len(history), 1 + int(np.searchsorted(lengths, share * lengths[-1])))
