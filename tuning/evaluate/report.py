"""A report on trained models: how good, how sure, how costly; curves, forgetting, answers beside references.

    python -m tuning.evaluate.report --output_dir output/report --mode glm3 --run base=base.jsonl \\
        --run lora=lora.jsonl,output/lora

compare.py writes its report with this module; by itself it takes predict.py's answers (and training folders,
for curves) of models that were trained one by one. A page of its own (report.html: no script, nothing loaded from
elsewhere), the same as report.md and results.csv, and runs.json with all that is in them.
"""

import argparse
import csv
import importlib.metadata
import io
import json
import os
import platform
from collections import Counter, defaultdict
from html import escape
from typing import NamedTuple

from glm_models import MODE
from tuning.arguments.parser import NewPath, Parser, Text, answer_early


class Run:
    """NAME=ANSWERS or NAME=ANSWERS,TRAINING; the value is the three of them, the last one "" if it is not there."""

    metavar = "NAME=ANSWERS[,TRAINING]"

    def __call__(self, text: str) -> tuple[str, str, str]:
        name, _, paths = text.partition("=")
        answers, _, training = paths.partition(",")
        if not name or not answers:
            raise ValueError("NAME=ANSWERS or NAME=ANSWERS,TRAINING is needed")
        if training and not os.path.isdir(training):
            raise ValueError(f"{training}: no such folder")
        return name, answers, training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError: see Parser.parse_args."""
    parser = Parser(__doc__)
    group = parser.group("report")
    group.add_argument("--mode", choices=MODE, required=True, help="model family: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B")
    group.add_argument(
        "--run", type=Run(), nargs="repeat", required=True,
        help="a model: its name, the answers of predict.py, and the output_dir of its training if there is one; "
        "once for each model",
    )  # fmt: skip
    group.add_argument("--title", type=Text(), default="Report", help="headline of the page")
    group.add_argument("--output_dir", type=NewPath(), required=True, help="folder for the report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_args)

import numpy as np

from tuning.errors import UserError
from tuning.evaluate.charts import COLOURS, interval_chart, legend, line_chart, scatter_chart
from tuning.evaluate.inputs import count_seen, point, read_answers, read_commands, read_curves
from tuning.exits import clear_errors
from tuning.folders import write_errors, write_file
from tuning.metrics import HEADLINE, bootstrap, kind_of, references_of, relation_scores, row_scores, score
from tuning.terminal import visible

PACKAGES = ("torch", "transformers", "deepspeed", "peft")
BESIDE = {"triples": ("precision", "recall"), "questions": ("accuracy_points", "diversity_points")}
BESIDE |= {"classes": ("macro_f1",), "text": ("rouge_1", "rouge_2", "bleu_4", "exact_match")}
NAMES = {"f1": "F1", "question_points": "points", "rouge_l": "ROUGE-L", "exact_match": "exact match"}
EMPTY = "(empty)"  # in the place of an answer without text
SHOWN_ROWS = 8  # rows of the test file whose answers are shown


# ---- scores


def headline(kind: str, rows: dict) -> str:
    """The score to compare by, among those that there are (ROUGE needs packages)."""
    return HEADLINE[kind] if HEADLINE[kind] in rows else "exact_match"


def mean_score(path: str) -> float:
    """The headline score of a file of answers."""
    _, predictions, references, _ = read_answers(path)
    kind = kind_of(references)
    scores = row_scores(kind, predictions, references)
    return float(np.mean(scores[headline(kind, scores)]))


class Method(NamedTuple):
    """A method's runs of one mode, evaluated.

    rows: (rows,) headline scores of the test rows, mean over seeds. seeds: headline score of each seed.
    """

    name: str
    runs: list[dict]
    rows: np.ndarray
    seeds: list[float]
    scores: dict[str, float]
    answers: list[str]  # of the first seed
    relations: dict[str, dict[str, float]]

    @property
    def mean(self) -> float:
        return float(np.mean(self.seeds))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); NaN for one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else float("nan")

    def average(self, key: str) -> float | None:
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return float(np.mean(values)) if values else None


class Table(NamedTuple):
    """A heading, column names, rows of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Family(NamedTuple):
    """All that is shown of one mode."""

    mode: str
    kind: str
    measure: str  # headline score
    methods: list[Method]
    rows: list[dict]  # the test rows

    @property
    def label(self) -> str:
        """The headline score, for readers."""
        return NAMES.get(self.measure, self.measure)

    @property
    def seeded(self) -> bool:
        """Whether it is known which seeds these runs had."""
        return any(run.get("seed") is not None for method in self.methods for run in method.runs)


def what_is_asked(row: dict) -> tuple:
    """What two models must have in common to be compared on a row."""
    return row["instruction"], row["input"], row["output"]


def evaluate(folder: str, runs: list[dict]) -> list[Family]:
    """Score the runs that are done.

    Args:
        folder: the runs' predictions are relative to it.
        runs: dicts with mode, method, seed, status and predictions; the rest is optional.

    Raises:
        UserError: predictions that cannot be read, or are of different rows.
    """
    families = []
    for mode in dict.fromkeys(run["mode"] for run in runs):
        methods, test = [], None
        for name in dict.fromkeys(run["method"] for run in runs if run["mode"] == mode):
            chosen = [r for r in runs if (r["mode"], r["method"], r["status"]) == (mode, name, "done")]
            each = []
            for run in chosen:
                path = os.path.normpath(os.path.join(folder, run["predictions"]))  # the folder may not be there yet
                rows, predictions, references, ended = read_answers(path, mode)
                if test is None:
                    test, kind = rows, kind_of(references)
                if [*map(what_is_asked, rows)] != [*map(what_is_asked, test)]:
                    raise UserError(f"{path} answers other rows than the runs before it")
                scores = row_scores(kind, predictions, references)
                measure = headline(kind, scores)
                relations = relation_scores(predictions, references) if kind == "triples" else {}
                each.append((scores[measure], score(kind, predictions, references, ended), predictions, relations))
            if each:
                values, scores, predictions, relations = zip(*each, strict=True)
                scores = {key: float(np.mean([s[key] for s in scores])) for key in scores[0]}
                f1 = {
                    key: {"f1": float(np.mean([r.get(key, {"f1": 0.0})["f1"] for r in relations]))} | {"expected": n}
                    for key, n in ((key, row["expected"]) for key, row in relations[0].items() if row["expected"])
                }
                rows, seeds = np.mean(values, axis=0), [float(np.mean(v)) for v in values]
                methods.append(Method(name, chosen, rows, seeds, scores, predictions[0], f1))
        if methods:
            families.append(Family(mode, kind, measure, methods, test))
    return families


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plural(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def quality_table(family: Family) -> Table:
    beside = [name for name in BESIDE[family.kind] if name in family.methods[0].scores]
    spread = ["± over seeds"] if family.seeded else []
    columns = ["method", family.label, *spread, "95 % over rows", *beside, *["seeds"][: len(spread)]]
    rows = []
    for method in family.methods:
        low, high = bootstrap(list(method.rows), seed=0)
        cells = [method.name, number(method.mean)]
        cells += ["" if np.isnan(method.spread) else number(method.spread)] if spread else []
        cells += [f"{low:.4f} to {high:.4f}", *(number(method.scores[name]) for name in beside)]
        cells += [str(len(method.seeds))] if spread else []
        rows.append([*cells, f"{method.scores['ended']:.0%}"])
    return Table("Quality", [*columns, "end by themselves"], rows)


def cost_table(family: Family) -> Table | None:
    columns = ["method", "learning rate", "training s", "tokens/s", "peak memory GiB", "parameters trained", "share"]
    rows = []
    for method in family.methods:
        if method.average("trained") is None:
            continue
        trained, share = method.average("trained"), method.average("trained") / method.average("parameters")
        rate = method.average("learning_rate")
        rows.append(
            [method.name, "" if rate is None else f"{rate:g}", number(method.average("seconds"), 0)]
            + [number(method.average("tokens_per_second"), 0), number(method.average("memory_gib"), 2)]
            + [f"{trained:,.0f}", f"{share:.2%}", f"{method.average('output_bytes') / 1e6:,.2f}"]
        )
    return Table("Cost", [*columns, "result MB"], rows) if rows else None


def difference_table(family: Family) -> Table | None:
    """Every two methods: the difference of their means, and its paired bootstrap interval over the test rows."""
    rows = []
    order = sorted(family.methods, key=lambda method: -method.mean)
    for i, better in enumerate(order):
        for other in order[i + 1 :]:
            low, high = bootstrap(list(better.rows - other.rows), seed=0)
            verdict = "yes" if low > 0 else "not shown"
            rows.append([f"{better.name} over {other.name}", number(better.mean - other.mean)])
            rows[-1] += [f"{low:.4f} to {high:.4f}", verdict]
    return (
        Table("Differences", ["better method", "difference", "95 % over rows, paired", "beyond chance"], rows)
        if rows
        else None
    )


def relation_table(family: Family) -> Table | None:
    if family.kind != "triples":
        return None
    names = list(family.methods[0].relations)
    rows = [
        [method.name, *(number(method.relations.get(name, {}).get("f1")) for name in names)]
        for method in family.methods
    ]
    expected = [family.methods[0].relations[name]["expected"] for name in names]
    columns = [f"{name} ({count:.0f})" for name, count in zip(names, expected, strict=True)]
    return Table("F1 by relation (triples expected)", ["method", *columns], rows)


def forgetting_table(family: Family) -> Table | None:
    rows, names = [], []
    for method in family.methods:
        each = [run["forgetting"] for run in method.runs if run.get("forgetting")]
        if each:
            names = names or list(each[0])
            values = {name: float(np.mean([one[name] for one in each])) for name in names}
            rows.append([method.name, *(f"{values[name]:+.3f}" for name in names)])
            rows[-1].append(f"{np.mean(list(values.values())):+.3f}")
    title = "Forgetting: rise of the negative log-likelihood, nats per answer token"
    return Table(title, ["method", *names, "mean"], rows) if rows else None


def tables(family: Family) -> list[Table]:
    makers = (quality_table, difference_table, cost_table, relation_table, forgetting_table)
    return [table for maker in makers if (table := maker(family)) is not None]


def forgotten(run: dict) -> float:
    """Mean over the categories of a run's forgetting, nats per answer token; NaN if it was not measured."""
    return float(np.mean(list(run["forgetting"].values()))) if run.get("forgetting") else float("nan")


def samples(family: Family) -> list[tuple[dict, list[tuple[str, str, float]]]]:
    """Rows of the test file, half of them answered wrongly by the best method if there are so many.

    Returns:
        (row, [(methods' names, their answer, its score)]) by first seeds; methods of the same answer together.
    """
    best = max(family.methods, key=lambda method: method.mean)
    references = [references_of(row) for row in family.rows]
    values = {m.name: row_scores(family.kind, m.answers, references)[family.measure] for m in family.methods}
    top = max(max(each) for each in values.values())
    order = sorted(range(len(family.rows)), key=lambda i: (np.var([v[i] for v in values.values()]) == 0, i))
    wrong = [i for i in order if values[best.name][i] < top][: SHOWN_ROWS // 2]
    right = [i for i in order if values[best.name][i] >= top][: SHOWN_ROWS - len(wrong)]
    shown = []
    for i in sorted([*wrong, *right]):
        answers = defaultdict(list)
        for method in family.methods:
            answers[method.answers[i], values[method.name][i]].append(method.name)
        each = [(", ".join(names), text, value) for (text, value), names in answers.items()]
        shown.append((family.rows[i], sorted(each, key=lambda one: -one[2])))
    return shown


# ---- charts


def charts(family: Family, colours: dict[str, str]) -> list[str]:
    rows = []
    for method in family.methods:
        rows.append((method.name, method.mean, *bootstrap(list(method.rows), seed=0), method.seeds))
    base = next((method for method in family.methods if method.name == "base"), None)
    measure = family.measure

    def curves(key, value):
        return {
            method.name: [[(at["step"], value(at)) for at in run.get(key) or ()] for run in method.runs]
            for method in family.methods
        }

    def loss(at):
        return point(at["loss"])

    drawn = [
        interval_chart(f"{family.label} on the rows answered", family.label, rows, colours),
        line_chart("Training loss", "optimiser step", "loss", curves("curve", loss), colours),
        line_chart("Validation loss", "optimiser step", "loss", curves("validation", loss), colours),
    ]
    scored = curves("validation", lambda at: point((at.get("scores") or at).get(measure)))
    drawn.append(line_chart(f"Validation {family.label}", "optimiser step", family.label, scored, colours))
    if base:
        points = {
            method.name: [
                (value - base.mean, forgotten(run)) for run, value in zip(method.runs, method.seeds, strict=True)
            ]
            for method in family.methods
            if method is not base
        }
        drawn.append(
            scatter_chart(
                "Forgetting against gain", f"gain in {family.label}", "forgetting, nats per token", points, colours
            )
        )
    return [chart for chart in drawn if chart]


# ---- the report's files


STYLE = """
body{font:15px/1.5 system-ui,"Noto Sans CJK SC","Microsoft YaHei",sans-serif;color:#222;background:#fff;
max-width:1240px;margin:24px auto;padding:0 20px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:21px;border-bottom:2px solid #0072b2;padding-bottom:4px;margin:36px 0 12px}
h3{font-size:16px;margin:22px 0 6px} .note{color:#555}
table{border-collapse:collapse;font-size:14px} .wide{overflow-x:auto}
th,td{padding:4px 12px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{background:#f3f6f9;font-weight:600} th:first-child,td:first-child{text-align:left}
tr.best td{background:#eaf5ef;font-weight:600}
.charts{display:flex;flex-wrap:wrap;gap:8px} svg{border:1px solid #e6e6e6;border-radius:6px;background:#fff}
svg .title{font:600 13px system-ui,sans-serif;fill:#222} svg .label{font:11px system-ui,sans-serif;fill:#444}
.legend span{margin-right:16px}
.legend i{display:inline-block;width:14px;height:10px;border-radius:2px;margin-right:5px}
.sample{border:1px solid #ddd;border-radius:6px;padding:8px 14px;margin:10px 0}
.sample td,.sample th{border:0;background:none;padding:2px 12px 2px 0;
white-space:pre-wrap;text-align:left;vertical-align:top}
.sample th{color:#555;width:150px} .right{color:#00703c} .wrong{color:#b3261e} .failed{color:#b3261e}
pre{white-space:pre-wrap;word-break:break-all;background:#f6f6f6;padding:10px;border-radius:6px;font-size:12.5px}
"""


def html_table(table: Table, best: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    lines = []
    for row in table.rows:
        mark = ' class="best"' if best and row[0] == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    body = "".join(lines)
    return f'<h3>{escape(table.title)}</h3><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def shown_text(text: str) -> str:
    """A text for readers: one without a visible character is told from nothing at all."""
    return text if text.strip() else EMPTY


def shown_input(row: dict) -> str:
    """What a row asks: its input, or its instruction where that is all."""
    return row["input"] if row["input"].strip() else shown_text(row["instruction"])


def html_sample(row: dict, answers: list[tuple[str, str, float]], top: float) -> str:
    references = references_of(row)
    expected = {line.strip() for text in references for line in text.split("\n")}

    def marked(text: str, value: float) -> str:
        """Line by line: of a half right answer those that are right stand out."""
        lines = []
        for line in shown_text(text).split("\n"):
            kind = "right" if value >= top or line.strip() in expected else "wrong"
            lines.append(f'<span class="{kind}">{escape(line)}</span>')
        return "\n".join(lines) + f"   ({value:.2f})"

    lines = [("input", escape(shown_input(row)))]
    lines.append(("reference", escape("\nor ".join(map(shown_text, references)))))
    lines += [(escape(names), marked(text, value)) for names, text, value in answers]
    cells = "".join(f"<tr><th>{a}</th><td>{b}</td></tr>" for a, b in lines)
    return f'<div class="sample"><table>{cells}</table></div>'


def title_of(mode: str) -> str:
    return f"Architecture of {MODE[mode].config.title}" if mode in MODE else mode


def describe_seen(families: list[Family]) -> str:
    """What is known of test rows that training saw too: from `seen` of the runs, see `count_seen`."""
    runs = [(method.name, run) for family in families for method in family.methods for run in method.runs]
    if told := {name: run["seen"] for name, run in runs if run.get("seen")}:
        which = ", ".join(f"{count} of them in that of {name}" for name, count in told.items())
        return f"Warning: training saw {which}: such scores say nothing of unseen rows."
    known = [run.get("seen") for name, run in runs if name != "base"]
    if known and None not in known:
        return "No row of the training files asks the same."
    return "Whether training saw some of them is not known."


def notes(families: list[Family]) -> list[str]:
    """How the figures were made, for readers of tables. Nothing that the files do not tell."""
    some = families[0]
    runs = [run for family in families for method in family.methods for run in method.runs]
    seeds = any(family.seeded for family in families)
    lines = [
        f"Scores: {some.label}, the mean over {plural(len(some.rows), 'row')} that all models answered. "
        + describe_seen(families)
        + (" ± is the standard deviation over seeds." if seeds else "")
        + " The interval is a bootstrap over the rows"
        + (" (scores averaged over seeds). " if seeds else ". ")
        + "A difference is beyond chance where the paired bootstrap's interval leaves out 0; many pairs are compared, "
        "so take single ones with care."
    ]
    if any(run.get("trained") for run in runs):
        lines.append(
            "Costs are means over seeds. Memory is a GPU's where one was used, else the process's main memory."
        )
    return lines


def describe_failures(runs: list[dict]) -> list[str]:
    return [
        f"{run['mode']} {run['method']}" + ("" if run.get("seed") is None else f" seed {run['seed']}")
        + f": {run['status']}. {run.get('error', '')}"
        for run in runs
        if run["status"] != "done"
    ]  # fmt: skip


def html_report(families, runs, settings, versions, sweep, title) -> str:
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
    ]
    parts += [f'<p class="note">{escape(line)}</p>' for line in notes(families)] if families else []
    parts += [f'<p class="failed">{escape(line)}</p>' for line in describe_failures(runs)]
    names = dict.fromkeys(method.name for family in families for method in family.methods)
    palette = iter(COLOURS)
    colours = {name: "#666666" if name == "base" else next(palette, "#666666") for name in names}
    for family in families:
        best = max(family.methods, key=lambda method: method.mean)
        seeds = {run["seed"] for run in runs if run["mode"] == family.mode} - {None}
        count = f" <small>({plural(len(seeds), 'seed')})</small>" if seeds else ""
        parts.append(f"<h2>{escape(title_of(family.mode))}{count}</h2>{legend(colours)}")
        parts.append(f'<div class="charts">{"".join(charts(family, colours))}</div>')
        parts += [html_table(table, best.name if table.title == "Quality" else "") for table in tables(family)]
        shown = samples(family)
        top = max(value for _, answers in shown for *_, value in answers)
        parts.append("<h3>Answers beside references" + " (of the first seed)" * (len(seeds) > 1) + "</h3>")
        parts += [html_sample(row, answers, top) for row, answers in shown]
    if sweep:
        parts += ["<h2>Sweep of learning rates</h2>", html_table(sweep_table(sweep))]
    parts.append("<h2>How this was made</h2>")
    parts.append(
        html_table(Table("Settings", ["setting", "value"], [list(item) for item in (settings | versions).items()]))
    )
    for run in runs:
        if run.get("commands"):
            seed = "" if run.get("seed") is None else f", seed {run['seed']}"
            commands = escape("\n".join(run["commands"].values()))
            name = escape(f"{run['mode']}, {run['method']}{seed}")
            parts.append(f"<details><summary>{name}</summary><pre>{commands}</pre></details>")
    return "\n".join([*parts, "</body></html>\n"])


def sweep_table(sweep: list[dict]) -> Table:
    rows = [
        [row["mode"], row["method"], f"{row['learning_rate']:g}", number(row["score"]) or "failed"]
        + ["chosen" if row["chosen"] else ""]
        for row in sweep
    ]
    return Table("By the rows held out from training", ["mode", "method", "learning rate", "score", ""], rows)


# What means something in Markdown, or in a cell of its tables, and what shows it as it is.
MARKDOWN = (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("[", "&#91;"), ("`", "&#96;"), ("\\", "&#92;"))
MARKDOWN += (("\r\n", "<br>"), ("\n", "<br>"))


def markdown_cell(text: str) -> str:
    for character, shown in MARKDOWN:
        text = text.replace(character, shown)
    return text


def markdown_table(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    return [f"### {table.title}", "", *lines, ""]


def markdown_report(families, runs, settings, versions, sweep, title) -> str:
    lines = [f"# {markdown_cell(title)}", ""]
    for line in (notes(families) if families else []) + describe_failures(runs):
        lines += [markdown_cell(line), ""]
    for family in families:
        lines += [f"## {title_of(family.mode)}", ""]
        for table in tables(family):
            lines += markdown_table(table)
        rows = []
        for row, answers in samples(family):
            references = " / ".join(map(shown_text, references_of(row)))
            asked = shown_input(row)
            rows += [[asked, references, name, shown_text(text), f"{value:.2f}"] for name, text, value in answers]
        lines += markdown_table(Table("Answers", ["input", "reference", "methods", "answer", family.label], rows))
    if sweep:
        lines += ["## Sweep of learning rates", "", *markdown_table(sweep_table(sweep))]
    rows = [list(item) for item in (settings | versions).items()]
    lines += ["## How this was made", "", *markdown_table(Table("Settings", ["setting", "value"], rows))]
    return "\n".join(lines)


CSV_KEYS = ("learning_rate", "seconds", "tokens_per_second", "memory_gib", "trained", "parameters", "output_bytes")


def csv_report(families: list[Family]) -> str:
    """A line a run: its scores and costs."""
    file = io.StringIO()
    columns = ["mode", "method", "seed", "score", "value", *CSV_KEYS, "forgetting"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for family in families:
        for method in family.methods:
            for run, value in zip(method.runs, method.seeds, strict=True):
                cells = [run["mode"], run["method"], run.get("seed"), family.measure, f"{value:.6f}"]
                cells += [run.get(key) for key in CSV_KEYS]
                writer.writerow([*cells, forgotten(run) if run.get("forgetting") else None])
    return file.getvalue()


def write_report(folder: str, runs: list[dict], settings: dict[str, str], sweep: list[dict] | None = None,
                 title: str = "Comparison of tuning methods") -> tuple[str, list[Family]]:  # fmt: skip
    """Write report.html, report.md, results.csv and runs.json. Returns the page's path, and what is on it.

    Args:
        runs: see `evaluate`; beside what that needs: learning_rate, commands, what compare_methods.read_training
            gives, forgetting (category -> nats per token).
        settings: what to show of how the runs were made.
        sweep: see compare_methods.sweep_rates.

    Raises:
        UserError, FolderError: see `evaluate`; a file cannot be written.
    """
    families = evaluate(folder, runs)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores"}
    contents = (families, runs, settings, versions, sweep or [], title)
    files = {"report.html": html_report(*contents), "report.md": markdown_report(*contents)}
    files["results.csv"] = csv_report(families)
    kept = {"settings": settings, "versions": versions, "sweep": sweep or [], "runs": runs}
    files = {name: visible(text) for name, text in files.items()}  # answers may hold what terminals obey
    files["runs.json"] = json.dumps(kept, indent=1) + "\n"
    with write_errors(folder):
        os.makedirs(folder, exist_ok=True)
        for name, text in files.items():
            write_file(os.path.join(folder, name), text)
    return os.path.join(folder, "report.html"), families


# ---- the script


def summary(family: Family, rows: int = 4) -> list[str]:
    """The scores, and a few answers beside references, for a terminal."""
    lines = []
    for row, answers in samples(family)[:rows]:
        lines += [f"input:     {shown_input(row)}"]
        references = " / ".join(map(shown_text, references_of(row)))
        for name, text, value in [("reference", references, None), *answers]:
            said = shown_text(text).replace("\n", "; ")
            lines.append(f"  {name}: {said}" + ("" if value is None else f"   ({family.label} {value:.2f})"))
    for method in family.methods:
        low, high = bootstrap(list(method.rows), seed=0)
        lines.append(f"{method.name}: {family.label} {method.mean:.4f} (95 % interval {low:.4f} to {high:.4f})")
    return lines


def main(argv=None) -> None:
    with clear_errors():
        args = parse_args(argv)
        names = Counter(name for name, *_ in args.run)
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"--run {twice[0]}=... is given {names[twice[0]]} times: give each model a name of its own")
        runs = []
        for name, answers, training in args.run:
            run = {"mode": args.mode, "method": name, "seed": None, "status": "done"}
            run["predictions"] = os.path.relpath(answers, args.output_dir)
            if training:
                run |= read_curves(training) | {"commands": read_commands(training)}
                run["seen"] = count_seen(training, answers)
            runs.append(run)
        given = " ".join(f"{name}={answers}" + f",{training}" * bool(training) for name, answers, training in args.run)
        path, (family,) = write_report(args.output_dir, runs, {"runs": given}, title=args.title)
        print(*map(visible, summary(family)), describe_seen([family]), f"report: {path}", sep="\n")


if __name__ == "__main__":
    main()
