"""Reads a data file, JSON lines or one JSON array in strict JSON, into rows with their line numbers.

file_kinds.py recognises files of other kinds, formats.py checks the rows.
"""

import codecs
import json
import re
from collections.abc import Iterator

from tuning.errors import DataError
from tuning.samples import file_kinds
from tuning.samples.flaws import EACH, Flaw, has_half_pair
from tuning.samples.foreign import wrapper_flaw
from tuning.samples.formats import Columns, find_flaw

BLOCK = 1 << 20  # bytes read at once


class RowError(DataError):
    """One row that cannot be used."""

    def __init__(self, message: str, line: int = 0, flaw: Flaw | None = None):
        super().__init__(message)  # alone, so that it can be sent to other processes
        self.line, self.flaw = line, flaw


def read_rows(
    path: str, several_outputs: bool = False, empty_outputs: bool = False, missing_outputs: bool = False
) -> Iterator[tuple[int, dict]]:
    """`scan_rows` of a file that must not have a broken row.

    Raises:
        DataError: as `scan_rows`; or for the first broken row.
    """
    for line, row in scan_rows(path, several_outputs, empty_outputs, missing_outputs):
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
    """Read an instruction file to its end: JSON lines, or one JSON array of objects.

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
        DataError: the file cannot be read, is empty, or is not JSON.
    """
    if problem := file_kinds.path_problem(path):
        raise DataError(f"{path}: {problem}")
    empty = True
    try:
        with open(path, "rb", buffering=BLOCK) as file:
            head = file.read(file_kinds.HEAD)
            if problem := file_kinds.file_problem(head):
                raise DataError(f"{path} {problem}")
            start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            file.seek(start)
            first = next((line for line in file if line.strip()), b"").lstrip()[:1]
            file.seek(start)
            for line, row, flaw in _array_rows(file.read()) if first == b"[" else _line_rows(file):
                if flaw and empty and first == b"{" and (whole := _over_lines(head[start:])):
                    raise RowError(f"{path} line {line}: {whole.problem}", line, whole)
                empty = False
                flaw = flaw or find_flaw(row, several_outputs, empty_outputs, missing_outputs, columns, texts)
                yield line, RowError(f"{path} line {line}: {flaw.problem}", line, flaw) if flaw else row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if empty:
        raise DataError(f"{path} holds no rows")


def _object(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return row


def _no_constant(name):
    raise ValueError(f"{name} is no value of JSON")


# strict JSON: Python's default accepts duplicate keys and NaN
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
LENIENT = json.JSONDecoder(strict=False, parse_int=float)  # finds the end of a value that DECODER rejects
SPACE = re.compile(r"[ \t\n\r]*")


def _json_flaw(error: Exception, line: str = "", ends: bool = False) -> Flaw:
    """What is wrong with a value, with a hint if its line shows what was meant."""
    if isinstance(error, json.JSONDecodeError):
        where = f"column {error.colno}" if line else f"line {error.lineno} column {error.colno}"
        problem = f"{error.msg}, {where}{_hint(line, error) if line else ''}"
    else:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
    rest = "; the rest of the array cannot be read" if ends else ""
    return Flaw("json", f"not valid JSON: {problem}{rest}", ends)


def _hint(line: str, error: json.JSONDecodeError) -> str:
    """What a line that does not decode probably is; "" if that is unclear."""
    text = line.strip(" \t\r\n")
    if text.startswith("\ufeff"):
        return r" (a byte order mark inside the file, as cat leaves it; remove it: sed 's/^\xEF\xBB\xBF//' FILE > NEW)"
    if "\0" in text:
        return " (the line holds NUL bytes, as a file has them whose writing was cut off)"
    if text.startswith("{'"):
        return (
            " (Python's quotes; convert them: python -c 'import ast, json, sys; [print(json.dumps(ast.literal_eval("
            'line), ensure_ascii=False)) for line in open(sys.argv[1], encoding="utf-8") if line.strip()]\' FILE > NEW)'
        )
    if text.startswith(("#", "//", "/*")):
        return " (JSON has no comments; remove the line)"
    if error.msg.startswith("Invalid control character"):
        return " (a raw tab or the like in a string; it must be written as \\t)"
    if error.msg == "Extra data" and "\r" in text:
        return " (lines end in a carriage return alone; convert them: tr '\\r' '\\n' < FILE > NEW)"
    if error.msg == "Extra data":
        more = text[error.pos :].strip()
        return " (a comma after the row; JSON lines have none)" if more == "," else " (each line must be one row)"
    if not text.startswith("{"):
        return " (each line must be one row, an object in braces)"
    return ""


# {"version": 1, "data": [{, as far as the first row: plain values, then a list of objects
WRAPPER = re.compile(
    r'\{(?P<before>(?:\s*"[^"\\\n]*"\s*:\s*(?:"[^"\\\n]*"|[^\s"\[\]{},]+)\s*,)*)\s*"(?P<name>[^"\\\n]{1,50})"\s*:\s*\[\s*\{'
)


def _over_lines(head: bytes) -> Flaw | None:
    """A flaw if a file that is not an array begins with an object over several lines."""
    text = head.decode("utf-8", "replace").lstrip()
    try:
        row, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):  # one that is longer than the head, or none
        # from the start: a line that is broken may stand before whole rows which hold such a list
        wrapper = WRAPPER.match(text, 0, 4096)
        if not wrapper or "\n" not in wrapper[0]:
            return None
        before = re.findall(r'"([^"\\\n]*)"\s*:', wrapper["before"])
        return wrapper_flaw(dict.fromkeys(before, "") | {wrapper["name"]: [{"instruction": ""}]})
    if "\n" not in text[:end] or not isinstance(row, dict):
        return None
    problem = "an object over several lines: each line must be one row, or the file one array; jq -c . FILE > NEW"
    return wrapper_flaw(row) or Flaw("json", problem)


def _not_utf8(text: bytes, where: str = "") -> Flaw:
    encoding = file_kinds.likely_encoding(text)
    likely = f"; it looks like {encoding}, {file_kinds.iconv(encoding)}" if encoding else ""
    return Flaw("encoding", f"not UTF-8 text{where}{likely}")


def _line_rows(file):
    """Yield line number, row and flaw of each line. Only a line feed ends a line."""
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            decoded = text.decode("utf-8")
            yield line, DECODER.decode(decoded), None
        except UnicodeDecodeError as error:
            yield line, None, _not_utf8(text, f": {error.reason} at byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield line, None, _json_flaw(error, decoded)


def _array_rows(content: bytes):
    """As `_line_rows`, for one JSON array."""
    try:
        text, is_utf8 = content.decode("utf-8"), True
    except UnicodeDecodeError:
        text, is_utf8 = content.decode("utf-8", "surrogateescape"), False
    del content
    position = SPACE.match(text, text.index("[") + 1).end()
    line, counted = 1, 0  # line at `counted`
    more = text[position : position + 1] != "]"
    if not more:
        position = SPACE.match(text, position + 1).end()
    while more:
        line, counted = line + text.count("\n", counted, position), position
        row = flaw = None
        try:
            row, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            try:
                _, end = LENIENT.raw_decode(text, position)
                flaw = _json_flaw(error)
            except (ValueError, RecursionError) as error:
                # bytes of GB18030 and others can look like JSON syntax
                flaw = None if is_utf8 else _array_encoding(text)
                yield line, None, flaw or _json_flaw(error, ends=True)
                return
        if not is_utf8 and has_half_pair(text[position:end]):
            flaw = _not_utf8(text[position:end].encode("utf-8", "surrogateescape"))
        yield line, row, flaw
        position = SPACE.match(text, end).end()
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            line += text.count("\n", counted, position)
            problem = "expected a comma or ] after a row of the array; the rest of it cannot be read"
            yield line, None, Flaw("json", problem, ends=True)
            return
        more = mark == ","
        position = SPACE.match(text, position + 1).end()
    if position < len(text):
        line += text.count("\n", counted, position)
        yield line, None, Flaw("json", f"there is more after the end of the array{_after_array(text, position)}", True)


def _array_encoding(text: str) -> Flaw | None:
    """A flaw if the whole array is clearly in another encoding."""
    flaw = _not_utf8(text[: file_kinds.HEAD].encode("utf-8", "surrogateescape"))
    return flaw._replace(ends=True) if "looks like" in flaw.problem else None


def _after_array(text: str, position: int) -> str:
    if text.startswith("[", position):
        return f": arrays one after the other, as cat leaves them; join them: jq -c '{EACH}' FILE > NEW"
    return ": NUL bytes, as a file has them whose writing was cut off" if text[position:].strip("\0\n") == "" else ""
