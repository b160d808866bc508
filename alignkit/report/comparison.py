"""Several runs on one page: what differs between their recipes, their results, their curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment

from alignkit.report.drawing import COLOURS, draw
from alignkit.report.figures import FIGURES
from alignkit.report.history import MOST_POINTS
from alignkit.report.page import Drawing, spent
from alignkit.report.run_facts import RunFacts, findings
from alignkit.report.style import HEAD, MACROS, STYLE

FEWEST_POINTS = 40
"""Of a curve among many."""

_PAGE = (
    HEAD
    + MACROS
    + """
<h1>{{ runs | length }} runs</h1>
<div class="wide"><table>
<tr><th></th><th>stage</th><th>status</th><th class="number">steps</th><th class="number">time</th>
<th class="number">memory</th></tr>
{% for one in runs %}<tr><th><span class="key" style="--colour: var(--curve-{{ one.colour }})">
{{ one.name }}</span></th><td>{{ one.run.stage }}</td>
<td><span class="{{ one.run.status }}">{{ one.run.status }}</span></td>
<td class="number">{{ "{:,}".format(one.run.steps) }}</td><td class="number">{{ one.time }}</td>
<td class="number">{{ one.memory }}</td></tr>{% endfor %}</table></div>
<h2>What differs</h2>
{% if differing %}<div class="wide"><table>
<tr><th></th>{% for one in runs %}<th>{{ one.name }}</th>{% endfor %}</tr>
{% for key, values in differing %}<tr><th><code>{{ key }}</code></th>
{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% else %}<p>Nothing in their recipes but the folder.</p>{% endif %}
<h2>Held out, at the end</h2>
{% if results %}<div class="wide"><table>
<tr><th></th>{% for one in runs %}<th class="number">{{ one.name }}</th>{% endfor %}</tr>
{% for name, values in results %}<tr><th>{{ name }}</th>
{% for value in values %}<td class="number">{{ value }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
<p class="dim">In brackets the 95% interval of each alone. Runs that were measured on the same rows
share their luck: they differ more surely than the overlap of two intervals says.</p>
{% else %}<p>Nothing was held out.</p>{% endif %}
<h2>What to look at</h2>
{% for one in runs if one.findings %}<h3>{{ one.name }}</h3>
<ul>{% for text in one.findings %}<li>{{ text }}</li>{% endfor %}</ul>
{% else %}<p>Nothing stands out.</p>{% endfor %}
<h2>Curves</h2>
<div class="figures">{% for one in figures %}{{ figure(one) }}{% endfor %}</div>
</html>
"""
)


@dataclass(frozen=True)
class Compared:
    """One of several runs.

    Args:
        name: of its folder; with that of its parent where two are the same.
        run: the run.
        colour: of its curves.
    """

    name: str
    run: RunFacts
    colour: int

    @property
    def time(self) -> str:
        """It took."""
        return "" if self.run.seconds is None else spent(self.run.seconds)

    @property
    def memory(self) -> str:
        """It took at most."""
        held = self.run.history.get("memory_gb")
        return f"{held.last:.1f} GB" if held else ""

    @property
    def findings(self) -> list[str]:
        """What a person should look at."""
        return list(findings(self.run))


def render_runs(runs: Sequence[RunFacts]) -> str:
    """The page of several runs.

    Args:
        runs: two or more, in the order of the page.
    """
    compared = [
        Compared(name, run, number % COLOURS)
        for number, (name, run) in enumerate(zip(_names(runs), runs, strict=True))
    ]
    page = Environment(autoescape=True).from_string(_PAGE)
    text: str = page.render(
        title=f"{len(runs)} runs: {', '.join(one.name for one in compared[:5])}",
        style=STYLE,
        runs=compared,
        differing=differing_keys([run.recipe for run in runs]),
        results=_results(runs),
        figures=list(_figures(compared)),
    )
    return text


def differing_keys(recipes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all recipes, and the values; without `output`.

    Args:
        recipes: YAML texts; one that cannot be read has no key.
    """
    flat = [dict(_flat(_read(text))) for text in recipes]
    keys = dict.fromkeys(key for one in flat for key in one if key != "output")
    found = [(key, [one.get(key, "") for one in flat]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError:
        return {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`a.b.0.c` -> value, down to plain values."""
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = iter(enumerate(value))
    else:
        yield path, "" if value in (None, [], {}) else str(value)
    for key, inner in items:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))


def _names(runs: Sequence[RunFacts]) -> list[str]:
    short = [run.name for run in runs]
    return [
        name if short.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for name, run in zip(short, runs, strict=True)
    ]


def _results(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    tables = [{name: (last, interval) for name, _, last, interval in r.results()} for r in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [_cell(table.get(name)) for table in tables]) for name in names]


def _cell(value: tuple[float, str] | None) -> str:
    if value is None:
        return ""
    last, interval = value
    return f"{last:.4g}" + (f" ({interval})" if interval else "")


def _figures(runs: Sequence[Compared]) -> Iterator[Drawing]:
    """A figure for each metric, with a curve for each run that has it."""
    most = max(FEWEST_POINTS, MOST_POINTS // len(runs) * 2)
    for figure in FIGURES:
        for metric in figure.metrics:
            there = [one for one in runs if metric in one.run.history]
            if not there:
                continue
            curves = [one.run.history[metric] for one in there]
            colours = [one.colour for one in there]
            svg = draw(curves, colours=colours, log=figure.log, salt=metric, most=most)
            key = [(one.name, one.colour) for one in there]
            title = f"{figure.title}: {metric}"
            yield Drawing(title, figure.healthy if metric == figure.metrics[0] else "", svg, key)
