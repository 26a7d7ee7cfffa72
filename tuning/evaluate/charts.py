"""Charts as inline SVG: lines, points, intervals. No script, no font, no file beside the page is needed."""

import math
from html import escape

# colour-blind safe (Okabe and Ito 2008), darkened for white paper; one a series, in order
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5489a", "#b38600", "#56a5d8", "#666666")
WIDTH, HEIGHT = 400, 260  # of a chart, pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40  # what stands around the axes


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def span(values: list[float]) -> tuple[float, float]:
    """Ends of an axis with a little room around the values."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or abs(high) / 10 or 1.0
    return low - room, high + room


class Axes:
    """The frame of a chart and the way from values to pixels."""

    def __init__(self, title: str, x_label: str, y_label: str, xs, ys, height: int = HEIGHT, left: int = LEFT):
        self.height, self.left = height, left
        (self.x0, self.x1), (self.y0, self.y1) = span(xs), span(ys)
        middle = (TOP + height - BOTTOM) / 2
        self.parts = [
            f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
            f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
            text(8, 16, title, anchor="start", style="title"),
            text((left + WIDTH - RIGHT) / 2, height - 6, x_label),
            f'<g transform="translate(12 {middle:.1f}) rotate(-90)">{text(0, 0, y_label)}</g>',
        ]

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (self.height - TOP - BOTTOM)

    def x_ticks(self) -> None:
        for value in ticks(self.x0, self.x1):
            x = self.x(value)
            self.line(x, TOP, x, self.height - BOTTOM)
            self.parts.append(text(x, self.height - BOTTOM + 14, f"{value:g}"))

    def y_ticks(self) -> None:
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            self.line(self.left, y, WIDTH - RIGHT, y)
            self.parts.append(text(self.left - 5, y + 4, f"{value:g}", anchor="end"))

    def line(self, x0, y0, x1, y1, style: str = 'stroke="#e3e3e3"') -> None:
        self.parts.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {style}/>')

    def dot(self, x: float, y: float, colour: str, hint: str, radius: float = 4.5) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.85" '
            f'stroke="#fff"><title>{escape(hint)}</title></circle>'
        )

    def svg(self) -> str:
        return "".join([*self.parts, "</svg>"])


def text(x: float, y: float, content: str, anchor: str = "middle", style: str = "label") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(str(content))}</text>'


def finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if all(map(math.isfinite, point))]


def line_chart(
    title: str, x_label: str, y_label: str, series: dict[str, list[list[tuple[float, float]]]], colours
) -> str:
    """Curves. Returns "" if there is nothing to draw.

    Args:
        series: name -> one curve a seed, each a list of (x, y); what is not finite is left out. The mean of curves
            with the same xs is drawn boldly, the curves themselves faintly.
        colours: name -> colour.
    """
    series = {name: [c for c in map(finite, curves) if c] for name, curves in series.items()}
    points = [point for curves in series.values() for curve in curves for point in curve]
    if not points:
        return ""
    axes = Axes(title, x_label, y_label, *map(list, zip(*points, strict=True)))
    axes.x_ticks()
    axes.y_ticks()
    for name, curves in series.items():
        if not curves:
            continue
        bold = curves
        if len(curves) > 1 and len({tuple(x for x, _ in curve) for curve in curves}) == 1:
            bold = [[(at[0][0], sum(y for _, y in at) / len(at)) for at in zip(*curves, strict=True)]]
            for curve in curves:
                axes.parts.append(path(axes, curve, colours[name], name, width=0.8, opacity=0.35))
        for curve in bold:
            axes.parts.append(path(axes, curve, colours[name], name, width=2, opacity=1))
            if len(curve) < 12:
                for x, y in curve:
                    axes.dot(axes.x(x), axes.y(y), colours[name], f"{name}: {y:.4g} at {x:g}", radius=3)
    return axes.svg()


def path(axes: Axes, curve, colour: str, name: str, width: float, opacity: float) -> str:
    points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in curve)
    return (
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round"><title>{escape(name)}</title></polyline>'
    )


def scatter_chart(title: str, x_label: str, y_label: str, series: dict[str, list[tuple[float, float]]], colours) -> str:
    """Points, and the lines x = 0 and y = 0. Returns "" if there is nothing to draw.

    Args:
        series: name -> points (x, y); what is not finite is left out.
    """
    series = {name: finite(points) for name, points in series.items()}
    points = [point for each in series.values() for point in each]
    if not points:
        return ""
    xs, ys = map(list, zip(*points, strict=True))
    axes = Axes(title, x_label, y_label, [*xs, 0], [*ys, 0])
    axes.x_ticks()
    axes.y_ticks()
    axes.line(axes.x(0), TOP, axes.x(0), axes.height - BOTTOM, 'stroke="#888"')
    axes.line(LEFT, axes.y(0), WIDTH - RIGHT, axes.y(0), 'stroke="#888"')
    for name, each in series.items():
        for x, y in each:
            axes.dot(axes.x(x), axes.y(y), colours[name], f"{name}: {x:.4g}, {y:.4g}")
    return axes.svg()


def interval_chart(title: str, x_label: str, rows: list[tuple[str, float, float, float, list[float]]], colours) -> str:
    """A row a name: the mean as a dot, the interval as a bar, single values as ticks. Returns "" without rows.

    Args:
        rows: name, mean, lower end, upper end, single values (one a seed).
    """
    if not rows:
        return ""
    height = TOP + BOTTOM + 26 * len(rows)
    values = [value for _, mean, low, high, single in rows for value in (mean, low, high, *single)]
    widest = max(len(name) for name, *_ in rows)
    axes = Axes(title, x_label, "", values, [0, 1], height, left=min(150, 16 + 7 * widest))
    axes.x_ticks()
    for i, (name, mean, low, high, single) in enumerate(rows):
        y, colour = TOP + 26 * i + 13, colours[name]
        axes.line(axes.x(low), y, axes.x(high), y, f'stroke="{colour}" stroke-width="5" stroke-opacity="0.35"')
        for value in single:
            axes.line(axes.x(value), y - 5, axes.x(value), y + 5, f'stroke="{colour}" stroke-width="1.2"')
        axes.dot(axes.x(mean), y, colour, f"{name}: {mean:.4g} ({low:.4g} to {high:.4g})")
        axes.parts.append(text(axes.left - 5, y + 4, name, anchor="end"))
    return axes.svg()


def legend(colours: dict[str, str]) -> str:
    """Names and their colours, as HTML."""
    return (
        '<p class="legend">'
        + "".join(
            f'<span><i style="background:{colour}"></i>{escape(name)}</span> ' for name, colour in colours.items()
        )
        + "</p>"
    )
