"""Every kind of adapter in every stage, over plain and quantized bases: trained, read, merged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from running import (
    adapter_of,
    furthest,
    losses,
    make_ppo_recipe,
    make_preference_recipe,
    make_recipe,
    steps_of,
    train,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.errors import RecipeError
from alignkit.models.adapters.files import load_adapter
from alignkit.models.base.loading import BaseModel, load_model
from alignkit.models.opening import open_model
from alignkit.recipe.reading.load import load_recipe

pytestmark = pytest.mark.slow

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": {**LORA, "rslora": True},
    "dora": {**LORA, "dora": True},
    "patterns": {**LORA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "dropout": {**LORA, "dropout": 0.1},
    "lora+": {**LORA, "b_learning_rate": 16},
    "pissa": {**LORA, "init": "pissa"},
    "olora": {**LORA, "init": "olora", "rslora": True, "rank_pattern": {"q_proj": 2}},
    "eva": {**LORA, "init": "eva"},
    "eva dora": {
        **LORA,
        "init": "eva",
        "eva": {"rho": 2.0},
        "dora": True,
        "rank_pattern": {"q_proj": 2},
    },
    "ia3": {"kind": "ia3"},
    "full": {"kind": "full"},
    "frozen": {"kind": "full", "freeze": ["model.embed_tokens", "model.layers.0"]},
}
ADAPTERS = [name for name, fields in KINDS.items() if fields["kind"] != "full"]
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PARTS = {
    "dora": {"lora_A", "lora_B"} | SEVEN,  # a magnitude stands in its layer
    "ia3": {"k_proj", "v_proj", "down_proj"},
}
"""What the file of an adapter holds."""
RATES = {"lora": 2e-3, "ia3": 5e-2, "full": 3e-4}
ROWS = torch.arange(5, 65).view(3, 20)

STAGES = ("sft", "dpo", "reward")
OVER = {
    **dict.fromkeys(("lora", "dora", "ia3"), ("none", "nf4", "int8")),
    "pissa": ("nf4", "int8"),
    "olora": ("none",),
    **dict.fromkeys(("rslora", "patterns", "eva"), ("nf4",)),
    **dict.fromkeys(("dropout", "lora+", "eva dora"), ("int8",)),
}
"""Layers of an own make meet every base and stage; what only sets numbers of LoRA's meets one."""
# An adapter meets every stage over another base, and the next adapter takes the next pairing.
cases = [
    (STAGES[(number + place) % 3], kind, quantization)
    for number, kind in enumerate(ADAPTERS)
    for place, quantization in enumerate(("none", "nf4", "int8"))
    if quantization in OVER[kind]
] + [("sft", "full", "none"), ("dpo", "frozen", "none"), ("reward", "frozen", "none")]


def run_of(folder: Path, base: Path, stage: str, kind: str, **fields: Any) -> Path:
    adapter = KINDS[kind]
    make = {"sft": make_recipe}.get(stage)
    fields = {
        "adapter": adapter,
        "training__max_steps": 2,
        "training__learning_rate": RATES[adapter["kind"]],
        "merge": True,
        **fields,
    }
    if make is not None:
        train(make(folder, base, **fields))
    else:
        train(make_preference_recipe(folder, base, stage, **fields))
    return folder / "run"


@torch.no_grad()
def answers(model: Any, head: torch.nn.Linear | None = None) -> torch.Tensor:
    """Logits, or rewards at the last tokens."""
    if head is None:
        found: torch.Tensor = model(input_ids=ROWS).logits
        return found
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return head(inner.get_decoder()(input_ids=ROWS).last_hidden_state[:, -1])


@pytest.mark.parametrize(("stage", "kind", "quantization"), cases)
def test_trained_saved_read_and_merged(
    stage: str, kind: str, quantization: str, tiny_base: Path, tmp_path: Path
) -> None:
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    run = run_of(tmp_path, tiny_base, stage, kind, model__quantization=quantization)
    assert len(losses(run)) == 2
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    plain = base if stage != "reward" else None
    merged_kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    merged = merged_kind.from_pretrained(run / "merged", dtype=torch.float32).eval()
    if KINDS[kind]["kind"] == "full":
        assert not (run / "adapter").exists()
        frozen = {n for n, p in base.named_parameters() if n.startswith("model.layers.0.")}
        ours = dict(merged.named_parameters())
        changed = {n for n in frozen if not torch.equal(ours[n], base.get_parameter(n))}
        assert bool(changed) == (kind == "full")
        assert not torch.equal(
            ours["model.layers.1.mlp.up_proj.weight"],
            base.get_parameter("model.layers.1.mlp.up_proj.weight"),
        )
        return
    if stage == "sft" and kind in PARTS:
        assert {name.split(".")[-2] for name in adapter_of(run)} == PARTS[kind]
    opened = open_model(str(run / "adapter"), dtype=torch.float32, base=str(tiny_base))
    exact = answers(opened.model, opened.head)
    summary = json.loads((run / "run.json").read_text(encoding="utf-8"))["summary"]["merge"]
    assert (summary["quantized"] is None) == (quantization == "none")
    if quantization != "none" and summary["quantized"]["onto"] == "dequantized":
        narrow = load_model(BaseModel(str(tiny_base)), torch.float32, quantization=quantization)
        exact = answers(load_adapter(narrow, run / "adapter"), opened.head)
        plain = None
    if plain is not None:  # what plain PEFT makes of the adapter
        untouched = answers(plain)
        read = PeftModel.from_pretrained(plain, str(run / "adapter")).eval()
        torch.testing.assert_close(answers(read), exact, rtol=1e-5, atol=1e-4)
        assert (exact - untouched).abs().max() > 1e-3
    if stage != "reward":
        torch.testing.assert_close(answers(merged), exact, rtol=1e-5, atol=3e-4)
        return
    found = merged(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_stored_state_has_8_bits(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make = make_ppo_recipe if stage == "ppo" else make_recipe
    fields = {"training__max_steps": 1, "merge": False, "training__optimizer": "adamw_8bit"}
    train(make(tmp_path, tiny_base, adapter=KINDS["full"], **fields))
    stored = torch.load(tmp_path / "run/checkpoints/step-000001/optimizer.pt", weights_only=True)
    parts = [stored["policy"], stored["value"]] if stage == "ppo" else [stored]
    for part in parts:
        moments = [state["__bnb_optimizer_quant_state__"] for state in part["state"].values()]
        for moment in moments:
            wide = moment["state1"].numel() < 4096
            assert moment["state1"].dtype == (torch.float32 if wide else torch.uint8)
        assert sum(moment["state1"].dtype == torch.uint8 for moment in moments) >= 2 * 5


def test_b_moves_faster_than_a_only_where_told(tiny_base: Path, tmp_path: Path) -> None:
    # The first step of AdamW is the learning rate times the gradient's sign.
    moved = {}
    for kind in ("lora", "lora+"):
        fields = {"training__max_steps": 1, "training__schedule": "constant", "merge": False}
        run = run_of(tmp_path / kind, tiny_base, "sft", kind, **fields)
        weights = adapter_of(run)
        moved[kind] = max(float(w.abs().max()) for n, w in weights.items() if "lora_B" in n)
    assert moved["lora"] == pytest.approx(2e-3, rel=1e-3)
    assert moved["lora+"] == pytest.approx(16 * 2e-3, rel=1e-3)


def test_ia3_scales_are_not_decayed(tiny_base: Path, tmp_path: Path) -> None:
    weights = [
        adapter_of(
            run_of(
                tmp_path / str(decay),
                tiny_base,
                "sft",
                "ia3",
                training__weight_decay=decay,
                merge=False,
            )
        )
        for decay in (0.0, 0.5)
    ]
    assert furthest(*weights) == 0.0


def test_ppo_refuses_ia3(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make_ppo_recipe(tmp_path, tiny_base, adapter={"kind": "ia3"})
    with pytest.raises(RecipeError, match="adapter has kind = ia3, which ppo does not train"):
        load_recipe(str(recipe))


@pytest.mark.parametrize("kind", ["dora", "lora+", "frozen"])
def test_ppo(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    fields = {"adapter": KINDS[kind], "training__max_steps": 2, "merge": True}
    fields["objective"] = {"epochs": 1}
    train(make_ppo_recipe(tmp_path, tiny_base, **fields))
    steps = steps_of(tmp_path / "run")
    assert steps[0]["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ours, theirs = merged.state_dict(), base.state_dict()
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert any(".layers.1." in name for name in changed)
    if kind == "frozen":
        assert not any(".layers.0." in name or "embed" in name for name in changed)
