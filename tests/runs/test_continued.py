"""`adapter.from`: training continues exactly where the adapter was, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from running import make_ppo_recipe, make_preference_recipe, make_recipe, train
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model

from alignkit.errors import AlignkitError
from alignkit.recipe.reading.load import load_recipe

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "patterns": {"kind": "lora", "rank": 4, "rank_pattern": {"q_proj": 2}, "rslora": True},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "ia3": {"kind": "ia3"},
}
EVAL = {"path": "data_templates/preference/pairs_eval.jsonl", "take": 6}


def run_of(
    folder: Path, base: Path, adapter: dict[str, Any], stage: str = "sft", **fields: Any
) -> Path:
    fields = {
        "adapter": adapter,
        "training__max_steps": 2,
        "training__learning_rate": 5e-3,
        "merge": False,
        **fields,
    }
    if stage == "sft":
        rows = [{"path": "data_templates/sft/messages_eval.jsonl", "take": 6}]
        train(make_recipe(folder, base, data__eval=rows, **fields))
    else:
        train(make_preference_recipe(folder, base, stage, data__eval=[EVAL], **fields))
    return folder / "run"


def values(run: Path, which: str) -> dict[str, float]:
    found = json.loads((run / "run.json").read_text(encoding="utf-8"))["summary"][which]
    return {key: value for key, value in found.items() if "seconds" not in key}


@pytest.fixture(scope="module")
def lora_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("lora"), tiny_base, KINDS["lora"])


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("sft", "patterns"), ("sft", "ia3"), ("reward", "lora"), ("reward", "dora")],
)
def test_it_starts_where_the_other_ended(
    stage: str, kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    first = run_of(tmp_path / "a", tiny_base, KINDS[kind], stage)
    plain = {"kind": KINDS[kind]["kind"], "from": str(first)}
    second = run_of(tmp_path / "b", tiny_base, plain, stage)
    # A reward model's head is read too: otherwise its rewards would start from scratch.
    assert values(second, "before") == values(first, "after")
    assert values(second, "after") != values(second, "before")
    assert values(first, "before") != values(first, "after")
    one, two = (
        json.loads((run / "adapter/adapter_config.json").read_text(encoding="utf-8"))
        for run in (first, second)
    )
    assert one == two


def test_new_rows_and_whole_modules_go_on(tiny_base: Path, tmp_path: Path) -> None:
    for number, (kind, fields) in enumerate(
        (
            ({**KINDS["lora"], "modules_to_save": ["norm", "lm_head"]}, {}),
            (KINDS["lora"], {"model__add_tokens": ["<tool>", "</tool>"]}),
        )
    ):
        place = tmp_path / str(number)
        first = run_of(place / "a", tiny_base, kind, **fields)
        second = run_of(place / "b", tiny_base, {"kind": "lora", "from": str(first)}, **fields)
        assert values(second, "before") == values(first, "after")
        assert values(second, "after") != values(second, "before")
    again = {"kind": "lora", "from": str(tmp_path / "1/a/run")}
    with pytest.raises(
        AlignkitError, match=r"trained with another model\.rope_scaling or model\.add"
    ):
        run_of(tmp_path / "c", tiny_base, again)


@pytest.mark.parametrize("damage", ["missing", "too many", "shape", "nan"])
def test_damaged_weights_are_not_trained_on(
    damage: str, lora_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    first = Path(shutil.copytree(lora_run, tmp_path / "a"))
    path = first / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    if damage == "missing":
        del weights[name]
    elif damage == "too many":
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    elif damage == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    else:
        weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    message = "values that are not finite" if damage == "nan" else "does not fit the base"
    with pytest.raises(AlignkitError, match=message):
        run_of(tmp_path / "b", tiny_base, {"kind": "lora", "from": str(first)})


def test_only_where_no_reference_is_compared_with(
    lora_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "lora", "from": str(lora_run)}
    recipes = [
        make_preference_recipe(tmp_path / stage, tiny_base, stage, adapter=adapter)
        for stage in ("dpo", "kto")
    ]
    recipes.append(make_ppo_recipe(tmp_path / "ppo", tiny_base, adapter=adapter))
    for recipe in recipes:
        with pytest.raises(AlignkitError, match=r"must not use `adapter\.from`"):
            load_recipe(str(recipe))
    free = make_preference_recipe(
        tmp_path / "free",
        tiny_base,
        "dpo",
        adapter=adapter,
        objective={"kind": "orpo"},
        training__max_steps=1,
        merge=False,
    )
    train(free)


def test_what_does_not_fit_is_a_sentence(lora_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    start = {"kind": "lora", "from": str(lora_run)}
    save_tiny(tmp_path / "other", seed=5)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tiny_base, {**start, "rank": 8}, r"adapter\.rank = 8, but the adapter in .* has 4"),
        (tiny_base, {**start, "dora": True}, r"adapter\.dora = True, but the adapter in .* has F"),
        (tiny_base, {**start, "targets": ["q_proj"]}, r"adapter\.targets = "),
        (
            tiny_base,
            {"kind": "ia3", "from": str(lora_run)},
            "adapter.kind = ia3, but .* of kind lora",
        ),
        (tiny_base, {**start, "from": str(tmp_path)}, "holds no adapter"),
        (tmp_path / "other", start, "was trained over other weights"),
    ]
    for number, (base, adapter, message) in enumerate(cases):
        with pytest.raises(AlignkitError, match=message):
            run_of(tmp_path / f"b{number}", base, adapter)
        assert not (tmp_path / f"b{number}" / "run").exists()


def test_all_weights_have_no_adapter_to_continue(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, adapter={"kind": "full", "from": "runs/a"})
    with pytest.raises(AlignkitError, match=r"adapter\.from"):
        load_recipe(str(recipe))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_of_plain_peft(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config: Any = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"])
    if kind == "ia3":
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = get_peft_model(tiny_model(), config)
    model.save_pretrained(tmp_path / "theirs")
    run = run_of(tmp_path, tiny_base, {"kind": kind, "from": str(tmp_path / "theirs")})
    found = json.loads((run / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(found["target_modules"]) == sorted(config.target_modules)
    if kind == "lora":
        assert (found["r"], found["lora_alpha"]) == (3, 9)


def test_resuming_wants_the_same_adapter(lora_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(lora_run, tmp_path / "a"))
    run_of(tmp_path / "b", tiny_base, {"kind": "lora", "from": str(first)}, training__save_every=1)
    path = first / "adapter/adapter_model.safetensors"
    other = {name: weight + 1e-3 for name, weight in load_file(path).items()}
    save_file(other, path, metadata={"format": "pt"})
    with pytest.raises(AlignkitError, match=r"adapter\.from has changed since the run was started"):
        train(tmp_path / "b/recipe.yaml", resume=True)
