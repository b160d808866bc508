"""Rules of LLaMA-Factory's keys that no other toolkit has."""

from __future__ import annotations

from alignkit.recipe.importing.fields import Foreign, Rule, Settings

_STAGES = {"pt": "sft", "sft": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo", "kto": "kto"}
_MICRO, _TIMES = "per_device_train_batch_size", "gradient_accumulation_steps"
_SHIPPED = {
    **{name: name for name in ("chatml", "llama3", "mistral", "gemma", "qwen")},
    "qwen3": "qwen",
    "gemma2": "gemma",
    "gemma3": "gemma",
}
"""Their templates -> alignkit's of the same form."""


def stage_of(foreign: Foreign) -> str:
    """The recipe's stage.

    Raises:
        RecipeError: LLaMA-Factory has no such stage.
    """
    stage = foreign.text("stage") or "sft"
    if stage not in _STAGES:
        foreign.wrong("stage", "names no stage", f"known: {', '.join(_STAGES)}")
    return _STAGES[stage]


def kind() -> Rule:
    """The kind of adapter."""

    def run(foreign: Foreign, key: str) -> Settings:
        kind = foreign.text(key)
        if kind not in ("lora", "full"):
            foreign.lose(key, "lora or full: all weights are trained; adapter.freeze names others")
        return {"adapter.kind": "lora" if kind == "lora" else "full"}

    return Rule(("adapter.kind",), run)


def start() -> Rule:
    """Where LoRA starts."""

    def run(foreign: Foreign, _: str) -> Settings:
        if not foreign.flag("pissa_init"):
            return {}
        iterations = foreign.get("pissa_iter")
        if foreign.stage == "ppo":
            foreign.lose("pissa_init", "not where a policy samples")
            return {}
        return {"adapter.init": "pissa" if iterations == -1 else "pissa_niter_16"}

    return Rule(("adapter.init",), run)


def bits() -> Rule:
    """How the base is stored."""

    def run(foreign: Foreign, key: str) -> Settings:
        if foreign.get(key) is None:
            return {}
        bits = foreign.whole(key)
        if bits not in (4, 8):
            foreign.lose(key, "a base is stored in 4 or 8 bits: nf4 or int8")
            return {}
        return {"model.quantization": "nf4" if bits == 4 else "int8"}

    return Rule(("model.quantization",), run)


def template() -> Rule:
    """Their templates: the model's own is used, and the one of the same form is named."""

    def run(foreign: Foreign, key: str) -> Settings:
        name = foreign.text(key)
        if name:
            shipped = _SHIPPED.get(name.removesuffix("_nothink"))
            own = f"set model.chat_template: {shipped}" if shipped else "name a template file"
            foreign.differ(key, f"the model's own chat template is used; if it has none, {own}")
        return {}

    return Rule((), run)


def cut() -> Rule:
    """Longest row, and what happens to longer ones."""

    def run(foreign: Foreign, key: str) -> Settings:
        return {"data.max_length": foreign.whole(key), "data.too_long": "truncate_right"}

    return Rule(("data.max_length", "data.too_long"), run)


def train_on() -> Rule:
    """The tokens that carry loss."""

    def run(foreign: Foreign, _: str) -> Settings:
        if foreign.text("stage") == "pt":
            foreign.differ("stage", "texts are trained whole, one by one, not cut into blocks")
            return {"data.train_on": "everything"}
        if foreign.flag("train_on_prompt"):
            return {"data.train_on": "everything"}
        return {"data.train_on": "last_turn"} if foreign.flag("mask_history") else {}

    return Rule(("data.train_on",), run)


def tokens() -> Rule:
    """Texts that become tokens."""

    def run(foreign: Foreign, _: str) -> Settings:
        added = [
            name for key in ("add_tokens", "add_special_tokens") for name in foreign.names(key)
        ]
        return {"model.add_tokens": added} if added else {}

    return Rule(("model.add_tokens",), run)


def rope() -> Rule:
    """Longer context."""

    def run(foreign: Foreign, key: str) -> Settings:
        kind = foreign.text(key)
        if kind not in ("linear", "dynamic", "yarn"):
            foreign.lose(key, "kinds are linear, dynamic and yarn")
            return {}
        foreign.differ(key, "the factor is not in the file: 2.0 is written, set what you need")
        return {"model.rope_scaling": {"kind": kind, "factor": 2.0}}

    return Rule(("model.rope_scaling",), run)


def ppo() -> Rule:
    """A step of PPO, and what LLaMA-Factory's does that alignkit's does not by default."""

    def run(foreign: Foreign, _: str) -> Settings:
        buffers, processes = foreign.whole("ppo_buffer_size"), foreign.processes or 1
        once = foreign.whole(_MICRO) * foreign.whole(_TIMES) * processes
        settings: Settings = {
            "rollout.prompts_per_step": once * buffers,
            "rollout.missing_eos_penalty": None,
            "objective.kl_coef": 0.2,
        }
        if buffers > 1:
            settings["objective.minibatches"] = buffers
        if foreign.processes is None:
            foreign.differ(_MICRO, "counted for one process; give --processes N if there are more")
        return settings

    ours = (
        *("rollout.prompts_per_step", "rollout.missing_eos_penalty"),
        *("objective.kl_coef", "objective.minibatches"),
    )
    return Rule(ours, run)
