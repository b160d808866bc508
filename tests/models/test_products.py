"""Products in blocks of rows are the products."""

from __future__ import annotations

import pytest
import torch

from alignkit.models.kernels import products
from alignkit.models.kernels.products import add_product, product, row_blocks

HEIGHTS = [1, 511, 512, 513, 714, 768, 1024, 1100, 1535, 1536, 4000]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("height", HEIGHTS)
def test_blocks_cover_the_rows_in_order(height: int) -> None:
    blocks = row_blocks(torch.empty(height, 576, dtype=torch.bfloat16))
    assert [row for block in blocks for row in range(height)[block]] == list(range(height))
    sizes = [len(range(height)[block]) for block in blocks]
    assert all(size % 32 == 0 and 256 <= size <= 512 for size in sizes[:-1])
    assert len(blocks) == (-(-height // 512) if 512 < height < 1536 else 1)


@pytest.mark.parametrize(
    ("width", "dtype"), [(192, torch.bfloat16), (1536, torch.bfloat16), (576, torch.float32)]
)
def test_products_that_use_all_cores_stay_whole(width: int, dtype: torch.dtype) -> None:
    assert row_blocks(torch.empty(1024, width, dtype=dtype)) == [slice(0, 1024)]


@pytest.mark.parametrize("cores", [1, 5, 64])
def test_what_was_not_measured_stays_whole(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: cores)
    assert len(row_blocks(torch.empty(1024, 576, dtype=torch.bfloat16))) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("height", [3, 700, 1100])
def test_results(height: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (height, 64), (64, 300), (height, 300)
    x, weight, total = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    exact = x.double() @ weight.double()
    close = (  # sums near 10 of 64 or 300 products, rounded to 8 bits: half of 1/16 or less
        {"rtol": 1e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(product(x, weight).double(), exact, **close)
    traced = product(x.requires_grad_(), weight)
    (slope,) = torch.autograd.grad(traced.float().sum(), x)
    torch.testing.assert_close(slope[0].double(), weight.double().sum(1), **close)
    x = x.detach()
    assert torch.equal(add_product(torch.zeros_like(total), x, weight), product(x, weight))
    expected = total.double() + exact
    assert add_product(total, x, weight) is total
    torch.testing.assert_close(total.double(), expected, **close)
