"""`alignkit report`: runs as a page, or as lines that are drawn again while they go on."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import say, stdout

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32
_PAUSE = 2.0


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; several are compared.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page.  [default: report.html in the folder, or here]"
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Draw in the terminal while the runs go on.")
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write a page about runs: results, curves, what to look at, answers, recipe, provenance."""
    if follow:
        _follow(runs)
        return
    from alignkit.files import output_path, write_text
    from alignkit.report.comparison import render_runs
    from alignkit.report.page import NAME, render_run
    from alignkit.report.run_facts import findings, read_run

    found = [read_run(folder) for folder in runs]
    default = runs[0] / NAME if len(runs) == 1 else Path(NAME)
    target = output_path(output or default)
    write_text(target, render_run(found[0]) if len(found) == 1 else render_runs(found))
    for one in found:
        for sentence in findings(one):
            say(sentence if len(found) == 1 else f"{one.name}: {sentence}")
    stdout.print(Text(str(target)))
    if open_it and typer.launch(str(target)):
        say("no browser could be started; open the file yourself")


def _follow(runs: list[Path]) -> None:
    """Redraw until all runs have ended, or the user has seen enough."""
    from alignkit.report.run_facts import read_run

    with Live(console=stdout, auto_refresh=False) as live:
        while True:
            found = [read_run(folder) for folder in runs]
            live.update(_table(found), refresh=True)
            if all(one.status != "running" for one in found):
                return
            time.sleep(_PAUSE)


def _table(runs: list[Any]) -> Table:
    from alignkit.report.figures import drawn

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "step", "metric", "", "last"):
        table.add_column(name, no_wrap=True, justify="right" if name == "last" else "left")
    for run in runs:
        head = run.name, f"{run.steps:,}/{run.plan.get('steps', '?')} {run.status}"
        for _, names in drawn(run.history)[:6]:
            for name in names:
                series = run.history[name]
                bars = Text(_bars(series.values), style="cyan")
                table.add_row(*head, name, bars, f"{series.last:.4g}")
                head = "", ""
    return table


def _bars(values: list[float]) -> str:
    """The values as a line of bars, means of stretches where there are many."""
    count = min(_WIDTH, len(values))
    bounds = [round(n * len(values) / count) for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)
