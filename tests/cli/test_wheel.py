"""The package as users get it: sdist -> wheel -> an environment without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import alignkit as package

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


class Environment:
    """An environment with alignkit's wheel; torch and the others come from this one.

    Args:
        folder: where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        venv.create(folder / "venv")
        ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.packages,) = (folder / "venv").glob("lib/python*/site-packages")
        # They come last, and their own .pth files (an editable alignkit) are not read.
        (self.packages / "others.pth").write_text("\n".join(ours), encoding="utf-8")

    def run(self, command: str, *arguments: object, **env: str) -> str:
        """What a program of the environment prints, started far from the checkout."""
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return printed([self.bin / command, *arguments], self.work, plain | env)


def shipped(folder: Path) -> set[str]:
    """The files of a folder that belong into a release."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in files}


def printed(command: list[object], folder: Path, env: dict[str, str] | None = None) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """The `sdist` or `wheel` of a source folder, built as pip would without isolation."""
    code = f"import sys, hatchling.build as b; print(b.build_{kind}(sys.argv[1]))"
    return folder / printed([sys.executable, "-c", code, folder], source).split()[-1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    for tool in ("hatchling", "pip"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed, so no wheel can be built and installed")
    before = sorted(ROOT.iterdir())
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(build("sdist", ROOT, folder)) as sdist:
        sdist.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    wheel = build("wheel", source, folder)
    assert sorted(ROOT.iterdir()) == before, "building leaves files in the checkout"
    shutil.rmtree(folder / "source")
    made = Environment(folder)
    pip = [sys.executable, "-m", "pip", "--python", made.bin / "python", "install", "--quiet"]
    printed([*pip, "--no-deps", "--no-index", wheel], folder)
    yield made
    shutil.rmtree(folder)


def test_it_is_the_wheel_that_runs(environment: Environment) -> None:
    code = "import alignkit; print(alignkit.__file__)"
    place = environment.run("python", "-c", code).strip()
    assert Path(place) == environment.packages / "alignkit" / "__init__.py"
    assert environment.run("alignkit", "--version") == f"alignkit {package.__version__}\n"
    found = environment.run("python", "-m", "alignkit", "--version")
    assert found == f"alignkit {package.__version__}\n"
    (info,) = environment.packages.glob("alignkit-*.dist-info")
    assert metadata.PathDistribution(info).version == package.__version__


def test_recipes_and_examples_are_in_it(environment: Environment) -> None:
    listed = json.loads(environment.run("alignkit", "recipes", "list", "--json"))
    recipes = shipped(ROOT / "recipes")
    assert set(listed) == {name for name in recipes if name.endswith(".yaml")}
    assets = environment.packages / "alignkit" / "_assets"
    assert shipped(assets / "recipes") == recipes
    assert shipped(assets / "data_templates") == shipped(ROOT / "data_templates")


def test_a_small_model_is_trained(environment: Environment, tiny_base: Path) -> None:
    """The shipped recipe over the shipped rows, to a merged model that transformers reads."""
    overrides = ["training.max_steps=2", "training.batch_size=4"]
    recipe = ["quickstart/sft.yaml", f"model.base={tiny_base}", "output=mine", *overrides]
    summary = json.loads(environment.run("alignkit", "sft", *recipe, "--json", "--quiet"))
    assert summary["steps"] == 2
    merged = AutoModelForCausalLM.from_pretrained(environment.work / "mine" / "merged")
    assert merged.config.model_type == "llama"


def test_its_metadata_bound_the_versions(environment: Environment, tmp_path: Path) -> None:
    newer = tmp_path / "transformers-5.99.0.dist-info"
    newer.mkdir()
    (newer / "METADATA").write_text("Name: transformers\nVersion: 5.99.0\n", encoding="utf-8")
    code = "from alignkit.cli.versions import outside_versions as o; print('\\n'.join(o()))"
    (sentence,) = environment.run("python", "-c", code, PYTHONPATH=str(tmp_path)).splitlines()
    assert sentence.startswith("transformers 5.99.0 is outside >=5.20,<5.24, the versions")
