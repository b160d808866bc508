"""`alignkit recipes import`: a configuration of another toolkit as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli.output import print_json, say


def import_recipe(
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML of LLaMA-Factory, Axolotl or TRL, or a script that calls TRL.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The recipe to write. Default: print it."),
    ] = None,
    toolkit: Annotated[
        str | None,
        typer.Option("--from", help="trl, llama-factory or axolotl. Default: told by the keys."),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Stage of a YAML file of TRL, which does not say: sft, dpo, …"),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that shared a step, for the batch size. Default: 1."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print recipe and list as JSON.")] = False,
) -> None:
    """Translate a configuration of another toolkit, and say what became of each of its keys."""
    from alignkit.errors import AlignkitError
    from alignkit.files import output_path, write_text
    from alignkit.recipe.importing.write import import_file

    target = None if output is None else output_path(output)
    if target is not None and target.exists() and not overwrite:
        raise AlignkitError(f"{target} exists", hint="name another file, or add --overwrite")
    done = import_file(file, toolkit=toolkit, stage=stage, processes=processes)
    if target is not None:
        write_text(target, done.text)
    if as_json:
        print_json(done.as_dict())
        return
    if target is None:
        sys.stdout.write(done.text)
    _list(done)
    run = target or "RECIPE"
    say(f"wrote {target}" if target else "nothing was written: add -o RECIPE")
    for command in done.first:
        say(f"first: {command}")
    say(f"next: alignkit plan {run}, alignkit inspect {run}, alignkit {done.stage} {run}")


def _list(done: Any) -> None:
    """The list in three parts, and what is missing."""
    say(f"{done.toolkit}, stage {done.stage}")
    say("\ntranslated")
    for one in done.translated:
        ours = ", ".join(f"{key}: {_shown(value)}" for key, value in one.settings.items())
        say(f"  {one.key}: {one.value} -> {ours}")
    if done.no_counterpart:
        say("\nno counterpart")
    for one in done.no_counterpart:
        say(f"  {one.key}: {one.value} -- {one.reason}")
    if done.off:
        say(f"  off, or so here anyway: {', '.join(done.off)}")
    say("\ndone differently here")
    for one in done.different:
        say(f"  {one.key}: {one.says}" if one.key else f"  {one.says}")
    if done.not_found:
        say("\nnot found: " + ", ".join(done.not_found))
    say("")


_NAMES = ("path", "hub", "rule", "function", "model", "kind")
"""Keys that say what a source of rows or rewards is."""


def _shown(value: Any) -> str:
    from alignkit.recipe.importing.fields import show

    if isinstance(value, dict):
        return next(str(value[key]) for key in _NAMES if value.get(key))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(map(_shown, value))
    return "null" if value is None else show("", value)
