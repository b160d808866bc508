"""`alignkit data check`, `sample` and `diff`: what is in files of rows; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import print_json, print_pairs, say, stdout
from alignkit.terminal import cut

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NEW=OLD",
        help="Rename a column, as in prompt=question; repeatable.",
    ),
]
ThresholdOption = Annotated[
    float, typer.Option(help="Jaccard similarity of near-duplicates' five-character pieces.")
]
EntityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--entity",
        metavar="NAME",
        help="Personal data that presidio recognizes, as in UK_NHS; repeatable.",
    ),
]
TakeOption = Annotated[int | None, typer.Option(help="Read only this many rows of each.", min=1)]
FilesArgument = Annotated[
    list[str], typer.Argument(help="Files of rows, of any format.", show_default=False)
]


def check(
    files: FilesArgument,
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
    threshold: ThresholdOption = 0.8,
    entity: EntityOption = None,
    columns: ColumnsOption = None,
    take: TakeOption = None,
    html: Annotated[Path | None, typer.Option(help="Write a page, too.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 if a row has a fault.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is in files of rows: duplicates, leaks, placeholders, refusals, lengths, more."""
    from alignkit.jobs.check_data import CheckRequest, check_data
    from alignkit.runtime.progress import track

    report = check_data(
        CheckRequest(
            files=files,
            held_out=held_out or (),
            words=words,
            languages=languages,
            near=not no_near,
            threshold=threshold,
            take=take,
            html=html,
            entities=entity or (),
            columns=renamed(columns),
        ),
        None if model is None else _counter(model),
        track,
    )
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)
    if html is not None:
        say(f"wrote {html}")
    if strict and report.faults:
        raise typer.Exit(2)


def _counter(model: str) -> Any:
    """Counts a model's tokens; only this loads the libraries that models need."""
    from alignkit.jobs.count_tokens import token_counter

    return token_counter(model)


def sample(
    files: FilesArgument,
    count: Annotated[int, typer.Option("--count", "-n", help="Rows.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Show some rows, drawn alike from all of them."""
    from alignkit.curation.parts import sample_rows

    found = sample_rows(files, count, seed)
    if as_json:
        print_json(found)
        return
    for one in found:
        stdout.print(Text(one["place"], style="bold"))
        for name, value in (one["row"] or {"": "cannot be read"}).items():
            stdout.print(Text(f"  {name}: ", style="cyan") + Text(cut(str(value))))


def diff(
    before: Annotated[str, typer.Argument(help="File of rows.", show_default=False)],
    after: Annotated[str, typer.Argument(help="File of rows.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Say which rows two files have in common, which only one has, and which answers changed."""
    from alignkit.curation.parts import compare_files

    same, findings = compare_files(before, after)
    if as_json:
        print_json({"same": same, "findings": [one.to_json() for one in findings]})
        return
    print_pairs([("in both", f"{same:,}")])
    _print_findings(findings)


def _print_report(report: Any) -> None:
    """Facts, then a line for each finding and its first rows."""
    pairs = [("rows", f"{report.rows:,} in {', '.join(report.files)}")]
    for name, value in report.facts.items():
        if not value:
            continue
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_shown(x)}" for key, x in value.items() if x != {})
        pairs.append((name, str(shown)))
    print_pairs(pairs)
    if not report.findings:
        stdout.print(Text("nothing was found", style="bold green"))
    _print_findings(report.findings)


def _print_findings(findings: Any) -> None:
    """A line for each, its first rows, and examples side by side."""
    for one in findings:
        style = "bold red" if one.weight == "fault" else "bold yellow"
        sign = "fault" if one.weight == "fault" else "look"
        stdout.print()
        stdout.print(Text(f"{sign}: {one.count:,} {one.name}", style=style))
        stdout.print(Text(f"  {one.why}{one.mend and f': {one.mend}'}"))
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


def renamed(columns: list[str] | None) -> dict[str, str]:
    """What `--columns` says: new name -> old one."""
    from alignkit.errors import DataError

    pairs = dict[str, str]()
    for text in columns or ():
        new, equals, old = text.partition("=")
        if not (new and equals and old):
            raise DataError(
                f"--columns {text} must be a new and an old name",
                hint="as in --columns prompt=question --columns completion=answer",
            )
        if new in pairs:
            raise DataError(
                f"--columns names {new} twice, from {pairs[new]} and {old}", hint="leave one out"
            )
        if old in pairs.values():
            raise DataError(f"--columns names {old} twice", hint="leave one out")
        pairs[new] = old
    return pairs
