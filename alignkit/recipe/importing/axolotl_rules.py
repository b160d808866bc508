"""Rules of Axolotl's keys that no other toolkit has."""

from __future__ import annotations

from alignkit.recipe.importing import rules
from alignkit.recipe.importing.fields import Foreign, Rule, Settings

_STAGES = {
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), "dpo"),
    "kto": "kto",
    **dict.fromkeys(("grpo", "gdpo"), "grpo"),
}
_TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
_SHIPPED = ("chatml", "llama3", "gemma", "mistral", "qwen")


def stage_of(foreign: Foreign) -> str:
    """The recipe's stage: `rl`, or a reward model, or plain training.

    Raises:
        RecipeError: a `rl` that alignkit does not have.
    """
    if foreign.text("rl"):
        if foreign.text("rl") not in _STAGES:
            foreign.wrong("rl", "names no stage of alignkit", f"known: {', '.join(_STAGES)}")
        return _STAGES[foreign.text("rl")]
    return "reward" if foreign.flag("reward_model") else "sft"


def trains_all(foreign: Foreign) -> bool:
    """Whether all weights are trained."""
    return foreign.text("adapter") not in ("lora", "qlora")


def kind() -> Rule:
    """The kind of adapter."""

    def run(foreign: Foreign, key: str) -> Settings:
        kind = foreign.text(key)
        if kind not in ("", "lora", "qlora"):
            foreign.lose(key, "lora or qlora: all weights are trained")
        return {"adapter.kind": "full" if trains_all(foreign) else "lora"}

    return Rule(("adapter.kind",), run)


def quantization() -> Rule:
    """How the base is stored."""

    def run(foreign: Foreign, _: str) -> Settings:
        if foreign.text("adapter") == "qlora" or foreign.flag("load_in_4bit"):
            return {"model.quantization": "nf4"}
        return {"model.quantization": "int8"} if foreign.flag("load_in_8bit") else {}

    return Rule(("model.quantization",), run)


def targets() -> Rule:
    """Modules that LoRA changes."""
    named = rules.targets("lora_target_modules", ("all-linear", "all_linear"))

    def run(foreign: Foreign, key: str) -> Settings:
        if foreign.flag("lora_target_linear"):
            if "lora_target_modules" in foreign:
                foreign.differ("lora_target_modules", "lora_target_linear names all of them")
            return {"adapter.targets": "all-linear"}
        return named.run(foreign, key)

    return Rule(("adapter.targets",), run)


def start() -> Rule:
    """Where LoRA starts."""
    known = {"pissa": "pissa", "pissa_niter_16": "pissa_niter_16", "olora": "olora", "eva": "eva"}

    def run(foreign: Foreign, key: str) -> Settings:
        name = foreign.text(key)
        if name.lower() in ("", "true"):
            return {}
        if name not in known:
            foreign.lose(key, f"starts are default, {', '.join(known)} and loftq")
            return {}
        return {"adapter.init": known[name]}

    return Rule(("adapter.init",), run)


def template() -> Rule:
    """Names of chat templates."""

    def run(foreign: Foreign, key: str) -> Settings:
        name = foreign.text(key)
        if name in _SHIPPED:
            return {"model.chat_template": name}
        if name not in ("", "tokenizer_default", "jinja"):
            foreign.differ(key, "the model's own chat template is used, or name a template file")
        return {}

    return Rule(("model.chat_template",), run)


def lengths() -> Rule:
    """Longest row, and what happens to longer ones."""

    def run(foreign: Foreign, _: str) -> Settings:
        how = foreign.text("excess_length_strategy") or "drop"
        ours = {"drop": "drop", "truncate": "truncate_right", "raise": "error"}
        if how not in ours:
            foreign.wrong("excess_length_strategy", f"must be one of {', '.join(ours)}")
        settings: Settings = {"data.max_length": foreign.whole("sequence_len")}
        if foreign.stage == "sft" and how != "raise" and _has_texts(foreign):
            foreign.differ(
                "sequence_len",
                "a longer text of type completion is cut into pieces there; here the rest of it "
                "is not trained: split such texts before",
            )
            how = "truncate"
        return settings | {"data.too_long": ours[how]}

    return Rule(("data.max_length", "data.too_long"), run)


def _has_texts(foreign: Foreign) -> bool:
    """Whether one of the datasets is plain text."""
    entries = foreign.get("datasets")
    entries = entries if isinstance(entries, list) else []
    kinds = [one.get("type") for one in entries if isinstance(one, dict)]
    return any(str(kind).partition(":")[0] in ("completion", "pretrain") for kind in kinds)


def train_on() -> Rule:
    """`train_on_inputs`, or the roles that an entry names."""

    def run(foreign: Foreign, _: str) -> Settings:
        entries = foreign.get("datasets")
        entries = entries if isinstance(entries, list) else []
        roles = [entry.get("roles_to_train") for entry in entries if isinstance(entry, dict)]
        named = {str(role) for part in roles if isinstance(part, list) for role in part}
        if foreign.flag("train_on_inputs") or named - {"assistant", "gpt"}:
            if named:
                foreign.differ("datasets", "roles_to_train: all turns, or the assistant's alone")
            return {"data.train_on": "everything"}
        return {}

    return Rule(("data.train_on",), run)


def tracked() -> Rule:
    """Experiment trackers, each switched on by a key of its own."""

    def run(foreign: Foreign, _: str) -> Settings:
        used = [one for one in _TRACKERS if foreign.flag(f"use_{one}")]
        used += ["wandb"] if foreign.text("wandb_project") and "wandb" not in used else []
        return {"training.trackers": used} if used else {}

    return Rule(("training.trackers",), run)


def strength(*keys: str, ours: str) -> Rule:
    """The first of these keys that the file has; the last one has the default.

    Args:
        keys: theirs.
        ours: key of the recipe.
    """

    def run(foreign: Foreign, _: str) -> Settings:
        given = next((key for key in keys if key in foreign), keys[-1])
        return {} if foreign.get(given) is None else {ours: foreign.number(given)}

    return Rule((ours,), run)
