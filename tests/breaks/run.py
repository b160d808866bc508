"""Break the package in fifty places, one at a time, and see which test notices.

    python tests/breaks/run.py record --coverage FILE    # the suite once, measured
    python tests/breaks/run.py --coverage FILE           # the breaks of breaks.yaml

The recording holds which tests reach which line, including tests whose commands run in forked
processes or whose shared fixtures do. Each break is made in a copy of the tree; of the tests that
reach it the quickest run first, until one fails. Needs coverage, and pytest-xdist for `-n`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from recording import Recording, environment, fresh_home, package_files, record

HERE = Path(__file__).resolve().parent

QUICKEST = 20
"""Tests that run first, in a process of their own: few files are imported for them."""


@dataclass
class Outcome:
    """What came of a break."""

    name: str
    room: str
    breaks: str
    place: str
    noticed: bool = False
    by: str = ""
    reach: int = 0
    ran: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def copy_tree(tree: Path, copy: Path) -> Path:
    """Everything that git does not ignore, without the repository itself."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():  # else it was removed but is still in the index
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, copy / name)
    return copy


def find_break(one: dict[str, str], files: dict[str, str]) -> tuple[str, set[int]]:
    """File of a break, and the lines of the statements that it changes."""
    hits = [name for name, text in files.items() for _ in range(text.count(one["find"]))]
    if len(hits) != 1:
        raise ValueError(f"{one['name']}: stands {len(hits)} times in the package: {one['find']}")
    text = files[hits[0]]
    start = text.index(one["find"])
    first = text.count("\n", 0, start) + 1
    touched = range(first, first + one["find"].count("\n") + 1)
    lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)  # of a compound statement only its head
            end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            own = set(range(node.lineno, max(end, node.lineno) + 1))
            lines |= own if own & set(touched) else set()
    return hits[0], lines


def check(breaks: list[dict[str, str]], tree: Path) -> None:
    """Every break can be made, before the first is."""
    faults, files = [], package_files(tree)
    for one in breaks:
        try:
            find_break(one, files)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise SystemExit("\n".join(faults))


def try_break(
    one: dict[str, str], copy: Path, recording: Recording, excluded: set[str], limit: float
) -> Outcome:
    """Make a break in a copy, run the tests that reach it, and fix it."""
    file, lines = find_break(one, package_files(copy))
    outcome = Outcome(one["name"], one["room"], one["breaks"], f"{file}:{min(lines)}")
    names = recording.reaching(file, lines)
    if not names:
        names = recording.reaching(file, None)
        outcome.notes.append("no test reaches the line: those that reach the file")
    names = [name for name in names if name not in excluded]
    picked = recording.ordered(names, limit / 2)
    outcome.reach = len(names)
    if len(picked) < len(names):
        outcome.notes.append(f"the slowest {len(names) - len(picked)} do not fit the time")
    if not picked:
        return outcome
    whole = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(whole.replace(one["find"], one["put"]), encoding="utf-8")
    started = time.monotonic()
    try:
        for part in filter(None, (picked[:QUICKEST], picked[QUICKEST:])):
            code, noted, tail = run_tests(copy, part, limit, ["-x"])
            outcome.ran += sum(what == "start" for what, _, _ in noted)
            judge(outcome, code, noted, tail, recording)
            if code != 0:
                break
    finally:
        (copy / file).write_text(whole, encoding="utf-8")
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def judge(
    outcome: Outcome,
    code: int | None,
    noted: list[tuple[str, str, float]],
    tail: str,
    recording: Recording,
) -> None:
    """Whether tests noticed; the code is None if the run was stopped at its limit."""
    failed = [name for what, name, _ in noted if what == "failed"]
    if failed:
        outcome.noticed, outcome.by = True, failed[0]
    elif code is None:
        _, name, since = noted[-1] if noted else ("", "", 0.0)
        usual = recording.tests.get(name, {}).get("seconds", 0.0)
        outcome.noticed = bool(name) and since > max(60.0, 10 * usual)
        outcome.by = name if outcome.noticed else ""
        outcome.notes.append("it hung" if outcome.noticed else "the time was up")
    elif code:
        outcome.noticed = code < 0 and bool(noted)  # crashed; else no test has judged anything
        outcome.by = noted[-1][1] if outcome.noticed else ""
        outcome.notes.append(f"pytest ended with {code}: {tail}")


def run_tests(
    copy: Path, names: list[str], limit: float, options: list[str]
) -> tuple[int | None, list[tuple[str, str, float]], str]:
    """Run tests in this order: exit code, what was noted and seconds ago, end of the output."""
    with tempfile.TemporaryDirectory(prefix="breaks-") as scratch, fresh_home() as home:
        (Path(scratch) / "picked.json").write_text(json.dumps(names), encoding="utf-8")
        files = sorted({name.partition("::")[0] for name in names})
        command = [sys.executable, "-m", "pytest", "-p", "picking", "-p", "no:cacheprovider"]
        env = environment(copy, home) | {
            "BREAKS_PICKED": scratch,
            "PYTHONDONTWRITEBYTECODE": "1",  # a break may keep a file's size, within one second
            "TMPDIR": scratch,
        }
        log = Path(scratch) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, *options, *files],
                cwd=copy,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        ended, place = time.time(), Path(scratch) / "noted.jsonl"
        rows = place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
        noted = [(what, name, ended - at) for what, name, at in map(json.loads, rows)]
        return code, noted, log.read_text(errors="replace").strip()[-300:]


def run_breaks(
    tree: Path, breaks: list[dict[str, str]], recording: Recording, jobs: int, limit: float
) -> list[Outcome]:
    """All breaks; tests that fail in a whole copy too are left out, and their breaks repeated."""
    done: dict[str, Outcome] = {}
    excluded: set[str] = set()
    left = breaks
    with tempfile.TemporaryDirectory(prefix="breaks-") as scratch:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            copies.put(copy_tree(tree, Path(scratch) / str(number)))

        def attempt(one: dict[str, str]) -> Outcome:
            copy = copies.get()
            try:
                outcome = try_break(one, copy, recording, excluded, limit)
            finally:
                copies.put(copy)
            print(line(outcome), flush=True)
            return outcome

        while left:
            with ThreadPoolExecutor(jobs) as pool:
                done |= {outcome.name: outcome for outcome in pool.map(attempt, left)}
            by = {done[one["name"]].by for one in left} & recording.tests.keys()
            copy = copies.get()
            code, noted, tail = run_tests(copy, sorted(by), 2 * limit, []) if by else (0, [], "")
            copies.put(copy)
            if code not in (0, 1):
                raise SystemExit(f"the tests that noticed do not run without a break: {tail}")
            false = {name for what, name, _ in noted if what == "failed"}
            for name in false:
                print(f"fails without a break, left out: {name}", flush=True)
            excluded |= false
            left = [one for one in left if done[one["name"]].by in false]
    return [done[one["name"]] for one in breaks]


def line(outcome: Outcome) -> str:
    """One row of a table in Markdown."""
    verdict = "yes" if outcome.noticed else "**no**"
    cells = [outcome.name, outcome.room, outcome.place, verdict, outcome.by]
    cells += [f"{outcome.ran} of {outcome.reach}", f"{outcome.seconds:.0f}"]
    text = [*cells, outcome.breaks, "; ".join(outcome.notes)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in text) + " |"


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["breaks", "record"], default="breaks")
    parser.add_argument("--coverage", type=Path, required=True, help="the recording")
    parser.add_argument("--tree", type=Path, default=HERE.parents[1], help="the checkout")
    parser.add_argument("-n", type=int, default=1, help="pytest processes that record")
    parser.add_argument("--more", action="store_true", help="add to a recording")
    parser.add_argument("--only", default="", help="names of breaks, with commas between")
    parser.add_argument("--jobs", type=int, default=1, help="breaks at a time")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each break")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    options, others = parser.parse_known_args()
    tree, file = options.tree.resolve(), options.coverage.resolve()
    if options.what == "record":
        return record(tree, file, options.n, others, more=options.more)
    if others:
        parser.error(f"unknown: {' '.join(others)}")
    breaks = yaml.safe_load((HERE / "breaks.yaml").read_text(encoding="utf-8"))
    if options.only:
        breaks = [one for one in breaks if one["name"] in options.only.split(",")]
    check(breaks, tree)
    recording = Recording.read(file, tree)
    print("| break | room | place | noticed | by | ran | seconds | what is wrong | notes |")
    print("|---|---|---|---|---|---|---|---|---|")
    outcomes = run_breaks(tree, breaks, recording, options.jobs, options.limit)
    print(f"\n{sum(o.noticed for o in outcomes)} of {len(outcomes)} breaks noticed")
    if options.json:
        text = json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n"
        options.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
