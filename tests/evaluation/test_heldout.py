"""Held-out documents: the same numbers for every budget and number of processes.

Processes are threads here; their `reduce` waits for all of them, as a real one does, and fails if
one of them stays away.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from documents import Shape, random_documents
from tiny import tiny_model
from torch import nn

from alignkit.data.documents import Document
from alignkit.evaluation.columns import score_documents
from alignkit.evaluation.heldout import evaluate_heldout, say_heldout
from alignkit.models.kernels.vocab_head import TokenScores
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.runtime.processes import SINGLE, ProcessGroup

VOCABULARY = 600
SHAPES: tuple[Shape, ...] = ((0, (21,)), (5, (9,)), (0, (33,)), (11, (4,)), (0, (7,)))
DOCUMENTS = random_documents(SHAPES, VOCABULARY)
BUDGETS = [1, 34, 10_000]
"""Every document alone, two or three together, all in one."""

T = TypeVar("T")


def on_processes(world: int, work: Callable[[ProcessGroup], T]) -> list[T]:
    """What `work` finds on each of `world` processes that add up their tensors."""
    barrier = threading.Barrier(world, timeout=30)
    parts: list[torch.Tensor] = [torch.zeros(0)] * world

    def run(rank: int) -> T:
        def add_up(part: torch.Tensor) -> torch.Tensor:
            parts[rank] = part
            barrier.wait()
            total = torch.stack(parts).sum(0)
            barrier.wait()
            return total

        return work(ProcessGroup(rank, world, add_up))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


class Probe(nn.Module):
    """A scorer that remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.inner = nn.Dropout(0.5)
        self.calls: list[list[int]] = []
        self.modes: list[tuple[bool, bool, bool]] = []


def probe_score(scorer: nn.Module, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """Twice the first token of each document's branch, and its length; float32."""
    assert isinstance(scorer, Probe)
    scorer.calls.append([document.num_tokens for document in documents])
    scorer.modes.append((scorer.training, scorer.inner.training, torch.is_grad_enabled()))
    first = torch.tensor([float(document.branches[0].ids[0]) for document in documents])
    lengths = torch.tensor([float(document.num_tokens) for document in documents])
    return {"twice": scorer.weight * first, "length": lengths}


TWICE = [2.0 * float(document.branches[0].ids[0]) for document in DOCUMENTS]
LENGTHS = [float(document.num_tokens) for document in DOCUMENTS]


@pytest.mark.parametrize("budget", BUDGETS)
def test_one_value_for_each_document_in_order(budget: int) -> None:
    probe = Probe()
    found = score_documents(probe_score, probe, DOCUMENTS, budget)
    assert {name: values.tolist() for name, values in found.items()} == {
        "length": LENGTHS,
        "twice": TWICE,
    }
    assert all(values.dtype == np.float64 for values in found.values())
    assert sorted(length for call in probe.calls for length in call) == sorted(LENGTHS)
    assert all(sum(call) <= budget or len(call) == 1 for call in probe.calls)
    assert len(probe.calls) == {1: 5, 34: 3, 10_000: 1}[budget]


@pytest.mark.parametrize("training", [True, False])
def test_the_scorer_is_left_as_it_was(training: bool) -> None:
    probe = Probe().train(training)
    score_documents(probe_score, probe, DOCUMENTS, 34)
    assert set(probe.modes) == {(False, False, False)}
    assert probe.training is training
    assert probe.inner.training is training
    assert torch.is_grad_enabled()
    assert probe.weight.grad is None


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("budget", BUDGETS)
def test_shares_add_up_to_the_whole(world: int, budget: int) -> None:
    whole = score_documents(probe_score, Probe(), DOCUMENTS, budget)
    probes = [Probe() for _ in range(world)]
    shares = [
        score_documents(probe_score, probe, DOCUMENTS, budget, ProcessGroup(rank, world))
        for rank, probe in enumerate(probes)
    ]
    for name, values in whole.items():
        assert sum(share[name] for share in shares).tolist() == values.tolist()
    read = [length for probe in probes for call in probe.calls for length in call]
    assert sorted(read) == sorted(LENGTHS)  # nobody's document was read twice


@pytest.mark.parametrize("world", [3, 8])
def test_every_process_has_all_the_values(world: int) -> None:
    # With 8 processes three have no document; they must still join every sum.
    found = on_processes(
        world, lambda processes: score_documents(probe_score, Probe(), DOCUMENTS, 34, processes)
    )
    assert len(found) == world
    for columns in found:
        assert columns["twice"].tolist() == TWICE
        assert columns["length"].tolist() == LENGTHS


def direct_values(documents: Sequence[Document]) -> dict[str, float]:
    """One plain forward of transformers for each document, one target at a time."""
    model: Any = tiny_model()
    losses, correct = [], []
    for document in documents:
        (branch,) = document.branches
        ids = torch.from_numpy(np.concatenate([document.prompt, branch.ids])).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        for position in len(document.prompt) + np.flatnonzero(branch.trained):
            logprobs = torch.log_softmax(logits[position - 1], 0)
            losses.append(-float(logprobs[ids[position]]))
            correct.append(int(logprobs.argmax()) == int(ids[position]))
    loss = sum(losses) / len(losses)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "accuracy": sum(correct) / len(correct),
        "tokens": len(losses),
    }


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """As `DOCUMENTS`, but every third token is the one that the model finds likeliest."""
    model: Any = tiny_model()
    found = random_documents(SHAPES, VOCABULARY)
    for document in found:
        ids = document.branches[0].ids
        for position in range(2, len(ids), 3):
            prefix = torch.from_numpy(np.concatenate([document.prompt, ids[:position]])).long()
            with torch.no_grad():
                ids[position] = int(model(input_ids=prefix[None]).logits[0, -1].argmax())
    return found


@pytest.fixture(scope="module")
def expected(documents: list[Document]) -> dict[str, float]:
    found = direct_values(documents)
    # The first token of the three documents without a prompt is no target: 74 - 3.
    assert found["tokens"] == 71
    assert 0.2 < found["accuracy"] < 0.6
    return found


@pytest.mark.parametrize("budget", BUDGETS)
def test_equals_one_plain_forward_for_each_document(
    budget: int, documents: list[Document], expected: dict[str, float]
) -> None:
    scorer = TokenScorer(tiny_model(), torch.float32).train()
    found = evaluate_heldout(scorer, documents, budget)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == expected["accuracy"]
    assert isinstance(found["tokens"], int)
    assert scorer.training
    assert all(parameter.grad is None for parameter in scorer.parameters())


def test_every_token_counts_the_same(documents: list[Document], expected: dict[str, float]) -> None:
    # Not every document: the mean of their means is another number.
    scorer = TokenScorer(tiny_model(), torch.float32)
    alone = [evaluate_heldout(scorer, [document], 100) for document in documents]
    weighted = sum(found["loss"] * found["tokens"] for found in alone) / 71
    assert weighted == pytest.approx(expected["loss"], rel=1e-5)
    assert abs(np.mean([found["loss"] for found in alone]) - expected["loss"]) > 1e-3


@pytest.mark.parametrize("world", [3, 7])
def test_processes_agree_with_one(
    world: int, documents: list[Document], expected: dict[str, float]
) -> None:
    # Made one after another: building draws from the generator that threads processes.
    scorers = [TokenScorer(tiny_model(), torch.float32) for _ in range(world)]

    def work(processes: ProcessGroup) -> dict[str, float]:
        return evaluate_heldout(scorers[processes.rank], documents, 34, processes)

    found = on_processes(world, work)
    assert len(found) == world
    for values in found:
        assert values == pytest.approx(expected, rel=1e-5)
    assert work(SINGLE) == pytest.approx(found[0], rel=1e-6)


def test_a_hopeless_model_has_a_finite_perplexity(documents: list[Document]) -> None:
    # 1000 nats a token; exp(1000) is more than a float holds.
    class Hopeless(nn.Module):
        def forward(self, batch: Any) -> TokenScores:
            logprobs = torch.full((len(batch.target_ids),), -1000.0)
            return TokenScores(logprobs, torch.zeros(len(batch.target_ids), dtype=torch.bool))

    found = evaluate_heldout(Hopeless(), documents, 34)
    assert found["loss"] == 1000.0
    assert found["perplexity"] == math.exp(700)
    assert found["accuracy"] == 0.0


def test_one_line_for_people() -> None:
    values = {"loss": 1.25, "perplexity": math.exp(1.25), "accuracy": 0.625, "tokens": 71}
    assert say_heldout(values) == "loss 1.2500  perplexity 3.49  token accuracy 62.5%"
