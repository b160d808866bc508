"""Whole runs that start from their rows: every stage, resumed, on several processes, continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from peft import PeftModel
from running import (
    adapter_of,
    assert_same,
    break_off,
    losses,
    make_ppo_recipe,
    make_preference_recipe,
    make_recipe,
    make_rows,
    steps_of,
    train,
    write_rows,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignkit.errors import AlignkitError
from alignkit.recipe.load import load_recipe
from alignkit.stages.merge import MergeOptions, merge_run
from alignkit.stages.run import plan_stage

pytestmark = pytest.mark.slow

MOVING = {"rho": 2.0}
EVA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8, "init": "eva", "eva": MOVING}
FIELDS: dict[str, Any] = {"training__max_steps": 3, "merge": True}
ROWS = torch.arange(5, 65).view(3, 20)


def make(folder: Path, base: Path, stage: str, **fields: Any) -> Path:
    fields = {"adapter": EVA, **FIELDS, **fields}
    if stage == "sft":
        return make_recipe(folder, base, **fields)
    if stage == "ppo":
        return make_ppo_recipe(folder, base, **fields)
    return make_preference_recipe(folder, base, stage, **fields)


def about(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def a_of(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    """A of each layer in a checkpoint, by its name in the base."""
    path = run / f"checkpoints/step-{step:06d}/trainable.safetensors"
    return {
        name.partition("base_model.model.")[2].removesuffix(".lora_A.default.weight"): weight
        for name, weight in load_file(path).items()
        if name.endswith("lora_A.default.weight")
    }


def starts(folder: Path, base: Path, stage: str, *overrides: str, **fields: Any) -> Any:
    """Factors A of a run whose steps change nothing."""
    rate = {"training__learning_rate": 1e-30, "training__max_steps": 1, "merge": False}
    train(make(folder, base, stage, **{**rate, **fields}), *overrides)
    return a_of(folder / "run")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo"])
def test_every_stage(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    train(make(tmp_path, tiny_base, stage))
    run = tmp_path / "run"
    start = about(run)["start"]
    assert start["rows"] == 12
    assert 0 < start["used"] <= start["read"]
    config = json.loads((run / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["init_lora_weights"] is True
    ranks = [len(w) for name, w in adapter_of(run).items() if "lora_A" in name]
    assert sum(ranks) == 4 * 14
    assert len(set(ranks)) > 1
    assert len(config["rank_pattern"]) == sum(rank != 4 for rank in ranks)
    first = steps_of(run)[0]
    if stage == "dpo":  # the start is no update: the policy is its reference
        assert first["rewards/margins"] == 0.0
    if stage == "ppo":
        assert first["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    merge_run([str(run)], MergeOptions(output=tmp_path / "again"))
    if stage == "reward":
        return
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        untouched = plain(ROWS).logits
        read = PeftModel.from_pretrained(plain, str(run / "adapter")).eval()(ROWS).logits
        torch.testing.assert_close(merged.eval()(ROWS).logits, read, rtol=1e-4, atol=1e-3)
    assert (read - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto"])
def test_the_first_loss_is_that_of_a_plain_start(
    stage: str, tiny_base: Path, tmp_path: Path
) -> None:
    plain = {key: value for key, value in EVA.items() if key not in ("init", "eva")}
    found = []
    for name, adapter in (("eva", EVA), ("plain", plain)):
        path = make(tmp_path / name, tiny_base, stage, adapter=adapter, merge=False)
        train(path, "training.max_steps=2")
        found.append(losses(tmp_path / name / "run"))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_the_start_does_not_follow_micro_batches(tiny_base: Path, tmp_path: Path) -> None:
    one = starts(tmp_path / "a", tiny_base, "sft", "training.microbatch_tokens=4096")
    two = starts(tmp_path / "b", tiny_base, "sft", "training.microbatch_tokens=64")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = starts(tmp_path / "c", tiny_base, "sft", "seed=5")  # other rows come first
    assert any(one[n].shape != other[n].shape or not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_packed_and_padded_rows_start_alike(
    attention: str, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = {**EVA, "eva": {"rho": 1.0}}
    override = f"model.attention={attention}"
    one = starts(tmp_path / "a", tiny_base, "dpo", override, adapter=adapter)
    two = starts(tmp_path / "b", tiny_base, "dpo", adapter=adapter)
    for name, a in one.items():
        torch.testing.assert_close(a, two[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "quantization"), [({}, "nf4"), ({"dora": True}, "int8"), ({"rslora": True}, "nf4")]
)
def test_over_quantized_bases(
    fields: dict[str, Any], quantization: str, tiny_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    adapter = {**EVA, **fields}
    train(make(tmp_path, tiny_base, "sft", adapter=adapter, model__quantization=quantization))
    assert len(losses(tmp_path / "run")) == 3
    plain = starts(tmp_path / "plain", tiny_base, "sft", adapter=adapter)
    narrow = starts(
        tmp_path / "narrow", tiny_base, "sft", adapter=adapter, model__quantization=quantization
    )
    # What the quantized layers pass on is what is looked at.
    last = "model.layers.1.mlp.down_proj"
    assert plain[last].shape != narrow[last].shape or not torch.equal(plain[last], narrow[last])


@pytest.mark.parametrize("step", [0, 2])
def test_only_a_checkpoint_knows_the_start(
    step: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"training__save_every": 2, "training__max_steps": 4, "merge": False}
    train(make(tmp_path, tiny_base, "sft", **fields))
    run = tmp_path / "run"
    found = about(run)["start"]
    whole = break_off(run, step)
    if step:  # the rows are not looked at again

        def never(*args: Any) -> None:
            raise AssertionError("the start was looked for again")

        monkeypatch.setattr("alignkit.stages.adapter_start.find_start", never)
    train(tmp_path / "recipe.yaml", resume=True)
    assert_same(run, whole)
    assert about(run)["start"] == found


APART = """
import os, torch
import alignkit.models.eva as eva
import alignkit.stages.roles as roles
import alignkit.stages.session as session
eva._SEED += int(os.environ["RANK"])
attach, path = session.attach_adapter, "FOLDER/start-" + os.environ["RANK"] + ".pt"
def attach_and_keep(*args, **kwargs):
    model = attach(*args, **kwargs)
    if not os.path.exists(path):  # the policy's comes first
        weights = {n: w.data for n, w in model.named_parameters() if "lora_A" in n}
        torch.save(weights, path)
    return model
roles.attach_adapter = session.attach_adapter = attach_and_keep
"""
"""Each process finds a start of its own, and keeps the one that it attaches."""


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_processes_start_alike(
    stage: str, alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    fields = {"training__learning_rate": 1e-30, "training__max_steps": 1, "merge": False}
    one = starts(tmp_path / "one", tiny_base, stage)
    recipe = make(tmp_path / "two", tiny_base, stage, **fields)
    before = APART.replace("FOLDER", str(tmp_path))
    done = alignkit.together(2, stage, recipe, cwd=tmp_path, before=before)
    assert done.code == 0, done.stderr
    held = [torch.load(tmp_path / f"start-{rank}.pt") for rank in range(2)]
    assert held[0].keys() == held[1].keys()
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    two = a_of(tmp_path / "two/run")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_continued_it_keeps_its_ranks(tiny_base: Path, tmp_path: Path) -> None:
    held = [{"path": "data_templates/sft/messages_eval.jsonl", "take": 6}]
    train(make(tmp_path / "a", tiny_base, "sft", data__eval=held, merge=False))
    first = tmp_path / "a/run"
    adapter = {"kind": "lora", "from": str(first)}
    train(make(tmp_path / "b", tiny_base, "sft", adapter=adapter, data__eval=held, merge=False))
    second = tmp_path / "b/run"
    after, before = about(first)["summary"]["after"], about(second)["summary"]["before"]
    assert before["loss"] == after["loss"]
    assert "start" not in about(second)
    name = "adapter/adapter_config.json"
    assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())


def test_a_layer_without_a_rank_is_not_trained(tiny_base: Path, tmp_path: Path) -> None:
    # One rank for each layer, and up to 14 in those that explain most.
    adapter = {**EVA, "rank": 1, "alpha": 2, "eva": {"rho": 14.0}}
    train(make(tmp_path / "a", tiny_base, "sft", adapter=adapter))
    run = tmp_path / "a/run"
    weights = adapter_of(run)
    trained = {n.split(".lora_A")[0] for n in weights if "lora_A" in n}
    assert len(trained) < 14
    assert sum(len(w) for n, w in weights.items() if "lora_A" in n) == 14
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    read = PeftModel.from_pretrained(plain, str(run / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ROWS).logits, read(ROWS).logits, rtol=1e-4, atol=1e-3)
    again = {"kind": "lora", "from": str(run)}
    train(make(tmp_path / "b", tiny_base, "sft", adapter=again, merge=False))
    assert adapter_of(tmp_path / "b/run").keys() == weights.keys()
    break_off(run, 0)
    train(tmp_path / "a/recipe.yaml", resume=True)
    assert adapter_of(run).keys() == weights.keys()


def test_the_user_sees_what_it_was_found_from(
    alignkit: Any, tiny_base: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", make_rows(60))
    adapter = {**EVA, "rank": 1, "eva": {"rho": 14.0, "max_tokens": 3000}}
    fields = {"training__max_steps": 15, "training__learning_rate": 1e-6, "merge": False}
    recipe = make(tmp_path, tiny_base, "sft", adapter=adapter, **fields)
    done = alignkit("sft", str(recipe), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "examples, at most " in done.stderr
    assert "eva: reading rows, until all layers settle or 3,000 tokens are read" in done.stderr
    start = about(tmp_path / "run")["start"]
    counts = f"eva: {start['rows']} rows, {start['read']:,} tokens read, {start['used']:,} states"
    assert counts in done.stderr
    assert "eva: no rank is left for " in done.stderr
    assert "had not settled" in done.stderr
    assert "warning: eva: the directions of" in done.stderr
    assert "raise adapter.eva.max_tokens" in done.stderr
    planned = alignkit("plan", str(recipe), "output=elsewhere", cwd=tmp_path)
    assert "at most " in planned.stdout
    short = alignkit(
        "sft", str(recipe), "adapter.rank=64", "output=short", "training.max_steps=1", cwd=tmp_path
    )
    assert short.code == 2
    assert "adapter.rank = 64 is more than" in short.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": {**EVA, "from": "runs/a"}}, "does not go with from"),
        ({"adapter": {"kind": "lora", "eva": {"rho": 1.0}}}, "does nothing with init = default"),
        ({"adapter": {**EVA, "eva": {"rho": 0.5}}}, "rho"),
        ({"adapter": {**EVA, "eva": {"label_mask_value": -100}}}, "label_mask_value"),
        ({"adapter": {**EVA, "targets": ["lm_head", "q_proj"]}}, "not called as a layer"),
        ({"adapter": {**EVA, "rank": 32, "eva": {"rho": 64.0, "max_tokens": 1}}}, "wants 64 direc"),
    ],
)
def test_what_does_not_go_together(
    fields: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(AlignkitError, match=message):
        train(make(tmp_path, tiny_base, "sft", **fields))


def test_the_plan_needs_no_start(tiny_base: Path, tmp_path: Path) -> None:
    found = {}
    for rho in (1.0, 2.0):
        path = make(tmp_path / str(rho), tiny_base, "sft", adapter={**EVA, "eva": {"rho": rho}})
        plan = plan_stage(load_recipe(str(path)).recipe, 1)[1]
        found[rho] = plan
        train(path, "merge=false")
        weights = adapter_of(tmp_path / str(rho) / "run")
        trained = sum(weight.numel() for weight in weights.values())
        assert trained == plan.model.trainable if rho == 1 else trained < plan.model.trainable
    assert found[1.0].memory.training_state < found[2.0].memory.training_state


def test_added_tokens_and_whole_modules_stay_out_of_it(tiny_base: Path, tmp_path: Path) -> None:
    for number, fields in enumerate(
        (
            {"model__add_tokens": ["<tool>", "</tool>"]},
            {"adapter": {**EVA, "modules_to_save": ["embed_tokens"]}},
        )
    ):
        train(make(tmp_path / str(number), tiny_base, "sft", **fields))
        names = [n for n in adapter_of(tmp_path / str(number) / "run") if "lora_A" in n]
        assert len(names) == 14
