"""The parts of a PPO step that need no model: minibatches, rows, health, guard, intervals."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents
from alignkit.data.prompts import Prompt
from alignkit.errors import TrainingError
from alignkit.evaluation.intervals import mean_interval
from alignkit.generation.sampled import SampledResponse
from alignkit.recipe.rollouts import GuardSpec
from alignkit.runtime.processes import SINGLE, ProcessGroup
from alignkit.stages.ppo.update import Batch
from alignkit.stages.rollouts.guard import Guard
from alignkit.stages.rollouts.health import BANDS, Health, distinct_pairs
from alignkit.stages.rollouts.passes import group_rollouts, split_minibatches, sum_gradients
from alignkit.stages.rollouts.sampling import Rollout, response_rows, sample
from alignkit.stages.rollouts.scoring import Scored


def rollout(prompt: int, *lengths: int, row: int = 0) -> Rollout:
    """A prompt of some tokens with responses of some tokens."""
    ids = np.arange(prompt, dtype=np.int32)
    own = tuple(
        SampledResponse(np.arange(n) + 100 * (i + 1), np.zeros(n, np.float32), "stop", 1.0)
        for i, n in enumerate(lengths)
    )
    branches = tuple(Branch(c.ids.astype(np.int32), np.ones(len(c.ids), bool)) for c in own)
    document = Document(ids, branches, row)
    return Rollout(Prompt(ids, "", None, {}, "a:1"), document, own, ("",) * len(own))


# Minibatches and passes


@pytest.mark.parametrize(("count", "minibatches"), [(12, 3), (13, 4), (5, 5), (2, 4), (0, 2)])
def test_minibatches_cover_every_rollout_once(count: int, minibatches: int) -> None:
    parts = split_minibatches(count, minibatches, (0, 1, 2), SINGLE)
    assert len(parts) == minibatches
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


def test_minibatches_follow_their_seed() -> None:
    one = split_minibatches(16, 2, (0, 1, 2), SINGLE)
    assert one == split_minibatches(16, 2, (0, 1, 2), SINGLE)
    assert one != split_minibatches(16, 2, (0, 1, 3), SINGLE)
    assert one[0] != list(range(8))  # not the data's own order
    assert split_minibatches(5, 1, (0,), SINGLE) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_minibatches_are_the_same_prompts_over_any_number_of_processes(minibatches: int) -> None:
    whole = split_minibatches(7, minibatches, (3, 1), SINGLE)
    for world in (2, 3):
        shares = [
            split_minibatches(7, minibatches, (3, 1), ProcessGroup(rank, world))
            for rank in range(world)
        ]
        for number, part in enumerate(whole):
            # The local rollout i of a process is the step's prompt i * world + rank.
            found = [i * world + rank for rank in range(world) for i in shares[rank][number]]
            assert sorted(found) == part


def test_groups_keep_to_the_budget_and_speak_of_rollouts() -> None:
    # Tokens: a prompt is read once for all its responses.
    rollouts = [rollout(4, 3, 3), rollout(2, 8), rollout(5, 1), rollout(30, 2), rollout(1, 1)]
    sizes = [10, 10, 6, 32, 2]
    assert [r.document.num_tokens for r in rollouts] == sizes
    for budget in (12, 16, 100):
        for chosen in ([0, 1, 2, 3, 4], [1, 3, 4], []):
            groups = group_rollouts(rollouts, chosen, budget)
            assert sorted(i for group in groups for i in group) == chosen
            for group in groups:
                assert len(group) == 1 or sum(sizes[i] for i in group) <= budget
    assert group_rollouts(rollouts, [3, 4], 12) == [[3], [4]]  # too long: alone


def test_rows_of_the_responses_of_each_rollout() -> None:
    rows = response_rows([rollout(1, 2, 3), rollout(1, 4), rollout(1, 5, 6, 7)])
    assert [r.tolist() for r in rows] == [[0, 1], [2], [3, 4, 5]]
    assert [r.tolist() for r in response_rows([rollout(1, 2)])] == [[0]]


def test_flat_values_are_in_the_order_of_the_packed_targets() -> None:
    # The matrix holds the token id at each response token: picked for a group of rollouts, the ids
    # must be those that the packed batch of this group predicts.
    rollouts = [rollout(3, 2, 4), rollout(2, 1), rollout(5, 3, 2)]
    own = [c.ids for r in rollouts for c in r.sampled]
    mask = torch.arange(4) < torch.tensor([len(ids) for ids in own])[:, None]
    matrix = torch.full(mask.shape, -1.0)
    for row, ids in enumerate(own):
        matrix[row, : len(ids)] = torch.from_numpy(ids + 1000 * row).float()
    batch = Batch(rollouts, Scored(matrix, matrix, matrix, mask), matrix, matrix, mask)
    rows = response_rows(rollouts)
    for group in ([0, 1, 2], [2, 0], [1]):
        picked = np.concatenate([rows[i] for i in group])
        found = batch.flat(matrix, picked).numpy()
        packed = pack_documents([rollouts[i].document for i in group])
        owners = picked[packed.target_sequences]
        assert found.tolist() == (packed.target_ids + 1000 * owners).tolist()


def test_sampling_asks_for_each_response_with_its_own_seed() -> None:
    asked: list[Any] = []

    class Engine:
        def generate(self, prompts: Any, seeds: Any) -> list[SampledResponse]:
            asked.extend(zip([p.tolist() for p in prompts], seeds, strict=True))
            places = range(len(prompts))
            return [SampledResponse(np.array([i, 9]), np.zeros(2), "stop", 0.0) for i in places]

    class Tokenizer:
        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return f" {ids[0]} "

    class Prompts:
        prompts = tuple(Prompt(np.full(i + 1, i), "", None, {}, "") for i in range(4))

    found = sample(Prompts(), [3, 1], Engine(), Tokenizer(), samples=2, seed=(7, 11))  # type: ignore[arg-type]
    assert asked == [
        ([3, 3, 3, 3], (7, 11, 3, 0)),
        ([3, 3, 3, 3], (7, 11, 3, 1)),
        ([1, 1], (7, 11, 1, 0)),
        ([1, 1], (7, 11, 1, 1)),
    ]
    assert [r.texts for r in found] == [("0", "1"), ("2", "3")]
    assert [r.document.row for r in found] == [3, 1]
    assert [[b.ids.tolist() for b in r.document.branches] for r in found] == [
        [[0, 9], [1, 9]],
        [[2, 9], [3, 9]],
    ]
    assert all(b.trained.all() for r in found for b in r.document.branches)


def test_gradients_of_several_processes_add_up() -> None:
    class Twice:
        world = 2

        def reduce(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * values  # the other process found the same

    weights = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    weights[0].grad = torch.arange(6.0).view(2, 3)
    sum_gradients(weights, Twice())  # type: ignore[arg-type]
    assert weights[0].grad.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert weights[1].grad is not None
    assert weights[1].grad.tolist() == [0, 0, 0, 0]  # the other one may have some


# Health

HEALTHY = {
    "kl/k1": 3.0,
    "clip_fraction": 0.1,
    "clip_ratio/region_mean": 0.1,
    "frac_reward_zero_std": 0.3,
    "unscored": 0.0,
    "explained_variance": 0.5,
    "response_length": 40.0,
    "eos_rate": 0.9,
    "reward_std": 0.7,
    "distinct_2": 0.8,
    "entropy": 1.5,
}


def test_nothing_is_reported_about_a_healthy_run() -> None:
    assert set(HEALTHY) == {band.metric for band in BANDS}
    health = Health()
    assert [health.look(HEALTHY) for _ in range(8)] == [[]] * 8
    assert "(!)" not in health.summary(HEALTHY)
    assert health.summary(HEALTHY).startswith("KL of a response 3, clip fraction 0.1, ")


@pytest.mark.parametrize(
    ("metric", "value", "patience", "start", "advice"),
    [
        ("kl/k1", 25.0, 1, "KL of a response 25 is above the usual 20: ", "raise objective.kl_"),
        ("kl/k1", -1.0, 1, "KL of a response -1 is below the usual -0.5: ", "temperature"),
        ("clip_fraction", 0.4, 2, "clip fraction 0.4 is above the usual 0.3: ", "learning_rate"),
        ("frac_reward_zero_std", 0.9, 3, "groups that earn all the same 0.9 is ab", "resample"),
        ("unscored", 0.5, 2, "responses without a reward 0.5 is above the usual 0.2", "failures"),
        ("explained_variance", -2.0, 5, "explained variance -2 is below the usual 0: ", "value."),
        ("response_length", 1.0, 2, "response length 1 is below the usual 2: ", "longer"),
        ("eos_rate", 0.0, 5, "share of finished responses 0 is below the usual 0.05", "max_new"),
        ("reward_std", 0.0, 2, "spread of the rewards 0 is below the usual 1e-06: ", "the same"),
        ("distinct_2", 0.1, 2, "distinct word pairs 0.1 is below the usual 0.2: ", "repeat"),
        ("entropy", 0.01, 2, "entropy of a token 0.01 is below the usual 0.1: ", "exploring"),
    ],
)
def test_a_metric_outside_its_band_is_reported_once_after_its_patience(
    metric: str, value: float, patience: int, start: str, advice: str
) -> None:
    health, ill = Health(), {**HEALTHY, metric: value}
    said = [health.look(ill) for _ in range(patience + 3)]
    assert [len(lines) for lines in said] == [0] * (patience - 1) + [1] + [0] * 3
    (line,) = said[patience - 1]
    assert line.startswith(start)
    assert advice in line
    (back,) = health.look(HEALTHY)
    assert back.endswith("is back in its usual range")
    assert health.look(HEALTHY) == []
    assert len([health.look(ill) for _ in range(patience)][-1]) == 1  # and anew
    summary = health.summary(ill).split(", ")
    assert [part for part in summary if part.endswith("(!)")] == [
        f"{start.partition(' is ')[0]} (!)"
    ]


def test_a_step_inside_the_band_starts_the_patience_anew() -> None:
    health, ill = Health(), {**HEALTHY, "clip_fraction": 0.5}
    assert [health.look(metrics) for metrics in (ill, HEALTHY, ill, HEALTHY)] == [[]] * 4
    assert health.look(ill) == []
    assert len(health.look(ill)) == 1


def test_the_ends_of_a_band_belong_to_it() -> None:
    health = Health()
    for band in BANDS:
        for end in (band.low, band.high):
            if end is not None:
                for _ in range(6):
                    assert health.look({**HEALTHY, band.metric: end}) == []


def test_an_unknown_value_reports_nothing_and_resets_nothing() -> None:
    health = Health()
    assert health.look({}) == []
    assert health.summary({}) == ""
    ill, unknown = {"explained_variance": -1.0}, {"explained_variance": math.nan}
    for _ in range(4):
        assert health.look(ill) == []
    assert health.look(unknown) == []
    assert len(health.look(ill)) == 1
    assert health.look(unknown) == []  # neither back, nor worse
    assert health.look({}) == []
    assert len(health.look({"explained_variance": 0.1})) == 1


def test_distinct_pairs_by_hand() -> None:
    # "a b", "b a", "a b" and "c d": three of four differ. Single words have no pairs.
    assert distinct_pairs(["a b a b", "c d"]) == 0.75
    assert distinct_pairs(["a b", "a b", "a  b\n", "a b"]) == 0.25  # over all texts together
    assert distinct_pairs(["one two three four"]) == 1.0
    assert distinct_pairs(["a b", "b a"]) == 1.0  # in their order, and not across texts
    assert math.isnan(distinct_pairs(["", "word"]))
    assert math.isnan(distinct_pairs([]))


# Guard


@pytest.mark.parametrize(
    ("action", "max_kl", "kl", "stops"),
    [
        ("stop", 10.0, [10.5], True),
        ("stop", 10.0, [10.0], False),  # above, not at
        ("stop", 10.0, [], False),  # before the first step
        ("stop", 10.0, [50.0, 3.0], False),  # the last step counts
        ("stop", 10.0, [-50.0], False),
        ("stop", None, [1e9], False),
        ("raise_kl", 10.0, [10.5], False),  # acts in another way
    ],
)
def test_the_guard(action: Any, max_kl: float | None, kl: list[float], stops: bool) -> None:
    guard = Guard(GuardSpec(max_kl=max_kl, action=action))
    verdict = guard.verdict(kl)
    assert isinstance(verdict, TrainingError) == stops
    assert (verdict is None) == (not stops)
    if kl:
        assert guard.exceeded(kl[-1]) == (max_kl is not None and kl[-1] > max_kl)


def test_the_guard_says_what_to_do() -> None:
    verdict = Guard(GuardSpec(max_kl=10.0)).verdict([12.345])
    assert verdict is not None
    assert verdict.message == (
        "the guard stopped the run: the KL of a response is 12.3 nats, above guard.max_kl = 10; "
        "a checkpoint was saved"
    )
    assert "kl_coef" in verdict.hint


# Intervals


def test_mean_interval_by_hand() -> None:
    # 0, 1, 2: variance 1 (two degrees of freedom), standard error 1 / sqrt(3) = 0.57735.
    mean, low, high = mean_interval(np.array([0.0, 1.0, 2.0]))
    assert mean == 1.0
    assert (low, high) == pytest.approx((-0.131586, 2.131586), abs=1e-5)
    assert mean_interval(np.array([4.0, 4.0])) == (4.0, 4.0, 4.0)
    mean, low, high = mean_interval(np.array([7.0]))
    assert mean == 7.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_mean_interval_holds_the_mean_about_95_times_in_100() -> None:
    # 2,000 samples of 100: the share has a standard error of 0.5%, and the normal quantile instead
    # of Student's costs 0.3%.
    rng = np.random.default_rng(0)
    held = 0
    for drawn in 3 + 2 * rng.standard_normal((2000, 100)):
        _, low, high = mean_interval(drawn)
        assert high - low == pytest.approx(
            2 * NormalDist().inv_cdf(0.975) * drawn.std(ddof=1) / 10, rel=1e-6
        )
        held += low <= 3 <= high
    assert 0.93 < held / 2000 < 0.97
