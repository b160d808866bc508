"""`alignkit merge-lora` of several adapters, and of ones over quantized bases: said and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import CommandLine, refused
from peft import LoraConfig, get_peft_model
from running import make_preference_recipe, make_recipe, train
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two runs over it, one over nf4, a reward run, and an adapter of another base."""
    folder = tmp_path_factory.mktemp("merging")
    save_tiny(folder / "base")
    lora = {"kind": "lora", "rank": 4}
    for name, fields in (
        ("one", {"adapter": lora}),
        ("two", {"adapter": {**lora, "rank": 2}, "seed": 1}),
        ("narrow", {"adapter": lora, "model__quantization": "nf4"}),
    ):
        train(make_recipe(folder / name, folder / "base", merge=False, **fields))
    train(make_preference_recipe(folder / "rm", folder / "base", "reward", merge=False))
    save_tiny(folder / "other", seed=9)
    model = get_peft_model(tiny_model(seed=9), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(folder / "other")
    model.save_pretrained(folder / "stranger")
    return folder


@pytest.mark.slow
def test_two_runs_become_one_model(alignkit: CommandLine, runs: Path) -> None:
    arguments = ("merge-lora", "one/run", "two/run", "--weights", "0.7,0.3", "--output", "both")
    done = alignkit(*arguments, "--json", cwd=runs)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["modules"] == 14
    assert report["mean_kl"] < 1e-6 < report["mean_kl_to_base"]
    assert abs(report["merged_loss"] - report["loss"]) < 1e-4
    assert (runs / "both/README.md").is_file()
    ids = torch.arange(40, 60)[None]
    logits = {}
    for name in ("base", "both"):
        model = AutoModelForCausalLM.from_pretrained(runs / name, dtype=torch.float32)
        logits[name] = model(ids).logits.detach()
    assert (logits["both"] - logits["base"]).abs().max() > 1e-3
    for method in ("ties", "dare_linear", "dare_ties"):
        again = alignkit(*arguments[:-1], method, "--method", method, "--density", "0.5", cwd=runs)
        assert again.code == 0, again.stderr
        assert f"merged 14 layers into {method} (float32)" in again.stderr


def test_after_training_over_a_quantized_base(alignkit: CommandLine, runs: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for onto in ("original", "dequantized"):
        done = alignkit("merge-lora", "narrow/run", "--onto", onto, "--output", onto, cwd=runs)
        assert done.code == 0, done.stderr
        assert "trained over nf4 weights: loss " in done.stderr
        assert f"merged onto the {onto} ones" in done.stderr


def test_what_cannot_be_merged_together(alignkit: CommandLine, runs: Path) -> None:
    two = ("merge-lora", "one/run", "two/run")
    out = ("--output", "refused")
    cases = [
        ((*two,), "several adapters have no folder of their own", "name --output"),
        ((*two, *out, "--weights", "1"), "--weights has 1 numbers for 2 adapters", "one for each"),
        ((*two, *out, "--weights", "a,b"), "--weights must be numbers", "one for each adapter"),
        ((*two, *out, "--method", "tie"), "--method cannot be 'tie'", "one of linear, ties"),
        ((*two, *out, "--density", "0"), "--density must be above 0 and at most 1", "0.5 keeps"),
        (("merge-lora", "one/run", *out, "--onto", "gguf"), "--onto cannot be 'gguf'", "one of a"),
        (
            ("merge-lora", "one/run", *out, "--onto", "dequantized"),
            "was not trained over one quantized base",
            "remove --onto",
        ),
        (("merge-lora", "one/run", "rm/run", *out), "rm/run/adapter is a reward model", "merge it"),
        (("merge-lora", "one/run", "stranger", *out), "stranger belongs to", "adapters are combin"),
        (("merge-lora", "one/run", "base", *out), "base holds no adapter", "name a run folder"),
    ]
    for arguments, sentence, hint in cases:
        refused(alignkit(*arguments, cwd=runs), sentence, hint)
        assert not (runs / "refused").exists()
