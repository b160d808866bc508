"""TRL 1.16: how its files and command lines are read, and its defaults."""

from __future__ import annotations

from alignkit.recipe.importing import losses, rare, rules, sampling, sources
from alignkit.recipe.importing.fields import Field, Foreign, Rule, Settings, Toolkit
from alignkit.recipe.importing.locating.columns import first_keys
from alignkit.recipe.importing.trainer import FOUND, SUPERVISED, TRAINER, none

_STAGES = {
    **{name: name for name in ("sft", "reward", "dpo", "kto", "grpo")},
    "reward_modeling": "reward",
    "rloo": "grpo",
    "cpo": "dpo",
    "orpo": "dpo",
}
_RATES = {"sft": 2e-5, "reward": 1e-4, "dpo": 1e-6, "kto": 1e-6, "grpo": 1e-6}
_COMMON: Settings = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "seed": 42,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "beta": 0.1,
}
_GRPO: Settings = {
    "num_generations": 8,
    "max_completion_length": 512,
    "beta": 0.0,
    "epsilon": 0.2,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "temperature": 1.0,
}


def _defaults(foreign: Foreign) -> Settings:
    own: Settings = {"learning_rate": _RATES[foreign.stage]}
    if foreign.stage == "grpo":
        own |= _GRPO
        if foreign.script == "rloo":
            own |= {"num_generations": 2, "beta": 0.05}
    if foreign.stage == "dpo":
        own |= {"loss_type": "sigmoid", "simpo_gamma": 0.5, "cpo_alpha": 1.0}
    if foreign.script in ("cpo", "orpo"):
        own |= {"loss_type": foreign.script}
    return _COMMON | own


def _lengths() -> Rule:
    def run(foreign: Foreign, _: str) -> Settings:
        keeps_end = foreign.text("truncation_mode") == "keep_end"
        how = "truncate_left" if keeps_end else "truncate_right"
        how = "drop" if foreign.stage == "reward" else how
        return {"data.max_length": foreign.whole("max_length"), "data.too_long": how}

    return Rule(("data.max_length", "data.too_long"), run)


def _train_on() -> Rule:
    def run(foreign: Foreign, _: str) -> Settings:
        completion = foreign.get("completion_only_loss")
        if foreign.flag("assistant_only_loss") or foreign.flag("completion_only_loss"):
            return {"data.train_on": "completions"}
        keys = first_keys(foreign)
        if completion is None and keys is not None and {"prompt", "completion"} <= keys:
            return {"data.train_on": "completions"}
        if completion is None and keys is None:
            foreign.differ(
                "",
                "the columns of the rows are not known here. Of rows of prompt and completion TRL "
                "trains the completion alone: if these are such, set data.train_on: completions",
            )
        foreign.differ(
            "",
            "TRL trains every token of messages and of text. For the answers alone, as it does "
            "for rows of prompt and completion, set data.train_on: completions",
        )
        return {"data.train_on": "everything"}

    return Rule(("data.train_on",), run)


def _kind() -> Rule:
    def run(foreign: Foreign, _: str) -> Settings:
        return {"adapter.kind": "lora" if foreign.flag("use_peft") else "full"}

    return Rule(("adapter.kind",), run)


def _quantization() -> Rule:
    def run(foreign: Foreign, _: str) -> Settings:
        if foreign.flag("load_in_4bit"):
            return {"model.quantization": "nf4"}
        return {"model.quantization": "int8"} if foreign.flag("load_in_8bit") else {}

    return Rule(("model.quantization",), run)


def _cached() -> Rule:
    def run(foreign: Foreign, key: str) -> Settings:
        return {"reference.kind": "cached"} if foreign.flag(key) else {}

    return Rule(("reference.kind",), run)


_MICRO, _TIMES = "per_device_train_batch_size", "gradient_accumulation_steps"
_data, _cut, _masks, _quantized = sources.named_dataset(), _lengths(), _train_on(), _quantization()
_groups = sampling.groups(_MICRO, _TIMES, "num_generations")
_loss = sampling.group_loss("loss_type", "scale_rewards", "epsilon", "epsilon_high")
_rewards = sampling.rewards("reward_funcs", "reward_weights", "reward_model_name_or_path")
_dtype = rules.precision("dtype", "torch_dtype")
_overlong = sampling.overlong("mask_truncated_completions")
_responses = sampling.responses("max_completion_length", "max_prompt_length")

_PEFT = {"use_peft": True}
_ROWS = {"dataset_name": "org/more"}
_EVALUATED = _ROWS | {"eval_strategy": "steps"}
_TARGETS = rules.targets("lora_target_modules", ("all-linear",))
_WEIGHTS = {"reward_funcs": ["rewards.a", "rewards.b"]}
_SFT, _PAIRS, _GROUPS = ("sft",), ("dpo",), ("grpo",)
_SAMPLED = "sampling is from the unchanged policy"
_PROMPTS, _NLL = ("rollout.prompts_per_step",), "cpo_alpha"
_CLIP, _ADVANTAGE = ("objective.clip",), ("objective.advantage",)
_LOSS_OF_GROUPS = ("objective.kind", "objective.loss")
_VLLM = "alignkit samples itself, in the same process"

_MODEL = (
    Field("model_name_or_path", sources.base_model("model_name_or_path"), example="org/other"),
    Field("dtype", _dtype, example="bfloat16"),
    Field("torch_dtype", _dtype, example="float16"),
    Field("bf16", _dtype),
    Field("fp16", _dtype),
    Field("trust_remote_code", rules.flag("model.trust_remote_code")),
    Field("attn_implementation", rules.attention("attn_implementation"), example="eager"),
    Field("chat_template_path", sources.template_file("chat_template_path"), example="t.jinja"),
    Field("load_in_4bit", _quantized, "nf4, quantized twice", beside=_PEFT, quiet=True),
    Field("load_in_8bit", _quantized, beside=_PEFT),
    Field("model_revision", None, "the newest is taken", "v1", fine=("main",)),
    Field("bnb_4bit_quant_type", None, "4 bits are nf4", "fp4", fine=("nf4",)),
    Field("use_bnb_nested_quant", None, "4 bits are always quantized twice", False, fine=(True,)),
    *none("has no meaning here", bnb_4bit_quant_storage="uint8", model_init_kwargs={"a": 1}),
    *none("the model's own, and the end of a turn", eos_token="</s>"),
    *none("experts' balance is not part of the loss", router_aux_loss_coef=0.1),
)
_ADAPTER = (
    Field("use_peft", _kind()),
    Field("lora_r", rules.whole("adapter.rank"), example=64, beside=_PEFT),
    Field("lora_alpha", rules.number("adapter.alpha"), example=8, beside=_PEFT),
    Field("lora_dropout", rules.dropout(), example=0.1, beside=_PEFT),
    Field("lora_target_modules", _TARGETS, example=["k_proj"], beside=_PEFT),
    Field("lora_modules_to_save", rules.saved_modules(), example=["lm_head"], beside=_PEFT),
    Field("use_rslora", rules.flag("adapter.rslora"), beside=_PEFT),
    Field("use_dora", rules.flag("adapter.dora"), beside=_PEFT),
    *none("name the modules of experts in adapter.targets", lora_target_parameters=["x"]),
    *none("follows from the stage", lora_task_type="SEQ_CLS"),
)
_DATA = (
    Field("dataset_name", _data, example="org/more"),
    Field("dataset_config", _data, example="subset", beside=_ROWS),
    Field("dataset_train_split", _data, example="train_sft", beside=_ROWS),
    Field("dataset_test_split", _data, example="held", beside=_EVALUATED),
    Field("datasets", sources.entries("datasets", "train"), example=[{"path": "org/more"}]),
    Field("dataset_text_field", sources.text_column("dataset_text_field"), "", "body", {}, _SFT),
    Field(
        "max_length",
        _cut,
        "rows are cut as there, and counted; drop leaves them out",
        99,
        {},
        SUPERVISED,
    ),
    Field("truncation_mode", _cut, "", "keep_end", {}, ("sft", "dpo", "kto")),
    Field("max_prompt_length", _responses, "prompts are cut from the left", 99, {}, _GROUPS),
    *none("max_length counts prompt and answer together", max_prompt_length=99),
    Field("completion_only_loss", _masks, stages=_SFT),
    Field("assistant_only_loss", _masks, stages=_SFT),
    *none("rows are read whole, and their tokens cached", dataset_streaming=True),
    *none(FOUND, dataset_num_proc=4),
    *none("see docs/data.md", dataset_kwargs={"a": 1}, chat_template_kwargs={"a": 1}),
    *none("rows are always packed, whole, and do not see each other", packing=True),
    *none("rows are always packed, whole", packing_strategy="wrapped", eval_packing=True),
    *none("nothing is padded", padding_free=True, pad_to_multiple_of=8, pad_token="<pad>"),
    Field("shuffle_dataset", None, "rows are drawn anew each epoch", False, fine=(True,)),
    *none("reward functions get all columns", remove_unused_columns=True),
)
_LOSS = (
    *losses.pair_fields("loss_type", ("beta",), "label_smoothing", "simpo_gamma", _NLL, _NLL),
    Field("loss_type", _loss, "", "dr_grpo", {}, _GROUPS, gives=_LOSS_OF_GROUPS),
    Field("loss_type", None, "the loss of the stage", "dft", fine=("nll", "kto")),
    Field("beta", rules.number("objective.beta"), "", 0.5, {}, ("kto",)),
    Field("beta", rules.number("objective.kl_coef"), "", 0.5, {}, _GROUPS),
    *none("one loss a run", loss_weights=[1.0, 0.5]),
    *none("no likelihood beside the loss; orpo and cpo have one", rpo_alpha=1.0),
    *none("all tokens of an answer count alike", ld_alpha=0.5),
    Field("f_divergence_type", None, "reverse KL", "js_divergence", fine=("reverse_kl",)),
    *none("pairs count alike", use_weighting=True),
    *none("the reference stays the model at the start", sync_ref_model=True),
    *none("the reference stays the model at the start", ref_model_sync_steps=9),
    *none("the reference stays the model at the start", ref_model_mixup_alpha=0.5),
    Field("precompute_ref_log_probs", _cached(), stages=("dpo", "kto")),
    Field("desirable_weight", rules.number("objective.desirable_weight"), "", 1.3, {}, ("kto",)),
    Field("undesirable_weight", rules.number("objective.undesirable_weight"), "", 2, {}, ("kto",)),
    Field(
        "center_rewards_coefficient",
        losses.centering("center_rewards_coefficient"),
        "alignkit's own default is 0.01",
        0.02,
        quiet=True,
        stages=("reward",),
    ),
    Field("disable_dropout", None, "a model's own dropout is off", False, fine=(True,)),
)
_SAMPLING = (
    Field(_MICRO, _groups, "counts responses", 16, {}, _GROUPS, gives=_PROMPTS, quiet=True),
    Field(_TIMES, _groups, "", 2, {}, _GROUPS, gives=_PROMPTS),
    Field("num_generations", _groups, "", 4, {}, _GROUPS),
    Field("generation_batch_size", _groups, "", 16, {}, _GROUPS),
    Field("steps_per_generation", _groups, "", 4, {}, _GROUPS),
    Field("max_completion_length", _responses, "", 99, {}, _GROUPS),
    Field("temperature", rules.number("rollout.temperature"), "", 0.9, {}, _GROUPS),
    Field("epsilon", _loss, "", 0.3, {}, _GROUPS, gives=_CLIP),
    Field("epsilon_high", _loss, "", 0.3, {}, _GROUPS, gives=_CLIP),
    Field("scale_rewards", _loss, "", "batch", {}, _GROUPS, gives=_ADVANTAGE),
    Field("delta", rules.number("objective.dual_clip"), "", 4.0, {}, _GROUPS),
    Field("num_iterations", rules.whole("objective.epochs"), "", 2, {}, _GROUPS),
    Field("importance_sampling_level", rules.text("objective.ratio"), "", "sequence", {}, _GROUPS),
    Field(
        "mask_truncated_completions",
        sampling.overlong("mask_truncated_completions"),
        stages=_GROUPS,
    ),
    Field("reward_funcs", _rewards, "", ["rewards.other"], {}, _GROUPS),
    Field("reward_weights", _rewards, "", [0.5, 2.0], _WEIGHTS, _GROUPS),
    Field("reward_model_name_or_path", _rewards, "", "runs/rm", {}, _GROUPS),
    Field("top_p", None, _SAMPLED, 0.9, fine=(1.0,)),
    Field("top_k", None, _SAMPLED, 40, fine=(0, -1)),
    Field("repetition_penalty", None, _SAMPLED, 1.2, fine=(1.0,)),
    *none(_SAMPLED, min_p=0.1, generation_kwargs={"a": 1}),
    *none("all tokens count alike", top_entropy_quantile=0.2, entropy_coef=0.1),
    *none("leave_one_out is rloo's advantage", normalize_advantages=True),
    *none("rewards are used as they are", reward_clip_range=[-1, 1]),
    *none("rewards are added up by weight", multi_objective_aggregation="normalize_then_sum"),
    *none(_VLLM, use_vllm=True, vllm_mode="server", vllm_gpu_memory_utilization=0.4),
    *none(_VLLM, vllm_server_host="localhost", vllm_server_port=8001),
    *none(_VLLM, vllm_tensor_parallel_size=2, vllm_importance_sampling_correction=True),
    *none("samples.jsonl has them", log_completions=True, num_completions_to_print=4),
)

TRL = Toolkit(
    name="trl",
    title="TRL",
    table=(*_MODEL, *_ADAPTER, *_DATA, *_LOSS, *_SAMPLING, *TRAINER, *rare.TRL),
    defaults=_defaults,
    stage_of=lambda foreign: _STAGES.get(foreign.script),
    trains_all=lambda foreign: not foreign.flag("use_peft"),
    always=(
        "the answer and the token that ends it are found in the chat template, whatever it is",
    ),
    needed={
        "model.base": "model_name_or_path",
        "data.train": "dataset_name",
        "reward": "reward_funcs",
    },
)
"""TRL."""
