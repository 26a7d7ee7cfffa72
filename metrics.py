"""Scores of predictions against references."""

from collections.abc import Iterable


def triples(text: str) -> set[str]:
    """The triples of an extraction answer: its distinct non-empty lines, each subject_relation_object."""
    return {line.strip() for line in text.split("\n") if line.strip()}


def are_triples(outputs: Iterable[str]) -> bool:
    """Whether these answers are lists of triples: every line has three parts joined by "_"."""
    return all(line.count("_") >= 2 for output in outputs for line in triples(output))


def precision_recall_f1(correct: int, predicted: int, expected: int) -> tuple[float, float, float]:
    """From counts; what has nothing to divide by is 0, and a rightly empty prediction is perfect."""
    if not predicted and not expected:
        return 1.0, 1.0, 1.0
    precision = correct / predicted if predicted else 0.0
    recall = correct / expected if expected else 0.0
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return precision, recall, f1


def triple_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 of extracted triples.

    Args:
        predictions: one answer a row.
        references: the acceptable answers of each row; the one with the best F1 counts.

    Returns:
        precision, recall, f1: means over rows of each row's own scores (the original project's measure);
        micro_precision, micro_recall, micro_f1: from the counts of all rows together.
    """
    rows, counts = [], [0, 0, 0]
    for prediction, answers in zip(predictions, references, strict=True):
        found = triples(prediction)
        tries = [(len(found & wanted), len(found), len(wanted)) for wanted in map(triples, answers)]
        best = max(tries, key=lambda try_: precision_recall_f1(*try_)[2])
        rows.append(precision_recall_f1(*best))
        counts = [a + b for a, b in zip(counts, best, strict=True)]
    names = ("precision", "recall", "f1")
    scores = {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}
    return scores | {f"micro_{name}": value for name, value in zip(names, precision_recall_f1(*counts), strict=True)}
