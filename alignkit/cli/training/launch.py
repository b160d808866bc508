"""Several training processes on one machine: the same command, once per rank."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from typing import Any

from alignkit.recipe.addresses import hide_secrets


def is_worker() -> bool:
    """Whether this process was started as one of several, by us or by torchrun."""
    return "LOCAL_RANK" in os.environ


def typed_command() -> str:
    """The command as it was typed, for run.json, without what may be secret in addresses."""
    return shlex.join(["alignkit", *map(hide_secrets, sys.argv[1:])])


def launch_processes(count: int) -> int:
    """Run this command line in `count` processes and wait for them.

    Args:
        count: ranks, at least 2.

    Returns:
        0, or the exit code of the first process that failed; the others are stopped then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared["LOCAL_WORLD_SIZE"] = str(count)
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "alignkit", *sys.argv[1:]]
    workers = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(count)
    ]
    signal.signal(signal.SIGTERM, partial(_forward, workers))
    try:
        return _wait(workers)
    except KeyboardInterrupt:  # the workers are signalled too; they save, and exit with 130 or 143
        codes = [worker.wait() for worker in workers]  # negative: killed before they could save
        return max(128 - code if code < 0 else code for code in codes)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def _forward(workers: list[subprocess.Popen[bytes]], number: int, frame: Any) -> None:
    """What a scheduler asks of the launcher is asked of its processes."""
    signal.signal(number, signal.SIG_IGN)
    for worker in workers:
        worker.terminate()
    raise KeyboardInterrupt


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [code for code in codes if code not in (None, 0)]
        if failed:
            return int(failed[0] or 1)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.2)
