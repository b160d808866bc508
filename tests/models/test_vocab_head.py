"""Chunked log-probs and gradients against torch.log_softmax in float64.

float32 products of 24 terms and log-sum-exp over 50 leave relative errors near 1e-6.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documents import PAIRS, gradients, naive_logprobs, random_documents, worst_gradient
from tiny import tiny_model
from torch import nn

from alignkit.data.packing import pack_documents
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.kernels import vocab_head
from alignkit.models.kernels.vocab_head import LogitTransform, logit_transform, score_targets
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.recipe.adapters import LoraSpec

TARGETS, HIDDEN, VOCABULARY = 53, 24, 50
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(softcap=2.0),
    LogitTransform(scale=1.7, softcap=3.0),
]
CHUNKS = [0, 4 * VOCABULARY * 20, 2**24]  # 16 tokens at a time (the least), 20, all


def draw(bias: bool) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    """Hidden states, head, targets, and one factor a target for the gradients."""
    torch.manual_seed(3)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    hidden = 2 * torch.randn(TARGETS, HIDDEN)
    return hidden, head, torch.randint(0, VOCABULARY, (TARGETS,)), torch.randn(TARGETS)


def exact(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, transform: LogitTransform
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, logits and the leaves of the same in float64."""
    leaves = {"hidden": hidden.detach().double().requires_grad_()}
    leaves |= {n: p.detach().double().requires_grad_() for n, p in head.named_parameters()}
    logits = leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0)
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return logprobs, logits, leaves


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        *((bias, what) for bias in (False, True) for what in ("hidden", "hidden and head", "head")),
        (True, "hidden and bias"),
    ],
)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_log_probs_and_gradients(
    transform: LogitTransform,
    bias: bool,
    trained: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocab_head, "logits_bytes", lambda device: chunk)
    hidden, head, targets, factors = draw(bias)
    hidden.requires_grad_("hidden" in trained)
    head.requires_grad_("head" in trained)
    if "bias" in trained:
        head.bias.requires_grad_(True)
    scores = score_targets(hidden, head, targets, transform)
    logprobs, logits, leaves = exact(hidden, head, targets, transform)
    torch.testing.assert_close(scores.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    assert scores.logprobs.dtype == torch.float32
    assert torch.equal(scores.correct, logits.argmax(-1) == targets)
    (scores.logprobs * factors).sum().backward()
    (logprobs * factors.double()).sum().backward()
    for name, leaf in {"hidden": hidden, **dict(head.named_parameters())}.items():
        if not leaf.requires_grad:
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert leaves[name].grad is not None
        torch.testing.assert_close(leaf.grad.double(), leaves[name].grad, rtol=1e-4, atol=1e-5)


def test_gradient_by_finite_differences() -> None:
    # The function computes in float32, so central differences with h = 1e-2 are good to
    # h² f'''/6 + 1e-6/h, some 1e-4; gradients here are of order 1.
    hidden, head, targets, factors = draw(bias=False)
    head.requires_grad_(False)
    hidden.requires_grad_()
    transform = LogitTransform(1.2, 4.0)

    def total(x: torch.Tensor) -> torch.Tensor:
        return (score_targets(x, head, targets, transform).logprobs.double() * factors).sum()

    (gradient,) = torch.autograd.grad(total(hidden), hidden)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        h = 1e-2
        slope = (total(hidden + h * direction) - total(hidden - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-3)
    assert float(slope) > 0.1


def test_uniform_logits_in_closed_form() -> None:
    # A head of zeros gives every token log(1/V), and (onehot - p) W = 0.
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.zero_()
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    scores = score_targets(hidden, head, torch.tensor([0, 1, 2]), LogitTransform())
    torch.testing.assert_close(
        scores.logprobs, torch.full((3,), VOCABULARY, dtype=torch.float32).log().neg()
    )
    assert scores.correct.all()  # all tokens are likeliest
    scores.logprobs.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


def test_large_logits_do_not_overflow() -> None:
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1000.0], [0.0], [-1000.0]]))
    hidden = torch.ones(3, 1, requires_grad=True)
    scores = score_targets(hidden, head, torch.tensor([0, 1, 2]), LogitTransform())
    assert scores.logprobs.tolist() == [0.0, -1000.0, -2000.0]
    assert scores.correct.tolist() == [True, False, False]


def test_equal_weights_on_both_sides_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, _ = draw(bias=True)
    found = []
    for chunk in CHUNKS:
        monkeypatch.setattr(vocab_head, "logits_bytes", {"cpu": chunk}.__getitem__)
        found.append(score_targets(hidden, head, targets, LogitTransform()).logprobs)
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-6)


def test_no_target_at_all() -> None:
    _, head, _, _ = draw(bias=False)
    none = torch.zeros(0, dtype=torch.long)
    scores = score_targets(torch.zeros(0, HIDDEN), head, none, LogitTransform())
    assert scores.logprobs.shape == scores.correct.shape == (0,)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, LogitTransform()),
        ({"final_logit_softcapping": 30.0}, LogitTransform(1.0, 30.0)),
        ({"final_logit_softcapping": None}, LogitTransform()),
        ({"logit_scale": 0.0625}, LogitTransform(0.0625)),
        ({"logits_scaling": 8.0}, LogitTransform(0.125)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, LogitTransform(8.0)),
    ],
    ids=["none", "gemma2", "gemma1", "cohere", "granite", "hyperclovax"],
)
def test_transform_from_the_configuration(config: dict[str, Any], expected: LogitTransform) -> None:
    assert logit_transform(SimpleNamespace(**{"model_type": "x", **config})) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_tied_matrix_gets_the_gradient_of_both_its_uses(family: str) -> None:
    documents = random_documents(PAIRS, 600)
    found = []
    for kind in ("packed", "naive"):
        model = tiny_model(family, tie_word_embeddings=True).requires_grad_(True)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        if kind == "packed":
            logprobs = TokenScorer(model, torch.float32)(pack_documents(documents)).logprobs
        else:
            logprobs = naive_logprobs(model, documents)
        found.append(gradients(model, logprobs))
    assert worst_gradient(found[0], found[1]) < 1e-5
    # Rows of tokens that no prompt or branch holds are moved by the head alone.
    unread = sorted(set(range(600)) - {int(i) for i in pack_documents(documents).input_ids})
    assert found[0]["model.embed_tokens.weight"][unread].abs().min(1).values.max() > 0


def test_an_adapter_on_the_head_is_not_left_out() -> None:
    documents = random_documents(PAIRS, 600)
    model = attach_adapter(tiny_model(), LoraSpec(rank=4, targets=("q_proj", "lm_head")), 0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    packed = TokenScorer(model, torch.float32)(pack_documents(documents)).logprobs
    packed_gradients = gradients(model, packed)
    with torch.no_grad(), model.disable_adapter():
        without = TokenScorer(model, torch.float32)(pack_documents(documents)).logprobs
    model.get_base_model().set_attn_implementation("sdpa")
    naive = naive_logprobs(model, documents)
    torch.testing.assert_close(packed, naive, rtol=1e-5, atol=1e-5)
    assert worst_gradient(packed_gradients, gradients(model, naive)) < 1e-5
    assert any("lm_head" in name for name in packed_gradients)
    assert (packed - without).abs().max() > 1e-2


def test_a_head_that_is_no_plain_linear_layer_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    monkeypatch.setattr(vocab_head, "logits_bytes", lambda device: 0)
    hidden, head, targets, _ = draw(bias=True)
    doubled = Doubled(HIDDEN, VOCABULARY)
    doubled.load_state_dict(head.state_dict())
    found = score_targets(hidden, doubled, targets, LogitTransform(0.5, 3.0))
    expected, logits, _ = exact(hidden, head, targets, LogitTransform(1.0, 3.0))
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.correct, logits.argmax(-1) == targets)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(1.5, softcap=60.0)], ids=str
)
def test_a_narrow_product_is_rounded_near_the_target_only(
    transform: LogitTransform, bias: bool
) -> None:
    """Logits near 40, as models have: bfloat16 alone is up to 0.125 off there."""
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=bias).to(torch.bfloat16)
    hidden = torch.randn(200, 64).bfloat16()
    with torch.no_grad():
        head.weight.add_(0.3 * torch.sign(hidden.mean(0))[None])
        hidden += 10 * torch.sign(hidden.mean(0)) / 8
    targets = (hidden.float() @ head.weight.float().T).topk(3, dim=1).indices[:, 1]
    plain = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)).float()
    assert float(plain.abs().amax()) > 20
    plain = plain * transform.scale
    if transform.softcap is not None:
        plain = transform.softcap * torch.tanh(plain / transform.softcap)
    rounded = torch.log_softmax(plain, -1).gather(1, targets[:, None])[:, 0]
    expected, _, _ = exact(hidden, head, targets, transform)
    found = score_targets(hidden, head, targets, transform).logprobs
    errors = [float((x.double() - expected).square().mean().sqrt()) for x in (found, rounded)]
    assert errors[0] < 0.25 * errors[1]
    assert bool((found <= 0).all())


def test_the_targets_own_logit_is_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(40, 64, generator=generator).bfloat16()
    matrix = torch.randn(300, 64, generator=generator).bfloat16()
    ids = torch.randint(0, 300, (40, 1), generator=generator)
    expected = (hidden.double() @ matrix.double().T).gather(1, ids)
    found = vocab_head._projection(hidden, matrix, ids).gather(1, ids)
    assert float(expected.abs().amax()) > 50
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
