"""Random documents, and the log-probs of their targets computed one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from alignkit.data.documents import Branch, Document
from alignkit.data.examples import Example
from alignkit.data.formats import Text
from alignkit.data.packing import pack_documents
from alignkit.packed import PackedBatch, Role

Shape = tuple[int, tuple[int, ...]]
"""Tokens of the prompt, and of each branch."""

ROWS: tuple[Shape, ...] = ((0, (21,)), (0, (9,)), (0, (33,)))
"""What supervised fine-tuning packs: one branch, no shared prompt."""
PAIRS: tuple[Shape, ...] = ((11, (13, 6)), (4, (3, 17, 9)), (0, (10,)), (12, (8,)))
"""Shared prompts with one to three branches, shorter and longer than a window of 8."""


def answers(texts: Iterable[Text]) -> list[Example]:
    """Rows of a single answer."""
    return [Example((text,), (Role.CHOSEN,), text.place) for text in texts]


def as_rows(documents: Iterable[Document]) -> list[Branch]:
    """Rows of a single answer: no prompt of its own and one branch, which is the whole row."""
    rows = []
    for document in documents:
        (branch,) = document.branches
        assert len(document.prompt) == 0
        rows.append(branch)
    return rows


def random_document(shape: Shape, vocabulary: int, rng: np.random.Generator) -> Document:
    """Every token of a branch is a target, except a first one that nothing predicts."""
    prompt, lengths = shape
    branches = []
    for length in lengths:
        trained = np.ones(length, bool)
        trained[0] = prompt > 0
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        branches.append(Branch(ids, trained))
    ids = rng.integers(0, vocabulary, prompt).astype(np.int32)
    return Document(ids, tuple(branches), 0)


def random_documents(shapes: tuple[Shape, ...], vocabulary: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [random_document(shape, vocabulary, rng) for shape in shapes]


def random_batch(shapes: tuple[Shape, ...], vocabulary: int, seed: int = 0) -> PackedBatch:
    return pack_documents(random_documents(shapes, vocabulary, seed))


def naive_logprobs(model: Any, documents: list[Document]) -> torch.Tensor:
    """Log-probs of the targets in the order of `pack_documents`: one plain forward a sequence."""
    found = []
    for document in documents:
        for branch in document.branches:
            ids = torch.from_numpy(np.concatenate([document.prompt, branch.ids])).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            logprobs = torch.log_softmax(logits, -1)
            targets = len(document.prompt) + np.flatnonzero(branch.trained)
            found.append(logprobs[targets - 1, ids[targets]])
    return torch.cat(found)


def gradients(model: Any, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of Σ c_i · log p_i for fixed random c, by name of the weight."""
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(len(logprobs), generator=generator)
    return gradients_of(model, (logprobs * factors).sum())


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of a loss by name of the trained weight; every one of them must get some."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in named.items() if parameter.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {name: parameter.grad.clone() for name, parameter in named.items()}


def worst_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ‖found - expected‖ / ‖expected‖ over the weights."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in expected.items()
    )
