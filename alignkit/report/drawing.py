"""Curves as SVG.

matplotlib draws: it is the plotting library that will still be kept in ten years, its SVG is vector
and small once a curve has a few hundred points, and a page of it needs no script. Colours are those
of the page, so that a drawing follows its light and dark. There are no words in a drawing but the
numbers at its axes: names may be anyone's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from alignkit.report.history import MOST_POINTS, Series

COLOURS = 8
"""Curves of different colours; a ninth has the first one's again, with dashes."""

_INK, _GRID = "#010101", "#020202"
_CURVES = tuple(f"#0300{number:02x}" for number in range(COLOURS))
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify": True,
    "axes.unicode_minus": False,
}


def draw(
    curves: Sequence[Series],
    *,
    colours: Sequence[int] | None = None,
    log: bool = False,
    salt: str = "",
    most: int = MOST_POINTS,
) -> str:
    """The curves as an `<svg>` element.

    Args:
        curves: those of few values have points.
        colours: number of each curve's colour; None counts from 0.
        log: a logarithmic scale, if all values are above 0 and span two orders of magnitude.
        salt: makes the ids of several drawings of a page differ.
        most: points of a curve.
    """
    # only a page pays for these imports, not the start of every run
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        canvas = Canvas(figsize=(6.4, 2.4), layout="constrained")
        axes = canvas.add_subplot()
        chosen = range(len(curves)) if colours is None else colours
        for place, (number, series) in enumerate(zip(chosen, curves, strict=True)):
            thin = series.thinned(most)
            few = len(thin.steps) <= 12
            axes.plot(
                thin.steps,
                thin.values,
                color=_CURVES[number % COLOURS],
                linestyle="--" if place >= COLOURS else "-",
                linewidth=1.6,
                marker="o" if few else None,
                markersize=4,
            )
        if log and _spans(curves):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(True, color=_GRID, linewidth=0.6)
        axes.tick_params(colors=_INK, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        text = io.StringIO()
        FigureCanvasSVG(canvas).print_svg(text, metadata=dict.fromkeys(_METADATA))
    return _themed(text.getvalue())


_METADATA = ("Creator", "Date", "Format", "Type")


def _spans(curves: Sequence[Series]) -> bool:
    values = [value for series in curves for value in series.values]
    return min(values) > 0 and max(values) > 100 * min(values)


def _themed(svg: str) -> str:
    """The element alone, with the page's colours, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", svg)
    for colour, name in ((_INK, "ink"), (_GRID, "grid")):
        svg = svg.replace(colour, f"var(--{name})")
    for number, colour in enumerate(_CURVES):
        svg = svg.replace(colour, f"var(--curve-{number})")
    svg = svg.replace("fill: #ffffff", "fill: none")
    svg = re.sub(r' id="(?!p|m|h)[^"]*"| id="(?:patch|matplotlib)[^"]*"', "", svg)
    svg = re.sub(r"font-family: '[^;]*, sans-serif", "font-family: sans-serif", svg)
    return re.sub(r">\s+<", "><", svg)
