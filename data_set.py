"""From an instruction file to batches: rows are read and checked, turned into ids and labels, and dealt out to ranks.

A tokenizer is known here by these only: `encode_prompts`, `encode_answers`, `context_length`, `fingerprint`,
`eos_token_id`, and by what data_findings.py asks of it. Where the ids lie on disk is the matter of data_cache.py.
"""

import itertools
import os
import random
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data_cache
from data_findings import BROKEN, FIRST, WARNINGS, Findings, lines_text
from file_kinds import path_problem
from formats import ROW_FORMAT, Flaw, few_unused, unused_text
from row_files import DataError, RowError, read_rows, scan_rows

__all__ = ["DataError", "RowError", "read_rows", "scan_rows"]  # of row_files.py; callers find them here

IGNORE_INDEX = -100
CHUNK_ROWS, CHUNK_CHARACTERS = 500, 4_000_000  # most that is encoded at once
AHEAD = 2  # chunks under way: while one is with SentencePiece, Python is at the other
PROMPT_CUT, ANSWER_CUT = 1, 2  # bits of a record's `cut`
COUNTS = ("prompts_cut", "answers_cut", "skipped", "content", "findings", "unused")  # of a cache file, see prepare
MOST = 0.5  # share of rows above which their being cut is a warning of its own


# Samples


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
    """Samples as flat arrays: `ids` of all of them, and a record for each, as in `data_cache.CachedSamples`."""

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
        if isinstance(self.records, np.memmap) and data_cache.is_cut(self.records):
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
    records = np.zeros(len(starts), data_cache.RECORD)
    records["end"], records["answer_start"] = np.cumsum(starts + np.minimum(lengths + 1, room)), starts
    records["cut"] = np.array([prompt.cut for prompt in prompts], bool) * PROMPT_CUT + answer_cut * ANSWER_CUT
    return Samples(np.frombuffer(b"".join(parts), np.int32), records)  # five times as fast as numpy puts them together


def encode_sample(tokenizer, row: dict, max_len: int, max_src_len: int) -> Sample:
    """`encode_samples` of one row."""
    return encode_samples(tokenizer, [row], max_len, max_src_len)[0]


# Preparation


def prepare(
    path: str,
    tokenizer,
    max_len: int,
    max_src_len: int,
    is_skip: bool = False,
    empty_outputs: bool = False,
    cache_dir: str | None = None,
    progress: bool = False,
    skip_bad: bool = False,
    several_outputs: bool = False,
) -> str:
    """Encode an instruction file into a cache file, unless that is there already.

    Memory is that of a few chunks, whatever the size of the file; but a JSON array is read as a whole.

    Args:
        path to empty_outputs, skip_bad, several_outputs: as for `InstructionData`.
        cache_dir: where cache files are kept; with None it is a temporary file, for the caller to delete.
        progress: show a bar, if stderr is a terminal.

    Returns:
        Path of the cache file, for `InstructionData`.

    Raises:
        DataError: a row is broken or its prompt leaves no room for an answer, the first such in the file; no sample is
            left; the file changed meanwhile; or the cache cannot be written.
    """
    if problem := path_problem(path):  # to open a pipe would be to wait for its writer
        raise DataError(f"{path}: {problem}")
    try:
        before = os.stat(path)
        content, line_breaks = data_cache.file_hash(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    key = (content, tokenizer.fingerprint(), max_len, max_src_len, is_skip, empty_outputs, skip_bad, several_outputs)
    key += (ROW_FORMAT, *COUNTS)
    file = data_cache.cache_file(cache_dir or tempfile.gettempdir(), *key, *([] if cache_dir else [os.urandom(16)]))
    if data_cache.is_whole(file, COUNTS):
        return file

    counts, findings = {"prompts_cut": 0, "answers_cut": 0, "skipped": 0, "content": content}, Findings(tokenizer)

    def leave_out(error: RowError):
        if not skip_bad or error.flaw.ends:
            raise error
        findings.note(error.flaw.kind, error.line, problem=error.flaw.problem)

    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=line_breaks + 1, unit="line", desc="preparing data", leave=False, disable=hidden) as bar:
        encoded = encode_file(path, tokenizer, max_len, max_src_len, empty_outputs, leave_out, several_outputs)
        chunks = _kept_chunks(path, encoded, is_skip, findings, counts, bar)
        try:
            data_cache.write_cache(file, chunks, counts)
        except OSError as error:
            where = f"cannot write the data cache in {os.path.dirname(file)}: {error.strerror}"
            if os.path.isdir(file):
                where = f"cannot write the data cache: {file} is a folder; remove it"
            raise DataError(f"{where}; --data_cache names another folder") from None
        except MemoryError as error:
            error.add_note(f"while {path} was encoded (an array is read as a whole; JSON lines need little memory)")
            raise
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        os.unlink(file)  # it may hold other rows than its name says
        raise DataError(f"{path} changed while it was read")
    return file


def encode_file(
    path: str,
    tokenizer,
    max_len: int,
    max_src_len: int,
    empty_outputs: bool,
    leave_out: Callable[[RowError], None],
    several_outputs: bool = False,
) -> Iterator[tuple[Sequence[int], Sequence[dict], Samples]]:
    """Lines, rows and samples of an instruction file, some at a time.

    Args:
        leave_out: gets what is wrong with each row that cannot be used, and raises it or does not.
        several_outputs: as for `InstructionData`.

    Raises:
        DataError: the file cannot be used, or max_src_len leaves no room for a query.
    """

    def usable():
        for line, row in scan_rows(path, several_outputs, empty_outputs):
            if isinstance(row, RowError):
                leave_out(row)
            elif isinstance(row["output"], list):
                yield line, {**row, "output": row["output"][0]}
            else:
                yield line, row

    threads = -(-available_cpus() // AHEAD)  # a chunk's share

    def encode(chunk):
        lines, rows = zip(*chunk, strict=True)
        no_room: dict[int, str] = {}
        try:
            samples = encode_samples(tokenizer, rows, max_len, max_src_len, threads, no_room)
        except ValueError:
            _raise_first_error(path, chunk, tokenizer, max_len, max_src_len)
            raise
        return lines, rows, samples, no_room

    for lines, rows, samples, no_room in _ahead(encode, _chunks(usable())):
        for i, problem in no_room.items():
            leave_out(RowError(f"{path} line {lines[i]}: {problem}", lines[i], Flaw("no_room", problem)))
        if no_room:
            lines, rows = ([item for i, item in enumerate(items) if i not in no_room] for items in (lines, rows))
        samples.records["line"] = lines
        yield lines, rows, samples


def _kept_chunks(path, encoded, is_skip, findings, counts, bar):
    """Yield ids and records of some samples at a time, for `data_cache.write_cache`; add to `counts` and `bar`."""
    usable = kept = 0
    for lines, rows, samples in encoded:
        ids, records = samples.ids, samples.records
        counts["prompts_cut"] += int(np.count_nonzero(records["cut"] & PROMPT_CUT))
        counts["answers_cut"] += int(np.count_nonzero(records["cut"] & ANSWER_CUT))
        if is_skip:
            whole = records["cut"] == 0
            ids = ids[np.repeat(whole, samples.lengths)]
            records = records[whole]
            records["end"] = np.cumsum(samples.lengths[whole])
            counts["skipped"] += len(samples) - len(records)
        usable, kept = usable + len(rows), kept + len(records)
        findings.feed(lines, rows)
        yield ids, records
        bar.update((lines[-1] if lines else bar.n) - bar.n)
    if not usable:
        first = next((f"line {findings.tally[kind][1][0]}: {why}" for kind, why in findings.problems.items()), "")
        raise DataError(f"{path}: every row is broken; --check_data says what is wrong with each. {first}")
    if not kept:
        raise DataError(f"{path}: every row is longer than --max_src_len or --max_len allow (--is_skip)")
    counts |= {"findings": findings.finish(), "unused": few_unused(findings.unused)}


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


class InstructionData(Dataset):
    """All samples of a file. Indexed by a `MicroBatch`, it gives a batch of tensors.

    Args:
        path: the instruction file.
        tokenizer: of the family; it makes the prompts.
        max_len: most tokens of a sample.
        max_src_len: most tokens of its prompt.
        is_skip: drop samples that would be cut.
        empty_outputs: an empty output is an answer too: the end token alone.
        prepared: what `prepare` returned for these arguments; None does it here, without keeping a cache.
        skip_bad: leave out rows that cannot be used, instead of an error for the first.
        several_outputs: a row's output may also be a list of strings, of which the first one makes the sample.

    Raises:
        DataError: as `prepare`.
    """

    def __init__(
        self,
        path: str,
        tokenizer,
        max_len: int,
        max_src_len: int,
        is_skip: bool = False,
        empty_outputs: bool = False,
        prepared: str | None = None,
        skip_bad: bool = False,
        several_outputs: bool = False,
    ):
        self.context_length = tokenizer.context_length
        settings = (path, tokenizer, max_len, max_src_len, is_skip, empty_outputs)
        file = prepared or prepare(*settings, skip_bad=skip_bad, several_outputs=several_outputs)
        ids, records, counts = data_cache.open_cache(file)
        if prepared is None:
            os.unlink(file)  # what is mapped stays
        self.samples = Samples(ids, records)
        self.lengths = self.samples.lengths  # [samples], tokens of each
        self.answer_lengths = self.lengths - records["answer_start"]  # [samples], of these with a label
        self.lines = records["line"]  # [samples], where each comes from
        self.files = [(path, self.lines)]  # the same, for messages: rows of several files count on
        self.prompts_cut, self.answers_cut = counts["prompts_cut"], counts["answers_cut"]
        self.skipped, self.findings, self.unused = counts["skipped"], counts["findings"], counts["unused"]
        self.content = counts["content"]  # SHA-256 of the file

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> str:
        """One line on what was read, and what was lost to the length limits."""
        median, longest = np.sort(self.lengths)[[len(self) // 2, -1]]
        text = f"{len(self)} samples, {self.lengths.sum()} tokens (median {median}, longest {longest})"
        if self.skipped:
            text += f"; {self.skipped} longer ones skipped (--is_skip)"
        elif self.prompts_cut or self.answers_cut:
            text += f"; cut to fit: {self.prompts_cut} prompts (--max_src_len)"
            text += f", {self.answers_cut} answers, which so have no end token (--max_len)"
        broken = [self.findings[kind] for kind in BROKEN if kind in self.findings]
        if broken:
            lines = sorted(itertools.chain.from_iterable(lines for _, lines in broken))
            count = sum(count for count, _ in broken)
            text += f"; left out as broken (--on_bad_row skip): {lines_text(count, lines[:FIRST])}"
        for kind in (kind for kind in WARNINGS if kind in self.findings):
            count, lines = self.findings[kind]
            text += f"; warning: {WARNINGS[kind]}: {lines_text(count, lines)}"
        unused = unused_text(self.unused)
        return f"{text}; {unused}" if unused else text

    def warnings(self) -> list[str]:
        """Lines on what makes the whole training doubtful: most of its samples are cut."""
        lines = []
        for count, what, flag in (
            (self.prompts_cut, "prompts lose their end to", "--max_src_len"),
            (self.answers_cut, "answers lose their end, and so the end token, to", "--max_len"),
        ):
            if not self.skipped and count > MOST * len(self):
                lines.append(f"warning: {self.files[0][0]}: {count} of {len(self)} {what} {flag}; is it too small?")
        return lines

    def length(self, row: int) -> int:
        """Tokens of one sample."""
        return int(self.lengths[row])

    def tokens(self, rows: list[int]) -> int:
        """Tokens of some samples together."""
        return int(self.lengths[rows].sum())

    def answer_tokens(self, rows: list[int]) -> int:
        """Tokens with a label."""
        return int(self.answer_lengths[rows].sum())

    def __getitem__(self, micro_batch: "MicroBatch") -> "Batch":
        return collate([self.samples[i] for i in micro_batch.rows], self.context_length, micro_batch)


# Batches


class MicroBatch(NamedTuple):
    """The rows that one rank takes through the model at once."""

    rows: list[int]
    num_items: float  # divisor of the summed loss, see plan_epoch
    is_filler: bool = False  # keeps the ranks in step and adds nothing: its rows have no labels


class Batch(dict):
    """Arguments of the model: whole samples end to end in one row, nothing is padding.

    input_ids and labels [1, tokens]; segments, each sample's tokens and how many of them are context;
    answer_positions [answer tokens], where labels are; num_items_in_batch.
    """

    tokens: int  # that are learnt from or read: none in a filler
    samples: int
    rows: list[int]  # their numbers in the data; none in a filler

    def to(self, device) -> dict:
        """The arguments with their tensors on `device`."""
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in self.items()}


def collate(samples: list[Sample], context_length: Callable[[list[int]], int], micro_batch: MicroBatch) -> Batch:
    """Put samples end to end; context_length is the tokenizer's."""
    labels = [label for sample in samples for label in sample.labels]
    if micro_batch.is_filler:
        labels = [IGNORE_INDEX] * len(labels)
    batch = Batch(
        input_ids=torch.tensor([[i for sample in samples for i in sample.input_ids]]),
        labels=torch.tensor([labels]),
        segments=[(len(sample.input_ids), context_length(sample.input_ids)) for sample in samples],
        # counted here, since to count on a GPU is to wait for it
        answer_positions=torch.tensor([i for i, label in enumerate(labels) if label != IGNORE_INDEX], dtype=torch.long),
        num_items_in_batch=micro_batch.num_items,
    )
    batch.tokens, batch.samples = (0, 0) if micro_batch.is_filler else (len(labels), len(samples))
    batch.rows = [] if micro_batch.is_filler else micro_batch.rows
    return batch


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


def epoch_loader(data: InstructionData, steps: list[list[MicroBatch]], rank: int, world_size: int, pin: bool):
    """A DataLoader over the batches of one rank."""
    mine = [micro_batch for step in steps for micro_batch in step[rank::world_size]]
    # a generator of its own: at each start a loader takes a number from the global one, which dropout draws from too
    return DataLoader(data, sampler=mine, batch_size=None, pin_memory=pin, generator=torch.Generator())
