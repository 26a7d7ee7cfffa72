"""Scores of classification: answers that are one label each."""

from collections import Counter

import numpy as np

from tuning.metrics.statistics import precision_recall_f1


def label_scores(predictions: list[str], references: list[list[str]]) -> dict[str, dict[str, float]]:
    """Scores by label, the most frequent in the references first: precision, recall, f1, and their counts.

    If a row accepts several labels, its true label is the predicted one if that is accepted, else the first. A
    prediction that is not a label of the references counts as wrong for its row and gets no entry of its own.
    """
    labels = [prediction.strip() for prediction in predictions]
    accepted = [[answer.strip() for answer in answers] for answers in references]
    true = [text if text in answers else answers[0] for text, answers in zip(labels, accepted, strict=True)]
    correct = Counter(text for text, label in zip(labels, true, strict=True) if text == label)
    predicted, expected = Counter(labels), Counter(true)
    table = {}
    for label in sorted(expected, key=lambda label: (-expected[label], label)):
        numbers = correct[label], predicted[label], expected[label]
        table[label] = dict(zip(("precision", "recall", "f1"), precision_recall_f1(*numbers), strict=True))
        table[label] |= dict(zip(("correct", "predicted", "expected"), numbers, strict=True))
    return table


def macro_f1(predictions: list[str], references: list[list[str]]) -> float:
    """Mean F1 over the labels of the references, rare and frequent ones weighted alike (Sebastiani 2002; equal to
    scikit-learn's f1_score with average="macro" and these labels). See `label_scores`.
    """
    return float(np.mean([row["f1"] for row in label_scores(predictions, references).values()]))
