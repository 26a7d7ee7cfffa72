"""The documents of the project, for their tests: texts, code, commands."""

import functools
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {"README.md": "README_zh.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))
}
ALL = [*PAIRS, *PAIRS.values()]


@functools.cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    """The blocks of code in a language, without their own indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in blocks]


def without_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_fences(text))


def commands_only(block: str) -> str:
    return re.sub(r" *# .*$", "", block, flags=re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands in the bash blocks of a text, a line each, comments left out."""
    lines = commands_only("\n".join(fences(text, "bash"))).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]
