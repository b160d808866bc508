"""Random recipes, overrides and pipelines: read, or refused in sentences."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from alignkit.errors import AlignkitError
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.pipeline import load_pipeline
from alignkit.recipe.reading.stored import render_recipe, stored_recipe

many = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

SHARED: dict[str, Any] = {
    "output": "run",
    "model": {"base": "some/model", "dtype": "float32", "add_tokens": []},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"},
    "data": {"train": [{"path": "rows.jsonl", "weight": 2.0}], "max_length": 64},
    "training": {"max_steps": 5, "learning_rate": 1e-3, "warmup": 0.1, "trackers": []},
}
RECIPES: dict[str, dict[str, Any]] = {
    "sft": SHARED,
    "reward": SHARED,
    "dpo": {**SHARED, "objective": {"kind": "ipo", "tau": 0.1}},
    "kto": {**SHARED, "objective": {"kind": "kto", "beta": 0.1}},
    "ppo": {
        **SHARED,
        "reward": [{"rule": "regex", "pattern": "e"}, {"rule": "length", "max": 9}],
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
    },
}
TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "~", "a" * 300, "\0", "../x", "rows.jsonl", "²", "1e400", "\x1b[31m"]),
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NUMBER = st.integers(-2, 5) | st.floats() | st.sampled_from([1e300, 2**31, 2**63, 10**30, 1e-320])


@pytest.fixture(scope="module", autouse=True)
def _in_folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
        yield


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key path of a document."""
    found = [path]
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: Any, document: dict[str, Any]) -> dict[str, Any]:
    """A document with one to three values replaced, removed, or put where none belongs."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(changed)[1:]))
        here: Any = changed
        for part in path[:-1]:
            here = here[part]
        what = draw(st.sampled_from(["value", "number", "remove", "add"]))
        if what == "remove":
            del here[path[-1]]
        elif what == "add" and isinstance(here, dict):
            here[draw(TEXT | st.sampled_from(["kind", "reward", "extends", "stage"]))] = draw(VALUE)
        else:
            here[path[-1]] = draw(NUMBER if what == "number" else VALUE)
        if len(places(changed)) == 1:
            break
    return changed


def read_or_refuse(read: Callable[[], Any]) -> Any:
    """What was read; None where it was refused in sentences of a sensible length."""
    try:
        return read()
    except AlignkitError as error:
        said = str(error)
    assert 0 < len(said) < 20_000
    return None


def write(values: Any, name: str) -> str:
    Path(name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return name


@pytest.mark.parametrize("stage", RECIPES)
@many
@given(data=st.data())
def test_a_changed_recipe_is_read_or_refused(stage: str, data: Any) -> None:
    values = data.draw(mutated({"stage": stage, **RECIPES[stage]}))
    loaded = read_or_refuse(lambda: load_recipe(write(values, "r.yaml")))
    if loaded is not None:
        Path("stored.yaml").write_text(render_recipe(loaded.recipe), encoding="utf-8")
        assert stored_recipe(Path("stored.yaml")) == loaded.recipe


NASTY: list[Any] = [
    *(None, True, 5, -1, 0.5, 1e300, 10**400, float("inf"), float("nan"), "", "x", "\0", "\x1b"),
    *("a" * 300, [], [None], [[]], {}, {"kind": "x"}, {"kind": None}, {"": 1}, {"rule": []}),
]
"""Values that are put in every place of every recipe."""


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_every_place_of_a_recipe_may_hold_anything(stage: str) -> None:
    document, wrong = {"stage": stage, **RECIPES[stage]}, []
    for path in places(document)[1:]:
        for value in NASTY:
            changed = here = copy.deepcopy(document)
            for part in path[:-1]:
                here = here[part]
            here[path[-1]] = value
            Path("r.yaml").write_text(json.dumps(changed), encoding="utf-8")  # JSON is YAML
            try:
                read_or_refuse(lambda: load_recipe("r.yaml"))
            except Exception as error:
                wrong.append(f"{path} = {value!r:.20}: {error!r:.100}")
    assert not wrong, f"{len(wrong)} are wrong:\n" + "\n".join(wrong)


SCRAPS = [
    *(
        "&a ",
        "*a",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!timestamp ",
        "!!binary ",
        "!!null x",
        "[",
        "]",
    ),
    *("{", "}", ": ", "- ", "? ", "| ", "> ", "#", "'", '"', "\t", "\0", "\n", "---\n", "%", "@"),
    *("0x_", "0b_", "1:30", "010", ".inf", ".nan", "1e400", "\ufeff", "\x85", "<<: *a", "~", "²"),
    *("\ud83d\ude00", "extends: r.yaml\n", "!!python/name:os.system ", "=", "7" * 5000, "[" * 900),
]


@many
@given(data=st.data())
def test_a_scribbled_file_is_read_or_refused(data: Any) -> None:
    text = yaml.safe_dump({"stage": "sft", **SHARED}, sort_keys=False)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 3))
        scrap = data.draw(st.sampled_from(SCRAPS) | st.text(max_size=4))
        text = text[:at] + scrap + text[at + gone :]
    Path("r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    read_or_refuse(lambda: load_recipe("r.yaml"))


KEYS = [".".join(map(str, path)) for path in places({"stage": "ppo", **RECIPES["ppo"]})[1:]]
OVERRIDE = st.one_of(
    st.tuples(st.sampled_from(KEYS), VALUE.map(json.dumps)).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.lists(st.sampled_from(SCRAPS)).map("".join)).map("=".join),
    st.tuples(st.sampled_from(KEYS) | TEXT, TEXT).map("=".join),
    TEXT,
)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@many
@given(overrides=st.lists(OVERRIDE, min_size=1, max_size=3))
def test_any_override_is_taken_or_refused(stage: str, overrides: list[str]) -> None:
    name = write({"stage": stage, **RECIPES[stage]}, "r.yaml")
    read_or_refuse(lambda: load_recipe(name, overrides))


PIPELINE = {
    "output": "out",
    "stages": {
        "first": {"stage": "sft", **{k: v for k, v in SHARED.items() if k != "output"}},
        "second": {"recipe": "dpo.yaml", "model": {"base": "${first}"}, "output": "elsewhere"},
        "third": {
            "label": {"model": "${second}", "prompts": [{"path": "rows.jsonl"}], "reward": "x/y"}
        },
    },
}


@many
@given(values=mutated(PIPELINE), overrides=st.lists(OVERRIDE, max_size=1))
def test_a_changed_pipeline_is_read_or_refused(values: Any, overrides: list[str]) -> None:
    write({"stage": "dpo", **RECIPES["dpo"]}, "dpo.yaml")
    name = write(values, "p.yaml")
    read_or_refuse(lambda: load_pipeline(name, [f"first.{text}" for text in overrides]))
