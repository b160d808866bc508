"""Every row of every toolkit's table: what it says happens to a recipe, and nothing else."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import AlignkitError, DataError, RecipeError
from alignkit.recipe.importing.datasets import llama_factory_rows
from alignkit.recipe.importing.entries import axolotl_rows, trl_rows
from alignkit.recipe.importing.fields import Field, Foreign, Toolkit
from alignkit.recipe.importing.read import TOOLKITS
from alignkit.recipe.importing.translate import default_of
from alignkit.recipe.importing.write import Imported, import_file
from alignkit.recipe.reading.yaml_values import read_values, write_values
from alignkit.recipe.stages.registry import find_stage

STAGES_OF_AXOLOTL: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {"reward_model": True},
    "dpo": {"rl": "dpo"},
    "kto": {"rl": "kto"},
    "grpo": {"rl": "grpo", "trl.reward_funcs": ["rewards.score"], "micro_batch_size": 8},
}
ROWS_OF_AXOLOTL = {"sft": "alpaca", "reward": "chat_template.argilla"}


def base(toolkit: Toolkit, stage: str) -> dict[str, Any]:
    """The least that a file of a stage holds."""
    if toolkit.name == "axolotl":
        rows = {"path": "org/rows", "type": ROWS_OF_AXOLOTL.get(stage, "chatml.intel")}
        rows |= {"type": "completion"} if stage == "grpo" else {}
        return {"base_model": "org/model", "datasets": [rows]} | STAGES_OF_AXOLOTL[stage]
    values: dict[str, Any] = {"model_name_or_path": "org/model"}
    if toolkit.name == "trl":
        rewards = {"reward_funcs": ["rewards.score"]} if stage == "grpo" else {}
        return values | {"datasets": [{"path": "org/rows"}]} | rewards
    rewards = {"reward_model": "runs/first"} if stage == "ppo" else {}
    return values | {"stage": {"reward": "rm"}.get(stage, stage), "dataset": "mine"} | rewards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that the examples name."""
    here = tmp_path_factory.mktemp("work")
    for name in ("data", "other"):
        (here / name).mkdir()
        rows = {"mine": {"file_name": f"{name}.json"}, "more": {"hf_hub_url": "org/more"}}
        (here / name / "dataset_info.json").write_text(json.dumps(rows), encoding="utf-8")
    return here


def run(folder: Path, toolkit: Toolkit, stage: str, values: dict[str, Any]) -> Imported:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, inner = key.partition(".")
        (nested.setdefault(section, {}) if dot else nested)[inner or key] = value
    file = folder / "foreign.yaml"
    file.write_text(write_values(nested), encoding="utf-8")
    return import_file(file, toolkit=toolkit.name, stage=stage if toolkit.name == "trl" else None)


def flat(text: str) -> dict[str, Any]:
    """The recipe's keys with dots."""

    def walk(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict) or path in (".reward", ".model.rope_scaling"):
            return {path: value}
        return {
            k: v for key, inner in value.items() for k, v in walk(inner, f"{path}.{key}").items()
        }

    return {key.lstrip("."): value for key, value in walk(read_values(text, "").values, "").items()}


RECIPES: dict[tuple[str, str, str], dict[str, Any]] = {}
"""Toolkit, stage and values -> the recipe's keys, for what many rows start from."""


def check(folder: Path, toolkit: Toolkit, row: Field) -> None:
    """With its example, a row changes just the keys that it names."""
    stage = row.stages[0] if row.stages else "sft"
    without = base(toolkit, stage) | dict(row.beside)
    known = (toolkit.name, stage, repr(without))
    if known not in RECIPES:
        RECIPES[known] = flat(run(folder, toolkit, stage, without).text)
    new = run(folder, toolkit, stage, without | {row.key: row.example})
    before, after = RECIPES[known], flat(new.text)
    usual = {key: default_of(find_stage(stage), key) for key in before | after}
    changed = {key for key, v in usual.items() if before.get(key, v) != after.get(key, v)}
    if "adapter.kind" in row.ours:
        changed = {"adapter.kind" if key.startswith("adapter.") else key for key in changed}
    listed = {one.key for one in new.translated}
    lost = {one.key for one in new.no_counterpart}
    if not row.ours:
        assert changed == set()
        assert any(one.key == row.key for one in new.different)
        return
    assert changed
    assert changed <= set(row.ours)
    assert row.key in listed or row.example == "no"  # which takes the key away
    assert row.key not in lost


ROWS = [
    pytest.param(toolkit, row, id=f"{toolkit.name}-{row.key}-{number}")
    for toolkit in TOOLKITS.values()
    for number, row in enumerate(toolkit.table)
    if row.rule is not None and row.ours != ("stage",)  # stages have tests of their own
]


@pytest.mark.parametrize(("toolkit", "row"), ROWS)
def test_a_row_does_what_it_says(
    toolkit: Toolkit, row: Field, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    check(folder, toolkit, row)


@pytest.mark.parametrize("name", TOOLKITS)
def test_keys_without_counterpart_change_nothing_and_are_listed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    toolkit = TOOLKITS[name]
    ruled = {row.key for row in toolkit.table if row.rule is not None}
    rows = [row for row in toolkit.table if row.rule is None and row.key not in ruled]
    least = base(toolkit, "sft")
    done = run(folder, toolkit, "sft", least | {row.key: row.example for row in rows})
    assert done.text == run(folder, toolkit, "sft", least).text
    assert {one.key: one.reason for one in done.no_counterpart} == {r.key: r.says for r in rows}
    assert len(rows) > 60


def test_a_wrong_row_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    trl = TOOLKITS["trl"]
    rows = {row.key: row for row in trl.table}
    wrong = [
        replace(rows["weight_decay"], gives=("training.epochs",)),  # another key than it sets
        replace(rows["weight_decay"], example=0.0),  # an example without effect
        replace(rows["weight_decay"], key="packing"),  # lost, though the row has a rule
    ]
    for row in wrong:
        with pytest.raises(AssertionError):
            check(folder, trl, row)


def test_a_key_stands_once_for_each_stage() -> None:
    for toolkit in TOOLKITS.values():
        seen: set[tuple[str, str]] = set()
        for row in toolkit.table:
            for stage in row.stages or (("",) if row.rule else ("none",)):
                assert (row.key, stage) not in seen, (toolkit.name, row.key)
                seen.add((row.key, stage))


def arguments(package: str, *files: str) -> dict[str, ast.expr | None]:
    """Fields of the dataclasses in an installed package's files, which are not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    return {
        line.target.id: line.value
        for file in files
        for node in ast.parse((folder / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.decorator_list
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def default_in(value: ast.expr | None) -> Any:
    """What a field of a dataclass has by default; "unknown" if it is no literal."""
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    try:
        return ast.literal_eval(value) if value is not None else "unknown"
    except ValueError:
        return "unknown"


def test_every_argument_of_the_installed_trl_has_a_row() -> None:
    trainers = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
    found = arguments("trl", *(f"trainer/{one}_config.py" for one in (*trainers, "model")))
    found |= arguments("transformers", "training_args.py")
    assert len(found) > 200
    known = {row.key for row in TOOLKITS["trl"].table}
    assert sorted(name for name in found.keys() - known if not name.startswith("_")) == []


@pytest.mark.parametrize("script", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_defaults_are_those_of_the_installed_trl(script: str) -> None:
    stage = {"rloo": "grpo"}.get(script, script)
    foreign = Foreign("", (), {}, {}, script=script, stage=stage)
    shared = arguments("transformers", "training_args.py")
    own = arguments("trl", "scripts/utils.py", "trainer/model_config.py", "trainer/base_config.py")
    own |= arguments("trl", f"trainer/{script}_config.py")
    theirs = {name: default_in(value) for name, value in (shared | own).items()}
    ours = TOOLKITS["trl"].defaults(foreign)
    compared = {key for key in ours if theirs.get(key, "unknown") not in ("unknown", None)}
    assert {key: ours[key] for key in compared} == {key: theirs[key] for key in compared}
    assert len(compared) > 12


@pytest.mark.parametrize("name", TOOLKITS)
def test_any_keys_give_a_recipe_or_an_error(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    toolkit, rng = TOOLKITS[name], random.Random(name)
    stages = {stage for row in toolkit.table for stage in row.stages}
    loaded = 0
    for _ in range(40):
        stage = rng.choice(sorted(stages))
        values = base(toolkit, stage)
        for row in rng.sample(toolkit.table, rng.randint(1, 12)):
            if row.key not in ("stage", "rl", "reward_model"):
                values |= dict(row.beside) | {row.key: row.example}
        messages: list[str] = []
        try:
            loaded += run(folder, toolkit, stage, values).stage == stage  # reads and checks it
        except RecipeError as error:
            messages = [problem.message for problem in error.problems]
        assert all(message.startswith("foreign.yaml:") for message in messages)
    assert loaded > 10


ODD = [None, -1, 0.5, 1e300, "", "1e400", [], ["a"], {"a": 1}, [[1]], [{"path": 3}]]


def test_odd_values_are_errors_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rng = random.Random(0)
    for _ in range(40):
        toolkit = rng.choice(list(TOOLKITS.values()))
        values = base(toolkit, "dpo")
        rows = [row for row in toolkit.table if row.rule and row.stages in ((), ("dpo",))]
        values |= {row.key: rng.choice(ODD) for row in rng.sample(rows, 3)}
        with contextlib.suppress(AlignkitError):
            run(folder, toolkit, "dpo", values)


def test_odd_entries_of_datasets_are_errors() -> None:
    rng = random.Random(0)
    info = ("file_name", "formatting", "ranking", "split", "num_samples", "columns", "tags")
    entry = ("path", "name", "split", "type", "data_files", "field_messages", "roles")
    entry += ("message_property_mappings", "message_field_role", "ds_type")
    kinds = ["alpaca", "sharegpt", "chat_template", "chatml.intel", *ODD]
    for _ in range(600):
        rows = {key: rng.choice(kinds) for key in rng.sample(info, 4)}
        item = {key: rng.choice(kinds) for key in rng.sample(entry, 4)}
        with contextlib.suppress(DataError):
            llama_factory_rows("mine", rows).source()
        with contextlib.suppress(DataError):
            axolotl_rows(item, rng.choice([None, "dpo", "kto"])).source()
        with contextlib.suppress(DataError):
            trl_rows(item).source()


def test_an_unknown_toolkit_is_refused(folder: Path) -> None:
    (folder / "foreign.yaml").write_text("a: 1\n", encoding="utf-8")
    with pytest.raises(AlignkitError, match="--from torchtune") as caught:
        import_file(folder / "foreign.yaml", toolkit="torchtune")
    assert caught.value.hint == "one of trl, llama-factory, axolotl"
