"""TokenScorer: packed rows = padded rows = one document at a time, in log-probs and gradients.

The three opinions run the same float32 arithmetic in another order. On the tiny models that leaves
relative differences of about 1e-6; a wrong mask, position, window, cap or scale changes log-probs
by more than 1e-2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from documents import (
    PAIRS,
    ROWS,
    Shape,
    gradients,
    naive_logprobs,
    random_batch,
    random_documents,
    worst_gradient,
)
from tiny import MODELS, plain_lora, tiny_model, trained_model

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.attention import blocks as attention_blocks
from alignkit.models.scoring import scorer
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import TokenScorer, causal_model, sequence_rows, sum_by_sequence
from alignkit.packed import PackedBatch
from alignkit.recipe.adapters import LoraSpec

VOCABULARY = 600  # below that of every tiny tokenizer
RELATIVE = 1e-5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("shapes", [ROWS, PAIRS], ids=["rows", "pairs"])
@pytest.mark.parametrize("family", MODELS)
def test_packed_equals_padded_equals_one_at_a_time(
    family: str, shapes: tuple[Shape, ...], adapter: str, checkpointing: bool
) -> None:
    documents = random_documents(shapes, VOCABULARY)
    batch = pack_documents(documents)

    packed_model = trained_model(family, adapter, checkpointing)
    packed = TokenScorer(packed_model, torch.float32)(batch)
    packed_gradients = gradients(packed_model, packed.logprobs)

    padded_model = trained_model(family, adapter)
    padded = PaddedScorer(padded_model, torch.float32)(batch)
    padded_gradients = gradients(padded_model, padded.logprobs)

    naive_model = plain_lora(trained_model(family, adapter))
    naive = naive_logprobs(naive_model, documents)
    naive_gradients = gradients(naive_model, naive)

    torch.testing.assert_close(packed.logprobs, naive, **CLOSE)
    torch.testing.assert_close(padded.logprobs, naive, **CLOSE)
    assert torch.equal(packed.correct, padded.correct)
    assert worst_gradient(packed_gradients, naive_gradients) < RELATIVE
    assert worst_gradient(padded_gradients, naive_gradients) < RELATIVE


@torch.no_grad()
def packed_logprobs(model: Any, batch: PackedBatch) -> torch.Tensor:
    return TokenScorer(model, torch.float32)(batch).logprobs


def with_ids(batch: PackedBatch, rows: slice | list[int]) -> PackedBatch:
    """The batch with other tokens at `rows`; the targets stay as they are."""
    ids = batch.input_ids.copy()
    ids[rows] = (ids[rows] + 1) % VOCABULARY
    return dataclasses.replace(batch, input_ids=ids)


@pytest.mark.parametrize("family", MODELS)
def test_documents_do_not_see_each_other(family: str) -> None:
    # Other tokens in the first document leave every number of the others as it was, bit for bit:
    # they are computed from the same values by the same kernels.
    model = tiny_model(family)
    batch = random_batch(((6, (8, 5)), (0, (14,)), (7, (9,))), VOCABULARY)
    own = batch.sequence_documents[batch.target_sequences] == 0
    before = packed_logprobs(model, batch)
    after = packed_logprobs(model, with_ids(batch, slice(0, 19)))
    assert torch.equal(before[~own], after[~own])
    assert (before[own] - after[own]).abs().max() > 1e-2


@pytest.mark.parametrize("family", MODELS)
def test_a_branch_does_not_see_its_sibling(family: str) -> None:
    model = tiny_model(family)
    batch = random_batch(((6, (8, 5)),), VOCABULARY)
    before = packed_logprobs(model, batch)
    after = packed_logprobs(model, with_ids(batch, slice(6, 14)))
    first = torch.from_numpy(batch.target_sequences == 0)
    assert torch.equal(before[~first], after[~first])
    # The first token of the changed branch is predicted by the prompt, the others by the branch.
    assert before[0] == after[0]
    assert (before[1:8] - after[1:8]).abs().min() > 0


@pytest.mark.parametrize("family", MODELS)
def test_every_branch_sees_the_prompt(family: str) -> None:
    model = tiny_model(family)
    batch = random_batch(((3, (4, 4)),), VOCABULARY)
    before = packed_logprobs(model, batch)
    after = packed_logprobs(model, with_ids(batch, [2]))
    assert (before - after).abs().min() > 0


@pytest.mark.parametrize("family", MODELS)
def test_the_last_prompt_token_predicts_the_first_token_of_every_branch(family: str) -> None:
    model = tiny_model(family)
    (document,) = random_documents(((5, (4, 6, 2)),), VOCABULARY)
    batch = pack_documents([document])
    first = [0, 4, 10]  # targets 0..3 belong to branch 0, 4..9 to branch 1, 10..11 to branch 2
    assert batch.target_rows[first].tolist() == [4, 4, 4]
    found = packed_logprobs(model, batch)[first]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(document.prompt).long()[None]).logits[0, -1]
    ids = [int(branch.ids[0]) for branch in document.branches]
    torch.testing.assert_close(found, torch.log_softmax(logits, -1)[ids], **CLOSE)


# A window of w tokens reaches w - 1 tokens back in each layer: with two windowed layers and w = 8
# the state of row r depends on the tokens r - 14 .. r.
@pytest.mark.parametrize(
    "shape", [(0, (40,)), (10, (30, 30))], ids=["one branch", "through the prompt"]
)
def test_a_sliding_window_is_honoured(shape: Shape) -> None:
    (document,) = random_documents((shape,), VOCABULARY)
    batch = pack_documents([document])
    positions = batch.position_ids[batch.target_rows]
    for family, reach in (("mistral", 14), ("llama", 1000)):
        model = tiny_model(family)
        difference = packed_logprobs(model, batch) - packed_logprobs(model, with_ids(batch, [0]))
        assert (difference[positions > reach] == 0).all()
        assert (difference[positions <= reach] != 0).all()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_layers_with_and_without_a_window_alternate(family: str) -> None:
    # The last layer sees everything, so the first token reaches every row ...
    batch = random_batch(((0, (40,)),), VOCABULARY)
    model = tiny_model(family)
    difference = packed_logprobs(model, batch) - packed_logprobs(model, with_ids(batch, [0]))
    assert (difference != 0).all()
    # ... but not as it would without any window.
    layers = len(model.config.layer_types)
    wide = tiny_model(family, layer_types=["full_attention"] * layers)
    moved = packed_logprobs(model, batch) - packed_logprobs(wide, batch)
    assert moved.abs().max() > 1e-2


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_caps_are_honoured(cap: str) -> None:
    documents = random_documents(PAIRS, VOCABULARY)
    batch = pack_documents(documents)
    capped = packed_logprobs(tiny_model("gemma2"), batch)
    model = tiny_model("gemma2", **{cap: None})
    uncapped = packed_logprobs(model, batch)
    assert (capped - uncapped).abs().max() > 1e-2
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(uncapped, naive_logprobs(model, documents), **CLOSE)


@pytest.mark.parametrize("family", MODELS)
def test_no_cache_is_built(family: str) -> None:
    # A cache would make transformers read position_ids as the continuation of one document.
    model = tiny_model(family)
    model.config.use_cache = True
    seen: list[Any] = []
    decoder = model.get_decoder()
    decoder.register_forward_hook(
        lambda _module, _args, kwargs, output: seen.append((kwargs["use_cache"], output)),
        with_kwargs=True,
    )
    packed_logprobs(model, random_batch(PAIRS, VOCABULARY))
    ((use_cache, output),) = seen
    assert use_cache is False
    assert output.past_key_values is None


@pytest.mark.parametrize("family", MODELS)
def test_filling_up_rows_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(PAIRS, VOCABULARY)
    results = []
    monkeypatch.setattr(attention_blocks, "layout", attention_blocks.layout.__wrapped__)  # no cache
    for row, segment in ((64, 32), (1, 1), (128, 16)):
        monkeypatch.setattr(scorer, "ROUNDING", row)
        monkeypatch.setattr(attention_blocks, "ROUNDING", segment)
        model = trained_model(family, "full")
        logprobs = TokenScorer(model, torch.float32)(batch).logprobs
        results.append((logprobs.detach(), gradients(model, logprobs)))
    (expected, expected_gradients), *others = results
    for logprobs, found in others:
        torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=2e-6)
        assert worst_gradient(found, expected_gradients) < RELATIVE


def test_round_up_appends_a_segment_that_nobody_scores() -> None:
    batch = random_batch(PAIRS, VOCABULARY)
    filled = scorer.round_up(batch, 64)
    total = batch.num_tokens
    assert total % 64
    assert filled.num_tokens == -(-total // 64) * 64
    assert filled.segments[:-1] == batch.segments
    last = filled.segments[-1]
    assert (last.start, last.length) == (total, filled.num_tokens - total)
    assert last.prefix_length == 0
    assert filled.target_rows is batch.target_rows
    assert scorer.round_up(filled, 64) is filled


@pytest.mark.parametrize("family", MODELS)
def test_the_order_of_documents_does_not_matter(family: str) -> None:
    model = tiny_model(family)
    documents = random_documents(PAIRS, VOCABULARY)
    batch, turned = pack_documents(documents), pack_documents(documents[::-1])
    forward, backward = packed_logprobs(model, batch), packed_logprobs(model, turned)

    def of(number: int, packed: PackedBatch, values: torch.Tensor) -> torch.Tensor:
        return values[packed.sequence_documents[packed.target_sequences] == number]

    for number in range(len(documents)):
        torch.testing.assert_close(
            of(number, batch, forward), of(len(documents) - 1 - number, turned, backward), **CLOSE
        )


@pytest.mark.parametrize("family", MODELS)
def test_a_shared_prompt_equals_repeating_it(family: str) -> None:
    model = tiny_model(family)
    (pair,) = random_documents(((9, (7, 12)),), VOCABULARY)
    apart = [Document(pair.prompt, (branch,), 0) for branch in pair.branches]
    shared = packed_logprobs(model, pack_documents([pair]))
    torch.testing.assert_close(shared, packed_logprobs(model, pack_documents(apart)), **CLOSE)


def test_a_batch_without_targets_gives_no_scores() -> None:
    branch = Branch(np.arange(5, dtype=np.int32), np.zeros(5, bool))
    batch = pack_documents([Document(np.zeros(0, np.int32), (branch,), 0)])
    assert packed_logprobs(tiny_model(), batch).shape == (0,)


@pytest.mark.parametrize("family", MODELS)
def test_bfloat16_compute_stays_near(family: str) -> None:
    # bfloat16 keeps 8 bits: log-probs near -10 are some 0.05 off; a wrong mask moves them by more.
    batch = random_batch(PAIRS, VOCABULARY)
    exact = packed_logprobs(tiny_model(family), batch)
    model = tiny_model(family, dtype=torch.bfloat16)
    with torch.no_grad():
        narrow = TokenScorer(model, torch.bfloat16)(batch).logprobs
    assert narrow.dtype == torch.float32
    assert (narrow - exact).abs().mean() < 0.2


def test_float32_weights_compute_in_bfloat16_under_it() -> None:
    model = trained_model("llama", "full")
    dtypes = []
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _module, _args, output: dtypes.append(output.dtype)
    )
    scores = TokenScorer(model, torch.bfloat16)(random_batch(ROWS, VOCABULARY))
    hook.remove()
    found = gradients(model, scores.logprobs)
    assert dtypes == [torch.bfloat16]
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_causal_model_looks_through_peft() -> None:
    model = tiny_model()
    assert causal_model(model) is model
    assert causal_model(attach_adapter(model, LoraSpec(), 0)) is model


def test_sequence_rows_are_prompt_and_branch() -> None:
    batch = random_batch(((2, (3, 1)), (0, (2,))), VOCABULARY)
    rows = [row.tolist() for row in sequence_rows(batch)]
    assert rows == [[0, 1, 2, 3, 4], [0, 1, 5], [6, 7]]


def test_sums_keep_what_float32_would_round_away() -> None:
    count = 1500
    rng = np.random.default_rng(0)
    answers = [Branch(np.ones(count, np.int32), np.ones(count, bool)) for _ in range(2)]
    batch = pack_documents([Document(np.ones(3, np.int32), tuple(answers), 0)])
    logprobs = torch.from_numpy(rng.normal(-0.7, 0.3, 2 * count)).float().requires_grad_()
    sums = sum_by_sequence(logprobs, batch)
    exact = logprobs.detach().double().view(2, count).sum(1)
    torch.testing.assert_close(sums.detach(), exact, rtol=0, atol=1e-9)
    sums[1].backward()
    assert torch.equal(logprobs.grad, torch.tensor([0.0, 1.0]).repeat_interleave(count))
