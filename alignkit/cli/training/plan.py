"""`alignkit plan`: everything that a run would decide, without running it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from alignkit.cli.output import print_json, print_pairs
from alignkit.cli.training.train import OverridesArgument, RecipeArgument
from alignkit.terminal import print_line


def name_foreign(recipe: Any) -> list[str]:
    """Say, before anything is opened, what a recipe would execute, fetch or talk to."""
    from alignkit.stages.inputs.foreign import foreign_parts

    lines = foreign_parts(recipe)
    for line in lines:
        print_line(f"this recipe {line}", "note")
    return lines


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    processes: Annotated[int, typer.Option(help="Training processes.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show steps, tokens, trained weights, memory and warnings of a recipe."""
    from alignkit.recipe.reading.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from alignkit.data.report import describe_rows
    from alignkit.stages.registry import plan_stage

    foreign = name_foreign(loaded.recipe)
    rows, facts = plan_stage(loaded.recipe, processes)
    if as_json:
        print_json({**facts.to_json(), "foreign": foreign})
        return
    model, data, machine = facts.model, facts.data, facts.hardware
    gigabytes = {name: value / 1e9 for name, value in vars(facts.memory).items()}
    terms = ", ".join(f"{n.replace('_', ' ')} {v:.2f}" for n, v in gigabytes.items() if n != "peak")
    print_pairs(
        [
            ("stage", f"{facts.stage} -> {loaded.recipe.output}"),
            ("model", f"{model.architecture}, {model.parameters / 1e6:,.1f} M weights"),
            (
                "trained",
                f"{'at most ' * model.at_most}{model.trainable:,} weights "
                f"({model.trainable / model.parameters:.2%}), {loaded.recipe.adapter.kind}",
            ),
            (
                "rows",
                f"{data.rows:,} rows, {data.tokens:,} tokens ({data.trained_tokens:,} trained), "
                f"longest {data.longest}; held out {data.eval_rows:,}",
            ),
            ("precision", f"{facts.dtype}, {facts.dtype_reason}"),
            *_reference(facts),
            *((name, text) for name, text in (role.split(": ", 1) for role in facts.roles)),
            (
                "steps",
                f"{facts.steps:,} of {facts.batch_size} examples ({facts.steps_per_epoch:,} an "
                f"epoch), {facts.warmup_steps} of them warm-up to {facts.learning_rate:g}",
            ),
            (
                "passes",
                f"{facts.microbatches} of at most {facts.microbatch_tokens:,} tokens a step, "
                f"gradient checkpointing {'on' if facts.gradient_checkpointing else 'off'}",
            ),
            ("tokens", f"{facts.tokens:,} read, {facts.trained_tokens:,} trained"),
            ("device", f"{machine.device} ({machine.name}), {machine.cores} threads"),
            ("attention", machine.attention),
            ("memory", f"about {gigabytes['peak']:.1f} GB ({terms})"),
            *([("time", facts.time)] if facts.time else []),
        ]
    )
    for name, dataset in (("train", rows.train), ("held out", rows.held_out)):
        for line in describe_rows(name, dataset.report)[1:] if dataset is not None else []:
            print_line(line)
    for warning in facts.warnings:
        print_line(warning, "warning")


def _reference(facts: Any) -> list[tuple[str, str]]:
    if facts.reference is None:
        return []
    return [("reference", f"{facts.reference.replace('_', ' ')}, {facts.reference_reason}")]
