"""Answer files of predict.py: JSON lines with the answered rows, and beside each file a record of what produced it.

    predictions.jsonl             one line per row: the keys of the row, prediction, ended, and tool_call
                                  (name and parameters) where the prediction is one
    predictions.jsonl.run.json    what the answers depend on: weights, flags, SHA-256 of the file that was answered

The file is written when every row has an answer; until then the answers stand in parts beside it (parts.py). An
interrupted run continues only if what the answers depend on is the same, so that answers of two models are never mixed.
Only one run at a time writes to a file.
"""

import contextlib
import fcntl
import json
import os
from typing import NamedTuple

from glm_models.checkpoint import CheckpointError, read_json
from glm_models.convert.direct import describe_in_either_form
from glm_models.prefix import find_prefix
from glm_models.tools import find_call
from tuning import folders
from tuning.errors import FolderError, UserError
from tuning.evaluate.parts import PART, append, as_bytes, join_parts, list_parts, read_parts
from tuning.folders import MANIFEST, write_errors, write_file
from tuning.metrics import (
    ADDED,
    describe,
    describe_outputs,
    kind_of,
    label_scores,
    missing,
    relation_scores,
    score,
    with_answer,
)

RECORD = ".run.json"  # appended to the name of the answer file
FORMAT = 1  # of the record
SHOWN = 12  # characters of a hash or another long value in a message
PARTS = {"triples": relation_scores, "classes": label_scores}  # scores by relation, by label


class Made(NamedTuple):
    """What produced an answer file.

    settings: everything that the answers depend on, by the name that users know.
    rows: number of rows in the file that is answered.
    model: --model_path as typed, for messages.
    """

    settings: dict
    rows: int
    model: str


# What the answers depend on


def file_hash(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return folders.file_hash(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def describe_model(mode: str, folder: str, base: str, tokenizer) -> dict:
    """What answers depend on in a model: name -> hash of its weights, config, tokenizer and other files.

    Args:
        base: see adapter.find_base.
    """
    found = {}
    if base != folder:
        names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
        prefix = find_prefix(folder)
        paths = [prefix] if prefix else [os.path.join(folder, name) for name in names]
        found = {f"{os.path.basename(p)} of --model_path": file_hash(p) for p in paths if os.path.isfile(p)}
    model = describe_in_either_form(mode, base)
    whose = "--model_path" if base == folder else "the base"
    found[f"weights of {whose}"] = model["fingerprint"]
    found[f"config.json of {whose}"] = model["config"]
    found[f"tokenizer of {whose}"] = tokenizer.fingerprint()
    for name in (MANIFEST, "generation_config.json"):  # the manifest has hashes of the complete weights
        path = os.path.join(base, name)
        found[f"{name} of {whose}"] = file_hash(path) if os.path.isfile(path) else None
    return found


# The file


def read_record(path: str) -> Made | None:
    """The record of an answer file; None if there is no valid one."""
    try:
        content = read_json(path + RECORD)
        if content["format"] != FORMAT or not isinstance(content["settings"], dict):
            return None
        return Made(content["settings"], int(content["rows"]), str(content["model"]))
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def read_rows_of(path: str) -> tuple[list[dict], int, bool]:
    """Read an answer file up to the first invalid line.

    Returns:
        The rows, their size in bytes, and whether nothing follows them but one incomplete line.

    Raises:
        OSError: the file cannot be read.
    """
    rows, size = [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("prediction"), str):
                return rows, size, not line.endswith(b"\n")
            rows.append(row)
            size += len(line)
    return rows, size, True


class AnswerFile:
    """The answer file of a run, in the hands of rank 0. A context manager: it holds the lock of the file.

    answers: those that are known already: row, counted from 0 -> text, and whether it ended by itself.

    Args:
        path: created if needed, with its folder.
        rows: the rows to answer, in order.
        made: what produces these answers.
        overwrite: remove existing answers and start again.

    Raises:
        UserError: the file cannot be written; another process writes to it; it holds something else, or answers
            produced in another way.
    """

    def __init__(self, path: str, rows: list[dict], made: Made, overwrite: bool):
        self.path, self.rows = path, rows
        self.file = _open_locked(path)
        with contextlib.ExitStack() as undo:
            undo.callback(self.file.close)
            self.written, size, self.answers = self._take_over(made, overwrite)
            with write_errors(path + RECORD):
                os.ftruncate(self.file.fileno(), size)  # first: old answers must not stand beside the new record
                join_parts(path, {row: self.answers[row] for row in self.answers if row >= self.written})
                text = json.dumps({"format": FORMAT, **made._asdict()}, ensure_ascii=False, indent=1)
                write_file(path + RECORD, text + "\n")
            undo.pop_all()

    def _take_over(self, made: Made, overwrite: bool) -> tuple[int, int, dict[int, tuple[str, bool]]]:
        """The existing answers to keep: how many the file holds, their size in bytes, and all that are known."""
        path, record = self.path, read_record(self.path)
        done, size, only_cut = read_rows_of(path)
        empty = not os.path.getsize(path)
        if not empty and not done and (record is None or not only_cut):
            raise UserError(f"--output_path {path} is not an answer file; choose another one")
        answers = read_parts(path)
        if overwrite or (empty and not list_parts(path)):
            return 0, 0, {}
        remedy = "--overwrite removes them and starts again; or choose another --output_path"
        if record is None:
            raise UserError(
                f"{path} holds answers without {os.path.basename(path)}{RECORD}, so it is unknown what produced them "
                f"(an older version?); {remedy}"
            )
        changed = compare(record.settings, made.settings)
        answers |= {row: (one["prediction"], one.get("ended", False)) for row, one in enumerate(done)}
        if changed:
            raise UserError(
                f"{path} holds {len(answers)} answers of {record.model} that were produced differently: "
                f"{'; '.join(changed)}. {remedy}"
            )
        if not only_cut or len(done) > len(self.rows) or not all(map(_same_row, done, self.rows)):
            raise UserError(f"{path} does not hold the rows of --predict_path in their order; {remedy}")
        return len(done), size, answers

    def finish(self, answers: dict[int, tuple[str, bool]]) -> None:
        """Write the answers to all rows, in order, and remove the parts.

        Args:
            answers: to every row that was not answered before.

        Raises:
            FolderError: they cannot be written; the parts are kept.
        """
        self.answers |= answers
        lines = (as_bytes(with_answer(self.rows[i], *self.answers[i])) for i in range(self.written, len(self.rows)))
        kept = f"the {len(self.answers)} answers are in {os.path.basename(self.path)}{PART}0 and so on"
        append(self.file, b"".join(lines), kept)
        self.written = len(self.rows)
        try:
            os.fsync(self.file.fileno())  # before the parts go
            join_parts(self.path, {})
        except OSError as error:
            raise FolderError(f"cannot write {self.path}: {error.strerror}; {kept}") from error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def _open_locked(path: str):
    """Open a file to append to, and lock it."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"--output_path {path} is not a regular file; choose another one")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "ab", buffering=0)  # noqa: SIM115 - stays open while the lock is held
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output_path") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another predict.py is writing to {path}; wait for it to end, or choose another --output_path"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def _same_row(answered: dict, row: dict) -> bool:
    return all(answered.get(key) == row.get(key) for key in (answered.keys() | row.keys()) - ADDED)


def compare(before: dict, now: dict) -> list[str]:
    """The differences between two settings as texts."""
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            changed += [f"{key} in {name} ({_short(old.get(key))} before, {_short(new.get(key))} now)" for key in keys]
        elif old != new:
            changed.append(f"{name} ({_short(old)} before, {_short(new)} now)")
    return changed


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 2 * SHOWN else text[:SHOWN] + "..."


# Scores


def describe_scores(kind: str, predictions: list[str], references: list[list[str]], ended: list[bool]) -> list[str]:
    """The scores of answers as lines of text.

    Args:
        kind: a key of HEADLINE, or "auto": as fits the references.
        references: of each row; an empty list for a row without references, which is not scored.
        ended: whether each prediction ended by itself.
    """
    known, count = [i for i, answers in enumerate(references) if answers], len(references)
    references = [references[i] for i in known]
    nothing = not any(text.strip() for answers in references for text in answers)
    if not known or (kind == "auto" and nothing):
        why = "every output is empty" if known else "the file has no references (output)"
        return [f"no scores: {why}; {describe_outputs(predictions, ended)}"]
    lines = []
    if len(known) < count:
        lines.append(f"scored: the {len(known)} of {count} rows that have references (output)")
    predictions, ended = [predictions[i] for i in known], [ended[i] for i in known]
    kind = kind_of(references) if kind == "auto" else kind
    *means, outputs = describe(kind, score(kind, predictions, references, ended))
    line = (
        "  {}: precision {precision:.4f} recall {recall:.4f} F1 {f1:.4f} ({expected} expected, {predicted} predicted)"
    )
    if kind == "tool_calls" and (plain := [i for i, texts in enumerate(references) if not any(map(find_call, texts))]):
        parts = ([one[i] for i in plain] for one in (predictions, references, ended))
        means += [f"  the {len(plain)} plain answers, {line}" for line in describe("text", score("text", *parts))[:-1]]
    table = PARTS[kind](predictions, references) if kind in PARTS else {}
    lines += [*means, *(line.format(name, **row) for name, row in table.items() if row["expected"])]
    if kind == "classes" and (others := len(predictions) - sum(row["predicted"] for row in table.values())):
        lines.append(f"  {others} of {len(predictions)} answers are none of these labels")
    if missing("text" if kind == "tool_calls" and plain else kind):
        lines.append(f"ROUGE and BLEU are left out; they need: {missing(kind)}")
    return [*lines, outputs]
