"""The sampling engine: its log-probs are the scorer's, and a response depends on its seed alone.

Sampling runs over a cache with left padding, scoring over packed rows: the same float32 arithmetic
in another order, relative differences of about 1e-6.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, trained_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkit.data.documents import Branch, Document
from alignkit.data.packing import pack_documents
from alignkit.errors import ModelError
from alignkit.generation.drawing import draw_tokens
from alignkit.generation.rollout import (
    RolloutSettings,
    SampledResponse,
    TransformersEngine,
)
from alignkit.models.attention.cached import GrowingCache, cached_forward
from alignkit.models.scoring.scorer import TokenScorer, causal_model

FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "gemma3"]  # the last three with a window of 8
LENGTHS = [5, 1, 19, 12, 2, 12]
NEW = 14
VOCABULARY = 600
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
NOTHING: frozenset[int] = frozenset()
HALF = frozenset(range(0, 2000, 2))
"""Stop tokens that end about half of the responses at every step."""


def prompts(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCABULARY, length) for length in lengths]


def seeds(count: int = len(LENGTHS), first: int = 0) -> list[tuple[int, ...]]:
    return [(first, number) for number in range(count)]


def engine(
    model: Any,
    stops: frozenset[int] = NOTHING,
    temperature: float = 1.0,
    budget: int = 16384,
    new: int = NEW,
) -> TransformersEngine:
    settings = RolloutSettings(new, temperature, stops)
    return TransformersEngine(causal_model(model), torch.float32, settings, budget)


@torch.no_grad()
def scored(
    model: Any, asked: Sequence[np.ndarray], found: Sequence[SampledResponse], temperature: float
) -> list[np.ndarray]:
    """Log-probs of the responses under the packed scorer."""
    documents = [
        Document(
            prompt.astype(np.int32),
            (Branch(c.ids.astype(np.int32), np.ones(len(c.ids), np.bool_)),),
            row,
        )
        for row, (prompt, c) in enumerate(zip(asked, found, strict=True))
    ]
    scorer = TokenScorer(model, torch.float32, temperature=temperature)
    logprobs = scorer(pack_documents(documents)).logprobs.numpy()
    return np.split(logprobs, np.cumsum([len(c.ids) for c in found])[:-1])


def assert_scored(
    model: Any, asked: Sequence[np.ndarray], found: Sequence[SampledResponse], temperature: float
) -> None:
    for response, expected in zip(found, scored(model, asked, found, temperature), strict=True):
        assert response.logprobs.dtype == np.float32
        np.testing.assert_allclose(response.logprobs, expected, **CLOSE)


def same_ids(one: Sequence[SampledResponse], other: Sequence[SampledResponse]) -> bool:
    return all(a.ids.tolist() == b.ids.tolist() for a, b in zip(one, other, strict=True))


# Log-probs


@pytest.mark.parametrize("stops", [NOTHING, HALF], ids=["to the end", "stopping"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_scorer(
    family: str, temperature: float, stops: frozenset[int]
) -> None:
    model = tiny_model(family)
    asked = prompts()
    found = engine(model, stops, temperature).generate(asked, seeds())
    assert_scored(model, asked, found, temperature)
    at_one = scored(model, asked, found, 1.0)
    moved = max(np.abs(c.logprobs - x).max() for c, x in zip(found, at_one, strict=True))
    assert (moved > 1e-2) == (temperature != 1.0)
    if not stops:
        assert [len(c.ids) for c in found] == [NEW] * len(asked)
        assert {c.finish for c in found} == {"length"}


def test_the_active_adapter_is_sampled_from() -> None:
    model = trained_model("llama", "lora")
    asked = prompts()
    found = engine(model).generate(asked, seeds())
    assert_scored(model, asked, found, 1.0)
    with model.disable_adapter():
        bare = engine(model).generate(asked, seeds())
        assert_scored(model, asked, bare, 1.0)
    assert not same_ids(found, bare)


@torch.no_grad()
def test_entropies_are_those_of_the_distributions_sampled_from() -> None:
    model = tiny_model()
    asked = prompts()
    found = engine(model, HALF, temperature=0.7).generate(asked, seeds())
    model.set_attn_implementation("eager")
    for prompt, response in zip(asked, found, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response.ids]))[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / 0.7
        exact = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert response.entropy == pytest.approx(exact.item(), rel=1e-4)


def test_bfloat16_samples_what_it_scores_about() -> None:
    # bfloat16 keeps 8 bits: log-probs near -5 are some 0.05 off; a wrong mask moves them by more.
    model = tiny_model(dtype=torch.bfloat16)
    settings = RolloutSettings(NEW, 1.0, NOTHING)
    asked = prompts()
    found = TransformersEngine(model, torch.bfloat16, settings).generate(asked, seeds())
    exact = scored(tiny_model(), asked, found, 1.0)
    assert {c.logprobs.dtype for c in found} == {np.dtype(np.float32)}
    assert np.mean([np.abs(c.logprobs - x).mean() for c, x in zip(found, exact, strict=True)]) < 0.2


# What a response depends on


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_depend_on_the_batch(family: str) -> None:
    model = tiny_model(family)
    asked, numbers = prompts(), seeds()
    together = engine(model, HALF).generate(asked, numbers)
    assert len({len(c.ids) for c in together}) > 2
    alone = [
        engine(model, HALF).generate([prompt], [seed])[0]
        for prompt, seed in zip(asked, numbers, strict=True)
    ]
    turned = engine(model, HALF).generate(asked[::-1], numbers[::-1])[::-1]
    shorter = engine(model, HALF, budget=40).generate(asked, numbers)
    tiny = engine(model, HALF, budget=1).generate(asked, numbers)  # one row at a time
    for other in (alone, turned, shorter, tiny):
        assert same_ids(together, other)
        assert [c.finish for c in other] == [c.finish for c in together]
        for one, two in zip(together, other, strict=True):
            np.testing.assert_allclose(one.logprobs, two.logprobs, **CLOSE)
            assert one.entropy == pytest.approx(two.entropy, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_several_responses_is_read_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained_model(family, "lora").eval()
    asked, names = prompts(), seeds(3 * len(LENGTHS))
    apart = [
        engine(model, HALF).generate([asked[n // 3]], [names[n]])[0] for n in range(len(names))
    ]
    heights: list[int] = []
    forward = TransformersEngine._forward

    def watched(self: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        heights.append(len(ids))
        return forward(self, ids, *rest)

    monkeypatch.setattr(TransformersEngine, "_forward", watched)
    found = engine(model, HALF).generate([asked[n // 3] for n in range(len(names))], names)
    assert same_ids(found, apart)
    for one, other in zip(found, apart, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, **CLOSE)
    assert heights[0] == len(LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tokens_of_a_bucket_are_the_same_operations(family: str) -> None:
    # Shapes and numbers of the host are all that a captured graph would keep of them.
    model = tiny_model(family).eval()
    sampling = engine(model)
    recorded = []
    with torch.no_grad(), cached_forward(causal_model(model)):
        state = sampling.begin(prompts(), seeds())
        for _ in range(3):
            with Recorder() as recorder:
                sampling.next_token(*state)
            recorded.append(recorder.seen)
    assert recorded[0] == recorded[1] == recorded[2]
    assert not [name for name, _ in recorded[0] if "local_scalar" in name or "nonzero" in name]
    plain = engine(model).generate(prompts(), seeds())
    assert same_ids(state[1].sampled(), [first(r, 4) for r in plain])


class Recorder(TorchDispatchMode):
    """Operators with the shapes of their tensors and their other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [
            tuple(x.shape) if isinstance(x, torch.Tensor) else str(x)
            for x in tree_leaves((args, kwargs))
        ]
        self.seen.append((str(func), given))
        return func(*args, **(kwargs or {}))


def first(response: SampledResponse, count: int) -> SampledResponse:
    return dataclasses.replace(response, ids=response.ids[:count])


def test_the_seed_is_what_a_response_depends_on() -> None:
    model = tiny_model()
    asked = prompts([6, 6, 6, 6])
    first = engine(model).generate(asked, seeds(4))
    torch.rand(3)
    np.random.rand(3)
    assert same_ids(first, engine(model).generate(asked, seeds(4)))
    other = engine(model).generate(asked, seeds(4, first=1))
    assert not any(a.ids.tolist() == b.ids.tolist() for a, b in zip(first, other, strict=True))
    twins = engine(model).generate([asked[0]] * 4, seeds(4))
    assert len({tuple(c.ids.tolist()) for c in twins}) == 4
    same = engine(model).generate([asked[0]] * 3, [(5, 1)] * 3)
    assert len({tuple(c.ids.tolist()) for c in same}) == 1


def test_a_longer_limit_continues_the_same_response() -> None:
    model = tiny_model()
    short = engine(model, new=5).generate(prompts(), seeds())
    long = engine(model, new=12).generate(prompts(), seeds())
    for one, other in zip(short, long, strict=True):
        assert other.ids[:5].tolist() == one.ids.tolist()


def test_the_budget_bounds_a_batch() -> None:
    # Room for a row is its batch's longest prompt and all new tokens: 19 + 14 = 33 twice, ...
    found = engine(tiny_model(), budget=66)._batches([19, 12, 12, 5, 2, 1])
    assert [list(rows) for rows in found] == [[0, 1], [2, 3], [4, 5]]
    found = engine(tiny_model(), budget=32)._batches([19, 12, 12, 5, 2, 1])
    assert [list(rows) for rows in found] == [[0], [1], [2], [3], [4, 5]]
    assert engine(tiny_model())._batches([]) == []
    assert engine(tiny_model()).generate([], []) == []


# The end of a response


def test_a_stop_token_ends_a_response_and_belongs_to_it() -> None:
    free = engine(tiny_model(), NOTHING).generate(prompts(), seeds())
    found = engine(tiny_model(), HALF).generate(prompts(), seeds())
    assert {c.finish for c in found} == {"stop"}  # 1 / 2^14 to see another
    for one, whole in zip(found, free, strict=True):
        ids = whole.ids.tolist()
        end = next(place for place, token in enumerate(ids) if token in HALF)
        assert one.ids.tolist() == ids[: end + 1]
        assert len(one.logprobs) == len(one.ids)


def test_finish_tells_a_stop_at_the_last_place_from_a_cut() -> None:
    free = engine(tiny_model(), NOTHING).generate(prompts(), seeds())
    last = int(free[2].ids[-1])
    assert sum(last in c.ids for c in free) == 1
    assert free[2].ids.tolist().count(last) == 1
    found = engine(tiny_model(), frozenset({last})).generate(prompts(), seeds())
    assert same_ids(found, free)
    assert [c.finish for c in found] == ["length", "length", "stop", *["length"] * 3]
    (single,) = engine(tiny_model(), frozenset(range(2000)), new=1).generate(prompts([3]), [(1,)])
    assert (len(single.ids), single.finish) == (1, "stop")


def forward_rows(model: Any, stops: frozenset[int], count: int, new: int) -> tuple[list[int], Any]:
    """Rows of every forward pass, and the responses."""
    rows: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _module, _inputs, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = engine(model, stops, new=new).generate(prompts([4] * count), seeds(count))
    hook.remove()
    return rows, found


@pytest.mark.parametrize("share", [2, 8], ids=["half stop", "an eighth stops"])
def test_rows_that_have_stopped_leave_the_batch(share: int) -> None:
    # Never more than a quarter of the rows of a pass, rounded, has stopped before it; the passes
    # end with the last response.
    model = tiny_model()
    stops = frozenset(range(0, 2000, share))
    rows, found = forward_rows(model, stops, count=40, new=30)
    lengths = [len(c.ids) for c in found]
    assert len(rows) == max(lengths)
    assert rows[0] == 40
    for step, count in enumerate(rows):
        running = sum(length > step for length in lengths)
        assert running <= count
        assert running > 0.75 * count
    assert rows[-1] < 15


def test_survivors_keep_their_cache_when_others_leave() -> None:
    model = tiny_model("gemma3")
    asked = prompts([3, 20, 9, 14, 1, 6, 11, 17])
    found = engine(model, HALF, new=20).generate(asked, seeds(8))
    lengths = sorted(len(c.ids) for c in found)
    assert lengths[0] == 1
    assert lengths[-1] >= 4
    assert_scored(model, asked, found, 1.0)


# What is put back


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_attention_are_put_back(training: bool) -> None:
    model = tiny_model().train(training)
    model.set_attn_implementation("eager")
    engine(model).generate(prompts(), seeds())
    assert model.training == training
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="embedding has only"):
        engine(model).generate([np.array([10**6])], [(0,)])
    assert model.training == training
    assert model.config._attn_implementation == "eager"


def test_no_gradient_is_kept_and_none_is_lost() -> None:
    model = trained_model("llama", "lora")
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    engine(model).generate(prompts(), seeds())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    assert torch.is_grad_enabled()
    assert all(weight.grad is None for weight in model.parameters())


def test_checkpointing_does_not_disturb_sampling() -> None:
    # transformers gives up the cache where activations are recomputed in training mode.
    plain = engine(trained_model("llama", "lora")).generate(prompts(), seeds())
    model = trained_model("llama", "lora", checkpointing=True)
    assert same_ids(engine(model).generate(prompts(), seeds()), plain)
    assert model.training


# Drawing


def test_frequencies_are_the_probabilities() -> None:
    # χ² with 3 degrees of freedom is above 16.3 once in a thousand times.
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(count))
    ids, logprobs, _ = draw_tokens(probabilities.log().expand(count, 4), uniform)
    found = torch.bincount(ids, minlength=4).double()
    expected = probabilities.double() * count
    assert float(((found - expected).square() / expected).sum()) < 16.3
    torch.testing.assert_close(logprobs, probabilities.log()[ids])


def test_each_token_has_its_stretch_of_the_unit_interval() -> None:
    # Probabilities 1/8, 1/2, 0, 3/8: cumulative 0.125, 0.625, 0.625, 1.
    logits = torch.tensor([0.125, 0.5, 0.0, 0.375]).log()
    uniform = torch.tensor([0, 0.12, 0.13, 0.62, 0.63, 1 - 2**-53], dtype=torch.float64)
    ids, _, _ = draw_tokens(logits.expand(6, 4), uniform)
    assert ids.tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("place", range(5))
def test_what_has_no_probability_is_never_drawn(place: int) -> None:
    # The edges: the first token at 0, the last one just below 1, rounding of 1/3 in between.
    edges = [0.0, 2.0**-60, 1 / 3, 2 / 3, 1 - 2**-53, 1 - 2**-30]
    for zeros in ({0, 4}, {1, 2}, {3, 4}, {0, 1, 2}, set()):
        zeros = zeros | {place}
        logits = torch.randn(5, generator=torch.Generator().manual_seed(place))
        logits[list(zeros)] = -math.inf
        uniform = torch.tensor(edges, dtype=torch.float64)
        ids, logprobs, entropy = draw_tokens(logits.expand(len(edges), 5), uniform)
        assert not set(ids.tolist()) & zeros
        assert bool(torch.isfinite(logprobs).all())
        assert bool(torch.isfinite(entropy).all())
        allowed = [token for token in range(5) if token not in zeros]
        assert (ids[0].item(), ids[-2].item()) == (allowed[0], allowed[-1])


def test_the_last_token_is_not_drawn_for_want_of_a_sum_of_1() -> None:
    # Rounding leaves the sum of many float32 probabilities below 1: what is missing must not fall
    # to the tokens at the end, which have none.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50_000, generator=generator)
    logits[:, -1000:] = -math.inf
    total = torch.log_softmax(logits, -1).exp().double().sum(-1)
    assert bool((total < 1).any())
    uniform = torch.full((64,), 1 - 2**-53, dtype=torch.float64)
    ids, logprobs, _ = draw_tokens(logits, uniform)
    assert int(ids.max()) < 49_000
    assert bool(torch.isfinite(logprobs).all())


@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 512, 1000])
def test_sums_of_blocks_find_the_token_that_one_sum_finds(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(64, vocabulary, generator=generator)
    logits[32:, : vocabulary // 2] = -math.inf  # whole blocks without probability
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    uniform[::8] = 0.0
    cumulative = torch.log_softmax(logits, -1).exp().double().cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    assert draw_tokens(logits, uniform)[0].tolist() == expected.tolist()


def test_entropies_in_closed_form() -> None:
    # Uniform over 4: ln 4. Sure: 0. 1/2, 1/4, 1/4, 0: 1.5 ln 2.
    logits = torch.tensor([[1.0, 1, 1, 1], [0, -math.inf, -math.inf, -math.inf], [2, 1, 1, 0]])
    logits[2] = torch.tensor([0.5, 0.25, 0.25, 0.0]).log() + 7.0
    uniform = torch.tensor([0.9, 0.9, 0.9], dtype=torch.float64)
    ids, logprobs, entropy = draw_tokens(logits, uniform)
    assert entropy.tolist() == pytest.approx([math.log(4), 0.0, 1.5 * math.log(2)], abs=1e-6)
    assert ids.tolist() == [3, 0, 2]
    assert logprobs.tolist() == pytest.approx([-math.log(4), 0.0, -math.log(4)], abs=1e-6)


# Keys and values


def test_keys_are_kept_as_narrow_as_values() -> None:
    # A model whose own rotation computes in float32 hands over float32 keys under autocast.
    layer = GrowingCache(1, 10).layers[0]
    key, value = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4).bfloat16()
    keys, values = layer.update(key, value)
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(keys[:, :, :3], key.bfloat16())
