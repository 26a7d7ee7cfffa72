"""The flags that name the columns of a data file, of every script that has them."""

from tuning.arguments.parser import Group, Text


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
