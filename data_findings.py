"""What is worth a word in rows that can be trained, found in one pass: rows that repeat or contradict others, text that
the tokenizer does not keep. Which rows cannot be trained is said by data_set.py, whose findings are counted here too.

A tokenizer is known here by these only: `special_texts` and `lost_characters`.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

FIRST = 3  # lines that are named of each kind

# Kinds of findings. Rows of the first few cannot be trained.
BROKEN = {
    "json": "not valid JSON",
    "type": "a key missing or of a wrong type",
    "empty": "empty fields",
    "no_room": "no room for an answer after the prompt",
}
WARNINGS = {
    "duplicate": "repeats of an earlier row",
    "contradiction": "an earlier row's prompt with another answer",
    "lost_characters": "characters that the tokenizer cannot represent",
    "special_tokens": "special tokens written out in the text",
}


class Findings:
    """Counts findings by kind, and finds those of WARNINGS in the rows that it is given.

    Texts are kept as hashes of 8 bytes: 24 bytes a row in all.

    Args:
        record: gets each finding as it is made: kind, line and what else is known of it.
    """

    def __init__(self, tokenizer, record: Callable[[str, int, dict], None] | None = None):
        self.tokenizer, self.record = tokenizer, record
        self.tally: dict[str, list] = {}  # kind -> [how many, the first lines]
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
        if len(entry[1]) < FIRST:
            entry[1].append(line)
        if self.record:
            self.record(kind, line, details)

    def feed(self, lines: Sequence[int], rows: Sequence[dict]) -> None:
        """Take some rows that can be trained, in the order of the file."""
        prompts = [row["instruction"] + row["input"] for row in rows]
        answers = [row["output"] for row in rows]
        self.lines.append(np.array(lines, np.int64))
        # those of str are of 64 bits, with a seed that nobody outside knows
        hashes = (map(hash, prompts), map(hash, zip(prompts, answers, strict=True)))
        self.hashes.append(np.stack([np.fromiter(some, np.int64, len(rows)) for some in hashes], 1))

        text = "\n".join((*prompts, *answers))  # what is in none of the texts is looked for once
        if self._holds_lost(text):
            for line, prompt, answer in zip(lines, prompts, answers, strict=True):
                if found := sorted(self.lost.intersection(prompt + answer)):
                    self.note("lost_characters", line, characters=[f"U+{ord(c):04X}" for c in found])
        starts = [start for start in self.special_starts if start in text]
        for line, prompt, answer in zip(lines, prompts, answers, strict=True) if starts else ():
            if any(start in prompt or start in answer for start in starts) and (
                found := {*self.special.findall(prompt), *self.special.findall(answer)}
            ):
                self.note("special_tokens", line, tokens=sorted(found))

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
        """Find rows that repeat or contradict others. Returns `tally`."""
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

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all rows so far: lines, and the values of `hash` of their prompts."""
        if not self.lines:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(self.lines), np.concatenate(self.hashes)[:, 0]


def _first_with(values: np.ndarray) -> np.ndarray:
    """For each value the place of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def lines_text(count: int, lines: list[int]) -> str:
    """As `1 row (line 3)` or `9 rows (lines 3, 9, 12, ...)`."""
    if count == 1:
        return f"1 row (line {lines[0]})"
    return f"{count} rows (lines {', '.join(map(str, lines))}{', ...' if count > len(lines) else ''})"
