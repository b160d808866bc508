"""`alignkit plan`: everything that a run would decide, without running it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from alignkit.cli.output import print_json, print_pairs
from alignkit.cli.training.train import OverridesArgument
from alignkit.terminal import print_line


def name_foreign(recipe: Any) -> list[str]:
    """Say, before anything is opened, what a recipe would execute, fetch or talk to."""
    from alignkit.stages.inputs.foreign import foreign_parts

    lines = foreign_parts(recipe)
    for line in lines:
        print_line(f"this recipe {line}", "note")
    return lines


GpuOption = Annotated[
    str | None,
    typer.Option(help="Plan for other cards, as in h100:8 or 4090.", metavar="NAME[:N]"),
]
MemoryOption = Annotated[
    str | None, typer.Option(help="Plan for so much memory a process, as in 24GB.")
]


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Recipe file, or the name of a shipped one; none with --model.",
            show_default=False,
        ),
    ] = None,
    overrides: OverridesArgument = None,
    processes: Annotated[int, typer.Option(help="Training processes.", min=1)] = 1,
    gpu: GpuOption = None,
    memory: MemoryOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="Only sizes of this model: a folder, a config.json or a known name."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of --model's cache.", min=1)] = 4096,
    sequences: Annotated[int, typer.Option(help="Of --model's cache.", min=1)] = 1,
    read: Annotated[float, typer.Option(help="Tokens of --model's training.", min=1)] = 1e9,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show steps, tokens, trained weights, memory, time and warnings of a recipe."""
    from alignkit.errors import AlignkitError, RecipeError

    if model is not None:
        _show_sizes(model, tokens, sequences, read, gpu, as_json=as_json)
        return
    if recipe is None:
        raise RecipeError(
            [AlignkitError("no recipe was named", hint="alignkit plan RECIPE, or --model MODEL")]
        )
    from alignkit.recipe.reading.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    foreign = name_foreign(loaded.recipe)
    if gpu is None and memory is None:
        from alignkit.stages.registry import plan_stage

        rows, facts = plan_stage(loaded.recipe, processes)
    else:
        rows, facts = _elsewhere(recipe, overrides or [], loaded.recipe, gpu, memory, processes)
    if as_json:
        elsewhere = {} if gpu is None and memory is None else {"fits": facts.fits}
        print_json({**facts.to_json(), **elsewhere, "foreign": foreign})
        return
    _show(loaded.recipe, rows, facts)


def _elsewhere(
    name: str, overrides: list[str], recipe: Any, gpu: str | None, memory: str | None, count: int
) -> Any:
    """Rows and plan for another machine; says whether it fits, and what would make it."""
    from alignkit.jobs.plan_elsewhere import Elsewhere, plan_elsewhere, smallest_change
    from alignkit.recipe.planning.cards import MFU, read_gpu, read_size
    from alignkit.recipe.reading.load import load_recipe

    card, cards = (None, count) if gpu is None else read_gpu(gpu)
    machine = Elsewhere(card, cards, None if memory is None else read_size(memory))
    rows, facts = plan_elsewhere(recipe, machine)
    if card is not None:
        print_line(
            f"time at {MFU:.0%} of the published {card.teraflops:g} TFLOP/s, which nobody has "
            "measured here",
            "note",
        )
    free = facts.hardware.memory / 1e9
    if facts.fits:
        print_line(f"fits: {facts.memory.peak / 1e9:.1f} of {free:.1f} GB")
        return rows, facts
    print_line(f"does not fit: {facts.memory.peak / 1e9:.1f} of {free:.1f} GB", "warning")
    found = smallest_change(
        recipe, lambda more: load_recipe(name, [*overrides, *more]).recipe, machine
    )
    if found is None:
        print_line("no smaller adapter, quantization or max_length makes it fit")
    else:
        change, smaller = found
        print_line(f"fits with {' '.join(change)}: {smaller.memory.peak / 1e9:.1f} GB")
    return rows, facts


def _show_sizes(
    name: str, tokens: int, sequences: int, read: float, gpu: str | None, *, as_json: bool
) -> None:
    """What a model needs, whatever it is trained on."""
    from alignkit.jobs.size_model import size_model
    from alignkit.recipe.planning.cards import MFU, read_gpu
    from alignkit.recipe.planning.sizing import Sizes, training_operations

    sizes = Sizes(size_model(name), tokens, sequences, read)
    if as_json:
        print_json(sizes.to_json())
        return
    lines = sizes.lines()
    if gpu is not None:
        card, count = read_gpu(gpu)
        work = training_operations(sizes.model.parameters, read)
        days = work / (card.teraflops * 1e12 * MFU * count) / 86_400
        lines.append(
            ("time", f"{days:,.2f} days on {count} × {card.name} at {MFU:.0%} of its speed")
        )
    print_pairs(lines)


def _show(recipe: Any, rows: Any, facts: Any) -> None:
    from alignkit.data.report import describe_rows

    model, data, machine = facts.model, facts.data, facts.hardware
    gigabytes = {name: value / 1e9 for name, value in vars(facts.memory).items()}
    terms = ", ".join(f"{n.replace('_', ' ')} {v:.2f}" for n, v in gigabytes.items() if n != "peak")
    print_pairs(
        [
            ("stage", f"{facts.stage} -> {recipe.output}"),
            ("model", f"{model.architecture}, {model.parameters / 1e6:,.1f} M weights"),
            (
                "trained",
                f"{'at most ' * model.at_most}{model.trainable:,} weights "
                f"({model.trainable / model.parameters:.2%}), {recipe.adapter.kind}",
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
