"""predict.py's answer files: JSON lines of rows with their answers, and beside each file a record of what made it.

    predictions.jsonl             a line a row: the row's own keys, prediction, ended
    predictions.jsonl.run.json    what the answers depend on: weights, flags, SHA-256 of the file that was answered

An interrupted run goes on only where all of that is the same: answers of another model are never counted as this
model's. One process at a time writes to a file.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from typing import NamedTuple

from glm_models.checkpoint import CheckpointError, read_json
from glm_models.identify import describe_base
from tuning.errors import FolderError, UserError
from tuning.folders import MANIFEST, write_errors, write_file

RECORD = ".run.json"  # appended to the name of the answer file
FORMAT = 1  # of the record
SHOWN = 12  # characters of a hash or another long value in a message


class Made(NamedTuple):
    """What made a file of answers.

    settings: all that the answers depend on, by the name that a user knows it by.
    rows: number of rows in the file that is answered.
    model: --model_path as it was typed, for messages.
    """

    settings: dict
    rows: int
    model: str


# What answers depend on


def file_hash(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def describe_model(mode: str, folder: str, base: str, tokenizer) -> dict:
    """What answers depend on of a model: hashes of what lies in its folder, by name.

    Args:
        base: see adapter.find_base.
    """
    found = {}
    if base != folder:
        names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
        paths = [os.path.join(folder, name) for name in names]
        found = {f"{os.path.basename(p)} of --model_path": file_hash(p) for p in paths if os.path.isfile(p)}
    model = describe_base(mode, base)
    whose = "--model_path" if base == folder else "the base"
    found[f"weights of {whose}"] = model["fingerprint"]
    found[f"config.json of {whose}"] = model["config"]
    found[f"tokenizer of {whose}"] = tokenizer.fingerprint()
    for name in (MANIFEST, "generation_config.json"):  # the manifest has the hash of each byte of the weights
        path = os.path.join(base, name)
        found[f"{name} of {whose}"] = file_hash(path) if os.path.isfile(path) else None
    return found


# The file


def read_record(path: str) -> Made | None:
    """What made a file of answers; None if no record says so."""
    try:
        content = read_json(path + RECORD)
        if content["format"] != FORMAT or not isinstance(content["settings"], dict):
            return None
        return Made(content["settings"], int(content["rows"]), str(content["model"]))
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def read_rows_of(path: str) -> tuple[list[dict], int, bool]:
    """The rows of a file of answers up to the first line that is none, how many bytes they take, and whether that line
    is the file's last and was cut.

    Raises:
        OSError: it cannot be read.
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
    """A file of answers that grows as a run goes on. A context manager: it holds the file's lock.

    Args:
        path: made if it is not there, its folder too.
        rows: what is asked, in its order.
        made: what makes these answers.
        overwrite: remove answers that are there, and start anew.

    Raises:
        UserError: the file cannot be written; another process writes to it; it holds something else, or answers that
            something else made.
    """

    def __init__(self, path: str, rows: list[dict], made: Made, overwrite: bool):
        self.path, self.rows = path, rows
        self.file = _open_locked(path)
        with contextlib.ExitStack() as undo:
            undo.callback(self.file.close)
            self.done, self.size = self._take_over(made, overwrite)
            with write_errors(path + RECORD):
                os.ftruncate(self.file.fileno(), self.size)  # first: answers never stand beside the record of others
                text = json.dumps({"format": FORMAT, **made._asdict()}, ensure_ascii=False, indent=1)
                write_file(path + RECORD, text + "\n")
            undo.pop_all()

    def _take_over(self, made: Made, overwrite: bool) -> tuple[list[dict], int]:
        """The rows that are there already and count, and how many bytes they take."""
        path, record = self.path, read_record(self.path)
        done, size, only_cut = read_rows_of(path)
        if not os.path.getsize(path):
            return [], 0
        if not done and (record is None or not only_cut):
            raise UserError(f"--output_path {path} is no file of answers; name another one")
        if overwrite:
            return [], 0
        anew = "--overwrite removes them and starts anew; or name another --output_path"
        if record is None:
            raise UserError(
                f"{path} holds answers without {os.path.basename(path)}{RECORD}, so what made them is not known "
                f"(an older version?); {anew}"
            )
        if changed := compare(record.settings, made.settings):
            raise UserError(
                f"{path} holds {len(done)} answers of {record.model} that were made otherwise: {'; '.join(changed)}. "
                + anew
            )
        if not only_cut or len(done) > len(self.rows) or not all(map(_same_row, done, self.rows)):
            raise UserError(f"{path} does not hold the rows of --predict_path in their order; {anew}")
        return done, size

    def add(self, answers: list[tuple[str, bool]]) -> None:
        """Append the answers to the next rows, each with whether it ended by itself.

        Raises:
            FolderError: they cannot be written; those before are kept.
        """
        part = self.rows[len(self.done) : len(self.done) + len(answers)]
        more = [{**row, "prediction": text, "ended": ended} for row, (text, ended) in zip(part, answers, strict=True)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in more)
        rest = memoryview(text.encode(errors="backslashreplace"))  # half a surrogate pair: as JSON escapes it
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self.file.fileno(), rest) :]  # a disk that is nearly full takes a part of it
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), self.size)
            raise FolderError(
                f"cannot write {self.path}: {error.strerror}; it keeps {len(self.done)} of {len(self.rows)} answers, "
                "and the same command goes on from there"
            ) from error
        self.done += more
        self.size += size

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def _open_locked(path: str):
    """Open a file to append to, and keep other processes from doing so."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"--output_path {path} is no plain file; name another one")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the lock is held
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; --output_path names another place") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another predict.py is writing to {path}; wait for its end, or name another --output_path"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def _same_row(answered: dict, row: dict) -> bool:
    return all(answered.get(key) == row.get(key) for key in ("instruction", "input", "output"))


def compare(before: dict, now: dict) -> list[str]:
    """What differs between two settings, in words."""
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
