"""Rows of a table: CSV or TSV with a header, as Python's csv module reads them. A cell is a string, with line breaks if
it is quoted; messages, tools and a history are JSON inside a cell.
"""

import csv
import io
import os
import re
from collections.abc import Iterator

from tuning.errors import DataError
from tuning.samples.conversations import LISTS
from tuning.samples.data_files import PACKED
from tuning.samples.decoding import LONGEST
from tuning.samples.flaws import SHOWN_CHARACTERS, Flaw, shown_key
from tuning.samples.foreign import FLAT, KEYS, OPTIONAL
from tuning.samples.formats import Columns
from tuning.samples.json_rows import TOO_LONG, broken_text, json_flaw
from tuning.samples.strict_json import DECODER
from tuning.samples.text import KEY

DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV"}
ALONE = {KEY, *LISTS}  # columns of which one is enough
# names of columns that data usually has: those that are read, and those that say that a line is a header
NAMES = KEYS | OPTIONAL | ALONE | {name for pair in FLAT for name in pair}
NAMES |= {"question", "answer", "label", "completion", "target", "source", "context", "chosen", "rejected"}
JSON_CELLS = {"history", "tools", "functions", *LISTS}
MAY_BE_EMPTY = {"input", *OPTIONAL, *JSON_CELLS}
ENDINGS = (".csv", ".tsv")
JSON_ENDINGS = (".json", ".jsonl")
SHOWN_NAMES = 8  # of a header


def plain_ending(path: str) -> str:
    """The ending of a file's name without that of a packed file, in lower case, such as .csv."""
    name = path.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return os.path.splitext(name)[1]


def find_delimiter(path: str, head: bytes, columns: Columns | None) -> str | None:
    """What separates the cells of a table; None if the file is none.

    Args:
        head: the first part of the text.

    Raises:
        DataError: the file is a table by its name, and its first line is no header.
    """
    line = re.split(r"[\r\n]", head.decode("utf-8", "replace").lstrip("\r\n"), maxsplit=1)[0]
    if line.lstrip().startswith(("{", "[")):
        return None
    best, most = None, (0, 0)
    for delimiter in DELIMITERS:
        names = _split(line, delimiter)
        known = {name.strip().casefold() for name in names} & NAMES | {*names} & {*(columns or ())}
        alone = known & ALONE and plain_ending(path) not in JSON_ENDINGS  # there it may be a string on the first line
        if known and (len(names) > 1 or alone or columns or plain_ending(path) in ENDINGS):
            best, most = max((best, most), (delimiter, (len(known), len(names))), key=lambda one: one[1])
    if best is None and plain_ending(path) in ENDINGS:
        names = max((_split(line, delimiter) for delimiter in DELIMITERS), key=len)
        raise DataError(
            f"{path} line 1: a table needs a header with names of columns, such as instruction, input and output; here "
            f"are {_shown(names)}. Write one above, or name the columns: --prompt_column and --response_column"
        )
    return best


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _shown(names: list[str]) -> str:
    """Names of columns for a message."""
    return ", ".join(map(shown_key, names[:SHOWN_NAMES])) + ", ..." * (len(names) > SHOWN_NAMES)


class _Lines:
    """The lines of a file for csv, with what is wrong with those since the last `begin`.

    flaw: a line is no text.
    quotes: how many there are.
    """

    def __init__(self, file: io.BufferedReader, encoding: str):
        self.file, self.encoding = file, encoding
        self.begin()

    def begin(self) -> None:
        self.flaw: Flaw | None = None
        self.quotes = 0

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST)
        if not line:
            raise StopIteration
        self.quotes += line.count(b'"')
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", "replace")
            self.flaw = self.flaw or broken_text(line, self.encoding, f": {error.reason} at byte {error.start + 1}")
        if len(line) == LONGEST and not line.endswith(b"\n"):
            self.flaw = TOO_LONG
        if b"\0" in line:
            self.flaw = self.flaw or Flaw("table", "NUL bytes, as a file has them whose writing was cut off")
        return text


def table_rows(
    path: str, file: io.BufferedReader, encoding: str, delimiter: str, columns: Columns | None
) -> Iterator[tuple[int, dict | None, Flaw | None]]:
    """Yield the number of its first line, and the row or a flaw, of each row below the header.

    An empty cell is as no such column where a value may be missing.

    Args:
        encoding: of the file before it became UTF-8.

    Raises:
        DataError: something is wrong with the header.
    """
    lines = _Lines(file, encoding)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _read_header(path, reader, lines)
    as_json = [name for name in header if name in JSON_CELLS or (columns and name == columns.history)]
    optional = [name for name in header if name in MAY_BE_EMPTY or name in as_json]
    while True:
        line = reader.line_num + 1
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            flaw = lines.flaw or _syntax_flaw(error, lines)
            yield line, None, flaw
            if flaw.ends:
                return
            continue
        if len(cells) <= 1 and not any(map(str.strip, cells)) and not lines.flaw:
            continue
        if lines.flaw:
            yield line, None, lines.flaw
            if lines.flaw.ends:
                return
        elif len(cells) != len(header):
            yield line, None, _count_flaw(cells, header, delimiter)
        else:
            row = dict(zip(header, cells, strict=True))
            for name in optional:
                if not row[name].strip():
                    del row[name]
            yield line, row, _read_json(row, as_json)


def _read_header(path: str, reader, lines: _Lines) -> list[str]:
    """The names of the columns."""
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: the header: {_syntax_flaw(error, lines).problem}") from None
    problem = lines.flaw.problem if lines.flaw else ""
    if twice := [name for name in header if header.count(name) > 1 and name.strip()]:
        problem = f"two columns have the name {shown_key(twice[0])}; rename one"
    elif nameless := [number for number, name in enumerate(header, 1) if not name.strip()]:
        problem = f"column {nameless[0]} has no name; write one (pandas leaves its index so: index=False)"
    if problem:
        raise DataError(f"{path} line {reader.line_num}: the header: {problem}")
    return header


def _syntax_flaw(error: csv.Error, lines: _Lines) -> Flaw:
    """What csv does not read. Where a row ends is known only if its lines close the quotes that they open."""
    text, ends = str(error), lines.quotes % 2 == 1
    if "field limit" in text or "field larger" in text:
        problem, ends = f"a cell of more than {csv.field_size_limit()} characters; is a quote not closed?", True
    elif "unexpected end" in text:
        problem = "a quote that is not closed"
    elif "new-line" in text:
        problem, ends = "a carriage return alone ends a line; convert them: tr '\\r' '\\n' < FILE > NEW", True
    else:
        problem = 'text after the quote that ends a cell; a quote inside a quoted cell is written twice: ""'
    return Flaw("table", problem + "; the rest of the table cannot be read" * ends, ends)


def _count_flaw(cells: list[str], header: list[str], delimiter: str) -> Flaw:
    """The row has more or fewer cells than the table has columns."""
    shown = "tab" if delimiter == "\t" else delimiter
    why = f"; a cell with a {shown} or a line break in it must be quoted"
    count = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
    return Flaw("table", f"{count}, and {len(header)} columns in the header{why}")


def _read_json(row: dict, names: list[str]) -> Flaw | None:
    """Put the values of the JSON in some cells in their place."""
    for name in names:
        if name in row:
            try:
                row[name] = DECODER.decode(row[name])
            except (ValueError, RecursionError) as error:
                flaw, begins = json_flaw(error), row[name][:SHOWN_CHARACTERS]
                what = f"the cell {shown_key(name)} must hold JSON, and begins {begins!r}"
                return flaw._replace(problem=f"{what}: {flaw.problem}")
    return None


def without_commands(flaw: Flaw) -> Flaw:
    """A flaw of a row in words for a table: the commands of the messages are for JSON."""
    before, command, _ = flaw.problem.partition("jq -c ")
    if not command:
        return flaw
    end = max(before.rfind("; "), before.rfind(". "))
    hint = "name the columns by --prompt_column and --response_column, or rename or remove them"
    return flaw._replace(problem=f"{before[:end]}; in a table {hint}")
