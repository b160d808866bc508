"""Loading whole recipes: what is found, and the exact text of everything that can be wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignkit.errors import RecipeError
from alignkit.recipe.assets import alignkit_home, assets_root, find_path
from alignkit.recipe.reading.load import find_recipe, load_recipe, shipped_recipes
from alignkit.recipe.reading.stored import render_recipe
from alignkit.recipe.stages.sft import SftRecipe

GOOD = """\
stage: sft
output: runs/x
model:
  base: some/model
adapter: {kind: lora, rank: 8}
data:
  train: [{path: rows.jsonl}]
  max_length: 512
training:
  learning_rate: 2e-4
"""
RATE_HINT = (
    "\nhint: usual for SFT: 1e-4 to 5e-4 with LoRA, 5e-6 to 5e-5 for full weights; "
    "about a tenth of that for dpo and kto"
)
SOURCES_HINT = "\nhint: a list of sources, as in [{path: data.jsonl}]"
TRAINING_KEYS = (
    "\nhint: keys here: epochs, max_steps, microbatch_tokens, learning_rate, schedule, decay, "
    "min_rate, warmup, weight_decay, max_grad_norm, on_bad_step, optimizer, betas, "
    "gradient_checkpointing, deterministic, log_every, eval_every, save_every, keep, keep_best, "
    "early_stop, trackers, batch_size"
)
TEMPLATES = ", ".join(
    sorted(path.stem for path in (assets_root() / "data_templates" / "chat").glob("*.jinja"))
)
RECIPE_KEYS = (
    "\nhint: keys here: stage, output, seed, model, adapter, data, objective, training, merge"
)


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def failure(text: str, overrides: list[str] | None = None, stage: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides, stage=stage)
    return str(caught.value)


def test_a_good_recipe() -> None:
    loaded = load_recipe(write(GOOD))
    recipe = loaded.recipe
    assert loaded.name == "r.yaml"
    assert recipe.training.learning_rate == 2e-4
    assert recipe.adapter.rank == 8  # type: ignore[union-attr]
    assert recipe.data.max_length == 512
    assert recipe.data.train[0].path == str(Path("rows.jsonl").resolve())
    assert recipe.model.base == "some/model"


def test_overrides_are_validated_like_the_file() -> None:
    recipe = load_recipe(write(GOOD), ["training.learning_rate=1e-3", "seed=7"]).recipe
    assert (recipe.training.learning_rate, recipe.seed) == (1e-3, 7)


def test_a_default_learning_rate_is_filled_in() -> None:
    text = changed("training:\n  learning_rate: 2e-4\n", "")
    assert load_recipe(write(text), ["adapter={kind: full}"]).recipe.training.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # keys nobody knows: near miss beside it, at another level, by name elsewhere, nowhere
        (
            "rank: 8",
            "rnak: 8",
            "r.yaml:5: adapter.rnak is not a key of a recipe\nhint: did you mean adapter.rank?",
        ),
        (
            "  learning_rate",
            "  learnin_rate",
            "r.yaml:10: training.learnin_rate is not a key of a recipe\n"
            "hint: did you mean training.learning_rate?",
        ),
        (
            "output: runs/x",
            "output: runs/x\nlearning_rate: 1e-4",
            "r.yaml:3: learning_rate is not a key of a recipe\n"
            "hint: did you mean training.learning_rate?",
        ),
        (
            "output: runs/x",
            "output: runs/x\nlearning_rat: 1e-4",
            "r.yaml:3: learning_rat is not a key of a recipe\n"
            "hint: did you mean training.learning_rate?",
        ),
        (
            "base: some/model",
            "base: some/model\n  path: here",
            "r.yaml:5: model.path is not a key of a recipe\n"
            "hint: did you mean data.train.path or data.eval.path?",
        ),
        (
            "path: rows.jsonl",
            "path: rows.jsonl, weigth: 2",
            "r.yaml:7: data.train[0].weigth is not a key of a recipe\n"
            "hint: did you mean data.train[0].weight?",
        ),
        (
            "output: runs/x",
            "output: runs/x\nzzz: 1",
            f"r.yaml:3: zzz is not a key of a recipe{RECIPE_KEYS}",
        ),
        ("learning_rate", "lr", f"r.yaml:10: training.lr is not a key of a recipe{TRAINING_KEYS}"),
        (
            "kind: lora",
            "kind: full",
            "r.yaml:5: adapter.rank is not a key of a recipe\n"
            "hint: it belongs to another kind; keys here: kind, freeze",
        ),
        # wrong types
        (
            "2e-4",
            "fast",
            f"r.yaml:10: training.learning_rate must be a number, got 'fast'{RATE_HINT}",
        ),
        (
            "2e-4",
            "'2e-4'",
            f"r.yaml:10: training.learning_rate must be a number, got '2e-4'{RATE_HINT}",
        ),
        (
            "512",
            "1.5",
            "r.yaml:8: data.max_length must be a whole number, got 1.5\n"
            "hint: in tokens; 1024 to 4096 is usual",
        ),
        (
            "rank: 8",
            "rank: 8.0",
            "r.yaml:5: adapter.rank must be a whole number, got 8.0\nhint: 8 to 64 is usual",
        ),
        ("runs/x", "3", "r.yaml:2: output must be text, got 3"),
        (
            "output: runs/x",
            "output: runs/x\nmerge: 1",
            "r.yaml:3: merge must be true or false, got 1",
        ),
        (
            "output: runs/x",
            "output: runs/x\nmerge: yes",
            "r.yaml:3: merge must be true or false, got 'yes'",
        ),
        (
            "training:\n  learning_rate: 2e-4",
            "training: 3",
            "r.yaml:9: training must be a mapping of keys to values, got 3",
        ),
        (
            "training:\n  learning_rate: 2e-4",
            "training:",
            "r.yaml:9: training must be a mapping of keys to values, got null",
        ),
        (
            "[{path: rows.jsonl}]",
            "{path: rows.jsonl}",
            f"r.yaml:7: data.train must be a list, got {{path}}{SOURCES_HINT}",
        ),
        (
            "[{path: rows.jsonl}]",
            "[rows.jsonl]",
            "r.yaml:7: data.train[0] must be a mapping of keys to values, got 'rows.jsonl'",
        ),
        (
            "{kind: lora, rank: 8}",
            "lora",
            "r.yaml:5: adapter must be a mapping, got 'lora'\nhint: as in {kind: lora, rank: 16}",
        ),
        (
            "rank: 8",
            "targets: 3",
            "r.yaml:5: adapter.targets must be text or a list, got 3",
        ),
        (
            "rank: 8",
            "targets: [q_proj, 3]",
            "r.yaml:5: adapter.targets[1] must be text, got 3",
        ),
        (
            "learning_rate: 2e-4",
            "microbatch_tokens: lots",
            "r.yaml:10: training.microbatch_tokens must be 'auto' or a whole number, got 'lots'\n"
            "hint: `auto` fits it to the memory; the result does not depend on it",
        ),
        # one of a few words
        (
            "max_length: 512",
            "too_long: dropp",
            "r.yaml:8: data.too_long must be 'drop', 'truncate_left', 'truncate_right' or "
            "'error', got 'dropp'\nhint: did you mean drop?",
        ),
        (
            "max_length: 512",
            "too_long: 3",
            "r.yaml:8: data.too_long must be 'drop', 'truncate_left', 'truncate_right' or "
            "'error', got 3",
        ),
        (
            "base: some/model",
            "base: some/model\n  dtype: bf16",
            "r.yaml:5: model.dtype must be 'auto', 'bfloat16', 'float16' or 'float32', got 'bf16'\n"
            "hint: did you mean bfloat16?",
        ),
        (
            "learning_rate: 2e-4",
            "trackers: [tensorbord]",
            "r.yaml:10: training.trackers[0] must be 'tensorboard', 'wandb', 'mlflow' or "
            "'trackio', got 'tensorbord'\nhint: did you mean tensorboard?",
        ),
        (
            "kind: lora",
            "kind: lroa",
            "r.yaml:5: adapter.kind must be 'lora', 'ia3', 'prefix' or 'full', got 'lroa'\n"
            "hint: did you mean lora?",
        ),
        # limits
        (
            "2e-4",
            "0",
            f"r.yaml:10: training.learning_rate must be greater than 0, got 0{RATE_HINT}",
        ),
        (
            "2e-4",
            "-1e-4",
            f"r.yaml:10: training.learning_rate must be greater than 0, got -0.0001{RATE_HINT}",
        ),
        ("2e-4", "2", f"r.yaml:10: training.learning_rate must be less than 1, got 2{RATE_HINT}"),
        (
            "512",
            "7",
            "r.yaml:8: data.max_length must be at least 8, got 7\n"
            "hint: in tokens; 1024 to 4096 is usual",
        ),
        (
            "rank: 8",
            "rank: 5000",
            "r.yaml:5: adapter.rank must be at most 4096, got 5000\nhint: 8 to 64 is usual",
        ),
        (
            "output: runs/x",
            "output: runs/x\nseed: 2147483648",
            "r.yaml:3: seed must be less than 2147483648, got 2147483648",
        ),
        (
            "path: rows.jsonl",
            "path: rows.jsonl, weight: 0",
            "r.yaml:7: data.train[0].weight must be greater than 0, got 0",
        ),
        ("runs/x", "''", "r.yaml:2: output must not be empty text, got ''"),
        (
            "[{path: rows.jsonl}]",
            "[]",
            f"r.yaml:7: data.train must not be empty, got []{SOURCES_HINT}",
        ),
        # missing keys stand where their section stands
        ("output: runs/x\n", "", "r.yaml: output is required and missing"),
        ("base: some/model", "dtype: float32", "r.yaml:3: model.base is required and missing"),
        (
            "stage: sft\n",
            "",
            "r.yaml: stage is required and missing\nhint: sft, reward, dpo, kto, ppo or grpo",
        ),
        # keys that exclude each other
        (
            "path: rows.jsonl",
            "path: rows.jsonl, hub: a/b",
            "r.yaml:7: data.train[0] must have exactly one of `path` and `hub`, got {path, hub}",
        ),
        (
            "{path: rows.jsonl}",
            "{}",
            "r.yaml:7: data.train[0] must have exactly one of `path` and `hub`, got {}",
        ),
        (
            "path: rows.jsonl",
            "path: rows.jsonl, columns: {prompt: q, completion: q}",
            "r.yaml:7: data.train[0].columns names the column q twice, got {prompt, completion}",
        ),
        (
            "max_length: 512",
            "eval: [{path: rows.jsonl}]\n  eval_fraction: 0.1",
            "r.yaml:6: data must have only one of `eval` and `eval_fraction`, got "
            "{train, eval, eval_fraction}",
        ),
        # stages and objectives
        (
            "stage: sft",
            "stage: stf",
            "r.yaml:1: stage must be 'sft', 'reward', 'dpo', 'kto', 'ppo' or 'grpo', got 'stf'\n"
            "hint: did you mean sft?",
        ),
        (
            "output: runs/x",
            "output: runs/x\nobjective: {kind: cross_entropy, beta: 1}",
            "r.yaml:3: objective.beta is not a key of a recipe\nhint: keys here: kind",
        ),
        # files
        (
            "rows.jsonl",
            "row.jsonl",
            "r.yaml:7: data.train[0].path names no file: 'row.jsonl'\n"
            "hint: did you mean rows.jsonl?",
        ),
        (
            "rows.jsonl",
            "some/where/else.parquet",
            "r.yaml:7: data.train[0].path names no file: 'some/where/else.parquet'\n"
            "hint: looked in the recipe's folder, the working folder and the shipped examples",
        ),
        (
            "max_length: 512",
            "eval:\n    - path: rows.jsonl\n    - path: gone.csv",
            "r.yaml:10: data.eval[1].path names no file: 'gone.csv'\n"
            "hint: looked in the recipe's folder, the working folder and the shipped examples",
        ),
        (
            "base: some/model",
            "base: some/model\n  chat_template: chatmll",
            "r.yaml:5: model.chat_template names no file and no shipped template: 'chatmll'\n"
            "hint: did you mean chatml?",
        ),
        (
            "base: some/model",
            "base: some/model\n  chat_template: xyz",
            "r.yaml:5: model.chat_template names no file and no shipped template: 'xyz'\n"
            f"hint: shipped templates: {TEMPLATES}",
        ),
    ],
)
def test_one_error(old: str, new: str, message: str) -> None:
    assert failure(changed(old, new)) == message


def test_every_error_comes_at_once_in_file_order() -> None:
    text = (
        "output: 7\n"  # 1
        "zebra: 1\n"
        "stage: sft\n"
        "seed: -1\n"
        "model: {base: m, dtype: bf16}\n"  # 5
        "data:\n"
        "  max_length: 2\n"
        "  train:\n"
        "    - path: gone.jsonl\n"
        "    - path: rows.jsonl\n"  # 10
        "      tke: 3\n"
        "training: {learning_rate: 7}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), ["training.batch_size=0"])
    assert [problem.message for problem in caught.value.problems] == [
        "command line: training.batch_size must be at least 1, got 0",
        "r.yaml:1: output must be text, got 7",
        "r.yaml:2: zebra is not a key of a recipe",
        "r.yaml:4: seed must be at least 0, got -1",
        "r.yaml:5: model.dtype must be 'auto', 'bfloat16', 'float16' or 'float32', got 'bf16'",
        "r.yaml:7: data.max_length must be at least 8, got 2",
        "r.yaml:9: data.train[0].path names no file: 'gone.jsonl'",
        "r.yaml:11: data.train[1].tke is not a key of a recipe",
        "r.yaml:12: training.learning_rate must be less than 1, got 7",
    ]


def test_errors_of_a_parent_name_the_parent() -> None:
    write("adapter: {kind: lora, rank: 0}\ntraining:\n  warmup: -1\n", "base.yaml")
    text = GOOD.replace("adapter: {kind: lora, rank: 8}\n", "extends: base.yaml\n")
    assert failure(text) == (
        "base.yaml:1: adapter.rank must be at least 1, got 0\nhint: 8 to 64 is usual\n"
        "base.yaml:3: training.warmup must be at least 0, got -1\n"
        "hint: below 1 a share of the steps (0.03), from 1 a number of steps"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter.rnak=4",
            "command line: adapter.rnak is not a key of a recipe\nhint: did you mean adapter.rank?",
        ),
        (
            "data.train.0.path=row.jsonl",
            "command line: data.train[0].path names no file: 'row.jsonl'\n"
            "hint: did you mean rows.jsonl?",
        ),
        (
            "data.train.3.path=a",
            "command line: data.train[3].path: there is no data.train[3] to set\n"
            "hint: set a key of a mapping, or an existing list item, as in data.train.0.take=100",
        ),
        (
            "training.learning_rate=9",
            f"command line: training.learning_rate must be less than 1, got 9{RATE_HINT}",
        ),
    ],
)
def test_override_errors(override: str, message: str) -> None:
    assert failure(GOOD, [override]) == message


def test_a_recipe_of_another_stage() -> None:
    assert failure(GOOD, stage="dpo") == (
        "r.yaml:1: stage is sft, not dpo\nhint: run `alignkit sft r.yaml`"
    )
    assert load_recipe("r.yaml", stage="sft").recipe.stage == "sft"


# where files are looked for ------------------------------------------------------------------


def test_the_recipes_folder_comes_before_the_working_folder() -> None:
    write("{}", "sub/rows.jsonl")
    recipe = load_recipe(write(GOOD, "sub/r.yaml")).recipe
    assert recipe.data.train[0].path == str(Path("sub/rows.jsonl").resolve())
    Path("sub/rows.jsonl").unlink()
    recipe = load_recipe("sub/r.yaml").recipe
    assert recipe.data.train[0].path == str(Path("rows.jsonl").resolve())


def test_shipped_files_keep_their_short_name() -> None:
    shipped = "data_templates/sft/messages.jsonl"
    recipe = load_recipe(write(changed("rows.jsonl", shipped))).recipe
    assert recipe.data.train[0].path == shipped
    assert find_path(shipped) == (assets_root() / shipped).resolve()


def test_a_model_folder_is_found_and_a_hub_name_stays() -> None:
    Path("models/mine").mkdir(parents=True)
    recipe = load_recipe(write(GOOD), ["model.base=models/mine"]).recipe
    assert recipe.model.base == str(Path("models/mine").resolve())


@pytest.mark.parametrize("shadow", [False, True])
def test_a_shipped_template_is_named_by_name(shadow: bool) -> None:
    if shadow:  # a model's folder of the same name is no template
        Path("qwen").mkdir()
    recipe = load_recipe(write(GOOD), ["model.chat_template=qwen"]).recipe
    assert recipe.model.chat_template == "qwen"


def test_a_template_file_is_found() -> None:
    Path("mine.jinja").write_text("x", encoding="utf-8")
    recipe = load_recipe(write(GOOD), ["model.chat_template=mine.jinja"]).recipe
    assert recipe.model.chat_template == str(Path("mine.jinja").resolve())


def test_find_recipe_errors() -> None:
    Path("folder").mkdir()
    for name, message in {
        "folder": "folder: is a folder, not a recipe\nhint: name the .yaml file",
        "nowhere.yaml": "nowhere.yaml: no such recipe\n"
        "hint: `alignkit recipes list` shows the shipped ones",
    }.items():
        with pytest.raises(RecipeError) as caught:
            find_recipe(name)
        assert str(caught.value) == message


def test_a_shipped_recipe_is_found_by_its_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    write(GOOD, "assets/recipes/sft/small.yaml")
    write(GOOD, "assets/recipes/quickstart/first.yaml")
    monkeypatch.setattr("alignkit.recipe.reading.load.assets_root", lambda: Path("assets"))
    assert shipped_recipes() == ["quickstart/first.yaml", "sft/small.yaml"]
    for name in ("sft/small", "sft/small.yaml", "recipes/sft/small.yaml"):
        assert find_recipe(name) == Path("assets/recipes/sft/small.yaml")
    with pytest.raises(RecipeError, match=r"did you mean sft/small\.yaml\?"):
        find_recipe("sft/smal.yaml")


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_HOME", "~/somewhere")
    assert alignkit_home() == Path(os.path.expanduser("~/somewhere"))
    monkeypatch.delenv("ALIGNKIT_HOME")
    assert alignkit_home() == Path.home() / ".cache" / "alignkit"


def test_the_rendered_recipe_loads_to_the_same_recipe() -> None:
    recipe = load_recipe(write(GOOD)).recipe
    again = load_recipe(write(render_recipe(recipe), "resolved.yaml")).recipe
    assert again == recipe
    written: dict[str, Any] = yaml.safe_load(render_recipe(recipe))
    assert list(written) == list(SftRecipe.model_fields)


def test_an_adapter_without_kind_is_lora() -> None:
    write(changed("kind: lora, rank: 8", "rank: 8"))
    assert load_recipe("r.yaml").recipe.adapter.kind == "lora"
    assert load_recipe("r.yaml", ["adapter.rank=4"]).recipe.adapter.rank == 4


def test_files_of_an_extended_recipe_are_found_beside_it() -> None:
    write(changed("rows.jsonl", "own.jsonl"), "base/parent.yaml")
    Path("base/own.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    write("extends: base/parent.yaml\nseed: 1\n")
    found = load_recipe("r.yaml").recipe.data.train[0].path
    assert found == str(Path("base/own.jsonl").resolve())
