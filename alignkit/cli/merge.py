"""`alignkit merge-lora`: adapter -> verified dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.output import print_json, say


def merge_lora(
    source: Annotated[
        str, typer.Argument(help="Run folder or PEFT adapter folder.", metavar="RUN_OR_ADAPTER")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model; default is what the adapter records.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; default is merged/ of the run.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; default is the base's.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows for the check; default is the run's own.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    any_base: Annotated[
        bool,
        typer.Option("--any-base", help="Accept other weights than it was trained over."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge a LoRA or IA3 adapter into its base, and check the result against base + adapter."""
    from alignkit.stages.merge import merge_run

    report = merge_run(
        source,
        base=base,
        output=output,
        dtype=dtype,
        data=data,
        overwrite=overwrite,
        any_base=any_base,
    )
    if as_json:
        print_json(report.to_json())
        return
    for line in report.lines():
        say(line)
