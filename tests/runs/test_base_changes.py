"""Longer context and added tokens: trained, stored with the adapter, read again and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from running import adapter_of, losses, make_preference_recipe, make_recipe, train
from safetensors.torch import load_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.errors import AlignkitError
from alignkit.models.adapters.attach import adapters_off, attach_adapter
from alignkit.models.base.changes import BaseChanges
from alignkit.models.base.loading import (
    BaseModel,
    load_config,
    load_model,
    load_tokenizer,
)
from alignkit.models.base.places import resolve
from alignkit.models.opening import open_model
from alignkit.models.scoring.selfcheck import packed_fault
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.rope import RopeSpec

pytestmark = pytest.mark.slow

TOKENS = ["<tool>", "</tool>"]
LONG = torch.arange(5, 605)[None] % 300 + 20


def run_of(folder: Path, base: Path, stage: str = "sft", **fields: Any) -> Path:
    fields = {
        "training__max_steps": 2,
        "training__learning_rate": 2e-3,
        "merge": True,
        "adapter": {"kind": "lora", "rank": 4},
        **fields,
    }
    if stage == "sft":
        train(make_recipe(folder, base, **fields))
    else:
        train(make_preference_recipe(folder, base, stage, **fields))
    return folder / "run"


def merged_of(run: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = LONG) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model made for 256 tokens."""
    folder = tmp_path_factory.mktemp("short") / "base"
    save_tiny(folder, max_position_embeddings=256)
    return folder


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_scaled_positions(kind: str, short: Path, tmp_path: Path) -> None:
    rope = {"kind": kind, "factor": 4.0}
    run = run_of(tmp_path, short, model__rope_scaling=rope, data__max_length=256)
    config = json.loads((run / "merged/config.json").read_text(encoding="utf-8"))
    stored = config["rope_parameters"]
    assert (stored["rope_type"], stored["factor"]) == (kind, 4.0)
    assert config["max_position_embeddings"] == (256 if kind == "dynamic" else 1024)
    assert stored.get("original_max_position_embeddings") == (256 if kind == "yarn" else None)
    # On input longer than the base was made for: the merged model, and base + adapter.
    opened = open_model(str(run / "adapter"), dtype=torch.float32, base=str(short))
    exact = logits(opened.model)
    torch.testing.assert_close(logits(merged_of(run)), exact, rtol=1e-5, atol=3e-4)
    # The scaling makes a difference there.
    unscaled = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32), str(run / "adapter")
    ).eval()
    assert (logits(unscaled) - exact).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_rows_read_scaled_positions(kind: str, family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", family, max_position_embeddings=256)

    changes = BaseChanges(RopeSpec(kind=kind, factor=4.0))
    base = BaseModel(str(tmp_path / "base"), changes=changes)
    model = load_model(base, torch.float32)
    assert packed_fault(model, torch.float32) is None


def test_rows_longer_than_the_original_context(short: Path, tmp_path: Path) -> None:
    rope = {"kind": "linear", "factor": 2.0}
    run = run_of(tmp_path / "a", short, model__rope_scaling=rope, data__max_length=512)
    assert len(losses(run)) == 2
    for scaling in (None, {"kind": "dynamic", "factor": 2.0}):
        with pytest.raises(AlignkitError, match="longer than the model's context of 256"):
            run_of(tmp_path / "b", short, model__rope_scaling=scaling, data__max_length=512)


def test_positions_that_cannot_be_scaled(short: Path, tmp_path: Path) -> None:
    rope = {"kind": "linear", "factor": 2.0}
    run = run_of(tmp_path / "a", short, model__rope_scaling=rope)
    with pytest.raises(AlignkitError, match="scaled already: linear"):
        run_of(tmp_path / "b", run, model__rope_scaling=rope)


@pytest.mark.parametrize(
    ("stage", "adapter", "tie"),  # every pair of two of them
    [
        ("sft", "lora", True),
        ("sft", "dora", False),
        ("sft", "full", True),
        ("dpo", "lora", False),
        ("dpo", "dora", True),
        ("dpo", "full", False),
    ],
)
def test_added_tokens(stage: str, adapter: str, tie: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_tiny(base, tie_word_embeddings=tie)
    spec = {"kind": "full"} if adapter == "full" else {"kind": "lora", "rank": 4}
    if adapter == "dora":
        spec["dora"] = True
    run = run_of(tmp_path, base, stage, model__add_tokens=TOKENS, adapter=spec)
    plain, tokenizer = (
        AutoTokenizer.from_pretrained(base),
        AutoTokenizer.from_pretrained(run / "merged"),
    )
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    assert ids == [len(plain), len(plain) + 1]
    assert tokenizer.decode(tokenizer("a<tool>b")["input_ids"], skip_special_tokens=True)[-8:] == (
        "a<tool>b"
    )
    merged = merged_of(run)
    assert merged.config.vocab_size == len(plain) + 2 == len(merged.get_input_embeddings().weight)
    probe = torch.tensor([[50, ids[0], 60, ids[1], 70]])
    if adapter == "full":
        assert logits(merged, probe).isfinite().all()
        return
    opened = open_model(str(run / "adapter"), dtype=torch.float32, base=str(base))
    exact = logits(opened.model, probe)
    torch.testing.assert_close(logits(merged, probe), exact, rtol=1e-5, atol=3e-4)
    # Plain PEFT reads it over a base that has the rows, whatever they hold.
    resized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    resized.resize_token_embeddings(len(plain) + 2, mean_resizing=False)
    read = PeftModel.from_pretrained(resized, str(run / "adapter")).eval()
    torch.testing.assert_close(logits(read, probe), exact, rtol=1e-5, atol=1e-4)
    # Only the new rows are stored and have changed.
    before = load_file(base / "model.safetensors")
    after = load_file(run / "merged/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in before:
            assert torch.equal(after[name][: len(plain)], before[name])
    assert not any(w.numel() >= before["model.embed_tokens.weight"].numel() for w in weights(run))


def weights(run: Path) -> list[torch.Tensor]:
    return list(adapter_of(run).values())


def test_new_rows_start_as_the_mean_of_their_pieces(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=False)

    base = BaseModel(str(tmp_path / "base"), changes=BaseChanges(tokens=tuple(TOKENS)))
    plain = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = load_model(base, torch.float32)
    stored = load_file(tmp_path / "base/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token in TOKENS:
            pieces = plain(token, add_special_tokens=False)["input_ids"]
            assert len(pieces) > 1
            row = model.get_parameter(name)[load_tokenizer(base).convert_tokens_to_ids(token)]
            torch.testing.assert_close(row, stored[name][pieces].mean(0))
    assert load_config(base).vocab_size == len(plain) + 2


def test_rows_that_hold_them_train_them(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    rows = [
        {"prompt": f"Call {n}", "completion": f"<tool>clock {n}</tool> it is {n}"}
        for n in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    run = run_of(
        tmp_path, tmp_path / "base", model__add_tokens=TOKENS, data__train=[{"path": str(data)}]
    )
    found = [w for name, w in adapter_of(run).items() if "trainable_tokens" in name]
    base = resolve(str(tmp_path / "base")).whole()
    stored = load_model(base, torch.float32).get_input_embeddings().weight
    pieces = load_tokenizer(base)("<tool>", add_special_tokens=False)["input_ids"]
    assert (found[0][0] - stored[pieces].mean(0)).abs().max() > 1e-3


def test_a_token_that_is_one_already(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    with pytest.raises(AlignkitError, match=r"'<\|im_end\|>', which is a token already"):
        run_of(tmp_path, tmp_path / "base", model__add_tokens=["<|im_end|>"])


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_whole_modules_next_to_lora(stage: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=False)
    names = ["embed_tokens"] if stage == "reward" else ["embed_tokens", "lm_head"]
    spec = {"kind": "lora", "rank": 4, "modules_to_save": names}
    run = run_of(tmp_path, tmp_path / "base", stage, adapter=spec)
    before = load_file(tmp_path / "base/model.safetensors")
    after = load_file(run / "merged/model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    if stage == "reward":
        return
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    opened = open_model(str(run / "adapter"), dtype=torch.float32, base=str(tmp_path / "base"))
    ids = LONG[:, :40]
    exact = logits(opened.model, ids)
    torch.testing.assert_close(logits(merged_of(run), ids), exact, rtol=1e-5, atol=3e-4)
    if stage == "dpo":  # the reference is the base, whole modules included
        first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert first.get("rewards/margins", 0.0) == pytest.approx(0.0, abs=1e-4)


def test_modules_that_do_not_exist(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    for names, message in (
        (["embed_token"], r"adapter\.modules_to_save matches no module with weights"),
        (["q_proj"], "which is among adapter.targets too"),
    ):
        spec = {"kind": "lora", "modules_to_save": names}
        with pytest.raises(AlignkitError, match=message):
            run_of(tmp_path, tmp_path / "base", adapter=spec)


def test_the_reference_is_the_base(tmp_path: Path) -> None:

    save_tiny(tmp_path / "base", tie_word_embeddings=False)
    base = BaseModel(str(tmp_path / "base"))
    untouched = logits(load_model(base, torch.float32))
    spec = LoraSpec(rank=4, modules_to_save=("lm_head", "embed_tokens"))
    model = attach_adapter(load_model(base, torch.float32), spec, 0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1
    assert (logits(model) - untouched).abs().max() > 0.1
    with adapters_off(model):
        torch.testing.assert_close(logits(model), untouched, rtol=1e-6, atol=1e-6)
