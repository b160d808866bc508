"""The recipe of GRPO: kinds are defaults over visible keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from alignkit.recipe.stages.grpo import GRPO, KINDS, PAPERS, GrpoRecipe


def recipe(**fields: Any) -> GrpoRecipe:
    values = {
        "stage": "grpo",
        "output": "x",
        "model": {"base": "m", "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "reward": {"rule": "json"},
        **fields,
    }
    return GrpoRecipe.model_validate_json(json.dumps(values)).with_defaults()


# kind: advantage, loss, clip, ratio, kl_coef, kl, overlong, resample
TABLE: dict[str, tuple[Any, ...]] = {
    "grpo": ("group_std", "token_mean", (0.2, 0.2), "token", 0.0, "loss", "none", 0),
    "dr_grpo": ("centered", "constant", (0.2, 0.2), "token", 0.0, "loss", "none", 0),
    "dapo": ("group_std", "token_mean", (0.2, 0.28), "token", 0.0, "loss", "penalize", 4),
    "rloo": ("leave_one_out", "sequence_sum", (0.2, 0.2), "sequence", 0.05, "reward", "none", 0),
    "gspo": ("group_std", "sequence_mean", (3e-4, 4e-4), "sequence", 0.0, "loss", "none", 0),
    "cispo": ("group_std", "token_mean", (None, 5.0), "stopped", 0.0, "loss", "none", 0),
    "reinforce_pp": ("batch_std", "token_mean", (0.2, 0.2), "token", 0.01, "loss", "none", 0),
}


@pytest.mark.parametrize("kind", TABLE)
def test_a_kind_is_a_row_of_the_table(kind: str) -> None:
    spec = recipe(objective={"kind": kind}).objective
    names = ("advantage", "loss", "clip", "ratio", "kl_coef", "kl", "overlong", "resample")
    assert tuple(getattr(spec, name) for name in names) == TABLE[kind]
    assert KINDS.keys() == PAPERS.keys() == TABLE.keys()
    assert (spec.epochs, spec.minibatches, spec.dual_clip) == (1, 1, None)


def test_a_key_that_is_set_wins() -> None:
    spec = recipe(objective={"kind": "dapo", "resample": 0, "clip": [0.1, None]}).objective
    assert (spec.resample, spec.clip, spec.overlong) == (0, (0.1, None), "penalize")


def test_groups_and_their_cost() -> None:
    plain, priced = recipe(), recipe(objective={"kind": "rloo"})
    assert plain.rollout.samples_per_prompt == 8
    assert not plain.measures_kl
    assert priced.measures_kl
    assert recipe(guard={"max_kl": 5.0}).measures_kl
    assert (plain.scored_reads, priced.scored_reads, plain.trained_reads) == (0, 1, 1)
    assert recipe(reward=[{"model": "runs/r"}, {"rule": "json"}]).scored_reads == 1
    assert list(plain.peak_rates) == ["policy"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"objective": {"clip": [1.0, 0.2]}}, "below 1 - low"),
        ({"objective": {"kind": "ppo"}}, "Input should be 'grpo'"),
        ({"rollout": {"samples_per_prompt": 1}}, "greater than or equal to 2"),
        ({"objective": {"minibatches": 9}}, "fewer than objective.minibatches = 9"),
        ({"adapter": {"kind": "lora", "dropout": 0.1}}, "grpo needs 0"),
        (
            {"adapter": {"kind": "lora", "from": "runs/sft"}, "objective": {"kind": "rloo"}},
            "the reference would be the bare base",
        ),
        (
            {"adapter": {"kind": "lora", "from": "runs/sft"}, "guard": {"max_kl": 5.0}},
            "that to the bare base",
        ),
        ({"guard": {"max_kl": 5.0, "action": "raise_kl"}}, "stays 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        recipe(**fields)


def test_an_adapter_goes_on_without_a_price_of_kl() -> None:
    assert recipe(adapter={"kind": "lora", "from": "runs/sft"}).objective.kl_coef == 0.0


def test_unusual_values_are_said() -> None:
    loud = recipe(objective={"epochs": 5}, rollout={"samples_per_prompt": 2})
    lines = loud.warnings(None)  # type: ignore[arg-type]
    assert any("5 updates" in line for line in lines)
    assert any("groups of 2" in line for line in lines)
    assert recipe().warnings(None) == []  # type: ignore[arg-type]


PAGE = Path(__file__).parents[2] / "docs" / "grpo.md"
START, END = "<!-- kinds: start -->\n", "<!-- kinds: end -->\n"


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join("none" if side is None else f"{side:g}" for side in value)
    return str(value)


def test_the_page_has_the_table_of_the_code() -> None:
    columns = ("advantage", "loss", "clip", "ratio", "kl_coef", "kl", "overlong", "resample")
    lines = [f"| kind | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind, own in KINDS.items():
        values = [shown({**GRPO, **own}[name]) for name in columns]
        lines.append(f"| [{kind}]({PAPERS[kind]}) | {' | '.join(values)} |")
    table = "\n".join(lines)
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    assert rest.partition(END)[0] == f"\n{table}\n\n", table


def test_keys_of_other_toolkits_are_led_to_ours() -> None:
    counterparts = GrpoRecipe.counterparts
    assert counterparts["rollout.num_generations"] == "did you mean rollout.samples_per_prompt?"
    assert counterparts["objective.beta"] == "did you mean objective.kl_coef?"
    for hint in counterparts.values():
        for section, key in re.findall(r"(rollout|objective)\.(\w+)", hint):
            assert key in GrpoRecipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
