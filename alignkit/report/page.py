"""A run as a page: self-contained, readable offline, foreign text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from alignkit.errors import RunError
from alignkit.files import write_text
from alignkit.report.drawing import COLOURS, draw
from alignkit.report.figures import Figure, drawn
from alignkit.report.history import Series
from alignkit.report.run_facts import RunFacts, findings, mapping, read_run
from alignkit.report.samples import Sample, by_prompt, read_samples
from alignkit.report.style import HEAD, MACROS, STYLE

NAME = "report.html"
"""Of the page in a run folder."""

MOST_SAMPLES = 6
"""Prompts whose answers are shown before and after."""

_PAGE = (
    HEAD
    + MACROS
    + """
<h1>{{ run.name }} <span class="status {{ run.status }}">{{ run.status }}</span></h1>
<p class="dim">{{ run.stage }}, {{ "{:,}".format(run.steps) }} steps{{ took }}, started
{{ run.about.started }}. <code>{{ run.about.command }}</code></p>
{% if results %}
<h2>Held out</h2>
<div class="wide"><table>
<tr><th></th><th class="number">before</th><th class="number">after</th><th>95% interval</th></tr>
{% for name, before, after, interval in results %}
<tr><th>{{ name }}</th>
<td class="number">{{ "" if before is none else "%.4g" % before }}</td>
<td class="number">{{ "%.4g" % after }}</td><td>{{ interval }}</td></tr>
{% endfor %}</table></div>
{% endif %}
<h2>What to look at</h2>
{% if findings %}<ul>{% for one in findings %}<li>{{ one }}</li>{% endfor %}</ul>
{% else %}<p>Nothing stands out.</p>{% endif %}
<h2>Curves</h2>
<div class="figures">{% for one in figures %}{{ figure(one) }}{% endfor %}</div>
{% if not figures %}<p>The run has logged no step.</p>{% endif %}
{% if samples %}
<h2>Answers before and after</h2>
<p class="dim">To the held-out prompts whose mean reward has changed most: one answer of each time,
and the mean of all.</p>
<div class="wide"><table>
<tr><th>prompt</th><th>before</th><th class="number">reward</th><th>after</th>
<th class="number">reward</th></tr>
{% for one in samples %}<tr><td class="text">{{ one.prompt }}</td>
<td class="text">{{ one.before.response }}</td>
<td class="number">{{ "%.3g" % one.earned[0] }}</td>
<td class="text">{{ one.after.response }}</td>
<td class="number">{{ "%.3g" % one.earned[1] }}</td></tr>{% endfor %}
</table></div>
{% endif %}
<h2>Rows</h2>
{{ pairs(rows) }}
<h2>Plan and what happened</h2>
<div class="wide"><table>
<tr><th></th><th class="number">planned</th><th class="number">was</th></tr>
{% for name, planned, was in promised %}
<tr><th>{{ name }}</th><td class="number">{{ planned }}</td><td class="number">{{ was }}</td></tr>
{% endfor %}</table></div>
{% for warning in run.plan.warnings or [] %}<p>Warning of the plan: {{ warning }}</p>{% endfor %}
{% if merge %}<h2>Merge</h2>{{ pairs(merge) }}{% endif %}
<h2>Recipe</h2>
<details open><summary class="dim">recipe.yaml, resolved</summary>
<pre>{{ run.recipe }}</pre></details>
<h2>Made by</h2>
{{ pairs(provenance) }}
</html>
"""
)


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn.

    Args:
        title: of the figure.
        healthy: what a good one looks like.
        svg: the element.
        key: name of each curve, and the number of its colour.
    """

    title: str
    healthy: str
    svg: str
    key: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Changed:
    """Answers to a prompt.

    Args:
        prompt: its last turn, or its text.
        before: an answer before the first step, of a usual reward.
        after: one at the end.
        earned: mean reward before and after.
    """

    prompt: str
    before: Sample
    after: Sample
    earned: tuple[float, float]


def render_run(run: RunFacts) -> str:
    """The page of one run.

    Args:
        run: finished or not.
    """
    took = "" if run.seconds is None else f", {spent(run.seconds)}"
    page = Environment(autoescape=True).from_string(_PAGE)
    text: str = page.render(
        run=run,
        title=f"{run.name}: {run.stage}, {run.status}",
        style=STYLE,
        took=took,
        results=run.results(),
        findings=list(findings(run)),
        figures=[_drawing(one, names, run) for one, names in drawn(run.history)],
        samples=_changed(run.folder),
        rows=_rows(run),
        promised=_promised(run),
        merge=[(k.replace("_", " "), v) for k, v in _plain(run.summary.get("merge"))],
        provenance=_provenance(run),
    )
    return text


def write_report(folder: Path) -> Path:
    """Write the page of a run into its folder.

    Args:
        folder: of the run.

    Raises:
        RunError: it is no run folder.
    """
    path = folder / NAME
    write_text(path, render_run(read_run(folder)))
    return path


def _drawing(figure: Figure, names: Sequence[str], run: RunFacts) -> Drawing:
    curves: list[Series] = [run.history[name] for name in names]
    svg = draw(curves, log=figure.log, salt=figure.title)
    key = [(name, number % COLOURS) for number, name in enumerate(names)]
    return Drawing(figure.title, figure.healthy, svg, key)


def _changed(folder: Path) -> list[Changed]:
    """The held-out prompts whose mean reward has changed most, with an answer of each time."""
    try:
        last, rows, after = read_samples(folder, rows="held_out")
        first, _, before = read_samples(folder, step=0, rows=rows)
    except RunError:
        return []
    if first == last:
        return []
    earlier = {group[0].place: group for group in by_prompt(before)}
    both = [(earlier[g[0].place], g) for g in by_prompt(after) if g[0].place in earlier]
    both.sort(key=lambda pair: -abs(_mean(pair[1]) - _mean(pair[0])))
    return [
        Changed(_asked(one[0].prompt), _usual(one), _usual(two), (_mean(one), _mean(two)))
        for one, two in both[:MOST_SAMPLES]
    ]


def _usual(samples: Sequence[Sample]) -> Sample:
    """The answer whose reward is nearest to the mean."""
    mean = _mean(samples)
    return min(samples, key=lambda one: abs(one.reward - mean) if one.reward == one.reward else 9e9)


def _mean(samples: Sequence[Sample]) -> float:
    known = [one.reward for one in samples if one.reward == one.reward]
    return sum(known) / len(known) if known else 0.0


def _asked(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content", "")) if prompt else ""


def _rows(run: RunFacts) -> list[tuple[str, str]]:
    said = []
    for name, value in mapping(run.about.get("data")).items():
        counts = mapping(value)
        if not counts:
            continue
        text = f"{counts.get('kept', 0):,} of {counts.get('rows', 0):,} used"
        for reason, count in mapping(counts.get("dropped")).items():
            text += f"; {count:,} dropped: {reason}"
        if counts.get("truncated"):
            text += f"; {counts['truncated']:,} cut"
        text += f"; {counts.get('tokens', 0):,} tokens, {counts.get('trained_tokens', 0):,} trained"
        for note, count in mapping(counts.get("notes")).items():
            text += f"; {count:,}: {note}"
        said.append((name, text))
    return said


def _promised(run: RunFacts) -> list[tuple[str, str, str]]:
    plan, memory = run.plan, run.history.get("memory_gb")
    peak, seconds = mapping(plan.get("memory")).get("peak"), plan.get("seconds")
    was = "" if run.seconds is None else spent(run.seconds)
    return [
        ("steps", f"{plan.get('steps', 0):,}", f"{run.steps:,}"),
        ("time", spent(seconds) if seconds else "", was),
        (
            "memory",
            f"{peak / 1e9:.1f} GB" if peak else "",
            f"{memory.last:.1f} GB" if memory else "",
        ),
        ("trained weights", f"{mapping(plan.get('model')).get('trainable', 0):,}", ""),
        ("precision", str(plan.get("dtype", "")), ""),
    ]


def _gigabytes(size: float | None) -> str:
    return f"{size / 1e9:.1f} GB" if size else ""


def _provenance(run: RunFacts) -> list[tuple[str, str]]:
    about = run.about
    base = mapping(about.get("base"))
    versions = ", ".join(f"{k} {v}" for k, v in mapping(about.get("versions")).items())
    return [
        ("base", f"{base.get('location', '')} ({str(base.get('fingerprint', ''))[:16]})"),
        *(
            (f"rows of {name}", str(mapping(rows).get("fingerprint", ""))[:16])
            for name, rows in mapping(about.get("data")).items()
        ),
        ("commit", str(about.get("commit", ""))),
        ("versions", versions),
        ("machine", str(mapping(run.plan.get("hardware")).get("name", ""))),
    ]


def _plain(value: Any) -> list[tuple[str, Any]]:
    """What is said of a merge, numbers short."""
    found = [(k, v) for k, v in mapping(value).items() if v not in (None, [], "")]
    return [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in found]


def spent(seconds: float) -> str:
    """`75` as `1 min 15 s`.

    Args:
        seconds: at least 0.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
