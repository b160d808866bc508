"""Mixtures of experts: what an adapter over their stacks trains, and that it merges exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture, save_mixture
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_merging import adapted, logits, merge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import adapters_off, attach_adapter, trainable_report
from alignkit.models.adapters.files import save_adapter
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.adapters.targets import adapted_layers
from alignkit.models.merging.updates import AdapterPart, Blend
from alignkit.models.peft_parts import stored_name
from alignkit.recipe.adapters import EvaSpec, FullSpec, Ia3Spec, LoraSpec, PrefixSpec

FAMILIES = ["Mixtral", "Qwen3Moe", "Qwen2Moe", "GptOss"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def shaken(model: Any, seed: int = 1, size: float = 0.1) -> Any:
    """The model with every trained weight moved."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += size * torch.randn(weight.shape, generator=generator)
    return model.eval()


def peft_adapter(folder: Path, family: str, seed: int = 1, **options: Any) -> Any:
    """An adapter written by plain PEFT; the model that it makes."""
    fields = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    made = shaken(get_peft_model(mixture(family), LoraConfig(**fields)), seed)
    made.save_pretrained(folder)
    return made


def counts(model: Any, spec: Any) -> tuple[int, int]:
    """Trained weights by the plan, and by what is attached."""
    planned = measure_model(model.config, spec).trainable
    return planned, trainable_report(attach_adapter(model, spec, 0)).trainable


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": BOTH, "use_rslora": True},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {
            "target_modules": [],
            "target_parameters": BOTH,
            "rank_pattern": {r".*experts\.down_proj": 3},
        },
    ],
    ids=["all-linear", "both", "one", "ranks"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_plain_peft_wrote_is_merged_exactly(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = save_mixture(tmp_path / "base", family)
    model = peft_adapter(tmp_path / "adapter", family, **options)
    report = merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    far = (logits(merged) - logits(mixture(family))).abs().max()
    assert far > 0.01  # not the base
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base


def test_every_stack_takes_its_own_change(tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", "GptOss")  # its files hold the stacks as they are
    model = peft_adapter(tmp_path / "a", "GptOss", target_modules=[], target_parameters=BOTH)
    merge(base, tmp_path / "a", tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    stacks = {f"model.layers.{n}.mlp.{one}" for n in (0, 1) for one in BOTH}
    assert moved == stacks
    outer = model.get_submodule("model.model.layers.1.mlp.experts")  # around the last parameter
    for wrapper in (outer, outer.base_layer):
        key = f"model.layers.1.mlp.experts.{wrapper.parameter_name}"
        change = wrapper.get_delta_weight("default")
        torch.testing.assert_close(after[key] - before[key], change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_is_plain_peft_s_and_merges(family: str, tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", family)
    model = attach_adapter(mixture(family), LoraSpec(rank=4, alpha=8.0), 0)
    start = logits(model)
    torch.testing.assert_close(start, logits(mixture(family)), rtol=0, atol=1e-5)
    expected = logits(shaken(model))
    save_adapter(model, tmp_path / "adapter", str(base))
    theirs = adapted(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    with adapters_off(model):
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-5)


def test_several_adapters_become_one_change(tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", "GptOss")
    peft_adapter(tmp_path / "a", "GptOss", 1, target_modules=["q_proj"], target_parameters=BOTH)
    peft_adapter(tmp_path / "b", "GptOss", 2, target_modules=[], target_parameters=BOTH[1:])
    key = "model.layers.0.mlp.experts.down_proj"

    def change(adapter: Path | Blend, name: str) -> torch.Tensor:
        merge(base, adapter, tmp_path / name)  # type: ignore[arg-type]
        after, before = (load_file(f / "model.safetensors") for f in (tmp_path / name, base))
        return after[key] - before[key]

    one, other = change(tmp_path / "a", "only-a"), change(tmp_path / "b", "only-b")
    parts = AdapterPart(tmp_path / "a", 0.5), AdapterPart(tmp_path / "b", -2.0)
    torch.testing.assert_close(
        change(Blend(parts), "sum"), 0.5 * one - 2.0 * other, rtol=1e-3, atol=1e-5
    )
    elected = change(Blend(parts, "ties", 0.5), "ties")
    share = float((elected != 0).float().mean())
    assert 0.5 <= share < 0.8  # each keeps half of its entries, and they overlap
    dropped = change(Blend(parts, "dare_linear", 0.5), "dare")
    assert 0.65 < float((dropped != 0).float().mean()) < 0.85


LORA = LoraSpec(rank=4)
SPECS = {
    "all-linear": LORA,
    "attention": LORA.model_copy(update={"targets": ("q_proj", "v_proj")}),
    "stack": LORA.model_copy(update={"targets": ("experts.down_proj", "k_proj")}),
    "one layer": LORA.model_copy(update={"targets": r".*layers\.1\..*(q_proj|experts\..*)"}),
    "rslora": LORA.model_copy(update={"rslora": True}),
    "ranks": LORA.model_copy(update={"rank_pattern": {"experts.down_proj": 3, "q_proj": 2}}),
    "dora": LORA.model_copy(update={"dora": True, "targets": ("q_proj", "o_proj")}),
    "pissa": LORA.model_copy(update={"init": "pissa", "targets": ("q_proj", "o_proj")}),
    "saved": LORA.model_copy(update={"modules_to_save": ("lm_head",), "targets": ("q_proj",)}),
    "ia3": Ia3Spec(kind="ia3", targets=("k_proj", "v_proj"), feedforward=()),
    "prefix": PrefixSpec(kind="prefix", tokens=3),
    "full": FullSpec(kind="full"),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Qwen2Moe"])
def test_the_plan_counts_what_is_trained(family: str, kind: str) -> None:
    planned, trained = counts(mixture(family), SPECS[kind])
    assert planned == trained > 0


@pytest.mark.parametrize(
    ("targets", "share"), [("all-linear", 3), (("experts.down_proj",), 1), (("q_proj",), 0)]
)
def test_the_plan_knows_the_stacks(targets: Any, share: int) -> None:
    facts = measure_model(mixture("Mixtral").config, LORA.model_copy(update={"targets": targets}))
    third = 2 * 4 * 48 * 32  # layers, experts, feed-forward width, hidden: gate, up and down each
    assert (facts.experts, facts.changed_experts) == (3 * third, share * third)


@pytest.mark.parametrize("family", ["GptOss", "Olmoe", "DeepseekV3"])
def test_the_plan_counts_all_linear_of_other_families(family: str) -> None:
    planned, trained = counts(mixture(family), LORA)
    assert planned == trained > 0


GPT2 = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # c_attn 8 → 24, c_proj 8 → 8, c_fc 8 → 32, c_proj 32 → 8: r (i + o) each.
        (LoraSpec(rank=2), 2 * (32 + 16 + 40 + 40)),
        (LoraSpec(rank=2, targets=("c_attn",)), 2 * 32),
        (LoraSpec(rank=2, dora=True), 2 * (32 + 16 + 40 + 40) + 24 + 8 + 32 + 8),
        (LoraSpec(rank=2, init="pissa"), 2 * (32 + 16 + 40 + 40)),
        (Ia3Spec(kind="ia3"), 24 + 32),
    ],
    ids=["all-linear", "names", "dora", "pissa", "ia3"],
)
def test_layers_that_are_stored_transposed_are_counted(spec: Any, expected: int) -> None:
    assert counts(GPT2LMHeadModel(GPT2), spec) == (expected, expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_layers_that_are_stored_transposed_start_as_the_base(init: Any) -> None:
    model = GPT2LMHeadModel(GPT2).eval()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    adapted = attach_adapter(model, LoraSpec(rank=2, alpha=2.0, init=init), 0).eval()
    torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-4, atol=1e-4)
    layer = adapted.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    start = layer.lora_B["default"].weight[:, :2] @ layer.lora_A["default"].weight[:2]
    weight = layer.get_base_layer().weight.T
    assert (weight - start).norm() < 0.9 * weight.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_those_that_peft_finds(family: str) -> None:
    layers = adapted_layers(mixture(family), LORA)
    expected = {(n, la.in_features, la.out_features) for n, la in layers.items() if la.stacked}
    assert len(expected) == 4
    model = attach_adapter(mixture(family), LORA, 0)
    found = {
        (f"{stored_name(name)}.{module.parameter_name}", module.in_features, module.out_features)
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    assert found == expected


def test_names_in_the_report() -> None:
    report = trainable_report(attach_adapter(mixture("Qwen2Moe"), LORA, 0))
    assert report.modules[("experts.gate_up_proj", 32, 48)] == 2
    assert report.modules[("experts.down_proj", 24, 32)] == 2
    assert report.modules[("gate_proj", 32, 24)] == 2  # of the shared expert
    names = {name for name, _, _ in report.modules}
    assert not names & {"gate.weight", "shared_expert_gate", "base_layer", "experts"}
    routed = LORA.model_copy(update={"targets": ("gate", "shared_expert_gate"), "rank": 1})
    report = trainable_report(attach_adapter(mixture("Qwen2Moe"), routed, 0))
    assert report.modules == {("gate.weight", 32, 4): 2, ("shared_expert_gate", 32, 1): 2}


def test_a_regular_expression_stays_in_its_layer() -> None:
    # Plain PEFT would take the last parts of the names, and with them every layer.
    model = attach_adapter(mixture("Mixtral"), SPECS["one layer"], 0)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".layers.1." in name for name in trained)


def refusals(family: str, spec: LoraSpec) -> list[ModelError]:
    """What the plan says of an adapter, and what a run says."""
    found = []
    for use in (
        lambda: measure_model(mixture(family).config, spec),
        lambda: attach_adapter(mixture(family), spec, 0),
    ):
        with pytest.raises(ModelError) as raised:
            use()
        found.append(raised.value)
    return found


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dropout": 0.1}, "adapter.dropout = 0.1 works with linear layers only"),
        ({"dora": True}, "adapter.dora = true works with linear layers only"),
        *(
            ({"init": init}, f"adapter.init = {init} works with linear layers only")
            for init in ("pissa", "pissa_niter_16", "olora", "loftq", "eva")
        ),
        ({"init": "eva", "eva": EvaSpec(rho=2.0)}, "adapter.init = eva works with"),
    ],
)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_what_only_linear_layers_can_do(
    family: str, changes: dict[str, Any], sentence: str
) -> None:
    spec = LORA.model_copy(update=changes)
    for error in refusals(family, spec):
        assert sentence in error.message
        assert "adapter.targets: [q_proj, k_proj, v_proj, o_proj]" in error.hint
    alone = spec.model_copy(update={"targets": ("q_proj", "k_proj", "v_proj", "o_proj")})
    assert measure_model(mixture(family).config, alone).trainable > 0


@pytest.mark.parametrize(
    ("family", "changes", "sentence", "hint"),
    [
        ("Qwen3Moe", {"targets": ("gate_proj",)}, "names 'gate_proj', but the", "experts.gate_up"),
        ("Qwen3Moe", {"targets": ("q_proj", "up_proj", "gate_proj")}, "'up_proj', but the", "gate"),
        ("Mixtral", {"targets": ("w1", "w3")}, "names 'w1', but the experts", "experts.down_proj"),
        ("Mixtral", {"targets": ("expert",)}, "no linear layer or stack of experts", "q_proj"),
        ("Mixtral", {"targets": r".*\.w1"}, "no linear layer or stack of experts", "q_proj"),
        ("DeepseekV3", {"targets": ("mlp.up_proj",)}, "layers.0.mlp.up_proj, which PEFT", "o_proj"),
        ("Mixtral", {"modules_to_save": ("experts",)}, "is among adapter.targets too", "remove it"),
        ("Mixtral", {"rank": 33}, "more than model.layers.0.self_attn.q_proj can hold", "most 32"),
        ("Mixtral", {"targets": ("gate",), "rank": 5}, "mlp.gate.weight can hold: 32 × 4", "most"),
    ],
)
def test_targets_that_mean_nothing(
    family: str, changes: dict[str, Any], sentence: str, hint: str
) -> None:
    spec = LORA.model_copy(update=changes)
    for error in refusals(family, spec):
        assert sentence in error.message
        assert hint in error.hint
