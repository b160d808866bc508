"""Answers that share a prompt, computed once, equal plain padded rows that repeat it.

The opinion compared with is transformers alone: one right-padded row for every prompt with one
answer, its eager attention, full logits, PEFT's own LoRA forward, no checkpointing. Both sides run
the same float32 arithmetic in another order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from documents import gradients_of, worst_gradient
from tiny import MODELS, plain_lora, tiny_model, trained_model
from torch import nn

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents
from alignkit.models.rewards.head import freeze_unused_head, new_head
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import ROUNDING, TokenScorer, causal_model, sum_by_sequence
from alignkit.objectives.bradley_terry import bradley_terry_loss
from alignkit.objectives.preference import PairLogprobs, dpo_loss
from alignkit.packed import Role

VOCABULARY = 600  # below that of every tiny tokenizer
RELATIVE = 1e-5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

SHAPES = {
    "pairs": ((11, (13, 6)), (4, (5, 17)), (20, (9, 12)), (1, (3, 4))),
    "triples": ((12, (7, 15, 10)), (3, (6, 2, 14)), (18, (11, 4, 5))),
}
"""Tokens of each prompt and of its answers. Windows of 8 end within a prompt and within an answer;
that of 16 reaches from the second half of most answers back into their prompt."""

CASES = [*((family, {}) for family in MODELS), ("mistral", {"sliding_window": 16})]
IDS = [*MODELS, "mistral-wider"]

Scores = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""`[S]` sums or rewards, and the gradient of their loss by name of the weight."""


@functools.cache
def documents_of(shapes: str) -> list[Document]:
    """Random answers with roles; some tokens are no targets, the last of an answer always is."""
    rng = np.random.default_rng(7)
    documents = []
    for row, (prompt, lengths) in enumerate(SHAPES[shapes]):
        branches = []
        for role, length in zip(Role, lengths, strict=False):
            trained = rng.random(length) < 0.8
            trained[-1] = True
            branches.append(Branch(_ids(rng, length), trained, role))
        documents.append(Document(_ids(rng, prompt), tuple(branches), row, margin=0.3 * row))
    return documents


def _ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY, length).astype(np.int32)


def padded_rows(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, L]` ids and mask, a row for each answer; the padding is a token like any other."""
    rows = [np.concatenate([d.prompt, b.ids]) for d in documents for b in d.branches]
    ids = torch.full((len(rows), max(map(len, rows))), 3)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row)
        mask[number, : len(row)] = 1
    return ids, mask


def plain_sums(model: Any, documents: list[Document]) -> torch.Tensor:
    """`[S]` log-probs of the answers' trained tokens."""
    ids, mask = padded_rows(documents)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[:, :, 0]
    targets = torch.zeros_like(mask, dtype=torch.bool)
    branches = [(len(d.prompt), b) for d in documents for b in d.branches]
    for number, (start, branch) in enumerate(branches):
        targets[number, start : start + len(branch.ids)] = torch.from_numpy(branch.trained)
    return (logprobs * targets[:, 1:]).sum(1)


def plain_rewards(model: Any, head: nn.Linear, documents: list[Document]) -> torch.Tensor:
    """`[S]` rewards at the last token of each row."""
    ids, mask = padded_rows(documents)
    hidden = causal_model(model).model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    ends = mask.sum(1) - 1
    return (hidden[torch.arange(len(ids)), ends] @ head.weight.T)[:, 0]


def fake_references(documents: list[Document]) -> torch.Tensor:
    """`[S]` log-probs of a reference model that finds every trained token a little unlikely."""
    counts = [int(b.trained.sum()) for d in documents for b in d.branches]
    return torch.tensor([-12.0 * n + 0.7 * i for i, n in enumerate(counts)])


def preference_loss(sums: torch.Tensor, documents: list[Document]) -> torch.Tensor:
    """DPO of every chosen answer against each other answer to its prompt, so that all count."""
    references = fake_references(documents)
    size = len(documents[0].branches)
    values, fixed = sums.view(-1, size), references.view(-1, size)
    pairs = [
        PairLogprobs(
            chosen=values[:, 0],
            rejected=values[:, other],
            chosen_tokens=torch.ones(len(values)),
            rejected_tokens=torch.ones(len(values)),
            reference_chosen=fixed[:, 0],
            reference_rejected=fixed[:, other],
        )
        for other in range(1, size)
    ]
    return torch.cat([dpo_loss(pair, beta=0.05) for pair in pairs]).sum()


def reward_loss(rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry of every chosen answer against each other answer to its prompt."""
    values = rewards.view(len(margins), -1)
    others = values[:, 1:].unbind(1)
    losses = [bradley_terry_loss(values[:, 0], o, margins, center=0.01) for o in others]
    return torch.cat(losses).sum()


def reward_model(family: str, adapter: str, **options: Any) -> nn.ModuleDict:
    """A model and its scalar head as the reward stage trains them."""
    model = trained_model(family, adapter, **options)
    freeze_unused_head(model)
    return nn.ModuleDict({"model": model, "head": new_head(model, seed=3)})


@functools.cache
def plain_preference(case: int, adapter: str, shapes: str) -> Scores:
    family, overrides = CASES[case]
    model = plain_lora(trained_model(family, adapter, **overrides))
    causal_model(model).set_attn_implementation("eager")
    sums = plain_sums(model, documents_of(shapes))
    loss = preference_loss(sums, documents_of(shapes))
    return sums.detach(), gradients_of(model, loss)


@functools.cache
def plain_reward(case: int, adapter: str, shapes: str) -> Scores:
    family, overrides = CASES[case]
    parts = reward_model(family, adapter, **overrides)
    causal_model(plain_lora(parts["model"])).set_attn_implementation("eager")
    rewards = plain_rewards(parts["model"], parts["head"], documents_of(shapes))
    margins = torch.tensor([document.margin for document in documents_of(shapes)])
    loss = reward_loss(rewards, margins)
    return rewards.detach(), gradients_of(parts, loss)


def require_equal(found: Scores, expected: Scores) -> None:
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert worst_gradient(found[1], expected[1]) < RELATIVE
    assert worst_value(found[1], expected[1]) < RELATIVE


def worst_value(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of one number, relative to the largest gradient of all."""
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-2  # there is something to compare
    return max(float((found[n] - v).abs().max()) for n, v in expected.items()) / largest


every_case = pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
every_adapter = pytest.mark.parametrize("adapter", ["full", "lora"])
both_modes = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])


@both_modes
@every_adapter
@pytest.mark.parametrize("shapes", SHAPES)
@every_case
def test_preferences_equal_plain_padded_rows(
    case: int, shapes: str, adapter: str, checkpointing: bool
) -> None:
    family, overrides = CASES[case]
    documents = documents_of(shapes)
    batch = pack_documents(documents)
    model = trained_model(family, adapter, checkpointing, **overrides)
    sums = sum_by_sequence(TokenScorer(model, torch.float32)(batch).logprobs, batch)
    found = gradients_of(model, preference_loss(sums, documents))
    require_equal((sums.detach().float(), found), plain_preference(case, adapter, shapes))


@both_modes
@every_adapter
@pytest.mark.parametrize("shapes", SHAPES)
@every_case
def test_rewards_equal_plain_padded_rows(
    case: int, shapes: str, adapter: str, checkpointing: bool
) -> None:
    family, overrides = CASES[case]
    batch = pack_documents(documents_of(shapes))
    parts = reward_model(family, adapter, checkpointing=checkpointing, **overrides)
    rewards = TokenScorer(parts["model"], torch.float32, parts["head"])(batch)
    margins = torch.from_numpy(batch.margins).float()
    found = gradients_of(parts, reward_loss(rewards, margins))
    assert {"head.weight"} < found.keys()
    require_equal((rewards.detach(), found), plain_reward(case, adapter, shapes))


@functools.cache
def alike_documents() -> list[Document]:
    """One answer each, to prompts that begin alike; two of them are nothing but that start."""
    rng = np.random.default_rng(11)
    start, documents = _ids(rng, 19), []
    for row, (rest, length) in enumerate([(0, 5), (6, 9), (13, 3), (0, 12), (1, 1), (22, 7)]):
        trained = rng.random(length) < 0.8
        trained[0] = True  # predicted by the start's last token where nothing stands between
        branch = Branch(_ids(rng, length), trained)
        documents.append(Document(np.concatenate([start, _ids(rng, rest)]), (branch,), row))
    other = Branch(_ids(rng, 8), np.ones(8, bool))
    return [*documents[:3], Document(_ids(rng, 20), (other,), 6), *documents[3:]]


@both_modes
@every_adapter
@every_case
def test_prompts_that_begin_alike_equal_plain_padded_rows(
    case: int, adapter: str, checkpointing: bool
) -> None:
    family, overrides = CASES[case]
    documents = alike_documents()
    weights = torch.linspace(-0.5, 0.8, len(documents))
    batch = pack_documents(documents)
    assert batch.num_tokens == sum(d.num_tokens for d in documents) - 5 * 19
    model = trained_model(family, adapter, checkpointing, **overrides)
    sums = sum_by_sequence(TokenScorer(model, torch.float32)(batch).logprobs, batch)
    found = gradients_of(model, (sums * weights).sum())
    plain = plain_lora(trained_model(family, adapter, **overrides))
    causal_model(plain).set_attn_implementation("eager")
    expected = plain_sums(plain, documents)
    gradients = gradients_of(plain, (expected * weights).sum())
    require_equal((sums.detach().float(), found), (expected.detach(), gradients))


@every_adapter
@pytest.mark.parametrize("shapes", SHAPES)
@every_case
def test_rewards_of_padded_batches(case: int, shapes: str, adapter: str) -> None:
    family, overrides = CASES[case]
    batch = pack_documents(documents_of(shapes))
    parts = reward_model(family, adapter, **overrides)
    rewards = PaddedScorer(parts["model"], torch.float32, parts["head"])(batch)
    found = gradients_of(parts, reward_loss(rewards, torch.from_numpy(batch.margins).float()))
    require_equal((rewards.detach(), found), plain_reward(case, adapter, shapes))


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_prompt_is_computed_once(shapes: str) -> None:
    seen: list[torch.Tensor] = []
    model = tiny_model()
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))
    documents = documents_of(shapes)
    with torch.no_grad():
        TokenScorer(model, torch.float32)(pack_documents(documents))
    once = np.concatenate([x for d in documents for x in (d.prompt, *(b.ids for b in d.branches))])
    (row,) = seen
    assert row.shape == (1, -(-len(once) // ROUNDING) * ROUNDING)
    assert row[0, : len(once)].tolist() == once.tolist()
    repeated = int(padded_rows(documents)[1].sum())
    assert len(once) < repeated


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_window_cuts_into_the_shared_prompt(family: str) -> None:
    # Two layers with windows of 8 reach 14 tokens back: an answer after a prompt of 20 sees
    # nothing of the prompt's first token and all of its last one.
    (pair,) = documents_of("pairs")[2:3]
    assert [len(pair.prompt), *(len(branch.ids) for branch in pair.branches)] == [20, 9, 12]
    kinds = {"gemma2", "gemma3"} & {family}
    windowed = {"layer_types": ["sliding_attention"] * 2} if kinds else {}
    unlimited = {"layer_types": ["full_attention"] * 2} if kinds else {"sliding_window": None}

    def moved(token: int, overrides: dict[str, Any]) -> torch.Tensor:
        model = tiny_model(family, num_hidden_layers=2, **overrides)
        scorer = TokenScorer(model, torch.float32)
        prompt = pair.prompt.copy()
        prompt[token] = (prompt[token] + 1) % VOCABULARY
        changed = dataclasses.replace(pair, prompt=prompt)
        with torch.no_grad():
            one, other = (scorer(pack_documents([d])).logprobs for d in (pair, changed))
        return (one - other).abs()

    assert moved(0, windowed).max() == 0
    assert moved(19, windowed).min() > 0
    assert moved(0, unlimited).min() > 0
