"""Rows of JSON: lines, or one array, in strict JSON. Both are read piece by piece."""

import codecs
import io
import json
import re
from collections.abc import Iterator

from tuning.samples.decoding import BLOCK, LONGEST, likely_encoding
from tuning.samples.file_kinds import HEAD, iconv
from tuning.samples.flaws import EACH, Flaw, has_half_pair
from tuning.samples.foreign import wrapper_flaw
from tuning.samples.strict_json import DECODER

TOO_LONG = Flaw("json", f"a row of more than {LONGEST >> 20} MiB, behind which nothing is read", True)
LENIENT = json.JSONDecoder(strict=False, parse_int=float)  # finds the end of a value that DECODER rejects
SPACE = re.compile(r"[ \t\n\r]*")


def json_flaw(error: Exception, line: str = "", where: str = "", ends: bool = False) -> Flaw:
    """What is wrong with a value, with a hint if its line shows what was meant.

    Args:
        where: the place of the error; in a line it is its column.
    """
    if isinstance(error, json.JSONDecodeError):
        where = where or f"column {error.colno}"
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


def over_lines(head: bytes) -> Flaw | None:
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


def broken_text(text: bytes, encoding: str, where: str = "") -> Flaw:
    """What is wrong with bytes that are no text.

    Args:
        encoding: of the file; text is UTF-8 made of it.
        where: the place, if the file is UTF-8.
    """
    if encoding != "UTF-8":
        return Flaw("encoding", f"not {encoding} text, as the rest of the file")
    likely = likely_encoding(text)
    hint = f"; it looks like {likely}, {iconv(likely)}" if likely else ""
    return Flaw("encoding", f"not UTF-8 text{where}{hint}")


def raw_lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes, Flaw | None]]:
    """Yield line number, bytes and flaw of each line that is not blank. Only a line feed ends a line."""
    line = 0
    while text := file.readline(LONGEST):
        line += 1
        if len(text) == LONGEST and not text.endswith(b"\n"):
            yield line, b"", TOO_LONG
            return
        if not text.isspace():
            yield line, text, None


def read_line(text: bytes, encoding: str) -> tuple[object, Flaw | None]:
    """The value on a line, or its flaw.

    Args:
        encoding: of the file before it became UTF-8.
    """
    try:
        decoded = text.decode("utf-8")
        return DECODER.decode(decoded), None
    except UnicodeDecodeError as error:
        return None, broken_text(text, encoding, f": {error.reason} at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return None, json_flaw(error, decoded)


class _Window:
    """The part of an array that was read and is still needed. `more` reads on, `drop` lets go."""

    def __init__(self, file: io.BufferedReader):
        self.file, self.text, self.ended = file, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.line, self.column = 1, 0  # of the start of `text`: its line, characters before it in this line
        self.counted, self.found = 0, 0  # a position, line feeds before it
        self.is_broken = False  # any of it is no text

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        block = self.file.read(max(BLOCK, len(self.text)))  # twice as much: a long row is not begun too often
        self.ended = not block
        text = self.decoder.decode(block, self.ended)
        self.is_broken |= has_half_pair(text)
        self.text += text
        return True

    def line_at(self, position: int) -> int:
        """The line of a position, which is not before that of the last call."""
        self.found += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line + self.found

    def place(self, error: json.JSONDecodeError) -> str:
        """Where an error is, in the file."""
        column = error.colno + (self.column if error.lineno == 1 else 0)
        return f"line {self.line + error.lineno - 1} column {column}"

    def drop(self, position: int) -> int:
        """Let go of what is before a position, if that is worth it. Returns the position in the new text."""
        if position < BLOCK:
            return position
        start = self.text.rfind("\n", 0, position) + 1
        self.line, self.column = self.line_at(position), position - start + (0 if start else self.column)
        self.text, self.counted, self.found = self.text[position:], 0, 0
        return 0

    def skip_space(self, position: int) -> int:
        """The first position from here on that is not blank, or that of the end."""
        while (position := SPACE.match(self.text, position).end()) == len(self.text):
            position = self.drop(position)
            if not self.more():
                break
        return position

    def decode(self, decoder: json.JSONDecoder, position: int) -> tuple[object, int]:
        """The value at a position, and where it ends. Raises ValueError and RecursionError as the decoder does."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, position)
                if end < len(self.text) or not self.more():  # a number may go on
                    return value, end
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not near_end or len(self.text) - position > LONGEST or not self.more():
                    raise


def array_rows(file: io.BufferedReader, encoding: str) -> Iterator[tuple[int, object, Flaw | None]]:
    """Yield line number, value and flaw of each row of one JSON array.

    Args:
        encoding: of the file before it became UTF-8.
    """
    window = _Window(file)
    window.more()
    position = window.skip_space(window.skip_space(0) + 1)
    more = window.text[position : position + 1] != "]"
    if not more:
        position = window.skip_space(position + 1)
    while more:
        position = window.drop(position)
        line = window.line_at(position)
        row = flaw = None
        try:
            row, end = window.decode(DECODER, position)
        except (ValueError, RecursionError) as error:
            try:
                _, end = window.decode(LENIENT, position)
                flaw = json_flaw(error, where=_place(window, error))
            except (ValueError, RecursionError) as error:
                # bytes of Big5 and others can look like JSON syntax
                flaw = _array_encoding(window.text, encoding) if window.is_broken else None
                yield line, None, flaw or json_flaw(error, where=_place(window, error), ends=True)
                return
        if window.is_broken and has_half_pair(window.text[position:end]):
            flaw = broken_text(window.text[position:end].encode("utf-8", "surrogateescape"), encoding)
        yield line, row, flaw
        position = window.skip_space(end)
        mark = window.text[position : position + 1]
        if mark not in (",", "]"):
            problem = "expected a comma or ] after a row of the array; the rest of it cannot be read"
            yield window.line_at(position), None, Flaw("json", problem, ends=True)
            return
        more = mark == ","
        position = window.skip_space(position + 1)
    if position < len(window.text):
        problem = f"there is more after the end of the array{_after_array(window.text, position)}"
        yield window.line_at(position), None, Flaw("json", problem, True)


def _place(window: _Window, error: Exception) -> str:
    return window.place(error) if isinstance(error, json.JSONDecodeError) else ""


def _array_encoding(text: str, encoding: str) -> Flaw | None:
    """A flaw if the whole array is clearly in another encoding."""
    flaw = broken_text(text[:HEAD].encode("utf-8", "surrogateescape"), encoding)
    return flaw._replace(ends=True) if "looks like" in flaw.problem else None


def _after_array(text: str, position: int) -> str:
    if text.startswith("[", position):
        return f": arrays one after the other, as cat leaves them; join them: jq -c '{EACH}' FILE > NEW"
    return ": NUL bytes, as a file has them whose writing was cut off" if text[position:].strip("\0\n") == "" else ""
