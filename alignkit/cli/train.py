"""`alignkit sft`: train."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from alignkit.cli.launch import is_worker, launch_processes
from alignkit.cli.output import print_json, say

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe file, or the name of a shipped one.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="key.sub=value pairs that replace keys of the recipe.", show_default=False),
]


def sft(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in the output folder.")
    ] = False,
    processes: Annotated[int, typer.Option(help="Training processes on this machine.", min=1)] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Fine-tune on demonstrations, with prompt-masked loss."""
    from alignkit.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides, stage="sft")
    if processes > 1 and not is_worker():
        raise typer.Exit(launch_processes(processes))
    from alignkit.stages.session import RunOptions
    from alignkit.stages.sft import run_sft

    command = shlex.join(["alignkit", *sys.argv[1:]])
    summary = run_sft(loaded.recipe, RunOptions(resume, overwrite, quiet, command))
    if summary is None:
        return
    if as_json:
        print_json(summary.to_json())
        return
    if quiet:
        return
    if summary.before:
        before, after = summary.before, summary.after
        say(
            f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}, token accuracy "
            f"{before['accuracy']:.1%} -> {after['accuracy']:.1%} "
            f"({after['tokens']:,} tokens)"
        )
    if summary.merge is not None:
        for line in summary.merge.lines():
            say(line)
    say(f"next: alignkit chat {summary.output}")
