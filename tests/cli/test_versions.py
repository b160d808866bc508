"""What is installed against what pyproject.toml declares."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from commandline import CommandLine
from packaging.requirements import Requirement

from alignkit.cli.versions import outside_versions, warn_of_versions

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {
    need.name: need.specifier
    for group in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for need in map(Requirement, group)
}
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let `importlib.metadata` tell these versions; the ranges stay those of the real metadata."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_the_tested_versions_are_inside(pin: Requirement) -> None:
    (exact,) = pin.specifier
    assert DECLARED[pin.name].contains(exact.version)


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "bitsandbytes"])
def test_the_next_line_of_versions_is_outside(name: str) -> None:
    (exact,) = next(pin for pin in PINS if pin.name == name).specifier
    major, minor = map(int, exact.version.split(".")[:2])
    assert DECLARED[name].contains(f"{major}.{minor}.99")
    assert not DECLARED[name].contains(f"{major}.{minor + 1}")


def test_nothing_is_said_of_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    low = {need.name: f"{DECLARED[need.name]}".split(">=")[1].split(",")[0] for need in PINS}
    pretend(monkeypatch, **low | {"torch": "2.13.0+cpu", "peft": "0.21.3.dev0"})
    assert outside_versions() == []


@pytest.mark.parametrize(
    ("name", "version"),
    [("transformers", "5.19.9"), ("torch", "2.8.0+cu126"), ("bitsandbytes", "0.49.2")],
)
def test_what_is_outside_is_named(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, **{name: version})
    (sentence,) = outside_versions()
    assert sentence.startswith(f"{name} {version} is outside >=")
    assert f": pip install '{name}>=" in sentence
    warn_of_versions()
    assert capsys.readouterr().err == f"warning: {sentence}\n"


def test_one_of_several_processes_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, transformers="5.19.9")
    monkeypatch.setenv("RANK", "1")
    warn_of_versions()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "version"), [("pytest", "1.0"), ("trl", "99.0")])
def test_tools_beside_a_run_do_not_count(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not DECLARED[name].contains(version)
    pretend(monkeypatch, **{name: version})
    assert outside_versions() == []


def test_a_checkout_without_metadata_declares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    assert outside_versions() == []


OLD = "from importlib import metadata as m\nreal = m.version\n" + (
    "m.version = lambda name: '5.19.9' if name == 'transformers' else real(name)\n"
)
COMMANDS = {
    "train": ["sft", "quickstart/sft.yaml", "model.base=nowhere"],
    "run": ["run", "quickstart/rlhf.yaml", "sft.model.base=nowhere"],
    "merge-lora": ["merge-lora", "nowhere"],
    "gguf": ["export", "gguf", "nowhere"],
    "bnb": ["export", "bnb", "nowhere", "--bits", "4"],
    "generate": ["generate", "nowhere", "Hello"],
    "chat": ["chat", "nowhere"],
    "eval": ["eval", "nowhere"],
    "label": [
        "data",
        "label",
        "nowhere",
        "data_templates/sft/messages.jsonl",
        "--reward",
        "r",
        "--output",
        "o.jsonl",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_load_weights_warn(name: str, alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit(*COMMANDS[name], cwd=tmp_path, before=OLD, COLUMNS="300")
    assert done.code == 2, done.stderr
    assert done.stderr.startswith("warning: transformers 5.19.9 is outside >=5.20")


def test_help_says_nothing_of_versions(alignkit: CommandLine, tmp_path: Path) -> None:
    done = alignkit("sft", "--help", cwd=tmp_path, before=OLD)
    assert (done.code, done.stderr) == (0, "")
