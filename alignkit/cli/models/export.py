"""`alignkit export`: models for llama.cpp, Ollama and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli.output import print_json, say, stdout
from alignkit.cli.versions import warn_of_versions

export = typer.Typer(no_args_is_help=True)

ModelArgument = Annotated[
    str,
    typer.Argument(help="Known name, folder, run folder or hub id.", show_default=False),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@export.command("gguf")
def gguf(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: NAME-TYPE.gguf here.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--type", help="f16, q8_0, bf16 or f32.", metavar="TYPE")
    ] = "f16",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one GGUF file, read back and compared, and a Modelfile: for llama.cpp and Ollama."""
    warn_of_versions()
    from alignkit.jobs.export import gguf_of

    _show(gguf_of(model, output=output, kind=kind, overwrite=overwrite), as_json)


@export.command("bnb")
def bnb(
    model: ModelArgument,
    bits: Annotated[int, typer.Option(help="8 (int8) or 4 (nf4).", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: NAME-int8 or NAME-nf4 here.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model folder quantized by bitsandbytes, read back and compared."""
    warn_of_versions()
    from alignkit.jobs.export import quantized_of

    _show(quantized_of(model, output=output, bits=bits, overwrite=overwrite), as_json)


def _show(exported: Any, as_json: bool) -> None:
    if as_json:
        print_json(exported.to_json())
        return
    for line in exported.lines():
        say(line)
    say("serve it with")
    for command in exported.commands:
        stdout.print(command, markup=False)
