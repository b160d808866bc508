"""Keys of transformers' TrainingArguments, which TRL and LLaMA-Factory share."""

from __future__ import annotations

from alignkit.recipe.importing import optimizing, rare, rules
from alignkit.recipe.importing.fields import Field

SUPERVISED = ("sft", "reward", "dpo", "kto")
"""Stages whose batches are rows."""

FOUND = "found by alignkit, and changes no result"
"""Why a key of speed or memory has no counterpart."""

_KERNELS = "the kernels of alignkit are used"
_MANY = "several cards go through accelerate: see docs/gpu.md"
_SAME = "every run is exact, and can be resumed"
_PUSH = "nothing is uploaded; see docs/export.md"
_RESUME = "alignkit … --resume goes on from the newest checkpoint"
_ALL = "metrics.jsonl has every step"

_batch = rules.batch("per_device_train_batch_size", "gradient_accumulation_steps")
_warmup = rules.warmup("lr_scheduler_type")
_eval = rules.every("training.eval_every", "eval_steps", "eval_strategy", usual="no")
_save = rules.every("training.save_every", "save_steps", "save_strategy")
_STEPS = {"eval_strategy": "steps"}


def none(reason: str, **examples: object) -> tuple[Field, ...]:
    """Rows without counterpart that have the same reason."""
    return tuple(Field(key, None, reason, example=value) for key, value in examples.items())


BEST = optimizing.best("early_stopping_steps")
"""Shared by keys of which not every toolkit has all."""

_schedule, _optimizer = optimizing.schedule("lr_scheduler_type"), optimizing.optimizer("optim")
_STABLE = {"lr_scheduler_type": "warmup_stable_decay", "max_steps": 60}
EVALUATED = {"eval_steps": 30, "dataset_name": "org/more", "val_size": 0.1, **_STEPS}
"""Keys of a file with evaluations, of each toolkit."""

_KEPT = EVALUATED | {"load_best_model_at_end": True}
_BETAS = ("training.betas",)

TRAINER = (
    Field("output_dir", rules.text("output"), example="runs/other"),
    Field("seed", rules.whole("seed"), example=7),
    Field(
        "per_device_train_batch_size",
        _batch,
        "× gradient_accumulation_steps × processes is the batch",
        example=3,
        stages=SUPERVISED,
        quiet=True,
    ),
    Field("gradient_accumulation_steps", _batch, example=3, stages=SUPERVISED),
    Field("learning_rate", rules.number("training.learning_rate"), example=3e-4),
    Field("num_train_epochs", rules.number("training.epochs"), example=5),
    Field("max_steps", rules.positive("training.max_steps"), example=60),
    Field("lr_scheduler_type", _schedule, example="cosine", gives=("training.schedule",)),
    Field(
        "lr_scheduler_kwargs",
        _schedule,
        "of the two schedules that have options",
        {"num_decay_steps": 6, "decay_type": "linear"},
        _STABLE,
        gives=optimizing.OF_SCHEDULE,
        quiet=True,
    ),
    Field("warmup_steps", _warmup, example=20),
    Field("warmup_ratio", _warmup, example=0.2),
    Field("weight_decay", rules.number("training.weight_decay"), example=0.1),
    Field("max_grad_norm", rules.clipping("max_grad_norm"), example=0.3),
    Field("optim", _optimizer, example="adamw_8bit"),
    *(Field(beta, _optimizer, "", 0.5, gives=_BETAS) for beta in optimizing.BETAS),
    optimizing.ADAM,
    Field(
        "gradient_checkpointing",
        rules.checkpointing("gradient_checkpointing"),
        "left out, it is used only where memory is short",
        quiet=True,
    ),
    Field("logging_steps", rules.positive("training.log_every"), _ALL, example=20, quiet=True),
    Field("eval_steps", _eval, example=20, beside=_STEPS),
    Field("eval_strategy", _eval, example="steps", beside={"eval_steps": 30}),
    Field("save_steps", _save, example=20),
    Field("save_strategy", _save, example="no", beside={"save_steps": 30}),
    Field("save_total_limit", rules.positive("training.keep"), example=5),
    Field("report_to", rules.trackers(), example="wandb"),
    Field("full_determinism", rules.flag("training.deterministic")),
    *none("no noise is added to embeddings", neftune_noise_alpha=5),
    *none("no option of an optimizer", optim_args="a=1", optim_target_modules=["x"]),
    *none("no label smoothing but in losses of pairs", label_smoothing_factor=0.1),
    *none("alignkit does not use DeepSpeed; see docs/gpu.md", deepspeed="ds.json"),
    *none(_MANY, fsdp="full_shard", fsdp_config="f.json", ddp_timeout=9),
    *none(_MANY, ddp_find_unused_parameters=True, ddp_backend="gloo", local_rank=1),
    *none(_MANY, accelerator_config={"a": 1}, parallelism_config={"a": 1}),
    *none(_KERNELS, use_liger_kernel=True, torch_compile=True, tf32=True, use_liger=True),
    *none(_KERNELS, torch_compile_backend="eager", torch_compile_mode="default"),
    *none(FOUND, per_device_eval_batch_size=4, auto_find_batch_size=True),
    *none(FOUND, dataloader_num_workers=4, dataloader_pin_memory=True),
    *none(FOUND, dataloader_prefetch_factor=4, dataloader_persistent_workers=True),
    *none(FOUND, gradient_checkpointing_kwargs={"a": 1}, activation_offloading=True),
    *none(FOUND, torch_empty_cache_steps=4, bf16_full_eval=True, eval_accumulation_steps=4),
    *none("rows are drawn by the seed", group_by_length=True),
    *none("rows are drawn by the seed", train_sampling_strategy="sequential", data_seed=1),
    *none("the last, smaller batch is used too", dataloader_drop_last=True),
    *none(_PUSH, push_to_hub=True, hub_model_id="me/it", hub_strategy="end"),
    *none(_PUSH, hub_private_repo=True, hub_revision="main", hub_always_push=True),
    *none("secrets are neither read nor written", hub_token="hf_secret"),
    *none(_RESUME, resume_from_checkpoint="last", ignore_data_skip=True),
    *none(_SAME, save_only_model=True, save_safetensors=True),
    Field("load_best_model_at_end", BEST, beside=EVALUATED),
    Field("metric_for_best_model", BEST, example="accuracy", beside=_KEPT),
    *none("known of each metric", greater_is_better=True),
    *none(_ALL, logging_first_step=True, logging_strategy="epoch", logging_dir="logs"),
    *none(_ALL, include_num_input_tokens_seen=True, include_tokens_per_second=True),
    *none("the run folder's name", run_name="mine", project="mine", trackio_space_id="mine"),
    *none("held out rows are scored before step 1", eval_on_start=True, eval_delay=1),
    *none("loss and accuracy are measured", prediction_loss_only=True),
    *none("the stage's command trains", do_train=True),
    *none("held-out rows are named by the recipe", do_eval=True, do_predict=True),
    *none("alignkit … --overwrite replaces a run", overwrite_output_dir=True),
    *none("progress is shown; --quiet shows none", disable_tqdm=True, log_level="info"),
    *none("the device is found", use_cpu=True, no_cuda=True),
    *rare.TRAINER,
)
"""Their keys, in the order of a recipe."""
