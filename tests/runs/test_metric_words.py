"""Every metric that a stage logs has a sentence, and every sentence is about one that is logged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from running import make_ppo_recipe, make_preference_recipe, make_recipe, steps_of, train

from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.stages.built_in import BUILT_IN
from alignkit.stages.running.definition import definition_of
from alignkit.stages.running.loop import METRICS

SCORE = """\
def score(completions, log_metric, **columns):
    assert not any("a" in text for text in completions)
    log_metric("seen", len(completions))
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize("stage", BUILT_IN)
def test_what_is_logged_is_explained(stage: str, tiny_base: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"training__max_steps": 2, "merge": False}
    fields["training__on_bad_step"] = "skip"  # which has a metric of its own
    fields["model__dtype"] = "float16"  # which has two
    if stage == "grpo":
        groups = {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 6}
        fields |= {"stage": stage, "rollout": groups, "objective": {"kl_coef": 0.1}}
    if stage in ("ppo", "grpo"):  # a source that logs, and fails for some responses
        (tmp_path / "mine.py").write_text(SCORE, encoding="utf-8")
        fields.setdefault("rollout", {"prompts_per_step": 12, "max_new_tokens": 6})
        failing = {"function": f"{tmp_path}/mine.py:score", "on_failure": "skip"}
        fields["reward"] = [{"rule": "regex", "pattern": "e"}, failing]
    if stage in ("sft", "ppo", "grpo"):
        make: Any = make_recipe if stage == "sft" else make_ppo_recipe
        recipe = make(tmp_path, tiny_base, **fields)
    else:
        recipe = make_preference_recipe(tmp_path, tiny_base, stage, **fields)
    train(recipe)
    logged = {
        re.sub("^(reward|failed|logged)/.*", r"\1/<name>", key)
        for step in steps_of(tmp_path / "run")
        for key in step
    }
    own = definition_of(load_recipe(str(recipe)).recipe).metrics
    assert logged - {"step"} == {*METRICS, *own}
    assert not set(METRICS) & set(own)
