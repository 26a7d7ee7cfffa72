"""Scores of tool calls: is it a call, is the tool right, are the parameters right.

An answer is a text as `glm_models.tools.answer_text` makes it (the tool's name, a line break, the block with the call;
or a plain answer), or a `ToolCall`.
"""

from collections.abc import Sequence
from typing import Any

from glm_models.tools import ToolCall, ToolCallError, find_call, read_answer

Answer = str | ToolCall
NAMES = ("tool_call", "tool_name", "tool_parameters", "tool_call_right")
LEAST = 0.1  # share of references that are calls, from which answers are scored as calls


def are_calls(texts: Sequence[str]) -> bool:
    """Whether enough of these answers are tool calls to score all as such; conversations have plain answers too."""
    return sum(find_call(text) is not None for text in texts) >= LEAST * len(texts)


def tool_scores(predictions: Sequence[Answer], references: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """The means over rows of `tool_rows`, 0 to 1.

    Raises:
        ValueError: there are no rows, or not as many references as predictions.
    """
    rows = tool_rows(predictions, references)
    if not predictions:
        raise ValueError("there are no predictions to score")
    return {name: sum(values) / len(values) for name, values in rows.items()}


def tool_rows(predictions: Sequence[Answer], references: Sequence[Sequence[Answer]]) -> dict[str, list[float]]:
    """Each row's scores, 1.0 or 0.0, by the names of NAMES.

    tool_call: the prediction is a call that can be read where the reference is one, and none where the reference is a
    plain answer; tool_name, tool_parameters: the tool's name, its parameters as JSON values (`same_json`);
    tool_call_right: both. Where the reference is a plain answer, all four say that nothing was called: what the answer
    says is for other metrics. A call that cannot be read counts as a call of nothing: wrong everywhere, unless the
    reference is the same text.

    Raises:
        ValueError: not as many references as predictions, or a row without a reference.
    """
    rows: dict[str, list[float]] = {name: [] for name in NAMES}
    for prediction, answers in zip(predictions, references, strict=True):
        if isinstance(answers, (str, ToolCall)) or not answers:
            raise ValueError("the references of a row are a list of at least one acceptable answer")
        # the best one: most things right, the whole call before all
        best = max((_score(prediction, answer) for answer in answers), key=lambda scores: (scores[-1], sum(scores)))
        for name, value in zip(NAMES, best, strict=True):
            rows[name].append(float(value))
    return rows


def _score(prediction: Answer, reference: Answer) -> tuple[bool, bool, bool, bool]:
    """In the order of NAMES."""
    try:
        wanted = reference if isinstance(reference, ToolCall) else read_answer(reference)
        found = prediction if isinstance(prediction, ToolCall) else read_answer(prediction)
    except ToolCallError:
        return (prediction == reference,) * 4
    if found is None or wanted is None:
        return (found is None and wanted is None,) * 4
    name, parameters = found.name == wanted.name, same_json(found.parameters, wanted.parameters)
    return True, name, parameters, name and parameters


def same_json(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same: 1 equals 1.0 but not true, the order of keys does not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    numbers = (int, float)
    if isinstance(a, numbers) and isinstance(b, numbers):  # bool is an int in Python
        return isinstance(a, bool) == isinstance(b, bool) and a == b
    return type(a) is type(b) and a == b
