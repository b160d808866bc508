"""What responses are worth: the sources of rewards, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alignkit.data.packing import pack_documents, split_documents
from alignkit.errors import RewardError
from alignkit.generation.rewards.build import build_score
from alignkit.generation.rewards.responses import Failure, Score, Scores
from alignkit.models.adapters.switching import (
    Role,
)
from alignkit.recipe.rewards import ModelReward, RewardSource, reward_name
from alignkit.runtime.processes import ProcessGroup
from alignkit.stages.rollouts.sampling import Rollout


@dataclass(frozen=True)
class ScoringModel:
    """A reward model at work.

    Args:
        role: gives `[S]` raw rewards.
        mean: subtracted from them.
        factor: multiplies the difference.
    """

    role: Role
    mean: float
    factor: float


@dataclass(frozen=True)
class Rewards:
    """What responses are worth.

    Args:
        total: `[B]` float32 weighted sum, the penalty for a missing end included; NaN where no
            source applies.
        parts: name of each source -> `[B]` its score, before its weight; NaN where it does not
            apply.
        plain: `[B]` the sum without the penalty.
        notes: response -> name of a source -> what else that said of it.
        metrics: further numbers of the sources, by name.
        failures: name of a source -> responses that it could not score.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    plain: torch.Tensor
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, tuple[Failure, ...]] = field(default_factory=dict)

    @property
    def known(self) -> torch.Tensor:
        """`[B]` whether any source applies to the response."""
        return ~torch.isnan(self.plain)


@dataclass(frozen=True)
class RewardPart:
    """One source of rewards at work.

    Args:
        name: `reward/<name>` in the metrics.
        weight: in the sum; that of a reward model is in its factor.
        source: a model, or a function of the text.
    """

    name: str
    weight: float
    source: ScoringModel | Score


@dataclass(frozen=True)
class Judge:
    """All sources together.

    Args:
        parts: in the recipe's order.
        missing_eos_penalty: subtracted for responses that were cut off; None subtracts nothing.
        max_tokens: tokens of one pass of a reward model.
        processes: this one, and sums over all of them; an error in one ends all.
    """

    parts: tuple[RewardPart, ...]
    missing_eos_penalty: float | None
    max_tokens: int
    processes: ProcessGroup

    def __call__(self, rollouts: Sequence[Rollout]) -> Rewards:
        """Score every response of some rollouts.

        Raises:
            RewardError: a source gave no usable scores, here or in another process.
        """
        error: RewardError | None = None
        found: dict[str, Scores] = {}
        try:
            found = {part.name: self._score(part, rollouts) for part in self.parts}
        except RewardError as raised:
            error = raised
        failed = self.processes.reduce(
            torch.tensor([float(error is not None)], dtype=torch.float64)
        )
        if error is not None:
            raise error
        if failed.item() > 0:
            raise RewardError(
                "another process could not score its responses",
                hint="see the error that it printed",
            )
        values = {name: torch.tensor(s.values, dtype=torch.float32) for name, s in found.items()}
        total = plain = weighted_sum([(p.weight, values[p.name]) for p in self.parts])
        if self.missing_eos_penalty:
            cut = [c.finish == "length" for r in rollouts for c in r.sampled]
            total = plain - self.missing_eos_penalty * torch.tensor(cut, dtype=torch.float32)
        notes: dict[int, dict[str, Any]] = {}
        for name, scores in found.items():
            for number, note in scores.notes.items():
                notes.setdefault(number, {})[name] = note
        return Rewards(
            total,
            values,
            plain,
            notes,
            {key: value for scores in found.values() for key, value in scores.metrics.items()},
            {name: scores.failures for name, scores in found.items()},
        )

    def failed(self, rewards: Rewards, *, whole: bool = True) -> dict[str, int]:
        """Name of each source -> responses that it could not score, over all processes.

        Args:
            rewards: of some responses of this process.
            whole: these are all of a step: a source should apply to some.

        Raises:
            RewardError: a source could score none of several responses, or none applies to any.
        """
        counts = [float(len(rewards.failures.get(part.name, ()))) for part in self.parts]
        known = [float(rewards.known.sum()), float(len(rewards.plain))]
        *failed, scored, every = self.processes.reduce(
            torch.tensor([*counts, *known], dtype=torch.float64)
        ).tolist()
        found = {part.name: int(n) for part, n in zip(self.parts, failed, strict=True)}
        for name, count in found.items():
            if count == every > 1:
                reason = next(iter(rewards.failures[name]), None)
                raise RewardError(
                    f"reward {name}: none of {count} responses could be scored"
                    + (f": {reason.reason}" if reason else ""),
                    hint="on_failure is for single responses; call the source by hand with one",
                )
        if whole and every > 1 and not scored:
            raise RewardError(
                f"no reward applies to any of {int(every)} responses: every source gave None",
                hint="give a number where a response can be judged, or add a source for the others",
            )
        return found

    def _score(self, part: RewardPart, rollouts: Sequence[Rollout]) -> Scores:
        if not isinstance(part.source, ScoringModel):
            responses = [response for rollout in rollouts for response in rollout.responses()]
            return part.source(responses)
        documents = [rollout.document for rollout in rollouts]
        groups = split_documents([document.num_tokens for document in documents], self.max_tokens)
        owners = np.repeat(np.arange(len(documents)), [len(d.branches) for d in documents])
        scores = torch.zeros(len(owners))
        for group in groups:
            with torch.no_grad():
                raw: Any = part.source.role(pack_documents([documents[i] for i in group]))
            rows = np.concatenate([np.flatnonzero(owners == i) for i in group])
            scores[torch.from_numpy(rows)] = (raw.cpu() - part.source.mean) * part.source.factor
        if not torch.isfinite(scores).all():
            raise RewardError(
                f"the reward model gave {scores[~torch.isfinite(scores)][0].item()} to a response",
                hint="its weights or the policy's have diverged; look at samples.jsonl",
            )
        return Scores(scores.tolist())


def joined_rewards(parts: Sequence[Rewards]) -> Rewards:
    """What consecutive responses earn as one; of a metric the last is kept.

    Args:
        parts: by the same sources, at least one.
    """
    notes: dict[int, dict[str, Any]] = {}
    failures: dict[str, tuple[Failure, ...]] = {}
    count = 0
    for part in parts:
        notes |= {count + number: note for number, note in part.notes.items()}
        count += len(part.plain)
        for name, failed in part.failures.items():
            failures[name] = failures.get(name, ()) + failed
    return Rewards(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        torch.cat([part.plain for part in parts]),
        notes,
        {name: value for part in parts for name, value in part.metrics.items()},
        failures,
    )


def weighted_sum(parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """`[B]` the sum of weighted scores over the sources that apply; NaN where none does.

    Args:
        parts: weight and `[B]` scores of each source, NaN where it does not apply.
    """
    if not parts:
        return torch.zeros(0)
    scores = torch.stack([weight * values for weight, values in parts])
    nowhere = torch.isnan(scores).all(0)
    return scores.nansum(0).masked_fill(nowhere, float("nan"))


def build_judge(
    sources: Sequence[RewardSource],
    models: Sequence[ScoringModel],
    *,
    missing_eos_penalty: float | None,
    max_tokens: int,
    processes: ProcessGroup,
) -> Judge:
    """All sources of a recipe, ready to score.

    Args:
        sources: of the recipe.
        models: the reward models among them, in the same order.
        missing_eos_penalty: subtracted for responses that were cut off; None subtracts nothing.
        max_tokens: tokens of one pass of a reward model.
        processes: this one, and sums over all of them.

    Raises:
        RewardError: a function cannot be loaded, or a rule needs a package that is missing.
    """
    remaining = iter(models)
    parts: list[RewardPart] = []
    names: list[str] = []
    for source in sources:
        name = wanted = reward_name(source)
        number = 1
        while name in names:
            number += 1
            name = f"{wanted}_{number}"
        names.append(name)
        if isinstance(source, ModelReward):
            parts.append(RewardPart(name, source.weight, next(remaining)))
        else:
            parts.append(RewardPart(name, source.weight, build_score(source)))
    return Judge(tuple(parts), missing_eos_penalty, max_tokens, processes)
