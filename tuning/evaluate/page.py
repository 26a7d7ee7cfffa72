"""The text of a report: report.html from the template beside this file, report.md, results.csv."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import jinja2

from glm_models import MODE
from tuning.evaluate.charts import COLOURS, Chart, Interval, interval_chart, line_chart, scatter_chart
from tuning.evaluate.inputs import point
from tuning.evaluate.scores import FamilyScores, SampleAnswer, mean_forgetting, pick_samples
from tuning.evaluate.tables import Table, family_tables, sweep_table
from tuning.metrics import references_of
from tuning.samples.formats import question_of

TEMPLATE = Path(__file__).with_name("report.html.jinja")
EMPTY = "(empty)"  # shown instead of an answer without text


class Report(NamedTuple):
    """Everything on the page.

    families: see `evaluate`. runs: failed ones included. settings: how the runs were made. sweep: see
    compare.sweep_rates.
    """

    title: str
    families: list[FamilyScores]
    runs: list[dict]
    settings: dict[str, str]
    sweep: list[dict]


# Texts of all formats


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def or_empty(text: str) -> str:
    """A text, or EMPTY if it has no visible character."""
    return text if text.strip() else EMPTY


def input_text(row: dict) -> str:
    """The question of a row: its input, or its instruction if there is no input; all messages of a conversation."""
    if "input" in row and "history" not in row:
        return row["input"] if row["input"].strip() else or_empty(row["instruction"])
    return or_empty(question_of(row))


def family_title(mode: str) -> str:
    return f"Architecture of {MODE[mode].config.title}" if mode in MODE else mode


def describe_seen(families: list[FamilyScores]) -> str:
    """What is known about test rows that were also trained on: from `seen` of the runs, see `count_seen`."""
    runs = [(method.name, run) for family in families for method in family.methods for run in method.runs]
    if counts := {name: run["seen"] for name, run in runs if run.get("seen")}:
        which = ", ".join(f"{count} of them in that of {name}" for name, count in counts.items())
        return f"Warning: training saw {which}: such scores say nothing about unseen rows."
    known = [run.get("seen") for name, run in runs if name != "base"]
    if known and None not in known:
        return "No row of the training files asks the same."
    return "Whether training saw some of them is not known."


def notes(families: list[FamilyScores]) -> list[str]:
    """How the figures were computed, for readers of the tables; only what the input files tell."""
    if not families:
        return []
    first = families[0]
    runs = [run for family in families for method in family.methods for run in method.runs]
    seeds = any(family.seeded for family in families)
    lines = [
        f"Scores: {first.label}, the mean over {plural(len(first.rows), 'row')} that all models answered. "
        + describe_seen(families)
        + (" ± is the standard deviation over seeds." if seeds else "")
        + " The interval is a bootstrap over the rows"
        + (" (scores averaged over seeds). " if seeds else ". ")
        + "A difference is beyond chance if the interval of the paired bootstrap excludes 0; many pairs are compared, "
        "so be careful with single ones."
    ]
    if any(run.get("trained") for run in runs):
        lines.append("Costs are means over seeds. Memory is GPU memory if a GPU was used, else main memory.")
    return lines


def describe_failures(runs: list[dict]) -> list[str]:
    return [
        f"{run['mode']} {run['method']}" + ("" if run.get("seed") is None else f" seed {run['seed']}")
        + f": {run['status']}. {run.get('error', '')}"
        for run in runs
        if run["status"] != "done"
    ]  # fmt: skip


def settings_table(report: Report) -> Table:
    return Table("Settings", ["setting", "value"], [list(item) for item in report.settings.items()])


# HTML


def family_charts(family: FamilyScores, colours: dict[str, str]) -> list[Chart]:
    """The charts for which there is anything to draw. colours: method -> colour."""

    def curves(key, value):
        return {
            method.name: [[(line["step"], value(line)) for line in run.get(key) or ()] for run in method.runs]
            for method in family.methods
        }

    def loss(line):
        return point(line["loss"])

    def headline_score(line):
        return point((line.get("scores") or line).get(family.measure))

    rows = [Interval(method.name, method.mean, *method.interval(), method.seeds) for method in family.methods]
    scored = curves("validation", headline_score)
    drawn = [
        interval_chart(f"{family.label} on the rows answered", family.label, rows, colours),
        line_chart("Training loss", "optimiser step", "loss", curves("curve", loss), colours),
        line_chart("Validation loss", "optimiser step", "loss", curves("validation", loss), colours),
        line_chart(f"Validation {family.label}", "optimiser step", family.label, scored, colours),
    ]
    base = next((method for method in family.methods if method.name == "base"), None)
    if base:
        points = {
            method.name: [
                (value - base.mean, mean_forgetting(run)) for run, value in zip(method.runs, method.seeds, strict=True)
            ]
            for method in family.methods
            if method is not base
        }
        axes = f"gain in {family.label}", "forgetting, nats per token"
        drawn.append(scatter_chart("Forgetting against gain", *axes, points, colours))
    return [chart for chart in drawn if chart]


def sample_values(row: dict, answers: list[SampleAnswer], top: float) -> dict:
    """A test row and its answers for the template. top: score of an entirely right answer."""
    references = references_of(row)
    expected = {line.strip() for text in references for line in text.split("\n")}

    def lines(answer: SampleAnswer) -> list[dict]:
        """Line by line, so that the right lines of a half-right answer stand out."""
        return [
            {"mark": "right" if answer.score >= top or line.strip() in expected else "wrong", "text": line}
            for line in or_empty(answer.text).split("\n")
        ]

    shown = [{"methods": a.methods, "lines": lines(a), "score": f"{a.score:.2f}"} for a in answers]
    return {"input": input_text(row), "reference": "\nor ".join(map(or_empty, references)), "answers": shown}


def family_values(family: FamilyScores, runs: list[dict], colours: dict[str, str]) -> dict:
    """A family for the template."""
    seeds = {run["seed"] for run in runs if run["mode"] == family.mode} - {None}
    samples = pick_samples(family)
    top = max(answer.score for _, answers in samples for answer in answers)
    return {
        "title": family_title(family.mode),
        "seeds": plural(len(seeds), "seed") if seeds else "",
        "charts": family_charts(family, colours),
        "tables": family_tables(family),
        "samples_title": "Answers beside references" + " (of the first seed)" * (len(seeds) > 1),
        "samples": [sample_values(row, answers, top) for row, answers in samples],
    }


def html_page(report: Report) -> str:
    """report.html: one file that needs no other and no network."""
    names = dict.fromkeys(method.name for family in report.families for method in family.methods)
    palette = iter(COLOURS)
    colours = {name: "#666666" if name == "base" else next(palette, "#666666") for name in names}
    runs = []
    for run in report.runs:
        if run.get("commands"):
            seed = "" if run.get("seed") is None else f", seed {run['seed']}"
            runs.append((f"{run['mode']}, {run['method']}{seed}", "\n".join(run["commands"].values())))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        title=report.title,
        notes=notes(report.families),
        failures=describe_failures(report.runs),
        colours=colours,
        families=[family_values(family, report.runs, colours) for family in report.families],
        sweep=sweep_table(report.sweep) if report.sweep else None,
        settings=settings_table(report),
        runs=runs,
    )


# Markdown

# What has a meaning in Markdown or in a cell of its tables, and how to write it literally.
MARKDOWN = (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("[", "&#91;"), ("`", "&#96;"), ("\\", "&#92;"))
MARKDOWN += (("\r\n", "<br>"), ("\n", "<br>"))


def markdown_cell(text: str) -> str:
    for character, literal in MARKDOWN:
        text = text.replace(character, literal)
    return text


def markdown_table(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    return [f"### {table.title}", "", *lines, ""]


def markdown_page(report: Report) -> str:
    """report.md: the same as the page, without charts and commands."""
    lines = [f"# {markdown_cell(report.title)}", ""]
    for line in notes(report.families) + describe_failures(report.runs):
        lines += [markdown_cell(line), ""]
    for family in report.families:
        lines += [f"## {family_title(family.mode)}", ""]
        for table in family_tables(family):
            lines += markdown_table(table)
        rows = []
        for row, answers in pick_samples(family):
            question = [input_text(row), " / ".join(map(or_empty, references_of(row)))]
            rows += [[*question, a.methods, or_empty(a.text), f"{a.score:.2f}"] for a in answers]
        lines += markdown_table(Table("Answers", ["input", "reference", "methods", "answer", family.label], rows))
    if report.sweep:
        lines += ["## Sweep of learning rates", "", *markdown_table(sweep_table(report.sweep))]
    lines += ["## How this was made", "", *markdown_table(settings_table(report))]
    return "\n".join(lines)


# CSV

CSV_KEYS = ("learning_rate", "seconds", "tokens_per_second", "memory_gib", "trained", "parameters", "output_bytes")


def csv_lines(families: list[FamilyScores]) -> str:
    """results.csv: one line per run, its score and costs."""
    file = io.StringIO()
    columns = ["mode", "method", "seed", "score", "value", *CSV_KEYS, "forgetting"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for family in families:
        for method in family.methods:
            for run, value in zip(method.runs, method.seeds, strict=True):
                cells = [run["mode"], run["method"], run.get("seed"), family.measure, f"{value:.6f}"]
                cells += [run.get(key) for key in CSV_KEYS]
                writer.writerow([*cells, mean_forgetting(run) if run.get("forgetting") else None])
    return file.getvalue()
