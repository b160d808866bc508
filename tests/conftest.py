"""Settings that must stand before transformers is imported, and the shared tiny base model."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

_TEMPORARY_HOME = None
if "ALIGNKIT_TEST_HOME" in os.environ:
    os.environ["ALIGNKIT_HOME"] = os.environ["ALIGNKIT_TEST_HOME"]
else:
    _TEMPORARY_HOME = tempfile.mkdtemp(prefix="alignkit-tests-")
    os.environ["ALIGNKIT_HOME"] = _TEMPORARY_HOME
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))  # `from tiny import ...` in any import mode

import pytest  # noqa: E402
from tiny import save_tiny  # noqa: E402


def pytest_unconfigure() -> None:
    if _TEMPORARY_HOME is not None:
        shutil.rmtree(_TEMPORARY_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a ChatML tokenizer; treat it as read-only."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    save_tiny(folder)
    return folder
