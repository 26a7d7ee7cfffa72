"""Scores of extraction: answers that are lists of subject_relation_object lines."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from tuning.metrics.statistics import precision_recall_f1


def triples(text: str) -> set[str]:
    """Triples of an answer: its distinct non-empty lines, each subject_relation_object."""
    return {line.strip() for line in text.split("\n") if line.strip()}


def are_triples(outputs: Iterable[str]) -> bool:
    """Whether every line of these answers has at least three parts joined by "_"."""
    return all(line.count("_") >= 2 for output in outputs for line in triples(output))


def counts(found: set[str], wanted: set[str]) -> tuple[int, int, int]:
    """How many triples are correct, predicted and expected."""
    return len(found & wanted), len(found), len(wanted)


def found_and_wanted(predictions: list[str], references: list[list[str]]) -> list[tuple[set[str], set[str]]]:
    """For each row: the predicted triples, and those of the reference that gives the best F1."""
    pairs = []
    for prediction, answers in zip(predictions, references, strict=True):
        found = triples(prediction)
        best = max(map(triples, answers), key=lambda wanted: precision_recall_f1(*counts(found, wanted))[2])
        pairs.append((found, best))
    return pairs


def triple_rows(predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """precision, recall, f1 and exact_match (same set of triples, in any order) of each row.

    The mean of f1 over rows is the score of the original project (ChatGLM-Finetuning).
    """
    pairs = found_and_wanted(predictions, references)
    rows = [precision_recall_f1(*counts(*pair)) for pair in pairs]
    scores = {name: [row[i] for row in rows] for i, name in enumerate(("precision", "recall", "f1"))}
    return scores | {"exact_match": [float(found == wanted) for found, wanted in pairs]}


def micro_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """micro_precision, micro_recall, micro_f1: from the summed counts of all rows (Manning et al. 2008, Introduction to
    Information Retrieval, 13.6)."""
    pairs = found_and_wanted(predictions, references)
    total = np.sum([counts(*pair) for pair in pairs], axis=0).tolist()
    return dict(zip(("micro_precision", "micro_recall", "micro_f1"), precision_recall_f1(*total), strict=True))


def relation_scores(predictions: list[str], references: list[list[str]]) -> dict[str, dict[str, float]]:
    """Scores by relation, the most frequent in the references first: micro precision, recall, f1, and their counts.

    The relation of a triple is its second part; lines that are not triples are counted under "" (evaluation of relation
    extraction by type, e.g. Zhang et al. 2017, TACRED).
    """

    def relation(triple):
        return triple.split("_")[1] if triple.count("_") >= 2 else ""

    correct, predicted, expected = Counter(), Counter(), Counter()
    for found, wanted in found_and_wanted(predictions, references):
        correct.update(map(relation, found & wanted))
        predicted.update(map(relation, found))
        expected.update(map(relation, wanted))
    table = {}
    for name in sorted(predicted | expected, key=lambda name: (-expected[name], name)):
        numbers = correct[name], predicted[name], expected[name]
        table[name] = dict(zip(("precision", "recall", "f1"), precision_recall_f1(*numbers), strict=True))
        table[name] |= dict(zip(("correct", "predicted", "expected"), numbers, strict=True))
    return table
