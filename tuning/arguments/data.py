"""What the flags about data files have in common, in every script: their paths, the names of their columns."""

from dataclasses import dataclass
from typing import ClassVar

from tuning.arguments.parser import Group, Text
from tuning.samples.data_files import find_files


@dataclass(frozen=True)
class DataPath:
    """A data file or a folder with some, and with `weights` also PATH:WEIGHT; the value is the text itself."""

    weights: bool = False
    metavar: ClassVar[str] = "PATH"

    def __call__(self, text: str) -> str:
        find_files([text], self.weights)
        return text


def add_columns(group: Group, answers_needed: bool = True, **more) -> None:
    """Declare --prompt_column, --response_column and --history_column.

    Args:
        answers_needed: the file must have answers, so that its question and its answer are named together.
        more: of each flag, see Group.add_argument.
    """
    column = {"type": Text(), **more}
    group.add_argument(
        "--prompt_column", **column, **({"needs": "--response_column"} if answers_needed else {}),
        help="name of the key or column with the question",
    )  # fmt: skip
    group.add_argument(
        "--response_column", **column, needs="--prompt_column", help="name of the key or column with the answer"
    )
    group.add_argument(
        "--history_column", **column, default_text="history", needs="--prompt_column",
        help="name of the key or column with earlier turns, [[question, answer], ...]",
    )  # fmt: skip
