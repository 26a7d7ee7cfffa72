"""Plain text, rows {"text": ...}, for continued training: which rows these are, and the blocks that they become.

A block is the family's prefix (`[gMASK] sop`; for ChatGLM-6B `[gMASK] <sop>`: its context is empty) and then a piece of
the text, all of which is learnt. Every token of a text is in exactly one block; the last block ends with the end token.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tuning.samples.dialogue import Dialogue, Message

KEY = "text"
# keys (as `formats.plain_name` gives them) of a text that is to be learnt as the answer to another one
ANSWERS = {
    "answer",
    "answers",
    "completion",
    "label",
    "output",
    "outputs",
    "response",
    "responses",
    "summary",
    "target",
}
FIRST_BLOCK, LATER_BLOCK = 1, 2  # a record's `text`; 0: the sample is no block of a text


def is_text(row: dict, others: frozenset[str]) -> bool:
    """Whether a row is plain text: it has `text` and none of the keys of an instruction row (`others`)."""
    return KEY in row and others.isdisjoint(row)


def almost_text(row: dict, key: str, others: frozenset[str]) -> tuple[str, str] | None:
    """Kind and description of what keeps a row with `text` from being plain text, None if nothing does.

    Args:
        key: as it is written in the row.
        others: see `is_text`.
    """
    if key != KEY:
        return "type", f"the key {key[:40]!r} must be written {KEY!r}"
    if mixed := sorted(others.intersection(row)):
        ours = ", ".join(map(repr, mixed))
        return "format", f"plain text ({KEY!r}) and {ours} in one row: a row has instruction and output, or text alone"
    return None


def text_problem(row: dict, plain_names: dict[str, str]) -> tuple[str, str] | None:
    """Kind and description of what is wrong with a row of plain text, None if nothing is; see `formats.Flaw`.

    Args:
        row: its text is a string.
        plain_names: each key by its plain name.
    """
    for name in sorted(ANSWERS & plain_names.keys()):
        key = plain_names[name]
        if isinstance(row[key], str | list) and row[key]:
            return "format", (
                f"a row of plain text has no answer, but this one has the key {key[:40]!r} too; to learn that as the "
                "answer, write it under output and the text under instruction; if it is none, remove the key"
            )
    return None if row[KEY].strip() else ("empty", "text is empty")


def text_dialogue(row: dict) -> Dialogue:
    """The normal form of a row of plain text: one message of the role "text"."""
    return Dialogue((Message("text", row[KEY], learn=True),))


class Block(NamedTuple):
    """One block of a text, with the fields of a tokenizer's `Encoded`.

    text: FIRST_BLOCK or LATER_BLOCK.
    cut, dropped: nothing is lost of a text.
    """

    dialogue: int
    parts: tuple[np.ndarray, ...]
    length: int
    spans: tuple[tuple[int, int], ...]
    text: int
    cut: bool = False
    dropped: int = 0


def encode_with_texts(
    tokenizer,
    dialogues: Sequence[Dialogue],
    max_len: int,
    threads: int,
    encode: Callable[[Sequence[int]], list],
) -> list:
    """The samples of dialogues, and the blocks of the plain texts among them; in order.

    Args:
        encode: the samples of the dialogues with these indexes.

    Raises:
        ValueError: max_len is too small for a block; or as `encode`.
    """
    places = [i for i, dialogue in enumerate(dialogues) if dialogue.is_text]
    if not places:
        return encode(range(len(dialogues)))
    texts = [dialogues[i].messages[0].content for i in places]
    encoded: list = [
        block
        for place, ids in zip(places, tokenizer.encode_texts(texts, threads), strict=True)
        for block in cut_blocks(tokenizer, place, ids, max_len)
    ]
    others = [i for i, dialogue in enumerate(dialogues) if not dialogue.is_text]
    encoded += encode(others) if others else []
    return sorted(encoded, key=lambda one: one.dialogue)  # stable: the samples of a dialogue keep their order


def cut_blocks(tokenizer, place: int, ids: np.ndarray, max_len: int) -> list[Block]:
    """The blocks of one text, of max_len tokens each except the last two.

    The end token never stands alone in a block, where it would be learnt as the end of an empty text: the last block
    then takes a token from the one before it.

    Args:
        place: index of the text among the dialogues.
        ids: int32 [tokens], of the whole text without special tokens.

    Raises:
        ValueError: max_len is too small.
    """
    prefix = np.array(tokenizer.build_inputs_with_special_tokens([]), np.int32)
    room = max_len - len(prefix)
    if room < 2:
        raise ValueError(
            f"max_len {max_len} is too small for plain text: a block has at least {len(prefix) + 2} tokens"
        )
    ids = np.append(ids, np.int32(tokenizer.eos_token_id))
    borders = [*range(0, len(ids), room), len(ids)]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1:
        borders[-2] -= 1
    blocks = []
    for start, end in pairwise(borders):
        length = len(prefix) + end - start
        mark = LATER_BLOCK if start else FIRST_BLOCK
        blocks.append(Block(place, (prefix, ids[start:end]), length, ((len(prefix), length),), mark))
    return blocks


def block_marks(encoded: Sequence) -> list[int]:
    """`text` of each record, see `cache.RECORD`."""
    return [one.text if isinstance(one, Block) else 0 for one in encoded]
