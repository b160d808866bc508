"""Every case of the table: a sentence and the right exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, Done
from tiny import save_tiny

from alignkit.cli import output, versions
from alignkit.cli.main import main
from bad_inputs.cases import Case, read_cases
from bad_inputs.layout import fill, lay_out, snapshot
from bad_inputs.servers import serve

ANY = Case("", "")
ODD = {
    "LONG": "a" * 300,
    "BRACKETS": "[" * 3000 + "]" * 3000,
    "DIGITS": "7" * 5000,
    "BYTE": "\udcff",  # as Python reads an argument's byte that is no UTF-8
    "HALF": "\ud83d",
}
"""What arguments cannot show in a table."""
CASES = {case.name: case for case in read_cases()}

LIMIT = """
import resource
held = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
most = held * 1024 + int(GIGABYTES * 2**30)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""
"""Code for `before` of a command: its process gets no more memory than this."""


class _TooLong(BaseException):
    pass


@pytest.fixture(scope="module", autouse=True)
def versions_read_once() -> Iterator[None]:
    """The versions of packages are looked up once for all cases, as once for a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "outside_versions", functools.cache(versions.outside_versions))
        yield


@pytest.fixture(scope="session")
def places(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders that cases name: a base, a finished run and reward run, a GGUF file."""
    home = tmp_path_factory.mktemp("shared").resolve()
    save_tiny(home / "gemma", "gemma")
    places = {"BASE": str(tiny_base), "GEMMA": str(home / "gemma")}
    lay_out(home, {}, places)
    for command in (
        ["sft", "recipe.yaml", "output=finished", "merge=true"],
        ["reward", "reward.yaml", "output=judge"],
        ["export", "gguf", "finished", "--output", "model.gguf"],
    ):
        done = run_here(command, home)
        assert done.code == 0, done.stderr
    names = {"RUN": "finished", "REWARD": "judge", "GGUF": "model.gguf"}
    return places | {key: str(home / name) for key, name in names.items()} | {"URL": serve()}


@pytest.mark.parametrize("name", CASES)
def test_case(
    name: str,
    places: dict[str, str],
    alignkit: CommandLine,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # A folder whose name does not hold the case's: fragments would be found in it.
    case, folder = CASES[name], tmp_path_factory.mktemp("case").resolve()
    places = places | ODD | {"HERE": str(folder)}
    lay_out(folder, case.files, places)
    arguments = shlex.split(case.run) if isinstance(case.run, str) else case.run
    arguments = [fill(argument, places) for argument in arguments]
    before = snapshot(folder)
    env = {key: fill(value, places) for key, value in case.env.items()}
    case = dataclasses.replace(case, stdin=fill(case.stdin, places))
    if case.own_process:
        done = run_beside(alignkit, case, arguments, folder, env)
    else:
        done = run_here(arguments, folder, case, **env)
    check(case, done, places)
    check_files(case, before, snapshot(folder))
    for wanted, texts in ((True, case.holds), (False, case.lacks)):
        for file, parts in texts.items():
            text = (folder / file).read_text(encoding="utf-8")
            for part in parts:
                assert (part in text) is wanted, f"{part!r} in {file}: {not wanted}\n{text}"


def check(case: Case, done: Done, places: dict[str, str]) -> None:
    """What was printed, and the exit code."""
    printed = done.stdout + done.stderr
    shown = f"exit code {done.code}\n{printed[-3000:]}"
    assert "Traceback" not in printed, shown
    assert done.code in listed(case.code), shown
    # What a random model writes into a pipe may hold anything.
    talks = str(case.run).lstrip("['").startswith(("chat", "generate"))
    told = done.stderr if talks else printed
    assert "\x1b" not in told, f"an escape sequence reaches the terminal\n{shown!r}"
    assert len(printed) <= case.size, f"{len(printed)} characters are printed\n{shown[:3000]}"
    if done.code == 2 and not case.usage:
        assert re.search(r"^error: ", done.stderr, re.MULTILINE), shown
        assert "bug in alignkit" not in done.stderr
        assert done.stdout == "", shown
    flat = " ".join(printed.split()).lower()
    for part in case.says:
        ways = [" ".join(fill(way, places).split()).lower() for way in listed(part)]
        assert any(way in flat for way in ways), f"{part!r} is not in\n{shown}"
    for part in case.never:
        assert fill(part, places).lower() not in flat, f"{part!r} is in\n{shown}"
    if case.stdout_json:
        json.loads(done.stdout)
    assert not case.hint or "hint: " in printed, f"there is no hint in\n{shown}"


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as the only one of its items."""
    return value if isinstance(value, list) else [value]


def check_files(case: Case, before: dict[str, str], after: dict[str, str]) -> None:
    """Nothing but what the case names is new, gone or changed."""
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    odd = sorted(n for n in changed if not any(fnmatch.fnmatch(n, p) for p in case.leaves))
    assert not odd, f"left behind, changed or gone: {odd[:8]}"
    parts = {part for name in after for part in Path(name).parts}
    left = [p for p in parts if p.startswith((".writing-", ".merging-")) or p.endswith(".writing")]
    assert not left, f"left behind: {left}"


def run_here(arguments: list[str], folder: Path, case: Case = ANY, **env: str) -> Done:
    """A command in this process, as its own would end."""
    out, err = (io.TextIOWrapper(io.BytesIO(), case.encoding, write_through=True) for _ in "12")
    code = 0
    with _in_place(arguments, folder, case):
        os.environ.update(env)
        sys.stdout, sys.stderr = out, err
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        except _TooLong:
            pytest.fail(f"no end after {case.seconds:g} seconds\n{_text(err)[-2000:]}")
    return Done(code, _text(out), _text(err))


def _text(stream: Any) -> str:
    return str(stream.buffer.getvalue().decode(stream.encoding, "backslashreplace"))


@contextlib.contextmanager
def _in_place(arguments: list[str], folder: Path, case: Case) -> Iterator[None]:
    """This process as that of a command, put back afterwards."""
    kept: Any = (sys.argv, sys.stdin, sys.stdout, sys.stderr, os.getcwd())
    environment, modules = dict(os.environ), set(sys.modules)

    def stop(*_: object) -> None:
        raise _TooLong

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGALRM, signal.SIGINT)]
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, case.seconds)
    os.chdir(folder)
    sys.argv, sys.stdin = ["alignkit", *arguments], io.StringIO(case.stdin)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers:
            signal.signal(number, handler)
        sys.argv, sys.stdin, sys.stdout, sys.stderr, cwd = kept
        os.chdir(cwd)
        for console in (output.stdout, output.stderr):
            console._buffer.clear()  # what it failed to write, it would try to write again
        for name in [n for n in sys.modules if n not in modules and "alignkit_user_" in n]:
            del sys.modules[name]
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)


def run_beside(
    alignkit: CommandLine, case: Case, arguments: list[str], folder: Path, env: dict[str, str]
) -> Done:
    """A command in a process of its own, which is killed when its time is up."""
    limit = LIMIT.replace("GIGABYTES", str(case.memory)) if case.memory else ""
    before = f"{case.before}\n{limit}"
    running = alignkit.start(*arguments, cwd=folder, stdin=case.stdin, before=before, **env)
    late = threading.Event()

    def kill() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)

    timer = threading.Timer(case.seconds, kill)
    timer.start()
    done = running.wait()
    timer.cancel()
    assert not late.is_set(), f"no end after {case.seconds:g} seconds\n{done.stderr[-2000:]}"
    return done
