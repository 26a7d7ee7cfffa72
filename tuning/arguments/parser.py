"""Command lines of all scripts: flags are declared with the flags they need, and all problems are reported at once.

    parser = Parser(__doc__, contradictions)
    group = parser.group("lora", needs="--train_type lora")
    group.add_argument("--lora_dim", type=Integer(1), default=8, help="rank of the update matrices")

No torch in here: `answer_early` answers --help and wrong flags before a script imports it, which takes seconds.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from tuning.arguments.other_names import LAUNCHER, OTHER_NAMES
from tuning.errors import UserError
from tuning.samples.file_kinds import path_problem

LARGEST = 2**31 - 1
MARK = "\0"  # no word of a command line can have it

# Types of values: each turns the text of a flag into its value, or raises a ValueError that says what is needed


def split_names(text: str) -> list[str]:
    """A comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class Integer:
    """An integer. `hint` is added to the error message."""

    least: int = 1
    most: int = LARGEST
    hint: str = ""
    metavar: ClassVar[str] = "N"

    def __call__(self, text: str) -> int:
        hint = f"; {self.hint}" if self.hint else ""
        if not re.fullmatch(r"[+-]?[0-9]+", text):
            raise ValueError(f"must be an integer{hint}")
        # int() refuses thousands of digits; such a number is out of range anyway
        number = int(text) if len(text) < 30 else math.inf * (-1 if text.startswith("-") else 1)
        if number < self.least:
            raise ValueError(f"must be at least {self.least}{hint}")
        if number > self.most:
            raise ValueError(f"must be at most {self.most}{hint}")
        return number


@dataclass(frozen=True)
class Number:
    """A finite number within the given bounds."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    metavar: ClassVar[str] = "X"

    def __call__(self, text: str) -> float:
        number = read_number(text)
        within = (self.least is None or number >= self.least) and (self.above is None or number > self.above)
        within = within and (self.most is None or number <= self.most) and (self.below is None or number < self.below)
        if not within:
            raise ValueError(f"must be {self.range()}")
        return number

    def range(self) -> str:
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def read_number(text: str) -> float:
    """A finite number in Python's notation.

    Raises:
        ValueError: the text is not one.
    """
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        raise ValueError("must be a number")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("is too large")
    return number


class GiB:
    """An amount of memory: a number of GiB, or a number with its unit. The value is in GiB."""

    metavar = "GiB"
    UNITS: ClassVar = {"": 2**30, "G": 2**30, "GIB": 2**30, "GB": 1e9, "M": 2**20, "MIB": 2**20, "MB": 1e6}

    def __call__(self, text: str) -> float:
        parts = re.fullmatch(r"(.*?)\s*([a-z]*)", text.strip(), re.IGNORECASE | re.DOTALL)
        if not parts or parts[2].upper() not in self.UNITS:
            raise ValueError("must be a number of GiB, such as 24, 24GiB or 24GB")
        amount = Number(above=0)(parts[1]) * self.UNITS[parts[2].upper()] / 2**30
        return Number(above=0, most=1e6)(f"{amount:.12g}")


class Text:
    """Any text that is not empty."""

    metavar = "TEXT"

    def __call__(self, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty")
        return text


class File:
    """An existing file."""

    metavar = "FILE"

    def __call__(self, text: str) -> str:
        if os.path.isfile(text):
            return text
        if os.path.isdir(text):
            raise ValueError("is a folder; a file is needed")
        if any(os.path.isfile(part.strip()) for part in text.split(",")):
            raise ValueError("one file is needed, not a list; join the files into one first")
        raise ValueError(path_problem(text))


class Folder:
    """An existing folder."""

    metavar = "FOLDER"

    def __call__(self, text: str) -> str:
        if os.path.isdir(text):
            return text
        if os.path.isfile(text):
            raise ValueError("is a file; a folder is needed")
        raise ValueError("no such folder")


class NewPath(Text):
    """A file or folder that the script writes."""

    metavar = "PATH"


class Names(Text):
    """Comma-separated names; the value is the text itself."""

    metavar = "NAMES"

    def __call__(self, text: str) -> str:
        if not split_names(text):
            raise ValueError("is empty")
        return text


class Boolean:
    """True or False."""

    metavar = "True|False"

    def __call__(self, text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be True or False")
        return text.lower() == "true"


# For flags that need no value: `--packing` means `--packing True`.
SWITCH = {"type": Boolean(), "nargs": "?", "const": True, "default": False}


# Flags


@dataclass(frozen=True)
class Flag:
    """The declaration of a flag, see Group.add_argument."""

    name: str
    read: Callable[[str], Any]
    default: Any
    default_text: str
    choices: tuple[str, ...]
    nargs: str | None
    const: Any
    required: bool
    needs: str
    may_change: bool | Callable[[argparse.Namespace], bool]

    def value(self, texts: list[str]) -> Any:
        """The value for these words of the command line.

        Raises:
            ValueError: they are not valid. The message is a complete line.
        """
        if not texts:
            if self.nargs == "?":
                return self.const
            raise ValueError(f"{self.name} needs a value")
        if self.nargs not in ("+", "repeat") and len(texts) > 1:
            hint = "join the files into one first" if isinstance(self.read, File) else "quote a value with spaces"
            raise ValueError(f"{self.name} takes one value, not {len(texts)} ({' '.join(texts)}); {hint}")
        values = [self._read(text) for text in texts]
        return values if self.nargs in ("+", "repeat") else values[0]

    def _read(self, text: str) -> Any:
        if self.choices and text not in self.choices:
            raise ValueError(f"{self.name} {text}: choose from {', '.join(self.choices)}{nearest(text, self.choices)}")
        try:
            return self.read(text)
        except ValueError as error:
            raise ValueError(f"{self.name} {text}: {error}") from None


class Group:
    """Flags that --help shows together, and that may all need the same other flag."""

    def __init__(self, parser: "Parser", shown: argparse._ArgumentGroup, needs: str):
        self.parser, self.shown, self.needs = parser, shown, needs

    def add_argument(
        self,
        name: str,
        *,
        help: str,
        type: Callable[[str], Any] = str,
        default: Any = None,
        default_text: str | None = None,
        choices: Iterable[str] = (),
        nargs: str | None = None,
        const: Any = None,
        required: bool = False,
        metavar: str | None = None,
        needs: str = "",
        may_change: bool | Callable[[argparse.Namespace], bool] = False,
    ) -> None:
        """Declare a flag.

        Args:
            type: see the types of values above.
            default_text: the default as --help shows it; None for the default itself.
            nargs: None for one value, "?" for one or none (then the value is `const`), "+" for a list, "repeat" for a
                list to which each use of the flag adds a value.
            needs: flags without which this one would do nothing, such as "--plan", "--eval_path or --eval_ratio" or
                "--train_type freeze". Without a value: any but the default. "": those of the group.
            may_change: whether the value may differ on resume, since it does not change results beyond rounding. A
                function decides from the flags of the run.
        """
        choices = tuple(choices)
        if default_text is None:
            default_text = "none" if default is None else str(default)
        flag = Flag(name, type, default, default_text, choices, nargs, const, required, needs or self.needs, may_change)
        note = "required" if required else f"default: {default_text}"
        if needs:
            note = f"with {needs}; {note}"
        action = self.shown.add_argument(
            name,
            action="extend" if nargs == "repeat" else "store",
            nargs="*",  # read by Flag, so that all problems are found
            default=argparse.SUPPRESS,
            help=f"{help} ({note})".replace("%", "%%"),
        )
        shown = metavar or "|".join(choices) or getattr(type, "metavar", "TEXT")
        action.metavar = {"?": f"[{shown}]", "+": f"{shown} ..."}.get(nargs, shown)
        self.parser.flags[action.dest] = flag


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the values of a flag as Group.add_argument formats them."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _format_args(self, action, default_metavar) -> str:
        return action.metavar


def _program() -> str | None:
    """The program as typed after `python`: a script, or -m and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (
        f"-m {spec.name.removesuffix('.__main__')}"
        if spec and spec.name.startswith(("tuning.", "glm_models."))
        else None
    )


class Parser(argparse.ArgumentParser):
    """Parses a command line and collects all problems.

    Args:
        description: head of --help.
        contradictions: gives a line for each problem of values that do not go together. Invalid flags have their
            defaults when it is called, and lines that name an invalid flag are left out.
        hints: flag of another program -> what to do here instead.
    """

    def __init__(
        self,
        description: str,
        contradictions: Callable[[argparse.Namespace], list[str]] = lambda args: [],
        hints: dict[str, str] | None = None,
    ):
        super().__init__(
            _program(), description=description, formatter_class=Help, allow_abbrev=False, exit_on_error=False
        )
        self.flags: dict[str, Flag] = {}
        self.contradictions, self.hints = contradictions, hints or {}

    def group(self, title: str, needs: str = "") -> Group:
        """A group of flags, all of which do nothing without `needs` (see Group.add_argument)."""
        shown = f"{title} (with {needs})" if needs else title
        return Group(self, self.add_argument_group(shown), needs)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The values of all flags.

        Raises:
            UserError: with a line for each problem.
        """
        words, unknown = self.parse_known_args(mark_negative_numbers(sys.argv[1:] if argv is None else argv))
        given = vars(words)
        problems, wrong = self._explain([word.removeprefix(MARK) for word in unknown]), set()
        args = argparse.Namespace(**{name: flag.default for name, flag in self.flags.items()})
        for name, flag in self.flags.items():
            try:
                if name in given:
                    setattr(args, name, flag.value([text.removeprefix(MARK) for text in given[name]]))
                elif flag.required:
                    raise ValueError(f"{flag.name} is missing; --help tells what it is")
            except ValueError as error:
                problems.append(str(error))
                wrong.add(name)
        problems += [line for name in given for line in self._unmet(self.flags[name], args, wrong)]
        named = re.compile("|".join(rf"--{name}\b" for name in wrong) or r"(?!)")
        problems += [line for line in self.contradictions(args) if not named.search(line)]
        if problems:
            raise UserError("\n       ".join(problems))
        return args

    def fixed(self, args: argparse.Namespace) -> dict[str, Any]:
        """Flags, with their values, that must not change when a run is resumed."""
        fixed = {}
        for name, flag in self.flags.items():
            may_change = flag.may_change(args) if callable(flag.may_change) else flag.may_change
            if not may_change:
                fixed[flag.name] = getattr(args, name)
        return fixed

    def unmet(self, name: str, args: argparse.Namespace) -> bool:
        """Whether a flag, named without its dashes, would do nothing with these arguments."""
        return bool(self._unmet(self.flags[name], args, set()))

    def _unmet(self, flag: Flag, args: argparse.Namespace, wrong: set[str]) -> list[str]:
        """A line if the flag lacks the flags it needs."""
        if not flag.needs:
            return []
        for need in flag.needs.split(" or "):
            name, *values = need.removeprefix("--").split(" ")
            value = getattr(args, name)
            if name in wrong or (str(value) in values if values else value != self.flags[name].default):
                return []
        here = f", and --{name} is {value} here" if values else ""
        return [f"{flag.name} does nothing without {flag.needs}{here}"]

    def _explain(self, unknown: list[str]) -> list[str]:
        """A line for each unknown flag, and for words before the first flag."""
        lines = []
        for word in unknown:
            if not word.startswith("-"):
                if not lines:  # otherwise it is the value of an unknown flag
                    lines.append(f"{word}: which flag is this of?")
                continue
            name = word.partition("=")[0]
            lines.append(f"{name} is not known{self._instead(name.lstrip('-').lower().replace('-', '_'))}")
        return lines

    def _instead(self, name: str) -> str:
        for ours in (name, *OTHER_NAMES.get(name, ())):
            if ours in self.flags:
                return f"; did you mean --{ours}?"
        if name in self.hints:
            return f": {self.hints[name]}"
        if name in LAUNCHER:
            return f": it is the launcher's and goes before the script, as deepspeed --{name} ... {self.prog}"
        if name == "local_rank":
            return f": this script is started with python {self.prog}, not with a launcher"
        return nearest(name, self.flags, "--") or "; --help lists all flags"

    def format_usage(self) -> str:
        # the required flags; all of them would fill the screen
        required = [
            action for action in self._actions if action.dest in self.flags and self.flags[action.dest].required
        ]
        flags = " ".join(f"{action.option_strings[0]} {action.metavar}" for action in required)
        return f"usage: python {self.prog} {flags} [more flags]\n"

    def format_help(self) -> str:
        self.usage = self.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%")
        return super().format_help()

    def print_help(self, file=None) -> None:
        if is_rank_0():
            super().print_help(file)

    def error(self, message: str):
        raise UserError(message)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A suggestion of the most similar known name; "" if there is none."""
    found = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def mark_negative_numbers(argv: list[str]) -> list[str]:
    """Put MARK before negative numbers: argparse mistakes some, such as -1e-4, for flags."""
    negative = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
    return [MARK + word if negative.match(word) else word for word in argv]


def is_rank_0() -> bool:
    """Whether this process prints for all: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def answer_early(parse_args: Callable[[], argparse.Namespace]) -> None:
    """End the script here on --help and on wrong flags. Called before torch is imported, which takes seconds.

    Ranks other than 0 go on: `main` parses again, where rank 0 prints for all.
    """
    try:
        parse_args()
    except UserError as error:
        if is_rank_0():
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
