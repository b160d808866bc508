"""Three adapters over one base: who is active, what is trained, and where gradients land."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import PAIRS, random_batch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch.utils.checkpoint import CheckpointError

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import has_head, save_adapter
from alignkit.models.adapters.switching import (
    POLICY,
    Role,
    add_adapter,
    add_stored_adapter,
    recompute_as_run,
    train_only,
    use_adapter,
)
from alignkit.models.rewards.head import new_head
from alignkit.models.scoring.scorer import TokenScorer
from alignkit.recipe.adapters import LoraSpec

BATCH = random_batch(PAIRS, 600)
NAMES = (POLICY, "value", "reward0")


def adapter_parameters(model: Any, name: str) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and weight of everything that belongs to one adapter, sorted by name."""
    return sorted((n, p) for n, p in model.named_parameters() if f".{name}." in n)


def fill(model: Any, name: str, seed: int) -> None:
    """Give an adapter a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for key, weight in adapter_parameters(model, name):
        if "lora_B" in key:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)


def three_adapters(dtype: torch.dtype = torch.float32) -> Any:
    """The tiny Llama with a policy and a value adapter, which train, and a frozen reward one."""
    model = attach_adapter(tiny_model(dtype=dtype), LoraSpec(rank=4, alpha=8.0), seed=1)
    for seed, name in enumerate(NAMES[1:], start=2):
        add_adapter(model, name, copy.deepcopy(model.peft_config[POLICY]), seed)
    for seed, name in enumerate(NAMES):
        fill(model, name, seed)
    train_only(model, {POLICY, "value"})
    return model


def state(model: Any) -> list[tuple[str, bool]]:
    return [
        (layer.active_adapters[0], layer.disable_adapters)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]


def trained(model: Any) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in model.named_parameters()}


def logprobs(model: Any, name: str | None) -> torch.Tensor:
    return Role(TokenScorer(model, torch.float32), name)(BATCH).logprobs


def only(name: str) -> Any:
    """A model that carries one of the three adapters alone."""
    model, whole = tiny_model(), three_adapters()
    alone = attach_adapter(model, LoraSpec(rank=4, alpha=8.0), seed=1)
    for (_, weight), (_, source) in zip(
        adapter_parameters(alone, POLICY), adapter_parameters(whole, name), strict=True
    ):
        weight.data = source.data.clone()
    return alone


# Which adapter is active


def test_blocks_nest_and_put_back() -> None:
    model = three_adapters()
    before = state(model)
    assert set(before) == {(POLICY, False)}
    assert len(before) == 14
    with use_adapter(model, "value"):
        assert set(state(model)) == {("value", False)}
        with use_adapter(model, None):
            assert {off for _, off in state(model)} == {True}
            with use_adapter(model, "reward0"):
                assert set(state(model)) == {("reward0", False)}
            assert {off for _, off in state(model)} == {True}
        assert set(state(model)) == {("value", False)}
    assert state(model) == before


@pytest.mark.parametrize("name", ["value", None])
def test_an_exception_puts_back_too(name: str | None) -> None:
    model = three_adapters()
    before = state(model)
    with pytest.raises(ZeroDivisionError), use_adapter(model, "reward0"), use_adapter(model, name):
        raise ZeroDivisionError
    assert state(model) == before


@torch.no_grad()
def test_none_is_the_bare_base_bit_for_bit() -> None:
    bare = TokenScorer(tiny_model(), torch.float32)(BATCH).logprobs
    model = three_adapters()
    assert torch.equal(logprobs(model, None), bare)
    with use_adapter(model, "value"):
        assert torch.equal(logprobs(model, None), bare)
    assert (logprobs(model, POLICY) - bare).abs().max() > 1e-2
    assert torch.equal(Role(TokenScorer(tiny_model(), torch.float32))(BATCH).logprobs, bare)


@torch.no_grad()
def test_each_role_computes_as_if_it_were_alone() -> None:
    model = three_adapters()
    found = {name: logprobs(model, name) for name in NAMES}
    for name in NAMES:
        assert torch.equal(found[name], logprobs(only(name), POLICY))
    assert (found[POLICY] - found["value"]).abs().max() > 1e-2
    assert (found[POLICY] - found["reward0"]).abs().max() > 1e-2


def test_what_is_trained_never_changes() -> None:
    model = three_adapters()
    before = trained(model)
    assert 0 < sum(before.values()) < len(before)
    for name in (*NAMES, None):
        with use_adapter(model, name):
            assert trained(model) == before
        assert trained(model) == before


# Gradients


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpointed(model: Any, guard: bool) -> Any:
    options: dict[str, Any] = {"use_reentrant": False}
    if guard:
        options["context_fn"] = recompute_as_run(model)
    model.gradient_checkpointing_enable(options)
    model.enable_input_require_grads()
    return model.train()


def backward_under(model: Any, ran: str | None, then: str | None) -> dict[str, torch.Tensor]:
    """Gradients of a forward pass under one adapter whose backward pass runs under another."""
    scorer = TokenScorer(model, torch.float32)
    with use_adapter(model, ran):
        loss = scorer(BATCH).logprobs.square().sum()
    with use_adapter(model, then):
        loss.backward()
    return gradients(model)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
        for name, value in expected.items()
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("then", [*NAMES, None], ids=str)
@pytest.mark.parametrize("ran", [POLICY, "value"])
def test_gradients_land_on_the_adapter_that_ran(
    ran: str, then: str | None, checkpointing: bool
) -> None:
    alone = backward_under(only(ran), POLICY, POLICY)
    model = three_adapters()
    if checkpointing:
        model = checkpointed(model, guard=True)
    found = backward_under(model, ran, then)
    own = {name for name, _ in adapter_parameters(model, ran)}
    assert set(found) == own
    assert len(own) == 28
    assert close({n.replace(f".{ran}.", f".{POLICY}."): g for n, g in found.items()}, alone)
    assert min(float(g.abs().max()) for g in found.values()) > 0
    assert set(state(model)) == {(POLICY, False)}  # recomputing leaves no trace


def test_two_graphs_at_once_keep_apart() -> None:
    # PPO with one pass for the policy and one for the value model, both alive in the backward pass.
    model = checkpointed(three_adapters(), guard=True)
    scorer = TokenScorer(model, torch.float32)
    losses = {}
    for name in (POLICY, "value"):
        with use_adapter(model, name):
            losses[name] = scorer(BATCH).logprobs.square().sum()
    (losses[POLICY] + losses["value"]).backward()
    found = gradients(model)
    for name in (POLICY, "value"):
        alone = backward_under(only(name), POLICY, POLICY)
        own = {n: g for n, g in found.items() if f".{name}." in n}
        assert close({n.replace(f".{name}.", f".{POLICY}."): g for n, g in own.items()}, alone)


def test_without_the_guard_checkpointing_would_go_wrong() -> None:
    # The reason for `recompute_as_run`: torch recomputes a layer as it stands in the backward pass.
    # Another adapter's activations fit in shape, so the gradients are wrong without a word.
    expected = backward_under(three_adapters(), POLICY, POLICY)
    same = backward_under(checkpointed(three_adapters(), guard=False), POLICY, POLICY)
    assert close(same, expected)
    wrong = backward_under(checkpointed(three_adapters(), guard=False), POLICY, "value")
    assert wrong.keys() == expected.keys()
    assert not close(wrong, expected)
    with pytest.raises(CheckpointError):  # with adapters off, other tensors are saved
        backward_under(checkpointed(three_adapters(), guard=False), POLICY, None)


@pytest.mark.parametrize("then", [None, POLICY], ids=str)
def test_the_bare_base_is_recomputed_bare(then: str | None) -> None:
    def input_gradient(model: Any, under: str | None) -> torch.Tensor:
        rows = []

        def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            output.requires_grad_().retain_grad()
            rows.append(output)

        model.get_input_embeddings().register_forward_hook(keep)
        assert backward_under(model, None, under) == {}
        assert rows[0].grad is not None
        return rows[0].grad

    expected = input_gradient(three_adapters(), None)
    found = input_gradient(checkpointed(three_adapters(), guard=True), then)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# Adapters from disk


def stored(
    folder: Path, head: bool = False, base: Callable[[], Any] = tiny_model, **spec: Any
) -> Any:
    """Write an adapter with a B that is not zero; the model that carries it."""
    model = base()
    whole = attach_adapter(model, LoraSpec(**{"rank": 4, "alpha": 8.0, **spec}), seed=5)
    fill(whole, POLICY, 9)
    save_adapter(whole, folder, "the/base", new_head(whole, 0) if head else None)
    return whole


@torch.no_grad()
@pytest.mark.parametrize("head", [False, True], ids=["plain", "with a head"])
@pytest.mark.parametrize("rank", [4, 2])
def test_a_stored_adapter_scores_as_where_it_was_trained(
    tmp_path: Path, head: bool, rank: int
) -> None:
    # Its rank and scale are its own; the head that may be stored with it is not its business.
    expected = logprobs(stored(tmp_path, head, rank=rank, alpha=5.0), POLICY)
    assert has_head(tmp_path) == head
    model = three_adapters()
    policy = logprobs(model, POLICY)
    add_stored_adapter(model, "reward1", tmp_path)
    assert torch.equal(logprobs(model, "reward1"), expected)
    assert torch.equal(logprobs(model, POLICY), policy)
    assert set(state(model)) == {(POLICY, False)}
    assert not any("score" in name for name, _ in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)], ids=["same layers", "more layers"])
def test_a_stored_adapter_has_no_dropout_here(tmp_path: Path, targets: Any) -> None:
    # Roles score in training mode; a reward model trained with dropout must not draw its rewards.
    expected = logprobs(stored(tmp_path, dropout=0.5).eval(), POLICY)
    model = attach_adapter(tiny_model(), LoraSpec(rank=4, targets=targets), seed=1)
    add_stored_adapter(model, "reward1", tmp_path)
    model.train()
    torch.testing.assert_close(logprobs(model, "reward1"), expected, rtol=1e-5, atol=1e-5)


def damage(folder: Path, kind: str) -> None:
    """Make a stored adapter one that does not fit."""
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights, values = load_file(path), json.loads(config.read_text())
    first = next(name for name in weights if "lora_A" in name)
    if kind == "another rank":
        values["r"] = 3
    elif kind == "another shape":
        weights[first] = weights[first][:, :-1].contiguous()
    elif kind == "a weight too few":
        del weights[first]
    elif kind == "a weight too many":
        weights[first.replace("layers.0", "layers.7")] = weights[first].clone()
    else:
        values["target_modules"] = ["nowhere"]
    save_file(weights, path)
    config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "kind",
    ["another rank", "another shape", "a weight too few", "a weight too many", "no such layer"],
)
def test_an_adapter_that_does_not_fit(tmp_path: Path, kind: str) -> None:
    stored(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(ModelError) as raised:
        add_stored_adapter(three_adapters(), "reward1", tmp_path)
    assert f"the adapter in {tmp_path} does not fit the base" in raised.value.message
    assert "same base" in raised.value.hint


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 32}, {"num_hidden_layers": 3}],
    ids=["narrower", "deeper"],
)
def test_an_adapter_of_another_base(tmp_path: Path, fields: dict[str, int]) -> None:
    stored(tmp_path, base=lambda: tiny_model(**fields))
    with pytest.raises(ModelError, match="does not fit the base"):
        add_stored_adapter(three_adapters(), "reward1", tmp_path)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        add_stored_adapter(three_adapters(), "reward1", tmp_path)


# What is trained


@pytest.mark.parametrize(
    "names",
    [{POLICY}, {"value"}, {POLICY, "reward0"}, set()],
    ids=lambda names: "+".join(sorted(names)) or "none",
)
def test_train_only_trains_the_named(names: set[str]) -> None:
    model = three_adapters()
    train_only(model, names)
    expected = {name for one in names for name, _ in adapter_parameters(model, one)}
    assert {name for name, on in trained(model).items() if on} == expected
    assert len(expected) == 28 * len(names)


def test_a_stored_adapter_is_frozen_by_train_only(tmp_path: Path) -> None:
    stored(tmp_path)
    model = three_adapters()
    add_stored_adapter(model, "reward1", tmp_path)
    train_only(model, {POLICY})
    on = {name for name, is_on in trained(model).items() if is_on}
    assert on == {name for name, _ in adapter_parameters(model, POLICY)}


def test_adapters_are_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    stored(tmp_path)
    model = three_adapters(torch.bfloat16)
    add_stored_adapter(model, "reward1", tmp_path)
    dtypes = {name: {p.dtype for _, p in adapter_parameters(model, name)} for name in NAMES}
    dtypes["reward1"] = {p.dtype for _, p in adapter_parameters(model, "reward1")}
    assert dtypes == {name: {torch.float32} for name in (*NAMES, "reward1")}
    rest = {p.dtype for n, p in model.named_parameters() if "lora_" not in n}
    assert rest == {torch.bfloat16}


def test_the_seed_draws_a_further_adapter_and_it_starts_at_nothing() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = attach_adapter(tiny_model(), LoraSpec(rank=2), seed=1)
        config: LoraConfig = copy.deepcopy(model.peft_config[POLICY])
        torch.rand(3)
        add_adapter(model, "value", config, seed)
        with torch.no_grad():
            assert torch.equal(logprobs(model, "value"), logprobs(model, None))
        return dict(adapter_parameters(model, "value"))

    one, two, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
