"""`alignkit data`: looking at data sets, and making them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.models.generate import BaseOption, DtypeOption
from alignkit.cli.output import print_json, print_pairs, say, stdout
from alignkit.cli.versions import warn_of_versions

data = typer.Typer(no_args_is_help=True)


@data.command("label")
def label(
    model: Annotated[
        str, typer.Argument(help="Model that answers: a run, folder or hub id.", show_default=False)
    ],
    prompts: Annotated[
        str, typer.Argument(help="File of prompts, of any row format.", show_default=False)
    ],
    reward: Annotated[
        str, typer.Option(help="Run of the reward stage that judges.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .jsonl file of pairs.", show_default=False)
    ],
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits; above 0.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    take: Annotated[int | None, typer.Option(help="Read only this many rows.")] = None,
    margin: Annotated[
        float, typer.Option(help="Leave out prompts whose rewards differ by no more.")
    ] = 0.0,
    dtype: DtypeOption = "auto",
    base: BaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Let a model answer prompts, and a reward model make preference pairs from the answers."""
    from alignkit.recipe.reading.document import Document
    from alignkit.recipe.reading.label import resolve_label

    source = {"path": prompts} if take is None else {"path": prompts, "take": take}
    values: dict[str, Any] = {
        "output": str(output),
        "model": model,
        "prompts": [source],
        "reward": reward,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "margin": margin,
        "dtype": dtype,
    }
    spec = resolve_label(Document(values, {}, "command line", ()))
    # The rows name the models as the user did.
    spec = spec.model_copy(update={"model": model, "reward": reward})
    warn_of_versions()
    from alignkit.jobs.label import label_prompts

    summary = label_prompts(spec, output, say, base=base, overwrite=overwrite)
    if as_json:
        print_json(summary.to_json())
        return
    for line in summary.lines():
        say(line)


@data.command("check")
def check(
    files: Annotated[
        list[str], typer.Argument(help="Files of rows, of any format.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Count lengths in its tokens.  [default: words]", show_default=False),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", help="A file whose rows must not be in these; repeatable."),
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="A file of words that must not stand in a row, one a line.")
    ] = None,
    languages: Annotated[bool, typer.Option("--languages", help="Count languages.")] = False,
    no_near: Annotated[
        bool, typer.Option("--no-near", help="Do not look for near-duplicates.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(help="Jaccard similarity of near-duplicates' five-character pieces.")
    ] = 0.8,
    take: Annotated[int | None, typer.Option(help="Read only this many rows of each.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page, too.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 if a row has a fault.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is in files of rows: duplicates, leaks, placeholders, refusals, lengths, more."""
    from alignkit.jobs.check_data import CheckRequest, check_data

    report = check_data(
        CheckRequest(
            files=files,
            model=model,
            held_out=held_out or (),
            words=words,
            languages=languages,
            near=not no_near,
            threshold=threshold,
            take=take,
            html=html,
        )
    )
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)
    if html is not None:
        say(f"wrote {html}")
    if strict and report.faults:
        raise typer.Exit(2)


@data.command("clean")
def clean(
    files: Annotated[
        list[str], typer.Argument(help="Files of rows, of any format.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .jsonl file to write.", show_default=False)
    ],
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Remove such rows; repeatable: unreadable, equal, near, placeholders, leaks, "
            "refusals, repetition, personal-data."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="standard: unreadable, equal, near, placeholders and repetition."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", help="Remove rows of this file from these; repeatable."),
    ] = None,
    mask: Annotated[
        bool, typer.Option("--mask", help="Replace personal data by its kind, as in [EMAIL].")
    ] = False,
    threshold: Annotated[
        float, typer.Option(help="Jaccard similarity of near-duplicates' five-character pieces.")
    ] = 0.8,
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
    for path in (target, side_of(target)):
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists", hint="name another --output, or add --overwrite")
    if preset:
        say(f"preset {preset}: {', '.join(PRESETS[preset])}")
    options = CleanOptions(tuple(dict.fromkeys(names)), held_out or (), mask, threshold)
    done = clean_files(files, target, options)
    if as_json:
        print_json(done.to_json())
        return
    for line in (*done.lines(), f"the others, with their reasons: {side_of(target)}"):
        say(line)


def _print_report(report: Any) -> None:
    """Facts, then a line for each finding and its first rows."""
    pairs = [("rows", f"{report.rows:,} in {', '.join(report.files)}")]
    for name, value in report.facts.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
        pairs.append((name, str(shown)))
    print_pairs(pairs)
    if not report.findings:
        stdout.print(Text("nothing was found", style="bold green"))
    for one in report.findings:
        style = "bold red" if one.weight == "fault" else "bold yellow"
        sign = "fault" if one.weight == "fault" else "look"
        stdout.print()
        stdout.print(Text(f"{sign}: {one.count:,} {one.name}", style=style))
        stdout.print(Text(f"  {one.why}: {one.mend}"))
        more = ", …" if one.count > len(one.places) else ""
        stdout.print(Text(f"  {', '.join(one.places)}{more}", style="dim"))
        if one.examples:
            table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
            for example in one.examples:
                table.add_row(*(Text(text) for text in example))
            stdout.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key}: {inner:,}" for key, inner in value.items()) + ")"
    return f"{value:,}" if isinstance(value, int) else str(value)
