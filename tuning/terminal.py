"""Text on a terminal: control characters made visible, and output turned off when nobody reads it."""

import contextlib
import os
import re
import sys

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """Escape control characters and unpaired surrogates, so that no terminal acts on them; newlines and tabs stay."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def print_error(line: str) -> None:
    """Print a line to stderr in one write: ranks often share a log, and must not cut each other's lines."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


def drop_output() -> None:
    """Discard everything that is printed from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
