"""What PEFT can write beside plain LoRA: merged exactly, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from running import make_ppo_recipe, make_recipe, train
from test_merging import logits, merge
from test_shards import mixture
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alignkit.errors import AlignkitError, ModelError
from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.models.adapters.continued import started_adapter
from alignkit.models.adapters.files import TRAINED_OVER, TrainedOver
from alignkit.models.base.loading import BaseModel, load_tokenizer
from alignkit.models.merging.updates import AdapterPart, Blend
from alignkit.models.opening import open_model
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.registry import plan_stage


def write(folder: Path, model: Any, **options: Any) -> Any:
    """An adapter with every trained weight moved, written by PEFT; the model that it makes."""
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    made = get_peft_model(model, LoraConfig(**fields))
    for weight in made.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize(
    ("family", "options", "tie"),
    [
        ("qwen2", {"bias": "lora_only"}, False),
        ("qwen2", {"bias": "all"}, False),
        ("qwen2", {"lora_bias": True}, False),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, False),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, True),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
        ("llama", {"layers_to_transform": [1]}, False),
        ("llama", {"init_lora_weights": "orthogonal"}, False),
    ],
)
def test_merged_exactly(family: str, options: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family, tie_word_embeddings=tie)
    model = write(tmp_path / "adapter", tiny_model(family, tie_word_embeddings=tie), **options)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=3e-4)
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base


@pytest.mark.parametrize("rows", [700, 730])  # of the base: 720
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_a_resized_vocabulary(saved: Any, tie: bool, rows: int, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=tie, vocab_size=720)
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    resized.resize_token_embeddings(rows)
    model = write(tmp_path / "adapter", resized, modules_to_save=saved)
    opened = open_model(str(tmp_path / "adapter"), dtype=torch.float32)
    torch.testing.assert_close(logits(opened.model), logits(model), rtol=1e-5, atol=3e-4)
    merge_run([str(tmp_path / "adapter")], MergeOptions(output=tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=3e-4)
    assert merged.config.vocab_size == rows
    assert merged.config.tie_word_embeddings == (tie and saved is None)
    spec = LoraSpec.model_validate({"kind": "lora", "from": str(tmp_path / "adapter")})
    with pytest.raises(ModelError, match=f"trained over a vocabulary of {rows} rows"):
        started_adapter(spec, BaseModel(str(tmp_path / "base")))


def test_half_of_a_resized_vocabulary(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    resized.resize_token_embeddings(705)
    write(tmp_path / "adapter", resized, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ModelError, match="of 705 rows, and those of lm_head are not in its file"):
        open_model(str(tmp_path / "adapter"), dtype=torch.float32)


def test_the_adapters_tokenizer_is_kept(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    write(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    own = tiny_tokenizer(template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    own.save_pretrained(tmp_path / "adapter")
    report = merge_run([str(tmp_path / "adapter")], MergeOptions(output=tmp_path / "merged"))
    merged = load_tokenizer(BaseModel(report.output))
    assert merged.chat_template == own.chat_template
    recipe = make_recipe(
        tmp_path / "r",
        tmp_path / "base",
        adapter={"kind": "lora", "from": str(tmp_path / "adapter")},
    )
    rows = plan_stage(load_recipe(str(recipe)).recipe, 1)[0]
    assert rows.tokenizer.chat_template == own.chat_template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses PEFT's layer_replication"),
        ({"alora_invocation_tokens": [3]}, "uses PEFT's alora_invocation_tokens"),
        ({"lora_bias": True}, "cannot be merged: "),  # the layer has no bias to add to
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    write(tmp_path / "adapter", tiny_model(), **options)
    with pytest.raises(ModelError, match=message):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


EXPERTS = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def save_mixture(folder: Path) -> None:
    mixture().save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)


@pytest.mark.parametrize("chosen", [EXPERTS, EXPERTS[1:2], EXPERTS[:1]])
def test_adapters_on_parameters_inside_one_another(chosen: list[str], tmp_path: Path) -> None:
    save_mixture(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "target_parameters": chosen}
    model = write(tmp_path / "adapter", mixture(), **options)
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(mixture())).abs().max() > 1e-2
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base


def test_adapters_on_experts_are_added_with_weights(tmp_path: Path) -> None:
    save_mixture(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    write(tmp_path / "one", mixture(), **options)
    write(tmp_path / "two", mixture(), **{**options, "target_parameters": EXPERTS[1:], "r": 2})
    found = {}
    for name, weights in {"one": (1, 0), "two": (0, 1), "both": (0.7, 0.3)}.items():
        parts = (AdapterPart(tmp_path / n, w) for n, w in zip(("one", "two"), weights, strict=True))
        merge(tmp_path / "base", Blend(tuple(parts)), tmp_path / f"m-{name}")  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"m-{name}", dtype=torch.float32)
        found[name] = model.state_dict()
    base = mixture().state_dict()
    for name, weight in base.items():
        one, two, both = (found[kind][name] - weight for kind in ("one", "two", "both"))
        torch.testing.assert_close(both, 0.7 * one + 0.3 * two, rtol=1e-4, atol=1e-6)
    assert not torch.equal(
        found["two"][stacked := "model.layers.0.mlp.experts.down_proj"], base[stacked]
    )


def test_whole_modules_are_not_weighted(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    write(tmp_path / "adapter", tiny_model(), modules_to_save=["lm_head"])
    half = Blend((AdapterPart(tmp_path / "adapter", 0.5),))
    with pytest.raises(ModelError, match=r"lm_head\.weight is trained as a whole"):
        merge(tmp_path / "base", half, tmp_path / "merged")  # type: ignore[arg-type]


def about(folder: Path, **fields: Any) -> None:
    over = TrainedOver(**{"name": "base", "fingerprint": "hub@1", **fields})
    (folder / TRAINED_OVER).write_text(json.dumps(dataclasses.asdict(over)), encoding="utf-8")


def test_adapters_of_other_changes_or_precisions(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    for name in ("a", "b"):
        write(tmp_path / name, tiny_model())
    options = MergeOptions(base=str(tmp_path / "base"), output=tmp_path / "merged", dtype="float32")
    about(tmp_path / "a")
    about(tmp_path / "b", rope={"kind": "linear", "factor": 4.0})
    with pytest.raises(ModelError, match=r"trained with different model\.rope_scaling"):
        merge_run([str(tmp_path / "a"), str(tmp_path / "b")], options)
    about(tmp_path / "b", dtype="bfloat16")
    alike = dataclasses.replace(options, output=tmp_path / "alike")
    assert len(merge_run([str(tmp_path / "a"), str(tmp_path / "b")], alike).lines()) == 3
    about(tmp_path / "b", quantization="nf4", dtype="float32")
    report = merge_run([str(tmp_path / "a"), str(tmp_path / "b")], options)
    assert "bases in different precisions" in report.lines()[-1]
    options = dataclasses.replace(options, output=tmp_path / "again")
    about(tmp_path / "b", quantization="nf4", dtype="float32", init="loftq")
    with pytest.raises(ModelError, match="can be neither weighted nor combined"):
        merge_run([str(tmp_path / "a"), str(tmp_path / "b")], options)


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"trainable_token_indices": [3]}])
def test_what_a_recipe_cannot_say_is_not_trained_on(
    options: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path / "base", "qwen2")
    write(tmp_path / "adapter", tiny_model("qwen2"), **options)
    adapter = {"kind": "lora", "from": str(tmp_path / "adapter")}
    with pytest.raises(ModelError, match=f"uses PEFT's {next(iter(options))}"):
        train(make_recipe(tmp_path, tmp_path / "base", adapter=adapter))


def test_a_run_can_be_repeated_from_its_own_recipe(tiny_base: Path, tmp_path: Path) -> None:
    fields = {"training__max_steps": 1, "merge": False}
    train(make_recipe(tmp_path / "a", tiny_base, adapter={"kind": "lora", "rank": 3}, **fields))
    adapter = {"kind": "lora", "from": str(tmp_path / "a/run")}
    train(make_recipe(tmp_path / "b", tiny_base, adapter=adapter, **fields))
    again = tmp_path / "again.yaml"
    text = (tmp_path / "b/run/recipe.yaml").read_text(encoding="utf-8")
    again.write_text(text.replace("/b/run", "/c/run"), encoding="utf-8")
    assert load_recipe(str(again)).recipe.output.endswith("/c/run")
    train(again)
    one, two = (
        (tmp_path / name / "run/adapter/adapter_model.safetensors").read_bytes() for name in "bc"
    )
    assert one == two


def test_a_ppo_run_is_merged_on_request(tiny_base: Path, tmp_path: Path) -> None:
    train(make_ppo_recipe(tmp_path, tiny_base, training__max_steps=1, merge=False))
    for number, data in enumerate((None, "data_templates/sft/messages_eval.jsonl")):
        output = tmp_path / f"merged{number}"
        report = merge_run([str(tmp_path / "run")], MergeOptions(output=output, data=data))
        assert report.modules == 14
        assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_new_rows_want_the_vocabulary_for_themselves(
    adapter: dict[str, Any], tie: bool, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=tie)
    fields = {"adapter": {"kind": "lora", **adapter}, "model__add_tokens": ["<tool>"]}
    with pytest.raises(AlignkitError, match=r"in which model\.add_tokens trains rows"):
        train(make_recipe(tmp_path, tmp_path / "base", **fields))
    assert not (tmp_path / "run").exists()


def test_a_token_is_added_once(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, model__add_tokens=["<zz>", "<zz>"])
    with pytest.raises(AlignkitError, match="'<zz>' more than once"):
        train(recipe)


def test_a_base_that_is_quantized_in_its_files(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    narrow = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    narrow.save_pretrained(tmp_path / "narrow")
    tiny_tokenizer("chatml").save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match="are quantized in its files"):
        train(make_recipe(tmp_path, tmp_path / "narrow"))
    write(tmp_path / "adapter", tiny_model())
    with pytest.raises(ModelError, match="are quantized in its files"):
        merge(tmp_path / "narrow", tmp_path / "adapter", tmp_path / "merged")
