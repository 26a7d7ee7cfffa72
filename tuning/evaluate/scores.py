"""Scores of runs that answered the same test rows: the runs of a method together, the methods of a family together."""

import os
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from tuning.errors import UserError
from tuning.evaluate.inputs import asked_in, read_answers
from tuning.metrics import HEADLINE, bootstrap, kind_of, references_of, relation_scores, row_scores, score

LABELS = {"f1": "F1", "question_points": "points", "rouge_l": "ROUGE-L", "exact_match": "exact match"}
LABELS |= {"tool_call_right": "calls right"}
SAMPLE_ROWS = 8  # test rows whose answers are shown


def headline(kind: str, rows: dict) -> str:
    """The score to compare by, of those that were computed (ROUGE needs optional packages)."""
    return HEADLINE[kind] if HEADLINE[kind] in rows else "exact_match"


def mean_score(path: str) -> float:
    """The mean headline score of a file of answers."""
    _, predictions, references, _ = read_answers(path)
    kind = kind_of(references)
    scores = row_scores(kind, predictions, references)
    return float(np.mean(scores[headline(kind, scores)]))


class MethodScores(NamedTuple):
    """The runs of one method on one family, evaluated.

    rows: [test rows] headline score of each row, mean over seeds.
    seeds: headline score of each seed.
    scores: all scores, mean over seeds.
    answers: of the first seed.
    relations: relation -> its mean F1 and the number of expected triples; empty if the answers are not triples.
    """

    name: str
    runs: list[dict]
    rows: np.ndarray
    seeds: list[float]
    scores: dict[str, float]
    answers: list[str]
    relations: dict[str, dict[str, float]]

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); NaN for one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else float("nan")

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over the test rows."""
        return bootstrap(list(self.rows), seed=0)

    def average(self, key: str) -> float | None:
        """Mean of a figure over the runs that have it."""
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return float(np.mean(values)) if values else None


class FamilyScores(NamedTuple):
    """The methods of one model family.

    measure: name of the headline score.
    rows: the test rows.
    """

    mode: str
    kind: str
    measure: str
    methods: list[MethodScores]
    rows: list[dict]

    @property
    def label(self) -> str:
        """The headline score as readers know it."""
        return LABELS.get(self.measure, self.measure)

    @property
    def best(self) -> MethodScores:
        return max(self.methods, key=lambda method: method.mean)

    @property
    def seeded(self) -> bool:
        """Whether the seeds of these runs are known."""
        return any(run.get("seed") is not None for method in self.methods for run in method.runs)


def evaluate(folder: str, runs: list[dict]) -> list[FamilyScores]:
    """Score the runs whose status is "done".

    Args:
        folder: the paths of the predictions are relative to it.
        runs: dicts with mode, method, seed, status and predictions; other keys are optional.

    Raises:
        UserError: predictions that cannot be read, or that are for different test rows.
    """
    families = []
    for mode in dict.fromkeys(run["mode"] for run in runs):
        methods, test, kind = [], None, ""
        for name in dict.fromkeys(run["method"] for run in runs if run["mode"] == mode):
            chosen = [r for r in runs if (r["mode"], r["method"], r["status"]) == (mode, name, "done")]
            answered = []
            for run in chosen:
                path = os.path.normpath(os.path.join(folder, run["predictions"]))  # the folder may not exist yet
                answered.append(read_answers(path, mode))
                if test is None:
                    test, kind = answered[-1][0], kind_of(answered[-1][2])
                if [*map(asked_in, answered[-1][0])] != [*map(asked_in, test)]:
                    raise UserError(f"{path} answers other rows than the runs before it")
            if answered:
                methods.append(_score_method(name, chosen, kind, answered))
        if methods:
            measure = headline(kind, methods[0].scores)
            families.append(FamilyScores(mode, kind, measure, methods, test))
    return families


def _score_method(name: str, runs: list[dict], kind: str, answered: list[tuple]) -> MethodScores:
    """Score the runs of one method. answered: see `read_answers`, one per run."""
    rows, scores, relations = [], [], []
    for _, predictions, references, ended in answered:
        values = row_scores(kind, predictions, references)
        rows.append(values[headline(kind, values)])
        scores.append(score(kind, predictions, references, ended))
        relations.append(relation_scores(predictions, references) if kind == "triples" else {})
    by_relation = {
        key: {"f1": float(np.mean([one.get(key, {"f1": 0.0})["f1"] for one in relations])), "expected": row["expected"]}
        for key, row in relations[0].items()
        if row["expected"]
    }
    return MethodScores(
        name,
        runs,
        np.mean(rows, axis=0),
        [float(np.mean(values)) for values in rows],
        {key: float(np.mean([one[key] for one in scores])) for key in scores[0]},
        answered[0][1],
        by_relation,
    )


def mean_forgetting(run: dict) -> float:
    """Mean over the categories of a run's forgetting, nats per answer token; NaN if it was not measured."""
    return float(np.mean(list(run["forgetting"].values()))) if run.get("forgetting") else float("nan")


class SampleAnswer(NamedTuple):
    """An answer of one or several methods (methods: their names) to a test row, with its score."""

    methods: str
    text: str
    score: float


def pick_samples(family: FamilyScores) -> list[tuple[dict, list[SampleAnswer]]]:
    """Test rows with their answers, half of them answered wrongly by the best method if there are enough of these.

    Returns:
        (row, answers of the first seeds, best first); methods with the same answer are listed together.
    """
    best = family.best
    references = [references_of(row) for row in family.rows]
    values = {m.name: row_scores(family.kind, m.answers, references)[family.measure] for m in family.methods}
    top = max(max(each) for each in values.values())
    order = sorted(range(len(family.rows)), key=lambda i: (np.var([v[i] for v in values.values()]) == 0, i))
    wrong = [i for i in order if values[best.name][i] < top][: SAMPLE_ROWS // 2]
    right = [i for i in order if values[best.name][i] >= top][: SAMPLE_ROWS - len(wrong)]
    samples = []
    for i in sorted([*wrong, *right]):
        answers = defaultdict(list)
        for method in family.methods:
            answers[method.answers[i], values[method.name][i]].append(method.name)
        each = [SampleAnswer(", ".join(names), text, value) for (text, value), names in answers.items()]
        samples.append((family.rows[i], sorted(each, key=lambda answer: -answer.score)))
    return samples
