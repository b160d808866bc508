"""docs/from-*.md: their tables are those of the code.

    python tests/recipe/test_importing_pages.py --write

writes them anew after a change of a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alignkit.recipe.importing.fields import Foreign, Settings, Toolkit
from alignkit.recipe.importing.pages import defaults_table, tables
from alignkit.recipe.importing.read import TOOLKITS

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- keys: start -->", "<!-- keys: end -->"

STAGES = {
    "trl": ("sft", "reward", "dpo", "kto", "grpo"),
    "llama-factory": ("sft", "reward", "dpo", "kto", "ppo"),
    "axolotl": ("sft", "reward", "dpo", "kto", "grpo"),
}


def defaults_of(toolkit: Toolkit) -> dict[str, Settings]:
    return {
        stage: toolkit.defaults(Foreign("", (), {}, {}, stage=stage))
        for stage in STAGES[toolkit.name]
    }


def with_tables(text: str, toolkit: Toolkit) -> str:
    """The page with the tables of today between its marks."""
    head, _, rest = text.partition(START)
    shown = defaults_table(toolkit, defaults_of(toolkit))
    written = f"{tables(toolkit)}\n\n## Their defaults\n\n{shown}"
    return f"{head}{START}\n\n{written}\n\n{END}{rest.partition(END)[2]}"


@pytest.mark.parametrize("name", TOOLKITS)
def test_the_page_shows_every_key(name: str) -> None:
    text = (DOCS / f"from-{name}.md").read_text(encoding="utf-8")
    assert START in text
    assert text == with_tables(text, TOOLKITS[name]), (
        "python tests/recipe/test_importing_pages.py --write"
    )


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    for toolkit in TOOLKITS.values():
        page = DOCS / f"from-{toolkit.name}.md"
        page.write_text(with_tables(page.read_text(encoding="utf-8"), toolkit), encoding="utf-8")
