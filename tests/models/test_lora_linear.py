"""The one-function LoRA product against PEFT's own forward, in float32.

Both compute x Wᵀ + b + s (x Aᵀ) Bᵀ; sums in another order differ by some 1e-7.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn

from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.models.kernels import lora as lora_linear
from alignkit.models.kernels.factors import fixed_factors
from alignkit.models.kernels.lora import use_fast_lora
from alignkit.recipe.adapters import LoraSpec


class Pair(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20, bias=bias)
        self.down = nn.Linear(20, 9, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(bias: bool = True, fast: bool = True, **options: Any) -> Any:
    """A small PEFT model with random A and B."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **options})
    model = get_peft_model(Pair(bias), config)
    randomise(model)
    if fast:
        use_fast_lora(model)
    return model


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)


def outcome(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradient of the input and of every trained weight."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    output = model(x)
    factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * factors).sum().backward()
    found = {"output": output.detach(), "input": x.grad}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        error = float((found[name] - value).detach().norm() / value.detach().norm())
        assert error < 1e-6, f"{name} differs by {error:.1g} of its size"


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over r", "alpha over root r"])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_fast_equals_peft(bias: bool, shape: tuple[int, ...], rslora: bool) -> None:
    fast, slow = (adapted(bias, fast=f, use_rslora=rslora) for f in (True, False))
    assert fast.base_model.model.up.__dict__.keys() >= {"forward"}
    assert "forward" not in slow.base_model.model.up.__dict__
    found, expected = outcome(fast, sample(*shape)), outcome(slow, sample(*shape))
    assert_same(found, expected)
    assert sum("lora_" in name for name in found) == 4
    assert all(float(found[name].norm()) > 0 for name in found)


def test_the_product_in_closed_form() -> None:
    # W = [[1, 2]], b = 0.5, A = [[3, 4]], B = [[5]], s = alpha / r = 6.
    # x = (1, 1): W x + b = 3.5, A x = 7, s B A x = 210, y = 213.5.
    # dy/dx = W + s B A = (1 + 90, 2 + 120); dy/dA = s B x = (30, 30); dy/dB = s A x = 42.
    layer = nn.Module()
    layer.only = nn.Linear(2, 1)
    layer.forward = lambda x: layer.only(x)
    model = get_peft_model(layer, LoraConfig(r=1, lora_alpha=6, target_modules=["only"]))
    module = model.base_model.model.only
    with torch.no_grad():
        module.base_layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        module.base_layer.bias.fill_(0.5)
        module.lora_A["default"].weight.copy_(torch.tensor([[3.0, 4.0]]))
        module.lora_B["default"].weight.fill_(5.0)
    assert use_fast_lora(model) == 1
    x = torch.ones(1, 2, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.item() == 213.5
    assert x.grad is not None
    assert x.grad.tolist() == [[91.0, 122.0]]
    assert module.lora_A["default"].weight.grad.tolist() == [[30.0, 30.0]]
    assert module.lora_B["default"].weight.grad.tolist() == [[42.0]]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"lora_dropout": 0.5}, 0),
        ({"use_dora": True}, 0),
        ({"lora_bias": True}, 0),
        ({"target_modules": ["up"]}, 1),
    ],
    ids=["plain", "dropout", "dora", "lora bias", "one target"],
)
def test_which_layers_are_fast(options: dict[str, Any], count: int) -> None:
    assert use_fast_lora(adapted(fast=False, **options)) == count


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=["dropout", "dora"]
)
def test_other_kinds_keep_pefts_code(options: dict[str, Any]) -> None:
    fast, slow = adapted(**options), adapted(fast=False, **options)
    found = []
    for model in (fast, slow):
        torch.manual_seed(3)  # of the dropout
        found.append(outcome(model.train(), sample(5)))
    assert_same(*found)


def test_trained_base_weights_keep_pefts_code() -> None:
    model = adapted(fast=False)
    model.base_model.model.up.base_layer.weight.requires_grad_(True)
    assert use_fast_lora(model) == 1


@pytest.mark.parametrize("state", ["disabled", "merged", "two adapters", "other adapter"])
def test_other_states_use_pefts_code(state: str) -> None:
    found = []
    for fast in (True, False):
        model = adapted(fast=fast)
        if state == "disabled":
            with model.disable_adapter():
                found.append({"output": model(sample(5))})
            continue
        if state == "merged":
            model.merge_adapter()
        if state in ("two adapters", "other adapter"):
            config = LoraConfig(r=2, lora_alpha=1, target_modules=["up"])
            model.add_adapter("second", config)
            randomise(model)
            names = ["default", "second"] if state == "two adapters" else ["second"]
            model.base_model.set_adapter(names)
        found.append(outcome(model, sample(5)))
    assert_same(*found)
    plain = outcome(adapted(), sample(5))["output"]
    moved = float((found[0]["output"] - plain).abs().max())
    assert (moved < 1e-5) == (state == "merged")


def test_bfloat16_weights_take_float32_adapters() -> None:
    # PEFT multiplies a float32 copy; here A and B are rounded for the product. 8 bits of
    # precision: 1% of the size of the output.
    fast, slow = adapted(), adapted(fast=False)
    for model in (fast, slow):
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.shape[0] in (20, 9):
                module.to(torch.bfloat16) if "lora" not in str(type(module)) else None
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    x = sample(6).to(torch.bfloat16)
    module = fast.base_model.model.up
    output = module(x)
    assert output.dtype == torch.bfloat16
    expected = slow.base_model.model.up(x)
    assert float((output - expected).detach().norm() / expected.detach().norm()) < 0.01
    output.float().sum().backward()
    assert module.lora_A["default"].weight.grad.dtype == torch.float32


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    before = model(sample(4))
    assert (twin(sample(4)) - before).abs().max() > 1e-3


def test_files_are_those_of_peft(tmp_path: Path) -> None:
    model = attach_adapter(tiny_model(), LoraSpec(rank=4, alpha=8.0), seed=3)
    randomise(model)
    save_adapter(model, tmp_path / "ours", "some/base")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text(encoding="utf-8"))
        for name in ("ours", "theirs")
    ]
    configs[1]["base_model_name_or_path"] = "some/base"
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]

    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "ours"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = (one.double().eval()(ids).logits for one in (loaded, model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("grad", [True, False])
def test_every_forward_sees_what_the_optimizer_has_changed(grad: bool) -> None:
    """A fused optimizer changes weights without raising their version: nothing may be kept."""
    model = adapted().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)).bfloat16()
    outputs = []
    for _ in range(3):
        with torch.set_grad_enabled(grad):
            outputs.append(model(x).detach())
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_fixed_factors_are_those_of_each_adapter_until_the_end() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    randomise(model)
    use_fast_lora(model)
    x = torch.randn(3, 12)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(x).detach()
    assert not torch.equal(expected["default"], expected["other"])
    with torch.no_grad(), fixed_factors(model):
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert torch.equal(model(x), expected[name])
    weight = model.base_model.model.up.lora_B["default"].weight
    with torch.no_grad():
        weight += 1.0
        assert not torch.equal(model(x), expected["default"])
        with fixed_factors(model):
            model(x)
        weight -= 1.0
        torch.testing.assert_close(model(x), expected["default"])


# Layers that read the same input


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 20, bias=True)
        self.k_proj = nn.Linear(12, 8, bias=False)
        self.v_proj = nn.Linear(12, 8, bias=True)
        self.other: torch.Tensor | None = None  # what keys are read from instead

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q_proj(x), self.k_proj(x if self.other is None else self.other)
        return torch.cat([q, torch.tanh(k) * self.v_proj(x)], dim=-1)


def attending(fast: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj"]
    model = get_peft_model(
        Attention(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names, **options})
    )
    randomise(model)
    if fast:
        use_fast_lora(model)
    return model


def inner(model: Any) -> Attention:
    return model.base_model.model


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers of every product."""
    found: list[int] = []
    right = lora_linear._products

    def counted(x: torch.Tensor, layers: Any, narrow: Any) -> Any:
        found.append(len(layers))
        return right(x, layers, narrow)

    monkeypatch.setattr(lora_linear, "_products", counted)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3]),
        ({"rank_pattern": {"k_proj": 2, "v_proj": 7}, "alpha_pattern": {"k_proj": 9}}, [3]),
        ({"target_modules": ["q_proj", "v_proj"]}, [2]),
        ({"target_modules": ["k_proj", "v_proj"]}, [2]),
        ({"target_modules": ["v_proj"]}, [1]),
    ],
    ids=["all", "own ranks and scales", "without keys", "without queries", "one"],
)
def test_layers_of_one_input_are_one_product(
    options: dict[str, Any], expected: list[int], sizes: list[int]
) -> None:
    fast, slow = attending(**options), attending(fast=False, **options)
    assert_same(outcome(fast, sample(2, 7)), outcome(slow, sample(2, 7)))
    assert sizes == expected
    with torch.no_grad():
        torch.testing.assert_close(fast(sample(5)), slow(sample(5)))
    assert sizes == expected * 2
    assert inner(fast).v_proj.readers.outputs == {}  # nothing is held between passes
    assert inner(fast).v_proj.readers.input is None


def test_a_layer_with_another_input_computes_alone(sizes: list[int]) -> None:
    found = []
    for model in (attending(), attending(fast=False)):
        inner(model).other = sample(5) + 1.0
        found.append(outcome(model, sample(5)))
    assert_same(*found)
    assert sizes == [3, 1]


@pytest.mark.parametrize("change", ["weights", "gradients", "adapter"])
def test_what_was_computed_ahead_is_not_used_after_a_change(change: str) -> None:
    model, x = attending(), sample(5)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    randomise(model)
    use_fast_lora(model)
    slow = copy.deepcopy(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        del getattr(inner(slow), name).forward
    with torch.no_grad():
        inner(model).q_proj(x)  # and nobody asks for the others
    for one in (model, slow):
        if change == "adapter":
            one.set_adapter("second")
        if change == "weights":
            with torch.no_grad():
                inner(one).k_proj.lora_B["default"].weight.mul_(2.0)
    if change == "weights":
        inner(model).q_proj(x)
    found = inner(model).k_proj(x)
    assert found.requires_grad
    torch.testing.assert_close(found, inner(slow).k_proj(x))


def test_a_layer_in_another_state_computes_alone(sizes: list[int]) -> None:
    found = []
    for model in (attending(), attending(fast=False)):
        inner(model).k_proj.enable_adapters(False)
        inner(model).v_proj.merge()
        found.append({"output": model(sample(5)).detach()})
    assert_same(*found)
    assert sizes == [1]


def test_checkpointed_layers_compute_together_again(sizes: list[int]) -> None:
    found = []
    for checkpointed in (False, True):
        model = attach_adapter(tiny_model(), LoraSpec(rank=4, alpha=8.0), seed=3)
        randomise(model)
        model.train()
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(torch.arange(20)[None]).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)
    once = [3, 1, 2, 1] * 2
    assert sizes[: len(once)] == once
    assert sorted(sizes[len(once) :]) == sorted(once * 2)
    layer = model.get_base_model().model.layers[0]
    assert layer.self_attn.q_proj.readers.outputs == {}
    assert layer.mlp.up_proj.readers.outputs == {}
