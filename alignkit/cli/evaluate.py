"""`alignkit eval`: held-out loss, perplexity and token accuracy."""

from __future__ import annotations

from typing import Annotated

import typer

from alignkit.cli.generate import BaseOption, DtypeOption
from alignkit.cli.output import print_json, say, stdout


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Run folders, models or adapters.", metavar="MODEL...")
    ],
    data: Annotated[
        str | None, typer.Option(help="Rows to evaluate on; default is the first run's own.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest row of --data, in tokens; default 1024.", min=8)
    ] = None,
    take: Annotated[int | None, typer.Option(help="Only the first so many rows.", min=1)] = None,
    dtype: DtypeOption = "bfloat16",
    base: BaseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the values as JSON.")] = False,
) -> None:
    """Measure how well models predict held-out answers."""
    from alignkit.stages.evaluate import evaluate_models

    found = evaluate_models(
        models, data=data, max_length=max_length, take=take, dtype=dtype, base=base, say=say
    )
    if as_json:
        print_json(found)
        return
    width = max(len(name) for name in found)
    stdout.print(f"{'model':<{width}}  {'loss':>8}  {'perplexity':>10}  {'accuracy':>8}  tokens")
    for name, values in found.items():
        stdout.print(
            f"{name:<{width}}  {values['loss']:>8.4f}  {values['perplexity']:>10.3f}  "
            f"{values['accuracy']:>8.1%}  {values['tokens']:,}"
        )
