"""Text on a terminal: control characters made visible, output that nobody reads any more."""

import contextlib
import os
import re
import sys

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """Control characters and halves of characters as escapes, which no terminal obeys; line breaks and tabs stay."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def drop_output() -> None:
    """Send what is printed nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
