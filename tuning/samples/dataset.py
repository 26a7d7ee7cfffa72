"""A prepared instruction file, mapped into memory: `InstructionData`."""

import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from tuning.errors import DataError
from tuning.samples import cache
from tuning.samples.batches import Batch, MicroBatch, collate
from tuning.samples.dialogue import Dialogue
from tuning.samples.encoding import (
    AHEAD,
    ANSWER_CUT,
    PROMPT_CUT,
    Samples,
    _ahead,
    _chunks,
    _raise_first_error,
    available_cpus,
    encode_samples,
)
from tuning.samples.file_kinds import path_problem
from tuning.samples.findings import BROKEN, FIRST, WARNINGS, Findings, lines_text
from tuning.samples.formats import ROW_FORMAT, Flaw, few_unused, unused_text
from tuning.samples.row_files import RowError, scan_rows

COUNTS = ("prompts_cut", "answers_cut", "skipped", "content", "findings", "unused")  # of a cache file, see prepare


MOST = 0.5  # share of rows above which their being cut is a warning of its own


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
        content, line_breaks = cache.file_hash(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    key = (content, tokenizer.fingerprint(), max_len, max_src_len, is_skip, empty_outputs, skip_bad, several_outputs)
    key += (ROW_FORMAT, *COUNTS)
    file = cache.cache_file(cache_dir or tempfile.gettempdir(), *key, *([] if cache_dir else [os.urandom(16)]))
    if cache.is_whole(file, COUNTS):
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
            cache.write_cache(file, chunks, counts)
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


class Chunk(NamedTuple):
    """Some rows of a file that can be trained, and their samples. `samples.places` counts rows of the chunk."""

    lines: Sequence[int]
    rows: Sequence[dict]
    dialogues: Sequence[Dialogue]
    samples: Samples


def encode_file(
    path: str,
    tokenizer,
    max_len: int,
    max_src_len: int,
    empty_outputs: bool,
    leave_out: Callable[[RowError], None],
    several_outputs: bool = False,
) -> Iterator[Chunk]:
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
            else:
                yield line, row

    threads = -(-available_cpus() // AHEAD)  # a chunk's share

    def encode(chunk):
        lines, rows, dialogues = zip(*chunk, strict=True)
        no_room: dict[int, str] = {}
        try:
            samples = encode_samples(tokenizer, dialogues, max_len, max_src_len, threads, no_room)
        except ValueError:
            _raise_first_error(path, chunk, tokenizer, max_len, max_src_len)
            raise
        samples.records["line"] = np.array(lines)[samples.places]
        return Chunk(lines, rows, dialogues, samples), no_room

    for chunk, no_room in _ahead(encode, _chunks(usable())):
        for i, problem in no_room.items():
            line = chunk.lines[i]
            leave_out(RowError(f"{path} line {line}: {problem}", line, Flaw("no_room", problem)))
        yield _without(chunk, no_room) if no_room else chunk


def _without(chunk: Chunk, places: Container[int]) -> Chunk:
    """A chunk without some of its rows, which have no samples."""
    kept = [i for i in range(len(chunk.rows)) if i not in places]
    lines, rows, dialogues = ([items[i] for i in kept] for items in chunk[:3])
    chunk.samples.places = np.searchsorted(kept, chunk.samples.places)
    return Chunk(lines, rows, dialogues, chunk.samples)


def _kept_chunks(path, encoded, is_skip, findings, counts, bar):
    """Yield ids, spans and records of some samples at a time, for `cache.write_cache`; add to `counts` and `bar`."""
    usable = kept = 0
    for lines, rows, dialogues, samples in encoded:
        ids, spans, records = samples.ids, samples.spans, samples.records
        counts["prompts_cut"] += int(np.count_nonzero(records["cut"] & PROMPT_CUT))
        counts["answers_cut"] += int(np.count_nonzero(records["cut"] & ANSWER_CUT))
        if is_skip:
            whole = records["cut"] == 0
            pieces = np.diff(records["spans_end"], prepend=0)
            ids, spans = ids[np.repeat(whole, samples.lengths)], spans[np.repeat(whole, pieces)]
            records = records[whole]
            records["end"], records["spans_end"] = np.cumsum(samples.lengths[whole]), np.cumsum(pieces[whole])
            counts["skipped"] += len(samples) - len(records)
        usable, kept = usable + len(rows), kept + len(records)
        findings.feed(lines, rows, dialogues)
        yield ids, spans, records
        bar.update((lines[-1] if lines else bar.n) - bar.n)
    if not usable:
        first = next((f"line {findings.tally[kind][1][0]}: {why}" for kind, why in findings.problems.items()), "")
        raise DataError(f"{path}: every row is broken; --check_data says what is wrong with each. {first}")
    if not kept:
        raise DataError(f"{path}: every row is longer than --max_src_len or --max_len allow (--is_skip)")
    counts |= {"findings": findings.finish(), "unused": few_unused(findings.unused)}


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
        ids, spans, records, counts = cache.open_cache(file)
        if prepared is None:
            os.unlink(file)  # what is mapped stays
        self.samples = Samples(ids, spans, records)
        self.lengths = self.samples.lengths  # [samples], tokens of each
        self.answer_lengths = np.array(records["learnt"], np.int64)  # [samples], of these with a label
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


def split_rows(data: InstructionData, ratio: float) -> tuple[list[int], list[int]]:
    """Rows to train on, and about a share of `ratio` to validate on.

    A hash of the prompt's ids alone says on which side a row is: it stays there when rows come, go or change places,
    and rows with the same prompt are together.

    Raises:
        DataError: one side is empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for i in range(len(data)):
        digest = hashlib.blake2b(data.samples.prompt(i).tobytes(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") < ratio * 2**64].append(i)
    if not all(sides):
        what = "train on" if not sides[0] else "validate on"
        raise DataError(f"--eval_ratio {ratio} leaves none of {len(data)} rows to {what}; take another, or --eval_path")
    return sides
