"""`alignkit sft | reward | dpo | kto | ppo`: train."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Annotated

import typer

from alignkit.cli.output import print_json, say
from alignkit.cli.training.launch import is_worker, launch_processes, typed_command
from alignkit.cli.versions import warn_of_versions

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe file, or the name of a shipped one.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="key.sub=value pairs that replace keys of the recipe.", show_default=False),
]


def train_command(stage: str) -> Callable[..., None]:
    """The command of one stage."""

    def command(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Continue from the newest checkpoint.")
        ] = False,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace a run in the output folder.")
        ] = False,
        processes: Annotated[
            int, typer.Option(help="Training processes on this machine.", min=1)
        ] = 1,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    ) -> None:
        from alignkit.recipe.planning.plan import require_examples
        from alignkit.recipe.reading.load import load_recipe

        loaded = load_recipe(recipe, overrides, stage=stage)
        if processes > 1 and not is_worker():
            require_examples(loaded.recipe, processes)
            raise typer.Exit(launch_processes(processes))
        warn_of_versions()
        from alignkit.stages.registry import run_stage
        from alignkit.stages.running.session import RunOptions

        gc.freeze()  # no search for garbage in what is imported: half a second each
        options = RunOptions(resume, overwrite, quiet, typed_command(), loaded.document.files)
        summary = run_stage(loaded.recipe, options)
        if summary is None:
            return
        if as_json:
            print_json(summary.to_json())
            return
        if summary.skipped_steps:
            count = f"{summary.skipped_steps} of {summary.steps} steps"
            say(f"{count} were skipped: their loss or gradients were not finite")
        if quiet:
            return
        if summary.held_out:
            say(f"held out\n{summary.held_out}")
        if summary.merge is not None:
            for text in summary.merge.lines():
                say(text)
        verb = "eval" if loaded.recipe.scalar_head else "chat"
        say(f"next: alignkit {verb} {summary.output}")

    return command
