"""What a scalar head reads, and what a temperature does: packed rows = padded rows.

As in test_scorer: the same float32 arithmetic in another order, relative differences of about 1e-6.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from documents import (
    PAIRS,
    Shape,
    gradients_of,
    naive_logprobs,
    random_documents,
    worst_gradient,
)
from tiny import plain_lora, tiny_model, trained_model
from torch import nn

from alignkit.data.packing import pack_documents
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.kernels import vocab_head
from alignkit.models.kernels.vocab_head import LogitTransform, score_targets
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import Reading, TokenScorer, sequence_rows
from alignkit.recipe.adapters import LoraSpec

VOCABULARY = 600  # below that of every tiny tokenizer
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RELATIVE = 1e-5
FAMILIES = ["llama", "qwen2", "mistral", "gemma2"]  # the last two with a window of 8
SINGLES: tuple[Shape, ...] = ((5, (9,)), (12, (17,)), (1, (3,)))
DOUBLES: tuple[Shape, ...] = ((11, (13, 6)), (4, (3, 17)), (7, (1, 1)))
READINGS: tuple[Reading, ...] = ("ends", "targets", "both")


def read_head() -> nn.Linear:
    """A scalar head with a bias, as PPO's value model has."""
    head = nn.Linear(64, 1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        head.weight.normal_(0, 0.2, generator=generator)
        head.bias.fill_(0.7)
    return head


def parts(scores: Any) -> list[torch.Tensor]:
    """The tensors that a scorer gives, log-probs first."""
    if isinstance(scores, tuple):
        return [scores[0].logprobs, scores[1]]
    return [scores if isinstance(scores, torch.Tensor) else scores.logprobs]


def with_head(model: Any, head: nn.Linear) -> nn.Module:
    whole = nn.Module()
    whole.model, whole.head = model, head
    return whole


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("shapes", [SINGLES, DOUBLES], ids=["one branch", "two branches"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str, shapes: tuple[Shape, ...], reading: Reading) -> None:
    batch = pack_documents(random_documents(shapes, VOCABULARY))
    found, slopes = [], []
    for kind in (TokenScorer, PaddedScorer):
        model, head = trained_model(family, "lora"), read_head()
        if kind is PaddedScorer:
            model = plain_lora(model)
        scorer = kind(model, torch.float32, head, reading=reading, temperature=0.8)
        scores = parts(scorer(batch))
        found.append(scores)
        generator = torch.Generator().manual_seed(5)
        loss = sum((s * torch.randn(len(s), generator=generator)).sum() for s in scores)
        slopes.append(gradients_of(with_head(model, head), loss))
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, **CLOSE)
    assert worst_gradient(*slopes) < RELATIVE
    rows = batch.num_sequences if reading == "ends" else len(batch.target_ids)
    assert [len(s) for s in found[0]] == [rows] * (1 + (reading == "both"))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_read_before_the_token_is_chosen(family: str) -> None:
    # Target t of a response stands at row prompt + t; its value is read one row earlier, in a
    # plain forward pass over prompt and response alone.
    documents = random_documents(DOUBLES, VOCABULARY)
    batch = pack_documents(documents)
    head = read_head()
    model = tiny_model(family)
    values = TokenScorer(model, torch.float32, head, reading="targets")(batch)
    model.set_attn_implementation("eager")
    expected = []
    for row, end in zip(sequence_rows(batch), batch.sequence_ends, strict=True):
        ids = torch.from_numpy(batch.input_ids[row])[None]
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        assert row[-1] == end
        count = int((batch.target_sequences == len(expected)).sum())
        expected.append(head(hidden[-count - 1 : -1])[:, 0])
    torch.testing.assert_close(values, torch.cat(expected), **CLOSE)


@torch.no_grad()
def test_both_is_the_two_alone() -> None:
    batch = pack_documents(random_documents(PAIRS, VOCABULARY))
    model, head = tiny_model(), read_head()
    scores, values = TokenScorer(model, torch.float32, head, reading="both", temperature=0.7)(batch)
    alone = TokenScorer(model, torch.float32, temperature=0.7)(batch)
    assert torch.equal(scores.logprobs, alone.logprobs)
    assert torch.equal(scores.correct, alone.correct)
    read = TokenScorer(model, torch.float32, head, reading="targets")(batch)
    assert torch.equal(values, read)  # the temperature is no matter of the values
    ends = TokenScorer(model, torch.float32, head)(batch)
    assert ends.shape == (batch.num_sequences,)


@torch.no_grad()
def test_several_scorers_around_one_model_keep_their_ways() -> None:
    # As the roles of PPO stand around one base.
    batch = pack_documents(random_documents(DOUBLES, VOCABULARY))
    model, head = tiny_model(), read_head()
    warm = TokenScorer(model, torch.float32, temperature=2.0)
    before = warm(batch).logprobs
    plain = TokenScorer(model, torch.float32)
    values = TokenScorer(model, torch.float32, head, reading="targets")
    assert (plain(batch).logprobs - before).abs().max() > 1e-2
    assert values(batch).shape == (len(batch.target_ids),)
    assert torch.equal(warm(batch).logprobs, before)


# Temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_divided_logits(family: str, temperature: float) -> None:
    documents = random_documents(DOUBLES, VOCABULARY)
    batch = pack_documents(documents)
    model = tiny_model(family)
    with torch.no_grad():
        packed = TokenScorer(model, torch.float32, temperature=temperature)(batch)
        padded = PaddedScorer(model, torch.float32, temperature=temperature)(batch)
        model.set_attn_implementation("eager")

        def divided(**inputs: Any) -> Any:
            output = model(**inputs)
            return dataclasses.replace(output, logits=output.logits / temperature)

        expected = naive_logprobs(divided, documents)
        unscaled = naive_logprobs(model, documents)
    torch.testing.assert_close(packed.logprobs, expected, **CLOSE)
    torch.testing.assert_close(padded.logprobs, expected, **CLOSE)
    assert torch.equal(packed.correct, padded.correct)
    assert ((expected - unscaled).abs().max() > 1e-2) == (temperature != 1.0)


@pytest.mark.parametrize("adapter", ["full", "lora"], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_temperature(family: str, temperature: float, adapter: str) -> None:
    batch = pack_documents(random_documents(DOUBLES, VOCABULARY))
    slopes = []
    for kind in (TokenScorer, PaddedScorer):
        model = trained_model(family, adapter)
        if kind is PaddedScorer:
            model = plain_lora(model)
        logprobs = kind(model, torch.float32, temperature=temperature)(batch).logprobs
        factors = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(6))
        slopes.append(gradients_of(model, (logprobs * factors).sum()))
    assert worst_gradient(*slopes) < RELATIVE
    head = [name for name in slopes[0] if "lm_head" in name or "embed_tokens" in name]
    assert bool(head) == (adapter == "full")


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_an_adapter_on_the_head(temperature: float) -> None:
    # Any module but a plain linear layer is called as it is, and its logits are divided too.
    batch = pack_documents(random_documents(DOUBLES, VOCABULARY))
    spec = LoraSpec(rank=2, targets=("q_proj", "lm_head"))
    model = attach_adapter(tiny_model(), spec, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        packed = TokenScorer(model, torch.float32, temperature=temperature)(batch).logprobs
        padded = PaddedScorer(model, torch.float32, temperature=temperature)(batch).logprobs
    torch.testing.assert_close(packed, padded, **CLOSE)


@pytest.mark.parametrize("trained", ["hidden", "hidden and head"])
@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(temperature=0.5),
        LogitTransform(scale=0.3, temperature=2.0),
        LogitTransform(scale=1.7, softcap=3.0, temperature=0.7),
    ],
    ids=["plain", "scaled", "capped"],
)
def test_scale_cap_and_temperature_in_float64(
    transform: LogitTransform, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab_head, "logits_bytes", lambda device: 0)  # 16 tokens at a time
    torch.manual_seed(3)
    head, hidden = nn.Linear(24, 50), (2 * torch.randn(37, 24)).requires_grad_()
    head.requires_grad_(trained != "hidden")
    ids, factors = torch.randint(0, 50, (37,)), torch.randn(37)
    found = score_targets(hidden, head, ids, transform)
    (found.logprobs * factors).sum().backward()

    exact = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    logits = (exact @ weight.T + head.bias.detach().double()) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    expected = torch.log_softmax(logits / transform.temperature, -1).gather(1, ids[:, None])[:, 0]
    (expected * factors.double()).sum().backward()
    torch.testing.assert_close(found.logprobs.double(), expected, **CLOSE)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, **CLOSE)
    if trained != "hidden":
        torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-4)
