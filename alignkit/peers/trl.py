"""Runs a recipe with stock TRL trainers, on the same token ids and in the same order as alignkit.

Only the preparation of rows is replaced, so that both engines see the same tokens; collators,
losses, reference passes and loop are TRL's own. LoRA starts from the same random weights, reward
models from the same head. Where TRL's definitions differ:

- IPO: TRL averages log-ratios over tokens (`objective.per_token: true` does the same here).
- KTO: TRL pairs each prompt with the completion of the previous row in its batch; here it gets
  alignkit's mismatched completions. TRL's baseline covers one device's batch, alignkit's the whole
  optimizer step: they are equal if the step is one batch.
- `rewards/accuracies`: TRL counts a tie as wrong, alignkit as half.
- Reward: if the padding token also ends a turn, as in many chat models, TRL's classifier reads
  the reward one token early; here it gets another padding token.
- SimPO, ORPO and CPO are experimental in TRL and are not run here.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig
from transformers import TrainerCallback
from trl import (  # type: ignore[attr-defined]  # exported lazily
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from alignkit.data.dataset import TokenDataset
from alignkit.data.documents import Document
from alignkit.data.packing import step_items
from alignkit.errors import AlignkitError
from alignkit.models.adapters.attach import attach_adapter, peft_config
from alignkit.models.base.loading import BaseModel, load_config, load_model
from alignkit.models.base.skeleton import build_skeleton
from alignkit.models.heap import release_memory
from alignkit.models.quiet import quiet_transformers
from alignkit.models.rewards.chat import choose_padding
from alignkit.models.rewards.head import new_head
from alignkit.recipe.adapters import FullSpec, b_rate, continues, is_mergeable
from alignkit.recipe.planning.plan import count_decay
from alignkit.recipe.stages.dpo import DpoRecipe
from alignkit.recipe.stages.kto import KtoRecipe
from alignkit.recipe.stages.reward import RewardRecipe
from alignkit.recipe.stages.sft import SftRecipe
from alignkit.recipe.training import LoopSpec

PeerRecipe = SftRecipe | RewardRecipe | DpoRecipe | KtoRecipe
"""Recipes of the stages that can be compared."""

DPO_LOSSES = {
    "dpo": "sigmoid",
    "ipo": "ipo",
    "robust": "robust",
    "hinge": "hinge",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sppo": "sppo_hard",
    "nca": "nca_pair",
}
"""Objective kind in the recipe -> TRL's name."""


@dataclass(frozen=True)
class PeerResult:
    """What TRL measured.

    Args:
        metrics: of each step, under TRL's names.
        step_seconds: duration of each step.
    """

    metrics: list[dict[str, float]]
    step_seconds: list[float]

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [metrics["loss"] for metrics in self.metrics]


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Times steps (`seconds`) and keeps what TRL logs of each (`metrics`)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the step's clock."""
        self.seconds.append(time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds[-1] = time.monotonic() - self.seconds[-1]

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Keep a step's values; those of the whole run have no loss."""
        if "loss" in logs:
            self.metrics.append({name: float(value) for name, value in logs.items()})


class TokenizedDPO(DPOTrainer):
    """TRL's trainer over rows as from `peer_row`."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class _TokenizedKTO(KTOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def run_trl(
    recipe: PeerRecipe,
    base: BaseModel,
    tokenizer: Any,
    rows: TokenDataset,
    folder: Path,
    *,
    max_steps: int,
    tuned: bool = False,
) -> PeerResult:
    """Train with TRL's trainer for the recipe's stage.

    Args:
        recipe: with its defaults filled in and its dtype chosen; at most one epoch of whole batches
            is run.
        base: the model to start from.
        tokenizer: with its chat template.
        rows: training rows; for KTO with mismatched branches.
        folder: receives TRL's own output.
        max_steps: optimizer steps.
        tuned: use weights in the recipe's dtype and no gradient checkpointing, instead of TRL's
            documented defaults (float32 weights under autocast, checkpointing).

    Returns:
        Losses, metrics and times of each step.

    Raises:
        AlignkitError: TRL has no equivalent of the objective or of the adapter's settings.
    """
    size = recipe.examples_per_step
    items = [i for step in range(max_steps) for i in step_items(step, len(rows), size, recipe.seed)]
    columns = [peer_row(recipe.stage, rows[int(item)]) for item in items]
    recorder = Recorder()
    kind, config, options = _trainer_of(recipe)
    if recipe.stage == "reward":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = choose_padding(tokenizer, rows.report.stop_tokens)
    datasets.disable_progress_bars()
    with quiet_transformers():
        trainer = kind(
            model=base.location,
            args=config(
                **_arguments(recipe, folder, max_steps, tuned=tuned),
                **options,
                model_init_kwargs={"dtype": recipe.model.dtype if tuned else "float32"},
            ),
            train_dataset=datasets.Dataset.from_list(columns),
            processing_class=tokenizer,
            peft_config=_adapter(recipe, base),
            callbacks=[recorder],
        )
        _start_alike(trainer.model, recipe, base)
        trainer.train()
    return PeerResult(recorder.metrics, recorder.seconds)


def _trainer_of(recipe: PeerRecipe) -> tuple[Any, Any, dict[str, Any]]:
    """Trainer, its configuration class, and the objective's options."""
    if recipe.stage == "sft":
        return SFTTrainer, SFTConfig, {"max_length": recipe.data.max_length}
    objective = recipe.objective.model_dump()
    if recipe.stage == "reward":
        return RewardTrainer, RewardConfig, {"center_rewards_coefficient": objective["center"]}
    if recipe.stage == "kto":
        del objective["kind"]
        return _TokenizedKTO, KTOConfig, objective
    name = DPO_LOSSES.get(objective["kind"])
    if name is None or (name == "ipo" and not objective["per_token"]):
        raise AlignkitError(
            f"TRL has no equivalent of the objective {objective['kind']}",
            hint=f"choose one of {', '.join(DPO_LOSSES)}; ipo with per_token: true",
        )
    options = {"loss_type": name, "beta": objective.get("beta", objective.get("tau"))}
    if "label_smoothing" in objective:
        options["label_smoothing"] = objective["label_smoothing"]
    return TokenizedDPO, DPOConfig, options


def _arguments(recipe: PeerRecipe, folder: Path, steps: int, *, tuned: bool) -> dict[str, Any]:
    training = recipe.training
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.examples_per_step,
        "max_steps": steps,
        "learning_rate": training.learning_rate,
        **_schedule(training, steps),
        "weight_decay": training.weight_decay,
        **_optimizer(training),
        "max_grad_norm": training.max_grad_norm or 0.0,
        "bf16": recipe.model.dtype == "bfloat16",
        "gradient_checkpointing": not tuned,
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": recipe.seed,
    }


def _schedule(training: LoopSpec, steps: int) -> dict[str, Any]:
    """TRL's names of the schedule and its options; its warm-up begins at 0."""
    warmup = round(training.warmup * (steps if training.warmup < 1 else 1))
    decay = count_decay(training.decay, steps, warmup)
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "wsd": ("warmup_stable_decay", {"num_decay_steps": decay, "decay_type": "linear"}),
        "cosine_min": ("cosine_with_min_lr", {"min_lr_rate": training.min_rate}),
    }
    name, options = known.get(training.schedule, (training.schedule, {}))
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": options, "warmup_steps": warmup}


def _optimizer(training: LoopSpec) -> dict[str, Any]:
    """TRL's name of the optimizer, and its betas."""
    if training.optimizer == "adafactor":
        raise AlignkitError(
            "TRL's Adafactor is another one: its rate is not relative to the weights",
            hint="compare with training.optimizer=adamw",
        )
    betas = dict(zip(("adam_beta1", "adam_beta2"), training.betas or (), strict=False))
    names = {"adamw": "adamw_torch_fused", "lion": "lion_32bit"}
    return {"optim": names.get(training.optimizer, training.optimizer), **betas}


def _adapter(recipe: PeerRecipe, base: BaseModel) -> PeftConfig | None:
    """The adapter that TRL trains; None for full weights."""
    spec = recipe.adapter
    if b_rate(spec) != 1.0 or (isinstance(spec, FullSpec) and spec.freeze):
        raise AlignkitError(
            "TRL has no equivalent of adapter.b_learning_rate or adapter.freeze",
            hint="remove adapter.b_learning_rate and adapter.freeze",
        )
    if isinstance(spec, FullSpec):
        return None
    if continues(spec) or getattr(spec, "init", "default") != "default":
        raise AlignkitError(
            "TRL has no equivalent of adapter.from or adapter.init",
            hint="remove adapter.from and adapter.init",
        )
    if not is_mergeable(spec):
        raise AlignkitError(
            "TRL cannot train a prefix: it recomputes activations, and transformers then drops the "
            "cache that holds the prefix",
            hint="compare with adapter.kind=lora",
        )
    skeleton = build_skeleton(load_config(base))
    task = "SEQ_CLS" if recipe.stage == "reward" else "CAUSAL_LM"
    return peft_config(skeleton, spec, task)


def peer_row(stage: str, document: Document) -> dict[str, Any]:
    """One row as the columns that TRL's collators read.

    Args:
        stage: `sft`, `reward`, `dpo` or `kto`.
        document: the row.
    """
    prompt, first = document.prompt.tolist(), document.branches[0]
    ids = first.ids.tolist()
    if stage == "sft":
        labels = [i if on else -100 for i, on in zip(ids, first.trained, strict=True)]
        return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + labels}
    second = document.branches[1].ids.tolist()
    if stage == "kto":
        return {
            "prompt_ids": prompt,
            "completion_ids": ids,
            "KL_completion_ids": second,
            "label": first.role == 0,
        }
    if stage == "reward":
        pair = {"chosen_ids": prompt + ids, "rejected_ids": prompt + second}
        return {**pair, "margin": document.margin}
    return {"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": second}


@torch.no_grad()
def _start_alike(model: Any, recipe: PeerRecipe, base: BaseModel) -> None:
    """Give TRL's model the same random initial weights as alignkit."""
    ours = load_model(base, torch.float32)
    head = new_head(ours, recipe.seed) if recipe.stage == "reward" else None
    named = dict(model.named_parameters())
    if not isinstance(recipe.adapter, FullSpec):
        ours = attach_adapter(ours, recipe.adapter, recipe.seed)
        for name, weight in ours.named_parameters():
            if name in named and weight.requires_grad:
                named[name].copy_(weight)
    if head is not None:
        heads = [p for name, p in named.items() if "score" in name and p.requires_grad]
        for weight in heads:
            weight.copy_(head.weight)
    del ours
    release_memory()
