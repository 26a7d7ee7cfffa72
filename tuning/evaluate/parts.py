"""Answers of a run that has not come to its end. Rows end out of order and on several ranks, so each rank appends its
answers to a part of its own beside the answer file:

    predictions.jsonl.part-0      one line per answered row: row (counted from 0), prediction, ended

The next run joins all parts in that of rank 0, so it may have another number of ranks. When every row has an answer,
rank 0 writes them to the answer file in order and removes the parts.
"""

import contextlib
import glob
import json
import os
import socket

import torch

from tuning.errors import FolderError, UserError
from tuning.folders import write_file
from tuning.run.launch import is_shared
from tuning.run.nodes import several_nodes
from utils import once_per_node, print_rank_0

PART = ".part-"  # followed by the rank, and appended to the name of the answer file


def list_parts(path: str) -> list[str]:
    """The parts beside an answer file."""
    return sorted(glob.glob(glob.escape(path + PART) + "[0-9]*"))


def share_parts(path: str) -> bool:
    """Whether all nodes see the folder of an answer file, which is made on each. Says so if not. Called on every rank.

    Only rank 0's node then knows its answers in a run that continues.
    """
    folder = os.path.dirname(path) or "."
    try:
        once_per_node(lambda: os.makedirs(folder, exist_ok=True))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output_path") from None
    shared = not torch.distributed.is_initialized() or not several_nodes() or is_shared(folder)
    if not shared:
        print_rank_0(
            f"{path} is not on a shared disk: it is written on node {socket.gethostname()}; a run that is interrupted "
            "goes on from the answers of this node, and gives the rows of the others again"
        )
    return shared


def read_parts(path: str) -> dict[int, tuple[str, bool]]:
    """The answers in all parts beside an answer file: row -> text, and whether it ended by itself.

    Raises:
        UserError: a part cannot be read or holds something else; an incomplete last line is left out.
    """
    found = {}
    for part in list_parts(path):
        try:
            with open(part, "rb") as file:
                lines = file.read().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"cannot read {part}: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break  # the run was killed while it wrote
            if (answer := _read_line(line)) is None:
                raise UserError(f"{part}, line {number}: not an answer of predict.py; move the file away")
            found[answer[0]] = answer[1:]
    return found


def _read_line(line: bytes) -> tuple[int, str, bool] | None:
    try:
        content = json.loads(line)
        row, text, ended = content["row"], content["prediction"], content["ended"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    right = type(row) is int and row >= 0 and isinstance(text, str) and isinstance(ended, bool)
    return (row, text, ended) if right else None


def join_parts(path: str, answers: dict[int, tuple[str, bool]]) -> None:
    """Make one part of all, which holds these answers; without any, remove them.

    Raises:
        OSError: they cannot be written.
    """
    first, *others = [f"{path}{PART}0", *(part for part in list_parts(path) if part != f"{path}{PART}0")]
    if answers:
        write_file(first, b"".join(_line(row, *answer) for row, answer in answers.items()).decode())
    else:
        others.append(first)
    for part in others:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _line(row: int, text: str, ended: bool) -> bytes:
    return as_bytes({"row": row, "prediction": text, "ended": ended})


def as_bytes(row: dict) -> bytes:
    """A row as a line of JSON; unpaired surrogates are written as JSON escapes."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class Part:
    """The part of this rank: a context manager that appends to it.

    Args:
        temporary: whether it goes at the end of the block, since rank 0 does not see it.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str, rank: int, temporary: bool = False):
        self.temporary = temporary
        self.path = f"{path}{PART}{rank}"
        try:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
            if rank:  # the earlier answers are all in the part of rank 0
                self.file.truncate(0)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --output_path") from None

    def add(self, row: int, text: str, ended: bool) -> None:
        """Append an answer.

        Raises:
            FolderError: it cannot be written; earlier answers are kept.
        """
        append(self.file, _line(row, text, ended), "all answers so far are kept")

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.file.close()
        if self.temporary and kind is None:
            os.unlink(self.path)


def append(file, content: bytes, kept: str) -> None:
    """Append to a file that was opened without a buffer: all of the content, or nothing.

    Args:
        kept: what is not lost if this fails, for the message.

    Raises:
        FolderError: it cannot be written.
    """
    before, rest = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]  # a nearly full disk may accept only a part
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise FolderError(
            f"cannot write {file.name}: {error.strerror}; {kept}, and the same command continues from there"
        ) from error
