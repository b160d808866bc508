"""`alignkit generate`: answers to prompts, of one model or of two side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.output import print_json, stdout
from alignkit.errors import AlignkitError

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Run folder, model folder, .gguf file, adapter, hub id or known name.",
        show_default=False,
    ),
]
DtypeOption = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
BaseOption = Annotated[str | None, typer.Option(help="Base of an adapter, if it names another.")]


def generate(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none reads them from stdin.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts from a file, one a line.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A second model; answers stand side by side.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repeats less.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dtype: DtypeOption = "bfloat16",
    base: BaseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Answer prompts with a model."""
    from alignkit.generation.answers import generate_answers
    from alignkit.generation.sampling import SamplingSettings

    settings = SamplingSettings(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    asked = _prompts(prompts or [], file)
    head = [{"role": "system", "content": system}] if system else []
    turns = [[*head, {"role": "user", "content": prompt}] for prompt in asked]
    answers = {}
    for name in [against, model] if against else [model]:
        opened = open_for_inference(name, dtype, base if name == model else None)
        answers[name] = generate_answers(opened, turns, settings)
        del opened
    if as_json:
        rows = [
            {
                "prompt": prompt,
                **(
                    {"answer": answers[model][n]}
                    if not against
                    else {"answers": {name: found[n] for name, found in answers.items()}}
                ),
            }
            for n, prompt in enumerate(asked)
        ]
        print_json(rows)
    elif against:
        stdout.print(_table(asked, answers))
    else:
        for number, prompt in enumerate(asked):
            if len(asked) > 1:
                stdout.print(Text(f"> {prompt}", style="bold"))
            stdout.print(Text(answers[model][number]))
            if number < len(asked) - 1:
                stdout.print()


def open_for_inference(name: str, dtype: str, base: str | None = None) -> Any:
    """The model on this machine's device; see `open_language_model`."""
    from alignkit.models.loading import DTYPES
    from alignkit.models.opening import open_language_model
    from alignkit.runtime.devices import find_device

    if dtype not in DTYPES:
        raise AlignkitError(f"--dtype cannot be {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    return open_language_model(name, dtype=DTYPES[dtype], device=find_device(), base=base)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    found = list(given)
    if file is not None:
        from alignkit.recipe.assets import find_path

        path = find_path(str(file))
        if path is None or not path.is_file():
            raise AlignkitError(f"{file}: no such file", hint="one prompt a line")
        found += [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    elif not found and not sys.stdin.isatty():
        found = [line.strip() for line in sys.stdin]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise AlignkitError("there is no prompt", hint='as in: alignkit generate MODEL "Hello"')
    return found


def _table(prompts: list[str], answers: dict[str, list[str]]) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=1)
    for name in answers:
        table.add_column(name, ratio=2)
    for number, prompt in enumerate(prompts):
        table.add_row(Text(prompt), *(Text(found[number]) for found in answers.values()))
    return table
