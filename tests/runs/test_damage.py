"""Damage to the small files of a run: told, repaired, and no reason to lose a checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import assert_same, break_off, make_ppo_recipe, make_recipe, train

from alignkit.errors import RunError
from alignkit.recipe.reading.stored import stored_recipe
from alignkit.report.run_files import read_about
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.running import session

Damage = Callable[[bytes], bytes | None]

DAMAGES: dict[str, Damage] = {
    "flip": lambda old: old[: len(old) // 2] + bytes([old[len(old) // 2] ^ 0x80]) + old[51:],
    "cut": lambda old: old[: len(old) // 2],
    "empty": lambda old: b"",
    "nul": lambda old: b"\0" * len(old),
    "list": lambda old: b"[]",
    "null": lambda old: b"null",
    "number": lambda old: b"5",
    "object": lambda old: b"{}",
    "nested": lambda old: b"[" * 100_000,
    "gone": lambda old: None,
}
SMALL = ("run.json", "recipe.yaml", "plan.json")


def spoil(path: Path, damage: Damage) -> None:
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


@pytest.fixture(scope="module")
def broken(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its `run`, which ended after step 4, and the `whole-run`."""
    folder = tmp_path_factory.mktemp("broken")
    fields = {"save_every": 2, "max_steps": 6, "keep": 3}
    keys: dict[str, Any] = {f"training__{key}": value for key, value in fields.items()}
    train(make_recipe(folder, tiny_base, merge=False, **keys))
    break_off(folder / "run", 4)
    return folder


@pytest.fixture
def copied(broken: Path, tmp_path: Path) -> Path:
    """A renamed copy: the paths in its recipe are the new ones, those in its run the old."""
    shutil.copytree(broken, tmp_path / "copy")
    recipe = tmp_path / "copy" / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8").replace(str(broken), str(tmp_path / "copy"))
    recipe.write_text(text, encoding="utf-8")
    return tmp_path / "copy"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(session.Session, "say", lambda _, text, label="": lines.append(text))
    return lines


def resumed(folder: Path) -> Path:
    train(folder / "recipe.yaml", resume=True)
    assert_same(folder / "run", folder / "whole-run")
    return folder / "run"


@pytest.mark.parametrize(
    ("names", "kind"),
    [(SMALL, kind) for kind in DAMAGES] + [((name,), "gone") for name in SMALL],
)
def test_small_files(names: tuple[str, ...], kind: str, copied: Path, said: list[str]) -> None:
    for name in names:
        spoil(copied / "run" / name, DAMAGES[kind])
    run = resumed(copied)
    told = [line.partition(" is damaged: the newest")[0] for line in said if "is damaged" in line]
    assert sorted(told) == sorted(names)
    assert "resuming after step 4" in said
    assert "base" in read_about(run)
    assert stored_recipe(run / "recipe.yaml").output == str(run)
    assert json.loads((run / "plan.json").read_text(encoding="utf-8"))["steps"] == 6


def test_all_of_them_and_the_newest_checkpoint(copied: Path, said: list[str]) -> None:
    for name in SMALL:
        spoil(copied / "run" / name, DAMAGES["nul"])
    spoil(copied / "run/checkpoints/step-000004/manifest.json", DAMAGES["flip"])
    (copied / "run/checkpoints/step-999999").write_text("a file", encoding="utf-8")
    (copied / "run/checkpoints/step-old").mkdir()
    resumed(copied)
    assert "step-000004 is damaged (no readable manifest.json); using the one before" in said
    assert "resuming after step 2" in said


def test_a_valid_but_other_value_does_not_matter(copied: Path, said: list[str]) -> None:
    path = copied / "run" / "run.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    about["base"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(about), encoding="utf-8")
    resumed(copied)
    assert "run.json is damaged: the newest checkpoint says what this run is" in said


def without_records(run: Path) -> None:
    """As earlier versions wrote checkpoints."""
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        del state["run"]
        text = json.dumps(state)
        (folder / "state.json").write_text(text, encoding="utf-8")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["state.json"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("kind", [None, "flip", "object"])
def test_a_run_of_an_earlier_version(kind: str | None, copied: Path, said: list[str]) -> None:
    run = copied / "run"
    without_records(run)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for rows in about["data"].values():
        del rows["content"]
    (run / "run.json").write_text(json.dumps(about), encoding="utf-8")
    if kind is None:  # its rows are known by their place, too
        with pytest.raises(RunError, match=r"data\.train has changed since the run was started"):
            train(copied / "recipe.yaml", resume=True)
        return
    spoil(run / "run.json", DAMAGES[kind])
    resumed(copied)
    told = [line for line in said if "is damaged" in line]
    expected = "run.json is damaged, and no checkpoint holds a copy: it is not compared"
    assert told == ([expected] if kind == "flip" else [])


def test_metrics_keep_every_line_that_can_be_read(copied: Path, said: list[str]) -> None:
    path = copied / "run" / "metrics.jsonl"
    first, second, third, *rest = path.read_bytes().splitlines(keepends=True)
    flipped = b"\xff" + second[1:]
    path.write_bytes(first + flipped + b"7\n" + b'{"loss": 1}\n' + third + b"".join(rest) + b"{")
    train(copied / "recipe.yaml", resume=True)
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4, 5, 6]
    aside = path.with_name("metrics.jsonl.damaged").read_bytes()
    assert aside == flipped + b'7\n{"loss": 1}\n'
    assert "damaged lines of metrics.jsonl moved to metrics.jsonl.damaged: 3" in said


def test_another_recipe_is_still_refused(copied: Path) -> None:
    recipe = copied / "recipe.yaml"
    changes = [
        ("training.learning_rate=1e-3", "training.learning_rate was 0.002, is 0.001"),
        ("model.base=other/model", "model.base was '"),
        ("data.eval=[{path: rows.jsonl}]", "data.eval had 0 entries, has 1"),
        ("adapter={kind: full}", "adapter.kind was 'lora', is 'full'; "),
    ]
    for override, sentence in changes:
        with pytest.raises(RunError) as caught:
            train(recipe, override, resume=True)
        assert sentence in caught.value.message
        assert "{" not in caught.value.message  # no dump of a mapping
    rows = copied / "rows.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b"birds", b"bards", 1))
    with pytest.raises(RunError, match=r"data\.train has changed since the run was started"):
        train(recipe, resume=True)


def test_ppo(tiny_base: Path, tmp_path: Path, said: list[str]) -> None:
    recipe = make_ppo_recipe(tmp_path, tiny_base, training__save_every=2)
    train(recipe)
    run = tmp_path / "run"
    break_off(run, 2)
    for name in SMALL:
        spoil(run / name, DAMAGES["flip"])
    train(recipe, resume=True)
    assert_same(run, tmp_path / "whole-run")
    assert "resuming after step 2" in said
