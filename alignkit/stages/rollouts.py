"""Prompts -> responses -> rewards, log-probs, values and advantages of one PPO step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents, split_documents
from alignkit.data.prompts import Prompt, PromptSet
from alignkit.errors import RewardError
from alignkit.evaluation.columns import Share
from alignkit.generation.responses import Response, Score
from alignkit.generation.rollout import Continuation, RolloutEngine
from alignkit.models.scorer import sum_by_sequence
from alignkit.packed import PackedBatch
from alignkit.stages.roles import Roles, ScoringModel


@dataclass(frozen=True)
class Rollout:
    """One prompt and its responses.

    Args:
        prompt: with its row.
        document: prompt and responses as tokens; a branch for each response.
        continuations: as they were sampled.
        texts: the responses without special tokens.
    """

    prompt: Prompt
    document: Document
    continuations: tuple[Continuation, ...]
    texts: tuple[str, ...]

    def responses(self) -> list[Response]:
        """What a reward source reads."""
        prompt = self.prompt
        return [Response(prompt.shown, text, prompt.columns, prompt.place) for text in self.texts]


def sample(
    prompts: PromptSet,
    items: Sequence[int],
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seed: tuple[int, ...],
) -> list[Rollout]:
    """Responses to some prompts.

    Args:
        prompts: all of them.
        items: which ones.
        engine: samples.
        tokenizer: decodes.
        samples: responses to each.
        seed: of the random numbers, together with the item and the response's number.

    Returns:
        One rollout for each item, in order.
    """
    asked = [(item, number) for item in items for number in range(samples)]
    found = engine.generate(
        [prompts.prompts[item].ids for item, _ in asked],
        [(*seed, item, number) for item, number in asked],
    )
    rollouts = []
    for position, item in enumerate(items):
        own = tuple(found[position * samples : (position + 1) * samples])
        branches = tuple(Branch(c.ids.astype(np.int32), np.ones(len(c.ids), np.bool_)) for c in own)
        document = Document(prompts.prompts[item].ids, branches, int(item))
        texts = tuple(tokenizer.decode(c.ids, skip_special_tokens=True).strip() for c in own)
        rollouts.append(Rollout(prompts.prompts[item], document, own, texts))
    return rollouts


@dataclass(frozen=True)
class Rewards:
    """What responses are worth.

    Args:
        total: `[B]` float32 weighted sum, the penalty for a missing end included.
        parts: name of each source -> `[B]` its score, before its weight.
        plain: `[B]` the sum without the penalty.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    plain: torch.Tensor


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
        missing_eos_penalty: taken from responses that were cut off; None takes nothing.
        budget: tokens of one pass of a reward model.
        share: this process's part; an error of one process ends all.
    """

    parts: tuple[RewardPart, ...]
    missing_eos_penalty: float | None
    budget: int
    share: Share

    def __call__(self, rollouts: Sequence[Rollout]) -> Rewards:
        """Score every response of some rollouts.

        Raises:
            RewardError: a source gave no usable scores, here or in another process.
        """
        error: RewardError | None = None
        try:
            parts = {part.name: self._score(part, rollouts) for part in self.parts}
        except RewardError as found:
            error = found
        failed = self.share.reduce(torch.tensor([float(error is not None)], dtype=torch.float64))
        if error is not None:
            raise error
        if failed.item() > 0:
            raise RewardError("another process could not score its responses")
        plain = torch.stack([p.weight * parts[p.name] for p in self.parts]).sum(0)
        total = plain
        if self.missing_eos_penalty:
            cut = [c.finish == "length" for r in rollouts for c in r.continuations]
            total = plain - self.missing_eos_penalty * torch.tensor(cut, dtype=torch.float32)
        return Rewards(total, parts, plain)

    def _score(self, part: RewardPart, rollouts: Sequence[Rollout]) -> torch.Tensor:
        if not isinstance(part.source, ScoringModel):
            responses = [response for rollout in rollouts for response in rollout.responses()]
            return torch.tensor(part.source(responses), dtype=torch.float32)
        documents = [rollout.document for rollout in rollouts]
        groups = split_documents([document.num_tokens for document in documents], self.budget)
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
        return scores


@dataclass(frozen=True)
class Scored:
    """Log-probs and values of all responses of this process, `[B, T]` float32 each.

    Args:
        policy: log-probs under the policy that sampled, from the pass that training repeats.
        reference: the same under the reference.
        values: predictions of the value model.
        mask: response tokens.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


Outputs = tuple[torch.Tensor, torch.Tensor | None]
"""`[N]` log-probs, and `[N]` values where the policy carries the head."""


def forward_policy(roles: Roles, batch: PackedBatch) -> Outputs:
    """`[N]` log-probs of a batch, and `[N]` values where the policy carries the head."""
    found: Any = roles.policy(batch)
    if roles.value is None:
        return found[0].logprobs, found[1]
    return found.logprobs, None


def score_rollouts(
    roles: Roles,
    rollouts: Sequence[Rollout],
    groups: Sequence[Sequence[int]],
    *,
    keep: bool = False,
) -> tuple[Scored, Outputs | None]:
    """Policy, reference and value passes.

    Args:
        roles: who scores.
        rollouts: of this process; none where a short step leaves it nothing.
        groups: rollouts of each pass; the same as in training, so that the ratio starts at 1.
        keep: all of them come before the first optimizer step.

    Returns:
        What they gave, without gradients. And where that is one pass and is kept, what the policy
        gave with its graph: the first update would compute the same again.
    """
    keep = keep and len(groups) == 1
    if not rollouts:
        nothing = torch.zeros(0, 1)
        return Scored(nothing, nothing, nothing, nothing.bool()), None
    lengths = [[len(c.ids) for c in rollout.continuations] for rollout in rollouts]
    rows: dict[int, list[torch.Tensor]] = {}
    for group in groups:
        batch = pack_documents([rollouts[i].document for i in group])
        with torch.set_grad_enabled(keep):
            outputs = forward_policy(roles, batch)
        with torch.no_grad():
            reference: Any = roles.reference(batch)
            values: Any = outputs[1] if roles.value is None else roles.value(batch)
        found = (outputs[0].detach(), reference.logprobs, values.detach().float())
        columns = torch.stack(found).cpu()
        parts = iter(columns.split([n for i in group for n in lengths[i]], dim=1))
        for i in group:
            rows[i] = [next(parts) for _ in lengths[i]]
    ordered = [row for i in range(len(rollouts)) for row in rows[i]]
    padded = pad_sequence([row.T for row in ordered], batch_first=True)
    counts = torch.tensor([row.shape[1] for row in ordered])
    mask = torch.arange(padded.shape[1]) < counts[:, None]
    scored = Scored(padded[..., 0], padded[..., 1], padded[..., 2], mask)
    return scored, outputs if keep else None


def response_rows(rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """Of each rollout, the rows of its responses among all responses."""
    counts = [len(rollout.continuations) for rollout in rollouts]
    return np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])


def mean_kl(roles: Roles, rollouts: Sequence[Rollout], budget: int) -> torch.Tensor:
    """`[B]` k1 of whole responses, in nats.

    Args:
        roles: policy and reference.
        rollouts: at least one.
        budget: tokens of one pass.
    """
    lengths = [rollout.document.num_tokens for rollout in rollouts]
    rows, found = response_rows(rollouts), torch.zeros(sum(len(r.texts) for r in rollouts))
    for group in split_documents(lengths, budget):
        batch = pack_documents([rollouts[i].document for i in group])
        with torch.no_grad():
            policy, _ = forward_policy(roles, batch)
            reference: Any = roles.reference(batch)
            sums = sum_by_sequence(policy - reference.logprobs, batch).float().cpu()
        found[torch.from_numpy(np.concatenate([rows[i] for i in group]))] = sums
    return found
