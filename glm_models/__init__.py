"""The three ChatGLM families. `MODE` has one row per family; --mode of every script selects a row.

A family's code, and torch with it, is imported when its row is first read, so that scripts answer --help at once.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Family(NamedTuple):
    config: type
    tokenizer: type
    model: type


class Families(Mapping):
    """Name -> Family.

    Args:
        rows: name -> module, and the names of its config, tokenizer and model class.
    """

    def __init__(self, rows: dict[str, tuple[str, str, str, str]]):
        self._rows = rows

    def __getitem__(self, mode: str) -> Family:
        module, *names = self._rows[mode]
        module = importlib.import_module(f".{module}", __name__)
        return Family(*(getattr(module, name) for name in names))

    def __contains__(self, mode: object) -> bool:
        return mode in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


MODE = Families(
    {
        "glm": ("glm", "GLMConfig", "GLMTokenizer", "GLMForConditionalGeneration"),
        "glm2": ("glm2", "ChatGLM2Config", "ChatGLM2Tokenizer", "ChatGLM2ForConditionalGeneration"),
        "glm3": ("glm3", "ChatGLM3Config", "ChatGLM3Tokenizer", "ChatGLM3ForConditionalGeneration"),
    }
)

__all__ = ["MODE", "CheckpointError", "Families", "Family", "check_family"]


def __getattr__(name: str):
    """Import names from modules that need torch when they are first used."""
    home = {"CheckpointError": ".checkpoint", "check_family": ".identify"}
    if name in home:
        return getattr(importlib.import_module(home[name], __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
