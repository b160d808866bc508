"""A recipe's plan for a machine that is not this one, and what would make it fit there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from alignkit.recipe.adapters import FullSpec, LoraSpec
from alignkit.recipe.facts import HardwareFacts
from alignkit.recipe.planning.cards import Card, with_card
from alignkit.recipe.planning.plan import Plan, make_plan
from alignkit.recipe.stages.base import Recipe
from alignkit.stages.inputs.rows import AnyRows
from alignkit.stages.registry import plan_stage

_SHORTEST = 256
"""Tokens of max_length below which nothing is proposed."""


@dataclass(frozen=True)
class Elsewhere:
    """Another machine.

    Args:
        card: of which it has `count`; None for this device.
        count: processes.
        memory: bytes of a process; None takes the card's, or what is free here.
    """

    card: Card | None = None
    count: int = 1
    memory: int | None = None

    def hardware(self, here: HardwareFacts) -> HardwareFacts:
        """The machine.

        Args:
            here: this one.
        """
        found = here if self.card is None else with_card(here, self.card, self.count)
        return found if self.memory is None else replace(found, memory=self.memory)


def plan_elsewhere(recipe: Recipe, machine: Elsewhere) -> tuple[AnyRows, Plan]:
    """Rows and plan of a recipe on another machine.

    Args:
        recipe: with its defaults.
        machine: the other one.

    Raises:
        AlignkitError: anything the user can fix.
    """
    rows, here = plan_stage(recipe, machine.count)
    hardware = machine.hardware(here.hardware)
    dtype, reason = here.dtype, here.dtype_reason
    if machine.card is not None and recipe.model.dtype == "auto":
        dtype = "bfloat16" if machine.card.bfloat16 else "float16"
        reason = f"what a {machine.card.name} multiplies fastest"
    chosen = recipe.model_copy(update={"model": recipe.model.computing_in(dtype, reason)})
    plan = make_plan(
        chosen,
        here.model,
        here.data,
        hardware,
        reward_models=here.reward_models,
        roles=here.roles,
    )
    return rows, plan


def smallest_change(
    recipe: Recipe, load: Callable[[Sequence[str]], Recipe], machine: Elsewhere
) -> tuple[tuple[str, ...], Plan] | None:
    """The first of some changes with which a recipe fits; None if none is enough.

    Args:
        recipe: that does not fit.
        load: the same recipe with further overrides.
        machine: where it should.
    """
    for change in _changes(recipe):
        _, plan = plan_elsewhere(load(change), machine)
        if plan.fits:
            return change, plan
    return None


def _changes(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Overrides, those that change the result least first."""
    if recipe.merge:  # which `merge-lora` can do later, on another machine
        yield ("merge=false",)
    steps: list[tuple[str, ...]] = [()]
    if isinstance(recipe.adapter, FullSpec):
        steps.append(("adapter.kind=lora",))
    adapted = isinstance(recipe.adapter, FullSpec | LoraSpec)
    if adapted and recipe.model.quantization == "none":
        steps.append((*steps[-1], "model.quantization=nf4"))
    yield from steps[1:]
    length = recipe.data.max_length // 2
    while length >= _SHORTEST:
        yield from ((*step, f"data.max_length={length}") for step in steps)
        length //= 2
