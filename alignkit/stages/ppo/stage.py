"""PPO: recipe -> prompts -> roles -> (sample, score, update) -> adapter and merged model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.errors import DataError, ModelError
from alignkit.generation.rollout import RolloutSettings, TransformersEngine, stop_tokens
from alignkit.models.adapters.files import save_adapter
from alignkit.models.base.loading import DTYPES, BaseModel
from alignkit.models.scoring.scorer import causal_model
from alignkit.models.weights.writing import replace_model
from alignkit.recipe.adapters import b_rate, has_adapter
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.rewards import ModelReward
from alignkit.recipe.stages.ppo import SAMPLING_TOKENS, PpoRecipe
from alignkit.runtime.optim import Optimizers, build_optimizer
from alignkit.runtime.processes import process_group
from alignkit.stages.inputs.fingerprints import reward_inputs
from alignkit.stages.inputs.rows import PromptRows, load_prompt_rows, plan_rollouts
from alignkit.stages.ppo.check import dry_run
from alignkit.stages.ppo.evaluate import evaluate_policy
from alignkit.stages.ppo.roles import (
    VALUE,
    Roles,
    build_roles,
    describe_roles,
    starts_from_reward,
)
from alignkit.stages.ppo.step import PpoRun, step_places, train_step
from alignkit.stages.ppo.update import Updater, trained_parts
from alignkit.stages.rollouts.health import Health
from alignkit.stages.rollouts.judging import Judge, build_judge
from alignkit.stages.rollouts.reward_models import RewardModel, find_reward_model
from alignkit.stages.rollouts.samples import SamplesFile
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.loop import Loop, StageHooks, run_loop, save_state
from alignkit.stages.running.session import RunOptions, Session

METRICS = {
    "reward": "mean reward of a response, without the penalty for a missing end",
    "score": "the same with the penalty: what the policy learns from",
    "reward_std": "its standard deviation over responses",
    "kl/k1": "mean of log π - log π_ref, summed over a response, in nats",
    "kl/k3": "the same divergence by an estimator that is never negative",
    "kl_coef": "price of a nat of k1 at a token",
    "value_learning_rate": "of the value model in this step",
    "value_grad_norm": "norm of the value model's gradient before clipping",
    "sampling_seconds": "the part of the step's time spent on sampling",
    "responses": "responses of the step, over all processes",
    "reward/<name>": "mean score of one source, before its weight",
    "policy_loss": "clipped policy loss, mean over tokens and passes",
    "value_loss": "clipped squared error of the values, mean over tokens and passes",
    "clip_fraction": "share of tokens whose ratio left the clipping range",
    "approx_kl": "k3 between the policy that sampled and the one that is trained",
    "explained_variance": "share of the returns' variance that the values predict",
    "entropy": "mean entropy of a sampled token's distribution, in nats",
    "response_length": "tokens of a response, its end included",
    "eos_rate": "share of responses that ended on their own",
    "distinct_2": "share of different word pairs among the first process's responses",
}

EPSILON = 1e-5
"""Adam's, as in https://arxiv.org/abs/2403.17031; 1e-8 moves the policy several times as far."""


@dataclass(frozen=True)
class Prepared:
    """What is known before weights are loaded.

    Args:
        rows: the prompts.
        reward_models: in the recipe's order.
        plan: the decisions.
    """

    rows: PromptRows
    reward_models: list[RewardModel]
    plan: Plan


def prepare_ppo(recipe: PpoRecipe, base: BaseModel, processes: int) -> Prepared:
    """Read the prompts, find the reward models and plan the run.

    Args:
        recipe: with its defaults.
        base: from `start_model`.
        processes: training processes.
    """
    rows = load_prompt_rows(recipe, base)
    can_share = has_adapter(recipe.adapter)
    reward_models = [
        find_reward_model(spec, rows.base, rows.tokenizer, can_share=can_share)
        for spec in recipe.reward
        if isinstance(spec, ModelReward)
    ]
    if recipe.value.init == "reward" and starts_from_reward(recipe, reward_models) is None:
        raise ModelError(
            "value.init = reward, but the value model can start from no reward model: it must be "
            "an adapter over the policy's base or, if all weights are trained, a model of its own",
            hint="set value.init=auto",
        )
    alone = sum(not model.shared for model in reward_models)
    roles = describe_roles(recipe, reward_models)
    rows = replace(rows, rewards=reward_inputs(recipe.reward))
    plan = plan_rollouts(recipe, rows, processes, reward_models=alone, roles=roles)
    return Prepared(rows, reward_models, plan)


class PpoStage:
    """The `StageDef` of PPO."""

    metrics: ClassVar[dict[str, str]] = METRICS

    def prepare(
        self, recipe: PpoRecipe, base: BaseModel, processes: int
    ) -> tuple[PromptRows, Plan]:
        """Prompts and plan, without weights; see `StageDef.prepare`."""
        prepared = prepare_ppo(recipe, base, processes)
        return prepared.rows, prepared.plan

    def run(self, recipe: PpoRecipe, options: RunOptions) -> RunSummary | None:
        """Train, from prompts to merged checkpoint; see `StageDef.run`."""
        session = Session(recipe, options)
        with session.running() as base:
            prepared = prepare_ppo(recipe, base, session.accelerator.num_processes)
            rows, plan = prepared.rows, session.announce(prepared.plan, prepared.rows)
            roles = build_roles(session, recipe, rows, plan, prepared.reward_models)
            judge = build_judge(
                recipe.reward,
                roles.rewards,
                missing_eos_penalty=recipe.rollout.missing_eos_penalty,
                max_tokens=plan.microbatch_tokens,
                processes=process_group(session.accelerator),
            )
            session.begin(rows, plan)
            run, first_step = start_ppo(session, recipe, rows, plan, roles, judge)
            del roles, judge  # the run alone holds the weights, so that merging can release them
            hooks = StageHooks(
                dry_run=partial(dry_run, run, first_step),
                train=partial(train_step, run),
                evaluate=partial(evaluate_policy, run),
                save=partial(save_ppo, run),
                rows=partial(step_places, run),
                halt=lambda: run.guard.verdict(run.kl),
            )
            run_loop(run, hooks, first_step)
            if run.last:
                session.say(f"health: {run.health.summary(run.last)}")
            save_value(session, run)
            return finish_run(session, run.keep_policy(), rows)

    def evaluate(
        self,
        recipe: PpoRecipe,
        scorer: nn.Module,
        rows: TokenDataset,
        reference: Any,
        max_tokens: int,
    ) -> dict[str, float]:
        """Not possible: the rows of a run are prompts without completions."""
        raise DataError(
            f"the rows of a {recipe.stage} run are prompts without completions",
            hint="what the policy's responses earn is in the run's metrics.jsonl",
        )


PPO = PpoStage()


def start_ppo(
    session: Session,
    recipe: PpoRecipe,
    rows: PromptRows,
    plan: Plan,
    roles: Roles,
    judge: Judge,
) -> tuple[PpoRun, int]:
    """The run's state, from scratch or from the newest whole checkpoint.

    Returns:
        The run and the number of steps already done.
    """
    optimizers = _optimizers(recipe, plan, roles)
    first_step, state = session.restore(roles.trained, optimizers)
    processes = process_group(session.accelerator)
    loop: Loop = session.loop(plan, first_step, trained_parts(optimizers), state, describe_step)
    limit, max_tokens = recipe.training.max_grad_norm, plan.microbatch_tokens
    updater = Updater(roles, optimizers, recipe.objective, limit, max_tokens, processes, loop.scale)
    samples = None
    if session.folder is not None:
        samples = SamplesFile(session.folder.path / "samples.jsonl", first_step or None)
        session.say_damaged("samples.jsonl", samples.damaged)
    run = PpoRun(
        **vars(loop),
        recipe=recipe,
        rows=rows,
        roles=roles,
        judge=judge,
        engine=_engine(recipe, rows, roles),
        updater=updater,
        processes=processes,
        samples=samples,
        health=Health(state.get("health")),
        kl_coef=float(state.get("kl_coef", recipe.objective.kl_coef)),
    )
    return run, first_step


def _optimizers(recipe: PpoRecipe, plan: Plan, roles: Roles) -> Optimizers:
    training = recipe.training
    weights = {"policy": roles.policy_weights, "value": roles.value_weights}
    return Optimizers(
        {
            name: build_optimizer(
                weights[name],
                peak,
                training.weight_decay,
                kind=training.optimizer,
                epsilon=EPSILON,
                b_rate=b_rate(recipe.adapter),
            )
            for name, peak in plan.peak_rates.items()
        }
    )


def _engine(recipe: PpoRecipe, rows: PromptRows, roles: Roles) -> TransformersEngine:
    inner = causal_model(roles.policy.scorer.model)
    settings = RolloutSettings(
        recipe.rollout.max_new_tokens,
        recipe.rollout.temperature,
        stop_tokens(inner, rows.tokenizer),
    )
    return TransformersEngine(inner, DTYPES[recipe.model.dtype], settings, SAMPLING_TOKENS)


def describe_step(metrics: dict[str, float]) -> str:
    """Reward, KL and the health of the update, for the progress line.

    Args:
        metrics: of the step.
    """
    return (
        f"reward {metrics['reward']:+.3f}  KL {metrics['kl/k1']:.2f}  "
        f"clipped {metrics['clip_fraction']:.1%}  value fit {metrics['explained_variance']:.2f}  "
        f"length {metrics['response_length']:.1f}"
    )


def save_ppo(run: PpoRun, step: int) -> None:
    """A checkpoint: policy, value model, both optimizers and the price of KL.

    Args:
        run: what to store.
        step: steps done.
    """
    state = {"kl_coef": run.kl_coef, "health": run.health.outside}
    save_state(run, step, run.roles.trained, run.updater.optimizers, state)


def save_value(session: Session, run: PpoRun) -> None:
    """Save the value model next to the policy, if it is an adapter: with its head."""
    folder, recipe = session.folder, run.recipe
    if folder is None or not has_adapter(recipe.adapter) or run.roles.value is None:
        return
    model, head = run.roles.trained.policy, run.roles.trained.head
    with replace_model(folder.path / "value") as written:
        save_adapter(model, written, run.rows.base.name, head, adapter=VALUE)
