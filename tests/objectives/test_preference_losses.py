"""DPO and its relatives: numbers worked out by hand, the papers' equations, and what they imply.

Notation as in the module: r = ratio, Δ = r_w - r_l.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from alignkit.objectives.bradley_terry import bradley_terry_loss
from alignkit.objectives.preference import (
    PREFERENCE_OBJECTIVES,
    PairLogprobs,
    apo_down_loss,
    apo_zero_loss,
    cdpo_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    mean_rewards,
    nca_loss,
    orpo_loss,
    ratio_rewards,
    robust_loss,
    simpo_loss,
    sppo_loss,
    sum_rewards,
)
from alignkit.recipe.objectives import CustomPairSpec, PreferenceSpec

LN2, LN3, LN1_5 = math.log(2), math.log(3), math.log(1.5)

FIELDS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "ipo": {"tau": 0.3},
    "cdpo": {"beta": 0.3, "label_smoothing": 0.2},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "orpo": {"beta": 0.4},
    "cpo": {"beta": 0.3, "nll_weight": 0.6},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "sppo": {"beta": 0.3},
    "nca": {"beta": 0.3},
}
"""Kind -> values of its fields; also the list of all kinds."""
KINDS = [*FIELDS, "ipo per token"]
WITH_REFERENCE = [kind for kind in KINDS if kind not in ("simpo", "orpo", "cpo")]
OF_THE_DIFFERENCE = ["dpo", "ipo", "cdpo", "robust", "hinge"]
"""Kinds that see Δ only."""


def loss_of(kind: str, pairs: PairLogprobs) -> torch.Tensor:
    if kind == "ipo per token":
        return ipo_loss(pairs, tau=0.3, per_token=True)
    return PREFERENCE_OBJECTIVES[kind].loss(pairs, **FIELDS[kind])


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs_of(
    chosen_ratio: torch.Tensor | float, rejected_ratio: torch.Tensor | float, tokens: float = 5.0
) -> PairLogprobs:
    """Pairs with given ratios, answers of `tokens` tokens and references of -40 and -50."""
    chosen = torch.atleast_1d(torch.as_tensor(chosen_ratio, dtype=torch.float64))
    rejected = torch.atleast_1d(torch.as_tensor(rejected_ratio, dtype=torch.float64))
    lengths = torch.full_like(chosen, tokens)
    first, second = torch.full_like(chosen, -40.0), torch.full_like(chosen, -50.0)
    return PairLogprobs(first + chosen, second + rejected, lengths, lengths, first, second)


def random_pairs(count: int = 50, seed: int = 0) -> PairLogprobs:
    """Answers of 1 to 40 tokens at up to 3 nats each; ratios of up to about ±12 nats."""
    generator = torch.Generator().manual_seed(seed)

    def answers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = torch.randint(1, 41, (count,), generator=generator).double()
        means = -0.05 - 3 * torch.rand(count, generator=generator, dtype=torch.float64)
        ratios = 4 * torch.randn(count, generator=generator, dtype=torch.float64)
        return means * tokens, tokens, means * tokens - ratios

    chosen, chosen_tokens, reference_chosen = answers()
    rejected, rejected_tokens, reference_rejected = answers()
    return PairLogprobs(
        *(chosen, rejected, chosen_tokens, rejected_tokens),
        *(reference_chosen, reference_rejected),
    )


def swapped(pairs: PairLogprobs) -> PairLogprobs:
    return PairLogprobs(
        *(pairs.rejected, pairs.chosen, pairs.rejected_tokens, pairs.chosen_tokens),
        *(pairs.reference_rejected, pairs.reference_chosen),
    )


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# One pair for all kinds. Two tokens of probability 1/2 against four of 1/4:
#   log π(y_w) = -2 ln 2, mean -ln 2;  log π(y_l) = -8 ln 2, mean -2 ln 2.
# The reference is chosen so that r_w = 2 ln 2 and r_l = -2 ln 1.5, Δ = 2 ln 3. With β = 1/2:
#   σ(β r_w) = σ(ln 2) = 2/3;  σ(β r_l) = 1 / (1 + 1.5) = 2/5;  σ(β Δ) = σ(ln 3) = 3/4.
BY_HAND = PairLogprobs(
    double(-2 * LN2),
    double(-8 * LN2),
    double(2.0),
    double(4.0),
    double(-4 * LN2),
    double(-8 * LN2 + 2 * LN1_5),
)


@pytest.mark.parametrize(
    ("loss", "fields", "expected"),
    [
        (dpo_loss, {"beta": 0.5}, math.log(4 / 3)),
        # The margin that is aimed at is 1 / (2 · 0.25) = 2 nats.
        (ipo_loss, {"tau": 0.25}, (2 * LN3 - 2) ** 2),
        # r_w / 2 - r_l / 4 = ln 2 + ln(1.5) / 2.
        (ipo_loss, {"tau": 0.25, "per_token": True}, (LN2 + LN1_5 / 2 - 2) ** 2),
        # 3/4 of the labels are right: -log σ(β Δ) = ln 4/3, -log σ(-β Δ) = ln 4.
        (
            cdpo_loss,
            {"beta": 0.5, "label_smoothing": 0.25},
            0.75 * math.log(4 / 3) + 0.25 * math.log(4),
        ),
        # The same with a minus, over 1 - 2/4.
        (
            robust_loss,
            {"beta": 0.5, "label_smoothing": 0.25},
            (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5,
        ),
        (hinge_loss, {"beta": 0.25}, 1 - LN3 / 2),
        # 2 · (-ln 2 + 2 ln 2) - ln 2 = ln 2.
        (simpo_loss, {"beta": 2.0, "gamma": LN2}, LN1_5),
        # Odds of 1/2 are 1, of 1/4 a third: log ratio ln 3.
        (orpo_loss, {"beta": 0.1}, LN2 + 0.1 * math.log(4 / 3)),
        # (-2 + 8) ln 2 / 6 = ln 2.
        (cpo_loss, {"beta": 1 / 6, "nll_weight": 0.5}, LN1_5 + 0.5 * LN2),
        (apo_zero_loss, {"beta": 0.5}, 1 / 3 + 2 / 5),
        (apo_down_loss, {"beta": 0.5}, 2 / 3 + 1 / 4),
        # The ratios that are aimed at are ±1.
        (sppo_loss, {"beta": 0.5}, (2 * LN2 - 1) ** 2 + (1 - 2 * LN1_5) ** 2),
        # -log 2/3 - ½ log 1/3 - ½ log 3/5.
        (nca_loss, {"beta": 0.5}, LN1_5 + LN3 / 2 + math.log(5 / 3) / 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_closed_form(
    loss: Callable[..., torch.Tensor], fields: dict[str, Any], expected: float
) -> None:
    assert loss(BY_HAND, **fields).tolist() == pytest.approx([expected], rel=1e-12)


# TRL 1.16's DPOTrainer by the name of its loss_type, label_smoothing 0.1: β = 0.1, r_w = 2 over 4
# tokens, r_l = -3 over 6 tokens, so β r_w = 0.2, β r_l = -0.3, β Δ = 0.5.
TRL = {
    "sigmoid": (dpo_loss, {"beta": 0.1}, 0.474076984),  # ln(1 + e^-0.5)
    "hinge": (hinge_loss, {"beta": 0.1}, 0.5),
    "ipo": (ipo_loss, {"tau": 0.1, "per_token": True}, 16.0),  # (2/4 + 3/6 - 5)²
    # (0.9 · 0.474076984 - 0.1 · 0.974076984) / 0.8
    "robust": (robust_loss, {"beta": 0.1, "label_smoothing": 0.1}, 0.411576984),
    # 0.598138869 + ½ · 0.798138869 + ½ · 0.554355244
    "nca_pair": (nca_loss, {"beta": 0.1}, 1.274385926),
    "sppo_hard": (sppo_loss, {"beta": 0.1}, 13.0),  # (2 - 5)² + (-3 + 5)²
    "apo_zero": (apo_zero_loss, {"beta": 0.1}, 0.875723485),  # 0.450166003 + 0.425557483
    "apo_down": (apo_down_loss, {"beta": 0.1}, 0.927374666),  # 0.549833997 + 0.377540669
}


@pytest.mark.parametrize("name", TRL)
def test_the_number_of_trl(name: str) -> None:
    loss, fields, expected = TRL[name]
    pairs = dataclasses.replace(
        pairs_of(2.0, -3.0), chosen_tokens=double(4.0), rejected_tokens=double(6.0)
    )
    assert loss(pairs, **fields).tolist() == pytest.approx([expected], abs=2e-9)


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@dataclasses.dataclass
class Answers:
    """One pair as plain numbers: log-probs, tokens and log-probs of the reference."""

    w: float
    l: float  # noqa: E741
    w_tokens: float
    l_tokens: float
    w_ref: float
    l_ref: float


def dpo_equation(a: Answers, beta: float) -> float:
    return -math.log(sigma(beta * (a.w - a.w_ref) - beta * (a.l - a.l_ref)))


def reversed_dpo(a: Answers, beta: float) -> float:
    return dpo_equation(Answers(a.l, a.w, a.l_tokens, a.w_tokens, a.l_ref, a.w_ref), beta)


def ipo_equation(a: Answers, tau: float) -> float:
    h = (a.w + a.l_ref) - (a.l + a.w_ref)  # log π(y_w) π_ref(y_l) / (π(y_l) π_ref(y_w))
    return (h - 1 / tau / 2) ** 2


def ipo_per_token(a: Answers) -> float:
    h = (a.w - a.w_ref) / a.w_tokens - (a.l - a.l_ref) / a.l_tokens
    return (h - 1 / 0.3 / 2) ** 2


def cdpo_equation(a: Answers, beta: float, label_smoothing: float) -> float:
    e = label_smoothing
    return (1 - e) * dpo_equation(a, beta) + e * reversed_dpo(a, beta)


def robust_equation(a: Answers, beta: float, label_smoothing: float) -> float:
    e = label_smoothing
    return ((1 - e) * dpo_equation(a, beta) - e * reversed_dpo(a, beta)) / (1 - 2 * e)


def hinge_equation(a: Answers, beta: float) -> float:
    return max(0.0, 1 - (beta * (a.w - a.w_ref) - beta * (a.l - a.l_ref)))


def simpo_equation(a: Answers, beta: float, gamma: float) -> float:
    return -math.log(sigma(beta / a.w_tokens * a.w - beta / a.l_tokens * a.l - gamma))


def orpo_equation(a: Answers, beta: float) -> float:
    def odds(logprob: float, tokens: float) -> float:
        probability = math.exp(logprob / tokens)
        return probability / (1 - probability)

    ratio = odds(a.w, a.w_tokens) / odds(a.l, a.l_tokens)
    return -a.w / a.w_tokens - beta * math.log(sigma(math.log(ratio)))


def cpo_equation(a: Answers, beta: float, nll_weight: float) -> float:
    return -math.log(sigma(beta * a.w - beta * a.l)) - nll_weight * a.w / a.w_tokens


def apo_zero_equation(a: Answers, beta: float) -> float:
    return 1 - sigma(beta * (a.w - a.w_ref)) + sigma(beta * (a.l - a.l_ref))


def apo_down_equation(a: Answers, beta: float) -> float:
    r_w, r_l = beta * (a.w - a.w_ref), beta * (a.l - a.l_ref)
    return sigma(r_w) + 1 - sigma(r_w - r_l)


def sppo_equation(a: Answers, beta: float) -> float:
    eta, found = 1 / beta, 0.0
    for policy, reference, wins in ((a.w, a.w_ref, 1.0), (a.l, a.l_ref, 0.0)):
        found += (policy - reference - eta * (wins - 0.5)) ** 2
    return found


def nca_equation(a: Answers, beta: float) -> float:
    r_w, r_l = beta * (a.w - a.w_ref), beta * (a.l - a.l_ref)
    return -math.log(sigma(r_w)) - sum(math.log(sigma(-r)) for r in (r_w, r_l)) / 2


EQUATIONS: dict[str, Callable[..., float]] = {
    "dpo": dpo_equation,
    "ipo": ipo_equation,
    "cdpo": cdpo_equation,
    "robust": robust_equation,
    "hinge": hinge_equation,
    "simpo": simpo_equation,
    "orpo": orpo_equation,
    "cpo": cpo_equation,
    "apo_zero": apo_zero_equation,
    "apo_down": apo_down_equation,
    "sppo": sppo_equation,
    "nca": nca_equation,
    "ipo per token": ipo_per_token,
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_papers_equation_pair_by_pair(kind: str) -> None:
    pairs = random_pairs()
    columns = [getattr(pairs, field.name).tolist() for field in dataclasses.fields(pairs)]
    expected = [
        EQUATIONS[kind](Answers(*row), **FIELDS.get(kind, {})) for row in zip(*columns, strict=True)
    ]
    assert loss_of(kind, pairs).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_float32(kind: str) -> None:
    pairs = random_pairs()
    single = PairLogprobs(
        *(getattr(pairs, field.name).float() for field in dataclasses.fields(pairs))
    )
    found = loss_of(kind, single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss_of(kind, pairs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    pairs = random_pairs(8)
    policy = (pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_())

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss_of(kind, dataclasses.replace(pairs, chosen=chosen, rejected=rejected))

    assert torch.autograd.gradcheck(loss, policy)
    loss(*policy).sum().backward()
    assert pairs.chosen.grad is not None
    assert float(pairs.chosen.grad.abs().max()) > 0
    for reference in (pairs.reference_chosen, pairs.reference_rejected):
        assert reference is not None
        assert not reference.requires_grad
        assert reference.grad is None
    assert not loss(pairs.chosen.detach(), pairs.rejected.detach()).requires_grad


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_only_ratios_count(kind: str) -> None:
    # The same constant on policy and reference changes nothing, so their gradients cancel.
    pairs = random_pairs(8)
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    moved = dataclasses.replace(
        pairs,
        chosen=pairs.chosen - 3,
        reference_chosen=pairs.reference_chosen - 3,
        rejected=pairs.rejected - 11,
        reference_rejected=pairs.reference_rejected - 11,
    )
    close(loss_of(kind, moved), loss_of(kind, pairs))
    sides = (pairs.chosen, pairs.reference_chosen, pairs.rejected, pairs.reference_rejected)
    for side in sides:
        side.requires_grad_()
    w, w_ref, low, l_ref = torch.autograd.grad(loss_of(kind, pairs).sum(), sides)
    close(w_ref, -w)
    close(l_ref, -low)


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_kinds_with_a_reference_use_it(kind: str) -> None:
    pairs = random_pairs()
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    without = dataclasses.replace(pairs, reference_chosen=None, reference_rejected=None)
    with pytest.raises(AssertionError):
        loss_of(kind, without)
    before = loss_of(kind, pairs)
    for field in ("reference_chosen", "reference_rejected"):
        moved = dataclasses.replace(pairs, **{field: getattr(pairs, field) - 1})
        # A hinge that is satisfied by more than the change stays at zero.
        changed = (loss_of(kind, moved) - before).abs() > 1e-6
        assert bool((changed | (before == 0)).all())
        assert int(changed.sum()) > 20


@pytest.mark.parametrize("kind", ["simpo", "orpo", "cpo"])
def test_kinds_without_a_reference_ignore_it(kind: str) -> None:
    pairs = random_pairs()
    none = dataclasses.replace(pairs, reference_chosen=None, reference_rejected=None)
    broken = torch.full_like(pairs.chosen, math.nan)
    other = dataclasses.replace(pairs, reference_chosen=broken, reference_rejected=broken)
    expected = loss_of(kind, pairs)
    assert bool(torch.isfinite(expected).all())
    assert loss_of(kind, none).tolist() == loss_of(kind, other).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", OF_THE_DIFFERENCE)
def test_only_the_difference_of_the_ratios_counts(kind: str) -> None:
    pairs = random_pairs()
    moved = dataclasses.replace(pairs, chosen=pairs.chosen - 2, rejected=pairs.rejected - 2)
    close(loss_of(kind, moved), loss_of(kind, pairs))


@pytest.mark.parametrize("kind", ["apo_zero", "apo_down", "sppo", "nca"])
def test_other_kinds_see_each_ratio(kind: str) -> None:
    pairs = random_pairs()
    moved = dataclasses.replace(pairs, chosen=pairs.chosen - 2, rejected=pairs.rejected - 2)
    assert float((loss_of(kind, moved) - loss_of(kind, pairs)).abs().median()) > 1e-3


# Value, and slopes with respect to log π(y_w) and log π(y_l), where policy and reference agree.
# σ(0) = ½, the slope of -log σ is -½ and that of σ is ¼ there; all are in units of β.
AT_EQUALITY = {
    "dpo": (LN2, -0.5, 0.5),
    "cdpo": (LN2, -0.5 * 0.6, 0.5 * 0.6),  # 1 - 2 ε = 0.6
    "robust": (LN2, -0.5 / 0.6, 0.5 / 0.6),
    "hinge": (1.0, -1.0, 1.0),
    "apo_zero": (1.0, -0.25, 0.25),
    "apo_down": (1.0, 0.0, 0.25),  # only the rejected answer moves at first
    "nca": (2 * LN2, -0.25, 0.25),  # chosen: -½ + ½ · ½
}


@pytest.mark.parametrize("kind", AT_EQUALITY)
def test_where_policy_and_reference_agree(kind: str) -> None:
    value, of_chosen, of_rejected = AT_EQUALITY[kind]
    beta = FIELDS[kind]["beta"]
    pairs = pairs_of(0.0, 0.0)
    policy = (pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_())
    loss = loss_of(kind, pairs)
    assert loss.tolist() == pytest.approx([value], rel=1e-12)
    found = torch.autograd.grad(loss.sum(), policy)
    assert found[0].tolist() == pytest.approx([beta * of_chosen], rel=1e-12, abs=1e-15)
    assert found[1].tolist() == pytest.approx([beta * of_rejected], rel=1e-12)


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "hinge", "apo_zero", "simpo", "orpo", "cpo"])
def test_better_margins_cost_less(kind: str) -> None:
    # cdpo turns only beyond log(0.8 / 0.2) / 0.3 = 4.6 nats.
    pairs = random_pairs(8)
    level = pairs_of(torch.linspace(-1, 1, 8), torch.linspace(1, -0.5, 8))
    pairs = level if kind in WITH_REFERENCE else pairs
    policy = (pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_())
    of_chosen, of_rejected = torch.autograd.grad(loss_of(kind, pairs).sum(), policy)
    assert bool((of_chosen < 0).all())
    assert bool((of_rejected > 0).all())


def test_ipo_is_least_at_its_margin() -> None:
    tau = 0.2  # 2.5 nats
    found = ipo_loss(pairs_of(double(1.5, 1.4, 1.6), -1.0), tau=tau)
    assert found.tolist() == pytest.approx([0.0, 0.01, 0.01], abs=1e-12)
    # Per token the ratios count a fifth: 5 · 1.5 and 5 · -1 are the aim then.
    found = ipo_loss(pairs_of(double(7.5, 7.0), -5.0, tokens=5.0), tau=tau, per_token=True)
    assert found.tolist() == pytest.approx([0.0, 0.01], abs=1e-12)


def test_ipo_per_token_is_the_plain_one_for_single_tokens() -> None:
    pairs = random_pairs()
    ones = torch.ones_like(pairs.chosen)
    pairs = dataclasses.replace(pairs, chosen_tokens=ones, rejected_tokens=ones)
    close(ipo_loss(pairs, tau=0.3, per_token=True), ipo_loss(pairs, tau=0.3))


@pytest.mark.parametrize("loss", [cdpo_loss, robust_loss])
def test_labels_that_are_never_wrong_are_dpo(loss: Callable[..., torch.Tensor]) -> None:
    pairs = random_pairs()
    close(loss(pairs, beta=0.3, label_smoothing=0.0), dpo_loss(pairs, beta=0.3))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_cdpo_is_least_where_it_is_as_sure_as_its_labels(rate: float) -> None:
    # σ(β Δ) = 1 - ε at Δ = log((1 - ε) / ε) / β; what remains is the entropy of the labels.
    best = math.log((1 - rate) / rate) / 0.3
    ratios = double(best, best - 0.5, best + 0.5).requires_grad_()
    found = cdpo_loss(pairs_of(ratios, 0.0), beta=0.3, label_smoothing=rate)
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert found.tolist()[0] == pytest.approx(entropy, rel=1e-9)
    (slopes,) = torch.autograd.grad(found.sum(), ratios)
    assert slopes.tolist()[0] == pytest.approx(0.0, abs=1e-9)
    assert slopes.tolist()[1] < -1e-4
    assert slopes.tolist()[2] > 1e-4


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45])
def test_robust_is_unbiased_under_labels_that_flip(rate: float) -> None:
    # E over the flip: (1 - ε) robust(w, l) + ε robust(l, w) = dpo(w, l).
    pairs = random_pairs()
    fields = {"beta": 0.3, "label_smoothing": rate}
    right, wrong = robust_loss(pairs, **fields), robust_loss(swapped(pairs), **fields)
    torch.testing.assert_close(
        (1 - rate) * right + rate * wrong, dpo_loss(pairs, beta=0.3), rtol=1e-9, atol=1e-9
    )
    assert float(right.min()) < 0  # which a loss of a single clean label never is


def test_hinge_is_zero_from_its_margin_on() -> None:
    # 1 / β = 4 nats.
    found = hinge_loss(pairs_of(double(3.0, 4.0, 5.0, 100.0, -4.0), 0.0), beta=0.25)
    assert found.tolist() == pytest.approx([0.25, 0.0, 0.0, 0.0, 2.0], abs=1e-12)
    ratios = double(5.0, 3.0).requires_grad_()
    loss = hinge_loss(pairs_of(ratios, 0.0), beta=0.25).sum()
    (slopes,) = torch.autograd.grad(loss, ratios)
    assert slopes.tolist() == [0.0, -0.25]


def test_sppo_is_least_at_plus_and_minus_its_goal() -> None:
    # 1 / (2 · 0.1) = 5 nats up and 5 down.
    found = sppo_loss(pairs_of(double(5.0, 5.5, 5.0), double(-5.0, -5.0, -5.5)), beta=0.1)
    assert found.tolist() == pytest.approx([0.0, 0.25, 0.25], abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        # Least and greatest of APO-zero: the ratios far apart, either way round.
        (apo_zero_loss, (1e4, -1e4), (-1e4, 1e4)),
        # Of APO-down: both far down, the rejected one further; both far up, likewise.
        (apo_down_loss, (-1e4, 1e4), (-3e4, 3e4)),
    ],
)
def test_apo_runs_from_0_to_2(
    loss: Callable[..., torch.Tensor], chosen: tuple[float, float], rejected: tuple[float, float]
) -> None:
    found = loss(pairs_of(double(*chosen), double(*rejected)), beta=0.1)
    assert found.tolist() == pytest.approx([0.0, 2.0], abs=1e-12)
    found = loss(random_pairs(200), beta=2.0)
    assert 0 <= float(found.min()) < 0.1
    assert 1.9 < float(found.max()) <= 2


def test_nca_keeps_the_chosen_answer_from_running_away() -> None:
    # In r_w alone the loss is -log σ(r) - ½ log σ(-r): least at σ(r) = 2/3, r = ln 2.
    ratios = double(LN2, -1.0, 2.0).requires_grad_()
    loss = nca_loss(pairs_of(ratios, 0.0), beta=1.0).sum()
    (slopes,) = torch.autograd.grad(loss, ratios)
    assert slopes.tolist()[0] == pytest.approx(0.0, abs=1e-12)
    assert slopes.tolist()[1] < -0.1
    assert slopes.tolist()[2] > 0.1


def log_odds(mean: float) -> float:
    """log p - log(1 - p) of log p, without cancellation near 0 and far below it."""
    if mean > -LN2:
        return mean - math.log(-math.expm1(mean))
    return mean - math.log1p(-math.exp(mean))


# What swapping the answers adds to the loss, since -log σ(-x) = -log σ(x) + x.
SWAPPING: dict[str, Callable[[PairLogprobs], torch.Tensor]] = {
    "dpo": lambda p: 0.3 * (p.chosen_ratio - p.rejected_ratio),
    # (Δ + g)² - (Δ - g)² = 4 Δ g with g = 1 / (2 τ).
    "ipo": lambda p: 2 * (p.chosen_ratio - p.rejected_ratio) / 0.3,
    "cdpo": lambda p: 0.6 * 0.3 * (p.chosen_ratio - p.rejected_ratio),
    "robust": lambda p: 0.3 * (p.chosen_ratio - p.rejected_ratio) / 0.6,
    "cpo": lambda p: 0.3 * (p.chosen - p.rejected) + 0.6 * (p.chosen_mean - p.rejected_mean),
    "orpo": lambda p: (
        p.chosen_mean
        - p.rejected_mean
        + 0.4
        * double(
            *(
                log_odds(w) - log_odds(low)
                for w, low in zip(p.chosen_mean.tolist(), p.rejected_mean.tolist(), strict=True)
            )
        )
    ),
    "sppo": lambda p: 2 * (p.chosen_ratio - p.rejected_ratio) / 0.3,
    # The halves are the same both ways.
    "nca": lambda p: (
        torch.nn.functional.softplus(-0.3 * p.rejected_ratio)
        - torch.nn.functional.softplus(-0.3 * p.chosen_ratio)
    ),
    # 1 - σ(r_w) + σ(r_l) and 1 - σ(r_l) + σ(r_w) add up to 2.
    "apo_zero": lambda p: 2 - 2 * apo_zero_loss(p, beta=0.3),
}


@pytest.mark.parametrize("kind", SWAPPING)
def test_swapping_the_answers(kind: str) -> None:
    pairs = random_pairs()
    difference = loss_of(kind, swapped(pairs)) - loss_of(kind, pairs)
    torch.testing.assert_close(difference, SWAPPING[kind](pairs), rtol=1e-8, atol=1e-8)


def test_swapping_in_kinds_that_are_not_symmetric() -> None:
    pairs = random_pairs()
    # Hinge: at Δ and -Δ together 1 + |β Δ| beyond the margin, 2 within it.
    both = hinge_loss(pairs, beta=0.3) + hinge_loss(swapped(pairs), beta=0.3)
    size = 0.3 * (pairs.chosen_ratio - pairs.rejected_ratio).abs()
    close(both, torch.maximum(1 + size, torch.full_like(size, 2.0)))
    # SimPO: its margin changes sign too.
    difference = 2.0 * (pairs.chosen_mean - pairs.rejected_mean) + 0.7
    expected = simpo_loss(pairs, beta=2.0, gamma=-0.7) + difference
    close(simpo_loss(swapped(pairs), beta=2.0, gamma=0.7), expected)
    # APO-down: the anchored part turns, σ(r_w) and σ(r_l) stand apart from it and add up.
    both = apo_down_loss(pairs, beta=0.3) + apo_down_loss(swapped(pairs), beta=0.3)
    anchored = (0.3 * pairs.chosen_ratio).sigmoid() + (0.3 * pairs.rejected_ratio).sigmoid()
    close(both, 1 + anchored)


MEANS = [-1e-6, -2e-6, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -20.0, -50.0]


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_orpo_is_stable_for_sure_and_for_unlikely_answers(
    dtype: torch.dtype, relative: float
) -> None:
    # Slopes: d log odds / d mean = 1 / (1 - exp(mean)), a million near certainty.
    couples = [(w, low) for w in MEANS for low in MEANS]
    chosen, rejected = torch.tensor(couples, dtype=torch.float64).T.to(dtype)
    ones = torch.ones_like(chosen)
    leaves = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
    loss = orpo_loss(PairLogprobs(*leaves, ones, ones), beta=1.0)
    slopes = torch.autograd.grad(loss.sum(), leaves)
    expected, of_chosen, of_rejected = [], [], []
    for w, low in zip(chosen.double().tolist(), rejected.double().tolist(), strict=True):
        odds = log_odds(w) - log_odds(low)
        expected.append(-w + max(-odds, 0.0) + math.log1p(math.exp(-abs(odds))))
        of_chosen.append(-1 + sigma(-odds) / math.expm1(w))
        of_rejected.append(-sigma(-odds) / math.expm1(low))
    assert loss.tolist() == pytest.approx(expected, rel=relative, abs=1e-30)
    assert slopes[0].tolist() == pytest.approx(of_chosen, rel=10 * relative, abs=1e-12)
    assert slopes[1].tolist() == pytest.approx(of_rejected, rel=10 * relative, abs=1e-12)


def test_orpo_stays_finite_for_certain_answers() -> None:
    chosen = torch.tensor([0.0, 0.0, -1.0, -1e-12, -300.0], requires_grad=True)
    rejected = torch.tensor([0.0, -1.0, 0.0, -1e-12, -300.0], requires_grad=True)
    ones = torch.ones(5)
    loss = orpo_loss(PairLogprobs(chosen, rejected, ones, ones), beta=0.1)
    assert bool(torch.isfinite(loss).all())
    for slopes in torch.autograd.grad(loss.sum(), (chosen, rejected)):
        assert bool(torch.isfinite(slopes).all())


@pytest.mark.parametrize("kind", KINDS)
def test_long_answers_far_from_the_reference_stay_finite_in_float32(kind: str) -> None:
    ratios = torch.tensor([3000.0, -3000.0])
    tokens = torch.tensor([500.0, 500.0])
    reference = torch.tensor([-4000.0, -4000.0])
    chosen = (reference + ratios).requires_grad_()
    rejected = (reference - ratios).requires_grad_()
    loss = loss_of(kind, PairLogprobs(chosen, rejected, tokens, tokens, reference, reference))
    assert bool(torch.isfinite(loss).all())
    for slopes in torch.autograd.grad(loss.sum(), (chosen, rejected)):
        assert bool(torch.isfinite(slopes).all())


def test_rewards_by_hand() -> None:
    found = ratio_rewards(BY_HAND, 0.5)
    assert [value.item() for value in found] == pytest.approx([LN2, -LN1_5])
    found = mean_rewards(BY_HAND, 2.0)
    assert [value.item() for value in found] == pytest.approx([-2 * LN2, -4 * LN2])
    found = sum_rewards(BY_HAND, 0.25)
    assert [value.item() for value in found] == pytest.approx([-LN2 / 2, -2 * LN2])


@pytest.mark.parametrize(
    ("kind", "fields", "margin"),
    [
        ("dpo", {"beta": 0.3}, 0.0),
        ("simpo", {"beta": 2.0, "gamma": 0.7}, 0.7),
        ("cpo", {"beta": 0.3, "nll_weight": 0.0}, 0.0),
    ],
)
def test_a_logistic_kind_is_bradley_terry_over_its_rewards(
    kind: str, fields: dict[str, float], margin: float
) -> None:
    pairs, objective = random_pairs(), PREFERENCE_OBJECTIVES[kind]
    chosen, rejected = objective.rewards(pairs, fields["beta"])
    margins = torch.full_like(chosen, margin)
    close(
        objective.loss(pairs, **fields), bradley_terry_loss(chosen, rejected, margins, center=0.0)
    )


def test_the_table_and_the_recipe_know_the_same_kinds() -> None:
    members = get_args(get_args(PreferenceSpec)[0])
    specs = {
        get_args(spec.model_fields["kind"].annotation)[0]: spec
        for spec in members
        if spec is not CustomPairSpec
    }
    assert set(specs) == set(PREFERENCE_OBJECTIVES) == set(FIELDS)
    for kind, spec in specs.items():
        arguments = set(inspect.signature(PREFERENCE_OBJECTIVES[kind].loss).parameters)
        assert arguments - {"pairs"} == set(spec.model_fields) - {"kind"}, kind
    free = {kind for kind, spec in specs.items() if not spec.needs_reference}
    assert free == {"simpo", "orpo", "cpo"}
