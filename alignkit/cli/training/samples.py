"""`alignkit samples`: what a policy answered, and what it earned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import print_json, stdout

_PROMPT = 300
"""Characters of a prompt that are shown, the last ones."""


def samples(
    run: Annotated[Path, typer.Argument(help="Run folder of ppo or grpo.")],
    step: Annotated[
        int | None, typer.Option("--step", help="Steps done.  [default: the last]", min=0)
    ] = None,
    rows: Annotated[
        Literal["held_out", "train"] | None,
        typer.Option(
            "--rows",
            metavar="ROWS",
            help="held_out or train.  [default: held_out, if there are any]",
        ),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The highest rewards first.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="The lowest rewards first.")] = False,
    count: Annotated[
        int, typer.Option("--count", "-n", help="Prompts; with --best or --worst responses.", min=1)
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON.")] = False,
) -> None:
    """Show what a policy answered in a run, with its rewards side by side."""
    from alignkit.errors import RunError
    from alignkit.report.samples import by_prompt, by_reward, read_samples

    if best and worst:
        raise RunError("--best and --worst exclude each other", hint="leave one out")
    at, kind, found = read_samples(run, step=step, rows=rows)
    if best or worst:
        found = by_reward(found, best=best)[: None if as_json else count]
    if as_json:
        print_json({"step": at, "rows": kind, "samples": [one.to_json() for one in found]})
        return
    groups = [[one] for one in found] if best or worst else by_prompt(found)
    stdout.print(Text(f"step {at}, {kind.replace('_', '-')} prompts, {len(groups)} in all"))
    for group in groups[:count]:
        stdout.print()
        stdout.print(Text(f"{group[0].place}  ", style="dim") + _prompt(group[0]))
        stdout.print(_table(group))


def _prompt(sample: Any) -> Text:
    """The end of a prompt, on one line."""
    turns = sample.prompt
    text = turns if isinstance(turns, str) else str(turns[-1].get("content", "")) if turns else ""
    text = " ".join(text.split())
    return Text(text if len(text) <= _PROMPT else f"…{text[-_PROMPT:]}", style="bold")


def _table(group: list[Any]) -> Table:
    """Responses with their rewards, a row each."""
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 1))
    names = list(group[0].columns)
    single = names == [name for name in names if name != "task"][:1]  # the sum says it already
    for name in ("reward", *([] if single else names)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("response", overflow="fold")
    for sample in group:
        numbers = [sample.reward, *([] if single else sample.columns.values())]
        text = Text(" ".join(sample.response.split()) or "(nothing)")
        if sample.finish == "length":
            text.append(" …", style="dim")
        for name, note in sample.notes.items():
            text.append(f"\n{name}: {note}", style="dim")
        table.add_row(*("-" if math.isnan(x) else f"{x:.4g}" for x in numbers), text)
    return table
