"""`alignkit eval`: held-out loss of language models, rewards of pairs, scores of answers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from alignkit.cli.models.generate import BaseOption, DtypeOption, TrustOption
from alignkit.cli.output import print_json, say, stdout
from alignkit.cli.versions import warn_of_versions
from alignkit.errors import AlignkitError


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
    take: Annotated[int | None, typer.Option(help="Read only this many rows.", min=1)] = None,
    reference: Annotated[
        str | None, typer.Option(help="Compare log-probs of pairs with this model.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Score answers to this prompt with a reward model.")
    ] = None,
    answer: Annotated[
        list[str] | None, typer.Option(help="An answer to --prompt; may be repeated.")
    ] = None,
    dtype: DtypeOption = "auto",
    base: BaseOption = None,
    trust_recipe: Annotated[
        bool,
        typer.Option(
            "--trust-recipe", help="Follow the recipe of a run that was not made on this machine."
        ),
    ] = False,
    trust_remote_code: TrustOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the values as JSON.")] = False,
) -> None:
    """Measure models on held-out answers or preferences; score answers with a reward model."""
    warn_of_versions()
    from alignkit.jobs.evaluate import evaluate_models, score_answers
    from alignkit.jobs.question import Question

    question = Question(
        data, max_length, take, dtype, base, reference, trust_recipe, trust_remote_code, say
    )
    if (prompt is None) != (not answer):
        raise AlignkitError("--prompt and --answer go together", hint="give both, or --data")
    if prompt is not None:
        if data is not None:
            raise AlignkitError(
                "--data and --prompt exclude each other", hint="give one of the two"
            )
        scored = {name: score_answers(name, prompt, answer or [], question) for name in models}
        _print_scores(scored, as_json)
        return
    evaluations = evaluate_models(models, question)
    if as_json:
        print_json({name: _as_json(evaluation) for name, evaluation in evaluations.items()})
        return
    for name, evaluation in evaluations.items():
        for place, reward in evaluation.scores:
            stdout.print(Text(f"{reward:>9.4f}  {place}"))
        if len(evaluations) > 1 or evaluation.scores:
            say(name)
    _print_values({name: evaluation.values for name, evaluation in evaluations.items()})


def _as_json(evaluation: Any) -> dict[str, Any]:
    scores = [{"place": place, "reward": reward} for place, reward in evaluation.scores]
    return {**evaluation.values, **({"scores": scores} if scores else {})}


def _print_scores(scored: dict[str, list[tuple[str, float]]], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                name: [{"answer": answer, "reward": reward} for answer, reward in answers]
                for name, answers in scored.items()
            }
        )
        return
    for name, answers in scored.items():
        if len(scored) > 1:
            say(name)
        for answer, reward in answers:
            stdout.print(Text(f"{reward:>9.4f}  {answer}"))


_COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "rewards/accuracies": ("accuracy", "{:.1%}"),
    "rewards/accuracies_low": ("95% from", "{:.1%}"),
    "rewards/accuracies_high": ("to", "{:.1%}"),
    "rewards/margins": ("margin", "{:.4f}"),
    "rewards/mean": ("mean reward", "{:.4f}"),
    "rewards/std": ("std", "{:.4f}"),
    "rewards/min": ("min", "{:.4f}"),
    "rewards/max": ("max", "{:.4f}"),
    "calibration_error": ("calibration error", "{:.3f}"),
    "auc": ("AUC", "{:.3f}"),
    "kl": ("KL", "{:.4f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "pairs": ("pairs", "{:,.0f}"),
    "rows": ("rows", "{:,.0f}"),
}
"""Value -> its heading and format, in the order of the table."""


def _print_values(measured: dict[str, dict[str, float]]) -> None:
    shown = [key for key in _COLUMNS if any(key in values for values in measured.values())]
    table = [["model", *(_COLUMNS[key][0] for key in shown)]]
    for name, values in measured.items():
        cells = [_COLUMNS[k][1].format(values[k]) if k in values else "" for k in shown]
        table.append([name, *cells])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        first = f"{row[0]:<{widths[0]}}"
        rest = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        stdout.print(Text("  ".join([first, *rest])))
