"""Tables of a report, as texts: quality, differences, cost, relations, forgetting."""

from typing import NamedTuple

import numpy as np

from tuning.evaluate.scores import FamilyScores
from tuning.metrics import bootstrap

# kind of answers -> scores shown beside the headline score
MORE_SCORES = {"triples": ("precision", "recall"), "questions": ("accuracy_points", "diversity_points")}
MORE_SCORES |= {"tool_calls": ("tool_name", "tool_parameters", "tool_call"), "classes": ("macro_f1",)}
MORE_SCORES |= {"text": ("rouge_1", "rouge_2", "bleu_4", "exact_match")}


class Table(NamedTuple):
    """A heading, column names, rows of cells, and the first cell of the row to highlight."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: str | None = None


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def quality_table(family: FamilyScores) -> Table:
    more = [name for name in MORE_SCORES[family.kind] if name in family.methods[0].scores]
    spread = ["± over seeds"] if family.seeded else []
    columns = ["method", family.label, *spread, "95 % over rows", *more, *["seeds"][: len(spread)]]
    rows = []
    for method in family.methods:
        low, high = method.interval()
        cells = [method.name, number(method.mean)]
        cells += ["" if np.isnan(method.spread) else number(method.spread)] if spread else []
        cells += [f"{low:.4f} to {high:.4f}", *(number(method.scores[name]) for name in more)]
        cells += [str(len(method.seeds))] if spread else []
        rows.append([*cells, f"{method.scores['ended']:.0%}"])
    return Table("Quality", [*columns, "end by themselves"], rows, family.best.name)


def difference_table(family: FamilyScores) -> Table | None:
    """For every two methods: the difference of their means, and its paired bootstrap interval over the test rows."""
    rows = []
    order = sorted(family.methods, key=lambda method: -method.mean)
    for i, better in enumerate(order):
        for other in order[i + 1 :]:
            low, high = bootstrap(list(better.rows - other.rows), seed=0)
            rows.append([f"{better.name} over {other.name}", number(better.mean - other.mean)])
            rows[-1] += [f"{low:.4f} to {high:.4f}", "yes" if low > 0 else "not shown"]
    columns = ["better method", "difference", "95 % over rows, paired", "beyond chance"]
    return Table("Differences", columns, rows) if rows else None


def cost_table(family: FamilyScores) -> Table | None:
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


def relation_table(family: FamilyScores) -> Table | None:
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


def forgetting_table(family: FamilyScores) -> Table | None:
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


def family_tables(family: FamilyScores) -> list[Table]:
    makers = (quality_table, difference_table, cost_table, relation_table, forgetting_table)
    return [table for maker in makers if (table := maker(family)) is not None]


def sweep_table(sweep: list[dict]) -> Table:
    """sweep: see compare.sweep_rates."""
    rows = [
        [row["mode"], row["method"], f"{row['learning_rate']:g}", number(row["score"]) or "failed"]
        + ["chosen" if row["chosen"] else ""]
        for row in sweep
    ]
    return Table("By the rows held out from training", ["mode", "method", "learning rate", "score", ""], rows)
