"""Scores of question generation: answers that are lists of questions."""

import re
from collections import Counter

import numpy as np

from tuning.metrics.text import bare_characters


def questions(text: str) -> list[str]:
    """Questions of an answer (separated by line breaks or question marks), without list numbers and normalised: see
    `bare_characters`."""
    number = r"^\s*([(（]?\d{1,2}([)）、:：]|[.．](?!\d))|[-*•])\s*"
    parts = re.findall(r"[^？?\n]+", text)
    return [bare for part in parts if (bare := bare_characters(re.sub(number, "", part)))]


def longest_common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence, by the bit-parallel algorithm of Hyyrö 2004.

    One bit per character of `a`, one addition per character of `b`.
    """
    places: dict[str, int] = {}
    for i, char in enumerate(a):
        places[char] = places.get(char, 0) | 1 << i
    every = state = (1 << len(a)) - 1
    for char in b:
        met = state & places.get(char, 0)
        state = ((state + met) | (state - met)) & every
    return len(a) - state.bit_count()


def similarity(a: str, b: str) -> float:
    """ROUGE-L's F1 (Lin 2004) over characters, 0 to 1."""
    return 2 * longest_common_subsequence(a, b) / (len(a) + len(b))


def match(asked: list[str], wanted: list[str]) -> list[tuple[float, str]]:
    """Greedy matching: (similarity, reference) for each question, the most similar pair first, no reference used twice.

    A question for which no reference is left gets (0, "").
    """
    pairs = [(similarity(a, b), i, j) for i, a in enumerate(asked) for j, b in enumerate(wanted)]
    matched, used = [(0.0, "")] * len(asked), [False] * len(wanted)
    open_ = [True] * len(asked)
    for value, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if open_[i] and not used[j]:
            matched[i] = value, wanted[j]
            open_[i], used[j] = False, True
    return matched


def question_rows(predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """Points for generated questions, on the 100-point scale of the original project.

    The original (ChatGLM-Finetuning) had people rate 20 documents, 5 points each, for accuracy and diversity. This is
    an automatic replacement, designed for this project. Use it to rank models; its points cannot be compared with
    points given by people. For each question of a row's prediction:

        accuracy a:  similarity to its reference (ROUGE-L F1 over characters), each reference used once
        diversity d: mean over its character pairs of min(1, max(1, r) / s), where s predicted questions of all rows
                     contain the pair, and r of the references matched with them

    So d is 1 for a question that repeats no wording more often than the references do, and 1 / k for one asked k times.
    A row has accuracy_points = 50 mean(a) and diversity_points = 50 mean(a d). Diversity is weighted by accuracy:
    otherwise random text would get half the points. question_points is the sum. A prediction without questions gets 0
    (100 if the references have none either). Questions beyond the number of references count as wrong. The order of
    the questions does not matter.
    """

    def pairs_of(text):
        return {text[i : i + 2] for i in range(len(text) - 1)} or {text}

    rows, said, expected, right = [], Counter(), Counter(), []
    for prediction, answers in zip(predictions, references, strict=True):
        asked = questions(prediction)
        wanted = list(dict.fromkeys(text for answer in answers for text in questions(answer)))
        matched = match(asked, wanted)
        rows.append([(text, value) for text, (value, _) in zip(asked, matched, strict=True)])
        right.append(not asked and not wanted)
        for text in asked:
            said.update(pairs_of(text))
        for _, reference in matched:
            expected.update(pairs_of(reference))
    accuracy, diversity = [], []
    for row, empty in zip(rows, right, strict=True):
        parts = [(float(empty), float(empty))]
        if row:
            parts = []
            for text, value in row:
                new = np.mean([min(1.0, max(1, expected[pair]) / said[pair]) for pair in pairs_of(text)])
                parts.append((value, value * float(new)))
        accuracy.append(50 * float(np.mean([part[0] for part in parts])))
        diversity.append(50 * float(np.mean([part[1] for part in parts])))
    points = [a + d for a, d in zip(accuracy, diversity, strict=True)]
    return {"question_points": points, "accuracy_points": accuracy, "diversity_points": diversity}
