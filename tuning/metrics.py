"""Scores of predictions against references: extraction, question generation, classification and free text.

`score` is the one function to call: it takes lists and gives names and numbers. `row_scores` gives each row's own
values, for `bootstrap` and for comparing two models row by row; `relation_scores` is a table of the relations.

Everywhere: predictions is one answer a row, references the acceptable answers of each row (one or several), and what
counts is the answer that fits best. Shares and F1 run from 0 to 1; what others publish out of 100 (ROUGE, BLEU, the
points of question generation) runs from 0 to 100.
"""

import functools
import importlib.util
import re
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable

import numpy as np

# each kind of answers with the score to choose a model by, a mean over rows (rouge_l: see `missing`)
HEADLINE = {"triples": "f1", "questions": "question_points", "classes": "accuracy", "text": "rouge_l"}
FROM_LOSS = ("loss", "perplexity")  # figures of a validation for which nothing is generated
AS_WRITTEN = "output_as_written"  # key of an answered row, see with_references
# ROUGE and BLEU alone need these; module -> what to install
PACKAGES = {"jieba": "jieba==0.42.1", "rouge_chinese": "rouge-chinese==1.0.3", "nltk": "nltk==3.10.4"}


def kind_of(references: list[list[str]]) -> str:
    """What these references are, a key of HEADLINE: a guess from their form, for users who do not say it.

    triples: every line has two "_"; questions: nine in ten end in a question mark; classes: one short line each, from
    a set of labels that are used three times or more on average; text: everything else.
    """
    texts = [text.strip() for answers in references for text in answers if text.strip()]
    if not texts:
        return "text"
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
    """All scores of one kind of answers.

    Args:
        kind: a key of HEADLINE; `kind_of(references)` guesses it.
        ended: whether each prediction ended by itself, if known.

    Returns:
        The means over rows of `row_scores`, what only all rows together have (micro_*, macro_f1, distinct_*), and
        `output_statistics`. ROUGE and BLEU are left out where their packages are missing (`missing` names them).

    Raises:
        ValueError: no rows, or lists of different lengths.
    """
    scores = {name: float(np.mean(values)) for name, values in row_scores(kind, predictions, references).items()}
    if kind == "triples":
        scores |= micro_scores(predictions, references)
    elif kind == "classes":
        scores["macro_f1"] = macro_f1(predictions, references)
    else:
        scores |= {f"distinct_{n}": distinct(predictions, n) for n in (1, 2)}
    return scores | output_statistics(predictions, references, ended)


def row_scores(kind: str, predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """Each row's own values of the scores that are means over rows. Raises ValueError as `score`."""
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
    if kind == "questions":
        return question_rows(predictions, references) | {"exact_match": exact}
    rows = {"exact_match": exact}
    if not missing(kind):
        each = [rouge_bleu(*row) for row in zip(predictions, references, strict=True)]
        rows = {name: [row[name] for row in each] for name in each[0]} | rows
    return rows


def describe(kind: str, scores: dict[str, float]) -> list[str]:
    """Lines that tell a reader what `score` returned."""
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
        "text": ["text: exact match {exact_match:.4f} distinct-1 {distinct_1:.4f} distinct-2 {distinct_2:.4f}"],
    }[kind]
    if "bleu_4" in scores:
        lines.insert(0, "text: ROUGE-1 {rouge_1:.4f} ROUGE-2 {rouge_2:.4f} ROUGE-L {rouge_l:.4f} BLEU-4 {bleu_4:.4f}")
    stops = "outputs: {ended:.1%} end by themselves, " if "ended" in scores else "outputs: "
    stops += "{repeating:.1%} repeat to the end, {empty:.1%} are wrongly empty; "
    stops += "{mean_length:.1f} characters on average, references {reference_length:.1f}"
    return [line.format(**scores) for line in [*lines, stops]]


def references_of(row: dict) -> list[str]:
    """The right answers to a row, as the model that answers can write them: AS_WRITTEN if there, else `output`."""
    output = row[AS_WRITTEN] if AS_WRITTEN in row else row["output"]
    return output if isinstance(output, list) else [output]


def with_references(row: dict, tokenizer) -> dict:
    """A row whose right answers can be compared with those of a model: AS_WRITTEN is added where it is another text.

    A vocabulary may normalise what it encodes (ChatGLM-6B's makes ， into ,), so that no answer can ever be such a
    reference. What the vocabulary makes of the reference itself is the right answer then. For vocabularies that keep
    all text (ChatGLM2-6B, ChatGLM3-6B) nothing changes, and ， for , is an error there. (To normalise within the
    scores would forgive these and more, as ² for 2.)

    Args:
        tokenizer: the model's; `as_written` is asked.
    """
    row = {key: value for key, value in row.items() if key != AS_WRITTEN}
    answers = references_of(row)
    written = tokenizer.as_written(answers)
    return row if written == answers else row | {AS_WRITTEN: written}


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Whether a prediction is one of the answers, white space around them apart (as SQuAD's, Rajpurkar et al. 2016,
    without its English rules on articles and punctuation)."""
    return prediction.strip() in {answer.strip() for answer in answers}


# ---- triples


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


def counts(found: set[str], wanted: set[str]) -> tuple[int, int, int]:
    """How many triples are correct, predicted and expected."""
    return len(found & wanted), len(found), len(wanted)


def found_and_wanted(predictions: list[str], references: list[list[str]]) -> list[tuple[set[str], set[str]]]:
    """The triples of each prediction and of that answer among its references with which its F1 is best."""
    pairs = []
    for prediction, answers in zip(predictions, references, strict=True):
        found = triples(prediction)
        best = max(map(triples, answers), key=lambda wanted: precision_recall_f1(*counts(found, wanted))[2])
        pairs.append((found, best))
    return pairs


def triple_rows(predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """precision, recall, f1 of each row, whose mean is the original project's measure (ChatGLM-Finetuning), and
    exact_match: whether the triples are the reference's, in any order."""
    pairs = found_and_wanted(predictions, references)
    rows = [precision_recall_f1(*counts(*pair)) for pair in pairs]
    scores = {name: [row[i] for row in rows] for i, name in enumerate(("precision", "recall", "f1"))}
    return scores | {"exact_match": [float(found == wanted) for found, wanted in pairs]}


def micro_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """micro_precision, micro_recall, micro_f1: from the counts of all rows together (Manning et al. 2008,
    Introduction to Information Retrieval, 13.6)."""
    pairs = found_and_wanted(predictions, references)
    total = np.sum([counts(*pair) for pair in pairs], axis=0).tolist()
    return dict(zip(("micro_precision", "micro_recall", "micro_f1"), precision_recall_f1(*total), strict=True))


def relation_scores(predictions: list[str], references: list[list[str]]) -> dict[str, dict[str, float]]:
    """A row a relation, the most expected first: micro precision, recall, f1, and the counts they come from.

    The relation of a triple is its second part; lines that are no triple stand under "" (as in the evaluation of
    relation extraction by type, e.g. Zhang et al. 2017, TACRED).
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


# ---- classes


def label_scores(predictions: list[str], references: list[list[str]]) -> dict[str, dict[str, float]]:
    """A row a label of the references, the most expected first: precision, recall, f1, and the counts they come from.

    Where several labels are accepted, a prediction among them is the true one, else the first is. A prediction that
    is no label of the references is wrong for its row and makes no label of its own.
    """
    said = [prediction.strip() for prediction in predictions]
    accepted = [[answer.strip() for answer in answers] for answers in references]
    true = [text if text in answers else answers[0] for text, answers in zip(said, accepted, strict=True)]
    correct = Counter(text for text, label in zip(said, true, strict=True) if text == label)
    predicted, expected = Counter(said), Counter(true)
    table = {}
    for label in sorted(expected, key=lambda label: (-expected[label], label)):
        numbers = correct[label], predicted[label], expected[label]
        table[label] = dict(zip(("precision", "recall", "f1"), precision_recall_f1(*numbers), strict=True))
        table[label] |= dict(zip(("correct", "predicted", "expected"), numbers, strict=True))
    return table


def macro_f1(predictions: list[str], references: list[list[str]]) -> float:
    """The mean over labels of each label's F1, rare labels counting as much as frequent ones (Sebastiani 2002; as
    scikit-learn's f1_score with average="macro" and the references' labels). See `label_scores`.
    """
    return float(np.mean([row["f1"] for row in label_scores(predictions, references).values()]))


# ---- questions


def questions(text: str) -> list[str]:
    """The questions of an answer, one a line or one after the other, without list numbers, as bare characters:
    NFKC, lower case, no punctuation and no white space."""
    number = r"^\s*([(（]?\d{1,2}([)）、:：]|[.．](?!\d))|[-*•])\s*"
    parts = re.findall(r"[^？?\n]+", text)
    return [bare for part in parts if (bare := bare_characters(re.sub(number, "", part)))]


def bare_characters(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in text if unicodedata.category(char)[0] not in "PZC")


def longest_common_subsequence(a: str, b: str) -> int:
    """Its length, by the bit-parallel method of Hyyrö 2004: a bit a character of a, one addition a character of b."""
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
    """A reference for each question asked, none used twice, the most similar pair first: similarity and reference.

    A question for which no reference is left gets 0 and "".
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

    The original (ChatGLM-Finetuning) judged 20 documents by hand, 5 points each, for accuracy and diversity. This is
    an automatic stand-in, of our own making: it ranks models as those two words mean it, and its points are not to be
    compared with points given by people. For each question that a row's prediction asks:

        accuracy a:  the similarity to its reference (ROUGE-L F1 over characters), each reference used once
        diversity d: the mean over its character pairs of min(1, max(1, r) / s), where s questions of all rows together
                     have the pair, and r of the references that they were matched with

    So d is 1 for a question that says nothing more often than people do, and 1 / k for one asked k times. A row has
    accuracy_points, 50 mean(a), and diversity_points, 50 mean(a d): to be different earns as much as it is on the
    subject, or random text would get half the points. question_points is the sum. A prediction without a question has
    0 (100 if the references have none either); questions beyond the number of references count as wrong, and the order
    of the questions does not count.
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


def distinct(predictions: list[str], n: int) -> float:
    """distinct-n (Li et al. 2016): different n-grams of characters over all n-grams, all predictions together."""
    grams = [text[i : i + n] for text in map(bare_characters, predictions) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


# ---- text


def missing(kind: str) -> str:
    """What to type where the packages of ROUGE and BLEU are not installed and kind has use for them; else ""."""
    lacking = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    return f"pip install {' '.join(lacking)}" if kind == "text" and lacking else ""


@functools.cache
def segmenter():
    """jieba, quiet, with its dictionary read afresh.

    By itself it loads a cache from the folder of temporary files, which any user of the machine may have put there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escape sequences and pkg_resources, as old packages have them
        import jieba
    jieba.setLogLevel("WARNING")
    words = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as words.tmp_dir:
        words.initialize()
    return words


def rouge_bleu(prediction: str, answers: list[str]) -> dict[str, float]:
    """rouge_1, rouge_2, rouge_l and bleu_4 of one prediction, 0 to 100, rounded to 4 digits.

    As the official fine-tuning demo computes them (ptuning/main.py of THUDM/ChatGLM-6B and ChatGLM2-6B): F1 of
    rouge_chinese over the words of jieba; sentence BLEU-4 of nltk over characters, smoothed by method 3 (Chen and
    Cherry 2014). ChatGLM3's later demo takes BLEU over words; its figures differ. Of several answers the best counts
    for ROUGE, and BLEU takes them all as references. An empty prediction, at which the demo fails, is worth 0, or 100
    if an answer is empty. Memory and time of ROUGE-L grow with the product of the lengths: 0.3 GB at 1,500 words each.

    Raises:
        ImportError: a package is not installed; `missing` tells beforehand.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    names = ("rouge-1", "rouge-2", "rouge-l")
    texts = [answer for answer in answers if answer.strip()]
    if not prediction.strip() or not texts:
        right = not prediction.strip() and len(texts) < len(answers)
        return dict.fromkeys(("rouge_1", "rouge_2", "rouge_l", "bleu_4"), 100.0 * right)
    hypothesis = " ".join(segmenter().cut(prediction))
    tries = [Rouge().get_scores(hypothesis, " ".join(segmenter().cut(text)))[0] for text in texts]
    scores = {name.replace("-", "_"): max(round(100 * try_[name]["f"], 4) for try_ in tries) for name in names}
    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(text) for text in texts], list(prediction), smoothing_function=smoothing)
    return scores | {"bleu_4": round(100 * bleu, 4)}


# ---- outputs as such, and how sure a mean is


def output_statistics(
    predictions: list[str], references: list[list[str]], ended: list[bool] | None = None
) -> dict[str, float]:
    """The usual silent failures, as shares of the rows, and lengths.

    ended: the model gave a stop token, instead of being cut at the length limit (only where that is known);
    repeating: `repeats`; empty: nothing is said where every reference says something; mean_length, reference_length:
    characters, a row's references averaged.
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
    """`output_statistics` in words, as far as they need no references."""
    count = len(predictions)
    looping, empty = sum(map(repeats, predictions)) / count, sum(not text.strip() for text in predictions) / count
    return (
        f"outputs: {sum(ended) / count:.1%} end by themselves, {looping:.1%} repeat to the end, {empty:.1%} are empty; "
        f"{sum(map(len, predictions)) / count:.1f} characters on average"
    )


def repeats(text: str, times: int = 4, least: int = 16) -> bool:
    """Whether a text ends in a loop, the degeneration of Holtzman et al. 2020: its last characters, `least` or more,
    are one piece said `times` times over or more, the last time perhaps not to its end."""
    # z[p]: how far the reversed text agrees with itself moved by p (the Z algorithm; linear in the length)
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


def bootstrap(values: list[float], seed: int, resamples: int = 2000, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of rows' values (Efron and Tibshirani 1993, 13.3): lower and upper end.

    For the difference of two models, give the differences row by row.
    """
    rows = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    means = [rows[random.integers(len(rows), size=len(rows))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
