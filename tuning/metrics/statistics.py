"""Precision, recall and F1 from counts; bootstrap intervals of a mean."""

import numpy as np


def precision_recall_f1(correct: int, predicted: int, expected: int) -> tuple[float, float, float]:
    """From counts. With a denominator of 0 a score is 0, but all three are 1 if nothing was expected and predicted."""
    if not predicted and not expected:
        return 1.0, 1.0, 1.0
    precision = correct / predicted if predicted else 0.0
    recall = correct / expected if expected else 0.0
    f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
    return precision, recall, f1


def bootstrap(values: list[float], seed: int, resamples: int = 2000, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, 13.3): lower and upper end.

    For the difference between two models (paired bootstrap), pass the differences row by row.
    """
    rows = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    means = [rows[random.integers(len(rows), size=len(rows))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
