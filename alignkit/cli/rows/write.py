"""`alignkit data clean` and `split`: files of rows made from others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.output import print_json, say
from alignkit.cli.rows.look import (
    ColumnsOption,
    EntityOption,
    FilesArgument,
    TakeOption,
    ThresholdOption,
    renamed,
)

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="The .jsonl file to write.", show_default=False)
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Remove such rows; repeatable: unreadable, unanswered, placeholders, leaks, refusals, "
        "repetition, lines, symbols, bullets, ellipses, letters, word-length, stop-words, "
        "personal-data, equal, near."
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="standard: unreadable, placeholders, repetition, equal and near; gopher: pages of the "
        "web that are no prose. What it removes is printed."
    ),
]
LanguageOption = Annotated[
    list[str] | None,
    typer.Option(help="Remove rows in other languages than this, as in en; repeatable."),
]
HeldOutOption = Annotated[
    list[str] | None,
    typer.Option("--held-out", help="Remove rows of this file from these; repeatable."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the files.")]


def clean(
    files: FilesArgument,
    output: OutputOption,
    drop: DropOption = None,
    preset: PresetOption = None,
    min_words: Annotated[
        int | None, typer.Option(help="Remove rows whose answer has fewer.", min=1)
    ] = None,
    max_words: Annotated[
        int | None, typer.Option(help="Remove rows whose answer has more.", min=1)
    ] = None,
    language: LanguageOption = None,
    held_out: HeldOutOption = None,
    mask: Annotated[
        bool, typer.Option("--mask", help="Replace personal data by its kind, as in [EMAIL].")
    ] = False,
    entity: EntityOption = None,
    threshold: ThresholdOption = 0.8,
    columns: ColumnsOption = None,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Write rows without those that were named; the others go beside it, each with its reason."""
    from alignkit.curation.clean import clean_files, side_of
    from alignkit.jobs.clean_data import CleanRequest, clean_options
    from alignkit.runtime.progress import track

    request = CleanRequest(
        drop=drop or (),
        preset=preset,
        least=min_words,
        most=max_words,
        languages=language or (),
        held_out=held_out or (),
        mask=mask,
        entities=entity or (),
        threshold=threshold,
        columns=renamed(columns),
    )
    options = clean_options(request, say, track)
    target = _target(output)
    _require_free([target, side_of(target)], overwrite)
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
    seed: Annotated[int, typer.Option(help="Of the choice.", min=0)] = 0,
    threshold: ThresholdOption = 0.8,
    columns: ColumnsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Divide rows in two files, with equal prompts and near-duplicates on one side."""
    from alignkit.curation.parts import split_files
    from alignkit.runtime.progress import track

    targets = [_target(train), _target(held_out)]
    _require_free(targets, overwrite)
    done = split_files(
        files,
        *targets,
        share=share,
        seed=seed,
        threshold=threshold,
        columns=renamed(columns),
        track=track,
    )
    say(done.line())


def convert(
    files: FilesArgument,
    output: OutputOption,
    to: Annotated[
        str,
        typer.Option(
            help="messages, sharegpt, alpaca, prompt_completion, text, prompts, preference, "
            "sharegpt_preference, hh, labelled or openai."
        ),
    ] = "messages",
    source: Annotated[
        str,
        typer.Option(
            "--from", help="Format of the rows, or axolotl:TYPE; auto finds it from their keys."
        ),
    ] = "auto",
    name: Annotated[
        str | None,
        typer.Option(help="Of a dataset in dataset_info.json, or its path in Axolotl's YAML file."),
    ] = None,
    columns: ColumnsOption = None,
    encoding: Annotated[str, typer.Option(help="Of the files' text, as in cp1252.")] = "utf-8",
    delimiter: Annotated[str, typer.Option(help="Between the columns of a CSV file.")] = ",",
    take: TakeOption = None,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Write rows in another format, each read back; what it cannot say is counted."""
    from alignkit.curation.converting.convert import convert_rows
    from alignkit.curation.converting.sources import source_rows
    from alignkit.data.files.content import Dialect
    from alignkit.runtime.progress import track

    target = _target(output)
    _require_free([target], overwrite)
    dialect = Dialect(encoding, delimiter)
    (rows, read), notes = source_rows(
        files, source, name=name, columns=renamed(columns), take=take, dialect=dialect
    )
    for note in notes:
        say(f"note: {note}")
    done = convert_rows(rows, target, to, read=read, track=track)
    if as_json:
        print_json(done.to_json())
        return
    for line in done.lines():
        say(line)


def _target(path: Path) -> Path:
    """The file itself that is written, where a link leads to."""
    from alignkit.errors import DataError
    from alignkit.files import output_path

    target = output_path(path).resolve()
    if target.suffix != ".jsonl":
        raise DataError(f"{path}: rows are written as .jsonl", hint=f"name {path.stem}.jsonl")
    if target.is_dir():
        raise DataError(f"{path} is a folder", hint="name a file in it")
    return target


def _require_free(paths: Sequence[Path], overwrite: bool) -> None:
    from alignkit.errors import DataError

    if len(set(paths)) < len(paths):
        raise DataError(f"{paths[0]} is named twice", hint="name a file for each part")
    for path in paths:
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists", hint="name another file, or add --overwrite")
