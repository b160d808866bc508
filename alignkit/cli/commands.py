"""The list of commands. A command is imported only when it runs, not to be listed."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from alignkit.recipe.stages.built_in import BUILT_IN

STAGES = {name: line for name, (_, line) in BUILT_IN.items()}
"""Stage -> help line of its command; all of these are `alignkit.cli.training.train`."""

COMMANDS = {
    "run": (
        "alignkit.cli.training.run:run",
        "Run the stages of a pipeline; what is done and has not changed is skipped.",
    ),
    "plan": (
        "alignkit.cli.training.plan:plan",
        "Show steps, tokens, trained weights, memory, time and warnings of a recipe.",
    ),
    "inspect": (
        "alignkit.cli.training.inspect:inspect",
        "Show rows as the model will read them, and what happened to the others.",
    ),
    "merge-lora": (
        "alignkit.cli.models.merge:merge_lora",
        "Merge adapters into their base, and check the result against base + adapter.",
    ),
    "generate": ("alignkit.cli.models.generate:generate", "Answer prompts with a model."),
    "chat": ("alignkit.cli.models.chat:chat", "Talk to a model."),
    "eval": (
        "alignkit.cli.models.evaluate:evaluate",
        "Measure models on held-out answers or preferences; score answers with a reward model.",
    ),
    "fetch": (
        "alignkit.cli.models.fetch:fetch",
        "Download a known model, check its hash and convert it to safetensors.",
    ),
    "doctor": (
        "alignkit.cli.doctor:doctor",
        "Show versions, device, memory and disk, and name what would stop a run.",
    ),
    "report": (
        "alignkit.cli.training.report:report",
        "Write a page about runs: results, curves, what to look at, answers, recipe, provenance.",
    ),
    "samples": (
        "alignkit.cli.training.samples:samples",
        "Show what a policy answered in a run, with its rewards side by side.",
    ),
    "export": (
        "alignkit.cli.models.export:export",
        "Write a model for other programs, and check it.",
    ),
    "data": (
        "alignkit.cli.rows.group:data",
        "Look at files of rows, clean and split them, make pairs.",
    ),
    "recipes": (
        "alignkit.cli.training.recipes:recipes",
        "Shipped recipes and what their keys mean.",
    ),
}
"""Command -> its function or group of commands, as `module:name`, and its help line."""


class CommandList(TyperGroup):
    """All commands by name and help line; only the one that runs is imported."""

    def __init__(self, **settings: Any) -> None:
        lines = STAGES | {name: line for name, (_, line) in COMMANDS.items()}
        listed = {name: TyperCommand(name, help=line) for name, line in lines.items()}
        super().__init__(**settings | {"commands": listed})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The name, the command itself in place of its line in the list, and its arguments."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            self.commands.update(_stages_of_packages())
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and load_command(str(name)), rest


def load_command(name: str) -> Any:
    """The command of this name, imported; typer has read its options."""
    parent = typer.Typer()
    if name not in COMMANDS:
        from alignkit.cli.training.train import train_command

        line = STAGES.get(name) or _stages_of_packages()[name].help
        parent.command(name, help=line)(train_command(name))
    else:
        place, line = COMMANDS[name]
        module, _, attribute = place.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, typer.Typer):
            parent.add_typer(target, name=name, help=line)
        else:
            parent.command(name, help=line)(target)
    return get_group(parent).commands[name]


def _stages_of_packages() -> dict[str, TyperCommand]:
    """Stages of other packages; looked up only if a name is not built in."""
    from alignkit.recipe.stages.registry import broken_stages, stages

    lines = {name: (recipe.__doc__ or "").partition("\n")[0] for name, recipe in stages().items()}
    lines |= {name: str(error) for name, error in broken_stages().items()}
    return {n: TyperCommand(n, help=line) for n, line in lines.items() if n not in STAGES}
