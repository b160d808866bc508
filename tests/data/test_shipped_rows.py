"""Rows of data_templates/: enough of them, each once, without a fault, told in its README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignkit.curation.check import CheckOptions, check_files
from alignkit.recipe.assets import assets_root

FOLDER = assets_root() / "data_templates"
FORMATS = sorted((FOLDER / "formats").iterdir())
FILES = [path for path in sorted(FOLDER.rglob("*.json*")) if path.is_file()]
README = (FOLDER / "README.md").read_text(encoding="utf-8")

# One prompt with a good and a bad answer; numbers that are drawn.
LOOKS = {
    "labelled_text.jsonl": {"prompts with several answers"},
    "arithmetic.jsonl": {"near-duplicates"},
    "arithmetic_eval.jsonl": {"near-duplicates"},
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))


def texts_of(value: Any) -> list[str]:
    """Every text of a row, but for its schemas."""
    if isinstance(value, dict):
        return [text for key, one in value.items() if key != "tools" for text in texts_of(one)]
    if isinstance(value, list):
        return [text for one in value for text in texts_of(one)]
    return [value] if isinstance(value, str) else []


def test_every_format_has_ten_rows_or_more() -> None:
    assert len(FORMATS) > 20
    assert {path.name: len(rows_of(path)) for path in FORMATS if len(rows_of(path)) < 10} == {}


def test_no_row_stands_anywhere_twice() -> None:
    rows = [json.dumps(row, sort_keys=True) for path in FORMATS for row in rows_of(path)]
    assert len(set(rows)) == len(rows)
    asked = [text for path in FORMATS for row in rows_of(path) for text in set(texts_of(row))]
    told = [text for text in asked if len(text.split()) > 12]  # not system turns, and not roles
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_check_finds_nothing(path: Path) -> None:
    columns = {"prompt": "question"} if path.name == "prompt_only_question.jsonl" else None
    report = check_files([str(path)], CheckOptions(columns=columns))
    faults = {found.name for found in report.findings if found.weight == "fault"}
    looks = {found.name for found in report.findings if found.weight == "look"}
    assert report.rows == len(rows_of(path))
    assert faults == set()
    assert looks <= LOOKS.get(path.name, set())
    if path in FORMATS:
        assert report.facts["lengths"]["longest"] <= 80  # words of a prompt and one answer


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("preference_")])
def test_the_better_answer_is_the_longer_one_about_half_of_the_time(path: Path) -> None:
    share = check_files([str(path)], CheckOptions(near=False)).facts["chosen is longer"]
    assert 0.3 <= share <= 0.7


def test_labels_of_both_kinds() -> None:
    for path in FORMATS:
        if path.name.startswith("labelled_"):
            labels = [row["label"] for row in rows_of(path)]
            assert 4 <= labels.count(True) <= 8
            assert labels.count(True) + labels.count(False) == len(labels)


def test_the_readme_names_every_file() -> None:
    names = {
        path.relative_to(FOLDER).as_posix()
        for path in FOLDER.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "README.md"
    }
    assert names
    assert {name for name in names if name not in README} == set()
    told = set(re.findall(r"\b(?:formats|sft|preference|ppo|grpo)/[\w.]+\.(?:jsonl?|txt)", README))
    assert told <= names


def test_the_readme_shows_rows_as_they_stand_in_the_files() -> None:
    shown = {}
    for section in README.split("\n### ")[1:]:
        name = section.split("\n", 1)[0]
        for block in re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL):
            assert json.loads(block) in rows_of(FOLDER / name), name
            shown[name] = block
    wanted = {path.relative_to(FOLDER).as_posix() for path in FILES}
    assert {name for name in wanted if name not in shown and "_eval." not in name} == set()


def test_links_of_the_readme_lead_to_its_sections() -> None:
    titles = re.findall(r"^##+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", README)
    assert links
    assert set(links) <= anchors
