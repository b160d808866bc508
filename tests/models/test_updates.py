"""Several adapters become one change of the weights, by the rules of their papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_merging import logits, merge, write_adapter
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from alignkit.models.merging.updates import AdapterPart, Blend

KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters over it: of different ranks, kinds and targets."""
    folder = tmp_path_factory.mktemp("blend")
    save_tiny(folder / "base")
    write_adapter(folder / "a")
    torch.manual_seed(7)
    write_adapter(folder / "b", r=6, target_modules=["up_proj", "q_proj"], use_rslora=True)
    write_adapter(folder / "c", size=0.05, use_dora=True)
    return folder


def blended(places: Path, output: Path, names: str, weights: list[float], **rule: Any) -> Any:
    parts = tuple(AdapterPart(places / n, w) for n, w in zip(names, weights, strict=True))
    return merge(places / "base", Blend(parts, **rule), output)  # type: ignore[arg-type]


def change(places: Path, folder: Path) -> torch.Tensor:
    base = load_file(places / "base/model.safetensors")[KEY]
    return load_file(folder / "model.safetensors")[KEY] - base


@pytest.fixture(scope="module")
def alone(places: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The change of one weight by each adapter alone."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for name in "abc":
        merge(places / "base", places / name, folder / name)
        found[name] = change(places, folder / name)
    return found


def test_linear_is_the_weighted_sum(
    places: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    report = blended(places, tmp_path / "m", "abc", [0.5, 0.3, -0.2])
    expected = 0.5 * alone["a"] + 0.3 * alone["b"] - 0.2 * alone["c"]
    torch.testing.assert_close(change(places, tmp_path / "m"), expected, rtol=1e-4, atol=1e-6)
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base
    assert report.modules == 14


def test_linear_is_what_peft_computes_with_both_active(places: Path, tmp_path: Path) -> None:
    blended(places, tmp_path / "m", "ab", [1.0, 1.0])
    base = AutoModelForCausalLM.from_pretrained(places / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(places / "a"), adapter_name="a")
    model.load_adapter(str(places / "b"), adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-5, atol=3e-4)


def test_one_adapter_may_be_weighted(
    places: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    blended(places, tmp_path / "half", "a", [0.5])
    torch.testing.assert_close(
        change(places, tmp_path / "half"), 0.5 * alone["a"], rtol=1e-4, atol=1e-6
    )
    blended(places, tmp_path / "none", "a", [0.0])
    assert not change(places, tmp_path / "none").any()


def test_ties_by_hand(places: Path, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    # TIES: keep the largest half of each Δ, elect the sign of their sum, and average the weighted
    # entries of that sign.
    blended(places, tmp_path / "m", "ab", [0.6, 0.4], method="ties", density=0.5)
    kept, weights = [], []
    for name, weight in (("a", 0.6), ("b", 0.4)):
        delta = alone[name].double().flatten()
        smallest = delta.abs().argsort()[: delta.numel() - delta.numel() // 2]
        delta[smallest] = 0.0
        kept.append(delta)
        weights.append(weight)
    stack = torch.stack(kept)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = (torch.sign(stack) == sign) & (stack != 0)
    weighted = stack * torch.tensor(weights)[:, None]
    expected = (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)
    found = change(places, tmp_path / "m").double().flatten()
    # Entries at the cut may fall on either side: the changes were read from rounded weights.
    off = (found - expected).abs() > 1e-5
    assert off.float().mean() < 1e-3
    assert (expected != 0).float().mean() > 0.5


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_and_scales_up(
    method: str, places: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    for name in ("m", "again"):
        torch.manual_seed(len(name))  # what is dropped does not follow the global seed
        blended(places, tmp_path / name, "a", [0.999999], method=method, density=0.25)
    one, two = change(places, tmp_path / "m"), change(places, tmp_path / "again")
    assert torch.equal(one, two)
    kept = one.abs() > 1e-7  # of thousands of entries: 0.02 is several standard deviations
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.02)
    # Kept entries are divided by the density, so the expectation stays.
    torch.testing.assert_close(one[kept], 4 * alone["a"][kept], rtol=1e-3, atol=1e-5)
