"""`alignkit data clean` and `split`: files of rows made from others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.output import print_json, say
from alignkit.cli.rows.look import ColumnsOption, FilesArgument, ThresholdOption, renamed


def clean(
    files: FilesArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .jsonl file to write.", show_default=False)
    ],
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Remove such rows; repeatable: unreadable, unanswered, placeholders, leaks, "
            "refusals, repetition, personal-data, equal, near."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="standard: unreadable, placeholders, repetition, equal and near."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", help="Remove rows of this file from these; repeatable."),
    ] = None,
    mask: Annotated[
        bool, typer.Option("--mask", help="Replace personal data by its kind, as in [EMAIL].")
    ] = False,
    threshold: ThresholdOption = 0.8,
    columns: ColumnsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Write rows without those that were named; the others go beside it, each with its reason."""
    from alignkit.curation.clean import PRESETS, CleanOptions, clean_files, side_of
    from alignkit.errors import DataError
    from alignkit.files import output_path

    if preset is not None and preset not in PRESETS:
        raise DataError(f"--preset {preset} is not known", hint=f"one of {', '.join(PRESETS)}")
    names = [*(PRESETS[preset] if preset else ()), *(drop or ())]
    if not names and not held_out and not mask:
        raise DataError(
            "nothing to remove or change was named",
            hint="name it with --drop, --preset, --held-out or --mask; `data check` says what is "
            "there",
        )
    target = output_path(output)
    _require_free([target, side_of(target)], overwrite)
    if preset:
        say(f"preset {preset}: {', '.join(PRESETS[preset])}")
    options = CleanOptions(
        tuple(dict.fromkeys(names)), held_out or (), mask, threshold, renamed(columns)
    )
    done = clean_files(files, target, options)
    if as_json:
        print_json(done.to_json())
        return
    for line in (*done.lines(), f"the others, with their reasons: {side_of(target)}"):
        say(line)


def split(
    files: FilesArgument,
    train: Annotated[Path, typer.Option(help="The .jsonl file of most rows.", show_default=False)],
    held_out: Annotated[
        Path, typer.Option("--eval", help="The .jsonl file of the others.", show_default=False)
    ],
    share: Annotated[float, typer.Option(help="Of the rows that are held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    threshold: ThresholdOption = 0.8,
    columns: ColumnsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
) -> None:
    """Divide rows in two files, with equal prompts and near-duplicates on one side."""
    from alignkit.curation.parts import split_files
    from alignkit.files import output_path

    targets = [output_path(train), output_path(held_out)]
    _require_free(targets, overwrite)
    done = split_files(
        files, *targets, share=share, seed=seed, threshold=threshold, columns=renamed(columns)
    )
    say(done.line())


def _require_free(paths: Sequence[Path], overwrite: bool) -> None:
    from alignkit.errors import DataError

    for path in paths:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists", hint="name another file, or add --overwrite")
