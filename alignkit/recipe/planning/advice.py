"""What a careful practitioner would ask about a plan. Warnings, never silent changes."""

from __future__ import annotations

from alignkit.recipe.adapters import LoraSpec, rate_key
from alignkit.recipe.facts import DataFacts, HardwareFacts
from alignkit.recipe.planning.memory import ROOM, MemoryEstimate
from alignkit.recipe.stages.rates import USUAL_RATES
from alignkit.recipe.stages.schema import KtoRecipe, PpoRecipe, Recipe, examples_per_step

_KINDS = {
    "lora": "LoRA",
    "ia3": "IA3",
    "prefix": "a prefix",
    "projection": "a projected prefix",
    "full": "full weights",
}
"""Adapter -> its name in sentences."""

_KTO_BALANCE = (1.0, 4.0 / 3.0)
"""Range of weight × count of desirable over undesirable rows, section 4 of the KTO paper."""


def find_warnings(
    recipe: Recipe, data: DataFacts, hardware: HardwareFacts, steps: int, memory: MemoryEstimate
) -> list[str]:
    """Everything unusual about a run, one sentence each.

    Args:
        recipe: with its defaults.
        data: sizes of the rows.
        hardware: the machine.
        steps: optimizer steps.
        memory: the estimate.
    """
    training, found = recipe.training, []
    kind = rate_key(recipe.adapter)
    low, high = USUAL_RATES[recipe.stage][kind]
    rate = training.learning_rate or 0.0
    if not low <= rate <= high:
        side = "above" if rate > high else "below"
        found.append(
            f"training.learning_rate = {rate:g} is {side} the usual {low:g} to {high:g} for "
            f"{recipe.stage} with {_KINDS[kind]}"
        )
    if isinstance(recipe.adapter, LoraSpec):
        spec = recipe.adapter
        root = "sqrt(rank)" if spec.rslora else "rank"
        ratio = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
        if not 0.25 <= ratio <= 8:
            found.append(f"adapter.alpha / {root} = {ratio:g} is outside the usual 0.25 to 8")
    if steps < 10:
        key = "prompts_per_step" if recipe.stage == "ppo" else "batch_size"
        found.append(f"only {steps} optimizer steps: lower {key} or raise epochs")
    epochs = steps * examples_per_step(recipe) / data.rows
    if epochs > 10 and recipe.stage != "ppo":  # a prompt may be answered many times
        found.append(f"{epochs:.0f} passes over {data.rows} rows: expect memorised answers")
    if data.overlap:
        found.append(
            f"{data.overlap} of {data.eval_rows} held-out rows also stand in the training rows: "
            "the held-out loss flatters"
        )
    if not data.eval_rows:
        why = "the reward before and after" if recipe.stage == "ppo" else "overfitting"
        found.append(f"no held-out rows: set data.eval or data.eval_fraction to see {why}")
    if memory.peak > ROOM * hardware.memory:
        found.append(
            f"about {memory.peak / 1e9:.1f} GB needed, {hardware.memory / 1e9:.1f} GB free: "
            "lower data.max_length or training.microbatch_tokens, or use LoRA"
        )
    if isinstance(recipe, KtoRecipe):
        found += _kto_warnings(recipe, data)
    if isinstance(recipe, PpoRecipe):
        found += _ppo_warnings(recipe)
    return found


def _ppo_warnings(recipe: PpoRecipe) -> list[str]:
    found, objective = [], recipe.objective
    updates = objective.epochs * objective.minibatches
    if updates > 16:
        found.append(
            f"{updates} updates on each batch of responses: beyond 16 the policy usually leaves "
            "the clipping range"
        )
    if objective.kl_coef == 0 and objective.kl_target is not None:
        found.append("objective.kl_target does nothing while kl_coef starts at 0")
    elif objective.kl_coef == 0:
        found.append("objective.kl_coef = 0: nothing keeps the policy near the reference")
    return found


def _kto_warnings(recipe: KtoRecipe, data: DataFacts) -> list[str]:
    if not data.chosen or not data.rejected:
        side = "desirable" if data.chosen else "undesirable"
        return [f"all {data.rows} rows are {side}: there is nothing to tell apart"]
    objective = recipe.objective
    good = objective.desirable_weight * data.chosen
    bad = objective.undesirable_weight * data.rejected
    low, high = _KTO_BALANCE
    if low * 0.99 <= good / bad <= high * 1.01:
        return []
    wanted = objective.undesirable_weight * data.rejected / data.chosen
    return [
        f"desirable_weight × {data.chosen} desirable rows is {good / bad:.2f} times "
        f"undesirable_weight × {data.rejected} undesirable rows; the paper keeps this between 1 "
        f"and 4/3: objective.desirable_weight between {wanted:.3g} and {wanted * 4 / 3:.3g} does"
    ]
