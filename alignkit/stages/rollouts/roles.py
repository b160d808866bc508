"""Who plays what in a run on sampled responses: policy, reference, value and rewards, over one base
where possible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from alignkit.models.adapters.attach import attach_adapter, trainable_report
from alignkit.models.adapters.continued import adapter_folder
from alignkit.models.adapters.files import put_weights
from alignkit.models.adapters.switching import (
    POLICY,
    Role,
    add_adapter,
    add_stored_adapter,
    freeze_head_adapter,
    recompute_as_run,
    recompute_layers,
    remove_dropout,
    train_only,
)
from alignkit.models.base.loading import DTYPES, load_model
from alignkit.models.opening import open_model
from alignkit.models.rewards.head import freeze_unused_head, new_head
from alignkit.models.scoring.selfcheck import build_scorer, scorer_factory
from alignkit.recipe.adapters import has_adapter
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.stages.rollouts import RolloutRecipe
from alignkit.stages.inputs.rows import PromptRows
from alignkit.stages.rollouts.judging import ScoringModel
from alignkit.stages.rollouts.reward_models import RewardModel
from alignkit.stages.running.adapter_start import find_adapter_start
from alignkit.stages.running.session import Session

VALUE = "ppo_value"
"""Adapter of the value model."""


class TrainedWeights(nn.Module):
    """Everything that a run trains, as one module: what a checkpoint holds.

    Args:
        policy: the policy's model; over one base the value adapter is in it too.
        value: a second model for values, or None.
        head: of the value model; None without one.
    """

    def __init__(self, policy: nn.Module, value: nn.Module | None, head: nn.Linear | None) -> None:
        super().__init__()
        self.policy, self.value, self.head = policy, value, head


@dataclass(frozen=True)
class Roles:
    """Who plays what.

    Args:
        policy: gives log-probs, and values too if it carries the value head.
        reference: gives log-probs; None if nothing asks for them.
        value: gives values; None if the policy does, or nothing.
        rewards: the reward models, in the recipe's order.
        trained: all trained weights.
        policy_weights: names and weights of the policy.
        value_weights: names and weights of the value model.
    """

    policy: Role
    reference: Role | None
    value: Role | None
    rewards: tuple[ScoringModel, ...]
    trained: TrainedWeights
    policy_weights: list[tuple[str, nn.Parameter]]
    value_weights: list[tuple[str, nn.Parameter]]


def describe_roles(recipe: RolloutRecipe, reward_models: Sequence[RewardModel]) -> list[str]:
    """What plays each part and what it costs, one sentence each.

    Args:
        recipe: with its defaults.
        reward_models: those that it names.
    """
    lora, value = has_adapter(recipe.adapter), recipe.value_model
    lines = [f"policy: {'a LoRA adapter' if lora else 'all weights'}"]
    if recipe.measures_kl:
        how = "the same base with adapters off" if lora else "a second model"
        lines.append(f"reference: {how}")
    start = "the reward model" if starts_from_reward(recipe, reward_models) else "zero"
    if value is None:
        lines.append("value: none; a response is measured against its group")
    elif value.kind == "head":
        lines.append("value: a linear head on the policy's hidden states")
    elif lora:
        lines.append(f"value: a second adapter over the same base, started from {start}")
    else:
        lines.append(f"value: a further model with all weights trained, started from {start}")
    for model in reward_models:
        how = "a further adapter over the same base" if model.shared else "a model of its own"
        lines.append(f"reward: {model.spec.model}, {how}")
    return lines


def starts_from_reward(
    recipe: RolloutRecipe, reward_models: Sequence[RewardModel]
) -> RewardModel | None:
    """The reward model whose weights the value model starts from."""
    value = recipe.value_model
    if value is None or value.kind == "head" or value.init == "fresh":
        return None
    lora = has_adapter(recipe.adapter)
    return next((model for model in reward_models if model.shared == lora), None)


def build_roles(
    session: Session,
    recipe: RolloutRecipe,
    rows: PromptRows,
    plan: Plan,
    reward_models: Sequence[RewardModel],
) -> Roles:
    """Load the weights and put every part in its place.

    Args:
        session: of the run.
        recipe: with its defaults.
        rows: name the base.
        plan: whether activations are recomputed.
        reward_models: in the recipe's order.

    Returns:
        The parts, in training mode; only the policy's and the value model's weights are trained.
    """
    build = _over_one_base if has_adapter(recipe.adapter) else _apart
    roles = build(session, recipe, rows, plan, reward_models)
    report = trainable_report(roles.trained)
    line = f"trains {report.trainable:,} weights"
    if roles.value_weights:
        policy, value = (
            sum(p.numel() for _, p in own) for own in (roles.policy_weights, roles.value_weights)
        )
        line += f": {policy:,} of the policy, {value:,} of the value model"
    session.say(line)
    return roles


def _over_one_base(
    session: Session,
    recipe: RolloutRecipe,
    rows: PromptRows,
    plan: Plan,
    reward_models: Sequence[RewardModel],
) -> Roles:
    spec, device = recipe.model, session.accelerator.device
    model = load_model(rows.base, session.weights_dtype, device, spec.quantization)
    started, given = find_adapter_start(session, model, rows, plan)
    model = attach_adapter(model, started, recipe.seed, initial=given)
    before = adapter_folder(recipe.adapter)
    if before is not None:  # it is trained further
        put_weights(model, before)
    own_value, source = _has_own_value(recipe), starts_from_reward(recipe, reward_models)
    if own_value and source is not None:
        add_stored_adapter(model, VALUE, source.folder)
    elif own_value:
        config: LoraConfig = copy.deepcopy(model.peft_config[POLICY])
        add_adapter(model, VALUE, config, recipe.seed + 1)
    for number, reward in enumerate(reward_models):
        if reward.shared:
            add_stored_adapter(model, f"reward{number}", reward.folder)
    train_only(model, {POLICY, VALUE} if own_value else {POLICY})
    freeze_head_adapter(model, VALUE)
    remove_dropout(model)
    if plan.gradient_checkpointing:
        recompute_layers(model, context_fn=recompute_as_run(model))
        model.enable_input_require_grads()
    head = None if recipe.value_model is None else _value_head(model, source)
    make = _scorers(session, recipe, model)
    policy = Role(make(None if own_value else head, "both", sampled=True), POLICY)
    reference = Role(make(None, "ends", sampled=True), None) if recipe.measures_kl else None
    value = Role(make(head, "targets", sampled=False), VALUE) if own_value else None
    rewards = [
        ScoringModel(
            Role(make(reward.head().to(device), "ends", sampled=False), f"reward{number}")
            if reward.shared
            else _alone(session, reward),
            reward.mean,
            reward.factor,
        )
        for number, reward in enumerate(reward_models)
    ]
    trained = TrainedWeights(model, None, head)
    named = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
    of_value = [(n, p) for n, p in named if f".{VALUE}." in n or n.startswith("head.")]
    of_policy = [(n, p) for n, p in named if f".{POLICY}." in n]
    return Roles(policy, reference, value, tuple(rewards), trained, of_policy, of_value)


def _apart(
    session: Session,
    recipe: RolloutRecipe,
    rows: PromptRows,
    plan: Plan,
    reward_models: Sequence[RewardModel],
) -> Roles:
    """All weights are trained: every part is a model of its own."""
    device = session.accelerator.device

    def load() -> Any:
        return load_model(rows.base, torch.float32, device, "none")

    model = attach_adapter(load(), recipe.adapter, recipe.seed)
    # As wide as the policy: narrower weights would round every sum differently.
    frozen = load().requires_grad_(False) if recipe.measures_kl else None
    own_value, source = _has_own_value(recipe), starts_from_reward(recipe, reward_models)
    second = None
    if own_value:
        second = load() if source is None else _open(session, source, torch.float32)
        second = attach_adapter(second, recipe.adapter, recipe.seed)
        freeze_unused_head(second)
    for part in filter(None, (model, frozen, second)):
        remove_dropout(part)
    if plan.gradient_checkpointing:
        for part in filter(None, (model, second)):
            recompute_layers(part)
    head = None
    if recipe.value_model is not None:
        head = _value_head(model if second is None else second, source)
    make = _scorers(session, recipe, model)
    policy = Role(make(None if own_value else head, "both", sampled=True))
    reference = None
    if frozen is not None:
        reference = Role(_scorers(session, recipe, frozen)(None, "ends", sampled=True))
    value = None
    if second is not None:
        value = Role(_scorers(session, recipe, second)(head, "targets", sampled=False))
    rewards = tuple(ScoringModel(_alone(session, r), r.mean, r.factor) for r in reward_models)
    trained = TrainedWeights(model, second, head)
    of_policy = [(f"policy.{n}", p) for n, p in model.named_parameters() if p.requires_grad]
    rest = {id(p) for _, p in of_policy}
    of_value = [
        (n, p) for n, p in trained.named_parameters() if p.requires_grad and id(p) not in rest
    ]
    return Roles(policy, reference, value, rewards, trained, of_policy, of_value)


def _has_own_value(recipe: RolloutRecipe) -> bool:
    return recipe.value_model is not None and recipe.value_model.kind != "head"


def _scorers(session: Session, recipe: RolloutRecipe, model: Any) -> Callable[..., Any]:
    """A maker of scorers around one model, whose layout is checked once."""
    spec, dtype = recipe.model, DTYPES[recipe.model.dtype]
    build = scorer_factory(model, dtype, spec.attention, session.say)

    def make(head: nn.Linear | None, reading: str, *, sampled: bool) -> Any:
        temperature = recipe.rollout.temperature if sampled else 1.0
        options: Any = {"reading": reading, "temperature": temperature}
        scorer = build(head, **options)
        session.about["attention"] = scorer.attention
        return scorer.train()

    return make


def _value_head(model: Any, source: RewardModel | None) -> nn.Linear:
    """`[1, H]` float32 head with a bias: zero, or what predicts the normalized reward."""
    plain = new_head(model, 0)
    device = plain.weight.device
    head = nn.Linear(plain.in_features, 1, bias=True, dtype=torch.float32, device=device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        if source is not None:
            scale = source.spec.weight * source.factor
            head.weight.copy_(source.head().weight * scale)
            head.bias.fill_(-source.mean * scale)
    return head


def _open(session: Session, reward: RewardModel, stored: torch.dtype) -> Any:
    name = str(reward.folder)
    return open_model(name, dtype=stored, device=str(session.accelerator.device)).model


def _alone(session: Session, reward: RewardModel) -> Role:
    """A reward model that shares no weights."""
    dtype = DTYPES[session.recipe.model.dtype]
    model = _open(session, reward, dtype)
    model.requires_grad_(False)
    remove_dropout(model)
    head = reward.head().to(session.accelerator.device)
    scorer = build_scorer(model, dtype, session.recipe.model.attention, session.say, head)
    return Role(scorer.train())
