"""Whole runs of the five stages: on the processor, then on the stand-in, which counts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from running import (
    assert_same,
    break_off,
    make_ppo_recipe,
    make_preference_recipe,
    make_recipe,
    train,
    without_times,
)
from tiny import save_tiny

from alignkit.generation import sampled
from alignkit.models.scoring import scorer
from alignkit.stages.running import steps as steps_of_rows
from alignkit.stages.supervised import reference
from standin.counts import counts
from standin.device import device

_MAKERS: dict[str, Callable[..., Path]] = {
    "sft": make_recipe,
    **{
        stage: functools.partial(make_preference_recipe, stage=stage)
        for stage in ("reward", "dpo", "kto")
    },
    "ppo": make_ppo_recipe,
    "grpo": functools.partial(
        make_ppo_recipe,
        stage="grpo",
        rollout={"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 6},
        objective={"kind": "dapo", "kl_coef": 0.1, "resample": 1},
    ),
}
STAGES = tuple(_MAKERS)

_LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "dora": {**_LORA, "dora": True},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "tokens": 4},
    "pissa": {**_LORA, "init": "pissa"},
    "dropout": {**_LORA, "dropout": 0.1},
}
"""Kinds of adapter besides plain LoRA."""


def recipe_of(run: str, folder: Path, **fields: Any) -> Path:
    """The recipe of a run.

    Args:
        run: STAGE/PRECISION or STAGE/PRECISION/ADAPTER, as `dpo/bfloat16` or `sft/float32/dora`;
            `nf4` is a quantized base in float32.
        folder: for the tiny base and the run's own files.
        **fields: of the recipe, `__` between their keys.
    """
    stage, precision, *kind = run.split("/")
    if kind:
        fields["adapter"] = ADAPTERS[kind[0]]
    if not (folder / "base").exists():
        save_tiny(folder / "base")
    quantized = precision == "nf4"
    return _MAKERS[stage](
        folder / run,
        folder / "base",
        model__dtype="float32" if quantized else precision,
        model__quantization="nf4" if quantized else "none",
        model__attention="packed",
        data__eval_fraction=0.25,
        **fields,
    )


def resume(run: str, folder: Path) -> None:
    """A run on the device that is broken off ends as the one that was not.

    Args:
        run: STAGE/PRECISION.
        folder: as for `compare`.

    Raises:
        AssertionError: a measurement or a byte differs.
    """
    few = {"training__max_steps": 3, "training__save_every": 1, "training__keep": 9}
    os.environ["ALIGNKIT_DEVICE"] = "cuda"
    AcceleratorState._reset_state(True)
    with device():
        output = Path(train(recipe_of(run, folder / "resumed", **few)).output)
        whole = break_off(output, 1)
        AcceleratorState._reset_state(True)
        train(recipe_of(run, folder / "resumed", **few), resume=True)
    assert_same(output, whole)


def without_float64(stage: str, folder: Path) -> None:
    """A whole run in float32 on a device that has no float64, as Apple's GPUs have not.

    Args:
        stage: its name.
        folder: as for `compare`.

    Raises:
        TypeError: a tensor of it would be on the device.
    """
    os.environ["ALIGNKIT_DEVICE"] = "cuda"
    AcceleratorState._reset_state(True)
    with contextlib.ExitStack() as stack:
        for module in (scorer, sampled, steps_of_rows, reference):
            stack.enter_context(patch.object(module, "sum_dtype", lambda where: torch.float32))
        stack.enter_context(device(wide=False))
        train(recipe_of(f"{stage}/float32", folder / "narrow", training__max_steps=1))


def compare(run: str, folder: Path, steps: int, capability: int) -> dict[str, Any]:
    """Measurements of one run on both devices, and the counts of the second; ready for JSON.

    A packed row that does not reproduce the model is an error here. `attention: auto` would go on
    with padded ones, and hide what is broken on the device.

    Args:
        run: as for `recipe_of`.
        folder: as for `recipe_of`.
        steps: of training, on each device.
        capability: of the stand-in, such as 80.
    """
    recipe = recipe_of(run, folder, training__max_steps=steps)
    found: dict[str, Any] = {}
    for name, where in (("cpu", contextlib.nullcontext()), ("cuda", device(capability))):
        os.environ["ALIGNKIT_DEVICE"] = name
        AcceleratorState._reset_state(True)
        counts.reset()
        with where:
            summary = train(recipe, f"output={folder / run / name}")
        found[name] = without_times(Path(summary.output))
    kinds = {name: dict(counter.most_common()) for name, counter in vars(counts).items()}
    return {**found, **kinds}
