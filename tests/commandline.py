"""The real command line in a process of its own, without paying for its imports each time.

A server process imports everything once and forks for each command. The child has its own working
folder, environment and files, runs `alignkit.cli.main.main()` and ends with its exit code.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code (negative for a signal) and what it printed."""

    code: int
    stdout: str
    stderr: str


def refused(done: Done, sentence: str, hint: str) -> None:
    """The command said what is wrong and what to do, and nothing else."""
    assert done.code == 2, done.stderr
    assert sentence in done.stderr
    assert f"hint: {hint}" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


class Running:
    """A command under way; `pid` takes signals."""

    def __init__(self, answers: IO[str], folder: Path, pid: int) -> None:
        self.answers, self.folder, self.pid = answers, folder, pid

    def wait(self) -> Done:
        code = json.loads(reply(self.answers))["code"]
        out, err = ((self.folder / n).read_text(encoding="utf-8") for n in ("stdout", "stderr"))
        return Done(code, out, err)


class CommandLine:
    """Runs commands one after another; call it like `alignkit("plan", "recipe.yaml")`."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__))]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.jobs: Any = self.server.stdin
        self.answers: Any = self.server.stdout
        self.scratch = tempfile.TemporaryDirectory()
        self.count = 0

    def start(
        self, *arguments: object, cwd: Path, stdin: str = "", before: str = "", **env: str
    ) -> Running:
        """Start a command.

        Args:
            *arguments: of `alignkit`.
            cwd: working folder.
            stdin: what it reads.
            before: Python that runs in the process first, to spoil something.
            **env: environment variables.
        """
        return self._start([env], *arguments, cwd=cwd, stdin=stdin, before=before)

    def together(self, count: int, *arguments: object, cwd: Path, before: str = "") -> Done:
        """Run a command in several processes that know each other, as `torchrun` would."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared["LOCAL_WORLD_SIZE"] = str(count)
        ranks = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]
        return self._start(ranks, *arguments, cwd=cwd, before=before).wait()

    def _start(
        self,
        environments: list[dict[str, str]],
        *arguments: object,
        cwd: Path,
        stdin: str = "",
        before: str = "",
    ) -> Running:
        self.count += 1
        folder = Path(self.scratch.name) / str(self.count)
        folder.mkdir()
        (folder / "stdin").write_text(stdin, encoding="utf-8")
        job = {
            "argv": ["alignkit", *map(str, arguments)],
            "cwd": str(cwd),
            "folder": str(folder),
            "before": before,
            "environments": environments,
        }
        self.send(job)
        return Running(self.answers, folder, json.loads(reply(self.answers))["pid"])

    def send(self, job: dict[str, Any]) -> None:
        self.jobs.write(json.dumps(job) + "\n")
        self.jobs.flush()

    def __call__(self, *arguments: object, cwd: Path, stdin: str = "", **more: str) -> Done:
        return self.start(*arguments, cwd=cwd, stdin=stdin, **more).wait()

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        self.scratch.cleanup()


class SecondCommandLine(CommandLine):
    """Runs commands beside those of the first, in a server forked from its own."""

    def __init__(self, first: CommandLine) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.count = 0
        pipes = [str(Path(self.scratch.name) / name) for name in ("jobs", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        first.send({"pipes": pipes})
        self.jobs = os.fdopen(os.open(pipes[0], os.O_WRONLY), "w")
        self.answers = os.fdopen(os.open(pipes[1], os.O_RDONLY))

    def close(self) -> None:
        self.jobs.close()  # which ends the server
        self.answers.close()
        self.scratch.cleanup()


def reply(answers: IO[str]) -> str:
    line = answers.readline()
    assert line, "the server of commands has died"
    return str(line)


def serve(jobs: IO[str], answers: IO[str]) -> None:
    for line in jobs:
        job = json.loads(line)
        if "pipes" in job:
            serve_beside(*job["pipes"])
            continue
        pids = [fork_job(job, environment) for environment in job["environments"]]
        answers.write(json.dumps({"pid": pids[0]}) + "\n")
        answers.flush()
        answers.write(json.dumps({"code": wait_for(set(pids))}) + "\n")
        answers.flush()


def serve_beside(jobs: str, answers: str) -> None:
    """In a fork, serve commands that come through pipes until they are closed."""
    if os.fork() == 0:
        with open(jobs) as lines, open(answers, "w") as stream:
            serve(lines, stream)
        os._exit(0)


def wait_for(pids: set[int]) -> int:
    """Exit code of the first that fails, or 0; the others would wait for it and are killed."""
    code = 0
    while pids:
        pid, status = os.wait()
        if pid not in pids:  # a server beside this one
            continue
        pids.remove(pid)
        code = code or os.waitstatus_to_exitcode(status)
        for other in pids if code else ():
            os.kill(other, signal.SIGKILL)
    return code


def fork_job(job: dict[str, Any], environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid == 0:
        run_job(job, environment)
    return pid


def run_job(job: dict[str, Any], environment: dict[str, str]) -> None:
    """In the child: take its place, run the command, never return."""
    code = 1
    try:
        folder = Path(job["folder"])
        os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(folder / "stdout", flags), 1)
        os.dup2(os.open(folder / "stderr", flags), 2)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        os.chdir(job["cwd"])
        os.environ.update(environment)
        sys.argv = job["argv"]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(job["before"], {})

        from alignkit.cli.main import main

        main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # as in conftest.py
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # No pass forward or backward here: autograd's threads would not survive the fork.

    import importlib
    import pkgutil

    import alignkit

    for module in pkgutil.walk_packages(alignkit.__path__, "alignkit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("packaging.requirements", "typer._click.decorators", "pydantic.type_adapter"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    conversion = importlib.import_module("transformers.conversion_mapping")
    conversion.get_checkpoint_conversion_mapping("llama")  # a thousand patterns, kept

    gc.collect()
    gc.freeze()  # what is imported is not searched for garbage in every child
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the children and for pytest
    serve(sys.stdin, channel)
