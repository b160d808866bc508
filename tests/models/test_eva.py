"""EVA's start against the decomposition of recorded inputs, and against PEFT on padded rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from documents import random_documents
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from tiny import tiny_model
from torch import nn

from alignkit.data.documents import Document
from alignkit.data.packing import pack_documents
from alignkit.errors import ModelError
from alignkit.models.adapters.attach import adapters_off, attach_adapter, trainable_report
from alignkit.models.adapters.eva import (
    EvaStart,
    costliest_ranks,
    find_start,
    followed_directions,
    with_ranks,
)
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.adapters.targets import adapted_layers, layer_ranks
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import Scorer, TokenScorer
from alignkit.packed import PackedBatch
from alignkit.recipe.adapters import EvaSpec, LoraSpec

IDS = torch.arange(50, 90)[None]
SHAPES = ((9, (31,)), (30, (12, 17)), (0, (40,)), (25, (26,)))
EXACT = EvaSpec(rho=1.0, tau=1.0)
"""No layer is ever left before the last row."""


def model_like_trained(**fields: Any) -> Any:
    """A tiny model whose inputs vary much along few directions and little along most."""
    model = tiny_model(**fields)
    with torch.no_grad():
        model.get_input_embeddings().weight *= torch.logspace(0, -3, 64)
    return model


@functools.cache
def documents(count: int = 40, seed: int = 0) -> list[Document]:
    shapes = tuple(SHAPES[number % len(SHAPES)] for number in range(count))
    return random_documents(shapes, 700, seed)


def packed(rows: Sequence[Document], size: int) -> list[PackedBatch]:
    return [pack_documents(rows[i : i + size]) for i in range(0, len(rows), size)]


def start_of(
    spec: LoraSpec, batches: Sequence[PackedBatch], model: Any = None, scorer: Any = TokenScorer
) -> EvaStart:
    model = model_like_trained() if model is None else model
    made: Scorer = scorer(model, torch.float32)
    return find_start(made, adapted_layers(model, spec), spec, batches)


def recorded(model: Any, rows: Sequence[Document], *, targets: bool) -> dict[str, torch.Tensor]:
    """Name of each linear layer -> float64 inputs, each sequence of each row run by itself."""
    found: dict[str, list[torch.Tensor]] = {}
    wanted = torch.tensor([])

    def keep(name: str) -> Any:
        return lambda module, args: found.setdefault(name, []).append(args[0][0][wanted].double())

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for row in rows:
            for branch in row.branches:
                ids = torch.from_numpy(row.prompt).tolist() + torch.from_numpy(branch.ids).tolist()
                before = torch.arange(len(branch.ids))[branch.trained] + len(row.prompt) - 1
                wanted = before if targets else torch.arange(len(ids))
                model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def turned(one: torch.Tensor, two: torch.Tensor) -> float:
    """Sine of the largest angle between the spaces that orthonormal rows span."""
    return float(1 - torch.linalg.svdvals(one.double() @ two.double().T)[-1] ** 2) ** 0.5


def variance(x: torch.Tensor, a: torch.Tensor) -> float:
    """Of centred inputs along the rows of A."""
    return float(((x - x.mean(0)) @ a.double().T).square().sum())


@pytest.mark.parametrize("scorer", [TokenScorer, PaddedScorer])
@pytest.mark.parametrize("targets", [True, False])
def test_a_is_the_decomposition_of_what_the_layers_read(targets: bool, scorer: Any) -> None:
    spec = LoraSpec(rank=4, init="eva", eva=EXACT.model_copy(update={"use_label_mask": targets}))
    start = start_of(spec, packed(documents(), 5), scorer=scorer)
    inputs = recorded(model_like_trained(), documents(), targets=targets)
    assert len(start.factors) == 14
    assert start.used == len(inputs["model.layers.0.self_attn.q_proj"])
    for name, a in start.factors.items():
        x = inputs[name]
        values = torch.linalg.svdvals(x - x.mean(0))
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
        # Of what was read only 4 directions are kept from one pass to the next, which loses most
        # where further ones matter as much, as in these random layers.
        assert variance(x, a) > 0.93 * float(values[:4].square().sum()), name


def test_one_pass_loses_nothing() -> None:
    start = start_of(LoraSpec(rank=4, init="eva", eva=EXACT), packed(documents(), 40))
    inputs = recorded(model_like_trained(), documents(), targets=True)
    for name, a in start.factors.items():
        x = inputs[name]
        _, values, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        assert variance(x, a) > 0.995 * float(values[:4].square().sum()), name
        # Where no gap follows the fourth direction, its neighbours are as good: random ones of 64
        # would have a sine of nearly 1.
        assert turned(a, right[:4]) < (0.06 if "o_proj" in name else 0.2), name
    # As many as the fast decomposition of 64 inputs can follow, which is exact then.
    spec = LoraSpec(rank=32, init="eva", eva=EXACT, targets=("q_proj",))
    for name, a in start_of(spec, packed(documents(), 40)).factors.items():
        x = inputs[name]
        right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
        assert turned(a, right[:32]) < 2e-3, name
        # The mean is no direction of variance.
        assert turned(a, torch.linalg.svd(x, full_matrices=False)[2][:32]) > 5e-3, name


def padded(rows: Sequence[Document]) -> dict[str, torch.Tensor]:
    """A batch as PEFT's own functions for language models read it: labels mark what counts."""
    pairs = [(row, branch) for row in rows for branch in row.branches]
    width = max(len(row.prompt) + len(branch.ids) for row, branch in pairs)
    ids, mask = torch.zeros(len(pairs), width, dtype=torch.long), torch.zeros(len(pairs), width)
    labels = torch.full_like(ids, -100)
    for number, (row, branch) in enumerate(pairs):
        whole = torch.tensor([*row.prompt.tolist(), *branch.ids.tolist()])
        ids[number, : len(whole)] = whole
        mask[number, : len(whole)] = 1
        # PEFT looks at a trained token's own place: the state before is the one that predicts it.
        before = torch.arange(len(branch.ids))[branch.trained] + len(row.prompt) - 1
        labels[number, before] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize(("rho", "pattern"), [(1.0, {}), (2.0, {}), (2.0, {"down_proj": 2})])
def test_it_is_peft_s(rho: float, pattern: dict[str, int], tau: float) -> None:
    spec = LoraSpec(rank=4, init="eva", eva=EvaSpec(rho=rho, tau=tau), rank_pattern=pattern)
    rows = documents(240)
    ours = start_of(spec, packed(rows, 40))
    assert ours.unsettled == ()
    model = model_like_trained()
    config = LoraConfig(
        r=4,
        target_modules=list(adapted_layers(model, spec)),
        rank_pattern=pattern,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=tau),
    )
    loader = [padded(rows[i : i + 40]) for i in range(0, len(rows), 40)]
    theirs = get_eva_state_dict(model, loader, config, show_progress_bar=False)
    assert ours.ranks == {name: len(a) for name, a in theirs.items()}
    assert (len(set(ours.ranks.values())) > 2) == (rho > 1)
    for name, a in ours.factors.items():
        torch.testing.assert_close(a, theirs[name].float(), rtol=0, atol=1e-3)


def test_patterns() -> None:
    # With rho = 1 no rank moves: PEFT alone would level q, k and v, which read the same.
    spec = LoraSpec(rank=4, init="eva", eva=EXACT, rank_pattern={"q_proj": 2, "layers.0.*": 3})
    layers = adapted_layers(tiny_model(), spec)
    start = start_of(spec, packed(documents(), 8))
    assert start.ranks == layer_ranks(layers, spec)
    for part in ("k_proj", "v_proj"):
        name = "model.layers.1.self_attn."
        assert torch.equal(start.factors[f"{name}q_proj"], start.factors[f"{name}{part}"][:2])
    moving = spec.model_copy(update={"eva": EvaSpec(rho=2.0)})
    ranks = start_of(moving, packed(documents(), 8)).ranks
    assert sum(ranks.values()) == sum(start.ranks.values())
    assert max(ranks.values()) <= followed_directions(layers, moving) == 8


def test_more_directions_than_a_layer_has() -> None:
    # Keys and values have 32 outputs, and of 64 inputs the fast decomposition follows 32.
    for rho, rank, hint in ((16.5, 2, "lower adapter.eva.rho or"), (1.0, 33, "lower the rank")):
        spec = LoraSpec(rank=rank, init="eva", eva=EvaSpec(rho=rho), targets=("k_proj",))
        layers = adapted_layers(tiny_model(), spec.model_copy(update={"rank": 1}))
        with pytest.raises(
            ModelError, match=f"{round(rho * rank)} directions .* 32 is the mo"
        ) as e:
            followed_directions(layers, spec)
        assert hint in str(e.value.hint)
    allowed = LoraSpec(rank=2, init="eva", eva=EvaSpec(rho=16.0))
    assert followed_directions(adapted_layers(tiny_model(), allowed), allowed) == 32
    too_much = allowed.model_copy(update={"eva": EvaSpec(rho=17.0)})
    with pytest.raises(ModelError, match="34 directions"):
        measure_model(tiny_model().config, too_much)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def attached(spec: LoraSpec, ranks: dict[str, int] | None = None) -> tuple[Any, EvaStart, LoraSpec]:
    start = start_of(spec, packed(documents(), 8))
    factors = {f"{name}.weight": a for name, a in start.factors.items()}
    model = tiny_model()
    if ranks is not None:
        factors = {f"{n}.weight": start.factors[n][:rank] for n, rank in ranks.items() if rank}
    made = with_ranks(model, spec, start.ranks if ranks is None else ranks)
    return attach_adapter(model, made, 0, initial=factors.__getitem__), start, made


@pytest.mark.parametrize("fields", [{}, {"rslora": True}, {"alpha_pattern": {"up_proj": 3.0}}])
def test_it_starts_as_no_update_at_the_scale_of_the_recipe(fields: dict[str, Any]) -> None:
    spec = LoraSpec(rank=4, alpha=8.0, init="eva", eva=EvaSpec(rho=2.0), **fields)
    model, start, _ = attached(spec)
    plain = attach_adapter(tiny_model(), spec.model_copy(update={"init": "default"}), 0)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    with adapters_off(model):
        off = logits(model)
    torch.testing.assert_close(logits(model), off, rtol=0, atol=0)
    usual = {n: m for n, m in plain.named_modules() if isinstance(m, LoraLayer)}
    moved = 0
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            short = name.removeprefix("base_model.model.")
            assert torch.equal(layer.lora_A["default"].weight, start.factors[short])
            assert not layer.lora_B["default"].weight.any()
            assert layer.lora_A["default"].weight.dtype == torch.float32
            assert layer.scaling["default"] == pytest.approx(usual[name].scaling["default"])
            moved += layer.r["default"] != 4
    assert moved


def test_layers_without_a_rank_are_left_alone(tmp_path: Any) -> None:
    spec = LoraSpec(rank=4, init="eva", eva=EXACT)
    ranks = dict.fromkeys(adapted_layers(tiny_model(), spec), 4)
    ranks["model.layers.0.self_attn.k_proj"] = 0
    ranks["model.layers.1.mlp.up_proj"] = 2
    model, _, made = attached(spec, ranks)
    adapted = {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert adapted == {name: rank for name, rank in ranks.items() if rank}
    assert made.targets == tuple(adapted)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)
    found = {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in read.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert found == adapted


@pytest.mark.parametrize("rho", [1.0, 1.5, 4.0])
def test_the_plan_counts_no_less_than_is_trained(rho: float) -> None:
    spec = LoraSpec(rank=4, init="eva", eva=EvaSpec(rho=rho))
    model, _, _ = attached(spec)
    facts = measure_model(tiny_model().config, spec)
    trained = trainable_report(model).trainable
    assert facts.at_most == (rho > 1)
    assert trained <= facts.trainable if rho > 1 else trained == facts.trainable
    plain = measure_model(tiny_model().config, spec.model_copy(update={"init": "default"}))
    assert not plain.at_most
    assert (facts.trainable > plain.trainable) == (rho > 1)
    layers = adapted_layers(tiny_model(), spec)
    ranks = costliest_ranks(layers, spec)
    assert sum(ranks.values()) == 4 * len(layers)
    assert max(ranks.values()) <= followed_directions(layers, spec)


def test_settled_layers_are_left_and_the_rest_is_named() -> None:
    batches = packed(documents(240), 12)
    loose = start_of(LoraSpec(rank=2, init="eva", eva=EvaSpec(rho=1.0, tau=0.3)), batches)
    assert loose.unsettled == ()
    assert loose.rows < 240
    assert loose.read == sum(batch.num_tokens for batch in batches[: loose.rows // 12])
    strict = start_of(LoraSpec(rank=2, init="eva", eva=EvaSpec(rho=1.0, tau=1.0)), batches)
    assert strict.rows == 240
    assert strict.read == sum(batch.num_tokens for batch in batches)
    assert "model.layers.1.mlp.down_proj" in strict.unsettled


def test_how_documents_are_packed_does_not_matter() -> None:
    # A start that prompts share is computed once, and counts for each of them.
    first = documents(8, 5)
    prompt = first[1].prompt
    alike = [Document(prompt, (d.branches[0],), n) for n, d in enumerate(first)]
    together = pack_documents(alike)
    assert together.num_tokens < sum(d.num_tokens for d in alike)
    for targets in (True, False):
        eva = EXACT.model_copy(update={"use_label_mask": targets})
        spec = LoraSpec(rank=4, init="eva", eva=eva)
        start = start_of(spec, [together])
        inputs = recorded(model_like_trained(), alike, targets=targets)
        for name, a in start.factors.items():
            x = inputs[name]
            assert start.used == len(x)
            values = torch.linalg.svdvals(x - x.mean(0))
            assert variance(x, a) > 0.995 * float(values[:4].square().sum()), name


def test_inputs_that_do_not_vary() -> None:
    row = random_documents(((0, (60,)),), 1, 0)  # one token, so the first layer reads one vector
    start = start_of(LoraSpec(rank=8, init="eva", eva=EXACT), packed(row, 1))
    for a in start.factors.values():  # arbitrary directions are still directions
        torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-4)


def test_inputs_that_are_not_finite() -> None:
    model = model_like_trained()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"input of .*layers\.1\.self_attn\.q_proj is not finite"):
        start_of(LoraSpec(rank=2, init="eva"), packed(documents(), 8), model)


def test_a_head_that_is_not_called_is_refused() -> None:
    spec = LoraSpec(rank=2, init="eva", targets=("q_proj", "lm_head"))
    with pytest.raises(ModelError, match="lm_head is not called as a layer"):
        start_of(spec, packed(documents(), 8))


def test_without_rows_there_is_no_start() -> None:
    with pytest.raises(ModelError, match="needs the rows of a run"):
        attach_adapter(tiny_model(), LoraSpec(init="eva"), 0)


def test_the_base_is_left_as_it_was() -> None:
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    start_of(LoraSpec(rank=2, init="eva"), packed(documents(), 8), model)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
