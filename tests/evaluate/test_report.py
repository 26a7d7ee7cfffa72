"""The report: its figures against hand-made runs, pages that parse, hostile data that stays data."""

import base64
import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tuning.errors import UserError
from tuning.evaluate import charts, page, report, tables
from tuning.evaluate.inputs import count_seen, read_answers, read_curves
from tuning.evaluate.report import write_report
from tuning.evaluate.scores import SampleAnswer, evaluate, pick_samples
from tuning.metrics import bootstrap

HOSTILE = '<script>alert("1")</script>&amp;|x|\'"</td></svg>'
VOID = {"meta", "br", "link", "img"}


def svg_of(uri: str) -> ElementTree.Element:
    return ElementTree.fromstring(base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")))


def svg_texts(uri: str) -> list[tuple[str, str]]:
    """Texts of a chart; "title" is the one in bold."""
    texts = [e for e in svg_of(uri).iter() if e.tag.endswith("}text")]
    return [("title" if "font-weight: 700" in e.get("style") else "label", e.text) for e in texts]


class Page(HTMLParser):
    """Collects texts and tags; fails on tags that do not pair."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def write_answers(path, right, rows=4, text="甲_组成_乙", wrong="甲_部件故障_乙"):
    with open(path, "w") as file:
        for i in range(rows):
            each = {"instruction": "抽取", "input": f"第{i}行", "output": text}
            file.write(json.dumps({**each, "prediction": text if i in right else wrong, "ended": i != 3}) + "\n")
    return path.name


@pytest.fixture
def runs(tmp_path):
    """base 1 of 4 right; lora 3 and 4 of 4 right with seeds 1 and 2; all failed."""

    def run(method, seed, right, **more):
        name = write_answers(tmp_path / f"{method}-{seed}.jsonl", right)
        return {"mode": "glm3", "method": method, "seed": seed, "status": "done", "predictions": name, **more}

    cost = {"learning_rate": 2e-3, "seconds": 60, "tokens_per_second": 1000, "memory_gib": 0.5, "trained": 10}
    cost |= {"parameters": 1000, "output_bytes": 3_000_000, "commands": {"train": "python train.py"}}
    cost |= {"curve": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]}
    cost["validation"] = [{"step": 3, "loss": 1.5, "scores": {"f1": 0.5}}, {"step": 6, "loss": 1.2, "f1": 0.75}]
    return [
        run("base", None, {0}),
        run("lora", 1, {0, 1, 2}, **cost, forgetting={"chat": 0.25, "code": 0.75}),
        run("lora", 2, {0, 1, 2, 3}, **cost | {"seconds": 80}, forgetting={"chat": 0.75, "code": 1.25}),
        {"mode": "glm3", "method": "all", "seed": 1, "status": "failed", "error": HOSTILE, "predictions": "none"},
    ]


def test_tables_have_the_runs_figures(runs, tmp_path):
    (family,) = evaluate(tmp_path, runs)
    base, lora = family.methods
    assert (family.kind, family.measure) == ("triples", "f1")
    assert base.mean == 0.25 and lora.seeds == [0.75, 1.0]
    low, high = bootstrap([1, 1, 1, 0.5], seed=0)
    quality = dict(zip(tables.quality_table(family).columns, tables.quality_table(family).rows[1], strict=True))
    assert quality["F1"] == "0.8750" and quality["± over seeds"] == f"{np.std([0.75, 1], ddof=1):.4f}"
    assert quality["95 % over rows"] == f"{low:.4f} to {high:.4f}"
    assert quality["precision"] == quality["recall"] == "0.8750" and quality["end by themselves"] == "75%"
    (cost,) = tables.cost_table(family).rows
    assert cost == ["lora", "0.002", "70", "1000", "0.50", "10", "1.00%", "3.00"]
    (difference,) = tables.difference_table(family).rows
    low, high = bootstrap([0, 1, 1, 0.5], seed=0)
    assert difference == ["lora over base", "0.6250", f"{low:.4f} to {high:.4f}", "yes" if low > 0 else "not shown"]
    assert tables.relation_table(family).columns == ["method", "组成 (4)"]
    # all predicted right but one in seed 1: F1 of 3 right of 3 said and 4 expected, mean with 1
    assert tables.relation_table(family).rows[1] == ["lora", f"{(2 * 0.75 / 1.75 + 1) / 2:.4f}"]
    (forgetting,) = tables.forgetting_table(family).rows
    assert forgetting == ["lora", "+0.500", "+1.000", "+0.750"]


def test_files_of_a_report(runs, tmp_path):
    path, _ = write_report(str(tmp_path), runs, {"data": "rows.json"})
    found = Page(Path(path).read_text())
    images = [value for name, value in found.attributes if name == "src"]
    # scores, three curves, forgetting against gain
    assert len(images) == 5 and all(uri.startswith("data:image/svg+xml;base64,") for uri in images)
    assert [dict(svg_texts(uri))["title"] for uri in images] == [v for name, v in found.attributes if name == "alt"]
    assert not {"script", "link", "iframe", "svg", "style"} & set(found.tags[found.tags.index("body") :])
    assert not [value for name, value in found.attributes if name == "href"]
    assert "http" not in Path(path).read_text()
    for uri in images:  # nothing is loaded from elsewhere
        refers = [v for e in svg_of(uri).iter() for k, v in e.attrib.items() if k.endswith("href") or "url(" in v]
        assert all(v.startswith("#") or v.startswith("url(#") for v in refers)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(r["method"], r["seed"], r["value"], r["forgetting"]) for r in rows] == [
        ("base", "", "0.250000", ""),
        ("lora", "1", "0.750000", "0.5"),
        ("lora", "2", "1.000000", "1.0"),
    ]
    assert json.loads((tmp_path / "runs.json").read_text())["runs"][1]["seconds"] == 60
    markdown = (tmp_path / "report.md").read_text()
    assert "| lora | 0.8750 | 0.1768 |" in markdown and "rows.json" in markdown


def test_hostile_data_stays_data(runs, tmp_path):
    for run in runs[:3]:
        write_answers(tmp_path / run["predictions"], {0}, text=f"甲_{HOSTILE}_乙", wrong=HOSTILE)
        run |= {"method": run["method"] + HOSTILE, "commands": {"train": HOSTILE}}
    sweep = [{"mode": HOSTILE, "method": HOSTILE, "learning_rate": 1.0, "score": 0.5, "chosen": True}]
    path, _ = write_report(str(tmp_path), runs, {HOSTILE: HOSTILE}, sweep, title=HOSTILE)
    found = Page(Path(path).read_text())
    assert not {"script", "svg"} & set(found.tags)
    assert "".join(found.texts).count(HOSTILE) > 20  # shown, as it is
    names = svg_texts(next(value for name, value in found.attributes if name == "src"))
    assert ("label", 'base<script>alert("1"…') in names
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| lora")]
    assert widths and all(widths)


def test_samples_show_right_and_wrong_answers_of_the_best_method(runs, tmp_path):
    runs[2]["predictions"] = runs[1]["predictions"]  # three of four right
    (family,) = evaluate(tmp_path, runs)
    shown = pick_samples(family)
    assert [row["input"] for row, _ in shown] == ["第0行", "第1行", "第2行", "第3行"]
    assert shown[0][1] == [("base, lora", "甲_组成_乙", 1.0)]
    assert shown[1][1] == [("lora", "甲_组成_乙", 1.0), ("base", "甲_部件故障_乙", 0.0)]
    assert shown[3][1] == [("base, lora", "甲_部件故障_乙", 0.0)]


def test_of_a_half_right_answer_the_right_lines_stand_out():
    row = {"input": "甲", "output": "甲_组成_乙\n丙_组成_丁"}
    answers = [SampleAnswer("lora", "甲_组成_乙\n<戊>", 0.5), SampleAnswer("all", "丙_组成_丁 \n甲_组成_乙", 1.0)]
    half, full = page.sample_values(row, answers, 1.0)["answers"]
    half, full = ([(line["mark"], line["text"]) for line in answer["lines"]] for answer in (half, full))
    assert half == [("right", "甲_组成_乙"), ("wrong", "<戊>")]
    assert full == [("right", "丙_组成_丁 "), ("right", "甲_组成_乙")]


def test_the_page_keeps_the_lines_of_an_answer_as_they_are(runs, tmp_path):
    for run in runs[:3]:
        write_answers(tmp_path / run["predictions"], {0}, text="甲_组成_乙\n丙_组成_丁", wrong="  甲_组成_乙 \n<戊>")
    text = Path(write_report(str(tmp_path), runs, {})[0]).read_text()
    lines = '<span class="wrong">  甲_组成_乙 </span>\n<span class="wrong">&lt;戊&gt;</span>   (0.50)</td>'
    assert "<td>" + lines.replace('"wrong">  甲', '"right">  甲') in text


def test_other_kinds_of_answers_and_runs_without_any(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(4):
            each = {"instruction": "", "input": str(i), "output": ["轮胎多久换？", "何时换轮胎？"], "ended": True}
            file.write(json.dumps(each | {"prediction": "轮胎多久换？"}) + "\n")
    run = {"mode": "glm", "method": "lora", "seed": 1, "status": "done", "predictions": "a.jsonl"}
    write_report(str(tmp_path), [run], {})
    assert "| points |" in (tmp_path / "report.md").read_text()
    failed = run | {"status": "failed", "error": "no luck"}
    Page(Path(write_report(str(tmp_path), [failed], {})[0]).read_text())
    assert "glm lora seed 1: failed. no luck" in (tmp_path / "report.md").read_text()


def test_answers_of_other_rows_or_no_answers_are_refused(runs, tmp_path):
    write_answers(tmp_path / runs[1]["predictions"], {0}, rows=3)
    with pytest.raises(UserError, match=r"lora-1.jsonl answers other rows"):
        write_report(str(tmp_path), runs, {})
    (tmp_path / runs[1]["predictions"]).write_text('{"output": "x"}\n')
    with pytest.raises(UserError, match=r"lora-1.jsonl, line 1: instruction is not a text"):
        write_report(str(tmp_path), runs, {})


ROW = {"instruction": "抽取", "input": "甲", "output": "甲_组成_乙", "prediction": "", "ended": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [({"prediction": None}, "prediction is not a text"), ({"ended": "x"}, "ended is not true or false")]
    + [({"input": value}, "input is not a text") for value in (3, None)]
    + [({"output": value}, "output is neither") for value in ([], 5, ["a", None], {})]
    + [({"output_as_written": [1]}, "output_as_written is neither")],
)
def test_rows_of_wrong_types_are_named(tmp_path, change, said):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | change)}\n")
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {said}"):
        read_answers(str(path))


@pytest.mark.parametrize(
    ("line", "said"),
    [(b"[1]", "it is not a JSON object"), (b"[" * 100_000, "it is nested too deeply"), (b"\xff", "it is not JSON")]
    + [(b"", "it is not JSON"), (json.dumps({k: v for k, v in ROW.items() if k != "output"}).encode(), "no reference")],
    ids=["list", "deep", "bytes", "empty", "mixed"],
)
def test_lines_that_are_no_answers_are_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {said}"):
        read_answers(str(path))


@pytest.mark.parametrize("name", ["log.jsonl", "validation.jsonl"])
def test_lines_of_a_training_that_are_none_are_named(tmp_path, name):
    for line in ('{"step": 1}', '{"step": "1", "loss": 1}', '{"step": 1, "loss": "x"}', "[]", "{"):
        (tmp_path / name).write_text(f'{{"step": 1, "loss": null}}\n{line}\n')
        with pytest.raises(UserError, match=f"{name}, line 2: "):
            read_curves(str(tmp_path))
    (tmp_path / name).write_text('{"step": 1, "loss": 1, "scores": []}\n')
    with pytest.raises(UserError, match="scores is not an object"):
        read_curves(str(tmp_path))


def test_a_report_claims_nothing_it_cannot_know(tmp_path, capsys):
    write_answers(tmp_path / "a.jsonl", {0})
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n')
    flags = ["--mode", "glm3", "--output_dir", str(tmp_path / "out"), "--run"]
    report.main([*flags, f"lora={tmp_path}/a.jsonl,{tmp_path}"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "seed" not in page and "did not see" not in page and "some of them is not known" in page
    with pytest.raises(SystemExit):
        report.main([*flags, f"a={tmp_path}/a.jsonl", "--run", f"a={tmp_path}/a.jsonl"])
    assert "--run a=... is given 2 times" in capsys.readouterr().err
    record = {"format": 1, "settings": {"--mode": "glm2"}, "rows": 4, "model": "m"}
    (tmp_path / "a.jsonl.run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        report.main([*flags, f"lora={tmp_path}/a.jsonl"])
    assert "answers of --mode glm2, not of --mode glm3" in capsys.readouterr().err


def test_rows_of_another_instruction_are_other_rows(runs, tmp_path):
    path = tmp_path / runs[1]["predictions"]
    path.write_text("".join(json.dumps(row | {"instruction": "翻译"}) + "\n" for row in map(json.loads, path.open())))
    with pytest.raises(UserError, match="answers other rows"):
        evaluate(tmp_path, runs)


def test_control_characters_and_empty_texts_can_be_seen(tmp_path, capsys):
    rows = [
        {"instruction": "只有指令\x1b[2J", "input": " ", "output": "", "prediction": "\n", "ended": True},
        {"instruction": "", "input": "问\x00\x9b", "output": "答", "prediction": "\x1b[31m\ud800", "ended": True},
        {"instruction": "", "input": "[x](javascript:a) `b` \\|", "output": "答", "prediction": "", "ended": True},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "名\x1b]0;\x07"
    report.main(
        ["--mode", "glm3", "--output_dir", str(tmp_path), "--title", name, "--run", f"{name}={tmp_path}/a.jsonl"]
    )
    texts = {file: (tmp_path / file).read_text() for file in ("report.html", "report.md", "results.csv")}
    texts["terminal"] = capsys.readouterr().out
    for text in texts.values():
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text) and r"\x1b" in text
    Page(texts["report.html"])
    for where in ("report.html", "report.md", "terminal"):
        # reference and answer of the first row, answer of the third one
        assert texts[where].count("(empty)") == 3 and "只有指令" in texts[where]
    assert "[x]" not in texts["report.md"] and "&#91;x](javascript:a) &#96;b&#96; &#92;&#124;" in texts["report.md"]
    assert json.loads((tmp_path / "runs.json").read_text())["runs"][0]["method"] == name


def test_curves_are_read_from_a_training(tmp_path):
    assert read_curves(str(tmp_path)) == {"curve": [], "validation": []}
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')  # a line under way
    (tmp_path / "validation.jsonl").write_text('{"step": 1, "loss": 2.5, "scores": {"f1": 0.1}}\n')
    found = read_curves(str(tmp_path))
    assert found["curve"] == [{"step": 1, "loss": 2.0}] and found["validation"][0]["scores"] == {"f1": 0.1}


def drawn(chart, *args):
    """The axes of a chart, before it becomes an SVG."""
    return chart.__wrapped__(*args).axes[0]


def test_curves_are_thin_and_their_mean_is_bold():
    curves = [[(0, 1), (5, float("nan")), (10, 3)], [(0, 3), (10, 5)]]
    axes = drawn(charts.line_chart, "t", "x", "y", {"a": curves, "b": []}, {"a": "red"})
    lines = {line.get_linewidth(): line for line in axes.lines}
    assert len(axes.lines) == 3 and all(line.get_color() == "red" for line in axes.lines)
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 3], [3, 5], [2, 4]]
    assert list(lines[max(lines)].get_ydata()) == [2, 4]
    assert (axes.get_title("left") or axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("t", "x", "y")
    apart = [[(0, 1), (10, 3)], [(0, 3), (9, 5)]]  # curves over other steps have no mean
    assert len(drawn(charts.line_chart, "t", "x", "y", {"a": apart}, {"a": "red"}).lines) == 2


def test_intervals_and_points_are_where_they_belong():
    rows = [charts.Interval("甲", 0.5, 0.4, 0.6, [0.45, 0.55]), charts.Interval("b", 0.2, 0.1, 0.3, [0.2])]
    axes = drawn(charts.interval_chart, "t", "x", rows, {"甲": "red", "b": "blue"})
    bar, ticks, dot = axes.lines[:3]
    assert list(bar.get_xdata()) == [0.4, 0.6] and list(ticks.get_xdata()) == [0.45, 0.55]
    assert list(dot.get_xdata()) == [0.5] and {line.get_color() for line in axes.lines[:3]} == {"red"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["甲", "b"]
    top, bottom = (axes.transData.transform((0, at))[1] for at in (0, 1))
    assert top > bottom  # the first row is the upper one
    axes = drawn(charts.scatter_chart, "t", "x", "y", {"a": [(1.0, 2.0), (3.0, float("inf"))]}, {"a": "red"})
    assert axes.collections[0].get_offsets().tolist() == [[1.0, 2.0]]
    zeros = [(set(line.get_xdata()), set(line.get_ydata())) for line in axes.lines]
    assert zeros[0][1] == {0} and zeros[1][0] == {0}


def test_charts_without_data_are_left_out():
    assert charts.line_chart("t", "x", "y", {"a": [[(0, float("nan"))]], "b": []}, {}) is None
    assert charts.scatter_chart("t", "x", "y", {"a": [(1, float("inf"))]}, {}) is None
    assert charts.interval_chart("t", "x", [], {}) is None


@pytest.mark.filterwarnings("error")
def test_a_name_in_a_chart_is_text_of_the_browser_and_fits():
    """No font of matplotlib has Chinese characters, and a $ must not begin a formula."""
    names = ["甲的方法", "a$b$", "x" * 40, "长" * 40, "bad\x00\uffff\n\ud800"]
    rows = [charts.Interval(name, 0.5, 0.4, 0.6, [0.5]) for name in names]
    chart = charts.interval_chart("t", "x", rows, dict.fromkeys(names, "red"))
    texts = [text for _, text in svg_texts(chart.uri)]
    for shown in ("甲的方法", "a$b$", "x" * 21 + "…", "长" * 10 + "…", r"bad\x00 \ud800"):
        assert shown in texts
    assert chart == charts.interval_chart("t", "x", rows, dict.fromkeys(names, "red"))  # the same file each time
    left = drawn(charts.interval_chart, "t", "x", rows, dict.fromkeys(names, "red")).get_position().x0 * chart.width
    assert left > 22 * 5  # room for 22 half-width characters


def test_a_report_goes_into_a_new_folder(tmp_path, capsys):
    write_answers(tmp_path / "a.jsonl", {0, 1, 2})
    report.main(
        ["--mode", "glm3", "--output_dir", str(tmp_path / "new" / "report"), "--run", f"lora={tmp_path}/a.jsonl"]
    )
    assert "F1 0.7500" in capsys.readouterr().out
    assert (tmp_path / "new" / "report" / "report.html").is_file()


def write_training(folder, rows):
    """What a report reads of a training on a file: run.json, and a log."""
    folder.mkdir()
    lines = [{"instruction": "抽取", "input": f"第{i}行", "output": "甲_组成_乙"} for i in rows]
    (folder / "rows.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"folder": str(folder), "flags": {"train_path": "rows.json"}, "command": "python train.py"}
    (folder / "run.json").write_text(json.dumps({"format": 1, "starts": [start]}))
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        (range(2, 9), "Warning: training saw 2 of them in that of lora: such scores say nothing about unseen rows."),
        (range(4, 9), "No row of the training files asks the same."),
        (None, "Whether training saw some of them is not known."),
    ],
)
def test_a_report_claims_of_unseen_rows_what_it_knows(tmp_path, capsys, trained_on, said):
    write_answers(tmp_path / "a.jsonl", {0, 1, 2})
    training = tmp_path / "training"
    if trained_on:
        write_training(training, trained_on)
    run = f"lora={tmp_path}/a.jsonl" + f",{training}" * bool(trained_on)
    report.main(["--mode", "glm3", "--output_dir", str(tmp_path / "report"), "--run", run])
    assert said in capsys.readouterr().out.splitlines()
    assert said in (tmp_path / "report" / "report.md").read_text()
    (training / "rows.json").unlink(missing_ok=True)  # or the file is gone
    if trained_on:
        assert count_seen(str(training), str(tmp_path / "a.jsonl")) is None


def test_an_empty_answer_is_shown_as_one(tmp_path, capsys):
    write_answers(tmp_path / "a.jsonl", {0}, wrong="")
    report.main(["--mode", "glm3", "--output_dir", str(tmp_path / "report"), "--run", f"lora={tmp_path}/a.jsonl"])
    assert "lora: (empty)   (F1 0.00)" in capsys.readouterr().out
    for name in ("report.html", "report.md"):
        assert "(empty)" in (tmp_path / "report" / name).read_text()
