"""Scores of outputs as such, whatever they answer: endings, loops, empty answers, lengths."""

import numpy as np


def output_statistics(
    predictions: list[str], references: list[list[str]], ended: list[bool] | None = None
) -> dict[str, float]:
    """Shares of rows with typical generation failures, and mean lengths.

    ended: the model produced a stop token before the length limit (only if known). repeating: see `repeats`. empty: no
    text although every reference has some. mean_length, reference_length: characters; the references of a row are
    averaged.
    """
    scores = {} if ended is None else {"ended": float(np.mean(ended))}
    empty = [
        not text.strip() and all(answer.strip() for answer in answers)
        for text, answers in zip(predictions, references, strict=True)
    ]
    return scores | {
        "repeating": float(np.mean([repeats(text) for text in predictions])),
        "empty": float(np.mean(empty)),
        "mean_length": float(np.mean([len(text) for text in predictions])),
        "reference_length": float(np.mean([np.mean([len(answer) for answer in answers]) for answers in references])),
    }


def describe_outputs(predictions: list[str], ended: list[bool]) -> str:
    """A sentence with those of `output_statistics` that need no references."""
    count = len(predictions)
    looping, empty = sum(map(repeats, predictions)) / count, sum(not text.strip() for text in predictions) / count
    return (
        f"outputs: {sum(ended) / count:.1%} end by themselves, {looping:.1%} repeat to the end, {empty:.1%} are empty; "
        f"{sum(map(len, predictions)) / count:.1f} characters on average"
    )


def repeats(text: str, times: int = 4, least: int = 16) -> bool:
    """Whether a text ends in a loop (the degeneration of Holtzman et al. 2020): at its end stand at least `least`
    characters that repeat one piece at least `times` times; the last repetition may be incomplete."""
    # z[p]: length of the common prefix of the reversed text and itself shifted by p (Z algorithm; linear time)
    text = text.rstrip()[::-1]
    z, left, right = [0] * len(text), 0, 0
    for p in range(1, len(text)):
        if p < right:
            z[p] = min(right - p, z[p - left])
        while p + z[p] < len(text) and text[z[p]] == text[p + z[p]]:
            z[p] += 1
        if p + z[p] > right:
            left, right = p, p + z[p]
    return any(p + length >= max(least, times * p) for p, length in enumerate(z) if p)
