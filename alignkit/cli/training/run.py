"""`alignkit run`: a pipeline, from where it stopped to its end."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import print_json, stderr
from alignkit.cli.training.launch import is_worker, typed_command
from alignkit.cli.versions import warn_of_versions
from alignkit.errors import AlignkitError


def run(
    pipeline: Annotated[
        str,
        typer.Argument(help="Pipeline file, or the name of a shipped one.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="stage.key.sub=value pairs that replace keys of a stage.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace changed runs outside the pipeline's folder, and runs it did not make.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the stages as JSON.")] = False,
) -> None:
    """Run the stages of a pipeline; what is done and has not changed is skipped."""
    from alignkit.recipe.reading.pipeline import load_pipeline

    loaded = load_pipeline(pipeline, overrides)
    if is_worker():
        raise AlignkitError(
            "a pipeline runs in one process", hint="train its stages one by one with --processes"
        )
    warn_of_versions()
    from alignkit.pipelines.running import PipelineRun
    from alignkit.stages.running.session import RunOptions

    options = RunOptions(overwrite=overwrite, quiet=quiet, command=typed_command())
    running = PipelineRun(loaded, options)
    try:
        running.run()
    finally:
        if as_json:
            stages = [_as_json(result) for result in running.results]
            print_json({"pipeline": loaded.name, "output": loaded.output, "stages": stages})
        if not quiet:
            stderr.print(_table(running.results))


def _as_json(result: Any) -> dict[str, Any]:
    return {
        "name": result.name,
        "stage": result.stage,
        "status": result.status,
        "seconds": round(result.seconds, 3),
        "output": result.output,
        **result.numbers,
    }


_COLOURS = {"done": "green", "resumed": "green", "failed": "red", "interrupted": "yellow"}
_FORMATS = {
    "loss": "{:.4f}",
    "accuracy": "{:.1%}",
    "rewards/accuracies": "{:.1%}",
    "reward": "{:.4f}",
}
"""Held-out value -> its format, in the order of the table."""


def _table(results: list[Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "what", "seconds", "steps"):
        justify: Any = "right" if name in ("seconds", "steps") else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    table.add_column("results", no_wrap=True)
    table.add_column("output", overflow="fold")
    for result in results:
        ran = result.status not in ("not run", "skipped")
        cells = [
            result.name,
            Text(result.status, style=_COLOURS.get(result.status, "dim")),
            f"{result.seconds:,.1f}" if ran else "",
            str(result.numbers.get("steps", "")),
            "\n".join(describe_numbers(result.numbers)),
            result.output,
        ]
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    return table


def describe_numbers(numbers: dict[str, Any]) -> list[str]:
    """The key numbers of a stage: held-out values before and after, else what there is."""
    before, after = numbers.get("before") or {}, numbers.get("after") or {}
    shown = [
        f"{key} {form.format(before[key])} -> {form.format(after[key])}"
        for key, form in _FORMATS.items()
        if key in before and key in after
    ]
    plain = {k: v for k, v in numbers.items() if k != "steps" and isinstance(v, int | float)}
    return shown or [f"{key} {value:.4g}" for key, value in plain.items()]
