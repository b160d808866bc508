"""Whole runs of GRPO on a tiny model: what they learn from, what they skip, how they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import CommandLine
from running import (
    adapter_of,
    assert_same,
    break_off,
    furthest,
    make_ppo_recipe,
    make_prompts,
    make_recipe,
    steps_of,
    train,
    write_rows,
)

from alignkit.data.packing import epoch_order
from alignkit.errors import TrainingError
from alignkit.stages.grpo import step as grpo_step

FIELDS: dict[str, Any] = {
    "stage": "grpo",
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 6},
    "training": {"max_steps": 3, "learning_rate": 2e-3, "warmup": 0, "save_every": 1, "keep": 9},
}


def run_of(folder: Path, base: Path, *overrides: str, **fields: Any) -> Path:
    recipe = make_ppo_recipe(folder, base, **{**FIELDS, **fields})
    return Path(train(recipe, *overrides).output)


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("plain"), tiny_base)


def test_a_run_says_what_it_did(plain: Path) -> None:
    steps = steps_of(plain)
    assert len(steps) == 3
    for step in steps:
        assert (step["groups"], step["responses"]) == (3.0, 12.0)
        assert step["approx_kl"] == 0.0  # one update: the policy is the one that sampled
        assert step["clip_ratio/region_mean"] == 0.0
        assert "kl/k1" not in step
        assert {"reward", "reward_std", "group_std", "frac_reward_zero_std"} <= step.keys()
    resolved = json.loads((plain / "run.json").read_text(encoding="utf-8"))
    assert resolved["status"] == "finished"
    assert "group_std" in (plain / "recipe.yaml").read_text(encoding="utf-8")
    samples = (plain / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == 16  # of the first step and the last


def test_a_run_goes_on_to_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    # Some steps ask further prompts: none is lost and none is asked twice.
    fields = {**FIELDS, "objective": {"kind": "dapo", "resample": 2}}
    run = run_of(tmp_path, tiny_base, **fields)
    whole = break_off(run, 1)
    train(make_ppo_recipe(tmp_path, tiny_base, **fields), resume=True)
    assert_same(run, whole)


@pytest.mark.parametrize("tokens", ["40", "auto"])
def test_passes_do_not_change_the_update(
    tokens: str, plain: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path, tiny_base, f"training.microbatch_tokens={tokens}")
    assert furthest(adapter_of(run), adapter_of(plain)) < 1e-5


def test_two_processes_are_one(
    plain: Path, alignkit: CommandLine, tiny_base: Path, tmp_path: Path
) -> None:
    # Three prompts: the processes have two and one.
    recipe = make_ppo_recipe(tmp_path, tiny_base, **FIELDS)
    done = alignkit.together(2, "grpo", recipe, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert furthest(adapter_of(tmp_path / "run"), adapter_of(plain)) < 1e-5
    for one, other in zip(steps_of(tmp_path / "run"), steps_of(plain), strict=True):
        for name in ("loss", "reward", "groups", "frac_reward_zero_std", "grad_norm", "tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["dr_grpo", "dapo", "rloo", "gspo", "cispo", "reinforce_pp"])
def test_every_kind_trains(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(
        tmp_path, tiny_base, "training.max_steps=2", objective={"kind": kind, "resample": 0}
    )
    moved = max(float(w.abs().max()) for n, w in adapter_of(run).items() if "lora_B" in n)
    assert moved > 1e-4
    steps = steps_of(run)
    assert ("kl/k1" in steps[0]) == (kind in ("rloo", "reinforce_pp"))
    if "kl/k1" in steps[0]:
        assert abs(steps[0]["kl/k1"]) < 1e-4 < steps[1]["kl/k3"] < 1.0


def test_several_updates_start_from_the_ratio_of_sampling(tiny_base: Path, tmp_path: Path) -> None:
    objective = {"epochs": 2, "minibatches": 2, "clip": [1e-4, 1e-4]}
    run = run_of(tmp_path, tiny_base, objective=objective)
    assert all(step["approx_kl"] > 0 for step in steps_of(run))
    assert all(step["clip_ratio/region_mean"] > 0.1 for step in steps_of(run))


def test_full_weights(tiny_base: Path, tmp_path: Path) -> None:
    run = run_of(
        tmp_path, tiny_base, adapter={"kind": "full"}, objective={"kl_coef": 0.1}, merge=True
    )
    assert (run / "merged" / "model.safetensors").exists()
    assert steps_of(run)[-1]["kl/k3"] > 0


def test_groups_that_earn_all_the_same_are_never_read(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reward pays for a token that the first prompt's responses cannot vary in: its text.
    (tmp_path / "half.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [0.5 if 'cat' in str(p) else len(c) for p, c in zip(prompts, completions)]\n"
    )
    prompts = make_prompts(6)
    for number, row in enumerate(prompts):
        row["prompt"] = [{"role": "user", "content": "cat" if number % 2 else "old red house"}]
    write_rows(tmp_path / "rows.jsonl", prompts)
    reward = {"function": f"{tmp_path}/half.py:score"}
    read: list[int] = []
    real = grpo_step.group_rollouts

    def watched(rollouts: Any, chosen: Any, tokens: int) -> Any:
        read.append(len(rollouts))
        return real(rollouts, chosen, tokens)

    monkeypatch.setattr(grpo_step, "group_rollouts", watched)
    rollout = {"prompts_per_step": 6, "samples_per_prompt": 3, "max_new_tokens": 6}
    run = run_of(tmp_path, tiny_base, reward=reward, rollout=rollout)
    assert [step["frac_reward_zero_std"] for step in steps_of(run)] == [0.5] * 3
    assert read == [3] * 3

    asked = run_of(
        tmp_path / "again",
        tiny_base,
        reward=reward,
        rollout=rollout,
        objective={"resample": 2},
        data={"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 256},
    )
    for step in steps_of(asked):
        assert step["resampled"] >= 1
        assert step["groups"] > 6


def test_a_step_in_which_no_group_differs_changes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = lambda rewards: torch.zeros(len(rewards), dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(grpo_step, "differs", nowhere)
    run = run_of(tmp_path, tiny_base, objective={"kl_coef": 0.1})
    for step in steps_of(run):
        assert (step["loss"], step["grad_norm"], step["frac_reward_zero_std"]) == (0.0, 0.0, 1.0)
    assert not any(w.any() for name, w in adapter_of(run).items() if "lora_B" in name)


def test_prompts_come_in_one_stream(plain: Path) -> None:
    class Rows:
        train = [None] * 5

    class Run:
        rows, seed = Rows(), 3

    every = np.concatenate([epoch_order(epoch, 5, 3) for epoch in range(4)]).tolist()
    run: Any = Run()
    assert grpo_step.stream(run, 0, 5) == every[:5]
    assert grpo_step.stream(run, 3, 4) == every[3:7]
    assert grpo_step.stream(run, 10, 7) == every[10:17]
    assert grpo_step.stream(run, 7, 0) == []
    state = json.loads(
        (plain / "checkpoints" / "step-000002" / "state.json").read_text(encoding="utf-8")
    )
    assert state["drawn"] == 6


@pytest.mark.parametrize(
    ("pattern", "sentence"), [("zzzz never", "earn all the same|earn the same")]
)
def test_a_reward_that_never_differs_ends_before_the_first_step(
    pattern: str, sentence: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=sentence) as raised:
        run_of(tmp_path, tiny_base, reward={"rule": "regex", "pattern": pattern})
    assert raised.value.hint


def test_an_adapter_is_trained_further(tiny_base: Path, tmp_path: Path) -> None:
    sft = Path(train(make_recipe(tmp_path / "sft", tiny_base)).output)
    adapter = {"kind": "lora", "rank": 4, "alpha": 8, "from": str(sft)}
    still = {**FIELDS["training"], "max_steps": 1, "learning_rate": 1e-30}
    run = run_of(tmp_path / "grpo", tiny_base, adapter=adapter, training=still)
    assert furthest(adapter_of(run), adapter_of(sft)) == 0.0
    assert any(w.any() for name, w in adapter_of(sft).items() if "lora_B" in name)


def test_the_guard_raises_the_price_in_the_loss(tiny_base: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"objective": {"kl_coef": 0.1}}
    held = run_of(
        tmp_path / "held", tiny_base, guard={"max_kl": 1e-9, "action": "raise_kl"}, **fields
    )
    free = run_of(tmp_path / "free", tiny_base, **fields)
    assert furthest(adapter_of(held), adapter_of(free)) > 1e-6


def test_no_rate_moves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    training = {**FIELDS["training"], "learning_rate": 1e-30}
    run = run_of(tmp_path, tiny_base, training=training)
    weights = adapter_of(run)
    assert max(float(w.abs().max()) for n, w in weights.items() if "lora_B" in n) < 1e-20
    assert torch.isfinite(torch.cat([w.flatten() for w in weights.values()])).all()
