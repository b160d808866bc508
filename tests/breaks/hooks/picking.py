"""A pytest plugin that runs the tests it is told, in that order, and notes how far it comes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

_FOLDER = Path(os.environ["BREAKS_PICKED"])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = json.loads((_FOLDER / "picked.json").read_text(encoding="utf-8"))
    found = {item.nodeid: item for item in items}
    picked = [found[name] for name in wanted if name in found]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(picked)])
    items[:] = picked


def pytest_runtest_logstart(nodeid: str) -> None:
    _note("start", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _note("failed", report.nodeid)


def _note(what: str, nodeid: str) -> None:
    with (_FOLDER / "noted.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([what, nodeid, time.time()]) + "\n")
