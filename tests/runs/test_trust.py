"""Folders from somewhere else decide nothing: what runs, what is fetched, what is read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import make_ppo_recipe, make_preference_recipe, make_recipe, train
from tiny import save_tiny, tiny_model

from alignkit.errors import AlignkitError, ModelError, RecipeError
from alignkit.jobs.evaluate import evaluate_models
from alignkit.jobs.merge import MergeOptions, merge_run
from alignkit.jobs.question import Question
from alignkit.models.adapters.attach import attach_adapter
from alignkit.models.adapters.files import save_adapter
from alignkit.models.base.places import resolve
from alignkit.models.opening import open_model
from alignkit.recipe.adapters import LoraSpec
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.stored import NAME
from alignkit.stages.inputs.base import start_model
from alignkit.stages.inputs.foreign import foreign_parts

EVIL = "import pathlib\npathlib.Path({proof!r}).write_text('it ran')\n"


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """Exists once foreign code has run."""
    return tmp_path / "proof"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of dpo, over a base next to it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base")
    train(make_preference_recipe(folder, folder / "base", "dpo", training__max_steps=1))
    return folder


@pytest.fixture
def downloaded(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run on a machine that has never seen it."""
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(made / "run", tmp_path / "downloaded"))


def change(path: Path, **values: Any) -> None:
    """Replace values at the top of a JSON file."""
    known = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**known, **values}), encoding="utf-8")


def change_recipe(run: Path, **sections: Any) -> None:
    """Replace keys of a run's recipe; a mapping is merged into the section."""
    values = yaml.safe_load((run / NAME).read_text(encoding="utf-8"))
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (run / NAME).write_text(yaml.safe_dump(values), encoding="utf-8")


def with_code(base: Path, proof: Path) -> None:
    """A base whose configuration is Python code."""
    (base / "evil.py").write_text(EVIL.format(proof=str(proof)), encoding="utf-8")
    change(base / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "trust_remote_code": lambda evil: {"model": {"trust_remote_code": True}},
    "a base with code": lambda evil: {
        "model": {"base": str(evil.parent), "trust_remote_code": True}
    },
    "a loss": lambda evil: {"objective": {"kind": "custom", "file": str(evil), "name": "loss"}},
    "a hub id": lambda evil: {"model": {"base": "someone/evil", "trust_remote_code": True}},
    "extends": lambda evil: {"extends": str(evil.with_suffix(".yaml"))},
    "a reward function": lambda evil: {"stage": "ppo", "reward": {"function": f"{evil}:score"}},
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_stored_recipe_is_data(
    case: str, downloaded: Path, proof: Path, tmp_path: Path, rows: Path
) -> None:
    save_tiny(tmp_path / "evil")
    with_code(tmp_path / "evil", proof)
    values = RECIPES[case](tmp_path / "evil" / "evil.py")
    if "objective" in values:
        stored = yaml.safe_load((downloaded / NAME).read_text(encoding="utf-8"))
        stored["objective"] = values["objective"]
        (downloaded / NAME).write_text(yaml.safe_dump(stored), encoding="utf-8")
    else:
        change_recipe(downloaded, **{k: v for k, v in values.items() if k != "reward"})
    acts: list[Callable[[], Any]] = [
        lambda: merge_run([str(downloaded)], MergeOptions(overwrite=True)),
        lambda: evaluate_models([str(downloaded)], Question(dtype="float32")),
        lambda: evaluate_models([str(downloaded)], Question(data=str(rows), dtype="float32")),
        lambda: start_model(ModelSpec(base=str(downloaded))),
    ]
    for act in acts:
        with contextlib.suppress(AlignkitError):
            act()
        assert not proof.exists()
    if case == "a loss":
        with pytest.raises(ModelError, match=r"and its recipe runs .*evil\.py"):
            acts[2]()


def test_a_stored_recipe_has_no_aliases(downloaded: Path) -> None:
    levels = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    (downloaded / NAME).write_text("\n".join(levels), encoding="utf-8")
    with pytest.raises(RecipeError, match="what aliases repeat included"):
        merge_run([str(downloaded)], MergeOptions(overwrite=True))


@pytest.mark.parametrize("summary", [[], {"before": 5, "after": ["x"]}, {"after": {"a|b": "x"}}])
def test_numbers_of_a_foreign_run_may_be_anything(summary: Any, downloaded: Path) -> None:
    change(downloaded / "run.json", summary=summary)
    merge_run([str(downloaded)], MergeOptions(overwrite=True))


@pytest.fixture
def rows(made: Path) -> Path:
    return made / "rows.jsonl"


def test_eval_follows_only_recipes_of_runs_made_here(
    downloaded: Path, rows: Path, made: Path
) -> None:
    with pytest.raises(ModelError, match="was not made on this machine, and its recipe reads"):
        evaluate_models([str(downloaded)], Question(dtype="float32"))
    asked = Question(data=str(rows), dtype="float32")
    with pytest.raises(ModelError, match="was not made on this machine, and its recipe opens"):
        evaluate_models([str(downloaded)], asked)
    named = Question(data=str(rows), dtype="float32", reference=str(made / "base"))
    trusted = Question(data=str(rows), dtype="float32", trust_recipe=True)
    by_name, by_trust = (evaluate_models([str(downloaded)], q) for q in (named, trusted))
    assert by_name[str(downloaded)].values == by_trust[str(downloaded)].values


def test_code_of_a_base_that_only_an_adapter_names_never_runs(
    downloaded: Path, proof: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "evil")
    with_code(tmp_path / "evil", proof)
    shutil.rmtree(downloaded / "merged", ignore_errors=True)
    change(downloaded / "adapter/adapter_config.json", base_model_name_or_path="evil")
    os.chdir(tmp_path)
    trusting = MergeOptions(trust_remote_code=True, any_base=True)
    (downloaded / "adapter/trained_over.json").unlink()
    for act in (
        lambda: merge_run([str(downloaded)], trusting),
        lambda: start_model(ModelSpec(base=str(downloaded), trust_remote_code=True)),
        lambda: open_model(str(downloaded), dtype=tiny_model().dtype),
    ):
        with pytest.raises(ModelError, match="could not be read") as raised:
            act()
        assert "only if you name this model yourself" in raised.value.hint
    assert not proof.exists()


def test_the_base_of_an_adapter_is_printed_before_it_is_opened(
    downloaded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(downloaded / "merged", ignore_errors=True)
    change(downloaded / "adapter/adapter_config.json", base_model_name_or_path="/not/there")
    acts: list[Callable[[str], Any]] = [
        lambda name: open_model(name, dtype=tiny_model().dtype),
        lambda name: merge_run([name]),
        lambda name: start_model(ModelSpec(base=name)),
    ]
    for number, act in enumerate(acts):
        copy = shutil.copytree(downloaded, downloaded.with_name(f"copy{number}"))
        with pytest.raises(ModelError):
            act(str(copy))
        said = "".join(capsys.readouterr().err.split())
        assert f"note:{copy}/adapternamesitsbase:/not/there" in said


LINKS = {
    "merged/": "merged",
    "adapter/": "adapter",
    "weights": "merged/model.safetensors",
    "a template": "merged/chat_template.jinja",
    "an adapter's weights": "adapter/adapter_model.safetensors",
    "its recipe": NAME,
}


@pytest.mark.parametrize("case", LINKS)
def test_links_that_leave_the_folder_are_refused(case: str, downloaded: Path) -> None:
    save_tiny(downloaded / "merged")
    inside = downloaded / LINKS[case]
    outside = inside.rename(downloaded.parent / "outside")
    inside.symlink_to(outside, target_is_directory=outside.is_dir())
    with pytest.raises(ModelError, match="is a link that leaves") as raised:
        resolve(str(downloaded))
    assert str(outside) in str(raised.value)


def test_links_that_stay_and_those_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "models--a--b/blobs")
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "models--a--b/blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    assert resolve(str(snapshot)).whole().location == str(snapshot)
    (tmp_path / "named").symlink_to(snapshot)  # by the user
    assert resolve(str(tmp_path / "named")).whole()
    shutil.copytree(tmp_path / "models--a--b/blobs", tmp_path / "own")
    (tmp_path / "own/also.json").symlink_to("config.json")
    assert resolve(str(tmp_path / "own")).whole()
    shutil.copytree(tmp_path / "models--a--b/blobs", tmp_path / "blobs")
    shutil.copytree(snapshot, tmp_path / "snapshots/0123", symlinks=True)
    with pytest.raises(ModelError, match="is a link that leaves"):
        resolve(str(tmp_path / "snapshots/0123"))


def test_an_index_names_files_of_its_own_folder_only(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"names a file of another folder: '../outside"):
        resolve(str(folder))


def test_a_pipe_in_place_of_a_file_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    os.mkfifo(tmp_path / "model/tokenizer.json")
    with pytest.raises(ModelError, match="is not a file"):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize("value", ["kernels-community/flash", {"": "someone/kernel:fast"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_experts_implementation"])
def test_a_configuration_fetches_no_kernels(
    key: str, value: Any, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "model")
    change(tmp_path / "model/config.json", **{key: value})
    with pytest.raises(ModelError, match="asks for code from the hub"):
        open_model(str(tmp_path / "model"), dtype=tiny_model().dtype)


def test_an_adapter_without_weights_is_not_looked_up_on_the_hub(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(
        attach_adapter(tiny_model(), LoraSpec(rank=2), 0), Path("evil/adapter"), str(tiny_base)
    )
    Path("evil/adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"there is no adapter_model\.safetensors"):
        open_model("evil", dtype=tiny_model().dtype)


def test_the_base_of_an_adapter_on_the_hub_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "alignkit.models.base.loading.find_adapter_config_file", lambda name: "adapter_config.json"
    )
    with pytest.raises(ModelError, match="someone/adapter is an adapter on the hub"):
        open_model("someone/adapter", dtype=tiny_model().dtype)


FOREIGN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "code of the base": (
        {"model": {"trust_remote_code": True}},
        ["executes the Python code that comes with BASE (model.trust_remote_code)"],
    ),
    "a loss": (
        {"objective": {"kind": "custom", "file": "mine.py"}},
        ["executes mine.py (objective.file)"],
    ),
    "a hub id": (
        {"model": {"base": "owner/name"}},
        ["fetches owner/name from the hub, unless it is in its cache (model.base)"],
    ),
    "an adapter": (
        {"model": {"base": "lora"}},
        [
            "opens owner/name, the base that the adapter in FOLDER/lora names (model.base)",
            "fetches owner/name from the hub, unless it is in its cache (model.base)",
        ],
    ),
    "rows of the hub": (
        {"data": {"train": [{"hub": "owner/rows"}]}},
        ["fetches owner/rows from the hub, unless it is in its cache (data.train)"],
    ),
    "a tracker": (
        {"training": {"trackers": ["tensorboard", "wandb"]}},
        ["sends metrics to wandb (training.trackers)"],
    ),
    "a reward function": (
        {"reward": {"function": "mine.py:score"}},
        ["executes mine.py, for score (reward.function)"],
    ),
    "a server": (
        {"reward": [{"url": "https://host.example:8000/a?key=secret"}, {"rule": "json"}]},
        [
            "sends prompts, responses and all columns of the rows to https://host.example:8000 "
            "(reward.url)"
        ],
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_plan_names_what_is_foreign(
    case: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    save_adapter(attach_adapter(tiny_model(), LoraSpec(rank=2), 0), Path("lora"), "owner/name")
    values, expected = FOREIGN[case]
    make = make_ppo_recipe if "reward" in values else make_recipe
    path = make(tmp_path, tiny_base)
    recipe = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        recipe[key] = {**recipe.get(key, {}), **value} if key in ("model", "data") else value
    path.write_text(json.dumps(recipe), encoding="utf-8")
    lines = foreign_parts(load_recipe(str(path)).recipe)
    places = {"BASE": str(tiny_base), "FOLDER": str(tmp_path)}
    for name, place in places.items():
        expected = [line.replace(name, place) for line in expected]
    assert lines == expected


def test_plan_and_inspect_say_so_before_they_open_anything(
    alignkit: Any, tiny_base: Path, tmp_path: Path
) -> None:
    path = make_recipe(tmp_path, tiny_base, model__base="owner/name")
    for command in ("plan", "inspect"):
        done = alignkit(command, path, cwd=tmp_path)
        assert done.code == 2
        first = done.stderr.splitlines()[0]
        assert first.startswith("note: this recipe fetches owner/name from the hub")
    path = make_recipe(tmp_path, tiny_base, training__trackers=["wandb"])
    for command in ("plan", "inspect"):
        done = alignkit(command, path, "--json", cwd=tmp_path)
        said = json.loads(done.stdout)["foreign"]
        assert said == ["sends metrics to wandb (training.trackers)"]
