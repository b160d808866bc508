"""A stage of another package: one entry point, nothing else touched.

The package weighs each conversation once instead of each token, and adds a key of its own. It is
installed the way pip does it, as files on the path with an entry point in their metadata.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine, Done
from running import make_recipe, steps_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

RECIPE = '''
from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from alignkit.recipe.section import Section
from alignkit.recipe.stages.base import Rate, Rates, SupervisedRecipe


class BalancedSpec(Section):
    """Mean negative log-likelihood of each conversation."""

    kind: Literal["balanced"] = "balanced"
    """`balanced` is the only objective."""
    power: float = Field(default=1.0, ge=0.0, le=1.0)
    """Power of the length that divides; 0 sums."""


class BalancedRecipe(SupervisedRecipe):
    """Fine-tune with each conversation weighing the same."""

    stage: Literal["balanced"]
    """The training stage."""
    objective: BalancedSpec = BalancedSpec()
    """The loss."""

    definition: ClassVar[str] = "balanced.definition:BALANCED"
    rates: ClassVar[Rates] = {"lora": Rate(1e-3, 1e-5, 1e-2)}
    hints: ClassVar[dict[str, str]] = {"objective.power": "1 is usual"}

    def warnings(self, data):
        return ["short rows weigh as much as long ones"] if self.objective.power == 1 else []
'''

DEFINITION = """
import torch

from alignkit.data.packing import pack_documents
from alignkit.evaluation.heldout import evaluate_heldout, say_heldout
from alignkit.models.scoring.scorer import sum_by_sequence
from alignkit.stages.running.hooks import LossSums, RowHooks
from alignkit.stages.supervised.stage import SupervisedStage


def hooks(recipe, rows, reference):
    power = recipe.objective.power

    def loss(scorer, documents, measured):
        batch = pack_documents(documents)
        scores = scorer(batch)
        lengths = sum_by_sequence(torch.ones_like(scores.logprobs), batch)
        losses = -sum_by_sequence(scores.logprobs, batch) / lengths**power
        return LossSums(losses.sum(), {"tokens_a_row": lengths.sum()})

    return RowHooks(loss, [1] * len(rows), evaluate_heldout, say_heldout)


BALANCED = SupervisedStage(hooks, {"tokens_a_row": "mean length of a row's answers"})
"""

KILLED = """
import os, signal, sys
from alignkit.runtime.metrics import MetricsFile
write = MetricsFile.write
def write_and_die(self, step, values):
    write(self, step, values)
    if step == 3 and "loss" in values:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = write_and_die
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path, with the package and its metadata."""
    site = tmp_path_factory.mktemp("site")
    files = {
        "balanced/__init__.py": "",
        "balanced/recipe.py": RECIPE,
        "balanced/definition.py": DEFINITION,
        "balanced-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: balanced\nVersion: 1.0\n",
        "balanced-1.0.dist-info/entry_points.txt": (
            "[alignkit.stages]\nbalanced = balanced.recipe:BalancedRecipe\n"
        ),
    }
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return site


def start(alignkit: CommandLine, site: Path, *arguments: str, cwd: Path, before: str = "") -> Done:
    """A command in a process that has the package on its path."""
    before = f"import sys; sys.path.insert(0, {str(site)!r})\n{before}"
    return alignkit(*arguments, cwd=cwd, before=before)


@pytest.fixture
def run(alignkit: CommandLine) -> Callable[..., Done]:
    return functools.partial(start, alignkit)


def passed(done: Done) -> str:
    assert done.code == 0, done.stderr
    return done.stdout


def test_a_new_process_finds_the_stage(package: Path, tmp_path: Path) -> None:
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    shown = subprocess.run(
        [sys.executable, "-m", "alignkit", "balanced", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "weighing the same" in shown.stdout


@pytest.mark.slow
def test_inspect_plan_train_kill_resume_and_merge(
    run: Callable[..., Done], package: Path, tiny_base: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"stage": "balanced", "training__save_every": 1}
    recipe = make_recipe(tmp_path, tiny_base, **fields, data__eval_fraction=0.25).name

    report = json.loads(passed(run(package, "inspect", recipe, "--json", cwd=tmp_path)))
    assert len(report["rows"]) == 3
    plan = json.loads(passed(run(package, "plan", recipe, "--json", cwd=tmp_path)))
    assert (plan["stage"], plan["steps"], plan["batch_size"]) == ("balanced", 4, 4)
    assert plan["learning_rate"] == 2e-3
    assert "short rows weigh as much as long ones" in plan["warnings"]

    passed(run(package, "balanced", recipe, "output=straight", cwd=tmp_path))
    killed = run(package, "balanced", recipe, cwd=tmp_path, before=KILLED)
    assert killed.code == -9, killed.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    passed(run(package, "balanced", recipe, "--resume", cwd=tmp_path))

    straight, resumed = tmp_path / "straight", tmp_path / "run"
    for part in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (straight / part).read_bytes() == (resumed / part).read_bytes()
    steps = steps_of(resumed)
    assert [step["loss"] for step in steps] == [step["loss"] for step in steps_of(straight)]
    assert all(step["tokens_a_row"] > 1 for step in steps)
    model = AutoModelForCausalLM.from_pretrained(resumed / "merged")
    base = load_file(tiny_base / "model.safetensors")
    changed = [name for name, weight in model.named_parameters() if name in base]
    assert any(not base[name].equal(model.get_parameter(name)) for name in changed)

    passed(run(package, "merge-lora", str(resumed), "--output", "again", cwd=tmp_path))
    merged = tmp_path / "again" / "model.safetensors"
    assert merged.read_bytes() == (resumed / "merged" / "model.safetensors").read_bytes()
    values = json.loads(passed(run(package, "eval", str(resumed), "--json", cwd=tmp_path)))
    assert "perplexity" in json.dumps(values)


def test_its_keys_are_explained_and_checked(
    run: Callable[..., Done], package: Path, tiny_base: Path, tmp_path: Path
) -> None:
    done = run(package, "recipes", "explain", "objective.power", cwd=tmp_path)
    assert "Power of the length that divides; 0 sums." in passed(done)
    recipe = make_recipe(tmp_path, tiny_base, stage="balanced").name
    done = run(package, "balanced", recipe, "objective.power=2", cwd=tmp_path)
    assert done.code == 2
    assert "objective.power must be at most 1, got 2\nhint: 1 is usual" in done.stderr
    done = run(package, "balanced", recipe, "adapter={kind: full}", cwd=tmp_path)
    assert done.code == 2
    assert "has kind = full, which balanced does not train: use lora" in done.stderr
    done = run(package, "sft", recipe, "stage=balance", cwd=tmp_path)
    assert "'grpo' or 'balanced'" in done.stderr


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            "broken = balanced.nowhere:Recipe",
            "stage broken of balanced cannot be loaded: ModuleNot",
        ),
        ("broken = balanced.recipe:BalancedSpec", "is not a class that extends Recipe"),
        ("broken = alignkit.recipe.stages.base:Recipe", "names no definition as `module:name`"),
        ("broken = balanced.wrong:Recipe", "cannot be loaded: SyntaxError"),
        ("sft = balanced.recipe:BalancedRecipe", "stage sft of balanced has the name of another"),
    ],
)
def test_a_broken_package_is_named_and_stops_no_other_stage(
    entry: str,
    sentence: str,
    run: Callable[..., Done],
    package: Path,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    site = tmp_path / "site"
    for name in ("balanced", "balanced-1.0.dist-info"):
        (site / name).mkdir(parents=True)
        for file in filter(Path.is_file, (package / name).iterdir()):
            (site / name / file.name).write_bytes(file.read_bytes())
    (site / "balanced" / "wrong.py").write_text("def")
    points = site / "balanced-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[alignkit.stages]\n{entry}\n")
    recipe = make_recipe(tmp_path, tiny_base).name
    passed(run(site, "plan", recipe, "--json", cwd=tmp_path))
    done = run(site, "doctor", "--json", cwd=tmp_path)
    assert any(sentence in warning for warning in json.loads(done.stdout)["warnings"])
    if entry.startswith("broken"):
        done = run(site, "broken", recipe, "stage=broken", cwd=tmp_path)
        assert done.code == 2
        assert sentence in done.stderr
        assert "hint: " in done.stderr
        assert "Traceback" not in done.stderr
