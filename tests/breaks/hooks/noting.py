"""A pytest plugin that notes for each test: its time, its outcome, and which fixtures it shares."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from typing import Any

import measuring
import pytest

_tests: dict[str, dict[str, Any]] = {}


def pytest_configure() -> None:
    place = measuring.RECORD / f"running.{os.getpid()}"
    place.write_text("", encoding="utf-8")
    os.environ["BREAKS_RUNNING"] = str(place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    _tests[item.nodeid] = {"seconds": 0.0, "outcome": "passed", "shares": []}
    measuring.switch(item.nodeid)
    try:
        return (yield)
    finally:
        measuring.switch("")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    if fixturedef.scope == "function":
        return (yield)
    before = measuring.running()
    measuring.switch(_context(fixturedef))
    try:
        return (yield)
    finally:
        measuring.switch(before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: Any) -> Generator[None, Any, Any]:
    used = item._request._fixture_defs.values()
    shared = {_context(one) for one in used if one.scope != "function"}
    _tests[item.nodeid]["shares"] = sorted(shared)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid in _tests:  # else it ran in another process
        noted = _tests[report.nodeid]
        noted["seconds"] += report.duration
        if report.outcome != "passed":
            noted["outcome"] = report.outcome


def pytest_sessionfinish() -> None:
    if _tests:
        place = measuring.RECORD / f"tests.{os.getpid()}.json"
        place.write_text(json.dumps(_tests), encoding="utf-8")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    measuring.save()


def _context(fixturedef: Any) -> str:
    return f"{fixturedef.scope} fixture {fixturedef.baseid}::{fixturedef.argname}"
