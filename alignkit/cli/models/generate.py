"""`alignkit generate`: answers to prompts, from one model or from two side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from alignkit.cli.models.best_of import answer_best, check_best_of, print_best
from alignkit.cli.models.decoding import (
    BeamsOption,
    DraftOption,
    MaxNewTokensOption,
    MinPOption,
    PenaltyOption,
    SeedOption,
    StopOption,
    TopKOption,
    TopPOption,
    TypicalPOption,
)
from alignkit.cli.output import print_json, stdout
from alignkit.cli.versions import warn_of_versions
from alignkit.errors import AlignkitError

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Run folder, model folder, .gguf file, adapter, hub id or known name.",
        show_default=False,
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base.")
]
BaseOption = Annotated[
    str | None, typer.Option(help="Base of the adapter, in place of the one it names.")
]
AgainstOption = Annotated[
    str | None, typer.Option(help="A second model; its answers are shown alongside.")
]
BestOfOption = Annotated[
    int | None, typer.Option(help="Sample this many answers; --reward picks the best.", min=2)
]


def generate(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, read them from stdin.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts from a file, one per line.")
    ] = None,
    against: AgainstOption = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token, the default; 1 with --best-of."),
    ] = None,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    typical_p: TypicalPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    beams: BeamsOption = 1,
    stop: StopOption = None,
    draft: DraftOption = None,
    seed: SeedOption = 0,
    best_of: BestOfOption = None,
    reward: Annotated[str | None, typer.Option(help="Reward model of --best-of.")] = None,
    dtype: DtypeOption = "auto",
    base: BaseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Answer prompts with a model."""
    warn_of_versions()
    from alignkit.generation.answers import generate_answers
    from alignkit.generation.sampling import SamplingSettings
    from alignkit.jobs.precision import dtype_for

    usual = 0.0 if best_of is None else 1.0
    warmth = usual if temperature is None else temperature
    plain = max_new_tokens, warmth, top_p, top_k, repetition_penalty, seed
    settings = SamplingSettings(*plain, min_p, typical_p, beams, tuple(stop or ()))
    if best_of is not None or reward is not None:
        check_best_of(best_of, reward, against, settings, draft)
        dtype = dtype_for(model, dtype, base)
    asked = _prompts(prompts or [], file)
    head = [{"role": "system", "content": system}] if system else []
    turns = [[*head, {"role": "user", "content": prompt}] for prompt in asked]
    if best_of is not None and reward is not None:
        answered = answer_best(model, reward, turns, best_of, settings, dtype, base)
        print_best(answered, asked, as_json)
        return
    answers = {}
    for name in [against, model] if against else [model]:
        opened = open_for_inference(name, dtype, base if name == model else None)
        guessing = open_for_inference(draft, dtype) if draft and name == model else None
        answers[name] = generate_answers(opened, turns, settings, guessing)
        del opened, guessing
    if against:
        _print_both(asked, answers, as_json)
    else:
        _print_answers(asked, answers[model], as_json)


def open_for_inference(name: str, dtype: str, base: str | None = None) -> Any:
    """The model on this machine's device; see `open_language_model`."""
    from alignkit.jobs.precision import dtype_for
    from alignkit.models.base.loading import DTYPES
    from alignkit.models.opening import open_language_model
    from alignkit.runtime.devices import find_device
    from alignkit.runtime.tuning import tune_device

    tune_device()
    chosen = DTYPES[dtype_for(name, dtype, base)]
    return open_language_model(name, dtype=chosen, device=find_device(), base=base)


def _prompts(arguments: list[str], file: Path | None) -> list[str]:
    try:
        prompts = [prompt for prompt in _read_prompts(list(arguments), file) if prompt]
    except UnicodeDecodeError as error:
        raise AlignkitError(
            f"{file or 'the standard input'} is not UTF-8 text: {error.reason}",
            hint="convert it: iconv -f latin1 -t utf-8 old > new",
        ) from None
    if not prompts:
        raise AlignkitError("there is no prompt", hint='as in: alignkit generate MODEL "Hello"')
    return prompts


def _read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    if file is not None:
        from alignkit.recipe.assets import find_path

        path = find_path(str(file))
        if path is None or not path.is_file():
            raise AlignkitError(
                f"{file}: no such file", hint="name a text file with one prompt per line"
            )
        prompts += [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    elif not prompts and not sys.stdin.isatty():
        prompts = [line.strip() for line in sys.stdin]
    return prompts


def _print_answers(asked: list[str], answers: list[str], as_json: bool) -> None:
    if as_json:
        pairs = zip(asked, answers, strict=True)
        print_json([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])
        return
    for number, prompt in enumerate(asked):
        if len(asked) > 1:
            stdout.print(Text(f"> {prompt}", style="bold"))
        stdout.print(Text(answers[number]))
        if number < len(asked) - 1:
            stdout.print()


def _print_both(asked: list[str], answers: dict[str, list[str]], as_json: bool) -> None:
    """The answers of two models side by side."""
    if as_json:
        rows = enumerate(asked)
        print_json(
            [{"prompt": p, "answers": {k: v[n] for k, v in answers.items()}} for n, p in rows]
        )
    else:
        stdout.print(_table(asked, answers))


def _table(prompts: list[str], answers: dict[str, list[str]]) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=1)
    for name in answers:
        table.add_column(name, ratio=2)
    for number, prompt in enumerate(prompts):
        table.add_row(Text(prompt), *(Text(texts[number]) for texts in answers.values()))
    return table
