"""cpu_attention against plain_attention in float64, which test_attention compares with the formula.

In float64 both run the same arithmetic in another order: equal to 1e-9, entry by entry. The
narrower dtypes are compared in the norm, relative to the reference on the same (bfloat16) inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.models.attention import blocks as attention_blocks
from alignkit.models.attention import processor as cpu_attention
from alignkit.models.attention.blocks import BLOCK
from alignkit.models.attention.packed import packed_attention
from alignkit.models.attention.plain import plain_attention
from alignkit.models.attention.processor import cpu_attention as attend
from alignkit.packed import Segment

NAMES = ("output", "query", "key", "value")

# float32: sums of a few hundred products, each rounded to 6e-8, some 1e-6.
# bfloat16: the output and the weights before it are rounded, 0.2e-2 each in the mean. Backward
# rounds log P too. For weights above 1/3000 it is below 8, where bfloat16 steps by 1/32: P is
# 1/32 / sqrt(12) = 0.9e-2 off in the mean. P, dS and the results add 0.2e-2 each, in squares.
TOLERANCES = {
    torch.float32: dict.fromkeys(NAMES, 1e-5),
    torch.bfloat16: dict.fromkeys(NAMES, 1.2e-2) | {"output": 4e-3},
}


def row(*documents: tuple[int, tuple[int, ...]]) -> tuple[Segment, ...]:
    """Segments of documents, each a prompt's length (0 for none) and those of its branches."""
    segments: list[Segment] = []
    at = 0
    for prompt, branches in documents:
        start = at
        for length in (prompt, *branches) if prompt else branches:
            prefixed = prompt and at > start
            segments.append(Segment(at, length, start, prompt) if prefixed else Segment(at, length))
            at += length
    return tuple(segments)


ROWS = {
    "rows": row((0, (1,)), (0, (BLOCK,)), (0, (BLOCK + 1,)), (0, (2 * BLOCK + 70,)), (0, (1,))),
    "short prefixes": row((1, (7,)), (31, (9, 1)), (32, (40, 5, 33)), (33, (BLOCK + 8,))),
    "many alike": row(
        (25, (41, 40, 38, 41, 64, 12, 41, 33)), *[(0, (n,)) for n in (20, 65, 9, 31)]
    ),
    "long prefixes": row((BLOCK + 5, (1, 60, BLOCK + 1)), (0, (2,)), (2 * BLOCK, (BLOCK, 32))),
}
MIXED = row((0, (1,)), (33, (BLOCK + 60, 20)), (31, (1, 40)), (BLOCK + 5, (30, BLOCK)), (0, (90,)))


def draw(
    segments: tuple[Segment, ...], heads: tuple[int, int], width: int, size: float = 1.0
) -> list[Any]:
    """Queries, keys, values and the gradient of the output; `size` times larger scores' factors."""
    generator = torch.Generator().manual_seed(0)
    tokens = segments[-1].start + segments[-1].length
    drawn = [
        factor * torch.randn(1, tokens, count, width, generator=generator)
        for count, factor in zip((*heads, heads[1], heads[0]), (size, size, 1, 1), strict=True)
    ]
    query, key, value, grad = (x.bfloat16().double() for x in drawn)
    return [*(x.transpose(1, 2) for x in (query, key, value)), grad]


def results(
    function: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    segments: tuple[Segment, ...],
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The output and three gradients."""
    options = {"scaling": None, "sliding_window": None} | options
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    output = function(*leaves, segments, **options)
    gradients = torch.autograd.grad(output, leaves, inputs[3].to(dtype))
    return dict(zip(NAMES, (output.detach(), *gradients), strict=True))


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].double() - expected[name]).norm() / expected[name].norm())
        for name in NAMES
    }


def faults(inputs: list[torch.Tensor], segments: tuple[Segment, ...], **options: Any) -> list[str]:
    """Where cpu_attention is farther from the reference than its dtype allows."""
    expected = results(plain_attention, inputs, segments, **options)
    exact = results(attend, inputs, segments, **options)
    found = [
        f"float64 {name}"
        for name in NAMES
        if not torch.allclose(exact[name], expected[name], rtol=1e-9, atol=1e-9)
    ]
    for dtype, limits in TOLERANCES.items():
        narrow = results(attend, inputs, segments, dtype, **options)
        assert all(x.dtype == dtype for x in narrow.values())
        off = errors(narrow, expected)
        found += [
            f"{dtype} {name}: {off[name]:.1e}" for name in NAMES if not off[name] < limits[name]
        ]
    return found


def sized(monkeypatch: pytest.MonkeyPatch, **constants: int) -> None:
    """Other constants, and no layout that was made with the usual ones."""
    for name, value in constants.items():
        monkeypatch.setattr(attention_blocks, name, value)
    monkeypatch.setattr(attention_blocks, "layout", attention_blocks.layout.__wrapped__)


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("heads", [(9, 3), (2, 2), (4, 1)], ids=["grouped", "all", "one"])
def test_heads_and_widths(heads: tuple[int, int], width: int) -> None:
    assert faults(draw(MIXED, heads, width), MIXED) == []


@pytest.mark.parametrize("window", [None, 2, 20, 150, BLOCK + 40, 5000])
@pytest.mark.parametrize("name", ROWS)
def test_rows_and_windows(name: str, window: int | None) -> None:
    segments = ROWS[name]
    assert faults(draw(segments, (4, 2), 32), segments, sliding_window=window) == []


@pytest.mark.parametrize("window", [None, BLOCK])
@pytest.mark.parametrize(("scaling", "size"), [(0.3, 1.0), (0.01, 1.0), (None, 4.0)])
def test_scaling_and_large_scores(scaling: float | None, size: float, window: int | None) -> None:
    inputs = draw(MIXED, (6, 2), 64, size)
    assert faults(inputs, MIXED, scaling=scaling, sliding_window=window) == []


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_blocks_together_are_the_blocks_alone(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = ROWS["many alike"]
    inputs = draw(segments, (6, 2), 32)
    groups = attention_blocks.layout(segments, window, 6, 2, dtype).groups
    assert len(groups) < len(segments)  # some were computed together
    together = results(attend, inputs, segments, dtype, sliding_window=window)
    sized(monkeypatch, TOGETHER=1)
    assert len(attention_blocks.layout(segments, window, 6, 2, dtype).groups) == len(segments)
    alone = results(attend, inputs, segments, dtype, sliding_window=window)
    close = 1e-6 if dtype == torch.float32 else 4e-3
    assert all(off < close for off in errors(together, alone).values())


@pytest.mark.parametrize("window", [None, 20, BLOCK + 40])
@pytest.mark.parametrize(("rounding", "block"), [(1, 1), (16, 64), (64, 192), (32, 1024)])
def test_fillers_and_blocks_change_nothing(
    rounding: int, block: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = row((0, (1,)), (33, (5, 70, 1)), (BLOCK + 5, (30,)), (0, (130,)))
    inputs = draw(segments, (4, 2), 16)
    usual = results(attend, inputs, segments, sliding_window=window)
    sized(monkeypatch, ROUNDING=rounding, BLOCK=block)
    other = results(attend, inputs, segments, sliding_window=window)
    for name in NAMES:
        torch.testing.assert_close(other[name], usual[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1])
def test_a_token_that_sees_itself_only(window: int | None, dtype: torch.dtype) -> None:
    # Alone in its segment, or in its window: it copies its value, whatever its score.
    segments = MIXED if window else row((0, (1,)), (0, (1,)), (0, (1,)))
    inputs = draw(segments, (6, 2), 64, 4.0)
    found = results(attend, inputs, segments, dtype, sliding_window=window)
    assert torch.equal(found["output"].double(), inputs[2].repeat_interleave(3, 1).transpose(1, 2))
    summed = inputs[3].unflatten(2, (2, 3)).sum(3).transpose(1, 2)
    close = 2**-7 if dtype == torch.bfloat16 else 1e-6  # a sum of three, rounded once or twice
    torch.testing.assert_close(found["value"].double(), summed, rtol=close, atol=close)
    # dO V - δ cancels inside the product, up to float32 sums of 64 terms.
    assert max(found[name].abs().max() for name in ("query", "key")) < 1e-4


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_gets_the_parts_of_all_branches(window: int | None) -> None:
    prompt, segments = 33, row((33, (9, 40, 1)))
    inputs = draw(segments, (4, 2), 16)
    whole = results(attend, inputs, segments, sliding_window=window)
    alone = [*(x[:, :, :prompt] for x in inputs[:3]), inputs[3][:, :prompt]]
    parts = [results(attend, alone, segments[:1], sliding_window=window)]
    for segment in segments[1:]:
        # The prompt with one branch, and no gradient from the prompt's own outputs.
        branch = range(segment.start, segment.start + segment.length)
        picked = torch.tensor([*range(prompt), *branch])
        pair = [*(x[:, :, picked] for x in inputs[:3]), inputs[3][:, picked]]
        pair[3][:, :prompt] = 0
        both = row((prompt, (segment.length,)))
        parts.append(results(attend, pair, both, sliding_window=window))
    for name in ("key", "value"):
        pieces = [part[name][:, :, :prompt] for part in parts]
        assert all(piece.norm() > 1e-3 for piece in pieces)
        torch.testing.assert_close(whole[name][:, :, :prompt], sum(pieces), rtol=1e-9, atol=1e-9)


def test_a_window_bounds_the_keys() -> None:
    layout = attention_blocks.layout(row((500, (3, 400))), 40, 4, 2, torch.float32)
    fillers = 2 * (attention_blocks.ROUNDING - 1)
    assert max(group.mask.shape[-1] for group in layout.groups) <= 39 + BLOCK + fillers


def test_offsets_keep_float32_inside_bfloat16_products() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(6, 3, 8, generator=generator).bfloat16() for _ in range(2))
    offset = 300 * torch.randn(6, 3, generator=generator)
    wide = cpu_attention._with_offset(rows, offset), cpu_attention._with_ones(columns)
    found = torch.linalg.vecdot(*(x.double() for x in wide))
    expected = torch.linalg.vecdot(rows.double(), columns.double()) - offset
    torch.testing.assert_close(found, expected, rtol=0, atol=300 * 2**-24)


def test_many_branches_are_summed_before_rounding() -> None:
    # Added up in bfloat16, 60 parts would be some 0.9e-2 off.
    segments = row((32, (2,) * 60))
    inputs = draw(segments, (2, 1), 32)
    inputs[3] = inputs[3].abs()
    expected = results(plain_attention, inputs, segments)
    found = results(attend, inputs, segments, torch.bfloat16)
    assert errors(found, expected)["value"] < 4e-3


@pytest.mark.parametrize("window", [None, 3, 6])
def test_numerical_differences(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sized(monkeypatch, ROUNDING=2, BLOCK=4)
    segments = row((0, (1,)), (3, (2, 1)), (0, (5,)))
    leaves = [x.requires_grad_() for x in draw(segments, (2, 1), 3)[:3]]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(*inputs, segments, scaling=0.7, sliding_window=window)

    assert torch.autograd.gradcheck(function, leaves)


def test_layouts_of_memory() -> None:
    *inputs, grad = draw(MIXED, (4, 2), 16)
    grad = grad[:, :1].expand_as(grad)  # what a sum's backward gives: no memory of its own
    usual = results(attend, [*inputs, grad.contiguous()], MIXED)
    other = results(attend, [*(x.contiguous() for x in inputs), grad], MIXED)
    assert all(torch.equal(usual[name], other[name]) for name in NAMES)


def test_a_layout_made_without_autograd_serves_training() -> None:
    inputs = draw(MIXED, (4, 2), 16)
    expected = results(attend, inputs, MIXED)
    attention_blocks.layout.cache_clear()
    with torch.inference_mode():
        attend(*inputs[:3], MIXED, scaling=None, sliding_window=None)
    found = results(attend, inputs, MIXED)
    assert attention_blocks.layout.cache_info().misses == 1
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_autocast_computes_in_its_dtype() -> None:
    inputs = draw(MIXED, (4, 2), 16)
    expected = results(attend, inputs, MIXED, torch.bfloat16)
    wide = [x.float().requires_grad_() for x in inputs[:2]]
    value = inputs[2].bfloat16().requires_grad_()  # a projection's result, not rotated
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(torch.nn.Module(), *wide, value, None, segments=MIXED)
    assert torch.equal(output, expected["output"])
    gradients = torch.autograd.grad(output, [*wide, value], inputs[3].bfloat16())
    for name, found in zip(NAMES[1:], gradients, strict=True):
        assert torch.equal(found, expected[name].to(found.dtype))


def window_too_long(patch: pytest.MonkeyPatch) -> None:
    right = attention_blocks.layout
    patch.setattr(
        attention_blocks,
        "layout",
        lambda segments, window, *rest: right(segments, window + 1, *rest),
    )


def causal_rule_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = attention_blocks._block

    def seeing(*about: Any) -> Any:
        block = right(*about)
        return dataclasses.replace(block, edge=torch.zeros_like(block.edge))

    sized(patch)
    patch.setattr(attention_blocks, "_block", seeing)


def filler_queries_counted(patch: pytest.MonkeyPatch) -> None:
    right, none = attention_blocks.layout, torch.arange(0)
    patch.setattr(
        attention_blocks, "layout", lambda *about: dataclasses.replace(right(*about), fillers=none)
    )


def filler_keys_seen(patch: pytest.MonkeyPatch) -> None:
    right = attention_blocks._block

    def seeing(*about: Any) -> Any:
        block = right(*about)
        for mask in (block.mask, block.edge):
            mask[:, mask[-1] == float("-inf")] = 0.0
        return block

    sized(patch)
    patch.setattr(attention_blocks, "_block", seeing)


def prompt_without_branches(patch: pytest.MonkeyPatch) -> None:
    right = cpu_attention._KeyGradient.add

    def own_only(gradient: Any, parts: torch.Tensor, group: Any) -> None:
        right(gradient, parts, dataclasses.replace(group, prefix=slice(0, 0)))

    patch.setattr(cpu_attention._KeyGradient, "add", own_only)


def offsets_rounded(patch: pytest.MonkeyPatch) -> None:
    right = cpu_attention._with_offset
    patch.setattr(
        cpu_attention,
        "_with_offset",
        lambda x, offset: right(x, offset.bfloat16().to(offset.dtype)),
    )


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int | None, set[str]]] = {
    "window": (window_too_long, 20, set(NAMES)),
    "causal": (causal_rule_forgotten, None, {"query", "key", "value"}),
    "filler queries": (filler_queries_counted, None, {"key", "value"}),
    "filler keys": (filler_keys_seen, None, set(NAMES)),
    "prompt": (prompt_without_branches, None, {"key", "value"}),
    "offsets": (offsets_rounded, None, {"query", "key", "value"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_step_is_seen_in_every_dtype(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, window, names = FAULTS[fault]
    inputs = draw(MIXED, (4, 2), 32, 4.0)
    assert faults(inputs, MIXED, sliding_window=window) == []
    spoil(monkeypatch)
    seen = faults(inputs, MIXED, sliding_window=window)
    for name in names:
        for dtype in ("float64", "torch.float32", "torch.bfloat16"):
            assert any(one.startswith(f"{dtype} {name}") for one in seen), (dtype, name)
