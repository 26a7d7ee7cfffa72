"""Histories of ChatGLM-6B and ChatGLM2-6B: their form, and which turns are lost of one that is too long."""

import numpy as np

from .messages import short_repr

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
        is_pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not (is_pair and isinstance(turn[0], str) and isinstance(turn[1], str)):
            raise ValueError(f"{expected} of texts; history[{number}] is {short_repr(turn)}")


def encode_fitting(
    tokenizer, queries: list[str], histories: list, max_src_len: int | None, rooms: list[int] | None, threads: int
) -> list:
    """Prompts, whose histories lose as few turns from their beginning as necessary to fit.

    A prompt that does not fit without any history is cut, as a question alone is.

    Args:
        tokenizer: encodes queries with their histories (`_encode_each`).
        rooms: maximum ids of each whole prompt; None for no limit.
    """
    encode_each = tokenizer._encode_each
    if not any(histories):
        return encode_each(queries, histories, max_src_len, threads)
    prompts = _encode_whole(tokenizer, queries, histories, threads)
    if max_src_len is None and rooms is None:
        return prompts

    def excess(i, prompt) -> int:
        """How many ids are too many; not above 0 where it fits."""
        most = 0 if max_src_len is None else len(prompt.text) - max_src_len
        whole = len(prompt.begin) + len(prompt.text) + len(prompt.end)
        return most if rooms is None else max(most, whole - rooms[i])

    # prompts that do not fit -> turns to drop next, the most that are known to be too few
    search = {
        i: (_turns_of(histories[i], over / max(1, len(prompt.text))), 0)  # (a text may leave no ids)
        for i, prompt in enumerate(prompts)
        if (over := excess(i, prompt)) > 0
    }
    fitting = {}
    while search:
        still, shorter = {}, {}
        for alone, limit in ((False, None), (True, max_src_len)):  # only a question alone is cut
            some = [i for i, (drop, _) in search.items() if (drop == len(histories[i])) == alone]
            left = [histories[i][search[i][0] :] for i in some]
            shorter |= zip(some, encode_each([queries[i] for i in some], left, limit, threads), strict=True)
        for i, (drop, too_few) in search.items():
            prompt, history = shorter[i], histories[i][drop:]
            if not history or excess(i, prompt) <= 0:
                fitting[i] = prompt._replace(dropped=drop)
                if drop - 1 > too_few:
                    still[i] = (drop - 1, too_few)
            elif i not in fitting:
                still[i] = (drop + 1, drop)
        search = still
    return [fitting.get(i, prompt) for i, prompt in enumerate(prompts)]


def _encode_whole(tokenizer, queries: list[str], histories: list, threads: int) -> list:
    """Prompts without a limit. Where one begins as the next does, as those of a conversation, it is encoded with it.

    They are the same as far as the last line of the shorter one, and that line is the last one of both.
    """
    mark = tokenizer.line_break_id
    texts = [tokenizer.build_prompt(query, history) for query, history in zip(queries, histories, strict=True)]
    lines = [text.rfind("\n") + 1 for text in texts]  # where the last line begins
    longest = list(range(len(texts)))
    for i in range(len(texts) - 2, -1, -1) if mark is not None else ():
        other = longest[i + 1]
        text, line = texts[i], lines[i]
        if line and texts[other].startswith(text[:line]) and texts[other][lines[other] :] == text[line:]:
            longest[i] = other
    rest = sorted({*longest})
    encoded = tokenizer._encode_each([queries[i] for i in rest], [histories[i] for i in rest], None, threads)
    prompts = dict(zip(rest, encoded, strict=True))
    ends = {}  # of the longest prompts: where each line ends
    for i, other in enumerate(longest):
        if i == other:
            continue
        ids = prompts[other].text
        if other not in ends:
            ends[other] = np.flatnonzero(ids == mark) + 1
        count = texts[i].count("\n")
        if len(ends[other]) != texts[other].count("\n"):  # a text has the vocabulary's name of a line break
            (prompts[i],) = tokenizer._encode_each([queries[i]], [histories[i]])
            continue
        parts = ids[: ends[other][count - 1]], ids[ends[other][-1] :]
        begin, _, end, cut, dropped = prompts[other]
        prompts[i] = type(prompts[other])(begin, np.concatenate(parts), end, cut, dropped)
    return [prompts[i] for i in range(len(texts))]


def _turns_of(history: list, share: float) -> int:
    """How many first turns have about this share of the characters of a history; at least one, if there is one."""
    if not history:
        return 0
    lengths = np.cumsum([len(question) + len(answer) + BETWEEN for question, answer in history])
    return min(len(history), 1 + int(np.searchsorted(lengths, share * lengths[-1])))
