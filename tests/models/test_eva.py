"""EVA's start against the decomposition of recorded inputs, and against PEFT's own."""

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
from alignkit.models.adapters.eva import EvaStart, find_start
from alignkit.models.adapters.ranks import costliest_ranks, largest_ranks, shared_ranks, with_ranks
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.adapters.targets import adapted_layers, layer_ranks
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import Scorer, TokenScorer
from alignkit.packed import PackedBatch
from alignkit.recipe.adapters import EvaSpec, LoraSpec, eva_of

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
    layers = adapted_layers(model, spec)
    budget = sum(layer_ranks(layers, spec).values())
    made: Scorer = scorer(model, torch.float32)
    return find_start(made, layers, largest_ranks(layers, spec), budget, batches, eva_of(spec))


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
    # Too many for the fast decomposition of 64 inputs: the plain one takes its place.
    spec = LoraSpec(rank=40, init="eva", eva=EXACT, targets=("q_proj",))
    for name, a in start_of(spec, packed(documents(), 40)).factors.items():
        x = inputs[name]
        right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
        assert turned(a, right[:40]) < 2e-3, name
        # The mean is no direction of variance.
        assert turned(a, torch.linalg.svd(x, full_matrices=False)[2][:40]) > 5e-3, name


class _Batch:
    """A batch as PEFT wants its data: it moves it to the device."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch

    def to(self, device: Any) -> _Batch:
        return self


@pytest.mark.parametrize(("rho", "pattern"), [(1.0, {}), (2.0, {}), (2.0, {"down_proj": 2})])
def test_it_is_peft_s(rho: float, pattern: dict[str, int]) -> None:
    # PEFT goes round until every layer has settled. Here that is after two passes for both: its
    # cosines know a sign, and ours do not.
    spec = LoraSpec(rank=4, init="eva", eva=EvaSpec(rho=rho, tau=0.0), rank_pattern=pattern)
    batches = packed(documents(160), 80)
    ours = start_of(spec, batches)
    model = model_like_trained()
    scorer, passes = TokenScorer(model, torch.float32), []
    config = LoraConfig(
        r=4,
        target_modules=list(adapted_layers(model, spec)),
        rank_pattern=pattern,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    config.eva_config.tau = -2.0

    def forward(model: Any, inputs: Any) -> None:
        passes.append(inputs)
        scorer(inputs.batch)

    theirs = get_eva_state_dict(
        model,
        [_Batch(batch) for batch in batches],
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=lambda inputs, config: torch.from_numpy(inputs.batch.target_rows),
        prepare_layer_inputs_fn=lambda x, rows, name: x[0][0][rows],
        show_progress_bar=False,
    )
    assert len(passes) == 1 + 2  # the first one only finds equal inputs
    assert (ours.rows, ours.unsettled) == (160, {})
    assert (len(set(ours.ranks.values())) > 2) == (rho > 1)
    inputs = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
    inputs += (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    for layer in ("model.layers.0", "model.layers.1"):
        for names in inputs:
            # Layers that read the same explain the same; which of them gets the last rank is free.
            found = [[each[f"{layer}.{n}"] for n in names] for each in (ours.ranks, theirs)]
            assert sorted(found[0]) == sorted(len(a) for a in found[1])
    for name, a in ours.factors.items():
        rows = min(len(a), len(theirs[name]))
        torch.testing.assert_close(a[:rows], theirs[name][:rows].float(), rtol=0, atol=1e-4)


def test_no_layer_is_above_its_own_limit() -> None:
    # q, k and v read the same, and still keep their own ranks: PEFT would level them.
    spec = LoraSpec(rank=4, init="eva", eva=EXACT, rank_pattern={"q_proj": 2, "layers.0.*": 3})
    start = start_of(spec, packed(documents(), 8))
    assert start.ranks == layer_ranks(adapted_layers(tiny_model(), spec), spec)
    for part in ("k_proj", "v_proj"):
        name = "model.layers.1.self_attn."
        assert torch.equal(start.factors[f"{name}q_proj"], start.factors[f"{name}{part}"][:2])
    wide = LoraSpec(rank=4, init="eva", eva=EvaSpec(rho=64.0))
    layers = adapted_layers(tiny_model(), wide)
    assert set(largest_ranks(layers, wide).values()) == {64, 32}  # k and v have 32 outputs


def test_ranks_go_where_they_explain_most() -> None:
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.1]),
        "b": torch.tensor([0.4, 0.05, 0.01]),
        "c": torch.tensor([0.02, 0.01, 0.0]),
    }
    most = {"a": 3, "b": 3, "c": 3}
    assert shared_ranks(shares, most, 3) == {"a": 2, "b": 1, "c": 0}
    assert shared_ranks(shares, most, 5) == {"a": 3, "b": 2, "c": 0}
    assert shared_ranks(shares, {"a": 1, "b": 3, "c": 3}, 3) == {"a": 1, "b": 2, "c": 0}
    assert shared_ranks(shares, most, 9) == most
    equal = dict.fromkeys("ab", torch.tensor([0.5, 0.1]))
    assert shared_ranks(equal, {"a": 2, "b": 2}, 3) == {"a": 2, "b": 1}


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
    return attach_adapter(model, made, 0, given=factors.__getitem__), start, made


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
    assert all(ranks[name] <= most for name, most in largest_ranks(layers, spec).items())


def test_settled_layers_are_left_and_the_rest_is_named() -> None:
    batches = packed(documents(240), 12)
    loose = start_of(LoraSpec(rank=2, init="eva", eva=EvaSpec(rho=1.0, tau=0.3)), batches)
    assert not loose.unsettled
    assert loose.rows < 240
    strict = start_of(LoraSpec(rank=2, init="eva", eva=EvaSpec(rho=1.0, tau=1.0)), batches)
    assert strict.rows == 240
    assert strict.read == sum(batch.num_tokens for batch in batches)
    assert strict.unsettled
    assert all(0 <= cosine < 1 for cosine in strict.unsettled.values())


def test_few_states_wait_for_more() -> None:
    # 8 directions want 16 states at once; rows that bring 5 each are taken in together.
    short = random_documents(tuple((20, (5,)) for _ in range(30)), 700, 4)
    spec = LoraSpec(rank=8, init="eva", eva=EXACT)
    one = start_of(spec, packed(short, 1))
    trained = sum(int(b.trained.sum()) for d in short for b in d.branches)
    assert trained - 8 < one.used <= trained
    assert len(one.factors) == 14
    with pytest.raises(ModelError, match=r"wants 8 directions .* have \d states that predict"):
        start_of(spec, packed(short[:1], 1))
    everything = EXACT.model_copy(update={"use_label_mask": False})
    start_of(spec.model_copy(update={"eva": everything}), packed(short[:1], 1))


def test_what_has_settled_is_not_read_halfway() -> None:
    """Rows of few states wait for each other, while some layers have settled and others have not.

    A layer that is watched from the second of them on would learn from too few states.
    """
    short = random_documents(tuple((20, (12 if n % 2 else 5,)) for n in range(40)), 700, 4)
    for documents_in_turn in (short, short[1:]):  # 5 of the states that come later are too few
        spec = LoraSpec(rank=8, init="eva", eva=EvaSpec(tau=0.8))
        start = start_of(spec, packed(documents_in_turn, 1))
        assert not start.unsettled
        assert 6 < start.rows < 39


def test_too_few_states_for_a_rank_say_what_to_raise() -> None:
    rows = packed(random_documents(((20, (5,)),), 700, 4), 1)
    for limit, hint in ((10, "raise adapter.eva.max_tokens"), (1000, "give more rows")):
        spec = LoraSpec(rank=8, init="eva", eva=EvaSpec(max_tokens=limit))
        with pytest.raises(ModelError, match="wants 8 directions") as caught:
            start_of(spec, rows)
        assert hint in str(caught.value.hint)


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
    row = random_documents(((0, (60,)),), 3, 0)  # three different tokens
    spec = LoraSpec(rank=8, init="eva", eva=EXACT)
    start = start_of(spec, packed(row, 1))
    assert "model.layers.0.self_attn.q_proj" in start.narrow
    assert "model.layers.1.mlp.down_proj" not in start.narrow
    one = random_documents(((0, (60,)),), 1, 0)  # one token, so the first layer reads one vector
    with pytest.raises(
        ModelError, match=r"what model\.layers\.0\.self_attn\.q_proj reads: it does"
    ):
        start_of(spec, packed(one, 1))


def test_a_head_that_is_not_called_is_refused() -> None:
    spec = LoraSpec(rank=2, init="eva", targets=("q_proj", "lm_head"))
    with pytest.raises(ModelError, match="lm_head is not called as a layer"):
        start_of(spec, packed(documents(), 8))


def test_without_rows_there_is_no_start() -> None:
    with pytest.raises(ModelError, match="found from the rows of a run"):
        attach_adapter(tiny_model(), LoraSpec(init="eva"), 0)


def test_the_base_is_left_as_it_was() -> None:
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    start_of(LoraSpec(rank=2, init="eva"), packed(documents(), 8), model)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
