"""The learning-rate schedule in closed form, and what weight decay touches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from running import make_recipe
from torch import nn

from alignkit.errors import TrainingError
from alignkit.recipe.planning.plan import count_decay
from alignkit.recipe.training import TrainingSpec
from alignkit.runtime import optim
from alignkit.runtime.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from alignkit.runtime.optim import (
    build_optimizer,
    require_optimizer,
    set_learning_rate,
)
from alignkit.runtime.schedule import learning_rate_at

optimizers = pytest.mark.parametrize(
    "kind",
    [
        "adamw",
        pytest.param("adamw_8bit", marks=pytest.mark.skipif(not optim.bitsandbytes, reason="")),
    ],
)
needs_bitsandbytes = pytest.mark.skipif(not optim.bitsandbytes, reason="needs bitsandbytes")


def rates(steps: int, warmup: int, schedule: str, peak: float = 1.0) -> list[float]:
    shape: dict[str, Any] = {"steps": steps, "warmup_steps": warmup, "schedule": schedule}
    shape |= {"decay_steps": count_decay(0.5, steps, warmup), "min_rate": 0.1}
    return [learning_rate_at(step, peak=peak, **shape) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        # (1 + cos(π s / 4)) / 2
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        # Warm-up of w steps: 1/(w+1), 2/(w+1), ...; the peak right after it.
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 0.5]),
        # (4 - s) / 2 from step 2 on: the peak, then half of it
        ("wsd", 0, [1, 1, 1, 0.5]),
        ("wsd", 2, [1 / 3, 2 / 3, 1, 0.5]),
        # 0.1 + 0.9 (1 + cos(π s / 4)) / 2
        ("cosine_min", 0, [1, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5)]),
        ("cosine_min", 2, [1 / 3, 2 / 3, 1, 0.55]),
    ],
)
def test_closed_form(schedule: str, warmup: int, expected: list[float]) -> None:
    assert rates(4, warmup, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "cosine_min"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (100, 0), (100, 7), (100, 99)])
def test_every_step_moves_and_none_beyond_the_peak(schedule: str, steps: int, warmup: int) -> None:
    found = rates(steps, warmup, schedule, peak=3e-4)
    assert all(0 < rate <= 3e-4 for rate in found)
    assert found[warmup] == 3e-4
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("share", "steps", "warmup", "expected"),
    # a fifth of 100; rounded; at least one step; none of the warm-up; all of them; another schedule
    [(0.2, 100, 5, 20), (0.2, 8, 0, 2), (0.2, 2, 0, 1), (0.5, 10, 8, 2), (1.0, 10, 3, 7)],
)
def test_steps_of_decay(share: float, steps: int, warmup: int, expected: int) -> None:
    assert count_decay(share, steps, warmup) == expected
    assert count_decay(None, steps, warmup) == 0


def reference(kind: str, betas: tuple[float, float], rate: float, decay: float) -> Any:
    """One weight's update rule in float64, as its paper or torch's documentation has it."""
    state: dict[str, Any] = {"m": 0.0, "v": 0.0, "r": 0.0, "c": 0.0}
    first, second = betas

    def adamw(w: Any, g: Any, t: int) -> Any:
        state["m"] = first * state["m"] + (1 - first) * g
        state["v"] = second * state["v"] + (1 - second) * g * g
        m, v = state["m"] / (1 - first**t), state["v"] / (1 - second**t)
        return w - rate * m / (v.sqrt() + 1e-8)

    def lion(w: Any, g: Any, t: int) -> Any:
        step = (first * state["m"] + (1 - first) * g).sign()
        state["m"] = second * state["m"] + (1 - second) * g
        return w - rate * step

    def adafactor(w: Any, g: Any, t: int) -> Any:
        new, size = t**-0.8, max(1e-3, float(w_before.square().mean().sqrt()))
        if g.ndim == 2:
            state["r"] = (1 - new) * state["r"] + new * g.square().mean(1, keepdim=True)
            state["c"] = (1 - new) * state["c"] + new * g.square().mean(0, keepdim=True)
            v = state["r"] @ state["c"] / state["r"].mean()
        else:
            v = state["v"] = (1 - new) * state["v"] + new * g.square()
        u = g / v.sqrt()
        clipped = u / max(1.0, float(u.square().mean().sqrt()))
        return w - min(rate, t**-0.5) * size * clipped

    w_before: Any = None

    def update(w: Any, g: Any, t: int) -> Any:
        nonlocal w_before
        w_before = w
        shrunk = w * (1 - rate * decay) if w.ndim == 2 else w
        return {"adamw": adamw, "lion": lion, "adafactor": adafactor}[kind](shrunk, g, t)

    return update


@pytest.mark.parametrize(
    ("kind", "betas"), [("adamw", (0.8, 0.95)), ("lion", (0.9, 0.99)), ("adafactor", None)]
)
@needs_bitsandbytes
def test_update_rules(kind: str, betas: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    weights = {"matrix": nn.Parameter(torch.randn(6, 4)), "vector": nn.Parameter(torch.randn(5))}
    expected = {name: weight.detach().double() for name, weight in weights.items()}
    rules = {name: reference(kind, betas or (0.0, 0.0), 0.01, 0.5) for name in weights}
    optimizer = build_optimizer(weights.items(), 0.01, 0.5, kind=kind, betas=betas)
    for step in range(1, 9):
        for name, weight in weights.items():
            weight.grad = torch.randn_like(weight) * step
            expected[name] = rules[name](expected[name], weight.grad.double(), step)
        optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach().double(), expected[name], rtol=2e-5, atol=2e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["lion", "lion_8bit", "adafactor"])
def test_groups_of_every_kind(kind: str) -> None:
    # Zero gradients: only decay moves a weight, and only a matrix that is not held.
    weights = {name: nn.Parameter(torch.ones(80, 80)) for name in ("x.lora_A.w", "x.lora_B.w")}
    weights |= {"norm": nn.Parameter(torch.ones(80)), "x.ia3_l.w": nn.Parameter(torch.ones(80, 1))}
    optimizer = build_optimizer(weights.items(), 1.0, 0.5, kind=kind, b_rate=4.0)
    set_learning_rate(optimizer, 0.1)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    found = [float(weight.detach().mean()) for weight in weights.values()]
    assert found == pytest.approx([0.95, 0.8, 1.0, 1.0])
    sizes = [v.dtype for v in optimizer.state[weights["x.lora_A.w"]].values() if torch.is_tensor(v)]
    assert (torch.uint8 in sizes) == (kind == "lion_8bit")


@optimizers
def test_vectors_do_not_decay(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    optimizer = build_optimizer(model.named_parameters(), 0.1, weight_decay=0.5, kind=kind)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # No gradient: AdamW multiplies what decays by 1 - lr · wd = 0.95 and leaves the rest.
    for name, value in model.named_parameters():
        factor = 0.95 if value.ndim == 2 else 1.0
        torch.testing.assert_close(value, before[name] * factor, rtol=1e-6, atol=0)


@optimizers
def test_the_first_step_of_adam_in_closed_form(kind: str) -> None:
    # m / (1 - β1) = g and v / (1 - β2) = g², so the weight moves by lr · g / (|g| + ε): by lr.
    # Moments are rounded to 8 bits after a step, so that the first one is exact there too.
    model = nn.Linear(64, 64, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model.named_parameters(), 0.1, 0.0, kind=kind)
    model.weight.grad = torch.tensor([[3.0, -0.01]]).repeat(64, 32)
    optimizer.step()
    moved = model.weight.detach() - before
    expected = torch.tensor([[-0.1, 0.1]]).repeat(64, 32)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)
    moments = [value for value in optimizer.state[model.weight].values() if torch.is_tensor(value)]
    eight_bit = [moment for moment in moments if moment.dtype == torch.uint8]
    assert len(eight_bit) == (2 if kind == "adamw_8bit" else 0)


@optimizers
def test_epsilon_and_the_faster_group(kind: str) -> None:
    # |g| = ε halves a step of Adam; B moves 16 times as far as A.
    weights = {f"x.lora_{name}.w": nn.Parameter(torch.zeros(64, 64)) for name in "AB"}
    optimizer = build_optimizer(weights.items(), 1.0, 0.0, kind=kind, epsilon=0.25, b_rate=16.0)
    set_learning_rate(optimizer, 0.1)
    for weight in weights.values():
        weight.grad = torch.full((64, 64), 0.25)
    optimizer.step()
    for weight, expected in zip(weights.values(), (-0.05, -0.8), strict=True):
        torch.testing.assert_close(weight.detach(), torch.full((64, 64), expected))


class Regression(nn.Module):
    """Weights that 8-bit AdamW keeps in 8 bits and in 32, and a gradient for step n."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lora_B = nn.ModuleDict({"default": nn.Linear(96, 64)})
        self.small = nn.Linear(64, 8)

    def train_for(self, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(32, 96, generator=torch.Generator().manual_seed(step))
            self.small(self.lora_B["default"](x)).square().mean().backward()
            set_learning_rate(optimizer, 1e-2 / (1 + step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@needs_bitsandbytes
def test_state_in_8_bits_is_restored_to_the_last_bit(tmp_path: Path) -> None:
    def start() -> tuple[Regression, torch.optim.Optimizer]:
        model = Regression()
        named = model.named_parameters()
        return model, build_optimizer(named, 1e-2, 0.1, kind="adamw_8bit", b_rate=4.0)

    straight, optimizer = start()
    straight.train_for(optimizer, range(4))
    save_checkpoint(tmp_path, 4, straight, optimizer, {}, keep=1)
    straight.train_for(optimizer, range(4, 8))
    checkpoint, _ = find_checkpoint(tmp_path)
    assert checkpoint is not None
    resumed, other = start()
    load_checkpoint(checkpoint, resumed, other)
    resumed.train_for(other, range(4, 8))
    for name, weight in straight.named_parameters():
        assert torch.equal(resumed.get_parameter(name), weight), name
        mine, theirs = optimizer.state[weight], other.state[resumed.get_parameter(name)]
        assert mine.keys() == theirs.keys()
        assert mine["step"] == theirs["step"] == 8
        wide = weight.numel() < 4096  # bitsandbytes' default
        assert mine["state1"].dtype == (torch.float32 if wide else torch.uint8)
        for key in mine.keys() - {"step"}:
            assert torch.equal(mine[key], theirs[key]), (name, key)


@needs_bitsandbytes
def test_8_bits_follow_32() -> None:
    ends = []
    for kind in ("adamw", "adamw_8bit"):
        model = Regression()
        start = model.lora_B["default"].weight.detach().clone()
        model.train_for(build_optimizer(model.named_parameters(), 1e-2, 0.0, kind=kind), range(20))
        ends.append(model.lora_B["default"].weight.detach() - start)
    # 8 bits keep a moment to some percent: the way is the same, not the last digits.
    assert 0 < (ends[1] - ends[0]).norm() < 0.1 * ends[0].norm()


@pytest.mark.parametrize(
    ("kind", "device", "rule"),
    [
        ("paged_adamw_8bit", "cpu", "paged_adamw_8bit runs on cuda, not on cpu"),
        ("paged_adamw_8bit", "mps", "paged_adamw_8bit runs on cuda, not on mps"),
        ("adamw_8bit", "mps", "adamw_8bit runs on cuda and cpu, not on mps"),
        ("lion", "mps", "lion runs on cuda and cpu, not on mps"),
    ],
)
@needs_bitsandbytes
def test_a_device_without_kernels_is_refused(kind: str, device: str, rule: str) -> None:
    with pytest.raises(TrainingError, match=f"training.optimizer = {rule}") as caught:
        require_optimizer(kind, device)
    others = "adamw" if device == "mps" else "adamw_8bit or adamw"
    assert caught.value.hint == f"set training.optimizer={others}"


def test_only_these_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "bitsandbytes", object())
    refused = set()
    for kind in get_args(TrainingSpec.model_fields["optimizer"].annotation):
        for device in ("cpu", "cuda", "mps"):
            try:
                require_optimizer(kind, device)
            except TrainingError:
                refused.add((kind, device))
    paged = {("paged_adamw_8bit", device) for device in ("cpu", "mps")}
    assert refused == paged | {(kind, "mps") for kind in ("adamw_8bit", "lion", "lion_8bit")}


def test_bitsandbytes_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "bitsandbytes", None)
    require_optimizer("adamw", "cpu")
    with pytest.raises(TrainingError, match="needs bitsandbytes, which is not installed") as caught:
        require_optimizer("adamw_8bit", "cpu")
    assert caught.value.hint == "pip install 'alignkit[quantization]'"


@needs_bitsandbytes
@pytest.mark.parametrize("command", ["sft", "plan"])
def test_refused_before_anything_is_read(command: str, alignkit: Any, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tmp_path / "nowhere", training__optimizer="paged_adamw_8bit")
    done = alignkit(command, recipe, cwd=tmp_path)
    assert done.code == 2
    assert "runs on cuda, not on cpu" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_frozen_weights_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    held = [
        p
        for group in build_optimizer(model.named_parameters(), 1e-3, 0.0).param_groups
        for p in group["params"]
    ]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2).named_parameters(), 1e-3, 0.1)
    set_learning_rate(optimizer, 5e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 5e-5]
