"""Input files of a report: answers of predict.py, logs of a training. Errors name the file and the line."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable

from tuning.errors import DataError, UserError
from tuning.evaluate.answers import read_record
from tuning.metrics import AS_WRITTEN, references_of
from tuning.run.record import read_starts
from tuning.samples.conversations import conversation_key
from tuning.samples.data_files import find_files
from tuning.samples.flaws import Flaw
from tuning.samples.formats import Columns, read_row, to_dialogue
from tuning.samples.row_files import RowError, scan_rows

CURVES = {"curve": "log.jsonl", "validation": "validation.jsonl"}


def read_lines(path: str, problem: Callable[[dict], str | None], may_be_cut: bool = False) -> list[dict]:
    """The objects of a JSON lines file.

    Args:
        problem: returns what is wrong with an object, or None.
        may_be_cut: ignore a last line that is still being written.

    Raises:
        UserError: the file cannot be read, or a line is not such an object; names the file and the line.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if may_be_cut and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            wrong = "it is not a JSON object" if not isinstance(item, dict) else problem(item)
        except RecursionError:
            wrong = "it is nested too deeply"
        except ValueError as error:  # JSON and UTF-8 errors alike
            wrong = f"it is not JSON: {error}"
        if wrong:
            raise UserError(f"{path}, line {number}: {wrong}")
        found.append(item)
    return found


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Answers


def _answer_problem(row: dict) -> str | None:
    """What is wrong with a row of an answer file, or None."""
    several = conversation_key(row) is not None
    for key in ("prediction",) if several else ("instruction", "input", "prediction"):
        if not isinstance(row.get(key), str):
            return f"{key} is not a text, as predict.py writes it"
    if not isinstance(row.get("ended"), bool):
        return "ended is not true or false, as predict.py writes it"
    for key in ("output", AS_WRITTEN):
        texts = row[key] if isinstance(row.get(key), list) else [row.get(key)]
        if key in row and not (texts and all(isinstance(text, str) for text in texts)):
            return f"{key} is neither a text nor a list of texts"
    if several or "history" in row or "system" in row:
        found = read_row(dict(row), several_outputs=True, empty_outputs=True, missing_outputs=True)
        return found.problem if isinstance(found, Flaw) else None
    return None


def asked_in(row: dict) -> tuple:
    """Equal for two rows that ask the same and expect the same answers."""
    return to_dialogue(row).prompt_key, json.dumps(row.get("output"))


def read_answers(path: str, mode: str | None = None) -> tuple[list[dict], list[str], list[list[str]], list[bool]]:
    """Read an answer file: rows, predictions, references of each row, whether each prediction ended by itself.

    Args:
        mode: the family that must have answered.

    Raises:
        UserError: not an answer file, or one of another family; rows are missing, or answered more than once; there are
            no references.
    """
    rows = read_lines(path, _answer_problem)
    check_count(path, rows, mode)
    if not rows:
        raise UserError(f"{path} is empty: it is not a file of answers that predict.py wrote")
    without = [number for number, row in enumerate(rows, 1) if "output" not in row]
    if len(without) == len(rows):
        raise UserError(f"{path} has no references (output) to compare the answers with")
    if without:
        raise UserError(f"{path}, line {without[0]}: no reference (output), though other rows have one")
    predictions, ended = [row["prediction"] for row in rows], [row["ended"] for row in rows]
    return rows, predictions, [references_of(row) for row in rows], ended


def check_count(path: str, rows: list[dict], mode: str | None = None) -> None:
    """Check that each row has one answer, of this family. Uses the record beside the file, if there is one.

    Raises:
        UserError: it does not.
    """
    made = read_record(path)
    if made and mode and made.settings.get("--mode", mode) != mode:
        raise UserError(f"{path} has answers of --mode {made.settings['--mode']}, not of --mode {mode}")
    if made and len(rows) < made.rows:
        raise UserError(f"{path} holds {len(rows)} of {made.rows} answers; the same predict.py command continues")
    if made and len(rows) > made.rows:
        raise UserError(f"{path} holds {len(rows)} answers to {made.rows} rows: other programs also wrote to it")
    asked = Counter(map(asked_in, rows))
    if not made and rows and min(asked.values()) > 1:
        raise UserError(
            f"{path} answers each row {min(asked.values())} times: two runs wrote to it; run predict.py again"
        )


# Trainings


def _curve_problem(line: dict) -> str | None:
    """What is wrong with a line of a training log, or None. A loss that is not finite is null there."""
    if not _is_number(line.get("step")):
        return "step is not a number"
    if "loss" not in line or not (line["loss"] is None or _is_number(line["loss"])):
        return "loss is not a number"
    if not isinstance(line.get("scores", {}), dict):
        return "scores is not an object"
    return None


def read_curves(training: str) -> dict:
    """curve: training steps (step, loss); validation: validations (step, loss, scores). Empty if a file is missing.

    Args:
        training: output_dir of a training, with log.jsonl and validation.jsonl.

    Raises:
        UserError: a line of these files is malformed.
    """
    found = {}
    for key, name in CURVES.items():
        path = os.path.join(training, name)
        found[key] = read_lines(path, _curve_problem, may_be_cut=True) if os.path.isfile(path) else []
    return found


def point(value) -> float:
    """A value of a curve as a float; NaN if it is missing or was not finite."""
    return float(value) if _is_number(value) else math.nan


def read_commands(training: str) -> dict[str, str]:
    """The command line of the last start of a training, from its run.json."""
    starts = read_starts(training)
    return {"train": str(starts[-1]["command"])} if starts and starts[-1].get("command") else {}


def count_seen(training: str, answers: str) -> int | None:
    """Number of answered rows whose question is also in the training files; None if one of them cannot be read.

    Args:
        training: output_dir of the training; its run.json names the training files.
        answers: a file of predict.py.
    """
    starts = read_starts(training)
    try:
        flags = starts[-1]["flags"]
        names = [flags.get(f"{name}_column") for name in Columns._fields]
        columns = Columns(*names) if names[0] else None
        texts = [flags["train_path"]] if isinstance(flags["train_path"], str) else flags["train_path"]
        asked = {
            to_dialogue(row).prompt_key
            for file in find_files(texts, weights=True, base=starts[-1]["folder"])[0]
            for _, row in scan_rows(file.path, empty_outputs=True, columns=columns)
            if not isinstance(row, RowError)
        }
    except (DataError, IndexError, KeyError, TypeError, ValueError):
        return None
    return sum(to_dialogue(row).prompt_key in asked for row in read_answers(answers)[0])
