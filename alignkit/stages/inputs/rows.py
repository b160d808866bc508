"""Recipe -> tokenizer, rows and plan: everything that every stage does before it loads weights.

`alignkit plan` and `alignkit inspect` stop here, so they see exactly what a run will see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignkit.data.dataset import TokenDataset, load_dataset
from alignkit.data.mismatch import with_mismatched
from alignkit.data.packing import largest_share
from alignkit.data.prompts import PromptSet, load_prompts
from alignkit.data.split import count_overlap, count_prompt_overlap, split_dataset, split_prompts
from alignkit.data.templates import template_text
from alignkit.data.tokenize import TokenizeSettings
from alignkit.errors import AlignkitError
from alignkit.models.adapters.continued import adapter_folder, started_adapter
from alignkit.models.adapters.finding import tokenizer_of
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.base.fitness import require_token_rows
from alignkit.models.base.loading import BaseModel, load_config, load_tokenizer
from alignkit.models.rewards.classifier import require_classifier
from alignkit.packed import IntArray, Role
from alignkit.recipe.adapters import FullSpec
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.facts import DataFacts
from alignkit.recipe.planning.plan import Plan, make_plan
from alignkit.recipe.rows import SftDataSpec
from alignkit.recipe.stages.base import Recipe
from alignkit.recipe.stages.rollouts import RolloutRecipe
from alignkit.stages.inputs.checking import check_rows
from alignkit.stages.inputs.precision import measured_hardware


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
    tokenizer: PreTrainedTokenizerBase
    train: TokenDataset
    held_out: TokenDataset | None

    @property
    def checks(self) -> Sequence[IntArray]:
        """Tokens of a few rows, to check a merged model on."""
        return check_rows(self.held_out or self.train)

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end the trained completions."""
        return self.train.report.stop_tokens


@dataclass(frozen=True)
class PromptRows:
    """Prompts of a recipe.

    Args:
        base: where the model is.
        tokenizer: with the recipe's chat template.
        train: prompts to train on.
        held_out: prompts to measure on; None without `data.eval` and `data.eval_fraction`.
        rewards: hashes of the reward models and functions.
    """

    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    held_out: PromptSet | None
    rewards: dict[str, str] = field(default_factory=dict)

    @property
    def checks(self) -> Sequence[IntArray]:
        """Tokens of a few prompts, to check a merged model on."""
        chosen = (self.held_out or self.train).prompts[:8]
        return [prompt.ids.astype(np.int64) for prompt in chosen]

    @property
    def stop_tokens(self) -> list[int]:
        """None beyond those that the base names."""
        return []


AnyRows = Rows | PromptRows


def read_rows(recipe: Recipe, base: BaseModel) -> AnyRows:
    """The rows of any recipe.

    Args:
        recipe: with its defaults.
        base: the model that it starts from.
    """
    if isinstance(recipe, RolloutRecipe):
        return load_prompt_rows(recipe, base)
    return load_rows(recipe, base)


def load_rows(recipe: Recipe, base: BaseModel) -> Rows:
    """Tokenize the recipe's rows.

    Args:
        recipe: with its defaults.
        base: from `start_model`.
    """
    data = recipe.data
    tokenizer = run_tokenizer(recipe, base)
    settings = row_settings(recipe)
    cache = alignkit_home() / "cache" / "tokens"
    train = load_dataset(data.train, tokenizer, settings, recipe.seed, cache)
    held_out = None
    if data.eval:
        held_out = load_dataset(data.eval, tokenizer, settings, recipe.seed, cache)
    elif data.eval_fraction is not None:
        train, held_out = split_dataset(train, data.eval_fraction, recipe.seed)
    for dataset in filter(None, (train, held_out)):
        require_rows_of(dataset, load_config(base))
    if not recipe.uses_margins:
        for row in np.flatnonzero(train.margins).tolist():
            train.report.note(f"its margin is not used by {recipe.stage}", train.places[row])
    if recipe.row_kind == "labelled":
        train = with_mismatched(train, data.max_length, recipe.seed)
        if held_out is not None:
            held_out = with_mismatched(held_out, data.max_length, recipe.seed)
    return Rows(base, tokenizer, train, held_out)


def run_tokenizer(recipe: Recipe, base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: that of an adapter it continues, where it has its own, or the base's;
    with the recipe's chat template."""
    named, before = recipe.model.chat_template, adapter_folder(recipe.adapter)
    template = template_text(named) if named else None
    source = base if before is None else tokenizer_of(before, base)
    if base.changes.tokens and source is not base:  # the adapter's has them already
        template, source = template or load_tokenizer(source).chat_template, base
    return load_tokenizer(source, template)


def load_prompt_rows(recipe: RolloutRecipe, base: BaseModel) -> PromptRows:
    """Tokenize the recipe's prompts; `data.max_length` holds a prompt and its response.

    Args:
        recipe: with its defaults.
        base: from `start_model`.

    Raises:
        AlignkitError: no room is left for prompts.
    """
    data = recipe.data
    room = data.max_length - recipe.rollout.max_new_tokens
    if room < 1:
        raise AlignkitError(
            f"data.max_length = {data.max_length} leaves no room for prompts with "
            f"rollout.max_new_tokens = {recipe.rollout.max_new_tokens}",
            hint="raise data.max_length or lower rollout.max_new_tokens",
        )
    tokenizer = run_tokenizer(recipe, base)
    read = partial(
        load_prompts,
        tokenizer=tokenizer,
        max_length=room,
        too_long=data.too_long,
        seed=recipe.seed,
    )
    train, held_out = read(data.train), None
    if data.eval:
        held_out = read(data.eval)
    elif data.eval_fraction is not None:
        train, held_out = split_prompts(train, data.eval_fraction, recipe.seed)
    config = load_config(base)
    for prompts in filter(None, (train, held_out)):
        for prompt, place in zip(prompts.prompts, prompts.places, strict=True):
            require_token_rows(config, prompt.ids, place)
    return PromptRows(base, tokenizer, train, held_out)


def require_rows_of(dataset: TokenDataset, config: Any) -> None:
    """Refuse rows with tokens that the model has no row for; see `require_token_rows`."""
    ends = dataset.bounds[:, -1]
    furthest = int(np.searchsorted(ends, np.argmax(dataset.ids), "right"))
    require_token_rows(config, dataset.ids, dataset.places[furthest])


def row_settings(recipe: Recipe) -> TokenizeSettings:
    """How the recipe's rows become tokens."""
    data = recipe.data
    if recipe.row_kind == "prompts":
        raise AlignkitError(
            f"the rows of a {recipe.stage} run are prompts without completions",
            hint="name a file of completions or pairs with --data; what the run's responses to "
            "held-out prompts earn is in metrics.jsonl",
        )
    train_on = data.train_on if isinstance(data, SftDataSpec) else "completions"
    return TokenizeSettings(data.max_length, data.too_long, train_on, recipe.row_kind)


def plan_run(recipe: Recipe, rows: Rows, processes: int) -> Plan:
    """The plan of a run on this machine.

    Args:
        recipe: with its defaults.
        rows: its tokens.
        processes: training processes.
    """
    config = load_config(rows.base)
    if recipe.scalar_head and (recipe.merge or isinstance(recipe.adapter, FullSpec)):
        require_classifier(config)
    model = measure_model(
        config,
        started_adapter(recipe.adapter, rows.base),
        trust_remote_code=recipe.model.trust_remote_code,
        scalar_head=recipe.scalar_head,
        new_tokens=len(recipe.model.add_tokens),
    )
    hardware = measured_hardware(recipe, config, processes)
    return make_plan(recipe, model, data_facts(recipe, rows, processes), hardware)


def plan_rollouts(
    recipe: RolloutRecipe, rows: PromptRows, processes: int, *, reward_models: int, roles: list[str]
) -> Plan:
    """The plan of a run that samples responses, on this machine.

    Args:
        recipe: with its defaults.
        rows: its prompts.
        processes: training processes.
        reward_models: those that are loaded in addition to the policy's base.
        roles: which model plays which part, one sentence each.
    """
    config = load_config(rows.base)
    trust = recipe.model.trust_remote_code
    model = measure_model(config, recipe.adapter, trust_remote_code=trust, scalar_head=False)
    prompts, samples = rows.train, recipe.rollout.samples_per_prompt
    lengths = [len(prompt.ids) for prompt in prompts.prompts]
    new = recipe.rollout.max_new_tokens * samples
    held_out = rows.held_out
    facts = DataFacts(
        rows=len(prompts),
        tokens=sum(lengths) + new * len(prompts),
        trained_tokens=new * len(prompts),
        longest=max(lengths) + new,
        step=_largest_step(recipe, np.asarray(lengths) + new, processes),
        eval_rows=0 if held_out is None else len(held_out),
        eval_tokens=0 if held_out is None else held_out.report.tokens,
        overlap=0 if held_out is None else count_prompt_overlap(prompts, held_out),
    )
    hardware = measured_hardware(recipe, config, processes)
    return make_plan(
        recipe, model, facts, hardware, reward_models=reward_models, roles=tuple(roles)
    )


def data_facts(recipe: Recipe, rows: Rows, processes: int) -> DataFacts:
    """Sizes of the rows.

    Args:
        recipe: says how many of them are a step.
        rows: read as it says.
        processes: that share a step.
    """
    train, held_out = rows.train, rows.held_out
    labels = train.roles[train.order, 0]
    return DataFacts(
        rows=len(train),
        tokens=int(train.lengths.sum()),
        trained_tokens=int(train.num_trained.sum()),
        longest=int(train.lengths.max()),
        step=_largest_step(recipe, train.lengths, processes),
        eval_rows=0 if held_out is None else len(held_out),
        eval_tokens=0 if held_out is None else int(held_out.lengths.sum()),
        overlap=0 if held_out is None else count_overlap(train, held_out),
        chosen=int((labels == Role.CHOSEN).sum()),
        rejected=int((labels == Role.REJECTED).sum()),
    )


def _largest_step(recipe: Recipe, lengths: IntArray, processes: int) -> int:
    steps = recipe.training.max_steps
    return largest_share(lengths, recipe.examples_per_step, recipe.seed, processes, steps)


def keep_plan(plan: Plan, stored: dict[str, Any]) -> Plan:
    """The plan with the micro-batches of the run that is resumed.

    They depend on free memory, and sums in another order differ in the last bit.
    """
    return dataclasses.replace(
        plan,
        microbatch_tokens=stored["microbatch_tokens"],
        gradient_checkpointing=stored["gradient_checkpointing"],
    )
