"""`alignkit data label`: preference pairs from a model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alignkit.cli.models.generate import BaseOption, DtypeOption
from alignkit.cli.output import print_json, say
from alignkit.cli.versions import warn_of_versions


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
