"""The stand-in itself: it refuses, waits and counts as CUDA does, and its kernels are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

import alignkit
from standin.counts import counts
from standin.device import device

_HERE = str(Path(alignkit.__file__).parent / "somewhere.py")


def check_device() -> dict[str, Any]:
    """What each probe found, ready for JSON: the error refused with, or the counts.

    The probes are run as line 3 of a file of alignkit.
    """
    probes = {
        "mixed add": "on + torch.ones(3)",
        "mixed product": "torch.eye(3) @ on",
        "mixed in place": "torch.ones(()).add_(on.sum())",
        "mixed attention": "attention(rows, rows.cpu(), rows)",
        "numpy": "on.numpy()",
        "host scalar": "on * torch.tensor(2.0)",
        "item": "on[1].item()",
        "tolist": "on.tolist()",
        "to the host": "on.cpu()",
        "from the host": "torch.ones(3).to('cuda')",
        "not waiting": "torch.ones(3).to('cuda', non_blocking=True)",
        "copied into": "on.copy_(torch.ones(3))",
        "made there": "torch.tensor([1.0], device='cuda')",
        "boolean index": "on[on > 1]",
        "filled mask": "on.__setitem__(on > 1, 0.0)",
        "index on the host": "on[torch.tensor([0])]",
        "synchronize": "torch.cuda.synchronize()",
        "view": "on.view(1, 3).transpose(0, 1)",
        "sum": "on.sum()",
        "attention": "attention(rows, rows, rows)",
    }
    with device():
        names = {
            "torch": torch,
            "attention": scaled_dot_product_attention,
            "on": torch.arange(3.0, device="cuda"),
            "rows": torch.zeros(1, 2, 4, 8, device="cuda"),
        }
        return {name: _probe(source, names) for name, source in probes.items()}


def _probe(source: str, names: dict[str, Any]) -> dict[str, Any]:
    code = compile(f"\n\n{source}", _HERE, "eval")
    counts.reset()
    try:
        eval(code, dict(names))
    except (RuntimeError, TypeError) as error:
        return {"refused": str(error)}
    return {name: dict(counter) for name, counter in vars(counts).items()}


def check_varlen() -> dict[str, float]:
    """Largest difference of varlen attention from plain masked attention, of each kind.

    Two sequences of 3 and 5 queries over 3 and 9 keys in bfloat16, four heads over two: the
    output and the gradients of queries, keys and values; once causal, once with a window.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(n, heads, 16, generator=generator, dtype=torch.bfloat16)
        for n, heads in ((8, 4), (12, 2), (12, 2), (8, 4))
    ]
    worst: dict[str, float] = {}
    for name, left in (("causal", -1), ("window", 3)):
        with device():
            found = _gradients(_varlen, [x.to("cuda") for x in rows], left)
        expected = _gradients(_plain, [x.float() for x in rows], left)
        pairs = zip(("output", "query", "key", "value"), found, expected, strict=True)
        for part, one, other in pairs:
            worst[f"{name} {part}"] = float((one.cpu().float() - other).abs().max())
    return worst


def _gradients(attend: Callable[..., Tensor], rows: list[Tensor], left: int) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in rows[:3]]
    output = attend(*leaves, left)
    return [output.detach(), *torch.autograd.grad(output, leaves, rows[3])]


def _varlen(query: Tensor, key: Tensor, value: Tensor, left: int) -> Tensor:
    ends = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 3, 8], [0, 3, 12])]
    output = varlen_attn(query, key, value, *ends, 5, 9, window_size=(left, 0), enable_gqa=True)
    assert isinstance(output, Tensor)
    return output


def _plain(query: Tensor, key: Tensor, value: Tensor, left: int) -> Tensor:
    place = torch.tensor([0, 1, 2, 7, 8, 9, 10, 11])[:, None]  # of each query among the keys
    other = torch.arange(12)
    seen = (other <= place) & ((other < 3) == (place < 3))
    if left >= 0:
        seen &= other >= place - left
    heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
    output = scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
    return output[0].transpose(0, 1)
