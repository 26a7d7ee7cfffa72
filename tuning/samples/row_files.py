"""Reads a data file into rows with their line numbers: JSON lines, one JSON array, or a table; and files of tools.

decoding.py has its bytes, json_rows.py and tables.py its syntax; formats.py checks the rows.
"""

import json
from collections.abc import Iterator

from tuning.errors import DataError, UserError
from tuning.samples.decoding import TextFile, open_text
from tuning.samples.dialogue import Dialogue
from tuning.samples.flaws import Flaw
from tuning.samples.formats import Columns, read_row
from tuning.samples.json_rows import array_rows, line_rows, over_lines
from tuning.samples.tables import DELIMITERS, find_delimiter, table_rows, without_commands


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
    for line, row, _ in scan_dialogues(path, columns=columns, texts=texts, **how):
        yield line, row


def scan_dialogues(
    path: str, columns: Columns | None = None, **how
) -> Iterator[tuple[int, dict | RowError, Dialogue | None]]:
    """As `scan_rows`, with the normal form of each row behind it; None where the row cannot be used.

    Args:
        how: other arguments of `formats.read_row`.
    """
    empty = True
    with open_text(path) as text:
        rows, is_table = _parse(path, text, columns)
        is_object = text.head.lstrip().startswith(b"{")
        for line, row, flaw in rows:
            if flaw and empty and is_object and (whole := over_lines(text.head)):
                raise RowError(f"{path} line {line}: {whole.problem}", line, whole)
            empty = False
            found = flaw or read_row(row, columns=columns, **how)
            if isinstance(found, Dialogue):
                yield line, row, found
                continue
            flaw = without_commands(found) if is_table else found
            yield line, RowError(f"{path} line {line}: {flaw.problem}", line, flaw), None
    if empty:
        raise DataError(f"{path} holds no rows")


def _parse(path: str, text: TextFile, columns: Columns | None) -> tuple[Iterator[tuple], bool]:
    """Line, value and flaw of each row, and whether the file is a table."""
    if delimiter := find_delimiter(path, text.head, columns):
        return table_rows(path, text.file, text.encoding, delimiter, columns), True
    is_array = text.head.lstrip().startswith(b"[")
    return (array_rows if is_array else line_rows)(text.file, text.encoding), False


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
