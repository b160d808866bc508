"""packed_attention against softmax(q kᵀ · s) v with an explicit mask, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.models.attention import blocks as attention_blocks
from alignkit.models.attention import packed as attention
from alignkit.models.attention import processor as cpu_attention
from alignkit.models.attention.packed import packed_attention
from alignkit.models.attention.plain import plain_attention, segment_mask
from alignkit.packed import Segment

# A row of 9, a prompt of 5 with branches of 4 and 7, a row of 1.
SEGMENTS = (
    Segment(0, 9),
    Segment(9, 5),
    Segment(14, 4, 9, 5),
    Segment(18, 7, 9, 5),
    Segment(25, 1),
)
TOKENS, HEADS, KEY_HEADS, WIDTH = 26, 4, 2, 8


def visible(window: int | None) -> torch.Tensor:
    """`[T, T]`: row i sees column j. Spelt out token by token, from the definition."""
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for segment in SEGMENTS:
        own = [segment.start + n for n in range(segment.length)]
        prefix = [segment.prefix_start + n for n in range(segment.prefix_length)]
        sequence = prefix + own
        for row in own:
            at = sequence.index(row)
            for other in range(at + 1):
                seen[row, sequence[other]] = window is None or at - other < window
    return seen


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Any, softcap: Any, scaling: Any
) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(WIDTH) if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(window), -math.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def draw(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(1, heads, TOKENS, WIDTH, generator=generator)).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    found, weights = packed_attention(
        torch.nn.Identity(), q, k, v, None, segments=SEGMENTS, **options
    )
    assert weights is None
    return found


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return plain_attention(q, k, v, SEGMENTS, **options)


@pytest.mark.parametrize("path", [packed, plain])
@pytest.mark.parametrize("rounding", [1, 32])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_output_and_gradients(
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    rounding: int,
    path: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_blocks, "ROUNDING", rounding)
    monkeypatch.setattr(attention_blocks, "layout", attention_blocks.layout.__wrapped__)  # no cache
    q, k, v = draw()
    found = path(q, k, v, sliding_window=window, softcap=softcap, scaling=scaling)
    expected = naive(q, k, v, window, softcap, scaling)
    assert found.shape == (1, TOKENS, HEADS, WIDTH)
    # float32 sums of at most 12 products: some 1e-6.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    factors = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for x in (q, k, v):
        (one,) = torch.autograd.grad((found * factors).sum(), x, retain_graph=True)
        (two,) = torch.autograd.grad((expected * factors).sum(), x, retain_graph=True)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_the_processor_path_lacks_takes_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (x.detach() for x in draw())
    taken: list[str] = []
    for module, name in ((attention, "plain_attention"), (cpu_attention, "cpu_attention")):

        def noted(*inputs: Any, name: str = name, **options: Any) -> torch.Tensor:
            taken.append(name)
            return v

        monkeypatch.setattr(module, name, noted)
    packed(q, k, v, sliding_window=3, scaling=0.2)
    assert taken == ["cpu_attention"]
    packed(q, k, v, softcap=2.0)
    packed(q, k, v, dropout=0.1)
    packed(q, k, v[..., :5])
    assert taken[1:] == ["plain_attention"] * 3


@pytest.mark.parametrize("window", [None, 3])
def test_values_of_another_width(window: int | None) -> None:
    q, k, v = (x.detach() for x in draw())
    found = packed(q, k, v[..., :5], sliding_window=window)
    expected = naive(q, k, v[..., :5], window, None, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_dropout_drops_weights() -> None:
    # Dropping with probability p and scaling by 1 / (1 - p) keeps the mean: over 400 draws the
    # standard error of each entry is its deviation / 20; 6 of them is an alarm in 1e9.
    q, k, v = (x.detach() for x in draw())
    torch.manual_seed(0)
    for softcap in (None, 2.0):
        options: dict[str, Any] = {"segments": SEGMENTS, "softcap": softcap}
        exact, _ = packed_attention(torch.nn.Identity(), q, k, v, None, **options)
        draws = torch.stack(
            [
                packed_attention(torch.nn.Identity(), q, k, v, None, dropout=0.3, **options)[0]
                for _ in range(400)
            ]
        )
        assert draws.std(0).max() > 0.1
        error = (draws.mean(0) - exact).abs() / (draws.std(0) / 20 + 1e-6)
        assert error.max() < 6


def test_masks_in_closed_form() -> None:
    device = torch.device("cpu")
    assert segment_mask(4, 0, 0, None, device) is None
    assert segment_mask(4, 0, 0, 4, device) is None  # the window is as long as the row
    windowed = segment_mask(4, 0, 0, 2, device)
    assert windowed is not None
    assert windowed.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    prefixed = segment_mask(2, 3, 0, None, device)
    assert prefixed is not None
    assert prefixed.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    both = segment_mask(2, 3, 0, 3, device)
    assert both is not None
    assert both.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    filled = segment_mask(2, 2, 1, None, device)  # nobody sees the filler between them
    assert filled is not None
    assert filled.int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    near = segment_mask(2, 2, 1, 2, device)
    assert near is not None
    assert near.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "cache"])
def test_what_packed_rows_do_not_have_raises(name: str) -> None:
    q, k, v = draw()
    with pytest.raises(NotImplementedError, match=f"does not support {name}"):
        packed_attention(
            torch.nn.Identity(), q, k, v, None, segments=SEGMENTS, **{name: torch.ones(4)}
        )
    found, _ = packed_attention(
        torch.nn.Identity(), q, k, v, None, segments=SEGMENTS, **{name: None}
    )
    assert found.shape == (1, TOKENS, HEADS, WIDTH)


def test_a_mask_or_no_segments_raises() -> None:
    q, k, v = draw()
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    for options in ({"attention_mask": mask, "segments": SEGMENTS}, {"attention_mask": None}):
        with pytest.raises(NotImplementedError, match="segments and no mask"):
            packed_attention(torch.nn.Identity(), q, k, v, **options)
