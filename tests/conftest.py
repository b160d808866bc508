"""Settings that must stand before transformers is imported, and the shared tiny base model."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

_TEMPORARY_HOME = "" if "ALIGNKIT_TEST_HOME" in os.environ else tempfile.mkdtemp(prefix="alignkit-")
os.environ["ALIGNKIT_HOME"] = _TEMPORARY_HOME or os.environ["ALIGNKIT_TEST_HOME"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))  # `from tiny import ...` in any import mode


def pytest_unconfigure() -> None:
    if _TEMPORARY_HOME:
        shutil.rmtree(_TEMPORARY_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a ChatML tokenizer; treat it as read-only."""
    from tiny import save_tiny  # torch and transformers only where a test needs them

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    save_tiny(folder)
    return folder
