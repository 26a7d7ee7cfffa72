"""`train.py --check_data`: one pass over the data files that reports everything wrong or unusual in it, row by row.

The terminal shows counts and the first lines; every finding is a line of JSON in FILE. findings.py has what is also
counted before each training.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tuning.errors import DataError
from tuning.samples.cache import sweep, whole_file
from tuning.samples.dataset import Chunk, DataSettings, encode_file
from tuning.samples.encoding import ANSWER_CUT, IGNORE_INDEX, PROMPT_CUT, TURNS_SHIFT, Sample, encode_samples
from tuning.samples.findings import BROKEN, CHANGED, FIRST, WARNINGS, Findings, lines_text
from tuning.samples.formats import few_unused, format_of, to_dialogue, unused_text
from tuning.samples.row_files import RowError, describe_file, scan_rows
from tuning.samples.text import FIRST_BLOCK

FILE = "data_check.jsonl"
LENGTHS = {  # kinds of findings that only --check_data counts, and their titles
    "turns_dropped": "conversations that lose turns from their beginning, to fit",
    "prompt_cut": "queries that lose their end to --max_src_len",
    "answer_cut": "answers that lose their end and the end token to --max_len",
}
OTHERS = {"other_file": "rows that stand in an earlier file too"}
TEST = {
    "test_broken": "test rows that are broken (lines of the test file)",
    "test_in_training": "test prompts that stand in the training file (lines of the test file)",
}
BAR = 40  # characters of the longest bar
ENDS = 12  # tokens shown at each end of a part of the first sample
NO_LIMIT = 1 << 30  # tokens


class Lengths:
    """Tokens of prompts, answers and samples before any cut, and how many of them the cuts take; of plain text, which
    is not cut, its blocks."""

    def __init__(self):
        self.prompts: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []
        self.blocks: list[np.ndarray] = []  # tokens of each block of plain text
        self.texts = 0  # rows of plain text
        self.prompt_lost = self.answer_lost = 0
        self.rows = 0
        self.whole = 0  # samples that are not cut

    def feed(self, tokenizer, chunk: Chunk, findings: Findings) -> None:
        """Count the tokens of some samples; those that were cut are encoded once more as a whole."""
        samples, records = chunk.samples, chunk.samples.records
        answers = records["learnt"].astype(np.int64)
        prompts = samples.lengths - answers
        cut = np.flatnonzero(records["cut"])
        if len(cut):
            # a dialogue has as many samples as a whole, in the same order
            again = np.unique(samples.places[cut])
            whole = encode_samples(tokenizer, [chunk.dialogues[i] for i in again], NO_LIMIT, None)
            those = np.searchsorted(np.flatnonzero(np.isin(samples.places, again)), cut)
            whole_answers = whole.records["learnt"][those]
            prompt_lost = whole.lengths[those] - whole_answers - prompts[cut]
            answer_lost = whole_answers - answers[cut]
            prompts[cut] += prompt_lost
            answers[cut] += answer_lost
            for i, from_prompt, from_answer in zip(cut, prompt_lost.tolist(), answer_lost.tolist(), strict=True):
                if dropped := int(records["cut"][i]) >> TURNS_SHIFT:
                    findings.note("turns_dropped", int(records["line"][i]), turns=dropped)
                if records["cut"][i] & PROMPT_CUT:
                    findings.note("prompt_cut", int(records["line"][i]), tokens=int(prompts[i]), lost=from_prompt)
                if records["cut"][i] & ANSWER_CUT:
                    findings.note("answer_cut", int(records["line"][i]), tokens=int(answers[i]), lost=from_answer)
            self.prompt_lost += int(prompt_lost.sum())
            self.answer_lost += int(answer_lost.sum())
        self.rows += len(chunk.rows)
        self.whole += len(samples) - len(cut)
        is_block = records["text"] > 0
        self.prompts.append(prompts[~is_block])
        self.answers.append(answers[~is_block])
        self.blocks.append(samples.lengths[is_block])
        self.texts += int(np.count_nonzero(records["text"] == FIRST_BLOCK))


class Formats:
    """The format of each row: counts, and in the report a line for each run of rows of the same format."""

    def __init__(self, record: Callable[[str, int, dict], None]):
        self.record = record
        self.count: dict[str, tuple[int, list[int]]] = {}  # name -> how many, the first lines
        self.name, self.start, self.last = "", 0, 0  # of the run

    def feed(self, chunk: Chunk) -> None:
        """Take some rows that can be used, in the order of the file."""
        for line, row in zip(chunk.lines, chunk.rows, strict=True):
            name = format_of(row)
            count, lines = self.count.get(name, (0, []))
            self.count[name] = count + 1, lines if len(lines) == FIRST else [*lines, line]
            if name != self.name:
                self.end()
                self.name, self.start = name, line
            self.last = line

    def end(self) -> None:
        """Report the run that ends here."""
        if self.name:
            self.record("format_of_rows", self.start, {"to_line": self.last, "format": self.name})


def histogram(lengths: np.ndarray, limit: int | None = None, limit_name: str = "") -> list[str]:
    """Lines of a histogram; the bar that contains `limit` is marked."""
    top = max(int(np.percentile(lengths, 99.5)), 1)
    width = next(w for power in range(12) for w in (10**power, 2 * 10**power, 5 * 10**power) if top / w <= 12)
    bins = np.minimum(lengths // width, top // width)  # the last one has no upper end
    counts = np.bincount(bins)
    last, longest = len(counts) - 1, int(lengths.max())
    names = [f"{i * width}-{(i + 1) * width - 1}" for i in range(last)] + [f"{last * width}-{longest}"]
    mark = min(limit // width, last) if limit is not None and limit <= longest else None
    lines = []
    for i, count in enumerate(counts.tolist()):
        if not counts[: i + 1].any() and i != mark:
            continue
        bar = "#" * -(-count * BAR // int(counts.max()))
        lines.append(f"  {names[i]:>13} {count:>9} {bar}" + (f"  <- {limit_name} {limit}" if i == mark else ""))
    if limit is not None and mark is None:
        lines.append(f"  {limit_name} {limit} is longer than all")
    return lines


def sample_lines(tokenizer, sample: Sample) -> list[str]:
    """A sample token by token: position, id, label and piece; the middle of long parts is left out."""
    pieces = tokenizer.convert_ids_to_tokens(sample.input_ids)
    labels = sample.labels
    lines = [f"  {'place':>6} {'id':>7} {'label':>7}  piece"]
    for start, end in itertools.pairwise(sorted({0, *itertools.chain(*sample.spans), len(pieces)})):
        for i in range(start, end):
            if end - start > 2 * ENDS + 1 and start + ENDS <= i < end - ENDS:
                if i == start + ENDS:
                    lines.append(f"  {'...':>6} {end - start - 2 * ENDS} more")
                continue
            label = "-" if labels[i] == IGNORE_INDEX else labels[i]
            lines.append(f"  {i:>6} {sample.input_ids[i]:>7} {label:>7}  {json.dumps(pieces[i], ensure_ascii=False)}")
    return lines


class Checked(NamedTuple):
    """What was found in a file. first: line and sample of the first usable row; ends: the error that ended the file."""

    settings: DataSettings
    findings: Findings
    lengths: Lengths
    formats: Formats
    first: tuple[int, Sample] | None
    ends: RowError | None


def check_data(
    files: Sequence[DataSettings],
    tokenizer,
    test_path: str | None,
    output_dir: str,
    say: Callable[[str], None] = print,
) -> None:
    """Read whole files, print what was found in each, and write each finding to FILE in `output_dir`.

    Args:
        test_path: a file whose prompts should not be in the data; its rows may have several outputs, or an empty one.

    Raises:
        DataError: a training would not start with one of the files: it cannot be read, a row is broken and `skip_bad`
            is false, or none is left; or the report cannot be written. All but the last are raised after the report.
    """
    report = os.path.join(output_dir, FILE)
    checked: list[Checked] = []
    try:
        os.makedirs(output_dir, exist_ok=True)
        sweep(output_dir, re.escape(FILE))
        with whole_file(report, "x", encoding="utf-8") as file:
            for settings in files:
                where = {"file": settings.path} if len(files) > 1 else {}

                def record(kind, line, details, where=where):
                    found = where | {"line": line, "kind": kind, **details}
                    file.write(json.dumps(found, ensure_ascii=False) + "\n")

                one = _read(settings, tokenizer, record)
                _find_shared_rows(one, checked)
                if test_path:
                    _find_test_rows(test_path, one.findings, settings.columns)
                checked.append(one)
    except OSError as error:
        raise DataError(f"cannot write {report}: {error.strerror}; --output_dir names another folder") from None

    for one in checked:
        _say(one, tokenizer, say)
    say(f"all findings: {report}")
    for one in checked:
        _raise_for(one)


def _say(one: Checked, tokenizer, say: Callable[[str], None]) -> None:
    """Print what was found in a file."""
    settings, findings, lengths = one.settings, one.findings, one.lengths
    for line in describe_file(settings.path, settings.columns):
        say(line)
    say(f"{settings.path}: {lengths.rows + _count_broken(findings)} rows, {lengths.rows} of them usable")
    if one.formats.count:
        say("formats: " + "; ".join(f"{name}: {lines_text(*some)}" for name, some in one.formats.count.items()))
    for line in (*_finding_lines(findings), *_token_lines(settings, findings, lengths)):
        say(line)
    if one.first:
        line, sample = one.first
        say("\n".join((f"first sample (line {line}), token by token:", *sample_lines(tokenizer, sample))))


def _count_broken(findings: Findings) -> int:
    return sum(findings.tally[kind][0] for kind in BROKEN if kind in findings.tally)


def _raise_for(one: Checked) -> None:
    """Raise a DataError if a training would not start with the file."""
    settings, lengths, broken = one.settings, one.lengths, _count_broken(one.findings)
    if not lengths.rows:
        raise DataError(f"{settings.path}: every row is broken")
    if one.ends:
        raise DataError(str(one.ends))
    if broken and not settings.skip_bad:
        raise DataError(
            f"{settings.path}: {broken} rows are broken; fix them, or train without them: --on_bad_row skip"
        )
    if settings.skip_cut and not lengths.whole:
        raise DataError(f"{settings.path}: every row is longer than --max_src_len or --max_len allow (--is_skip)")


def _finding_lines(findings: Findings) -> Iterator[str]:
    """Counts and first lines of each kind of finding."""
    tally = findings.tally
    for kinds, title in ((BROKEN, "broken"), (LENGTHS | WARNINGS | OTHERS, "to look at"), (TEST, "test file")):
        there = [kind for kind in kinds if kind in tally]
        if there:
            yield f"{title}:"
        for kind in there:
            first_problem = f"; the first: {findings.problems[kind]}" if kind in findings.problems else ""
            yield f"  {kinds[kind]}: {lines_text(*tally[kind])}{first_problem}"
    if not tally.keys() - {CHANGED}:
        yield "nothing wrong or odd was found"
    if CHANGED in tally:
        rows = lines_text(*tally[CHANGED])
        yield f"the tokenizer writes some characters otherwise, in {rows}: {findings.changed.text()}"
    if unused := unused_text(few_unused(findings.unused)):
        yield unused


def _token_lines(settings: DataSettings, findings: Findings, lengths: Lengths) -> Iterator[str]:
    """Totals and histograms of tokens, if there is a sample."""
    kinds = (lengths.prompts, lengths.answers, lengths.blocks)
    prompts, answers, blocks = (np.concatenate([np.zeros(0, np.int64), *some]) for some in kinds)
    if len(blocks):
        yield (
            f"plain text: {lengths.texts} row{'s' * (lengths.texts != 1)} in {len(blocks)} blocks of at most --max_len "
            f"{settings.max_len}, {blocks.sum()} tokens; none is cut"
        )
        yield "\n".join(("tokens of blocks:", *histogram(blocks)))
    if not len(prompts):
        return
    total = int(prompts.sum() + answers.sum())
    dropped = "; --is_skip leaves such rows out" if settings.skip_cut and {*LENGTHS} & {*findings.tally} else ""
    yield (
        f"tokens: {total} (prompts {prompts.sum()}, answers {answers.sum()}); the cuts take {lengths.prompt_lost} "
        f"of the prompts (--max_src_len) and {lengths.answer_lost} of the answers (--max_len){dropped}"
    )
    # max_src_len does not count the prompt's special tokens, so its mark may be one bar too early
    yield "\n".join(("tokens of prompts:", *histogram(prompts, settings.max_src_len, "--max_src_len")))
    yield "\n".join(("tokens of answers:", *histogram(answers)))
    yield "\n".join(("tokens of both:", *histogram(prompts + answers, settings.max_len, "--max_len")))


def _read(settings: DataSettings, tokenizer, record: Callable[[str, int, dict], None]) -> Checked:
    """Look at all rows of a file; `record` gets each finding."""
    findings, lengths, formats = Findings(tokenizer, record, changed=True), Lengths(), Formats(record)
    first = ends = None

    def leave_out(error: RowError):
        nonlocal ends
        if error.flaw.ends:
            ends = error
        findings.note(error.flaw.kind, error.line, problem=error.flaw.problem)

    for chunk in encode_file(settings, tokenizer, leave_out, lambda chunk: chunk):
        findings.feed(chunk.lines, chunk.rows, chunk.dialogues)
        lengths.feed(tokenizer, chunk, findings)
        formats.feed(chunk)
        if len(chunk.samples) and not first:
            first = int(chunk.samples.records["line"][0]), chunk.samples[0]
    formats.end()
    findings.finish()
    return Checked(settings, findings, lengths, formats, first, ends)


def _find_shared_rows(one: Checked, others: Sequence[Checked]) -> None:
    """Note the rows that stand in an earlier file too."""
    lines, rows = one.findings.hashed(whole=True)
    for other in others:
        for line in lines[np.isin(rows, other.findings.hashed(whole=True)[1])].tolist():
            one.findings.note("other_file", line, file_too=other.settings.path)


def _find_test_rows(path, findings, columns):
    """Note the rows of a test file whose prompts are among those that `findings` was given."""
    lines, prompts = findings.hashed()
    order = np.argsort(prompts, kind="stable")
    prompts, lines = prompts[order], lines[order]
    for line, row in scan_rows(path, several_outputs=True, empty_outputs=True, columns=columns):
        if isinstance(row, RowError):
            findings.note("test_broken", line, problem=row.flaw.problem)
            continue
        value = hash(to_dialogue(row).prompt_key)
        place = np.searchsorted(prompts, value)
        if place < len(prompts) and prompts[place] == value:
            findings.note("test_in_training", line, training_line=int(lines[place]))
