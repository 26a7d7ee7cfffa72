"""Reads a data file into rows with their line numbers: JSON lines, one JSON array, or a table; and files of tools.

decoding.py has its bytes, json_rows.py and tables.py its syntax; formats.py checks the rows.
"""

import io
import json
from collections.abc import Iterator
from typing import NamedTuple

from tuning.errors import DataError, UserError
from tuning.samples.decoding import open_text
from tuning.samples.dialogue import Dialogue
from tuning.samples.flaws import Flaw
from tuning.samples.formats import Columns, read_row
from tuning.samples.json_rows import array_rows, over_lines, raw_lines, read_line
from tuning.samples.tables import DELIMITERS, find_delimiter, table_rows, without_commands

PIECE_ROWS, PIECE_BYTES = 500, 1 << 21  # maximum of a piece; its last row may go beyond


class RowError(DataError):
    """One row that cannot be used."""

    def __init__(self, message: str, line: int = 0, flaw: Flaw | None = None):
        super().__init__(message)  # alone, so that it can be sent to other processes
        self.line, self.flaw = line, flaw


def read_rows(
    path: str,
    several_outputs: bool = False,
    empty_outputs: bool = False,
    missing_outputs: bool = False,
    columns: Columns | None = None,
) -> Iterator[tuple[int, dict]]:
    """`scan_rows` of a file that must not have a broken row.

    Raises:
        DataError: as `scan_rows`; or for the first broken row.
    """
    for line, row in scan_rows(path, several_outputs, empty_outputs, missing_outputs, columns):
        if isinstance(row, RowError):
            raise row
        yield line, row


def scan_rows(
    path: str,
    several_outputs: bool = False,
    empty_outputs: bool = False,
    missing_outputs: bool = False,
    columns: Columns | None = None,
    texts: bool = False,
) -> Iterator[tuple[int, dict | RowError]]:
    """Read a data file to its end, of any kind that is read; memory is that of a few rows.

    Args:
        several_outputs: a row's output may also be a list of strings (references to compare a prediction with).
        empty_outputs: an output may be empty (nothing to extract).
        missing_outputs: a row may have no output, or null; then the yielded row has no output.
        columns: names of question, answer and history in this file.
        texts: a row may be plain text, see text.py; then the yielded row has the key text, and none of the three.

    Yields:
        Line number (of the row's start, from 1) and the row: a dict with strings under instruction, input and output,
        or a conversation with its last answer under output, and other keys unchanged; or a RowError instead of the row.

    Raises:
        DataError: the file cannot be read, is empty, or holds no rows.
    """
    how = {"several_outputs": several_outputs, "empty_outputs": empty_outputs, "missing_outputs": missing_outputs}
    for piece in cut_file(path, columns):
        for line, row, _ in read_piece(path, piece, columns=columns, texts=texts, **how):
            yield line, row


class Piece(NamedTuple):
    """Some rows of a file, as far as they are read by the one process that reads the file; see `read_piece`.

    rows: line number, value and flaw of each. Of JSON lines the value is the line itself, not blank.
    encoding: of JSON lines before they became UTF-8; None where the values are read.
    is_table: of what kind the file is.
    head: the first part of a file that begins with an object; None for others, and in later pieces.
    """

    rows: list[tuple[int, object, Flaw | None]]
    encoding: str | None
    is_table: bool
    head: bytes | None


def cut_file(path: str, columns: Columns | None = None) -> Iterator[Piece]:
    """The pieces of a data file, in order; memory is that of one.

    Raises:
        DataError: the file cannot be read, is empty, or holds no rows. The rows before the place that cannot be read
            come first, since one of them may have an error of its own.
    """
    empty = True
    with open_text(path) as text:
        file, encoding = text.file, None
        delimiter = find_delimiter(path, text.head, columns)
        head = text.head if text.head.lstrip().startswith(b"{") else None
        if delimiter:
            rows = table_rows(path, file, text.encoding, delimiter, columns)
        elif text.head.lstrip().startswith(b"["):
            rows = array_rows(file, text.encoding)
        else:
            rows, encoding = raw_lines(file), text.encoding
        for some in _gather(rows, file):
            yield Piece(some, encoding, bool(delimiter), head if empty else None)
            empty = False
    if empty:
        raise DataError(f"{path} holds no rows")


def _gather(rows: Iterator[tuple], file: io.BufferedReader) -> Iterator[list[tuple]]:
    """The rows that are read from a file, as many at a time as a piece has; an error comes after those before it."""
    some, start = [], 0
    try:
        for row in rows:
            some.append(row)
            if len(some) == PIECE_ROWS or file.tell() - start > PIECE_BYTES:
                yield some
                some, start = [], file.tell()
    except Exception:
        if some:
            yield some
        raise
    if some:
        yield some


def read_piece(
    path: str, piece: Piece, columns: Columns | None = None, **how
) -> Iterator[tuple[int, dict | RowError, Dialogue | None]]:
    """Line number and row of each row of a piece, as `scan_rows` has them, and the row's normal form.

    Args:
        how: other arguments of `formats.read_row`.

    Yields:
        Instead of a row that cannot be used a RowError, and None behind it.

    Raises:
        RowError: the whole file is of a kind that is not read, by its first row.
    """
    for number, (line, row, flaw) in enumerate(piece.rows):
        if piece.encoding and not flaw:
            row, flaw = read_line(row, piece.encoding)
        if flaw and not number and piece.head and (whole := over_lines(piece.head)):
            raise RowError(f"{path} line {line}: {whole.problem}", line, whole)
        found = flaw or read_row(row, columns=columns, **how)
        if isinstance(found, Dialogue):
            yield line, row, found
            continue
        flaw = without_commands(found) if piece.is_table else found
        yield line, RowError(f"{path} line {line}: {flaw.problem}", line, flaw), None


def describe_file(path: str, columns: Columns | None = None) -> list[str]:
    """A line on what a data file is, such as "rows.csv.gz: a CSV table, gzip, GB18030 text"; none for JSON in UTF-8.

    Raises:
        DataError: as `scan_rows`, as far as the start of the file shows it.
    """
    with open_text(path) as text:
        delimiter = find_delimiter(path, text.head, columns)
        table = [f"a {DELIMITERS[delimiter]} table"] if delimiter else []
        words = ", ".join(table + text.describe())
    return [f"{path}: {words}"] if words else []


def read_tools(path: str) -> list[dict]:
    """The tools that a file describes. Raises UserError if it is not a JSON list of objects."""
    try:
        with open(path, encoding="utf-8") as file:
            tools = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--tools {path}: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"--tools {path}: it must hold a list of objects, one a tool, as under `tools` in training")
    return tools
