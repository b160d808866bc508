"""Attaching adapters: what is trained, what a wrong target says, how it is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import PAIRS, gradients, random_batch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_shards import mixture
from tiny import MODELS, plain_lora, save_tiny, tiny_model, trained_model
from transformers import AutoModelForSequenceClassification

from alignkit.errors import ModelError
from alignkit.models.adapters.attach import adapters_off, attach_adapter, trainable_report
from alignkit.models.adapters.files import (
    HEAD_KEY,
    has_head,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from alignkit.models.adapters.sizes import measure_model
from alignkit.models.adapters.targets import linear_names
from alignkit.models.base.skeleton import build_skeleton
from alignkit.models.rewards.head import new_head, read_head
from alignkit.models.scoring.padded import PaddedScorer
from alignkit.models.scoring.scorer import TokenScorer, causal_model
from alignkit.recipe.adapters import FullSpec, Ia3Spec, LoraSpec

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_is_every_layer_but_the_head(family: str) -> None:
    model = attach_adapter(tiny_model(family), LoraSpec(rank=2), 0)
    report = trainable_report(model)
    layers = model.config.num_hidden_layers
    assert report.modules == dict.fromkeys(report.modules, layers)
    assert {name for name, _, _ in report.modules} == SEVEN
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)


def test_trained_weights_in_closed_form() -> None:
    # A layer of i inputs and o outputs gets r (i + o) weights. Here hidden 64, feed-forward 96,
    # 4 query heads of 16 and 2 key heads of 16: q 128, k 96, v 96, o 128, gate, up, down 160 each.
    report = trainable_report(attach_adapter(tiny_model(), LoraSpec(rank=3), 0))
    assert report.trainable == 2 * 3 * (128 + 96 + 96 + 128 + 3 * 160)
    base = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert report.total == base + report.trainable


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4),
        LoraSpec(rank=4, rslora=True, rank_pattern={"q_proj": 2}),
        LoraSpec(rank=4, targets=("q_proj", "o_proj"), dora=True, modules_to_save=("lm_head",)),
    ],
    ids=["all-linear", "ranks", "attention"],
)
def test_the_plan_counts_experts(spec: LoraSpec) -> None:
    facts = measure_model(mixture().config, spec)
    report = trainable_report(attach_adapter(mixture(), spec, 0))
    assert facts.trainable == report.trainable
    experts = {"experts.gate_up_proj", "experts.down_proj"}
    named = experts & {name for name, _, _ in report.modules}
    assert named == (experts if spec.targets == "all-linear" else set())


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4),
        LoraSpec(rank=2, targets=("q_proj", "v_proj")),
        LoraSpec(rank=2, targets=("layers.1.mlp.up_proj",)),
        LoraSpec(rank=2, targets=r".*layers\.0\..*(q|k)_proj"),
        LoraSpec(rank=2, targets=("q_proj", "lm_head")),
        LoraSpec(rank=2, dora=True),
        LoraSpec(rank=2, rank_pattern={"q_proj": 5, r"layers\.0\..*": 3, "up_proj": 9}),
        Ia3Spec(kind="ia3"),
        Ia3Spec(kind="ia3", targets=("q_proj", "gate_proj", "o_proj"), feedforward=("o_proj",)),
        FullSpec(kind="full"),
        FullSpec(kind="full", freeze=("model.embed_tokens", r"model\.layers\.0\..*norm.*")),
    ],
    ids=[
        *("all-linear", "names", "path", "regex", "with head", "dora", "ranks"),
        *("ia3", "ia3 names", "full", "frozen"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_plan_counts_what_is_trained(family: str, spec: LoraSpec | Ia3Spec | FullSpec) -> None:
    if family == "gemma2" and getattr(spec, "targets", ())[-1:] == ("lm_head",):
        pytest.skip("PEFT cannot adapt a head whose matrix is the embedding's")
    model = tiny_model(family)
    facts = measure_model(model.config, spec)
    report = trainable_report(attach_adapter(model, spec, 0))
    assert facts.trainable == report.trainable
    added = 0 if isinstance(spec, FullSpec) else report.trainable
    assert facts.parameters == report.total - added
    assert (facts.hidden, facts.layers, facts.intermediate) == (64, 2, 96)
    assert (facts.attention_width, facts.key_value_width) == (64, 32)


def test_the_skeleton_has_no_storage() -> None:
    model = build_skeleton(tiny_model().config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("targets", "sentence", "hint"),
    [
        (("q_prj",), "matches no linear layer: 'q_prj'", "did you mean q_proj, "),
        (("q_proj", "wrong"), "matches no linear layer: 'wrong'", "this model has q_proj, k_proj"),
        (("attn",), "matches no linear layer: 'attn'", "this model has"),
        (("input_layernorm",), "no linear layer: 'input_layernorm'", "this model has"),
        (r".*\.query", r"matches no linear layer: '.*\\.query'", "this model has"),
        ("q_proj", "matches no linear layer: 'q_proj'", "this model has"),  # must match it whole
        ("(", "adapter.targets is not a regular expression: '('", "use a list of module names"),
    ],
)
def test_targets_that_match_nothing(
    targets: str | tuple[str, ...], sentence: str, hint: str
) -> None:
    spec = LoraSpec(targets=targets)
    for use in (
        lambda: attach_adapter(tiny_model(), spec, 0),
        lambda: measure_model(tiny_model().config, spec),
    ):
        with pytest.raises(ModelError) as raised:
            use()
        assert sentence in raised.value.message
        assert hint in raised.value.hint


def test_the_whole_message() -> None:
    with pytest.raises(ModelError) as raised:
        attach_adapter(tiny_model(), LoraSpec(targets=("q_prj", "vproj")), 0)
    assert str(raised.value) == (
        "adapter.targets matches no linear layer: 'q_prj', 'vproj'\n"
        "hint: did you mean q_proj, v_proj? this model has "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


def test_a_regular_expression_chooses_layers() -> None:
    spec = LoraSpec(rank=2, targets=r".*layers\.1\..*(q|v)_proj")
    model = attach_adapter(tiny_model(), spec, 0)
    assert trainable_report(model).modules == {("q_proj", 64, 64): 1, ("v_proj", 64, 32): 1}


def test_linear_names_count_without_the_head() -> None:
    assert linear_names(tiny_model()) == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2
    )


def test_the_seed_draws_the_adapter_and_it_starts_at_nothing() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = attach_adapter(tiny_model(), LoraSpec(rank=2), seed)
        return {name: value for name, value in model.state_dict().items() if "lora_" in name}

    torch.rand(5)  # what was drawn before does not matter
    one, two, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    assert all((value == 0).all() for name, value in one.items() if "lora_B" in name)
    assert {value.dtype for value in one.values()} == {torch.float32}


def test_adapters_of_a_bfloat16_base_are_float32() -> None:
    model = attach_adapter(tiny_model(dtype=torch.bfloat16), LoraSpec(rank=2), 0)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def test_full_weights_are_float32_and_all_trained() -> None:
    model = attach_adapter(tiny_model(dtype=torch.bfloat16), FullSpec(kind="full"), 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    report = trainable_report(model)
    assert report.trainable == report.total
    assert report.modules == {}


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = attach_adapter(tiny_model(), LoraSpec(rank=2, targets=("v_proj", "q_proj")), 0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter", "the/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "the/base"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["peft_type"] == "LORA"
    ids = torch.arange(12)[None]
    loaded = load_adapter(tiny_model(), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5
        )
    save_adapter(model, tmp_path / "again", "the/base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "adapter" / name).read_bytes()


def test_an_adapter_that_does_not_fit(tmp_path: Path) -> None:
    model = attach_adapter(tiny_model(), LoraSpec(rank=2), 0)
    save_adapter(model, tmp_path / "adapter", "the/base")
    other = tiny_model(hidden_size=32)
    with pytest.raises(ModelError, match="does not fit the base") as raised:
        load_adapter(other, tmp_path / "adapter")
    assert "--base" in raised.value.hint


def test_folders_that_hold_no_lora(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter: there is no adapter_config"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter_config(tmp_path)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="is a PROMPT_TUNING adapter, which alignkit") as raised:
        read_adapter_config(tmp_path / "prompt")
    assert "LORA, IA3, PREFIX_TUNING" in raised.value.hint


QUESTION = torch.arange(12)[None]
PATHS = {"fast": 0.0, "PEFT's own": 0.3}
"""Code that computes a layer -> dropout of the adapter, which the fast one does not know."""

both_paths = pytest.mark.parametrize("dropout", PATHS.values(), ids=PATHS.keys())


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@both_paths
@pytest.mark.parametrize("family", MODELS)
def test_without_its_adapters_a_model_is_its_base(family: str, dropout: float) -> None:
    model = trained_model(family, "lora", dropout=dropout)
    fast = [module for module in model.modules() if "forward" in vars(module)]
    assert bool(fast) == (dropout == 0.0)
    before = flags(model)
    with torch.no_grad():
        adapted = model(QUESTION).logits
        base = tiny_model(family)(QUESTION).logits
    assert (adapted - base).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(model(QUESTION).logits, base)
        assert flags(model) == before
    assert flags(model) == before
    with torch.no_grad():
        assert torch.equal(model(QUESTION).logits, adapted)


@both_paths
def test_adapters_come_back_after_an_error(dropout: float) -> None:
    model = trained_model("llama", "lora", dropout=dropout)
    with torch.no_grad():
        adapted = model(QUESTION).logits
    before = flags(model)
    with pytest.raises(RuntimeError, match="out of memory"), adapters_off(model):
        raise RuntimeError("out of memory")
    assert torch.is_grad_enabled()
    assert flags(model) == before
    with torch.no_grad():
        assert torch.equal(model(QUESTION).logits, adapted)


def test_a_block_within_a_block_ends_alone() -> None:
    model = trained_model("llama", "lora")
    with torch.no_grad():
        base = tiny_model()(QUESTION).logits
    with adapters_off(model):
        with adapters_off(model):
            pass
        assert torch.equal(model(QUESTION).logits, base)


@pytest.mark.parametrize("scorer", [TokenScorer, PaddedScorer])
def test_scorers_are_turned_off_from_outside(scorer: Any) -> None:
    batch = random_batch(PAIRS, 600)
    adapted = scorer(trained_model("llama", "lora"), torch.float32)
    with torch.no_grad():
        expected = scorer(tiny_model(), torch.float32)(batch).logprobs
    with adapters_off(adapted):
        assert torch.equal(adapted(batch).logprobs, expected)


@both_paths
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_no_graph_is_made_without_adapters(checkpointing: bool, dropout: float) -> None:
    # Checkpointing makes the inputs require gradients, so that even the base would have a graph.
    model = trained_model("llama", "lora", checkpointing, dropout=dropout)
    with adapters_off(model):
        logits = model(QUESTION).logits
    assert not logits.requires_grad
    assert logits.grad_fn is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        logits.sum().backward()
    assert model(QUESTION).logits.requires_grad


@both_paths
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_reference_pass_does_not_disturb_gradients(
    family: str, checkpointing: bool, dropout: float
) -> None:
    # Checkpointed layers are computed again in the backward pass: with the adapters on. Dropout is
    # drawn from the same seed and, when a layer is computed again, from the state it had.
    batch = random_batch(PAIRS, 600)

    def found(between: Callable[[Any], None]) -> dict[str, torch.Tensor]:
        model = trained_model(family, "lora", checkpointing, dropout=dropout).train()
        scorer = TokenScorer(model, torch.float32)
        torch.manual_seed(0)
        logprobs = scorer(batch).logprobs
        between(scorer)
        return gradients(model, logprobs)

    def reference_pass(scorer: Any) -> None:
        with adapters_off(scorer):
            scorer(batch)

    expected, disturbed = found(lambda scorer: None), found(reference_pass)
    assert expected.keys() == disturbed.keys()
    assert all("lora_" in name for name in expected)
    assert all(value.abs().max() > 0 for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(disturbed[name], value), name


@pytest.mark.parametrize("model", [tiny_model, lambda: trained_model("llama", "full")])
def test_a_model_without_adapters_cannot_be_turned_off(model: Callable[[], Any]) -> None:
    with pytest.raises(ModelError) as raised, adapters_off(model()):
        pass
    assert raised.value.message == "there is no adapter to turn off"
    assert raised.value.hint == "set reference.kind to cached"


@torch.no_grad()
def rewards_of(model: Any, head: torch.nn.Linear) -> torch.Tensor:
    """Rewards of three rows, one at a time, with PEFT's own code."""
    decoder = causal_model(plain_lora(model)).get_decoder()
    rows = [torch.arange(start, start + 10)[None] for start in (5, 100, 300)]
    return torch.cat([head(decoder(input_ids=row).last_hidden_state[:, -1]) for row in rows])[:, 0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
def test_plain_peft_loads_adapter_and_head(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family)
    model = trained_model(family, "lora")
    head = new_head(model, seed=4)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"), head)
    expected = rewards_of(model, head)
    assert expected.std() > 0.1

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert torch.equal(stored[HEAD_KEY], head.weight)
    assert has_head(tmp_path / "adapter")

    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    rows = torch.stack([torch.arange(start, start + 10) for start in (5, 100, 300)])
    with torch.no_grad():
        found = plain(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    loaded = load_adapter(tiny_model(family), tmp_path / "adapter")
    read = read_head(tmp_path / "adapter")
    assert torch.equal(read.weight, head.weight)
    torch.testing.assert_close(rewards_of(loaded, read), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_without_a_head_has_none(tmp_path: Path) -> None:
    assert not has_head(tmp_path)
    save_adapter(trained_model("llama", "lora"), tmp_path, "the/base")
    assert not has_head(tmp_path)
