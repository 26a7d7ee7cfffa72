"""What is wrong with a row: the type `Flaw`, and how keys and values are shown in its message."""

import json
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

EACH = "(arrays[], objects)"  # jq: each row, of JSON lines or of an array
NESTING = (dict, list)  # (a tuple: `dict | list` would be made anew each time)
SHOWN_CHARACTERS = 24  # of a key in a message


class Flaw(NamedTuple):
    """Why a row cannot be used."""

    kind: str  # one of findings.BROKEN
    problem: str
    ends: bool = False  # the rest of the file cannot be read


HALF_PAIR = Flaw("json", "a text has an unpaired surrogate, which is not valid Unicode")


class BadRow(ValueError):
    """A row that cannot be read. flaw: why."""

    def __init__(self, kind: str, problem: str):
        super().__init__(problem)
        self.flaw = Flaw(kind, problem)


def has_half_pair(text: str) -> bool:
    """Whether a text has an unpaired surrogate, which is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def kind_of_value(value) -> str:
    """The type of a JSON value for a message, as "a list"."""
    return {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )


def as_string(value) -> str:
    """How to make an output a string that is not one."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "; training takes one answer: join several parts into one string, with \\n between them"
    if isinstance(value, int | float):
        return f'; write it in quotes: "{value}"' if not isinstance(value, bool) else "; write it as text"
    return ""


def plain_name(key: str) -> str:
    """A key without the differences between spellings: case, blanks, - and _."""
    return unicodedata.normalize("NFKC", key).casefold().translate({ord(c): None for c in "_- \t\ufeff"})


def shown_key(key: str) -> str:
    """A key for a message: shortened, and without control characters for the terminal."""
    return repr(key if len(key) <= SHOWN_CHARACTERS else key[:SHOWN_CHARACTERS] + "...")


def jq_name(key: str) -> str:
    """A key for a command, without characters special to a terminal or a shell; KEY for a very long one."""
    if len(key) > SHOWN_CHARACTERS**2:
        return '"KEY"'
    return json.dumps(key, ensure_ascii=not key.isprintable()).replace("'", "\\u0027").replace("\x7f", "\\u007f")


def leaves(value) -> Iterator:
    """All values in a value that are no object or list."""
    waiting = [value]  # not recursive: values may be nested as deep as the interpreter's stack
    while waiting:
        value = waiting.pop()
        if isinstance(value, NESTING):
            waiting += value.values() if isinstance(value, dict) else value
        else:
            yield value


def holds_text(value) -> bool:
    """Whether any text in a value is not blank."""
    return any(isinstance(one, str) and one.strip() for one in leaves(value))


def says_something(value, neutral: tuple = ()) -> bool:
    """Whether a value means anything: it is not empty, and not one of the neutral values."""
    if not isinstance(value, NESTING):  # asked many times a row
        return bool(value.strip()) if isinstance(value, str) else value is not None and value not in neutral
    return any(says_something(one, neutral) for one in leaves(value))
