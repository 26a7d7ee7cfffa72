"""Rows to token ids: in parallel, in order."""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tuning.errors import DataError
from tuning.samples import cache

IGNORE_INDEX = -100


CHUNK_ROWS, CHUNK_CHARACTERS = 500, 4_000_000  # most that is encoded at once


AHEAD = 2  # chunks under way: while one is with SentencePiece, Python is at the other


PROMPT_CUT, ANSWER_CUT = 1, 2  # bits of a record's `cut`


class Sample(NamedTuple):
    """One row as ids; positions from `answer_start` on are learnt."""

    input_ids: list[int]
    answer_start: int
    prompt_cut: bool  # the query lost its end to max_src_len
    answer_cut: bool  # the answer lost its end to max_len, and with it the end token

    @property
    def labels(self) -> list[int]:
        """Aligned with input_ids; IGNORE_INDEX on the prompt."""
        return [IGNORE_INDEX] * self.answer_start + self.input_ids[self.answer_start :]


class Samples(Sequence):
    """Samples as flat arrays: `ids` of all of them, and a record for each, as in `cache.CachedSamples`."""

    def __init__(self, ids: np.ndarray, records: np.ndarray):
        self.ids, self.records = ids, records
        self.lengths = np.diff(records["end"], prepend=0)  # [samples], tokens of each

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Sample:
        record = self._record(i)
        end, cut = int(record["end"]), int(record["cut"])
        ids = self.ids[end - int(self.lengths[i]) : end].tolist()
        return Sample(ids, int(record["answer_start"]), bool(cut & PROMPT_CUT), bool(cut & ANSWER_CUT))

    def prompt(self, i: int) -> np.ndarray:
        """Ids of what comes before the answer, int32."""
        record = self._record(i)
        start = int(record["end"]) - int(self.lengths[i])
        return self.ids[start : start + int(record["answer_start"])]

    def _record(self, i: int):
        if isinstance(self.records, np.memmap) and cache.is_cut(self.records):
            file = self.records.filename
            raise DataError(f"the data cache {file} was cut while it was in use; start again, and it is made anew")
        return self.records[i]


def encode_samples(
    tokenizer,
    rows: list[dict],
    max_len: int,
    max_src_len: int | None,
    threads: int = 1,
    no_room: dict[int, str] | None = None,
) -> Samples:
    """Of each row: prompt, answer, end token.

    An answer that does not fit is cut and then has no end token: an end token after a cut would teach the model to stop
    in mid-sentence.

    Args:
        threads: of SentencePiece.
        no_room: gets the places of rows whose prompts leave no room for an answer, and what is wrong; they have no
            sample. Without it they are an error.

    Raises:
        ValueError: a prompt leaves no room for an answer, max_src_len none for its query, or a text is none. It does
            not say in which row; `encode_sample` does, asked one by one.
    """
    queries = [row["instruction"] + row["input"] for row in rows]
    prompts = tokenizer.encode_prompts(queries, max_src_len=max_src_len, threads=threads)
    answers = tokenizer.encode_answers([row["output"] for row in rows], threads=threads)
    starts = np.array([len(begin) + len(text) + len(end) for begin, text, end, _ in prompts], np.int64)
    fits = starts < max_len
    if not fits.all():
        for i in np.flatnonzero(~fits).tolist():
            problem = f"the prompt's {starts[i]} tokens leave no room for an answer in max_len {max_len}"
            if no_room is None:
                raise ValueError(problem)
            no_room[i] = problem
        prompts, answers = (list(itertools.compress(items, fits)) for items in (prompts, answers))
        starts = starts[fits]
    room = max_len - starts
    lengths = np.fromiter(map(len, answers), np.int64, len(answers))
    answer_cut = lengths >= room  # the end token needs room too
    end_token = np.array([tokenizer.eos_token_id], np.int32)
    parts: list[np.ndarray] = []
    for prompt, answer, cut, most in zip(prompts, answers, answer_cut.tolist(), room.tolist(), strict=True):
        parts += prompt[:-1]
        parts += (answer[:most],) if cut else (answer, end_token)
    records = np.zeros(len(starts), cache.RECORD)
    records["end"], records["answer_start"] = np.cumsum(starts + np.minimum(lengths + 1, room)), starts
    records["cut"] = np.array([prompt.cut for prompt in prompts], bool) * PROMPT_CUT + answer_cut * ANSWER_CUT
    return Samples(np.frombuffer(b"".join(parts), np.int32), records)  # five times as fast as numpy puts them together


def encode_sample(tokenizer, row: dict, max_len: int, max_src_len: int) -> Sample:
    """`encode_samples` of one row."""
    return encode_samples(tokenizer, [row], max_len, max_src_len)[0]


def _ahead(encode, chunks):
    """encode(chunk) of each, in order, made ahead: while SentencePiece is at work, Python reads on."""
    with ThreadPoolExecutor(AHEAD) as pool:

        def jobs():
            try:
                for chunk in chunks:
                    yield pool.submit(encode, chunk)
            except DataError as error:  # takes its place in the order: a row before it may have an error of its own
                broken = Future()
                broken.set_exception(error)
                yield broken

        waiting = deque()
        for job in jobs():
            waiting.append(job)
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _raise_first_error(path, chunk, tokenizer, max_len, max_src_len):
    for line, row in chunk:
        try:
            encode_sample(tokenizer, row, max_len, max_src_len)
        except ValueError as error:
            raise DataError(f"{path} line {line}: {error}") from None


def _chunks(rows: Iterator[tuple[int, dict]]) -> Iterator[list[tuple[int, dict]]]:
    """Rows in bounded lists. Those before a broken row come first, since one of them may have an error of its own."""
    chunk, characters = [], 0
    try:
        for line, row in rows:
            chunk.append((line, row))
            characters += len(row["instruction"]) + len(row["input"]) + len(row["output"])
            if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def available_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
