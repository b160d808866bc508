"""A user's loss: trained with like our own, checked before step 1, and identified by its hash."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from running import (
    adapter_of,
    break_off,
    losses,
    make_pairs,
    make_preference_recipe,
    make_recipe,
    steps_of,
    train,
    write_rows,
)

from alignkit.errors import RunError, TrainingError
from alignkit.recipe.assets import assets_root

SHIPPED = assets_root() / "data_templates" / "objectives"


def run_of(folder: Path, base: Path, stage: str, objective: dict[str, Any], **fields: Any) -> Path:
    make: Any = make_recipe
    more: dict[str, Any] = {"merge": False, "training__max_steps": 2, **fields}
    if stage != "sft":
        recipe = make_preference_recipe(folder, base, stage, objective=objective, **more)
    else:
        recipe = make(folder, base, objective=objective, **more)
    train(recipe)
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SFT with our own loss."""
    return run_of(tmp_path_factory.mktemp("plain"), tiny_base, "sft", {})


def same_bytes(one: Path, two: Path) -> bool:
    name = "adapter/adapter_model.safetensors"
    return (one / name).read_bytes() == (two / name).read_bytes()


def test_dpo_from_a_file_trains_to_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    custom = {
        "kind": "custom",
        "file": str(SHIPPED / "dpo.py"),
        "parameters": {"beta": 0.2},
        "scale": 0.2,
    }
    made = run_of(tmp_path / "file", tiny_base, "dpo", custom, data__eval_fraction=0.25)
    own = {"kind": "dpo", "beta": 0.2}
    built_in = run_of(tmp_path / "own", tiny_base, "dpo", own, data__eval_fraction=0.25)
    assert same_bytes(made, built_in)
    assert losses(made) == losses(built_in)
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert [s[key] for s in steps_of(made)] == [s[key] for s in steps_of(built_in)]


def test_what_a_loss_changes_for_the_process_is_put_back(
    plain: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disturb = (
        "import os, torch\n{0}\n"
        "def loss(logprobs):\n    losses = -logprobs\n    {0}\n    return losses\n"
    ).format(
        "os.chdir('/'); print('NOISE'); torch.set_grad_enabled(False); "
        "torch.set_default_dtype(torch.float64)"
    )
    (tmp_path / "mine.py").write_text(disturb, encoding="utf-8")
    here = Path.cwd()
    custom = {"kind": "custom", "file": str(tmp_path / "mine.py")}
    made = run_of(tmp_path / "mine", tiny_base, "sft", custom)
    assert (Path.cwd(), torch.get_default_dtype()) == (here, torch.float32)
    assert torch.is_grad_enabled()
    assert "NOISE" not in capsys.readouterr().out
    assert same_bytes(made, plain)


def test_the_examples_of_other_stages_hold_our_own_losses(
    plain: Path, tiny_base: Path, tmp_path: Path
) -> None:
    # (1 - p)^0 = 1: the focal loss is the negative log-likelihood.
    focal = {"kind": "custom", "file": str(SHIPPED / "sft.py"), "parameters": {"gamma": 0.0}}
    made = run_of(tmp_path / "sft", tiny_base, "sft", focal)
    assert same_bytes(made, plain)
    # Rows without margins, and none that must be reached: -log σ(r_w - r_l), without centring.
    least = {"kind": "custom", "file": str(SHIPPED / "reward.py"), "parameters": {"least": 0.0}}
    made = run_of(tmp_path / "reward", tiny_base, "reward", least)
    assert same_bytes(made, run_of(tmp_path / "bt", tiny_base, "reward", {"center": 0.0}))
    other = run_of(tmp_path / "other", tiny_base, "reward", {**least, "parameters": {"least": 0.5}})
    assert not same_bytes(made, other)


def test_without_a_reference(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "margin.py"
    file.write_text(
        "def loss(pairs):\n"
        "    assert pairs.reference_chosen is None\n"
        "    return (pairs.rejected - pairs.chosen).exp().log1p()\n"
    )
    objective = {"kind": "custom", "file": str(file), "reference": False}
    run = run_of(tmp_path / "custom", tiny_base, "dpo", objective)
    # log(1 + exp(l - w)) = -log σ(w - l): CPO without its likelihood term.
    cpo = {"kind": "cpo", "beta": 1.0, "nll_weight": 0.0}
    known = losses(run_of(tmp_path / "cpo", tiny_base, "dpo", cpo))
    assert losses(run) == pytest.approx(known, rel=1e-6)
    assert "reference" not in json.loads((run / "plan.json").read_text())["reference_reason"]


FAULTS = {
    "not finite": (
        "return (pairs.chosen - pairs.chosen).log()",
        "is not finite on usual log-probs",
    ),
    "one number": (
        "return pairs.chosen.mean()",
        "must give one number for each of 3 items, got []",
    ),
    "no tensor": ("return 1.0", "must give one number for each of 3 items, got float"),
    "no gradient": ("return pairs.chosen.detach()", "is not differentiable"),
    "a gradient that is not finite": (
        "return (pairs.chosen - pairs.chosen.detach()).abs().sqrt()",
        "has no finite gradient",
    ),
    "random": (
        "import torch; return pairs.chosen * torch.rand(len(pairs.chosen))",
        "gives another number when it is called again",
    ),
    "a parameter that is missing": (
        "pass\n\ndef loss(pairs, beta):\n    return beta * pairs.chosen",
        "called as def loss(pairs, **parameters)",
    ),
    "an error of its own": ("return pairs.chosen / pairs.nothing", "raised AttributeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_before_anything_is_read(
    fault: str, tiny_base: Path, tmp_path: Path
) -> None:
    line, sentence = FAULTS[fault]
    file = tmp_path / f"{fault.replace(' ', '_')}.py"
    file.write_text(f"def loss(pairs):\n    {line}\n")
    recipe = make_preference_recipe(
        tmp_path, tiny_base, "dpo", objective={"kind": "custom", "file": str(file)}
    )
    (tmp_path / "rows.jsonl").write_text("not read")
    with pytest.raises(TrainingError) as caught:
        train(recipe)
    assert sentence in str(caught.value)
    assert file.name in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_is_wrong(
    alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", make_pairs())
    (tmp_path / "mine.py").write_text("def loss_(pairs):\n    return pairs.chosen\n")
    recipe = make_preference_recipe(
        tmp_path, tiny_base, "dpo", objective={"kind": "custom", "file": "mine.py"}
    )
    done = alignkit("dpo", recipe.name, cwd=tmp_path)
    assert done.code == 2
    assert done.stderr.splitlines() == [
        "error: mine.py: has no function 'loss'",
        "hint: did you mean loss_?",
    ]
    done = alignkit("dpo", recipe.name, "objective.file=other.py", cwd=tmp_path)
    assert done.code == 2
    assert "objective.file names no file: 'other.py'" in done.stderr
    done = alignkit("kto", recipe.name, "stage=kto", cwd=tmp_path)
    assert done.code == 2
    assert "objective.kind must be 'kto', got 'custom'" in done.stderr


def test_run_json_knows_the_file_and_resume_wants_the_same(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes((SHIPPED / "sft.py").read_bytes())
    objective = {"kind": "custom", "file": str(file), "parameters": {"gamma": 1.0}}
    recipe = make_recipe(
        tmp_path, tiny_base, objective=objective, merge=False, training__save_every=1
    )
    train(recipe)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["objective"]["fingerprint"] == hashlib.sha256(file.read_bytes()).hexdigest()
    straight = losses(tmp_path / "run")
    shutil.rmtree(break_off(tmp_path / "run", 3))
    train(recipe, resume=True)
    assert losses(tmp_path / "run") == straight
    break_off(tmp_path / "run", 3)
    file.write_text(file.read_text().replace("** gamma", "** (2 * gamma)"))
    with pytest.raises(RunError, match=r"objective\.file has changed since the run was started"):
        train(recipe, resume=True)


def test_a_file_that_has_changed_is_read_again(tiny_base: Path, tmp_path: Path) -> None:
    # A pipeline runs its stages in one process, and run.json names the file as it is.
    file = tmp_path / "mine.py"
    objective = {"kind": "custom", "file": str(file)}
    made = []
    for scale in (1.0, 2.0):
        file.write_text(f"def loss(logprobs):\n    return -{scale} * logprobs\n")
        made.append(losses(run_of(tmp_path / str(scale), tiny_base, "sft", objective))[0])
    assert made[1] == pytest.approx(2 * made[0], rel=1e-6)


def test_micro_batches_do_not_matter(tiny_base: Path, tmp_path: Path) -> None:
    focal = {"kind": "custom", "file": str(SHIPPED / "sft.py"), "parameters": {"gamma": 2.0}}
    runs = [
        run_of(tmp_path / str(tokens), tiny_base, "sft", focal, training__microbatch_tokens=tokens)
        for tokens in (32, 4096)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6)
    one, two = map(adapter_of, runs)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
