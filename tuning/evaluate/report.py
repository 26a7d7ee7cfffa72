"""A report on trained models: scores with intervals, costs, loss curves, forgetting, answers beside references.

    python -m tuning.evaluate.report --output_dir output/report --mode glm3 --run base=base.jsonl \\
        --run lora=lora.jsonl,output/lora

compare.py writes its report with this module. As a script it takes the answers of predict.py (and the training folders,
for curves) of models that were trained one by one. Output: report.html (one file, no scripts, opens offline), the same
as report.md and results.csv, and runs.json with all the data.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from collections import Counter

from glm_models import MODE
from tuning.arguments.parser import NewPath, Parser, Text, answer_early


class Run:
    """Type of --run: NAME=ANSWERS or NAME=ANSWERS,TRAINING. The value is the three parts; without TRAINING it is ""."""

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
        help="name of a model, its answers (a file of predict.py) and optionally the output_dir of its training; "
        "repeat for each model",
    )  # fmt: skip
    group.add_argument("--title", type=Text(), default="Report", help="headline of the page")
    group.add_argument("--output_dir", type=NewPath(), required=True, help="folder for the report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_args)

from tuning.errors import UserError
from tuning.evaluate.inputs import count_seen, read_commands, read_curves
from tuning.evaluate.page import Report, csv_lines, describe_seen, html_page, input_text, markdown_page, or_empty
from tuning.evaluate.scores import FamilyScores, evaluate, pick_samples
from tuning.exits import exit_on_user_errors
from tuning.folders import write_errors, write_file
from tuning.metrics import references_of
from tuning.terminal import visible

PACKAGES = ("torch", "transformers", "deepspeed", "peft")


def write_report(
    folder: str,
    runs: list[dict],
    settings: dict[str, str],
    sweep: list[dict] | None = None,
    title: str = "Comparison of tuning methods",
) -> tuple[str, list[FamilyScores]]:
    """Write report.html, report.md, results.csv and runs.json. Returns the path of the page, and the scores on it.

    Args:
        runs: see `evaluate`. Optional keys: learning_rate, commands, those of compare.read_training, and forgetting
            (category -> nats per token).
        settings: what to show about how the runs were made.
        sweep: see compare.sweep_rates.

    Raises:
        UserError, FolderError: see `evaluate`; a file cannot be written.
    """
    families = evaluate(folder, runs)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores"}
    report = Report(title, families, runs, settings | versions, sweep or [])
    files = {"report.html": html_page(report), "report.md": markdown_page(report), "results.csv": csv_lines(families)}
    files = {name: visible(text) for name, text in files.items()}  # answers may hold control sequences of terminals
    data = {"settings": settings, "versions": versions, "sweep": sweep or [], "runs": runs}
    files["runs.json"] = json.dumps(data, indent=1) + "\n"
    with write_errors(folder):
        os.makedirs(folder, exist_ok=True)
        for name, text in files.items():
            write_file(os.path.join(folder, name), text)
    return os.path.join(folder, "report.html"), families


def summary(family: FamilyScores, rows: int = 4) -> list[str]:
    """The scores, and a few answers beside their references, for a terminal."""
    lines = []
    for row, answers in pick_samples(family)[:rows]:
        lines += [f"input:     {input_text(row)}"]
        references = " / ".join(map(or_empty, references_of(row)))
        for name, text, value in [("reference", references, None), *answers]:
            one_line = or_empty(text).replace("\n", "; ")
            lines.append(f"  {name}: {one_line}" + ("" if value is None else f"   ({family.label} {value:.2f})"))
    for method in family.methods:
        low, high = method.interval()
        lines.append(f"{method.name}: {family.label} {method.mean:.4f} (95 % interval {low:.4f} to {high:.4f})")
    return lines


def read_run(args: argparse.Namespace, name: str, answers: str, training: str) -> dict:
    """A model of --run as `write_report` takes it."""
    run = {"mode": args.mode, "method": name, "seed": None, "status": "done"}
    run["predictions"] = os.path.relpath(answers, args.output_dir)
    if training:
        run |= read_curves(training) | {"commands": read_commands(training), "seen": count_seen(training, answers)}
    return run


def main(argv=None) -> None:
    with exit_on_user_errors():
        args = parse_args(argv)
        names = Counter(name for name, *_ in args.run)
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"--run {twice[0]}=... is given {names[twice[0]]} times: give each model a name of its own")
        runs = [read_run(args, *run) for run in args.run]
        given = " ".join(f"{name}={answers}" + f",{training}" * bool(training) for name, answers, training in args.run)
        path, (family,) = write_report(args.output_dir, runs, {"runs": given}, title=args.title)
        print(*map(visible, summary(family)), describe_seen([family]), f"report: {path}", sep="\n")


if __name__ == "__main__":
    main()
