"""Scores of predictions against references: extraction, question generation, classification, tool calls, free text.

`score` is the main function: lists in, names and numbers out. `row_scores` returns the value of each row, for
`bootstrap` and for comparing two models row by row. One module per kind of answers: triples, questions, classes,
tool_calls, text; outputs (loops, lengths) and statistics (F1, bootstrap) serve all of them.

In all functions, predictions has one answer per row, and references the accepted answers of each row (one or several);
the best-matching one counts. Shares and F1 are between 0 and 1. Scores that are usually published out of 100 (ROUGE,
BLEU, the points for questions) are between 0 and 100.
"""

import numpy as np

from glm_models.tools import find_call
from tuning.metrics.classes import label_scores, macro_f1
from tuning.metrics.outputs import describe_outputs, output_statistics, repeats
from tuning.metrics.questions import question_rows
from tuning.metrics.statistics import bootstrap
from tuning.metrics.text import PACKAGES, distinct, exact_match, missing, rouge_bleu
from tuning.metrics.tool_calls import are_calls, tool_rows
from tuning.metrics.triples import are_triples, micro_scores, relation_scores, triple_rows

__all__ = [
    "ADDED",
    "AS_WRITTEN",
    "FROM_LOSS",
    "HEADLINE",
    "PACKAGES",
    "bootstrap",
    "describe",
    "describe_outputs",
    "kind_of",
]
__all__ += ["label_scores", "missing", "references_of", "relation_scores", "repeats", "row_scores", "score"]
__all__ += ["with_answer", "with_references"]

# kind of answers -> score to select a model by, a mean over rows (rouge_l needs packages, see `missing`)
HEADLINE = {"triples": "f1", "questions": "question_points", "classes": "accuracy", "tool_calls": "tool_call_right"}
HEADLINE |= {"text": "rouge_l"}
FROM_LOSS = ("loss", "perplexity")  # validation scores that need no generation
ADDED = frozenset({"prediction", "ended", "tool_call"})  # keys of an answered row, see with_answer
AS_WRITTEN = "output_as_written"  # key of an answered row, see with_references


def kind_of(references: list[list[str]]) -> str:
    """Guess the kind of answers (a key of HEADLINE) from the form of the references.

    tool_calls: at least one in ten is a call; triples: every line has at least two "_"; questions: nine in ten end in
    a question mark; classes: one short line each, and each distinct label is used at least three times on average;
    text: everything else.
    """
    texts = [text.strip() for answers in references for text in answers if text.strip()]
    if not texts:
        return "text"
    if are_calls(texts):
        return "tool_calls"
    if are_triples(texts):
        return "triples"
    if sum(text.endswith(("？", "?")) for text in texts) >= 0.9 * len(texts):
        return "questions"
    if all(len(text) <= 20 and "\n" not in text for text in texts) and 3 * len(set(texts)) <= len(texts):
        return "classes"
    return "text"


def score(
    kind: str, predictions: list[str], references: list[list[str]], ended: list[bool] | None = None
) -> dict[str, float]:
    """All scores for one kind of answers.

    Args:
        kind: a key of HEADLINE; `kind_of(references)` guesses it.
        ended: whether each prediction ended by itself, if known.

    Returns:
        The means of `row_scores`, the scores of all rows together (micro_*, macro_f1, distinct_*), and
        `output_statistics`. ROUGE and BLEU are left out if their packages are missing (`missing` names them).

    Raises:
        ValueError: no rows, or lists of different lengths.
    """
    scores = {name: float(np.mean(values)) for name, values in row_scores(kind, predictions, references).items()}
    if kind == "triples":
        scores |= micro_scores(predictions, references)
    elif kind == "classes":
        scores["macro_f1"] = macro_f1(predictions, references)
    elif kind in ("questions", "text"):
        scores |= {f"distinct_{n}": distinct(predictions, n) for n in (1, 2)}
    return scores | output_statistics(predictions, references, ended)


def row_scores(kind: str, predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """The values of each row, for the scores that are means over rows. Raises ValueError like `score`."""
    if kind not in HEADLINE:
        raise ValueError(f"kind {kind} is none of {', '.join(HEADLINE)}")
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} rows of references: there must be at least one, "
            "equally many, and no row without a reference"
        )
    if kind == "triples":
        return triple_rows(predictions, references)
    exact = [float(exact_match(*row)) for row in zip(predictions, references, strict=True)]
    if kind == "classes":
        return {"accuracy": exact}
    if kind == "tool_calls":
        return tool_rows(predictions, references) | {"exact_match": exact}
    if kind == "questions":
        return question_rows(predictions, references) | {"exact_match": exact}
    rows = {"exact_match": exact}
    if not missing(kind):
        each = [rouge_bleu(*row) for row in zip(predictions, references, strict=True)]
        rows = {name: [row[name] for row in each] for name in each[0]} | rows
    return rows


def describe(kind: str, scores: dict[str, float]) -> list[str]:
    """The scores returned by `score` as lines of text."""
    lines = {
        "triples": [
            "triples, mean over rows: precision {precision:.4f} recall {recall:.4f} F1 {f1:.4f}",
            "triples, micro:          precision {micro_precision:.4f} recall {micro_recall:.4f} F1 {micro_f1:.4f}",
        ],
        "questions": [
            "questions: {question_points:.2f} of 100 points (accuracy {accuracy_points:.2f} of 50, "
            "diversity {diversity_points:.2f} of 50), distinct-1 {distinct_1:.4f} distinct-2 {distinct_2:.4f}",
        ],
        "classes": ["classes: accuracy {accuracy:.4f} macro-F1 {macro_f1:.4f}"],
        "tool_calls": [
            "tool_calls: right {tool_call_right:.4f} (name {tool_name:.4f}, parameters {tool_parameters:.4f}); "
            "a call where there should be one {tool_call:.4f}; exact match {exact_match:.4f}"
        ],
        "text": ["text: exact match {exact_match:.4f} distinct-1 {distinct_1:.4f} distinct-2 {distinct_2:.4f}"],
    }[kind]
    if "bleu_4" in scores:
        lines.insert(0, "text: ROUGE-1 {rouge_1:.4f} ROUGE-2 {rouge_2:.4f} ROUGE-L {rouge_l:.4f} BLEU-4 {bleu_4:.4f}")
    stops = "outputs: {ended:.1%} end by themselves, " if "ended" in scores else "outputs: "
    stops += "{repeating:.1%} repeat to the end, {empty:.1%} are wrongly empty; "
    stops += "{mean_length:.1f} characters on average, references {reference_length:.1f}"
    return [line.format(**scores) for line in [*lines, stops]]


def references_of(row: dict) -> list[str]:
    """Accepted answers of a row: AS_WRITTEN (as the model can write them) if present, else `output`."""
    output = row[AS_WRITTEN] if AS_WRITTEN in row else row["output"]
    return output if isinstance(output, list) else [output]


def with_answer(row: dict, text: str, ended: bool) -> dict:
    """The row with its own keys, its answer as `prediction`, and the call that the answer is, if it is one.

    Args:
        ended: whether the answer ended by itself.
    """
    row = {key: value for key, value in row.items() if key not in ADDED} | {"prediction": text, "ended": ended}
    call = find_call(text)
    return row if call is None else row | {"tool_call": call._asdict()}


def with_references(row: dict, tokenizer) -> dict:
    """The row, with AS_WRITTEN added if the tokenizer changes the text of its references.

    A tokenizer may normalise text (ChatGLM-6B's turns ， into ,), so that the model can never write the reference as it
    is. Answers are then compared with the normalised reference. Tokenizers that keep all text (ChatGLM2-6B,
    ChatGLM3-6B) change nothing, and ， instead of , is an error there. (Normalising inside the scores would also
    accept other differences, such as ² for 2.)

    Args:
        tokenizer: the model's; its method `as_written` is used.
    """
    row = {key: value for key, value in row.items() if key != AS_WRITTEN}
    answers = references_of(row)
    written = tokenizer.as_written(answers)
    return row if written == answers else row | {AS_WRITTEN: written}
