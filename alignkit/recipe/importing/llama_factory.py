"""LLaMA-Factory 0.9: how its files are read, and its defaults."""

from __future__ import annotations

from alignkit.recipe.importing import llama_factory_rules as own
from alignkit.recipe.importing import losses, rare, rules, sampling, sources
from alignkit.recipe.importing.fields import Field, Foreign, Settings, Toolkit
from alignkit.recipe.importing.trainer import BEST, EVALUATED, FOUND, TRAINER, none

_MICRO, _TIMES = "per_device_train_batch_size", "gradient_accumulation_steps"


def _defaults(foreign: Foreign) -> Settings:
    return {
        "stage": "sft",
        "finetuning_type": "lora",
        "num_train_epochs": 3.0,
        _MICRO: 8,
        _TIMES: 1,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "seed": 42,
        "lora_rank": 8,
        "lora_alpha": 2 * foreign.whole("lora_rank") if "lora_rank" in foreign else 16,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "dataset_dir": "data",
        "pref_loss": "sigmoid",
        "pref_beta": 0.1,
        "simpo_gamma": 0.5,
        "ppo_buffer_size": 1,
        "ppo_epochs": 4,
        "ppo_target": 6.0,
        "max_new_tokens": 1024,
        "temperature": 0.95,
    }


_data = sources.llama_factory_data("dataset", "train")
_masks, _added, _steps = own.train_on(), own.tokens(), own.ppo()
_dtype = rules.precision("compute_dtype")
_init = own.start()
_rewards = sampling.rewards("", "", "reward_model")
_PPO, _KTO = ("ppo",), ("kto",)
_PROMPTS = ("rollout.prompts_per_step",)
_RANK = ("adapter.rank", "adapter.alpha")
_IMAGES = "alignkit trains on text"

_MODEL = (
    Field("model_name_or_path", sources.base_model("model_name_or_path"), example="org/other"),
    Field("adapter_name_or_path", rules.going_on("adapter_name_or_path"), "", "saves/before"),
    Field("trust_remote_code", rules.flag("model.trust_remote_code")),
    Field("bf16", _dtype),
    Field("fp16", _dtype),
    Field("pure_bf16", None, "trained weights are float32; model.dtype: bfloat16 computes in it"),
    Field("quantization_bit", own.bits(), example=4),
    Field("quantization_method", None, "nf4 or int8", "hqq", fine=("bnb", "bitsandbytes")),
    Field("quantization_type", None, "4 bits are nf4", "fp4", fine=("nf4",)),
    Field("double_quantization", None, "4 bits are always quantized twice", False, fine=(True,)),
    Field("flash_attn", rules.attention("flash_attn"), example="sdpa"),
    Field("template", own.template(), "the model's own chat template is used", "llama3"),
    Field("rope_scaling", own.rope(), "", "linear"),
    Field("add_tokens", _added, "", "<a>,<b>"),
    Field("add_special_tokens", _added, "", "<a>,<b>"),
    *none("made where it is needed", resize_vocab=True, upcast_layernorm=True),
    *none("the newest is taken", model_revision="v1"),
    *none("alignkit has its own kernels", use_unsloth=True, enable_liger_kernel=True),
    *none("alignkit has its own kernels", use_unsloth_gc=True, shift_attn=True, use_kv_cache=True),
    *none("set ALIGNKIT_HOME, or HF_HOME", cache_dir="cache"),
    *none("secrets are neither read nor written", hf_hub_token="x", ms_hub_token="y"),
    *none("no such training", mixture_of_depths="convert", train_from_scratch=True),
    *none("experts' balance is not part of the loss", moe_aux_loss_coef=0.1),
    *none(_IMAGES, image_max_pixels=99, video_max_pixels=99, freeze_vision_tower=True),
    *none(_IMAGES, freeze_multi_modal_projector=True, media_dir="media", image_min_pixels=9),
)
_ADAPTER = (
    Field("finetuning_type", own.kind(), example="full"),
    Field("lora_rank", rules.whole("adapter.rank"), example=64, gives=_RANK),
    Field("lora_alpha", rules.number("adapter.alpha"), example=8),
    Field("lora_dropout", rules.dropout(), example=0.1),
    Field("lora_target", rules.targets("lora_target", ("all",)), example="q_proj,v_proj"),
    Field("additional_target", rules.saved_modules(), example="lm_head"),
    Field("use_rslora", rules.flag("adapter.rslora")),
    Field("use_dora", rules.flag("adapter.dora")),
    Field("pissa_init", _init),
    Field("pissa_iter", _init, example=-1, beside={"pissa_init": True}),
    Field("loraplus_lr_ratio", rules.number("adapter.b_learning_rate"), example=16),
    *none("embeddings have the rate of A", loraplus_lr_embedding=1e-5),
    *none("the written adapter is what was trained", pissa_convert=True),
    *none("merge it first with alignkit merge-lora", create_new_adapter=True),
    *none(
        "adapter.freeze names weights", freeze_trainable_layers=2, freeze_trainable_modules="all"
    ),
    *none("adapter.freeze names weights", freeze_extra_modules="a"),
    *none("adapters are lora, ia3 and prefix", oft_rank=8, oft_block_size=32, oft_target="all"),
    *none("the optimizer is AdamW", use_galore=True, use_apollo=True, use_badam=True),
    *none("the optimizer is AdamW", use_muon=True, use_adam_mini=True, galore_rank=8),
)
_DATA = (
    Field("dataset_dir", _data, "has dataset_info.json", "other", quiet=True),
    Field("dataset", _data, "", "more"),
    Field("max_samples", _data, "of each dataset, from the start", 9, quiet=True),
    Field("eval_dataset", sources.llama_factory_data("eval_dataset", "eval"), "", "more"),
    Field("val_size", sources.held_out_share("val_size"), "equal rows stay together", 0.2),
    Field("cutoff_len", own.cut(), "cut from the right, and counted; drop leaves them out", 99),
    Field("train_on_prompt", _masks, stages=("sft",)),
    Field("mask_history", _masks, stages=("sft",)),
    *none("rows are always packed, and do not see each other", packing=True, neat_packing=True),
    *none("set weight in each source", mix_strategy="x", interleave_probs="0.5,0.5"),
    *none(FOUND, preprocessing_num_workers=4, preprocessing_batch_size=9, overwrite_cache=True),
    *none("tokens are cached by their content", tokenized_path="cache"),
    *none("rows are read whole", streaming=True, buffer_size=99),
    *none("the chat template writes tools", tool_format="qwen"),
    *none("all held-out rows are scored together", eval_on_each_dataset=True),
    *none("padding is never trained", ignore_pad_token_for_loss=True),
    *none("rows are drawn anew each epoch", disable_shuffling=True),
)
_LOSS = (
    *losses.pair_fields("pref_loss", ("pref_beta",), "dpo_label_smoothing", "simpo_gamma"),
    Field("pref_beta", rules.number("objective.beta"), "", 0.5, {}, _KTO),
    Field("kto_chosen_weight", rules.number("objective.desirable_weight"), "", 1.3, {}, _KTO),
    Field("kto_rejected_weight", rules.number("objective.undesirable_weight"), "", 2, {}, _KTO),
    Field("reward_model", _rewards, "a run of `alignkit reward`", "runs/rm", {}, _PPO, quiet=True),
    *none("no likelihood beside the loss; orpo has one", pref_ftx=0.1, pref_bco_weight=0.1),
    *none("all tokens of an answer count alike", ld_alpha=0.5),
    *none("the reference is the model at the start", ref_model="org/ref"),
    *none("the reference is the model at the start", ref_model_adapters="saves/a"),
    *none("the reference is the model at the start", ref_model_quantization_bit=4),
    *none("a run says what its reward model is", reward_model_adapters="saves/a"),
    *none("a run says what its reward model is", reward_model_type="full"),
    *none("a run says what its reward model is", reward_model_quantization_bit=4),
    *none("cross entropy, or a custom objective", use_dft_loss=True, use_asft_loss=True),
)
_SAMPLING = (
    Field(_MICRO, _steps, "", 16, {}, _PPO, gives=_PROMPTS),
    Field(_TIMES, _steps, "", 2, {}, _PPO, gives=_PROMPTS),
    Field("ppo_buffer_size", _steps, "", 2, {}, _PPO, gives=(*_PROMPTS, "objective.minibatches")),
    Field("ppo_epochs", rules.whole("objective.epochs"), "", 2, {}, _PPO),
    Field("ppo_target", rules.number("objective.kl_target"), "", 3.0, {}, _PPO),
    Field("max_new_tokens", rules.whole("rollout.max_new_tokens"), "", 99, {}, _PPO),
    Field("temperature", rules.number("rollout.temperature"), "", 0.8, {}, _PPO),
    *none("sampling is from the unchanged policy", top_k=9, top_p=0.5, repetition_penalty=1.2),
    *none("advantages are whitened, rewards are not", ppo_score_norm=True, ppo_whiten_rewards=True),
)
_OTHER = (
    *rare.LLAMA_FACTORY,
    *none("the numbers are in metrics.jsonl; training.trackers draws curves", plot_loss=True),
    *none("held-out rows give accuracy", compute_accuracy=True, predict_with_generate=True),
    *none("alignkit generate and chat", infer_backend="vllm", infer_dtype="auto", do_sample=True),
    Field("early_stopping_steps", BEST, "", 3, EVALUATED),
    *none("trackers are tensorboard, wandb, mlflow and trackio", use_swanlab=True),
    *none("trackers are tensorboard, wandb, mlflow and trackio", swanlab_project="mine"),
    *none("secrets are neither read nor written", swanlab_api_key="sk-secret"),
    *none("every run ends with merged/", export_dir="out", export_size=5, export_device="cpu"),
    *none("see docs/gpu.md", ray_run_name="mine", ray_num_workers=2, fp8=True),
    *none("metrics.jsonl has them", include_effective_tokens_per_second=True),
    Field("disable_gradient_checkpointing", None, "left out, it is used where memory is short"),
)


_STAGE = Field(
    "stage",
    rules.stage(),
    "pt is sft on rows of text",
    "dpo",
    quiet=True,
)

LLAMA_FACTORY = Toolkit(
    name="llama-factory",
    title="LLaMA-Factory",
    table=(
        _STAGE,
        *_MODEL,
        *_ADAPTER,
        *_DATA,
        *_LOSS,
        *_SAMPLING,
        *TRAINER,
        *_OTHER,
    ),
    defaults=_defaults,
    stage_of=own.stage_of,
    trains_all=lambda foreign: foreign.text("finetuning_type") not in ("", "lora"),
    always=(
        "the answer and the token that ends it are found in the chat template, whatever it is",
    ),
    needed={
        "model.base": "model_name_or_path",
        "data.train": "dataset",
        "reward": "reward_model",
    },
)
"""LLaMA-Factory."""
