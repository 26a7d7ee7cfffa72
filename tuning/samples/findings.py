"""Warnings about rows that can be trained, found in one pass: rows that repeat or contradict others, text that the
tokenizer does not keep. Rows that cannot be trained are found by row_files.py and counted here too.

Of a tokenizer this uses only `special_texts`, `lost_characters` and `changed_characters`.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tuning.samples.dialogue import Dialogue
from tuning.samples.formats import count_unused

FIRST = 3  # lines that are named for each kind

# Kinds of findings. Rows with one of the kinds in BROKEN cannot be trained.
BROKEN = {
    "encoding": "not text in the file's encoding",
    "json": "not valid JSON",
    "table": "not a row of the table",
    "format": "rows of another format",
    "keys": "keys that mean something and are not read",
    "type": "a key missing or of a wrong type",
    "empty": "empty fields",
    "family": "messages that this model family does not have",
    "no_room": "no room for an answer after the prompt",
}
WARNINGS = {
    "duplicate": "repeats of an earlier row",
    "contradiction": "an earlier row's prompt with another answer",
    "lost_characters": "characters that the tokenizer cannot represent",
    "special_tokens": "special tokens written out in the text",
    "list_text": "outputs that are a Python list written as text, as ['a']",
}
CHANGED = "changed_characters"  # the kind of finding that --check_data alone looks for


class Seen(NamedTuple):
    """What `Findings.look` saw in some rows.

    lines: int64 [rows].
    hashes: int64 [rows, 2]: of the prompt, of prompt and answer.
    unused: how many rows have each key that nothing reads.
    notes: kind, line and details of each finding.
    """

    lines: np.ndarray
    hashes: np.ndarray
    unused: Counter[str]
    notes: list[tuple[str, int, dict]]


class Findings:
    """Counts findings by kind, and finds those of WARNINGS in the rows that it is given.

    Texts are kept as hashes of 8 bytes: 24 bytes per row in total.

    Args:
        record: called with each finding: kind, line and details.
        changed: also look for characters that the tokenizer changes.
    """

    def __init__(self, tokenizer, record: Callable[[str, int, dict], None] | None = None, changed: bool = False):
        self.tokenizer, self.record = tokenizer, record
        self.tally: dict[str, list] = {}  # kind -> [how many, the first lines]
        self.problems: dict[str, str] = {}  # kind -> what is wrong with the first row of it
        self.unused: Counter[str] = Counter()  # rows with each key that nothing reads
        self.changed = Changed(tokenizer) if changed else None
        special = sorted(tokenizer.special_texts, key=len, reverse=True)
        self.special, self.special_starts = re.compile("|".join(map(re.escape, special))), {text[0] for text in special}
        self.kept = np.zeros(0x110000, bool)  # [characters], those known to be represented
        self.lost: set[str] = set()
        self.lines: list[np.ndarray] = []
        self.hashes: list[np.ndarray] = []  # [rows, 2] each: of the prompt, of prompt and answer

    def note(self, kind: str, line: int, **details) -> None:
        """Count a finding."""
        entry = self.tally.setdefault(kind, [0, []])
        entry[0] += 1
        if "problem" in details:
            self.problems.setdefault(kind, details["problem"])
        if len(entry[1]) < FIRST:
            entry[1].append(line)
        if self.record:
            self.record(kind, line, details)

    def feed(self, lines: Sequence[int], rows: Sequence[dict], dialogues: Sequence[Dialogue]) -> None:
        """Look at some rows that can be trained, in the order of the file.

        Args:
            dialogues: what the rows become; of the rows themselves only the keys are read.
        """
        self.add(self.look(lines, rows, dialogues))
        if self.changed:
            self.changed.feed(lines, [one.prompt for one in dialogues], [one.answer for one in dialogues])

    def add(self, seen: Seen) -> None:
        """Count what was seen in some rows; in the order of the file."""
        self.unused.update(seen.unused)
        self.lines.append(seen.lines)
        self.hashes.append(seen.hashes)
        for kind, line, details in seen.notes:
            self.note(kind, line, **details)

    def look(self, lines: Sequence[int], rows: Sequence[dict], dialogues: Sequence[Dialogue]) -> Seen:
        """What is found in some rows without knowing others. Counts nothing, so another process may do it; arguments as
        for `feed`."""
        seen = Seen(np.array(lines, np.int64), np.zeros((len(rows), 2), np.int64), Counter(), [])
        count_unused(rows, seen.unused)
        prompts = [dialogue.prompt for dialogue in dialogues]
        answers = [dialogue.answer for dialogue in dialogues]
        keys = [dialogue.prompt_key for dialogue in dialogues]
        # Python's hashes of str: 64 bits, with a secret seed
        hashes = (map(hash, keys), map(hash, zip(keys, answers, strict=True)))
        np.stack([np.fromiter(some, np.int64, len(rows)) for some in hashes], 1, out=seen.hashes)

        text = "\n".join((*prompts, *answers))  # one search for what is in none of the texts
        if self._holds_lost(text):
            for line, prompt, answer in zip(lines, prompts, answers, strict=True):
                if found := sorted(self.lost.intersection(prompt + answer)):
                    characters = [f"U+{ord(c):04X}" for c in found]
                    seen.notes.append(("lost_characters", line, {"characters": characters}))
        for line, answer in zip(lines, answers, strict=True) if "['" in text else ():
            if answer.startswith("['") and answer.rstrip().endswith("']"):
                seen.notes.append(("list_text", line, {}))
        starts = [start for start in self.special_starts if start in text]
        for line, prompt, answer in zip(lines, prompts, answers, strict=True) if starts else ():
            if any(start in prompt or start in answer for start in starts) and (
                found := {*self.special.findall(prompt), *self.special.findall(answer)}
            ):
                seen.notes.append(("special_tokens", line, {"tokens": sorted(found)}))
        return seen

    def _holds_lost(self, text: str) -> bool:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        kept = self.kept.take(codes)
        if kept.all():
            return False
        others = np.zeros_like(self.kept)
        others[codes[~kept]] = True
        characters = "".join(map(chr, np.flatnonzero(others)))
        new = "".join(c for c in characters if c not in self.lost)
        self.lost |= self.tokenizer.lost_characters(new)
        for character in new:
            self.kept[ord(character)] = character not in self.lost
        return not self.lost.isdisjoint(characters)

    def finish(self) -> dict[str, list]:
        """Find rows that repeat or contradict others, and record characters that changed. Returns `tally`."""
        if self.changed and self.changed.rows:
            self.tally[CHANGED] = [self.changed.rows, self.changed.lines]
            for character, line in self.changed.first.items() if self.record else ():
                details = {"character": character, "becomes": self.changed.becomes[character]}
                self.record(CHANGED, line, details | {"times": self.changed.times[character]})
        if self.lines:
            lines, hashes = np.concatenate(self.lines), np.concatenate(self.hashes)
            same_prompt, same_row = (_first_with(hashes[:, i]) for i in (0, 1))
            place = np.arange(len(lines))
            repeats = same_row != place
            for kind, those, first in (
                ("duplicate", repeats, same_row),
                ("contradiction", (same_prompt != place) & ~repeats, same_prompt),
            ):
                for i in np.flatnonzero(those).tolist():
                    self.note(kind, int(lines[i]), earlier_line=int(lines[first[i]]))
        return self.tally

    def hashed(self, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Of all rows so far: lines, and the hashes of their `prompt_key`, or of the whole rows."""
        if not self.lines:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(self.lines), np.concatenate(self.hashes)[:, int(whole)]


class Changed:
    """Characters that come back from the tokenizer as others, as ， comes back as , from ChatGLM-6B's."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.seen = np.zeros(0x110000, bool)  # [characters]
        self.is_changed = np.zeros(0x110000, bool)  # [characters]
        self.becomes: dict[str, str] = {}
        self.times: Counter[str] = Counter()
        self.first: dict[str, int] = {}  # character -> the first line that has it
        self.rows, self.lines = 0, []  # how many rows have any of them, the first lines

    def feed(self, lines: Sequence[int], prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Take the texts of some rows."""
        texts = (*prompts, *answers)
        text = "\n".join(texts)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        if not (seen := self.seen.take(codes)).all():
            new = np.unique(codes[~seen])
            self.seen[new] = True
            changes = self.tokenizer.changed_characters("".join(map(chr, new)))
            self.is_changed[[ord(character) for character in changes]] = True
            self.becomes |= changes
        places = np.flatnonzero(self.is_changed.take(codes))
        if not len(places):
            return
        ends = np.cumsum(np.array([*map(len, texts)]) + 1)
        rows = np.searchsorted(ends, places, "right") % len(lines)
        found, first, times = np.unique(codes[places], return_index=True, return_counts=True)
        for code, place, count in zip(found.tolist(), first.tolist(), times.tolist(), strict=True):
            self.times[chr(code)] += count
            self.first.setdefault(chr(code), lines[int(rows[place])])
        which = np.unique(rows).tolist()
        self.rows += len(which)
        self.lines += [lines[i] for i in which[: FIRST - len(self.lines)]]

    def text(self, most: int = 6) -> str:
        """As `，-> , (3201 times)`, the most frequent ones."""
        shown = [f"{one!r} -> {self.becomes[one]!r} ({times} times)" for one, times in self.times.most_common(most)]
        return ", ".join(shown) + (", ..." if len(self.times) > most else "")


def _first_with(values: np.ndarray) -> np.ndarray:
    """For each value the place of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def lines_text(count: int, lines: list[int]) -> str:
    """As `1 row (line 3)` or `9 rows (lines 3, 9, 12, ...)`."""
    if count == 1:
        return f"1 row (line {lines[0]})"
    return f"{count} rows (lines {', '.join(map(str, lines))}{', ...' if count > len(lines) else ''})"
