"""Pages about runs: what they say is true, foreign text is text, and they stay small."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from running import make_recipe, train

from alignkit.report.comparison import differing_keys, render_runs
from alignkit.report.drawing import draw
from alignkit.report.figures import FIGURES, drawn
from alignkit.report.history import Series, history_of
from alignkit.report.page import render_run, spent
from alignkit.report.run_facts import findings, read_run
from alignkit.stages.running import run_folder
from alignkit.stages.running.run_folder import NO_PAGE

EVIL = "<script>alert('x')</script> $\\frac{1}{2}$ & \"quoted\""


def make_run(folder: Path, lines: list[dict[str, Any]], **about: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"status": "finished", "started": "2026-01-01T00:00:00+0000", **about}
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    plan = {"stage": "sft", "steps": 10, "memory": {"peak": 2e9}, "warnings": [EVIL]}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "recipe.yaml").write_text(f"stage: sft\noutput: {folder.name}\n", encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def steps(count: int, **values: Any) -> list[dict[str, Any]]:
    return [{"step": n + 1, "loss": 3.0 - n / count, **values} for n in range(count)]


class Seen(HTMLParser):
    """Tags of a page, and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action") and not str(value).startswith("#"):
                self.fetched.append(str(value))


# series ---------------------------------------------------------------------------------------


def test_a_thin_series_keeps_its_extremes() -> None:
    values = [math.sin(n / 50) for n in range(10_000)]
    values[7_777] = 100.0
    thin = Series(list(range(10_000)), values).thinned(400)
    assert len(thin.steps) <= 402
    assert (thin.steps[0], thin.steps[-1]) == (0, 9_999)
    assert 100.0 in thin.values
    assert min(thin.values) == min(values)
    assert thin.steps == sorted(thin.steps)
    few = Series([1, 2], [3.0, 4.0])
    assert few.thinned(400) is few


def test_lines_become_series() -> None:
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
    assert history_of(lines) == {"loss": Series([2], [0.5])}  # a resumed run writes a step anew


# drawings -------------------------------------------------------------------------------------


def test_a_drawing_has_the_pages_colours_and_is_small() -> None:
    series = Series(list(range(10_000)), [math.sin(n) for n in range(10_000)])
    svg = draw([series, series], salt="a")
    assert len(svg) < 40_000
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert "var(--curve-0)" in svg
    assert "var(--curve-1)" in svg
    assert "var(--ink)" in svg
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]", svg)
    assert "<metadata" not in svg
    assert draw([series], salt="a") == draw([series], salt="a")
    ids = [set(re.findall(r'id="([^"]*)"', draw([series], salt=salt))) for salt in "ab"]
    assert not ids[0] & ids[1]


def test_every_metric_of_a_figure_is_documented() -> None:
    known = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    known = known.replace("<k>", "1")
    for figure in FIGURES:
        for metric in figure.metrics:
            assert f"`{metric}`" in known, metric
    assert drawn({"loss": Series([1], [2.0])}) == [(FIGURES[0], ["loss"])]


# one run --------------------------------------------------------------------------------------


def test_foreign_text_is_text(tmp_path: Path) -> None:
    about = {"command": EVIL, "data": {EVIL: {"rows": 9, "kept": 9, "notes": {EVIL: 2}}}}
    run = read_run(make_run(tmp_path / "r<b>", steps(3, **{f"reward/{EVIL}": 1.0}), **about))
    for page in (render_run(run), render_runs([run, run])):
        seen = Seen(page)
        assert "script" not in seen.tags
        assert "b" not in seen.tags
        assert seen.fetched == []
        assert "Content-Security-Policy" in page
    assert "&lt;script&gt;alert" in render_run(run)


def test_what_stands_out(tmp_path: Path) -> None:
    norms = [1.0] * 12
    norms[6] = 50.0
    lines = [
        {"step": 0, "eval/loss": 2.0},
        *({"step": n + 1, "loss": 2.0, "grad_norm": norm} for n, norm in enumerate(norms)),
        {"step": 6, "eval/loss": 1.5},
        {"step": 12, "eval/loss": 1.9, "skipped_steps": 3, "memory_gb": 4.0},
    ]
    data = {"train": {"rows": 100, "kept": 80, "dropped": {"too long": 20}, "truncated": 0}}
    run = read_run(make_run(tmp_path / "a", lines, status="failed", data=data))
    said = "\n".join(findings(run))
    for part in (
        "The run is failed, after 12 of 10 steps.",
        "lowest after step 6, at 1.5, and is 1.9 at the end",
        "3 steps were skipped",
        "more than 5 times its median at steps 7.",
        "20 of 100 rows of train were dropped.",
        "It took 4.0 GB, and 2.0 were planned.",
    ):
        assert part in said
    plain = make_run(tmp_path / "b", [{"step": 0, "eval/loss": 2.0}, *steps(3)])
    assert list(findings(read_run(plain))) == []
    alone = read_run(make_run(tmp_path / "c", steps(3)))
    assert list(findings(alone)) == [
        "Nothing was held out, so nothing says whether the run helped: set data.eval."
    ]


def test_results_have_their_intervals(tmp_path: Path) -> None:
    value, low, high = "eval/reward", "eval/reward_low", "eval/reward_high"
    lines = [
        {"step": 0, value: 0.1, low: 0.0, high: 0.2},
        {"step": 9, value: 0.5, low: 0.4, high: 0.6},
    ]
    run = read_run(make_run(tmp_path / "a", lines))
    assert run.results() == [("reward", 0.1, 0.5, "0.4 to 0.6")]
    assert "0.4 to 0.6" in render_run(run)


def test_answers_that_changed_most_come_first(tmp_path: Path) -> None:
    def answers(step: int, place: str, rewards: list[float]) -> list[dict[str, Any]]:
        text = f"{place} at {step}"
        common = {"step": step, "rows": "held_out", "place": place, "prompt": f"ask {place}"}
        return [{**common, "response": f"{text}, {r}", "reward": r} for r in rewards]

    folder = make_run(tmp_path / "a", steps(3))
    lines = answers(0, "p:1", [0.0, 0.1]) + answers(0, "p:2", [0.0, 0.0, 0.3])
    lines += answers(3, "p:1", [0.1, 0.1]) + answers(3, "p:2", [1.0, 1.0, 0.1])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    page = render_run(read_run(folder))
    assert page.index("ask p:2") < page.index("ask p:1")
    assert "p:2 at 3, 1.0" in page
    assert "p:2 at 3, 0.1" not in page  # an unusual one


# several runs ---------------------------------------------------------------------------------


def test_what_differs() -> None:
    one = "stage: sft\noutput: a\ntraining: {learning_rate: 0.1, betas: [0.9, 0.99]}\n"
    two = "stage: sft\noutput: b\ntraining: {learning_rate: 0.2, betas: [0.9, 0.99]}\nseed: 1\n"
    assert differing_keys([one, two]) == [
        ("training.learning_rate", ["0.1", "0.2"]),
        ("seed", ["", "1"]),
    ]
    assert differing_keys([one, "a: [", one]) != []


def test_many_long_runs_make_a_page_of_some_megabytes(tmp_path: Path) -> None:
    runs = []
    for number in range(12):
        lines = steps(2_000, accuracy=0.5 + number / 100, grad_norm=1.0)
        runs.append(read_run(make_run(tmp_path / f"r{number}", lines)))
    page = render_runs(runs)
    assert len(page) < 1_500_000
    assert page.count("<svg") == 3
    assert page.count('class="key"') == 12 + 3 * 12


# whole runs -----------------------------------------------------------------------------------


def test_a_run_writes_its_page(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignkit: CommandLine
) -> None:
    monkeypatch.delenv(NO_PAGE)
    recipe = make_recipe(tmp_path, tiny_base)
    run = Path(train(recipe).output)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "finished" in page
    assert page.count("<svg") >= 4
    assert "stage: sft" in page
    done = alignkit("report", str(run), str(run), "-o", "both.html", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.stdout.strip().endswith("both.html")
    followed = alignkit("report", str(run), "--follow", cwd=tmp_path)
    assert "finished" in followed.stdout
    assert "▁" in followed.stdout
    wrong = alignkit("report", str(tmp_path), cwd=tmp_path)
    assert wrong.code == 2
    assert "is not a run folder" in wrong.stderr


def test_a_page_that_cannot_be_written_ends_no_run(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("no ink")

    monkeypatch.delenv(NO_PAGE)
    monkeypatch.setattr(run_folder, "write_report", fail)
    run = Path(train(make_recipe(tmp_path, tiny_base)).output)
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert "report.html could not be written: no ink" in capsys.readouterr().err


def test_times() -> None:
    assert [spent(n) for n in (9.6, 75, 7325)] == ["10 s", "1 min 15 s", "2 h 2 min"]
