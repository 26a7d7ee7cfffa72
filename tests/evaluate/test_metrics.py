"""Scores of hand-made answers of known quality; ROUGE and BLEU against an implementation of their own; the rest of
tuning/metrics against slow definitions, and figures worked out by hand."""

import importlib.util
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import predict
from tuning import metrics
from tuning.errors import UserError
from tuning.evaluate.answers import describe_scores
from tuning.metrics import bootstrap, describe, kind_of, relation_scores, repeats, row_scores, score
from tuning.metrics import questions as question_metrics
from tuning.metrics import text as text_metrics

ROOT = Path(__file__).resolve().parents[2]

TRIPLES = [
    ["水泵_部件故障_漏水\n冷却系统_组成_水泵\n发动机_性能故障_水温高\n万用表_检测工具_电压"],
    ["风扇_部件故障_不转\n风扇电机_部件故障_烧毁"],
    ["节温器_部件故障_卡滞\n节温器_部件故障_生锈", "节温器_部件故障_卡滞"],
    ["变速箱_性能故障_换挡顿挫\n阀体_部件故障_磨损"],
]
CALL = "weather\n```python\ntool_call(city='青河')\n```"
QUESTIONS = [
    ["清热解毒口服液的功效有哪些？", "清热解毒口服液怎么服用？", "哪些人不宜服用它？"],
    ["薏米对头发有什么功效？", "薏米粥怎么做？"],
    ["剃须的最佳时间是什么时候？"],
    ["为什么空调开机后不制冷？", "空调滤网多久清洗一次？", "空调移机找谁？"],
    ["森林公园的门票多少钱？", "坐几路车能到森林公园？"],
    ["羽毛球双打怎样轮换发球？", "羽毛球拍的磅数怎么选？"],
]


def show_scores(*args):
    print(*describe_scores(*args), sep="\n")


def first(references):
    return [answers[0] for answers in references]


def half(texts, other=""):
    return [text if i % 2 == 0 else other for i, text in enumerate(texts)]


# ---- triples


def prf(predictions, references=TRIPLES):
    scores = score("triples", predictions, references)
    return [scores[name] for name in ("precision", "recall", "f1", "micro_precision", "micro_recall", "micro_f1")]


def test_triples_of_known_quality():
    perfect = first(TRIPLES)
    assert prf(perfect) == [1.0] * 6
    assert prf(["\n".join(reversed(text.split("\n"))) for text in perfect]) == [1.0] * 6  # the order does not count
    assert prf([f"{text}\n\n{text}" for text in perfect]) == [1.0] * 6  # said twice is said once
    assert prf([""] * 4) == [0.0] * 6
    assert prf(perfect[1:] + perfect[:1]) == [0.0] * 6
    # rows 0 and 2 of 4; 6 of the 10 triples: with nothing said, the first of several equal references is expected
    assert prf(half(perfect)) == pytest.approx([0.5, 0.5, 0.5, 1.0, 6 / 10, 2 * 0.6 / 1.6])
    # half of each row's triples, then as many wrong ones as right ones
    some = ["\n".join(text.split("\n")[: (text.count("\n") + 1) // 2]) for text in perfect]
    assert prf(some) == pytest.approx([1.0, (0.5 + 0.5 + 1.0 + 0.5) / 4, (3 * 2 / 3 + 1) / 4, 1.0, 5 / 9, 10 / 14])
    wrong = ["\n".join(text.split("\n") + [f"甲_乙_{i}" for i in range(text.count("\n") + 1)]) for text in perfect]
    assert prf(wrong) == pytest.approx([0.5, 1.0, 2 / 3, 0.5, 1.0, 2 / 3])


def test_triples_take_the_best_reference_and_may_rightly_be_none():
    scores = score("triples", ["a_r_b\nc_r_d", "", "x_r_y"], [["c_r_d\na_r_b"], ["e_r_f"], ["no_r_y", "x_r_y\nz_r_w"]])
    assert scores["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["micro_precision"] == 1.0
    assert scores["micro_recall"] == pytest.approx(3 / 5)
    assert scores["empty"] == pytest.approx(1 / 3)
    scores = score("triples", ["", "a_r_b"], [[""], [""]])
    assert (scores["f1"], scores["micro_f1"], scores["exact_match"], scores["empty"]) == (0.5, 0.0, 0.5, 0.0)


def test_relations_have_their_own_rows():
    predictions = [
        "水泵_部件故障_漏水\n冷却系统_组成_水泵\n发动机_部件故障_水温高\n不是三元组",
        "风扇_部件故障_不转\n风扇电机_部件故障_烧毁",
        "节温器_部件故障_卡滞",
        "",
    ]
    table = relation_scores(predictions, TRIPLES)
    assert list(table) == ["部件故障", "性能故障", "检测工具", "组成", ""]  # by how many are expected
    assert [table["部件故障"][name] for name in ("correct", "predicted", "expected")] == [4, 5, 5]
    assert table["部件故障"]["f1"] == pytest.approx(0.8)
    assert table["组成"]["f1"] == 1.0
    assert table["性能故障"] == {"precision": 0, "recall": 0, "f1": 0, "correct": 0, "predicted": 0, "expected": 2}
    assert table[""]["predicted"] == 1
    correct, expected = (sum(row[name] for row in table.values()) for name in ("correct", "expected"))
    assert score("triples", predictions, TRIPLES)["micro_recall"] == pytest.approx(correct / expected)


# ---- questions


def points(predictions, references=QUESTIONS):
    return score("questions", predictions, references)["question_points"]


def test_questions_of_known_quality():
    perfect = first(QUESTIONS)
    assert points(perfect) == 100.0
    assert points([answers[-1] for answers in QUESTIONS]) == 100.0  # any reference will do
    assert points(["\n".join(answers) for answers in QUESTIONS]) == 100.0
    assert points(["".join(f"{i}. {text}\n" for i, text in enumerate(reversed(a), 1)) for a in QUESTIONS]) == 100.0
    assert points([text.replace("？", "?") for text in perfect]) == 100.0
    assert points([""] * 6) == points(["？"] * 6) == 0.0
    assert points(half(perfect)) == pytest.approx(50.0)
    assert points(["", perfect[0]], [[""], QUESTIONS[0]]) == 100.0  # nothing to ask, and nothing asked

    moved, generic = points(perfect[1:] + perfect[:1]), points(["这是什么？"] * 6)
    noise = points(["的一是在不了有和人这中大？", "为上个国我以要他时来用们？"] * 3)
    for bad in (moved, generic, noise, points([perfect[0]] * 6)):
        assert 0 < bad < 35  # off the subject: no points for being different from each other
    cut = points([text[: len(text) // 2] for text in perfect])
    assert max(moved, generic, noise) < cut < 90


def test_questions_said_twice_lose():
    perfect = first(QUESTIONS)
    everything = ["\n".join(answers) for answers in QUESTIONS]
    assert points([f"{text}\n{text}" for text in everything]) == pytest.approx(100 * (0.5 * 0.5 + 0.5 * 0.5 * 0.5))
    assert points([f"{text}\n{text}" for text in perfect]) < 70
    for copies in range(1, 6):  # one row after the other says what the first says
        worse = points([perfect[0]] * (copies + 1) + perfect[copies + 1 :])
        assert worse < points([perfect[0]] * copies + perfect[copies:])


def test_question_points_by_hand():
    scores = score("questions", ["什么是水泵？", "什么是水泵？"], [["什么是水泵？"], ["什么是风扇？"]])
    # similarity 1 and 2 * 3 / 10; of the four pairs 什么 么是 是水 水泵, each said twice, the last two stand in one
    # of the two references
    assert scores["accuracy_points"] == pytest.approx(50 * (1 + 0.6) / 2)
    assert scores["diversity_points"] == pytest.approx(50 * (1 + 0.6) / 2 * (1 + 1 + 0.5 + 0.5) / 4)
    assert scores["question_points"] == pytest.approx(70)
    # a question of one's own is new, whether its reference has its words or not: similarity 2 * 3 / 10 and 1
    scores = score("questions", ["什么是风扇？", "水泵漏水？"], [["什么是水泵？"], ["水泵漏水？"]])
    assert scores["accuracy_points"] == scores["diversity_points"] == pytest.approx(50 * (0.6 + 1) / 2)
    # a reference given twice is one reference: the second asking is wrong, its pairs are said twice
    scores = score("questions", ["水泵漏水？水泵漏水？"], [["水泵漏水？", "水泵漏水？"]])
    assert scores["accuracy_points"] == pytest.approx(25)
    assert scores["diversity_points"] == pytest.approx(12.5)


def test_questions_are_told_apart():
    assert question_metrics.questions("1. 3.5吨货车要什么驾照？2、ＡＢＣ 是什么?\n- 原因\n\n？") == [
        "35吨货车要什么驾照",
        "abc是什么",
        "原因",
    ]
    assert question_metrics.questions("3.5吨货车要什么驾照？\n（2）怎么考？") == ["35吨货车要什么驾照", "怎么考"]


def test_better_questions_have_more_points():
    perfect, wrong = first(QUESTIONS), first(QUESTIONS)[1:] + first(QUESTIONS)[:1]
    order = random.Random(0).sample(range(6), 6)
    steps = [points([wrong[i] if i in order[:n] else perfect[i] for i in range(6)]) for n in range(7)]
    assert steps == sorted(steps, reverse=True)
    assert all(a - b > 5 for a, b in pairwise(steps))


def test_distinct_n_by_hand():
    assert text_metrics.distinct(["水泵漏水", "水泵，水泵"], 1) == pytest.approx(3 / 8)
    assert text_metrics.distinct(["水泵漏水", "水泵，水泵"], 2) == pytest.approx(4 / 6)  # 水泵 泵漏 漏水 泵水
    assert text_metrics.distinct(["", "水"], 2) == 0.0


def test_longest_common_subsequence_is_the_table_s():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abcd", k=rng.randrange(90))) for _ in range(2))
        assert question_metrics.longest_common_subsequence(a, b) == table_lcs(a, b)


# ---- classes


def test_classes_of_known_quality():
    references = [["正面"], ["正面"], ["负面"], ["负面"], ["中性"], ["中性", "负面"]]
    perfect = score("classes", ["正面", "正面 ", "负面", "负面\n", "中性", "负面"], references)
    assert (perfect["accuracy"], perfect["macro_f1"]) == (1.0, 1.0)
    # F1: 正面 2 * 2 / (4 + 2), 负面 0 / (0 + 2), 中性 2 * 1 / (1 + 2)
    always = score("classes", ["正面"] * 4 + ["中性", "我不知道"], references)
    assert always["accuracy"] == 0.5
    assert always["macro_f1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert score("classes", ["正面"] * 6, references)["macro_f1"] == pytest.approx(0.5 / 3)
    empty = score("classes", [""] * 6, references)
    assert (empty["accuracy"], empty["macro_f1"], empty["empty"]) == (0.0, 0.0, 1.0)


# ---- ROUGE and BLEU


def table_lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def own_rouge(a: list[str], b: list[str]) -> list[float]:
    """F1 of the sets of words, of the sets of word pairs, and of the longest common subsequence, out of 100."""

    def f1(common, n_a, n_b):
        p, r = common / n_a if n_a else 0.0, common / n_b if n_b else 0.0
        return 100 * 2 * p * r / (p + r + 1e-8)

    sets = [(set(zip(*(a[i:] for i in range(n)))), set(zip(*(b[i:] for i in range(n))))) for n in (1, 2)]  # noqa: B905
    return [f1(len(x & y), len(x), len(y)) for x, y in sets] + [f1(table_lcs(a, b), len(a), len(b))]


def own_bleu(text: str, references: list[str]) -> float:
    """Papineni et al. 2002 over characters, orders 1 to 4; the k-th order without a match counts 2^-k matches."""
    log_sum, zeros = 0.0, 0
    for n in range(1, 5):
        grams = Counter(text[i : i + n] for i in range(len(text) - n + 1))
        most = Counter()
        for reference in references:
            most |= Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        matches, total = sum((grams & most).values()), max(1, sum(grams.values()))
        if n == 1 and not matches:
            return 0.0
        if not matches:
            zeros += 1
            matches = 0.5**zeros
        log_sum += math.log(matches / total) / 4
    closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return 100 * math.exp(log_sum + min(0.0, 1 - closest / len(text)))


# prediction, reference, the words of both, and the four figures
EXAMPLES = [
    (
        "薏米对头发有什么功效？",
        "薏米对皮肤有什么作用？",
        "薏米 对 头发 有 什么 功效 ？",
        "薏米 对 皮肤 有 什么 作用 ？",
        [71.4286, 33.3333, 71.4286, 24.3842],
    ),
    (
        "水泵漏水，导致发动机水温高，更换水泵后故障排除。",
        "发动机水温高的原因是水泵漏水。更换水泵后，故障排除。",
        "水泵 漏水 ， 导致 发动机 水温 高 ， 更换 水泵 后 故障 排除 。",
        "发动机 水温 高 的 原因 是 水泵 漏水 。 更换 水泵 后 ， 故障 排除 。",
        [84.6154, 50.0, 60.0, 54.8676],
    ),
    ("高温", "水温高", "高温", "水温 高", [0.0, 0.0, 0.0, 21.4441]),
    ("漏水\n漏油", "漏油\n漏水 漏气", "漏水 漏油", "漏油 漏水 漏气", [80.0, 0.0, 40.0, 19.4034]),
]
NAMES = ("rouge_1", "rouge_2", "rouge_l", "bleu_4")


@pytest.mark.parametrize(("prediction", "reference", "words", "reference_words", "figures"), EXAMPLES)
def test_rouge_and_bleu_are_the_official_demo_s(prediction, reference, words, reference_words, figures):
    own = [*own_rouge(words.split(), reference_words.split()), own_bleu(prediction, [reference])]
    assert own == pytest.approx(figures, abs=5.1e-5)
    scores = text_metrics.rouge_bleu(prediction, [reference])
    assert [scores[name] for name in NAMES] == pytest.approx(figures, abs=1e-9)


def test_rouge_and_bleu_of_many_texts():
    rng = random.Random(0)
    words = [
        "水泵",
        "漏水",
        "发动机",
        "水温",
        "高",
        "更换",
        "后",
        "故障",
        "排除",
        "。",
        "，",
        "？",
        "的",
        "是",
        "abc",
        "12",
    ]
    cut = text_metrics.segmenter().lcut
    for _ in range(200):
        text, *references = ("".join(rng.choices(words, k=rng.randrange(1, 25))) for _ in range(rng.randrange(2, 5)))
        each = [own_rouge(" ".join(cut(text)).split(), " ".join(cut(r)).split()) for r in references]
        scores = text_metrics.rouge_bleu(text, references)
        best = [max(values) for values in zip(*each, strict=True)]
        assert [scores[name] for name in NAMES] == pytest.approx([*best, own_bleu(text, references)], abs=5.1e-5)


def test_text_of_known_quality():
    perfect = first(QUESTIONS)
    assert [score("text", perfect, QUESTIONS)[name] for name in NAMES] == pytest.approx([100.0] * 4, abs=1e-4)
    last = score("text", [answers[-1] for answers in QUESTIONS], QUESTIONS)
    assert [last[name] for name in NAMES] == pytest.approx([100.0] * 4, abs=1e-4)
    assert last["exact_match"] == 1.0
    assert [score("text", half(perfect), QUESTIONS)[name] for name in NAMES] == pytest.approx([50.0] * 4, abs=1e-4)
    empty = score("text", ["", " \n"] * 3, QUESTIONS)
    assert [empty[name] for name in NAMES] == [0.0] * 4
    assert [text_metrics.rouge_bleu("", ["", "水泵"])[name] for name in NAMES] == [100.0] * 4
    assert [text_metrics.rouge_bleu("水泵", [""])[name] for name in NAMES] == [0.0] * 4
    twice = score("text", [text + text for text in perfect], QUESTIONS)
    moved = score("text", perfect[1:] + perfect[:1], QUESTIONS)
    for name in ("rouge_l", "bleu_4"):
        assert moved[name] < 40 < twice[name] < 80


def test_rouge_and_bleu_are_left_out_without_their_packages(monkeypatch, capsys, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jieba" else real(name, *rest))
    scores = score("text", ["水泵"], [["水泵"]])
    assert "rouge_l" not in scores and scores["exact_match"] == 1.0
    show_scores("auto", ["漏水"], [["水泵漏水"]], [True])
    assert f"left out; they need: pip install {metrics.PACKAGES['jieba']}\n" in capsys.readouterr().out
    (tmp_path / "rows.json").write_text("")
    args = f"--mode glm3 --model_path . --predict_path {tmp_path / 'rows.json'} --device cpu --metrics".split()
    with pytest.raises(UserError, match=r"--metrics text needs more packages: pip install jieba==\S+$"):
        predict.parse_args([*args, "text"])
    predict.parse_args([*args, "questions"])


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    optional = (ROOT / "requirements.txt").read_text()
    for package in metrics.PACKAGES.values():
        assert package in lines and f"# {package}" in optional


# ---- outputs as such


def test_stop_statistics():
    references = [["水泵漏水"], [""], ["风扇", "风扇不转"], ["卡滞"]]
    scores = score("text", ["水泵漏水", "", " ", "漏水，" * 20], references, [True, True, True, False])
    assert scores["ended"] == 0.75
    assert scores["repeating"] == 0.25
    assert scores["empty"] == 0.25  # where nothing is the right answer, nothing is not missing
    assert scores["mean_length"] == (4 + 0 + 1 + 60) / 4
    assert scores["reference_length"] == (4 + 0 + 3 + 2) / 4
    assert "75.0% end by themselves, 25.0% repeat to the end, 25.0% are wrongly empty" in describe("text", scores)[-1]
    assert "ended" not in score("text", [""], [[""]])


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("好" * 16, True),
        ("好" * 15, False),
        ("原因如下：" + "水泵漏水，" * 4, True),
        ("原因如下：" + "水泵漏水，" * 3 + "水泵漏", False),
        ("原因如下：" + "水泵漏水，" * 4 + "水泵漏", True),
        ("水泵漏水，" * 20 + "更换后故障排除。", False),
        ("水泵_部件故障_漏水\n风扇_部件故障_不转\n节温器_部件故障_卡滞\n阀体_部件故障_磨损", False),
        ("水泵漏水，" * 4 + "\n\n", True),
        ("好" * 100_000, True),  # in a moment: the time grows with the length, not with its square
        ("", False),
    ],
)
def test_a_loop_is_seen(text, loops):
    assert repeats(text) is loops


def test_loops_are_those_of_the_definition():
    rng = random.Random(0)
    seen = Counter()
    for _ in range(400):
        unit = "".join(rng.choices("ab", k=rng.randrange(1, 7)))
        text = ("".join(rng.choices("ab", k=rng.randrange(12))) + unit * 12)[: rng.randrange(1, 45)]
        # the longest end of the text in which every character is the one p places before it, and p more
        lengths = {
            p: next((n for n in range(p, len(text)) if text[-1 - n] != text[-1 - n + p]), len(text))
            for p in range(1, len(text))
        }
        expected = any(length >= max(16, 4 * p) for p, length in lengths.items())
        seen[expected] += 1
        assert repeats(text) is expected, text
    assert min(seen[True], seen[False]) > 50


# ---- how sure a mean is


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    values = rng.random(400)
    low, high = bootstrap(values, seed=1)
    assert (low, high) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert bootstrap([0.5] * 10, seed=0) == (0.5, 0.5)
    ends = [bootstrap(rng.random(40), seed=i, resamples=300, confidence=0.9) for i in range(300)]
    assert sum(low < 0.5 < high for low, high in ends) / 300 == pytest.approx(0.9, abs=0.05)


# ---- which scores


@pytest.mark.parametrize(
    ("references", "kind"),
    [
        (TRIPLES, "triples"),
        ([*TRIPLES, [""]], "triples"),
        ([*TRIPLES, ["没有三元组"]], "text"),
        (QUESTIONS, "questions"),
        ([["正面"], ["负面"]] * 3, "classes"),
        ([["正面"], ["负面"]], "text"),  # too few rows to tell labels from answers
        ([["水泵漏水，更换。"], ["风扇不转。"]], "text"),
        ([[CALL], *[["好。"]] * 9], "tool_calls"),
        ([[CALL], *[["水泵漏水。"]] * 10], "text"),
        ([[""], [""]], "text"),
    ],
)
def test_the_kind_is_guessed_from_the_references(references, kind):
    assert kind_of(references) == kind


def test_every_kind_has_its_headline_and_lines():
    for kind, name in metrics.HEADLINE.items():
        rows = row_scores(kind, first(QUESTIONS), QUESTIONS)
        scores = score(kind, first(QUESTIONS), QUESTIONS, [True] * 6)
        assert scores[name] == pytest.approx(np.mean(rows[name]))
        assert all(len(values) == 6 for values in rows.values())
        assert describe(kind, scores)[0].startswith(f"{kind}")
        assert all(math.isfinite(value) for value in scores.values())
        for predictions, references in (([], []), (["a"], [["a"], ["b"]]), (["a"], [[]])):
            with pytest.raises(ValueError, match="at least one, equally many"):
                score(kind, predictions, references)
    with pytest.raises(ValueError, match="kind poems is none of triples, questions"):
        score("poems", ["a"], [["a"]])


def test_tool_calls_are_scored_as_calls_and_the_plain_answers_beside_them_as_text(capsys):
    other, wrong = CALL.replace("青河", "梅江"), CALL.replace("weather", "time")
    predictions, references = [CALL, other, wrong, "好。", CALL], [[CALL], [CALL], [CALL], ["好。"], ["好。"]]
    scores = score("tool_calls", predictions, references, [True] * 5)
    names = ("tool_call_right", "tool_name", "tool_parameters", "tool_call", "exact_match")
    assert [scores[name] for name in names] == pytest.approx([2 / 5, 3 / 5, 3 / 5, 4 / 5, 2 / 5])
    assert "distinct_1" not in scores
    show_scores("auto", predictions, references, [True] * 5)
    out = capsys.readouterr().out
    assert "tool_calls: right 0.4000 (name 0.6000, parameters 0.6000); a call where there should be one 0.8000" in out
    assert "  the 2 plain answers, text: exact match 0.5000" in out
    show_scores("auto", [CALL], [[CALL]], [True])
    assert "plain" not in capsys.readouterr().out


def test_predict_prints_what_fits(capsys):
    show_scores("auto", first(TRIPLES), TRIPLES, [True] * 4)
    out = capsys.readouterr().out
    assert "triples, mean over rows: precision 1.0000 recall 1.0000 F1 1.0000\n" in out
    assert "  部件故障: precision 1.0000 recall 1.0000 F1 1.0000 (6 expected, 6 predicted)\n" in out
    assert "outputs: 100.0% end by themselves, 0.0% repeat to the end, 0.0% are wrongly empty" in out
    show_scores("classes", ["正", "正", "中", "?"], [["正"], ["负"], ["中"], ["正"]], [True] * 4)
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "  正: precision 0.5000 recall 0.5000 F1 0.5000 (2 expected, 2 predicted)",
        "  中: precision 1.0000 recall 1.0000 F1 1.0000 (1 expected, 1 predicted)",
        "  负: precision 0.0000 recall 0.0000 F1 0.0000 (1 expected, 0 predicted)",
        "  1 of 4 answers are none of these labels",
    ]
    show_scores("auto", half(first(QUESTIONS)), QUESTIONS, [True] * 6)
    assert "questions: 50.00 of 100 points (accuracy 25.00 of 50, diversity 25.00 of 50)" in capsys.readouterr().out
    show_scores("text", first(QUESTIONS), QUESTIONS, [False] * 6)
    out = capsys.readouterr().out
    assert "text: ROUGE-1 100.0000 ROUGE-2 100.0000 ROUGE-L 100.0000 BLEU-4 100.0000\n" in out
    assert "outputs: 0.0% end by themselves" in out
