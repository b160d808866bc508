"""Every recipe in the repository loads, from any working folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.recipe.assets import assets_root
from alignkit.recipe.reading.load import load_recipe, shipped_pipelines, shipped_recipes

FOLDER = assets_root() / "recipes"
NAMES = shipped_recipes()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(name)
    assert loaded.recipe.training.learning_rate is not None
    for source in loaded.recipe.as_dict()["data"]["train"]:
        # Shipped recipes use shipped rows: nothing of this machine's paths ends in run.json.
        assert source["path"] is None or not Path(source["path"]).is_absolute()


def test_every_file_is_a_recipe_or_a_pipeline() -> None:
    files = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
    assert sorted([*NAMES, *shipped_pipelines()]) == files


@pytest.mark.parametrize("name", [*NAMES, *shipped_pipelines()])
def test_recipe_reads_like_a_lab_note(name: str) -> None:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "the first lines say what it does and what it takes"
    assert len(lines) <= 40
