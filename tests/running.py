"""Small runs on the tiny base: their rows, their recipes, and what they leave."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alignkit.recipe.reading.load import load_recipe
from alignkit.runtime.metrics import read_metrics
from alignkit.stages.registry import run_stage
from alignkit.stages.running.finish import RunSummary
from alignkit.stages.running.session import RunOptions

KILL_AFTER = """
import os, signal
from alignkit.runtime.metrics import MetricsFile
write = MetricsFile.write
def write_and_die(self, step, values):
    write(self, step, values)
    if step == STEP and "loss" in values:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = write_and_die
"""
"""Code for `before` of a command: the process dies once it has written step STEP."""

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw", "how"),
    *("many", "red", "birds", "fly", "over", "our", "old", "house"),
)


def make_rows(count: int = 16, seed: int = 0, longest: int = 24) -> list[dict[str, Any]]:
    """Conversations of different lengths, some with a system message or two turns."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))

    rows = []
    for number in range(count):
        turns = [("user", text()), ("assistant", text())]
        if number % 4 == 1:
            turns = [("system", text()), *turns]
        if number % 5 == 2:
            turns += [("user", text()), ("assistant", text())]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"messages": messages})
    return rows


def break_off(run: Path, step: int) -> Path:
    """Leave a finished run as if its process had died in the second step after a checkpoint.

    Args:
        run: folder of the run.
        step: later checkpoints go, measurements later than a further step, and what is written at
            the end.

    Returns:
        A copy of the finished run.
    """
    whole = Path(shutil.copytree(run, run.with_name(f"whole-{run.name}")))
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    for name in ("adapter", "value", "merged"):
        shutil.rmtree(run / name, ignore_errors=True)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step + 1]
    (run / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    state = json.loads((run / "run.json").read_text(encoding="utf-8"))
    state = {key: value for key, value in state.items() if key not in ("ended", "summary")}
    (run / "run.json").write_text(json.dumps({**state, "status": "running"}), encoding="utf-8")
    return whole


def assert_same(run: Path, whole: Path) -> None:
    """A run ended as another: the same measurements, and the same bytes in all that it made."""
    assert without_times(run) == without_times(whole)
    made = [
        path.relative_to(whole)
        for pattern in ("adapter/**/*", "value/**/*", "merged/**/*", "samples.jsonl")
        for path in whole.glob(pattern)
    ]
    assert any(path.suffix == ".safetensors" for path in made)
    for path in made:
        assert (run / path).read_bytes() == (whole / path).read_bytes(), path
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


GOOD, BAD = ("birds", "fly", "over", "house"), ("mat", "cat", "sat", "red")


def make_pairs(count: int = 16, seed: int = 0, *, evident: bool = False) -> list[dict[str, Any]]:
    """Pairs of answers of different lengths to prompts of one to four turns.

    `evident` pairs follow a rule that a tiny model learns at once: chosen answers are made of
    GOOD words and rejected ones of BAD words. The others follow none.
    """
    rng = random.Random(seed)

    def text(words: tuple[str, ...] = WORDS, longest: int = 16) -> str:
        return " ".join(rng.choices(words, k=rng.randint(2, longest)))

    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": text()}]
        if number % 4 == 1:
            prompt = [{"role": "system", "content": text()}, *prompt]
        if number % 5 == 2:
            turn = {"role": "assistant", "content": text()}
            prompt += [turn, {"role": "user", "content": text()}]
        answers = [text(GOOD, 6), text(BAD, 6)] if evident else [text(), text() + " and"]
        chosen, rejected = [[{"role": "assistant", "content": answer}] for answer in answers]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def make_labelled(count: int = 16, seed: int = 0, *, evident: bool = False) -> list[dict[str, Any]]:
    """Answers of `make_pairs`, in turn good and bad, each to a prompt of its own."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if number % 2 else "chosen"],
            "label": number % 2 == 0,
        }
        for number, row in enumerate(make_pairs(count, seed, evident=evident))
    ]


def make_prompts(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of different lengths, some behind a system message."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 10)))

    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": text()}]
        if number % 4 == 1:
            prompt = [{"role": "system", "content": text()}, *prompt]
        rows.append({"prompt": prompt})
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recipe(folder: Path, base: Path, **overrides: Any) -> Path:
    """A recipe file beside its rows; `overrides` use `__` between the keys."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", make_rows())
    recipe: dict[str, Any] = {
        "stage": "sft",
        "output": str(folder / "run"),
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 256},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 2e-3, "warmup": 0},
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        here = recipe
        for parent in parents:
            here = here[parent]
        here[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
    return path


def make_preference_recipe(folder: Path, base: Path, stage: str, **overrides: Any) -> Path:
    """A recipe of the stages on pairs or labelled rows, beside its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        rows = make_labelled() if stage == "kto" else make_pairs()
        write_rows(folder / "rows.jsonl", rows)
    return make_recipe(folder, base, **{"stage": stage, "merge": False, **overrides})


def make_ppo_recipe(folder: Path, base: Path, **overrides: Any) -> Path:
    """A recipe of PPO beside its prompts: short responses that earn 1 with an `e` in them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", make_prompts())
    fields: dict[str, Any] = {
        "stage": "ppo",
        "reward": {"rule": "regex", "pattern": "e"},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
        "objective": {},
        "training": {"max_steps": 4, "learning_rate": 2e-3, "warmup": 0},
        "merge": False,
    }
    return make_recipe(folder, base, **{**fields, **overrides})


def train(recipe: Path, *overrides: str, resume: bool = False) -> RunSummary:
    """Run a recipe of any stage in this process."""
    loaded = load_recipe(str(recipe), list(overrides))
    summary = run_stage(loaded.recipe, RunOptions(resume=resume, quiet=True))
    assert summary is not None
    return summary


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in steps_of(run)]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def furthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of weights."""
    assert one.keys() == two.keys()
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


def without_times(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the memory decides."""
    clock = ("step_seconds", "sampling_seconds", "tokens_per_second", "memory_gb")
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]
