"""`alignkit merge-lora`: adapter -> verified dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.models.generate import TrustOption
from alignkit.cli.output import print_json, say
from alignkit.cli.versions import warn_of_versions
from alignkit.errors import AlignkitError

OntoOption = Annotated[
    str,
    typer.Option(
        help="After training over a quantized base: original or dequantized weights; auto takes "
        "the original ones unless the adapter does worse there."
    ),
]
WeightsOption = Annotated[
    str | None, typer.Option(help="Factors of several adapters, such as 0.7,0.3; default 1.")
]
MethodOption = Annotated[
    str, typer.Option(help="For several adapters: linear, ties, dare_linear or dare_ties.")
]
DensityOption = Annotated[
    float, typer.Option(help="Share of each adapter's change that ties and dare keep.")
]


def merge_lora(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Run folder or PEFT adapter folder; several become one model.",
            metavar="RUN_OR_ADAPTER...",
        ),
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
        str | None, typer.Option(help="Rows for the check; default is shipped ones.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    any_base: Annotated[
        bool,
        typer.Option(
            "--any-base", help="Accept a base with other weights than it was trained over."
        ),
    ] = False,
    onto: OntoOption = "auto",
    weights: WeightsOption = None,
    method: MethodOption = "linear",
    density: DensityOption = 0.5,
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge adapters into their base, and check the result against base + adapter."""
    warn_of_versions()
    from alignkit.jobs.merge import MergeOptions, merge_run

    options = MergeOptions(
        base=base,
        output=output,
        dtype=dtype,
        data=data,
        overwrite=overwrite,
        any_base=any_base,
        onto=onto,  # type: ignore[arg-type]
        weights=_numbers(weights) if weights else None,
        method=method,  # type: ignore[arg-type]
        density=density,
        trust_remote_code=trust_remote_code,
    )
    report = merge_run(sources, options)
    if as_json:
        print_json(report.to_json())
        return
    for line in report.lines():
        say(line)


def _numbers(text: str) -> list[float]:
    """`0.7,0.3` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise AlignkitError(
            f"--weights must be numbers with commas between them, got {text!r}",
            hint="one for each adapter: --weights 0.7,0.3",
        ) from None
