"""Whole runs that train a prefix: what they leave, what reads it, what refuses it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine, refused
from peft import PeftModel
from running import (
    adapter_of,
    furthest,
    losses,
    make_ppo_recipe,
    make_preference_recipe,
    make_prompts,
    make_recipe,
    steps_of,
    train,
    write_rows,
)
from tiny import save_tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from alignkit.errors import AlignkitError, ModelError, RecipeError
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.prefix import STATES, start_words, text_states
from alignkit.models.attention.prefix import prefix_states
from alignkit.models.base.identity import weights_fingerprint
from alignkit.models.base.loading import BaseModel
from alignkit.models.opening import open_model
from alignkit.recipe.adapters import PrefixSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.rows import load_rows

pytestmark = pytest.mark.slow

RAW = {"kind": "prefix", "tokens": 6}
PROJECTED = {"kind": "prefix", "tokens": 6, "projection": True, "projection_width": 24}
KINDS: dict[str, dict[str, Any]] = {"raw": RAW, "projection": PROJECTED}
RATES = {"raw": 5e-2, "projection": 5e-3}
HELD = [{"path": "data_templates/sft/messages_eval.jsonl", "take": 6}]


def run_of(folder: Path, base: Path, kind: str = "raw", stage: str = "sft", **fields: Any) -> Path:
    fields = {
        "adapter": KINDS[kind],
        "training__max_steps": 2,
        "training__learning_rate": RATES[kind],
        **fields,
    }
    if stage == "sft":
        train(make_recipe(folder, base, **fields))
    else:
        recipe = make_preference_recipe(folder, base, stage, **fields)
        values = json.loads(recipe.read_text(encoding="utf-8"))
        values.pop("merge", None)
        recipe.write_text(json.dumps(values), encoding="utf-8")
        train(recipe)
    return folder / "run"


@pytest.mark.parametrize(
    ("stage", "kind", "quantization"),  # each kind in every stage and over every base
    [
        ("dpo", "raw", "none"),
        ("dpo", "projection", "nf4"),
        ("sft", "projection", "none"),
        ("sft", "raw", "int8"),
        ("kto", "raw", "nf4"),
        ("kto", "projection", "int8"),
    ],
)
def test_trained_saved_and_read(
    stage: str, kind: str, quantization: str, tiny_base: Path, tmp_path: Path
) -> None:
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    run = run_of(tmp_path, tiny_base, kind, stage, model__quantization=quantization)
    assert len(losses(run)) == 2
    assert not (run / "merged").exists()
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert about["status"] == "finished"
    assert about["summary"]["merge"] is None
    (stored,) = adapter_of(run).values()
    assert stored.shape == (6, 2 * 2 * 2 * 16)
    still = {"training__learning_rate": 1e-12, "training__max_steps": 1}
    fresh = run_of(tmp_path / "still", tiny_base, kind, stage, **still)
    (start,) = adapter_of(fresh).values()
    assert float((stored - start).abs().max()) > 1e-3
    ids = torch.arange(5, 65).view(3, 20)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    opened = open_model(str(run), dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        found = PeftModel.from_pretrained(base, str(run / "adapter")).eval()(input_ids=ids).logits
        torch.testing.assert_close(opened.model(input_ids=ids).logits, found, rtol=0, atol=1e-6)
    assert float((found - plain).abs().max()) > 0.05
    if (stage, quantization) == ("dpo", "none"):
        # The reference is the base alone; a prefix does not start there.
        assert abs(losses(run)[0] - 0.6931) > 1e-3


def test_the_first_loss_is_pefts(tiny_base: Path, tmp_path: Path) -> None:
    """The mean loss of all trained tokens of the rows, one at a time through plain PEFT."""
    run = run_of(
        tmp_path,
        tiny_base,
        training__max_steps=1,
        training__learning_rate=1e-12,
        training__batch_size=16,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    recipe = load_recipe(str(tmp_path / "recipe.yaml")).recipe
    rows = load_rows(recipe, start_model(recipe.model)).train
    total, count = 0.0, 0
    for item in range(len(rows)):
        document = rows.document(item)
        (branch,) = document.branches
        ids = torch.tensor([[*document.prompt.tolist(), *branch.ids.tolist()]])
        on = torch.tensor([False] * len(document.prompt) + list(branch.trained))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        each = cross_entropy(logits, ids[0, 1:], reduction="none")[on[1:]]
        total, count = total + float(each.double().sum()), count + len(each)
    assert losses(run)[0] == pytest.approx(total / count, rel=1e-5)


def test_a_run_starts_as_its_text(tiny_base: Path, tmp_path: Path) -> None:
    still = {"training__max_steps": 1, "training__learning_rate": 1e-12}
    stored = []
    for text in (None, "the cat sat on a mat and saw many red birds"):
        adapter = {**RAW, "text": text}
        run = run_of(tmp_path / str(text), tiny_base, adapter=adapter, **still)
        model = open_model(str(tiny_base), dtype=torch.float32).model
        spec = PrefixSpec(**adapter)
        given = {STATES: text_states(model, start_words(spec, BaseModel(str(tiny_base)), print))}
        expected = prefix_states(attach_adapter(model, spec, 0, initial=given.__getitem__))
        found = prefix_states(open_model(str(run), dtype=torch.float32).model)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        stored.append(found)
    assert float((stored[0] - stored[1]).abs().max()) > 0.1


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_must_not_change_the_result(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    fields = {"training__microbatch_tokens": 4096}
    whole = run_of(tmp_path / "whole", tiny_base, "raw", stage, **fields)
    others: dict[str, dict[str, Any]] = {
        "micro-batches and checkpointing": {
            "training__microbatch_tokens": 64,
            "training__gradient_checkpointing": True,
        },
        "padded": {**fields, "model__attention": "sdpa"},
    }
    for name, changes in others.items():
        run = run_of(tmp_path / name, tiny_base, "raw", stage, **changes)
        assert losses(run) == pytest.approx(losses(whole), rel=2e-6), name
        assert furthest(adapter_of(run), adapter_of(whole)) < 1e-4, name
        norms = [[step["grad_norm"] for step in steps_of(path)] for path in (run, whole)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), name


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_every_reference_is_the_base_alone(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / kind, tiny_base, "raw", stage, reference={"kind": kind})
        for kind in ("adapter_off", "frozen_copy", "cached")
    ]
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_two_processes(alignkit: CommandLine, tiny_base: Path, tmp_path: Path) -> None:
    kind = "projection"
    one = run_of(tmp_path / "one", tiny_base, kind)
    fields = {"adapter": KINDS[kind], "training__learning_rate": RATES[kind]}
    recipe = make_recipe(tmp_path / "two", tiny_base, training__max_steps=2, **fields)
    done = alignkit.together(2, "sft", recipe, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.stderr.count("there is no merged/") == 1
    assert losses(tmp_path / "two/run") == pytest.approx(losses(one), rel=1e-6)
    assert furthest(adapter_of(one), adapter_of(tmp_path / "two/run")) < 1e-5


def test_trained_on(tiny_base: Path, tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", tiny_base, "projection", data__eval=HELD)
    plain = {"kind": "prefix", "from": str(first)}
    second = run_of(tmp_path / "b", tiny_base, adapter=plain, data__eval=HELD)
    one, two = (
        json.loads((run / "run.json").read_text(encoding="utf-8"))["summary"]
        for run in (first, second)
    )
    for key in ("loss", "accuracy"):
        assert two["before"][key] == one["after"][key]
    assert two["after"]["loss"] != two["before"]["loss"]
    assert adapter_of(second).keys() == adapter_of(first).keys()
    for fields, sentence in (
        ({"tokens": 7}, "adapter.tokens = 7, but the adapter in .* has 6"),
        ({"projection": True}, "adapter.projection = True, but the adapter in .* has False"),
        ({"kind": "lora"}, "adapter.kind = lora, but .* is of kind prefix"),
    ):
        with pytest.raises(ModelError, match=sentence):
            run_of(tmp_path / "c", tiny_base, adapter={**plain, **fields})
    with pytest.raises(RecipeError, match="has text, which does nothing with projection or from"):
        run_of(tmp_path / "d", tiny_base, adapter={**plain, "text": "the cat"})


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds run/ with a prefix of one seventh of a nat, dpo/run over it, rm/run and prompts."""
    folder = tmp_path_factory.mktemp("prefix")
    run_of(folder, tiny_base, data__eval=HELD, training__max_steps=20)
    run_of(folder / "dpo", tiny_base, "raw", "dpo")
    lora = {"kind": "lora", "rank": 2}
    train(make_preference_recipe(folder / "rm", tiny_base, "reward", adapter=lora))
    write_rows(folder / "prompts.jsonl", make_prompts(4))
    make_recipe(folder / "next", folder / "run")
    return folder


def test_the_run_says_that_nothing_is_merged(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    make_recipe(tmp_path, tiny_base, adapter=RAW, training__max_steps=2, data__eval=HELD)
    planned = alignkit("plan", "recipe.yaml", cwd=tmp_path)
    assert planned.code == 0, planned.stderr
    asked = alignkit("plan", "recipe.yaml", "--json", cwd=tmp_path)
    plan = json.loads(asked.stdout)
    assert (plan["model"]["trainable"], plan["model"]["prefix"]) == (6 * 128, 6)
    assert plan["memory"]["merging"] == 0
    done = alignkit("sft", "recipe.yaml", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "trains 768 weights" in done.stderr
    assert "1×prefix 6→128" in done.stderr
    place = tmp_path / "run/adapter"
    assert f"the prefix is in {place}; there is no merged/, because no weight" in done.stderr
    card = (place / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "An adapter that cannot be merged" in card
    assert "## Held-out results" in card


def test_what_reads_base_and_prefix(alignkit: CommandLine, folder: Path) -> None:
    with_it = alignkit("generate", "run", "the cat sat", "--json", cwd=folder)
    assert with_it.code == 0, with_it.stderr
    best = alignkit(
        *("generate", "run", "the cat sat", "--best-of", "2", "--reward", "rm/run", "--json"),
        *("--max-new-tokens", "8"),
        cwd=folder,
    )
    assert best.code == 0, best.stderr
    chat = alignkit("chat", "run", cwd=folder, stdin="the cat\n")
    assert chat.code == 0, chat.stderr


def test_evaluated_as_at_the_end_of_the_run(alignkit: CommandLine, folder: Path) -> None:
    after = json.loads((folder / "run/run.json").read_text(encoding="utf-8"))["summary"]["after"]
    done = alignkit("eval", "run", "--json", "--dtype", "float32", cwd=folder)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)["run"]
    assert found["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert found["accuracy"] == after["accuracy"]
    pairs = ("--data", "data_templates/preference/pairs_eval.jsonl", "--take", "6")
    done = alignkit("eval", "dpo/run", *pairs, "--json", "--dtype", "float32", cwd=folder)
    assert done.code == 0, done.stderr


def test_what_needs_a_whole_model_refuses(alignkit: CommandLine, folder: Path) -> None:
    for command in (
        ("merge-lora", "run"),
        ("merge-lora", "run/adapter", "--output", "out"),
        ("export", "gguf", "run", "--output", "out.gguf"),
        ("export", "bnb", "run", "--output", "out", "--bits", "8"),
        ("sft", "next/recipe.yaml"),
        ("sft", "next/recipe.yaml", f"model.base={folder}/run/adapter"),
    ):
        done = alignkit(*command, cwd=folder)
        refused(done, "is a prefix, which cannot be merged: no weight can hold", "chat, generate")
    assert not (folder / "out").exists()


def test_it_is_not_a_base_for_another_run(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a prefix, which cannot be merged"):
        start_model(load_recipe(str(folder / "next/recipe.yaml")).recipe.model)
    over = json.loads((folder / "run/adapter/trained_over.json").read_text(encoding="utf-8"))
    assert over["fingerprint"] == weights_fingerprint(BaseModel(over["name"]))


def test_rows_beyond_the_room_after_a_prefix(alignkit: CommandLine, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", max_position_embeddings=64)
    run_of(tmp_path, tmp_path / "base", data__max_length=58, training__max_steps=1)
    long = {"prompt": "the cat", "completion": " ".join(["sat"] * 70)}
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "completion": "sat"}, long])
    done = alignkit("eval", "run", "base", "--data", "rows.jsonl", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "run has room for 58 tokens: longer rows are left out" in done.stderr
    assert "base has room for 64 tokens: longer rows are left out" in done.stderr
    assert "1 of 2 rows used" in done.stderr
    assert "did not read the same rows" not in done.stderr
    middle = {"prompt": "the cat", "completion": " ".join(["sat"] * 28)}
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "completion": "sat"}, middle])
    done = alignkit("eval", "run", "base", "--data", "rows.jsonl", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "did not read the same rows: compare with --max-length 58" in done.stderr


def test_rows_of_another_run_beyond_the_room(alignkit: CommandLine, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", max_position_embeddings=64)
    row = {"prompt": "the cat", "completion": " ".join(["sat"] * 70)}
    fields = {
        "data__max_length": 64,
        "data__too_long": "truncate_right",
        "data__eval": [{"path": str(write_rows(tmp_path / "long.jsonl", [row]))}],
        "training__max_steps": 1,
    }
    train(make_recipe(tmp_path / "lora", tmp_path / "base", **fields))
    run_of(tmp_path, tmp_path / "base", data__max_length=58, training__max_steps=1)
    done = alignkit("eval", "lora/run", "run", cwd=tmp_path)
    refused(done, "run has room for 58 tokens, and a row of lora/run has 64", "name a file")


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_stages_that_train_no_prefix(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    if stage == "ppo":
        recipe = make_ppo_recipe(tmp_path, tiny_base, adapter=RAW)
    else:
        recipe = make_preference_recipe(tmp_path, tiny_base, stage, adapter=RAW)
    sentence = f"adapter has kind = prefix, which {stage} does not train: use lora or full"
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(str(recipe))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"adapter": {**RAW, "tokens": 0}}, r"adapter.tokens must be at least 1, got 0"),
        ({"adapter": {**RAW, "tokens": 5000}}, "adapter.tokens must be at most 4096, got 5000"),
        ({"adapter": {**RAW, "rank": 4}}, "adapter.rank is not a key of a recipe"),
        ({"adapter": {**RAW, "modules_to_save": ["norm"]}}, "adapter.modules_to_save is not a key"),
        ({"adapter": {**PROJECTED, "text": "the cat"}}, "has text, which does nothing with proj"),
        ({"adapter": {**RAW, "projection_width": 8}}, "has projection_width, which does nothing"),
        (
            {"merge": True},
            "merge must be false with adapter.kind = prefix, .* got true",
        ),
        ({"model__add_tokens": ["<tool>"]}, "has kind = prefix, which cannot train model.add_tok"),
    ],
)
def test_recipes_that_are_wrong(
    fields: dict[str, Any], sentence: str, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, **{"adapter": RAW, **fields})
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(str(recipe))


def test_rows_and_prefix_must_fit_the_context(tiny_base: Path, tmp_path: Path) -> None:
    context = json.loads((tiny_base / "config.json").read_text(encoding="utf-8"))
    longest = context["max_position_embeddings"]
    with pytest.raises(AlignkitError, match=f"{longest} tokens after a prefix of 6") as raised:
        run_of(tmp_path / "a", tiny_base, data__max_length=longest - 5)
    assert raised.value.hint == f"set data.max_length={longest - 6} or less"
    run_of(tmp_path / "b", tiny_base, data__max_length=longest - 6, training__max_steps=1)
    with pytest.raises(ModelError, match="leaves no room in the model's context"):
        run_of(tmp_path / "c", tiny_base, adapter={**RAW, "tokens": longest})


def test_the_resolved_recipe_says_that_nothing_is_merged(tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_base, training__max_steps=1)
    again = load_recipe(str(run / "recipe.yaml")).recipe
    assert again.merge is False


def test_padded_rows_with_checkpointing_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not work with gradient checkpointing"):
        run_of(
            tmp_path,
            tiny_base,
            model__attention="sdpa",
            training__gradient_checkpointing=True,
        )
