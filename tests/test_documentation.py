"""README.md and docs/: links lead somewhere, metrics are those that are logged, lines are short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

import alignkit
from alignkit.evaluation.labelled import describe_labelled
from alignkit.evaluation.pairs import describe_pairs
from alignkit.recipe.stages.built_in import BUILT_IN
from alignkit.recipe.stages.registry import stages
from alignkit.stages.running.loop import METRICS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    README,
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *PAGES,
]

MOST_WORDS = 900
MOST_CHARACTERS = 120


def by_name(document: Path) -> str:
    return document.name


def without_code(document: Path) -> str:
    text = document.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) < MOST_WORDS


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {f"docs/{page.name}" for page in PAGES}


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_lines_are_short(document: Path) -> None:
    lines = document.read_text(encoding="utf-8").split("\n")
    long = [n for n, line in enumerate(lines, 1) if len(line) > MOST_CHARACTERS and line[:1] != "|"]
    assert long == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def files_that_name_pages() -> Iterator[Path]:
    for room in ("alignkit", "recipes", "benchmarks"):
        yield from (path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml"))
    yield from (ROOT / "Makefile", *DOCUMENTS)


def test_pages_that_are_named_exist() -> None:
    for path in files_that_name_pages():
        for name in re.findall(r"\bdocs/[\w-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), (path, name)


def metrics_in(section: str) -> set[str]:
    """Names in the first column of a table of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.split("\n") if line.startswith("| `")]
    assert rows, section
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def own(stage: str) -> set[str]:
    recipe = stages()[stage]
    return set(EntryPoint(stage, recipe.definition, "").load().metrics)


def test_every_metric_has_a_row() -> None:
    assert metrics_in("Every stage") == {"step", *METRICS}
    columns = {name: np.ones(4) for name in ("loss", "rewards/chosen", "rewards/rejected")}
    pairs = {f"eval/{name}" for name in describe_pairs(columns)}
    implicit = {"eval/logps/chosen", "eval/logps/rejected"}
    assert metrics_in("reward and dpo") == own("reward") | own("dpo") | pairs | implicit

    def losses(ratios: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return ratios

    labelled = {"ratio": np.ones(4), "mismatched": np.ones(4), "desirable": np.arange(4.0) % 2}
    values = describe_labelled(labelled, losses, 0.1)
    assert metrics_in("kto") == own("kto") | {f"eval/{name}" for name in values}
    held_out = {"eval/loss", "eval/perplexity", "eval/accuracy", "eval/tokens"}
    assert metrics_in("sft") == own("sft") | held_out
    ppo = metrics_in("ppo")
    assert {name for name in ppo if not name.startswith("eval/")} == own("ppo")
    assert metrics_in("grpo") == own("grpo")
    assert set(BUILT_IN) == {"sft", "reward", "dpo", "kto", "ppo", "grpo"}


def test_the_version_is_the_newest_of_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## (\d+\.\d+\.\d+)", text, flags=re.M)[0]
    assert newest == alignkit.__version__
    assert f'\nversion = "{newest}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
