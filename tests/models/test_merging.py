"""Merging: the written model is base + adapter, or nothing is written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.errors import ModelError
from alignkit.models.base.loading import BaseModel
from alignkit.models.merging import dense as merged_weights
from alignkit.models.merging import report as merge_report
from alignkit.models.merging.merge import merge_adapter, write_dense
from alignkit.models.merging.report import MergeReport
from alignkit.models.weights import shards, writing
from alignkit.models.weights.comparing import CHECK_TOKENS, take_samples

ROWS = [np.random.default_rng(n).integers(0, 600, 40) for n in range(4)]
QUESTION = torch.arange(100, 112)[None]


def write_adapter(folder: Path, size: float = 0.1, family: str = "llama", **options: Any) -> Path:
    """An adapter written by plain PEFT, with B drawn at `size`."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(family), LoraConfig(**{**fields, **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def merge(base: Path, adapter: Path, output: Path, **options: Any) -> MergeReport:
    fields: dict[str, Any] = {"rows": ROWS, "dtype": torch.float32}
    return merge_adapter(BaseModel(str(base)), adapter, output, **{**fields, **options})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.as_tensor(row)[None]).logits[0].float() for row in ROWS])


def adapted(base: Path, adapter: Path) -> Any:
    """Base + adapter through plain PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"alpha_pattern": {"v_proj": 32, "down_proj": 1}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*mlp\.(up|down)_proj"},
        {"use_dora": True},
    ],
    ids=["plain", "rslora", "ranks", "alphas", "one layer", "regex", "dora"],
)
def test_merged_is_base_and_adapter(
    options: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", **options)
    report = merge(tiny_base, adapter, tmp_path / "merged")
    exact = logits(adapted(tiny_base, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32))
    # float32 on both sides, logits up to 30: 1e-5 of them.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=3e-4)
    assert (base - exact).abs().max() > 0.1  # the adapter says something
    assert report.max_logit_difference == pytest.approx(
        float((found - exact).abs().max()), abs=1e-4
    )
    assert report.same_top_token == 1.0
    assert report.positions == 160
    assert report.survived == pytest.approx(1.0, abs=1e-3)
    assert report.mean_kl < 1e-6
    assert report.mean_kl_to_base > 1e-3


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_peft_changed_is_refused(start: str, tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(ModelError, match=f"started with '{start}', which changes the base"):
        merge(tiny_base, adapter, tmp_path / "merged")
    assert folder_names(tmp_path) == ["adapter"]


def test_the_report_in_closed_form(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    report = merge(tiny_base, adapter, tmp_path / "merged")
    p, q = (
        torch.log_softmax(x.double(), -1)
        for x in (
            logits(adapted(tiny_base, adapter)),
            logits(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)),
        )
    )
    # KL(base + adapter ‖ base) = Σ p (log p - log q), averaged over the positions.
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert report.mean_kl_to_base == pytest.approx(expected, rel=1e-4)
    assert report.modules == 14
    assert report.dtype == "float32"
    assert report.output == str(tmp_path / "merged")
    assert report.to_json()["positions"] == report.positions
    assert len(report.lines()) == 3


def test_the_folder_is_an_ordinary_model(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    merge(tiny_base, adapter, tmp_path / "merged", stop_tokens=[5, 7])
    assert folder_names(tmp_path) == ["adapter", "merged"]
    names = folder_names(tmp_path / "merged")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(names)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(names)
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text(encoding="utf-8"))
    eos = AutoTokenizer.from_pretrained(tiny_base).eos_token_id
    assert settings["eos_token_id"] == [eos, 5, 7]
    text = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert text.startswith("<|im_start|>")
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32}
    assert not any("lora" in name for name in stored)


def test_greedy_text_is_the_same(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    merge(tiny_base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    texts = [
        model.generate(QUESTION, max_new_tokens=24, do_sample=False)[0].tolist()
        for model in (adapted(tiny_base, adapter), merged, base)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_bfloat16_keeps_most_of_the_update(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", size=0.02)
    report = merge(tmp_path / "base", adapter, tmp_path / "merged", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert report.survived == pytest.approx(1.0, abs=0.05)
    assert report.survived != 1.0
    assert 0 < report.rounding_error < 1
    assert 0 < report.mean_kl < 1e-3
    # Survived = <rounded, exact> / |exact|², by hand over all adapted layers.
    base = load_file(tmp_path / "base/model.safetensors")
    kept = squared = lost = 0.0
    for name, module in adapted(tmp_path / "base", adapter).named_modules():
        if hasattr(module, "lora_A"):
            key = name.removeprefix("base_model.model.") + ".weight"
            delta = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            rounded = stored[key].float() - base[key].float()
            kept += float((rounded * delta).sum())
            squared += float(delta.square().sum())
            lost += float((rounded - delta).square().sum())
    assert report.survived == pytest.approx(kept / squared, rel=1e-4)
    assert report.rounding_error == pytest.approx((lost / squared) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_small_updates_survive_bfloat16(size: float, tmp_path: Path) -> None:
    # bfloat16 weights near 0.1 are 0.0005 apart: rounding to the nearest would lose most of the
    # smaller updates; stochastic rounding keeps their expectation, over 110,000 weights.
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", size=size)
    report = merge(tmp_path / "base", adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert report.survived == pytest.approx(1.0, abs=0.05)
    assert report.mean_kl < 1e-3
    # The same adapter gives the same bytes.
    merge(tmp_path / "base", adapter, tmp_path / "again", dtype=torch.bfloat16)
    one, two = (tmp_path / name / "model.safetensors" for name in ("merged", "again"))
    assert one.read_bytes() == two.read_bytes()


def refused(tmp_path: Path, size: float) -> str:
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", size=size)
    with pytest.raises(ModelError, match=r"is not faithful to base \+ adapter: KL") as raised:
        merge(tmp_path / "base", adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert raised.value.hint.startswith("merge into wider weights with --dtype float32")
    assert folder_names(tmp_path) == ["adapter", "base"]
    # What the hint says helps.
    report = merge(tmp_path / "base", adapter, tmp_path / "merged", dtype=torch.float32)
    assert report.survived == pytest.approx(1.0, abs=1e-3)
    return raised.value.message


def test_an_update_that_rounding_eats_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_the_nearest(exact: torch.Tensor, dtype: torch.dtype, _: Any) -> torch.Tensor:
        return exact.to(dtype)

    monkeypatch.setattr(merged_weights, "round_stochastically", to_the_nearest)
    message = refused(tmp_path, size=1e-5)
    assert message.endswith("less than half of the update survived rounding to bfloat16: 1.2%")


def test_a_merge_that_moves_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_report, "MAX_KL", (1e-7, 1e-7))
    assert "nats/token is more than 1e-07" in refused(tmp_path, size=0.02)


def test_an_untrained_adapter_merges_to_the_base(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", size=0.0)
    report = merge(tiny_base, adapter, tmp_path / "merged")
    assert (report.survived, report.rounding_error, report.mean_kl_to_base) == (1.0, 0.0, 0.0)
    ours, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tiny_base)
    )
    assert all(torch.equal(ours[name], base[name]) for name in base)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change` happen to each weight file between writing and reading it back."""
    right = shards.save_file

    def wrong(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        right(tensors, path, **options)
        change(path)

    monkeypatch.setattr(shards, "save_file", wrong)


def flip_one_weight(path: Path) -> None:
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def test_a_file_that_does_not_hold_what_was_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    spoil(monkeypatch, flip_one_weight)
    with pytest.raises(ModelError) as raised:
        merge(tiny_base, adapter, tmp_path / "merged")
    assert raised.value.message == (
        "the merged file does not hold what was written: model.layers.1.mlp.up_proj.weight differs"
    )
    assert folder_names(tmp_path) == ["adapter"]


def test_whole_weights_that_are_not_written_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = writing.share_files

    def wrong(folder: Path) -> None:
        right(folder)
        flip_one_weight(folder / "model.safetensors")

    monkeypatch.setattr(writing, "share_files", wrong)
    with pytest.raises(ModelError, match=r"up_proj\.weight differs"):
        write_dense(tiny_model(), tiny_tokenizer(), tmp_path / "merged", torch.float32, [])
    assert folder_names(tmp_path) == []


def test_an_existing_output_is_kept(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ModelError, match="already exists") as raised:
        merge(tiny_base, adapter, output)
    assert raised.value.hint == "add --overwrite, or name another --output"
    # A merge that fails keeps it even with --overwrite; one that succeeds replaces it.
    with monkeypatch.context() as patch:
        spoil(patch, flip_one_weight)
        with pytest.raises(ModelError):
            merge(tiny_base, adapter, output, overwrite=True)
    assert folder_names(output) == ["mine.txt"]
    merge(tiny_base, adapter, output, overwrite=True)
    assert "mine.txt" not in folder_names(output)


def test_a_full_disk_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spoil(monkeypatch, full)
    with pytest.raises(ModelError, match="No space left on device"):
        merge(tiny_base, adapter, tmp_path / "merged")
    assert folder_names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    # Biases on q, k, v; head and embedding one matrix.
    save_tiny(tmp_path / "base", family)
    adapter = write_adapter(tmp_path / "adapter", family=family)
    report = merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert report.mean_kl < 1e-6 < report.mean_kl_to_base
    exact = logits(adapted(tmp_path / "base", adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), exact, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([10], 10), ([1000], CHECK_TOKENS), ([100] * 9, CHECK_TOKENS), ([5, 0, 7], 12)],
)
def test_positions_compared(lengths: list[int], expected: int) -> None:
    rows = [np.arange(length) for length in lengths]
    assert sum(len(one.ids) - one.first for one in take_samples(rows)) == expected
