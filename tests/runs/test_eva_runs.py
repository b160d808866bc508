"""Whole runs that start from their rows: every stage, resumed, on several processes, continued."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import CommandLine
from documents import random_documents
from peft import PeftModel
from running import (
    adapter_of,
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

from alignkit.data.packing import step_items
from alignkit.errors import AlignkitError, ModelError
from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.recipe.adapters import EvaSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.registry import plan_stage
from alignkit.stages.running.adapter_start import passes_of

pytestmark = pytest.mark.slow  # whole runs

MOVING = {"rho": 2.0}
EVA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 8, "init": "eva", "eva": MOVING}
FIELDS: dict[str, Any] = {"training__max_steps": 2, "merge": True}
ROWS = torch.arange(5, 65).view(3, 20)


def make(folder: Path, base: Path, stage: str, **fields: Any) -> Path:
    fields = {"adapter": EVA, **FIELDS, **fields}
    if stage == "sft":
        return make_recipe(folder, base, **fields)
    if stage == "ppo":
        return make_ppo_recipe(folder, base, **{"objective": {"epochs": 1}, **fields})
    return make_preference_recipe(folder, base, stage, **fields)


def about(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def a_of(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    """Factor A of each layer in a checkpoint, by the layer's name in the base."""
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


@pytest.fixture(scope="module")
def plain_start(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Factors A of an SFT run whose rows are read at once."""
    folder = tmp_path_factory.mktemp("start")
    return starts(folder, tiny_base, "sft", "training.microbatch_tokens=4096")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo"])
def test_every_stage(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    train(make(tmp_path, tiny_base, stage, merge=False))
    run = tmp_path / "run"
    start = about(run)["start"]
    assert start["rows"] == 8
    assert 0 < start["used"] <= start["read"]
    config = json.loads((run / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["init_lora_weights"] is True
    ranks = [len(w) for name, w in adapter_of(run).items() if "lora_A" in name]
    assert sum(ranks) == 4 * 14
    assert len(set(ranks)) > 1
    assert len(config["rank_pattern"]) == sum(rank != 4 for rank in ranks)
    first = steps_of(run)[0]
    if stage == "dpo":  # the start is not an update: the policy equals its reference
        assert first["rewards/margins"] == 0.0
    if stage == "ppo":
        assert first["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    else:
        assert_first_loss_of_a_plain_start(run, stage, tiny_base)
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


def assert_first_loss_of_a_plain_start(run: Path, stage: str, base: Path) -> None:
    plain = {key: value for key, value in EVA.items() if key not in ("init", "eva")}
    train(make(run.parent / "plain", base, stage, adapter=plain, merge=False))
    found = losses(run), losses(run.parent / "plain" / "run")
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_the_start_does_not_follow_micro_batches(
    plain_start: Any, tiny_base: Path, tmp_path: Path
) -> None:
    one = plain_start
    two = starts(tmp_path / "b", tiny_base, "sft", "training.microbatch_tokens=64")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = starts(tmp_path / "c", tiny_base, "sft", "seed=5")  # other rows come first
    assert any(one[n].shape != other[n].shape or not torch.equal(one[n], other[n]) for n in one)


def test_packed_and_padded_rows_start_alike(tiny_base: Path, tmp_path: Path) -> None:
    adapter = {**EVA, "eva": {"rho": 1.0}}
    one, two = (
        starts(tmp_path / name, tiny_base, "dpo", f"model.attention={name}", adapter=adapter)
        for name in ("eager", "packed")
    )
    for name, a in one.items():
        torch.testing.assert_close(a, two[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_quantized_bases(
    quantization: str, plain_start: Any, tiny_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    narrow = starts(tmp_path, tiny_base, "sft", model__quantization=quantization)
    # The states are those that the quantized layers pass on.
    last = "model.layers.1.mlp.down_proj"
    assert plain_start[last].shape != narrow[last].shape or not torch.equal(
        plain_start[last], narrow[last]
    )


@pytest.mark.parametrize(("targets", "states"), [(True, 5), (False, 25)])
def test_each_pass_has_enough_states(
    targets: bool, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = random_documents(tuple((20, (5,)) for _ in range(33)), 700, 4)
    rows = [dataclasses.replace(document, row=number) for number, document in enumerate(made)]
    how = EvaSpec(use_label_mask=targets)
    plan: Any = SimpleNamespace(steps=9, steps_per_epoch=9, batch_size=4)
    assert [len(one.rows) for one in passes_of(rows, plan, 0, how, 10 * states)] == [33]
    monkeypatch.setattr("alignkit.stages.running.adapter_start.MAX_TOKENS", 50)
    passes = passes_of(rows, plan, 0, how, 10 * states)
    # Ten rows have enough; what is left over, three, goes with the last.
    assert [len(one.rows) for one in passes] == [10, 10, 13]
    order = [int(n) for step in range(9) for n in step_items(step, 33, 4, 0)]
    assert [n for one in passes for n in one.rows] == order
    few = how.model_copy(update={"max_tokens": 260})
    assert [len(one.rows) for one in passes_of(rows, plan, 0, few, 10 * states)] == [11]
    for limit, hint in ((260, "raise adapter.eva.max_tokens"), (10_000, "give more rows")):
        less = how.model_copy(update={"max_tokens": limit})
        with pytest.raises(ModelError, match=r"needs 1000 (states|tokens).* have ") as caught:
            passes_of(rows, plan, 0, less, 1000)
        assert hint in str(caught.value.hint)


def break_after(run: Path, step: int) -> None:
    """As if the process had died after a step."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (run / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    state = about(run)
    (run / "run.json").write_text(json.dumps({**state, "status": "failed"}), encoding="utf-8")
    shutil.rmtree(run / "adapter")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_resuming_is_exact(stage: str, tiny_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    fields = {"training__save_every": 2, "training__max_steps": 4, "merge": False}
    adapter = {**EVA, "rslora": True, "alpha_pattern": {"up_proj": 3}}
    recipe = make(tmp_path, tiny_base, stage, adapter=adapter, **fields)
    train(recipe)
    broken = tmp_path / "run"
    straight = Path(shutil.copytree(broken, tmp_path / "straight"))
    if stage == "sft":
        resume_and_compare(broken, straight, 0)

    def never(*args: Any) -> None:
        raise AssertionError("the start was looked for again")

    # The rows are not looked at again.
    monkeypatch.setattr("alignkit.stages.running.adapter_start.find_start", never)
    resume_and_compare(broken, straight, 2)


def resume_and_compare(broken: Path, straight: Path, step: int) -> None:
    break_after(broken, step)
    train(broken.parent / "recipe.yaml", resume=True)
    assert losses(broken) == losses(straight)
    one, two = adapter_of(straight), adapter_of(broken)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    config = "adapter/adapter_config.json"
    assert (straight / config).read_text() == (broken / config).read_text()
    assert about(broken)["start"] == about(straight)["start"]


APART = """
import os
import torch
import peft.tuners.lora.eva as eva
import alignkit.models.adapters.attach
made, seed = eva.IncrementalPCA, int(os.environ["RANK"])
eva.IncrementalPCA = lambda **options: made(**{**options, "lowrank_seed": 42 + seed})
attach = alignkit.models.adapters.attach.attach_adapter
def attach_and_keep(*args, **kwargs):
    model = attach(*args, **kwargs)
    weights = {n: w.data for n, w in model.named_parameters() if "lora_A" in n}
    torch.save(weights, "start-" + os.environ["RANK"] + ".pt")
    return model
for module in list(__import__("sys").modules.values()):
    if getattr(module, "attach_adapter", None) is attach:
        module.attach_adapter = attach_and_keep
"""
"""Each process computes a start of its own, and stores the one that it attaches."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_processes_start_alike(
    stage: str, alignkit: CommandLine, plain_start: Any, tiny_base: Path, tmp_path: Path
) -> None:
    fields = {"training__learning_rate": 1e-30, "training__max_steps": 1, "merge": False}
    one = plain_start if stage == "sft" else starts(tmp_path / "one", tiny_base, stage)
    recipe = make(tmp_path / "two", tiny_base, stage, **fields)
    done = alignkit.together(2, stage, recipe, cwd=tmp_path, before=APART)
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
    break_after(run, 0)
    shutil.rmtree(run / "merged")
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
        ({"adapter": {**EVA, "from": "runs/a"}}, "cannot be combined with from"),
        ({"adapter": {"kind": "lora", "eva": {"rho": 1.0}}}, "does nothing with init = default"),
        ({"adapter": {**EVA, "eva": {"rho": 0.5}}}, "rho"),
        ({"adapter": {**EVA, "eva": {"label_mask_value": -100}}}, "label_mask_value"),
        ({"adapter": {**EVA, "targets": ["lm_head", "q_proj"]}}, "not called as a layer"),
        ({"adapter": {**EVA, "rank": 32, "eva": {"rho": 64.0}}}, "follows 2048 directions"),
        ({"adapter": {**EVA, "rank": 16, "eva": {"rho": 2.0, "max_tokens": 1}}}, "needs 64 states"),
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
