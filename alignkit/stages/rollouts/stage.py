"""A stage on sampled responses: the body that PPO and its relatives share.

recipe -> prompts -> roles -> (sample, judge, update) -> adapter and merged model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from alignkit.data.dataset import TokenDataset
from alignkit.errors import DataError, ModelError
from alignkit.generation.rewards.build import build_score
from alignkit.generation.rollout import RolloutSettings, TransformersEngine, stop_tokens
from alignkit.models.adapters.files import save_adapter
from alignkit.models.base.loading import DTYPES, BaseModel
from alignkit.models.scoring.scorer import causal_model
from alignkit.models.weights.writing import replace_model
from alignkit.recipe.adapters import b_rate, has_adapter
from alignkit.recipe.planning.plan import Plan
from alignkit.recipe.rewards import FunctionReward, ModelReward, RewardSource
from alignkit.recipe.stages.rollouts import SAMPLING_TOKENS, RolloutRecipe
from alignkit.runtime.optim import Optimizers, build_optimizer
from alignkit.runtime.processes import ProcessGroup, process_group
from alignkit.stages.inputs.fingerprints import reward_inputs
from alignkit.stages.inputs.rows import PromptRows, load_prompt_rows, plan_rollouts
from alignkit.stages.rollouts.evaluate import evaluate_policy
from alignkit.stages.rollouts.health import Health
from alignkit.stages.rollouts.judging import Judge, build_judge
from alignkit.stages.rollouts.passes import Stepper, trained_parts
from alignkit.stages.rollouts.reward_models import RewardModel, find_reward_model
from alignkit.stages.rollouts.roles import (
    VALUE,
    Roles,
    build_roles,
    describe_roles,
    starts_from_reward,
)
from alignkit.stages.rollouts.run import RolloutRun
from alignkit.stages.rollouts.samples import SamplesFile
from alignkit.stages.running.finish import RunSummary, finish_run
from alignkit.stages.running.hooks import StageHooks
from alignkit.stages.running.loop import Loop, load_best, run_loop, save_state
from alignkit.stages.running.session import RunOptions, Session

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


def prepare_rollouts(recipe: RolloutRecipe, base: BaseModel, processes: int) -> Prepared:
    """Read the prompts, find the reward models and plan the run.

    Args:
        recipe: with its defaults.
        base: from `start_model`.
        processes: training processes.
    """
    for spec in (*recipe.reward, *([recipe.task] if recipe.task else [])):
        if not isinstance(spec, ModelReward | FunctionReward):
            build_score(spec)  # a missing package is told before anything is planned
    rows = load_prompt_rows(recipe, base)
    can_share = has_adapter(recipe.adapter)
    reward_models = [
        find_reward_model(spec, rows.base, rows.tokenizer, can_share=can_share)
        for spec in recipe.reward
        if isinstance(spec, ModelReward)
    ]
    value = recipe.value_model
    if (
        value is not None
        and value.init == "reward"
        and not starts_from_reward(recipe, reward_models)
    ):
        raise ModelError(
            "value.init = reward, but the value model can start from no reward model: it must be "
            "an adapter over the policy's base or, if all weights are trained, a model of its own",
            hint="set value.init=auto",
        )
    alone = sum(not model.shared for model in reward_models)
    roles = describe_roles(recipe, reward_models)
    rows = replace(rows, rewards=reward_inputs(recipe.reward, recipe.task))
    plan = plan_rollouts(recipe, rows, processes, reward_models=alone, roles=roles)
    return Prepared(rows, reward_models, plan)


@dataclass(frozen=True)
class RolloutStage:
    """A `StageDef` for prompts.

    Args:
        metrics: name of each metric -> what it means.
        build_updater: roles, objective and stepper -> what learns from responses.
        dry_run: checks of a run before the step of this number.
        train: one step, from 0 -> its metrics.
        places: `file:line` of a step's first prompts.
        describe: a step's metrics in one line.
    """

    metrics: Mapping[str, str]
    build_updater: Callable[..., Any]
    dry_run: Callable[[RolloutRun, int], None]
    train: Callable[[RolloutRun, int], dict[str, float]]
    places: Callable[[RolloutRun, int], list[str]]
    describe: Callable[[dict[str, float]], str]

    def prepare(
        self, recipe: RolloutRecipe, base: BaseModel, processes: int
    ) -> tuple[PromptRows, Plan]:
        """Prompts and plan, without weights; see `StageDef.prepare`."""
        prepared = prepare_rollouts(recipe, base, processes)
        return prepared.rows, prepared.plan

    def run(self, recipe: RolloutRecipe, options: RunOptions) -> RunSummary | None:
        """Train, from prompts to merged checkpoint; see `StageDef.run`."""
        session = Session(recipe, options)
        with session.running() as base:
            prepared = prepare_rollouts(recipe, base, session.accelerator.num_processes)
            rows, plan = prepared.rows, session.announce(prepared.plan, prepared.rows)
            roles = build_roles(session, recipe, rows, plan, prepared.reward_models)
            processes, tokens = process_group(session.accelerator), plan.microbatch_tokens
            judge = build_judge(
                recipe.reward,
                roles.rewards,
                missing_eos_penalty=recipe.rollout.missing_eos_penalty,
                max_tokens=tokens,
                processes=processes,
            )
            task = _task(recipe.task, tokens, processes)
            session.begin(rows, plan)
            run, first_step = self._start(session, recipe, rows, plan, roles, (judge, task))
            del roles, judge  # the run alone holds the weights, so that merging can release them
            hooks = StageHooks(
                dry_run=partial(self.dry_run, run, first_step),
                train=partial(self.train, run),
                evaluate=partial(evaluate_policy, run),
                save=partial(_save, run),
                rows=partial(self.places, run),
                halt=lambda: run.guard.verdict(run.kl),
            )
            run_loop(run, hooks, first_step)
            load_best(run, run.roles.trained)
            if run.last:
                session.say(f"health: {run.health.summary(run.last)}")
            _save_value(session, run)
            return finish_run(session, run.keep_policy(), rows)

    def evaluate(
        self,
        recipe: RolloutRecipe,
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

    def _start(
        self,
        session: Session,
        recipe: Any,
        rows: PromptRows,
        plan: Plan,
        roles: Roles,
        judges: tuple[Judge, Judge | None],
    ) -> tuple[RolloutRun, int]:
        """The run's state, from scratch or from the newest whole checkpoint, and steps done."""
        optimizers = _optimizers(recipe, plan, roles)
        first_step, state = session.restore(roles.trained, optimizers)
        processes = process_group(session.accelerator)
        loop: Loop = session.loop(plan, first_step, trained_parts(optimizers), state, self.describe)
        limit = recipe.training.max_grad_norm
        stepper = Stepper(roles.trained, optimizers, limit, processes, loop.scale)
        samples = None
        if session.folder is not None:
            samples = SamplesFile(session.folder.path / "samples.jsonl", first_step or None)
            session.say_damaged("samples.jsonl", samples.damaged)
        run = RolloutRun(
            **vars(loop),
            recipe=recipe,
            rows=rows,
            roles=roles,
            judge=judges[0],
            task=judges[1],
            engine=_engine(recipe, rows, roles),
            updater=self.build_updater(roles, recipe.objective, stepper),
            processes=processes,
            samples=samples,
            health=Health(state.get("health")),
            kl_coef=float(state.get("kl_coef", recipe.objective.kl_coef)),
            drawn=int(state.get("drawn", 0)),
        )
        return run, first_step


def _task(source: RewardSource | None, tokens: int, processes: ProcessGroup) -> Judge | None:
    """What verifies held-out responses."""
    if source is None:
        return None
    named = source.model_copy(update={"name": "task"})
    return build_judge(
        [named], [], missing_eos_penalty=None, max_tokens=tokens, processes=processes
    )


def _optimizers(recipe: RolloutRecipe, plan: Plan, roles: Roles) -> Optimizers:
    training = recipe.training
    weights = {"policy": roles.policy_weights, "value": roles.value_weights}
    return Optimizers(
        {
            name: build_optimizer(
                weights[name],
                peak,
                training.weight_decay,
                kind=training.optimizer,
                betas=training.betas,
                epsilon=EPSILON,
                b_rate=b_rate(recipe.adapter),
            )
            for name, peak in plan.peak_rates.items()
        }
    )


def _engine(recipe: RolloutRecipe, rows: PromptRows, roles: Roles) -> TransformersEngine:
    inner = causal_model(roles.policy.scorer.model)
    settings = RolloutSettings(
        recipe.rollout.max_new_tokens,
        recipe.rollout.temperature,
        stop_tokens(inner, rows.tokenizer),
    )
    return TransformersEngine(inner, DTYPES[recipe.model.dtype], settings, SAMPLING_TOKENS)


def _save(run: RolloutRun, step: int) -> None:
    """A checkpoint: trained weights, their optimizers, the price of KL and the prompts asked."""
    state = {"kl_coef": run.kl_coef, "health": run.health.outside, "drawn": run.drawn}
    save_state(run, step, run.roles.trained, run.updater.stepper.optimizers, state)


def _save_value(session: Session, run: RolloutRun) -> None:
    """Save the value model next to the policy, if it is an adapter: with its head."""
    folder, recipe = session.folder, run.recipe
    if folder is None or not has_adapter(recipe.adapter) or run.roles.value is None:
        return
    model, head = run.roles.trained.policy, run.roles.trained.head
    with replace_model(folder.path / "value") as written:
        save_adapter(model, written, run.rows.base.name, head, adapter=VALUE)
