"""Charts of a report, drawn by matplotlib: intervals, curves, points.

A chart is an SVG in a data URI, so that the report stays one file. Its text is shown in the fonts of the browser:
method names may be Chinese, and matplotlib's own font has no Chinese characters.
"""

import base64
import functools
import io
import math
import unicodedata
import warnings
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from tuning.terminal import visible

# Okabe and Ito 2008, safe for colour-blind readers, darkened for a white background; assigned to methods in order
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5489a", "#b38600", "#56a5d8", "#666666")
WIDTH, HEIGHT = 400, 260  # of a chart, pixels
ROW = 26  # height of a method in an interval chart, pixels
NAME_WIDTH = 22  # maximum length of a method's name in a chart, in half-width characters
STYLE = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.labelcolor": "#444444",
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 72,  # one point is one pixel
    "font.size": 9,
    "grid.color": "#e3e3e3",
    "savefig.dpi": 72,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same data give the same file
    "text.color": "#222222",
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "xtick.color": "#444444",
    "xtick.labelsize": 9,
    "ytick.color": "#444444",
    "ytick.labelsize": 9,
}
Point = tuple[float, float]


class Chart(NamedTuple):
    """What the page needs of a chart.

    uri: the SVG as a data URI. width, height: pixels.
    """

    title: str
    uri: str
    width: int
    height: int


class Interval(NamedTuple):
    """A row of an interval chart.

    mean: drawn as a dot. low, high: ends of the bar. values: drawn as ticks, one per seed.
    """

    name: str
    mean: float
    low: float
    high: float
    values: list[float]


def render(figure: Figure) -> Chart:
    """A figure as an SVG in a data URI."""
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has one, see the module
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        content = base64.b64encode(file.getvalue()).decode()
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    return Chart(figure.axes[0].get_title("left"), f"data:image/svg+xml;base64,{content}", width, height)


def in_style(draw: Callable[..., Figure | None]) -> Callable[..., Chart | None]:
    """Decorator: draw in this module's style, not that of the user's matplotlibrc, and render the figure."""

    @functools.wraps(draw)
    def drawn(*args) -> Chart | None:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            figure = draw(*args)
            return None if figure is None else render(figure)

    return drawn


def new_axes(title: str, x_label: str, y_label: str, height: int = HEIGHT, layout: str | None = "constrained"):
    """A figure with one pair of axes."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=layout)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_axisbelow(True)
    return figure, axes


def finite(points: list[Point]) -> list[Point]:
    return [point for point in points if all(map(math.isfinite, point))]


@in_style
def line_chart(
    title: str, x_label: str, y_label: str, series: dict[str, list[list[Point]]], colours: dict[str, str]
) -> Figure | None:
    """Curves. None if there is nothing to draw.

    Args:
        series: name -> one curve per seed, a list of (x, y); points that are not finite are left out. Curves over the
            same x are drawn thin, and their mean bold.
        colours: name -> colour.
    """
    series = {name: [curve for curve in map(finite, curves) if curve] for name, curves in series.items()}
    if not any(series.values()):
        return None
    figure, axes = new_axes(title, x_label, y_label)
    for name, curves in series.items():
        style = {"color": colours[name], "solid_joinstyle": "round"} if curves else {}
        bold = curves
        if len(curves) > 1 and len({tuple(x for x, _ in curve) for curve in curves}) == 1:
            bold = [[(at[0][0], sum(y for _, y in at) / len(at)) for at in zip(*curves, strict=True)]]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), linewidth=0.8, alpha=0.35, **style)
        for curve in bold:
            marker = {"marker": "o", "markersize": 4, "markeredgecolor": "white"} if len(curve) < 12 else {}
            axes.plot(*zip(*curve, strict=True), linewidth=1.8, **marker, **style)
    return figure


@in_style
def scatter_chart(
    title: str, x_label: str, y_label: str, series: dict[str, list[Point]], colours: dict[str, str]
) -> Figure | None:
    """Points, and the lines x = 0 and y = 0. None if there is nothing to draw.

    Args:
        series: name -> points (x, y); points that are not finite are left out.
        colours: name -> colour.
    """
    series = {name: finite(points) for name, points in series.items()}
    if not any(series.values()):
        return None
    figure, axes = new_axes(title, x_label, y_label)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axvline(0, color="#888888", linewidth=1)
    for name, points in series.items():
        if points:
            axes.scatter(*zip(*points, strict=True), s=42, color=colours[name], alpha=0.85, edgecolors="white")
    return figure


@in_style
def interval_chart(title: str, x_label: str, rows: list[Interval], colours: dict[str, str]) -> Figure | None:
    """Means with their intervals, one row per method, from top to bottom. None without rows."""
    if not rows:
        return None
    names = [short_name(row.name) for row in rows]
    height = 76 + ROW * len(rows)
    figure, axes = new_axes(title, x_label, "", height, layout=None)
    # matplotlib cannot measure characters missing from its font: margins are set by hand
    left = 16 + 5.6 * max(map(half_widths, names))
    figure.subplots_adjust(left / WIDTH, 40 / height, 1 - 12 / WIDTH, 1 - 28 / height)
    for at, row in enumerate(rows):
        colour = colours[row.name]
        axes.plot((row.low, row.high), (at, at), color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(row.values, [at] * len(row.values), linestyle="", marker="|", markersize=10, color=colour)
        axes.plot(row.mean, at, marker="o", markersize=7, color=colour, markeredgecolor="white")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def half_widths(text: str) -> int:
    """Width of a text in half-width characters; Chinese ones are twice as wide as Latin ones."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def short_name(name: str) -> str:
    """A name as a chart shows it: one line, at most NAME_WIDTH wide, no characters that are invalid in an SVG."""
    name = "".join(filter(str.isprintable, " ".join(visible(name).split())))
    if half_widths(name) <= NAME_WIDTH:
        return name
    while half_widths(name) > NAME_WIDTH - 1:
        name = name[:-1]
    return f"{name}…"
