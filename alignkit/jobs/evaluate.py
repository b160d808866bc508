"""Evaluation on request: any models on the same rows, each measured as what it is."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from alignkit.data.dataset import TokenDataset, load_dataset
from alignkit.data.examples import RowKind, parse_rows
from alignkit.data.mismatch import with_mismatched
from alignkit.data.report import describe_rows
from alignkit.data.sources import Row
from alignkit.data.tokenize import TokenizeSettings, tokenize_examples
from alignkit.errors import DataError, ModelError
from alignkit.evaluation.columns import MAX_TOKENS, score_documents
from alignkit.evaluation.heldout import evaluate_heldout
from alignkit.jobs.precision import dtype_for
from alignkit.jobs.question import (
    Question,
    followed_recipe,
    own_base,
    recipe_of,
    run_with_recipe,
    say_if_changed,
    useless_reference,
)
from alignkit.models.attention.prefix import prefix_length
from alignkit.models.base.loading import DTYPES
from alignkit.models.opening import OpenModel, open_language_model, open_model
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.models.scoring.selfcheck import build_scorer
from alignkit.objectives.bradley_terry import bradley_terry_loss
from alignkit.objectives.preference import cpo_loss, dpo_loss, ratio_rewards, sum_rewards
from alignkit.packed import PackedBatch
from alignkit.recipe.assets import alignkit_home
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.stages.base import Recipe
from alignkit.runtime.devices import find_device
from alignkit.runtime.processes import SINGLE
from alignkit.runtime.tuning import tune_device
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.checking import kind_of_rows
from alignkit.stages.inputs.rows import load_rows, require_rows_of, row_settings
from alignkit.stages.running.definition import definition_of
from alignkit.stages.supervised.pairs import pair_hooks
from alignkit.stages.supervised.preference import preference_scores
from alignkit.stages.supervised.reference import Reference
from alignkit.stages.supervised.reward import completion_rewards, reward_scores

_MAX_LENGTH = 1024
"""Default for the longest row, in tokens."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Args:
        values: name -> number.
        scores: `(place, reward)` of each single completion that a reward model has scored.
    """

    values: dict[str, float]
    scores: list[tuple[str, float]]


def evaluate_models(names: list[str], question: Question) -> dict[str, Evaluation]:
    """Held-out values of each model.

    Args:
        names: run folders, models or adapters.
        question: rows and precision.

    Returns:
        Name -> for a language model loss, perplexity and accuracy on completions, or implicit
        rewards on pairs and labelled completions; for a reward model the rewards of pairs, or the
        score of each single completion.

    Raises:
        ModelError: there are no rows to evaluate on, or the model cannot be measured on them.
    """
    question.check()
    tune_device()
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ModelError(f"{twice[0]} is named twice", hint="name each model once")
    question = replace(question, dtype=dtype_for(names[0], question.dtype, question.base))
    run = None if question.data else run_with_recipe(names)
    evaluations: dict[str, Evaluation] = {}
    used: set[int] = set()
    room = sys.maxsize
    for name in names:
        opened = open_model(
            name, dtype=DTYPES[question.dtype], device=find_device(), base=question.base
        )
        kind, rows = _rows(opened, question, run)
        used, room = used | {len(rows)}, min(room, _room(opened))
        for line in describe_rows(name, rows.report):
            question.say(line)
        if question.reference is not None and (opened.head is not None or kind == "answers"):
            raise useless_reference(
                "reward models" if opened.head is not None else "single answers"
            )
        scorer = _scorer(opened, question)
        if opened.head is not None:
            evaluations[name] = _evaluate_reward(name, scorer, kind, rows, question)
        elif kind == "answers":
            evaluations[name] = Evaluation(evaluate_heldout(scorer, rows, MAX_TOKENS), [])
        else:
            evaluations[name] = _evaluate_preference(opened, scorer, kind, rows, question)
    if len(used) > 1:
        longest = min(room, question.max_length or _MAX_LENGTH)
        question.say(f"the models did not read the same rows: compare with --max-length {longest}")
    return evaluations


def score_answers(
    name: str, prompt: str, answers: list[str], question: Question
) -> list[tuple[str, float]]:
    """The rewards of answers to one prompt.

    Args:
        name: a reward model.
        prompt: the user's turn, or plain text if the model has no chat template.
        answers: at least one.
        question: precision and base.

    Returns:
        `(answer, reward)` in order.

    Raises:
        ModelError: the model is not a reward model, or an option would be ignored.
    """
    question.check()
    if question.reference is not None:
        raise useless_reference("answers to --prompt")
    question = replace(question, dtype=dtype_for(name, question.dtype, question.base))
    opened = open_model(
        name, dtype=DTYPES[question.dtype], device=find_device(), base=question.base
    )
    if opened.head is None:
        raise ModelError(
            f"{name} is a language model: only a reward model scores single answers",
            hint="name a run of the reward stage",
        )
    if opened.tokenizer.chat_template:
        question.say("scored as a user's turn and the assistant's answer in the chat template")
    rows = []
    for number, answer in enumerate(answers, start=1):
        values: dict[str, Any] = {"prompt": prompt, "completion": answer}
        if opened.tokenizer.chat_template:
            values["prompt"] = [{"role": "user", "content": prompt}]
            values["completion"] = [{"role": "assistant", "content": answer}]
        rows.append(Row(values, f"answer {number}"))
    examples = parse_rows(rows, "prompt_completion", "answers")
    settings = TokenizeSettings(10**9, "error")
    documents, _ = tokenize_examples(examples, opened.tokenizer, settings)
    columns = score_documents(completion_rewards, _scorer(opened, question), documents, MAX_TOKENS)
    return list(zip(answers, columns["reward"].tolist(), strict=True))


def _rows(opened: OpenModel, question: Question, run: Path | None) -> tuple[RowKind, TokenDataset]:
    """The rows as this model's tokenizer reads them."""
    if run is not None:
        recipe = followed_recipe(run, question)
        rows = load_rows(recipe, start_model(recipe.model))
        if rows.held_out is None:
            raise ModelError(
                f"the recipe of {run} holds out no rows", hint="name a file with --data"
            )
        if opened.tokenizer.get_vocab() != rows.tokenizer.get_vocab():
            raise ModelError(
                f"{opened.name} reads text with another tokenizer than the run in {run}",
                hint="name a file with --data; then every model tokenizes it its own way",
            )
        room = _room(opened)
        if rows.held_out.longest > room:
            raise ModelError(
                f"{opened.name} has room for {room:,} tokens, and a row of {run} has "
                f"{rows.held_out.longest:,}",
                hint="name a file with --data; longer rows are left out there, and counted",
            )
        return row_settings(recipe).rows, rows.held_out
    source = SourceSpec(path=question.data, take=question.take)
    limit, room = question.max_length or _MAX_LENGTH, _room(opened)
    if limit > room:
        question.say(f"{opened.name} has room for {room:,} tokens: longer rows are left out")
        limit = room
    kind = kind_of_rows(source)
    if kind == "labelled" and opened.head is not None:
        kind = "answers"  # a reward model scores each answer, whatever its label
    settings = TokenizeSettings(limit, "drop", "completions", kind)
    cache = alignkit_home() / "cache" / "tokens"
    try:
        dataset = load_dataset([source], opened.tokenizer, settings, 0, cache)
    except DataError as error:
        if "data.max_length" not in error.hint:
            raise
        raise DataError(error.message, hint="raise --max-length") from None
    require_rows_of(dataset, opened.model.config)
    return kind, with_mismatched(dataset, limit, 0) if kind == "labelled" else dataset


def _room(opened: OpenModel) -> int:
    """Tokens that a row may have: the model's context minus its prefix."""
    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", 0)
    return int(context) - prefix_length(opened.model) if context else sys.maxsize


def _scorer(opened: OpenModel, question: Question) -> nn.Module:
    dtype = DTYPES[question.dtype]
    return build_scorer(opened.model, dtype, "auto", question.say, opened.head).eval()


def _evaluate_reward(
    name: str, scorer: nn.Module, kind: RowKind, rows: TokenDataset, question: Question
) -> Evaluation:
    if kind == "pairs":
        recipe = recipe_of(name, question)
        if recipe is not None and recipe.scalar_head:
            return Evaluation(_as_trained(recipe, scorer, rows, None), [])
        hooks = pair_hooks(reward_scores(partial(bradley_terry_loss, center=0.0)), len(rows))
        return Evaluation(hooks.evaluate(scorer, rows, MAX_TOKENS, SINGLE), [])
    rewards = score_documents(completion_rewards, scorer, rows, MAX_TOKENS)["reward"]
    places = [rows.places[int(row)] for row in rows.order]
    values = {
        "rewards/mean": float(rewards.mean()),
        "rewards/std": float(rewards.std()),
        "rewards/min": float(rewards.min()),
        "rewards/max": float(rewards.max()),
        "rows": float(len(rewards)),
    }
    return Evaluation(values, list(zip(places, rewards.tolist(), strict=True)))


def _evaluate_preference(
    opened: OpenModel, scorer: nn.Module, kind: RowKind, rows: TokenDataset, question: Question
) -> Evaluation:
    """Implicit rewards of a language model against a reference, or its log-probs alone."""
    name = opened.name
    recipe = recipe_of(name, question)
    reference = question.reference
    if recipe is not None and reference is not None and _compares_with_nothing(recipe):
        raise useless_reference(f"`{getattr(recipe.objective, 'kind', recipe.stage)}` runs")
    if reference is None and recipe is not None and recipe.needs_reference:
        reference = question.base or own_base(name, recipe, question)
        say_if_changed(name, reference, question)
    if kind == "labelled" and (recipe is None or recipe.row_kind != kind):
        raise ModelError(
            f"{name} is not a kto run, and the rows are labelled completions",
            hint="name a run of the kto stage or a reward model, or rows of another format",
        )
    compare = None if reference is None else _reference(reference, opened.tokenizer, question)
    own = recipe is not None and recipe.row_kind == kind
    if recipe is not None and own and (compare is not None or not recipe.needs_reference):
        return Evaluation(_as_trained(recipe, scorer, rows, compare), [])
    if compare is None:
        question.say(f"{name}: rewards are plain log-probs; --reference compares with a model")
        loss, rewards = partial(cpo_loss, beta=1.0, nll_weight=0.0), partial(sum_rewards, scale=1.0)
    else:
        beta: float = getattr(recipe and recipe.objective, "scale", 0.1)
        loss, rewards = partial(dpo_loss, beta=beta), partial(ratio_rewards, scale=beta)
    hooks = pair_hooks(preference_scores(loss, rewards, compare), len(rows))
    return Evaluation(hooks.evaluate(scorer, rows, MAX_TOKENS, SINGLE), [])


def _compares_with_nothing(recipe: Recipe) -> bool:
    return recipe.row_kind == "pairs" and not recipe.needs_reference


def _as_trained(
    recipe: Recipe, scorer: nn.Module, rows: TokenDataset, reference: Reference | None
) -> dict[str, float]:
    return definition_of(recipe).evaluate(recipe, scorer, rows, reference, MAX_TOKENS)


def _reference(name: str, tokenizer: PreTrainedTokenizerBase, question: Question) -> Reference:
    opened = open_language_model(name, dtype=DTYPES[question.dtype], device=find_device())
    if opened.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{name} reads text with another tokenizer: its log-probs cannot be compared",
            hint="name a reference with the same tokenizer",
        )
    question.say(f"implicit rewards are relative to {name}")
    return partial(_score_with, _scorer(opened, question))


def _score_with(frozen: nn.Module, scorer: nn.Module, batch: PackedBatch) -> Any:
    return sum_by_sequence(frozen(batch).logprobs, batch)
