"""Recipe -> tokenizer, rows and plan: everything that every stage does before it loads weights.

`alignkit plan` and `alignkit inspect` stop here, so they see exactly what a run will see.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.data.dataset import TokenDataset, count_overlap, load_dataset, split_dataset
from alignkit.data.mismatch import with_mismatched
from alignkit.data.templates import template_text
from alignkit.data.tokenize import RowKind, TokenizeSettings
from alignkit.models.classifier import require_classifier
from alignkit.models.facts import measure_model
from alignkit.models.loading import BaseModel, load_config, load_tokenizer
from alignkit.packed import Role
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.facts import DataFacts
from alignkit.recipe.plan import Plan, make_plan
from alignkit.recipe.rows import SftDataSpec
from alignkit.recipe.schema import FullSpec, KtoRecipe, Recipe
from alignkit.runtime.devices import describe_hardware
from alignkit.stages.base import start_model


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of a recipe.

    Args:
        base: where the model is.
        tokenizer: with the recipe's chat template.
        train: rows to train on.
        held_out: rows to evaluate on; None without `data.eval` and `data.eval_fraction`.
    """

    base: BaseModel
    tokenizer: Any
    train: TokenDataset
    held_out: TokenDataset | None


ROW_KINDS: dict[str, RowKind] = {
    "sft": "answers",
    "reward": "pairs",
    "dpo": "pairs",
    "kto": "labelled",
}
"""Stage -> what a row of its data is."""


def load_rows(recipe: Recipe) -> Rows:
    """Tokenize the recipe's rows; needs the weights only where an adapter is merged first."""
    spec, data = recipe.model, recipe.data
    base = start_model(spec)
    template = template_text(spec.chat_template) if spec.chat_template else None
    tokenizer = load_tokenizer(base, template)
    settings = row_settings(recipe)
    cache = alignkit_home() / "cache" / "tokens"
    train = load_dataset(data.train, tokenizer, settings, recipe.seed, cache)
    held_out = None
    if data.eval:
        held_out = load_dataset(data.eval, tokenizer, settings, recipe.seed, cache)
    elif data.eval_fraction is not None:
        train, held_out = split_dataset(train, data.eval_fraction, recipe.seed)
    if recipe.stage == "dpo":
        for row in np.flatnonzero(train.margins).tolist():
            train.report.note("its margin is not used by dpo", train.places[row])
    if isinstance(recipe, KtoRecipe):
        train = with_mismatched(train, data.max_length, recipe.seed)
        if held_out is not None:
            held_out = with_mismatched(held_out, data.max_length, recipe.seed)
    return Rows(base, tokenizer, train, held_out)


def row_settings(recipe: Recipe) -> TokenizeSettings:
    """How the recipe's rows become tokens."""
    data = recipe.data
    train_on = data.train_on if isinstance(data, SftDataSpec) else "completions"
    return TokenizeSettings(data.max_length, data.too_long, train_on, ROW_KINDS[recipe.stage])


def plan_run(recipe: Recipe, rows: Rows, processes: int) -> Plan:
    """The plan of a run on this machine.

    Args:
        recipe: with its defaults.
        rows: its tokens.
        processes: training processes.
    """
    config = load_config(rows.base)
    if recipe.stage == "reward" and (recipe.merge or isinstance(recipe.adapter, FullSpec)):
        require_classifier(config)
    model = measure_model(
        config,
        recipe.adapter,
        trust_remote_code=recipe.model.trust_remote_code,
        scalar_head=recipe.stage == "reward",
    )
    return make_plan(recipe, model, data_facts(rows), describe_hardware(processes))


def data_facts(rows: Rows) -> DataFacts:
    """Sizes of the rows."""
    train, held_out = rows.train, rows.held_out
    labels = train.roles[train.order, 0]
    return DataFacts(
        rows=len(train),
        tokens=int(train.lengths.sum()),
        trained_tokens=int(train.num_trained.sum()),
        longest=int(train.lengths.max()),
        eval_rows=0 if held_out is None else len(held_out),
        eval_tokens=0 if held_out is None else int(held_out.lengths.sum()),
        overlap=0 if held_out is None else count_overlap(train, held_out),
        chosen=int((labels == Role.CHOSEN).sum()),
        rejected=int((labels == Role.REJECTED).sum()),
    )


def keep_plan(plan: Plan, stored: dict[str, Any]) -> Plan:
    """The plan with the micro-batches of the run that is resumed.

    They follow the free memory, and sums in another order differ in the last bit.
    """
    return dataclasses.replace(
        plan,
        microbatch_tokens=stored["microbatch_tokens"],
        gradient_checkpointing=stored["gradient_checkpointing"],
    )
