"""A prepared instruction file, mapped into memory: `InstructionData`."""

import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from tuning.errors import DataError
from tuning.samples import cache
from tuning.samples.batches import Batch, MicroBatch, collate
from tuning.samples.decoding import open_text
from tuning.samples.dialogue import Dialogue
from tuning.samples.encoding import (
    ANSWER_CUT,
    PROMPT_CUT,
    TURNS_SHIFT,
    Samples,
    encode_samples,
    first_error,
    without_garbage_collection,
)
from tuning.samples.file_kinds import path_problem
from tuning.samples.findings import BROKEN, FIRST, WARNINGS, Findings, lines_text
from tuning.samples.flaws import Flaw
from tuning.samples.formats import ROW_FORMAT, Columns, few_unused, unused_text
from tuning.samples.row_files import Piece, RowError, cut_file, read_piece
from tuning.samples.text import FIRST_BLOCK
from tuning.samples.workers import available_cpus, in_order, processes_for

LOSSES = ("prompts_cut", "answers_cut", "turns_lost", "shortened", "skipped")
COUNTS = (*LOSSES, "content", "findings", "unused")  # in a cache file, see prepare


LARGE = 1 << 22  # bytes of a file that is encoded in several processes
MOST = 0.5  # share of cut rows above which there is an extra warning


@dataclass(frozen=True)
class DataSettings:
    """A data file, and what of it becomes samples.

    Args:
        path: the file.
        max_len: maximum tokens per sample.
        max_src_len: maximum tokens of its prompt.
        skip_cut: drop samples that would be cut.
        empty_outputs: an empty output is an answer too: the end token alone.
        skip_bad: leave out rows that cannot be used, instead of an error for the first.
        several_outputs: a row's output may also be a list of strings, of which the first one is learnt.
        columns: names of question, answer and history in this file.
        train_on: which answers are learnt, see `to_dialogue`.
    """

    path: str
    max_len: int
    max_src_len: int
    skip_cut: bool = False
    empty_outputs: bool = False
    skip_bad: bool = False
    several_outputs: bool = False
    columns: Columns | None = None
    train_on: str | None = None

    @property
    def key(self) -> tuple:
        """All that decides which samples a file with the same content gives: not the path."""
        return astuple(self)[1:]


def prepare(settings: DataSettings, tokenizer, cache_dir: str | None = None, progress: bool = False) -> str:
    """Encode a data file into a cache file, unless that is there already.

    Memory is that of a few pieces for each process, for files of any size.

    Args:
        cache_dir: where cache files are kept; with None it is a temporary file, for the caller to delete.
        progress: show a bar, if stderr is a terminal.

    Returns:
        Path of the cache file, for `InstructionData`.

    Raises:
        DataError: a row is broken or its prompt leaves no room for an answer, the first such in the file; no sample is
            left; the file changed meanwhile; or the cache cannot be written.
    """
    path = settings.path
    if problem := path_problem(path):  # opening a pipe would wait for a writer
        raise DataError(f"{path}: {problem}")
    try:
        before = os.stat(path)
        content, line_breaks = cache.file_hash(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    key = (content, tokenizer.fingerprint(), *settings.key, ROW_FORMAT, *COUNTS)
    file = cache.cache_file(cache_dir or tempfile.gettempdir(), *key, *([] if cache_dir else [os.urandom(16)]))
    if cache.is_whole(file, COUNTS):
        return file

    counts = dict.fromkeys(LOSSES, 0) | {"content": content}
    findings = Findings(tokenizer)

    def leave_out(error: RowError):
        if not settings.skip_bad or error.flaw.ends:
            raise error
        findings.note(error.flaw.kind, error.line, problem=error.flaw.problem)

    def look(chunk: Chunk):
        return chunk.samples, findings.look(chunk.lines, chunk.rows, chunk.dialogues)

    with _bar(path, line_breaks, progress) as bar:
        encoded = encode_file(settings, tokenizer, leave_out, look, processes_for(before.st_size, LARGE))
        chunks = _kept_chunks(settings, encoded, findings, counts, bar)
        try:
            with without_garbage_collection():
                cache.write_cache(file, chunks, counts)
        except OSError as error:
            where = f"cannot write the data cache in {os.path.dirname(file)}: {error.strerror}"
            if os.path.isdir(file):
                where = f"cannot write the data cache: {file} is a folder; remove it"
            raise DataError(f"{where}; --data_cache names another folder") from None
        except MemoryError as error:
            error.add_note(f"while {path} was encoded")
            raise
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        os.unlink(file)  # its rows may not be those of its key
        raise DataError(f"{path} changed while it was read")
    return file


def _bar(path: str, line_breaks: int, progress: bool) -> tqdm:
    """A bar of the lines that have been read."""
    hidden = not (progress and sys.stderr.isatty())
    total = None if hidden else _count_lines(path, line_breaks)
    return tqdm(total=total, unit="line", desc="preparing data", leave=False, disable=hidden)


def _count_lines(path: str, line_breaks: int) -> int | None:
    """How many lines a file has, for a progress bar; None if that is not known before it is read.

    Args:
        line_breaks: bytes of the file that are a line feed.
    """
    with open_text(path) as text:
        return line_breaks + 1 if text.counts_lines else None


class Chunk(NamedTuple):
    """Some rows of a file that can be trained, and their samples. `samples.places` counts rows of the chunk."""

    lines: Sequence[int]
    rows: Sequence[dict]
    dialogues: Sequence[Dialogue]
    samples: Samples


def encode_file(
    settings: DataSettings,
    tokenizer,
    leave_out: Callable[[RowError], None],
    look: Callable[[Chunk], object],
    processes: int = 1,
) -> Iterator:
    """What `look` makes of the rows and samples of a data file, some at a time. skip_cut and skip_bad are not obeyed.

    Args:
        leave_out: gets the error of each row that cannot be used; it raises the error, or returns to leave the row out.
        look: called in the process that encoded the chunk; see `in_order`.
        processes: to encode in.

    Raises:
        DataError: the file cannot be used, or max_src_len leaves no room for a question.
    """
    threads = available_cpus() if processes == 1 else 1

    def encode(piece: Piece) -> tuple[list[RowError], DataError | None, object]:
        errors, ends, chunk = encode_piece(settings, tokenizer, piece, threads)
        return errors, ends, look(chunk) if chunk and not ends else None

    for errors, ends, seen in in_order(encode, cut_file(settings.path, settings.columns), processes):
        for error in errors:
            leave_out(error)
        if ends:
            raise ends
        if seen is not None:
            yield seen


def encode_piece(
    settings: DataSettings, tokenizer, piece: Piece, threads: int
) -> tuple[list[RowError], DataError | None, Chunk | None]:
    """The rows of a piece that cannot be used, in order; an error behind them that ends the file; all other rows."""
    path, limits = settings.path, (settings.max_len, settings.max_src_len)
    errors, usable, ends = [], [], None
    how = {"several_outputs": settings.several_outputs, "empty_outputs": settings.empty_outputs}
    how |= {"columns": settings.columns, "train_on": settings.train_on}

    def refuse(line: int, kind: str, problem: str):
        errors.append(RowError(f"{path} line {line}: {problem}", line, Flaw(kind, problem)))

    try:
        for line, row, dialogue in read_piece(path, piece, texts=True, **how):
            if dialogue is None:
                errors.append(row)
            elif dialogue.is_single_turn or dialogue.is_text or not (problem := tokenizer.dialogue_problem(dialogue)):
                usable.append((line, row, dialogue))
            else:
                refuse(line, "family", problem)
    except DataError as error:
        ends = error
    if not usable:
        return errors, ends, None
    lines, rows, dialogues = zip(*usable, strict=True)
    no_room: dict[int, str] = {}
    try:
        samples = encode_samples(tokenizer, dialogues, *limits, threads, no_room)
    except ValueError:
        place, problem = first_error(tokenizer, dialogues, *limits)
        ends = DataError(f"{path} line {lines[place]}: {problem}")
        return [error for error in errors if error.line < lines[place]], ends, None
    samples.records["line"] = np.array(lines)[samples.places]
    for place, problem in no_room.items():
        refuse(lines[place], "no_room", problem)
    errors.sort(key=lambda error: error.line)
    chunk = Chunk(lines, rows, dialogues, samples)
    return errors, ends, _without(chunk, no_room) if no_room else chunk


def _without(chunk: Chunk, places: Container[int]) -> Chunk:
    """A chunk without some of its rows, which have no samples."""
    kept = [i for i in range(len(chunk.rows)) if i not in places]
    lines, rows, dialogues = ([items[i] for i in kept] for items in chunk[:3])
    chunk.samples.places = np.searchsorted(kept, chunk.samples.places)
    return Chunk(lines, rows, dialogues, chunk.samples)


def _kept_chunks(settings, encoded, findings, counts, bar):
    """Yield ids, spans and records of some samples at a time, for `cache.write_cache`; add to `counts` and `bar`.

    Args:
        encoded: samples, and what `findings` saw in their rows.
    """
    usable = kept = 0
    for samples, seen in encoded:
        ids, spans, records = samples.ids, samples.spans, samples.records
        counts["prompts_cut"] += int(np.count_nonzero(records["cut"] & PROMPT_CUT))
        counts["answers_cut"] += int(np.count_nonzero(records["cut"] & ANSWER_CUT))
        counts["turns_lost"] += int((records["cut"] >> TURNS_SHIFT).sum())
        counts["shortened"] += int(np.count_nonzero(records["cut"] >> TURNS_SHIFT))
        if settings.skip_cut:
            whole = records["cut"] == 0
            pieces = np.diff(records["spans_end"], prepend=0)
            ids, spans = ids[np.repeat(whole, samples.lengths)], spans[np.repeat(whole, pieces)]
            records = records[whole]
            records["end"], records["spans_end"] = np.cumsum(samples.lengths[whole]), np.cumsum(pieces[whole])
            counts["skipped"] += len(samples) - len(records)
        usable, kept = usable + len(seen.lines), kept + len(records)
        findings.add(seen)
        yield ids, spans, records
        bar.update((int(seen.lines[-1]) if len(seen.lines) else bar.n) - bar.n)
    if not usable:
        first = next((f"line {findings.tally[kind][1][0]}: {why}" for kind, why in findings.problems.items()), "")
        raise DataError(f"{settings.path}: every row is broken; --check_data says what is wrong with each. {first}")
    if not kept:
        raise DataError(f"{settings.path}: every row is longer than --max_src_len or --max_len allow (--is_skip)")
    counts |= {"findings": findings.finish(), "unused": few_unused(findings.unused)}


class InstructionData(Dataset):
    """All samples of a file. Indexed by a `MicroBatch`, it gives a batch of tensors.

    Args:
        tokenizer: of the family; it makes the prompts.
        prepared: what `prepare` returned for these settings; None does it here, without keeping a cache.

    Raises:
        DataError: as `prepare`.
    """

    def __init__(self, settings: DataSettings, tokenizer, prepared: str | None = None):
        self.context_length = tokenizer.context_length
        file = prepared or prepare(settings, tokenizer)
        ids, spans, records, counts = cache.open_cache(file)
        if prepared is None:
            os.unlink(file)  # a mapped file stays readable
        self.samples = Samples(ids, spans, records)
        self.lengths = self.samples.lengths  # int64 [samples], tokens per sample
        self.answer_lengths = np.array(records["learnt"], np.int64)  # [samples], of these with a label
        self.texts = np.array(records["text"])  # [samples], above 0 for blocks of plain text, see text.py
        self.lines = records["line"]  # [samples], where each comes from
        self.files = [(settings.path, self.lines)]  # the same, for messages: rows of several files count on
        self.prompts_cut, self.answers_cut = counts["prompts_cut"], counts["answers_cut"]
        self.turns_lost, self.shortened = counts["turns_lost"], counts["shortened"]
        self.skipped, self.findings, self.unused = counts["skipped"], counts["findings"], counts["unused"]
        self.content = counts["content"]  # SHA-256 of the file

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> str:
        """One line on what was read, and what was lost to the length limits."""
        median, longest = np.sort(self.lengths)[[len(self) // 2, -1]]
        text = f"{len(self)} samples, {self.lengths.sum()} tokens (median {median}, longest {longest})"
        if blocks := np.count_nonzero(self.texts):
            rows = int(np.count_nonzero(self.texts == FIRST_BLOCK))
            text += f"; {blocks} of them are blocks of plain text, from {rows} row{'s' * (rows != 1)}"
        if self.skipped:
            text += f"; {self.skipped} longer ones skipped (--is_skip)"
        elif self.prompts_cut or self.answers_cut:
            text += f"; cut to fit: {self.prompts_cut} prompts (--max_src_len)"
            text += f", {self.answers_cut} answers, which so have no end token (--max_len)"
        if self.turns_lost and not self.skipped:
            text += f"; {self.shortened} conversations lost {self.turns_lost} turns from their beginning, to fit"
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
        """Lines about what puts the whole training in doubt: most of its samples are cut."""
        lines = []
        for count, what, flag in (
            (self.prompts_cut, "prompts lose their end to", "--max_src_len"),
            (self.answers_cut, "answers lose their end, and so the end token, to", "--max_len"),
        ):
            if not self.skipped and count > MOST * len(self):
                lines.append(f"warning: {self.files[0][0]}: {count} of {len(self)} {what} {flag}; is it too small?")
        return lines

    def place(self, row: int) -> tuple[str, int]:
        """File and line that a sample is from."""
        for path, lines in self.files:
            if row < len(lines):
                return path, int(lines[row])
            row -= len(lines)
        raise IndexError(row)

    def prompts(self) -> Iterator[memoryview]:
        """See Samples."""
        return self.samples.prompts()

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


@dataclass(frozen=True)
class HeldOut:
    """Samples to validate on.

    Args:
        data: has them, and may have others.
        rows: their numbers in `data`, at least one.
        name: what they are from, for messages.
    """

    data: InstructionData
    rows: list[int]
    name: str

    @property
    def answered(self) -> list[int]:
        """The rows that have a question and an answer: those that are not plain text."""
        rows = np.array(self.rows)
        return rows[self.data.texts[rows] == 0].tolist()


def split_rows(data: InstructionData, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and about a share of `ratio` to validate on: int64 each, ascending.

    A hash of the prompt's ids alone says on which side a row is: it stays there when rows come, go or change places,
    and rows with the same prompt are together. So are all blocks of a plain text, see `Samples.prompts`.

    Raises:
        DataError: one side is empty.
    """
    held_out = np.zeros(len(data), bool)
    for i, prompt in enumerate(data.prompts()):
        digest = hashlib.blake2b(prompt, digest_size=8).digest()
        held_out[i] = int.from_bytes(digest, "big") < ratio * 2**64
    sides = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not all(map(len, sides)):
        what = "validate on" if len(sides[0]) else "train on"
        raise DataError(f"--eval_ratio {ratio} leaves none of {len(data)} rows to {what}; take another, or --eval_path")
    return sides
