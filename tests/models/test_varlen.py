"""The layout of varlen attention against the plain path; torch's own operator on fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from alignkit.models.attention import varlen
from alignkit.models.attention.backend import choose_backend
from alignkit.models.attention.plain import plain_attention
from alignkit.models.attention.prefix_rows import longer_segments
from alignkit.models.attention.varlen import find_sequences, torch_kernel, varlen_attention
from alignkit.packed import Segment, Segments

WIDTH = 8


def segments_of(*parts: Sequence[int]) -> Segments:
    """Documents as (prompt, branch, branch, …) in tokens; one without branches is a plain one."""
    made, end = [], 0
    for prompt, *branches in parts:
        first = end
        made.append(Segment(first, prompt))
        end += prompt
        for length in branches:
            made.append(Segment(end, length, first, prompt))
            end += length
    return tuple(made)


ROWS = {
    "plain documents": segments_of([5], [1], [9], [3]),
    "pairs": segments_of([4, 3, 6], [7, 1, 2], [2, 5, 5]),
    "eight branches beside a plain document": segments_of([6, *range(1, 9)], [4]),
    "behind a trained prefix": longer_segments(segments_of([4, 3, 6], [7]), 3),
}


def by_the_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch says that `varlen_attn` computes, one sequence after another."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    ends = [list(itertools.pairwise(x.tolist())) for x in (query_ends, key_ends)]
    assert ends[0][-1][1] == len(query)
    assert ends[1][-1][1] == len(key) == len(value)
    assert longest_query == max(b - a for a, b in ends[0])
    assert longest_key == max(b - a for a, b in ends[1])
    left, right = window_size
    assert right == 0
    groups, outputs = query.shape[1] // key.shape[1], []
    for (a, b), (c, d) in zip(*ends, strict=True):
        q, k, v = query[a:b], key[c:d], value[c:d]
        place = torch.arange(len(k) - len(q), len(k))[:, None]
        seen = torch.arange(len(k)) <= place
        if left >= 0:
            seen &= torch.arange(len(k)) >= place - left
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or WIDTH**-0.5)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def tensors(segments: Segments, heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(segment.length for segment in segments)
    return [
        torch.randn(1, n, tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (4, heads, heads)
    ]


@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("name", ROWS)
def test_outputs_and_gradients_are_those_of_the_plain_path(
    name: str, heads: int, window: int | None
) -> None:
    leaves = tensors(ROWS[name], heads)
    how: dict[str, Any] = {"scaling": 0.3, "sliding_window": window}
    expected = plain_attention(*leaves, ROWS[name], **how)
    found = varlen_attention(*leaves, ROWS[name], **how, kernel=by_the_definition)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    slope = torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, leaves, slope),
        torch.autograd.grad(expected, leaves, slope),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_keys_stay_where_they_are_without_a_prefix() -> None:
    found = find_sequences(ROWS["plain documents"])
    assert len(found.keys) == 0
    assert found.key_ends.tolist() == found.query_ends.tolist() == [0, 5, 6, 15, 18]


def test_no_token_is_twice_in_a_round_of_copies() -> None:
    found = find_sequences(ROWS["eight branches beside a plain document"])
    assert len(found.copies) == 8
    for places, tokens in found.copies:
        assert len(set(tokens.tolist())) == len(tokens)
        assert found.keys[places].tolist() == tokens.tolist()


def test_the_operator_of_torch_takes_it() -> None:
    """Shapes, dtypes and gradients of the real operator, on tensors without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    segments = (*ROWS["pairs"],)  # of its own: what is located for it has no numbers
    tokens = sum(segment.length for segment in segments)
    with FakeTensorMode():
        rows = [torch.randn(1, n, tokens, 64, dtype=torch.bfloat16) for n in (4, 2, 2)]
        output = varlen_attention(*rows, segments)
        assert output.shape == (1, tokens, 4, 64)
        assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "options", "backend"),
    [
        ("cpu", torch.float32, {}, "processor"),
        ("cpu", torch.bfloat16, {"softcap": 30.0}, "segments"),
        ("cpu", torch.bfloat16, {"dropout": 0.1}, "segments"),
        ("mps", torch.bfloat16, {}, "segments"),
    ],
)
def test_the_choice(device: str, dtype: torch.dtype, options: dict[str, Any], backend: str) -> None:
    assert choose_backend(torch.device(device), dtype, 64, 64, **options) == backend


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "backend"),
    [
        ((8, 0), torch.bfloat16, 128, "varlen"),
        ((9, 0), torch.float16, 256, "varlen"),
        ((8, 0), torch.float32, 128, "segments"),
        ((7, 5), torch.float16, 128, "segments"),
        ((8, 0), torch.bfloat16, 260, "segments"),
        ((8, 0), torch.bfloat16, 36, "segments"),
    ],
)
def test_the_choice_on_a_card(
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_backend(torch.device("cuda"), dtype, width, width) == backend


def test_an_older_torch_keeps_one_call_for_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: query)
    torch_kernel.cache_clear()
    try:
        assert choose_backend(torch.device("cuda"), torch.bfloat16, 64, 64) == "segments"
    finally:
        torch_kernel.cache_clear()
