"""From dialogues to token ids: `encode_samples`."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tuning.errors import DataError
from tuning.samples import cache
from tuning.samples.dialogue import Dialogue
from tuning.samples.formats import to_dialogue
from tuning.samples.text import LATER_BLOCK, block_marks, encode_with_texts

IGNORE_INDEX = -100


PROMPT_CUT, ANSWER_CUT = 1, 2  # bits of a record's `cut`
TURNS_SHIFT = 2  # of its higher bits, which count the turns that a conversation lost


class Sample(NamedTuple):
    """Token ids, and what of them is learnt."""

    input_ids: list[int]
    spans: tuple[tuple[int, int], ...]  # learnt pieces: first position, position after the last
    prompt_cut: bool  # the question lost its end to max_src_len
    answer_cut: bool  # the sample lost its end to max_len, and with it the end token
    dropped: int = 0  # turns that a conversation lost from its beginning

    @property
    def labels(self) -> list[int]:
        """Aligned with input_ids; IGNORE_INDEX where nothing is learnt."""
        labels = [IGNORE_INDEX] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def prompt(self) -> list[int]:
        """Ids before the first learnt piece."""
        return self.input_ids[: self.spans[0][0]]

    @property
    def learnt(self) -> list[int]:
        """Ids that are learnt."""
        return [token for start, end in self.spans for token in self.input_ids[start:end]]


class Samples(Sequence):
    """Samples as flat arrays, see `cache.CachedSamples`.

    places: [samples], which of the encoded dialogues each comes from; None if that is not known.
    """

    def __init__(self, ids: np.ndarray, spans: np.ndarray, records: np.ndarray, places: np.ndarray | None = None):
        self.ids, self.spans, self.records, self.places = ids, spans, records, places
        self.lengths = np.diff(records["end"], prepend=0)  # [samples], tokens of each

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Sample:
        record = self._record(i)
        end, cut = int(record["end"]), int(record["cut"])
        ids = self.ids[end - int(self.lengths[i]) : end].tolist()
        return Sample(ids, self.spans_of(i), bool(cut & PROMPT_CUT), bool(cut & ANSWER_CUT), cut >> TURNS_SHIFT)

    def spans_of(self, i: int) -> tuple[tuple[int, int], ...]:
        """The learnt pieces of one sample, as in `Sample`."""
        pieces = self.spans[self._first_span(i) : int(self._record(i)["spans_end"])]
        return tuple(map(tuple, pieces.tolist()))

    def prompts(self) -> Iterator[memoryview]:
        """The bytes of the ids before the first learnt piece of each sample, in order; a million in about a second.

        Plain text has no prompt: here the first block of a text takes its place, for all blocks of this text.
        """
        self._record(0)
        starts = 4 * (self.records["end"] - self.lengths)
        first_spans = np.concatenate(([0], self.records["spans_end"][:-1]))
        ends = starts + 4 * self.spans[first_spans, 0].astype(np.int64)
        texts = self.records["text"]
        ends[texts > 0] = 4 * self.records["end"][texts > 0]
        first_blocks = np.maximum.accumulate(np.where(texts == LATER_BLOCK, 0, np.arange(len(self))))
        starts, ends = starts[first_blocks], ends[first_blocks]
        content = memoryview(self.ids).cast("B")
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield content[start:end]

    def _first_span(self, i: int) -> int:
        return int(self.records[i - 1]["spans_end"]) if i % len(self) else 0

    def _record(self, i: int):
        if isinstance(self.records, np.memmap) and cache.is_cut(self.records):
            file = self.records.filename
            raise DataError(f"the data cache {file} was cut while it was in use; start again, and it is made anew")
        return self.records[i]


def encode_samples(
    tokenizer,
    dialogues: Sequence[Dialogue],
    max_len: int,
    max_src_len: int | None,
    threads: int = 1,
    no_room: dict[int, str] | None = None,
) -> Samples:
    """The samples of each dialogue: what a family makes of it (`encode_dialogues`), cut to max_len; blocks of texts.

    A conversation that is too long loses whole turns from its beginning first, see `encode_dialogues`. A sample that is
    cut has no end token at its end: learning one there would teach the model to stop in mid-sentence.

    Args:
        max_len: maximum tokens per sample.
        max_src_len: maximum tokens before the first learnt answer, see `encode_prompts`.
        threads: of SentencePiece.
        no_room: gets the places of dialogues in which a prompt leaves no room for its answer, and the problem; they
            have no sample. Without it they are an error.

    Raises:
        ValueError: a prompt leaves no room for an answer, max_src_len none for its question, or a text is not valid
            Unicode. It does not say in which dialogue; `encode_sample` does, asked one by one.
    """

    def encode(chosen: Sequence[int]) -> list:
        """The samples of these dialogues."""
        lost: dict[int, str] | None = None if no_room is None else {}
        some = [dialogues[i] for i in chosen]
        found = _encode_dialogues(tokenizer, some, max_len, max_src_len, threads, lost)
        if lost:
            no_room.update({chosen[i]: problem for i, problem in lost.items()})
        return found if len(some) == len(dialogues) else [one._replace(dialogue=chosen[one.dialogue]) for one in found]

    encoded = encode_with_texts(tokenizer, dialogues, max_len, threads, encode)
    if full := [one for one in encoded if one.spans[0][0] >= max_len]:
        for one in full:
            problem = f"the prompt's {one.spans[0][0]} tokens leave no room for an answer in max_len {max_len}"
            if no_room is None:
                raise ValueError(problem)
            no_room.setdefault(one.dialogue, problem)
        encoded = [one for one in encoded if one.dialogue not in no_room]
    parts: list[np.ndarray] = []
    for one in encoded:
        parts += one.parts if one.length <= max_len else _first_tokens(one.parts, max_len)
    lengths = np.array([one.length for one in encoded], np.int64)
    spans = np.array([span for one in encoded for span in one.spans], np.int32).reshape(-1, 2)
    owners = np.repeat(np.arange(len(encoded)), [len(one.spans) for one in encoded])
    kept = spans[:, 0] < max_len
    spans, owners = np.minimum(spans[kept], max_len, dtype=np.int32), owners[kept]
    records = np.zeros(len(encoded), cache.RECORD)
    records["end"] = np.cumsum(np.minimum(lengths, max_len))
    records["spans_end"] = np.cumsum(np.bincount(owners, minlength=len(encoded)))
    records["learnt"] = np.bincount(owners, spans[:, 1] - spans[:, 0], len(encoded))
    records["cut"] = np.array([one.cut for one in encoded], bool) * PROMPT_CUT + (lengths > max_len) * ANSWER_CUT
    records["cut"] |= np.array([one.dropped for one in encoded], np.int32) << TURNS_SHIFT
    records["text"] = block_marks(encoded)
    ids = np.frombuffer(b"".join(parts), np.int32)  # five times as fast as np.concatenate
    return Samples(ids, spans, records, np.array([one.dialogue for one in encoded], np.int64))


def _encode_dialogues(tokenizer, dialogues, max_len, max_src_len, threads, no_room):
    """`encode_dialogues`, with the dialogues in `no_room` of which more than a question does not fit max_src_len."""
    try:
        return tokenizer.encode_dialogues(dialogues, max_src_len, threads, max_len)
    except ValueError:
        if no_room is None or all(dialogue.is_single_turn for dialogue in dialogues):
            raise
    encoded = []
    for number, dialogue in enumerate(dialogues):
        try:
            encoded += [
                one._replace(dialogue=number) for one in tokenizer.encode_dialogues([dialogue], max_src_len, 1, max_len)
            ]
        except ValueError as error:
            if dialogue.is_single_turn:
                raise
            no_room[number] = str(error)
    return encoded


def _first_tokens(parts: Sequence[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` tokens of some arrays."""
    for part in parts:
        yield part[:count]
        count = max(0, count - len(part))


def encode_sample(tokenizer, row: dict, max_len: int, max_src_len: int | None) -> Sample:
    """The sample in which the last answer of a row is learnt; see `encode_samples`."""
    return encode_samples(tokenizer, [to_dialogue(row, "last")], max_len, max_src_len)[0]


def first_error(tokenizer, dialogues: Sequence[Dialogue], max_len: int, max_src_len: int | None) -> tuple[int, str]:
    """Place and problem of the first dialogue for which `encode_samples` raises a ValueError.

    Raises:
        ValueError: it does for all of them together, and for none alone.
    """
    for place, dialogue in enumerate(dialogues):
        try:
            encode_samples(tokenizer, [dialogue], max_len, max_src_len)
        except ValueError as error:
            return place, str(error)
    raise ValueError("dialogues that can be encoded one by one, but not together")


@contextlib.contextmanager
def without_garbage_collection():
    """While rows are encoded: they hold no cycles, and looking for some among all their objects takes long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
