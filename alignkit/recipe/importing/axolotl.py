"""Axolotl 0.18: its keys, and its defaults."""

from __future__ import annotations

from alignkit.recipe.importing import (
    axolotl_rules,
    losses,
    optimizing,
    rare,
    rules,
    sampling,
    sources,
)
from alignkit.recipe.importing.fields import Field, Foreign, Settings, Toolkit
from alignkit.recipe.importing.trainer import FOUND, SUPERVISED, none


def _defaults(foreign: Foreign) -> Settings:
    rl = foreign.text("rl")
    return {
        "num_epochs": 1.0,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optimizer": "adamw_torch_fused",
        "seed": 42,
        "sequence_len": 512,
        "lora_r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "val_set_size": 0.0,
        "output_dir": "./model-out",
        "rl": rl or None,
        "rl_beta": 0.0 if foreign.stage == "grpo" else 0.1,
        "simpo_gamma": 0.5,
        "trl.num_generations": 8,
        "trl.max_completion_length": 512,
        "trl.epsilon": 0.2,
        "trl.scale_rewards": True,
        "trl.loss_type": "dapo",
    }


_stage, _tracked = rules.stage(), axolotl_rules.tracked()
_batch = rules.batch("micro_batch_size", "gradient_accumulation_steps", "batch_size")
_groups = sampling.groups("micro_batch_size", "gradient_accumulation_steps", "trl.num_generations")
_warmup, _quantized = rules.warmup("lr_scheduler"), axolotl_rules.quantization()
_where, _cut = axolotl_rules.targets(), axolotl_rules.lengths()
_eval = rules.every("training.eval_every", "eval_steps", "eval_strategy")
_save = rules.every("training.save_every", "save_steps", "save_strategy")
_dtype, _best = rules.precision(), optimizing.best("early_stopping_patience")
_schedule = optimizing.schedule("lr_scheduler", "cosine_min_lr_ratio")
_optimizer, _OPTIONS = optimizing.optimizer("optimizer"), optimizing.OF_SCHEDULE
_FLOOR, _HELD = {"lr_scheduler": "cosine_with_min_lr"}, {"val_set_size": 0.1, "eval_steps": 30}
_loss = sampling.group_loss("trl.loss_type", "trl.scale_rewards", "trl.epsilon", "trl.epsilon_high")
_rewards = sampling.rewards("trl.reward_funcs", "trl.reward_weights")
_responses = sampling.responses("trl.max_completion_length", "max_prompt_len")
_price = axolotl_rules.strength("trl.beta", "rl_beta", ours="objective.kl_coef")
_pull = axolotl_rules.strength("trl.beta", "rl_beta", ours="objective.beta")

_LORA = {"adapter": "lora"}
_BETAS = ("trl.beta", "rl_beta", "orpo_alpha")
_SFT, _PAIRS, _KTO, _GROUPS = ("sft",), ("dpo",), ("kto",), ("grpo",)
_KERNELS = "alignkit has its own kernels"
_MANY = "several cards go through accelerate: see docs/gpu.md"
_SAMPLED = "sampling is from the unchanged policy"
_NAMES = "the run folder's name"
_PROMPTS = ("rollout.prompts_per_step",)
_CLIP, _ADVANTAGE = ("objective.clip",), ("objective.advantage",)
_LOSS_OF_GROUPS = ("objective.kind", "objective.loss")
_VLLM = "alignkit samples itself, in the same process"
_PRODUCT = "× gradient_accumulation_steps × processes is the batch"
_WEIGHTS = {"trl.reward_funcs": ["rewards.a", "rewards.b"]}

_MODEL = (
    Field("base_model", sources.base_model("base_model"), example="org/other"),
    Field("trust_remote_code", rules.flag("model.trust_remote_code")),
    Field("bf16", _dtype),
    Field("bfloat16", _dtype),
    Field("fp16", _dtype),
    Field("float16", _dtype),
    Field("float32", _dtype),
    Field("load_in_4bit", _quantized, "nf4, quantized twice", beside=_LORA, quiet=True),
    Field("load_in_8bit", _quantized, beside=_LORA),
    Field(
        "chat_template",
        axolotl_rules.template(),
        "left out, the model's own is used",
        "chatml",
        quiet=True,
    ),
    Field("chat_template_jinja", sources.template_file("chat_template_jinja"), "", "t.jinja"),
    Field("attn_implementation", rules.attention("attn_implementation"), example="eager"),
    Field("tokens", rules.names("model.add_tokens"), example=["<a>"], stages=_SFT),
    Field("sdp_attention", None, "attention is chosen by alignkit"),
    Field("eager_attention", None, "set model.attention: eager"),
    *none("attention is chosen by alignkit", flash_attention=True, xformers_attention=True),
    *none("attention is chosen by alignkit", flex_attention=True, s2_attention=True),
    *none("follows from base_model", model_type="AutoModelForCausalLM", tokenizer_type="x"),
    *none("follows from base_model", tokenizer_config="x", base_model_config="x", num_labels=1),
    *none("follows from base_model", is_llama_derived_model=True, is_mistral_derived_model=True),
    *none("follows from base_model", tokenizer_use_fast=True, tokenizer_legacy=True),
    *none("the newest is taken", revision_of_model="v1"),
    *none("the model's own, and the end of a turn", special_tokens={"pad_token": "x"}),
    *none("the model's own, and the end of a turn", eot_tokens=["x"], default_system_message="x"),
    *none("made where it is needed", resize_token_embeddings_to_32x=True, shrink_embeddings=True),
    *none("the device is found", device="cpu", device_map="auto", max_memory={"a": 1}),
)
_ADAPTER = (
    Field("adapter", axolotl_rules.kind(), "left out, all weights are trained", "lora", quiet=True),
    Field("lora_model_dir", rules.going_on("lora_model_dir"), "", "out/before", _LORA),
    Field("lora_r", rules.whole("adapter.rank"), "", 64, _LORA),
    Field("lora_alpha", rules.number("adapter.alpha"), "", 16, _LORA),
    Field("lora_dropout", rules.dropout(), "", 0.1, _LORA),
    Field("lora_target_modules", _where, "", ["k_proj"], _LORA),
    Field("lora_target_linear", _where, "", True, _LORA),
    Field("lora_modules_to_save", rules.saved_modules(), "", ["lm_head"], _LORA),
    Field("peft_use_dora", rules.flag("adapter.dora"), "", True, _LORA),
    Field("peft_use_rslora", rules.flag("adapter.rslora"), "", True, _LORA),
    Field("peft_init_lora_weights", axolotl_rules.start(), "", "olora", _LORA),
    Field("loraplus_lr_ratio", rules.number("adapter.b_learning_rate"), "", 16, _LORA),
    *none("embeddings have the rate of A", loraplus_lr_embedding=1e-5),
    *none(
        "name modules in adapter.targets", peft_layers_to_transform=[0], lora_fan_in_fan_out=True
    ),
    *none("name modules in adapter.targets", lora_target_parameters=["x"]),
    *none("model.quantization says how", peft={"loftq_config": {}}, bnb_config_kwargs={"a": 1}),
    *none("a quantized file is not a base", gptq=True),
    *none("adapter.freeze names weights that stay", unfrozen_parameters=["x"]),
    *none(_KERNELS, lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True),
    *none(_KERNELS, unsloth_lora_mlp=True, unsloth_lora_qkv=True, unsloth_lora_o=True),
    *none("no such training", relora=True, relora_steps=9, lisa_n_layers=4),
)
_DATA = (
    Field("datasets", sources.entries("datasets", "train"), "", [{"path": "b", "type": "alpaca"}]),
    Field("test_datasets", sources.entries("test_datasets", "eval"), "", [{"path": "org/held"}]),
    Field("val_set_size", sources.held_out_share("val_set_size"), "equal rows stay together", 0.2),
    Field("sequence_len", _cut, "", 99),
    Field("excess_length_strategy", _cut, "what is dropped or cut is counted", "truncate"),
    Field("max_prompt_len", _responses, "prompts are cut from the left", 99, {}, _GROUPS),
    Field("train_on_inputs", axolotl_rules.train_on(), stages=_SFT),
    *none("max_length counts prompt and answer together", max_prompt_len=99),
    *none("rows are always packed, and do not see each other", sample_packing=True),
    *none("rows are always packed, and do not see each other", eval_sample_packing=True),
    *none("rows are always packed, and do not see each other", batch_flattening=True),
    *none("nothing is padded", pad_to_sequence_len=True),
    *none("rows are drawn by the seed", group_by_length=True, curriculum_sampling=True),
    *none("rows are drawn by the seed", shuffle_merged_datasets=True),
    *none("alignkit data clean --drop equal", dataset_exact_deduplication=True),
    *none("tokens are cached by their content", dataset_prepared_path="last_run_prepared"),
    *none(FOUND, dataset_processes=4, dataloader_num_workers=4, dataset_num_proc=4),
    *none(FOUND, dataloader_pin_memory=True, dataloader_prefetch_factor=4),
    *none(
        "sft on rows of text: name them in datasets with type: completion",
        pretraining_dataset="org/text",
    ),
    *none("rows are read whole", streaming=True),
    *none("nothing is uploaded", push_dataset_to_hub="me/rows"),
    *none("rows of any length are read", min_sample_len=4),
    *none("secrets are neither read nor written", hf_use_auth_token=True),
)
_LOSS = (
    *losses.pair_fields("rl", _BETAS, "dpo_label_smoothing", "simpo_gamma", "", "cpo_alpha"),
    Field("rl", _stage, "", "kto", stages=("kto", "grpo")),
    Field("reward_model", _stage, stages=("reward",)),
    Field("rl_beta", _pull, "", 0.5, {}, _KTO),
    Field("rl_beta", _price, "", 0.5, {}, _GROUPS),
    Field("trl.beta", _pull, "", 0.5, {}, _KTO),
    Field("trl.beta", _price, "", 0.5, {}, _GROUPS),
    Field("kto_desirable_weight", rules.number("objective.desirable_weight"), "", 1.3, {}, _KTO),
    Field("kto_undesirable_weight", rules.number("objective.undesirable_weight"), "", 2, {}, _KTO),
    Field(
        "center_rewards_coefficient",
        losses.centering("center_rewards_coefficient"),
        "alignkit's own default is 0.01",
        0.02,
        quiet=True,
        stages=("reward",),
    ),
    *none("no likelihood beside the loss; orpo has one", rpo_alpha=1.0, cpo_alpha=1.0),
    *none("pairs count alike", dpo_use_weighting=True),
    *none("rl names the loss", dpo_loss_type=["sigmoid", "sft"], dpo_loss_weights=[1.0, 0.5]),
    *none("ipo has per_token", dpo_norm_loss=True),
    *none(FOUND, dpo_use_logits_to_keep=True, dpo_padding_free=True),
    *none("set reference: {kind: cached}", precompute_ref_log_probs=True),
    *none("rewards of steps have no stage", process_reward_model=True),
)
_SAMPLING = (
    Field("micro_batch_size", _groups, "counts responses", 16, {}, _GROUPS, (), _PROMPTS, True),
    Field("gradient_accumulation_steps", _groups, "", 2, {}, _GROUPS, gives=_PROMPTS),
    Field("trl.num_generations", _groups, "", 4, {}, _GROUPS),
    Field("trl.max_completion_length", _responses, "", 99, {}, _GROUPS),
    Field("trl.temperature", rules.number("rollout.temperature"), "", 0.9, {}, _GROUPS),
    Field("trl.epsilon", _loss, "", 0.3, {}, _GROUPS, gives=_CLIP),
    Field("trl.epsilon_high", _loss, "", 0.3, {}, _GROUPS, gives=_CLIP),
    Field("trl.loss_type", _loss, "", "dr_grpo", {}, _GROUPS, gives=_LOSS_OF_GROUPS),
    Field("trl.scale_rewards", _loss, "", False, {}, _GROUPS, gives=_ADVANTAGE),
    Field("trl.num_iterations", rules.whole("objective.epochs"), "", 2, {}, _GROUPS),
    Field("trl.reward_funcs", _rewards, "", ["rewards.other"], {}, _GROUPS),
    Field("trl.reward_weights", _rewards, "", [0.5, 2.0], _WEIGHTS, _GROUPS),
    Field("trl.top_p", None, _SAMPLED, 0.9, fine=(1.0,)),
    Field("trl.top_k", None, _SAMPLED, 40, fine=(0, -1)),
    *(Field(f"trl.{key}", None, _SAMPLED, 0.2) for key in ("min_p", "repetition_penalty")),
    *(Field(f"trl.{key}", None, _VLLM) for key in ("use_vllm", "vllm_device", "vllm_dtype")),
    *(Field(f"trl.vllm_{key}", None, _VLLM) for key in ("server_host", "server_port", "mode")),
    *none(_VLLM, vllm={"port": 8000}),
    Field("trl.vllm_gpu_memory_utilization", None, _VLLM, 0.8),
    Field("trl.log_completions", None, "samples.jsonl has them"),
    Field("trl.sync_ref_model", None, "the reference stays the model at the start"),
    Field("trl.ref_model_mixup_alpha", None, "the reference stays the model at the start", 0.5),
    Field("trl.ref_model_sync_steps", None, "the reference stays the model at the start", 9),
)
_TRAINING = (
    Field("output_dir", rules.text("output"), "", "runs/other"),
    Field("seed", rules.whole("seed"), "", 7),
    Field("micro_batch_size", _batch, _PRODUCT, 3, {}, SUPERVISED, quiet=True),
    Field("gradient_accumulation_steps", _batch, "", 3, {}, SUPERVISED),
    Field("batch_size", _batch, "", 24, {}, SUPERVISED),
    Field("learning_rate", rules.number("training.learning_rate"), "", 3e-4),
    Field("num_epochs", rules.number("training.epochs"), "", 5),
    Field("max_steps", rules.positive("training.max_steps"), "", 60),
    Field("lr_scheduler", _schedule, "", "linear", gives=("training.schedule",)),
    Field("cosine_min_lr_ratio", _schedule, "", 0.2),
    Field("lr_scheduler_kwargs", _schedule, "", {"min_lr_rate": 0.2}, _FLOOR, gives=_OPTIONS),
    Field("warmup_steps", _warmup, "", 20),
    Field("warmup_ratio", _warmup, "", 0.2),
    Field("weight_decay", rules.number("training.weight_decay"), "", 0.1),
    Field("max_grad_norm", rules.clipping("max_grad_norm"), "", 0.3),
    Field("optimizer", _optimizer, "", "adamw_bnb_8bit"),
    *(Field(beta, _optimizer, "", 0.5, gives=("training.betas",)) for beta in optimizing.BETAS),
    optimizing.ADAM,
    Field("gradient_checkpointing", rules.checkpointing("gradient_checkpointing")),
    Field("logging_steps", rules.positive("training.log_every"), "", 20),
    Field("eval_steps", _eval, "", 20),
    Field("eval_strategy", _eval, "", "no", {"eval_steps": 30}),
    Field("save_steps", _save, "", 20),
    Field("save_strategy", _save, "", "no", {"save_steps": 30}),
    Field("save_total_limit", rules.positive("training.keep"), "", 5),
    *(Field(f"use_{name}", _tracked) for name in ("wandb", "mlflow", "tensorboard", "trackio")),
    Field("wandb_project", _tracked, "the project is the tracker's own setting", "mine"),
    *none("counted in steps: set training.eval_every", evals_per_epoch=2),
    *none("counted in steps: set training.save_every", saves_per_epoch=2),
    *none("no option of an optimizer", optim_args="a=1", optim_target_modules=["x"], lr_groups=[1]),
    *none("no option of a schedule", cosine_constant_lr_ratio=0.1, lr_quadratic_warmup=True),
    *none("all trained weights have one rate", embedding_lr=1e-5, embedding_lr_scale=0.5),
    *none("no noise is added to embeddings", neftune_noise_alpha=5),
    *none("a loss that is not finite stops the run", loss_watchdog_threshold=5.0),
    *none("a loss that is not finite stops the run", loss_watchdog_patience=3),
    Field("load_best_model_at_end", _best, "", True, _HELD),
    Field("metric_for_best_model", _best, "", "accuracy", _HELD | {"load_best_model_at_end": True}),
    Field("early_stopping_patience", _best, "", 3, _HELD),
    *none("known of each metric", greater_is_better=True),
    *none("alignkit does not use DeepSpeed; see docs/gpu.md", deepspeed="ds.json"),
    *none(_MANY, fsdp=["full_shard"], fsdp_config={"a": 1}, ddp_timeout=9, ddp=True),
    *none(_MANY, ddp_find_unused_parameters=True, sequence_parallel_degree=2, use_ray=True),
    *none(_MANY, context_parallel_size=2, tensor_parallel_size=2, fsdp_version=2, local_rank=1),
    *none(_KERNELS, tf32=True, torch_compile=True, plugins=["x"], liger_rope=True),
    *none(_KERNELS, liger_rms_norm=True, liger_glu_activation=True, liger_swiglu=True),
    *none(_KERNELS, liger_fused_linear_cross_entropy=True, liger_layer_norm=True),
    *none(_KERNELS, flash_attn_cross_entropy=True, flash_attn_rms_norm=True),
    *none(_KERNELS, unsloth_cross_entropy_loss=True, cut_cross_entropy=True, fp8=True),
    *none(FOUND, eval_batch_size=4, auto_find_batch_size=True, gc_steps=9),
    *none(FOUND, gradient_checkpointing_kwargs={"a": 1}, activation_offloading=True),
    *none("alignkit … --resume goes on from the newest checkpoint", resume_from_checkpoint="x"),
    *none("alignkit … --resume goes on", auto_resume_from_checkpoints=True, save_only_model=True),
    *none("nothing is uploaded", hub_model_id="me/it", hub_strategy="end", hub_revision="x"),
    *none("held-out rows give loss and accuracy", eval_table_size=5, eval_max_new_tokens=9),
    *none("held-out rows give loss and accuracy", do_bench_eval=True, eval_sample_size=3),
    *none(_NAMES, wandb_name="mine", wandb_run_id="mine", mlflow_run_name="mine"),
    *none("the tracker's own setting", wandb_entity="me", wandb_watch="x", wandb_log_model="end"),
    *none("the tracker's own setting", mlflow_tracking_uri="x", mlflow_experiment_name="x"),
    *none("the tracker's own setting", wandb_mode="offline"),
    *none("trackers are wandb, mlflow, tensorboard and trackio", use_comet=True),
    *none("secrets are neither read nor written", comet_api_key="sk-secret", wandb_api_key="x"),
    *none("merged/ is always written as safetensors", save_safetensors=True, merge_lora=True),
    *none("unknown keys are always refused", strict=True, debug=True, save_first_step=True),
)

AXOLOTL = Toolkit(
    name="axolotl",
    title="Axolotl",
    table=(*_MODEL, *_ADAPTER, *_DATA, *_LOSS, *_SAMPLING, *_TRAINING, *rare.AXOLOTL),
    defaults=_defaults,
    stage_of=axolotl_rules.stage_of,
    trains_all=axolotl_rules.trains_all,
    always=(
        "the answer and the token that ends it are found in the chat template, whatever it is",
        "a key that is misspelt is an error here; there it is ignored",
    ),
    needed={
        "model.base": "base_model",
        "data.train": "datasets",
        "reward": "trl.reward_funcs",
    },
    nested=("trl",),
)
"""Axolotl."""
