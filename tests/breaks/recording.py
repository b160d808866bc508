"""Which tests reach which lines of the package: the suite once, with every process measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage

HERE = Path(__file__).resolve().parent


@dataclass
class Recording:
    """Which tests reach which lines, and how long they take."""

    lines: coverage.CoverageData
    root: str
    tests: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path, tree: Path) -> Recording:
        """What `record` wrote, for the tree as it is now."""
        about = json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))
        if package_hashes(tree) != about["hashes"]:
            raise SystemExit("the package has changed since the recording: record again")
        lines = coverage.CoverageData(str(file))
        lines.read()
        return cls(lines, about["root"], about["tests"])

    def reaching(self, file: str, lines: set[int] | None) -> list[str]:
        """Passing tests whose processes or shared fixtures run some of the lines; None is any."""
        by_line = self.lines.contexts_by_lineno(f"{self.root}/{file}")
        wanted = by_line.keys() if lines is None else lines
        contexts = {context for line in wanted for context in by_line.get(line, ())}
        return [
            name
            for name, test in self.tests.items()
            if test["outcome"] == "passed" and not contexts.isdisjoint((name, *test["shares"]))
        ]

    def ordered(self, names: list[str], seconds: float) -> list[str]:
        """The quickest tests that fit in the time, in order; those that share a fixture together,
        since it would be set up again for each."""
        groups: dict[str, list[str]] = {}
        for name in names:
            shares = any(not s.startswith("session") for s in self.tests[name]["shares"])
            groups.setdefault(name.partition("::")[0] if shares else name, []).append(name)
        picked: list[str] = []
        took = {name: self.tests[name]["seconds"] for name in names}
        for group in sorted(groups.values(), key=lambda names: max(map(took.__getitem__, names))):
            for name in sorted(group, key=took.__getitem__):
                seconds -= took[name]
                if seconds < 0 and picked:
                    return picked
                picked.append(name)
        return picked


def record(tree: Path, file: Path, workers: int, arguments: list[str], *, more: bool) -> int:
    """Run the suite with every process measured; write `file`, and `file.json` about the tests.

    `arguments` are pytest's, such as folders. `more` adds to the recording of the same package.
    """
    tests: dict[str, Any] = Recording.read(file, tree).tests if more else {}
    with tempfile.TemporaryDirectory(prefix="breaks-") as scratch, fresh_home() as home:
        env = environment(tree, home) | {
            "BREAKS_RECORD": scratch,
            "BREAKS_PACKAGE": str(tree / "alignkit"),
        }
        command = [sys.executable, "-m", "pytest", "-p", "noting", "-p", "no:cacheprovider"]
        if workers > 1:  # fixtures of a module stay in one process
            command += ["-n", str(workers), "--dist", "loadfile"]
        code = subprocess.run([*command, *arguments], cwd=tree, env=env).returncode
        for place in Path(scratch).glob("tests.*.json"):
            tests |= json.loads(place.read_text(encoding="utf-8"))
        if not more:
            file.unlink(missing_ok=True)
        merged = coverage.CoverageData(str(file))
        merged.read()
        for place in sorted(Path(scratch).glob("lines.*")):
            part = coverage.CoverageData(str(place))
            part.read()
            merged.update(part)
    about = {"root": str(tree), "hashes": package_hashes(tree), "tests": tests}
    Path(f"{file}.json").write_text(json.dumps(about), encoding="utf-8")
    failed = [name for name, test in tests.items() if test["outcome"] == "failed"]
    print(f"{len(tests)} tests recorded, {len(failed)} failed and are left out: {failed}")
    return 0 if tests and code in (0, 1) else code or 1


def environment(tree: Path, home: Path) -> dict[str, str]:
    """The environment in which a copy's own package and the hooks are found."""
    found = os.pathsep.join([str(HERE / "hooks"), str(tree)])
    plain = {"PYTHONHASHSEED": "0"}  # names of tests hold sets
    return {**os.environ, **plain, "PYTHONPATH": found, "ALIGNKIT_TEST_HOME": str(home)}


@contextlib.contextmanager
def fresh_home() -> Iterator[Path]:
    """A home with the models that were fetched, and no cache: it would hide breaks, and keep them.

    `ALIGNKIT_TEST_HOME` names the home with the models.
    """
    with tempfile.TemporaryDirectory(prefix="breaks-home-") as folder:
        known = os.environ.get("ALIGNKIT_TEST_HOME")
        if known and (Path(known) / "models").is_dir():
            (Path(folder) / "models").symlink_to(Path(known).resolve() / "models")
        yield Path(folder)


def package_files(tree: Path) -> dict[str, str]:
    paths = sorted((tree / "alignkit").rglob("*.py"))
    return {path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def package_hashes(tree: Path) -> dict[str, str]:
    return {n: hashlib.sha256(t.encode()).hexdigest() for n, t in package_files(tree).items()}
