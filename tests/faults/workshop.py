"""The folder in which works are disturbed, and the undisturbed twin of each.

Every work runs in the same folder, `here`, as its twin did: no path can make a difference.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from commandline import CommandLine, Done, SecondCommandLine
from running import without_times
from tiny import save_tiny

from alignkit.runtime.metrics import read_metrics
from faults.children import DIE_AFTER_STEP, count_calls, run
from faults.works import EVERY, WORKS, Work, lay_out


@dataclass(frozen=True)
class Twin:
    """A work that nobody disturbed.

    Args:
        folder: what it left.
        calls: that changed the file system.
        seconds: that it took.
    """

    folder: Path
    calls: int
    seconds: float


class Workshop:
    """Where works run.

    Args:
        home: an empty folder.
        commands: forks commands; caches go into `home` too.
    """

    def __init__(self, home: Path, commands: CommandLine) -> None:
        self.home, self.commands = home, commands
        self.here, self.base = home / "here", home / "base"
        self._twins: dict[str, Twin] = {}
        self._halves: dict[str, Path] = {}
        home.mkdir(parents=True, exist_ok=True)
        self._second: list[CommandLine] = []
        save_tiny(self.base)

    def second_server(self) -> CommandLine:
        """Forks commands that run beside another one."""
        if not self._second:
            self._second.append(SecondCommandLine(self.commands))
        return self._second[0]

    def close(self) -> None:
        """End the second server."""
        while self._second:
            self._second.pop().close()

    def prepare(self, work: Work) -> None:
        """Put into `here` what a work finds at its start."""
        shutil.rmtree(self.here, ignore_errors=True)
        if work.before:
            before = self.twin(WORKS[work.before]).folder
            shutil.rmtree(self.here, ignore_errors=True)
            shutil.copytree(before, self.here, symlinks=True)
        else:
            lay_out(self.here, self.base)

    def twin(self, work: Work) -> Twin:
        """The undisturbed work, made once; it leaves `here` empty the first time."""
        if work.name not in self._twins:
            self.prepare(work)
            started = time.monotonic()
            calls, done = count_calls(self.commands, work.command, self.here)
            assert done.code == 0, done.stderr
            folder = self.home / "twins" / work.name
            folder.parent.mkdir(exist_ok=True)
            self.here.rename(folder)
            self._twins[work.name] = Twin(folder, calls, time.monotonic() - started)
        return self._twins[work.name]

    def half(self, work: Work) -> None:
        """Put into `here` a run that was killed in the step after its second checkpoint."""
        self.twin(work)  # which needs `here` itself
        if work.name not in self._halves:
            self.prepare(work)
            die = DIE_AFTER_STEP.replace("STEP", str(2 * EVERY + 1))
            killed = run(self.commands, work.command, self.here, before=die)
            assert killed.code == -9, killed.stderr
            folder = self.home / "halves" / work.name
            folder.parent.mkdir(exist_ok=True)
            self.here.rename(folder)
            self._halves[work.name] = folder
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self._halves[work.name], self.here, symlinks=True)

    def compare(self, work: Work, *, metrics: bool = True, cards: bool = True) -> None:
        """The work in `here` ended as its twin did.

        Args:
            work: that ended.
            metrics: the measurements must be the same, too.
            cards: and the model cards, which repeat some of them.
        """
        twin = self.twin(work).folder
        for pattern in work.made:
            made = {path.relative_to(twin) for path in twin.glob(pattern) if path.is_file()}
            now = {path.relative_to(self.here) for path in self.here.glob(pattern)}
            now = {path for path in now if (self.here / path).is_file()}
            assert made == now, f"other files: {sorted(map(str, made ^ now))[:5]}"
            for path in sorted(made):
                if path.name != "README.md" or cards:
                    same = (self.here / path).read_bytes() == (twin / path).read_bytes()
                    assert same, f"{path} differs"
        for name in work.metrics if metrics else ():
            one, two = without_times((self.here / name).parent), without_times((twin / name).parent)
            steps = [[line["step"] for line in lines] for lines in (one, two)]
            assert one == two, f"{name} differs: steps {steps[0]} for {steps[1]}"
        self._check_state()
        check_leftovers(self.here)

    def _check_state(self) -> None:
        for path in self.here.glob("**/run.json"):
            assert json.loads(path.read_text(encoding="utf-8"))["status"] == "finished", path


def check_leftovers(folder: Path) -> None:
    """Nothing half-written is in a folder."""
    names = [path for path in folder.rglob("*") if is_leftover(path.name)]
    assert not names, f"left behind: {[str(path.relative_to(folder)) for path in names[:5]]}"


def is_leftover(name: str) -> bool:
    """Whether a name is that of something half-written."""
    return name.startswith((".writing-", ".merging-", ".replaced")) or name.endswith(".writing")


def check_refusal(done: Done) -> None:
    """The command said in a sentence why it does not go on."""
    assert done.code == 2, f"exit code {done.code}: {done.stderr[-400:]}"
    assert "Traceback" not in done.stderr, done.stderr[-400:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors, done.stderr[-400:]
    assert len(done.stderr) < 4000, f"{len(done.stderr)} characters are printed"
    assert "{'" not in errors[0], f"a dict is printed: {errors[0][:200]}"


def check_success(done: Done) -> None:
    """The command ended well."""
    last = [line for line in done.stderr.strip().splitlines() if line.strip()][-3:]
    assert done.code == 0, f"exit code {done.code}: {' | '.join(last)[-400:]}"


def last_step(run_folder: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        return max((m["step"] for m in read_metrics(run_folder / "metrics.jsonl")), default=0)
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def resumed_at(done: Done) -> int:
    """The step after which a run went on."""
    found = re.search(r"resuming after step (\d+)", done.stderr)
    return int(found.group(1)) if found else 0
