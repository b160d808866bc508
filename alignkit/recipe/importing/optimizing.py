"""Rules of schedules, optimizers and the end of a run, which several toolkits share."""

from __future__ import annotations

from typing import Any

from alignkit.recipe.importing.fields import Field, Foreign, Rule, Settings
from alignkit.recipe.stages.base import metric_family
from alignkit.recipe.stages.registry import find_stage

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine_min",
    "warmup_stable_decay": "wsd",
}
_OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("adamw_apex_fused", "adamw_anyprecision", "adamw_torch_xla"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion", "paged_lion_32bit"), "lion"),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), "lion_8bit"),
    "adafactor": "adafactor",
}
_METRICS = {"mean_token_accuracy": "accuracy"}
"""Their name of a held-out metric -> ours, where they differ."""

OF_SCHEDULE = ("training.decay", "training.min_rate")
BETAS = ("adam_beta1", "adam_beta2")
ENDS = ("training.keep_best", "training.early_stop")
"""What needs evaluations during the run."""

ADAM = Field("adam_epsilon", None, "AdamW has epsilon 1e-8", 0.5, fine=(1e-8,))
"""The parameter of AdamW that is no key."""


def schedule(key_of_schedule: str, ratio: str = "") -> Rule:
    """Shape of the learning rate.

    Args:
        key_of_schedule: theirs.
        ratio: their key of the share at which a cosine ends.
    """

    def run(foreign: Foreign, key: str) -> Settings:
        name, options = foreign.text(key_of_schedule), _options(foreign)
        if name not in _SCHEDULES:
            known = "cosine, linear, constant, wsd and cosine_min"
            foreign.lose(key_of_schedule, f"schedules are {known}: cosine")
        ours = _SCHEDULES.get(name, "cosine")
        settings: Settings = {}
        if ours == "cosine" and foreign.get(ratio):
            settings["training.min_rate"] = foreign.number(ratio)
        if ours == "cosine_min" and isinstance(options.get("min_lr_rate"), float):
            settings["training.min_rate"] = options["min_lr_rate"]
        elif ours == "cosine_min" and isinstance(options.get("min_lr"), float):
            peak = foreign.number("learning_rate")
            settings["training.min_rate"] = float(f"{options['min_lr'] / peak:.6g}")
        elif ours == "wsd":
            settings |= _decay(foreign, options)
        if "training.min_rate" in settings:
            ours = "cosine_min"
        if options and not settings:
            foreign.lose(_OPTIONS, "no option of a schedule")
        return {"training.schedule": ours, **settings}

    return Rule(("training.schedule", *OF_SCHEDULE), run)


_OPTIONS = "lr_scheduler_kwargs"


def _options(foreign: Foreign) -> dict[str, Any]:
    value = foreign.get(_OPTIONS)
    if value is not None and not isinstance(value, dict):
        foreign.lose(_OPTIONS, "no option of a schedule")
    return value if isinstance(value, dict) else {}


def _decay(foreign: Foreign, options: dict[str, Any]) -> Settings:
    """The share of the steps, if it can be known."""
    if options.get("decay_type", "cosine") != "linear":
        foreign.differ("", "training.schedule: wsd falls in a straight line")
    count, steps = options.get("num_decay_steps"), foreign.get("max_steps")
    if isinstance(count, int) and steps is not None and 0 < count <= foreign.number("max_steps"):
        return {"training.decay": float(f"{count / foreign.number('max_steps'):.6g}")}
    foreign.differ("", "training.decay: a share of the steps, 0.2 if it is not set")
    return {}


def optimizer(key: str) -> Rule:
    """The optimizer and its betas."""

    def run(foreign: Foreign, _: str) -> Settings:
        name, given = foreign.text(key), [beta for beta in BETAS if beta in foreign]
        ours = _OPTIMIZERS.get(name, "adamw")
        if name not in _OPTIMIZERS:
            known = "adamw, adamw_8bit, paged_adamw_8bit, lion, lion_8bit and adafactor"
            foreign.lose(key, f"optimizers are {known}: adamw")
        if name.startswith("paged_") and not ours.startswith("paged_"):
            foreign.differ(key, "the state stays where the weights are: not paged")
        settings: Settings = {} if name not in _OPTIMIZERS else {"training.optimizer": ours}
        if ours == "adafactor":
            foreign.differ(key, "torch's: a rate is relative to the weights, so choose it anew")
            for beta in given:
                foreign.lose(beta, "adafactor has no betas")
        elif given or "lion" in ours:
            usual = dict(zip(BETAS, (0.9, 0.999), strict=True))
            settings["training.betas"] = [
                foreign.number(beta) if beta in foreign else usual[beta] for beta in BETAS
            ]
        return settings

    return Rule(("training.optimizer", "training.betas"), run)


def best(patience: str = "") -> Rule:
    """Whether the best weights are written, and how long a run waits for better ones.

    Args:
        patience: their key of evaluations without a better one; empty if they have none.
    """

    def run(foreign: Foreign, key: str) -> Settings:
        settings: Settings = {}
        if foreign.flag("load_best_model_at_end"):
            name = foreign.text("metric_for_best_model").removeprefix("eval_") or "loss"
            name = _METRICS.get(name, name)
            if metric_family(name) in find_stage(foreign.stage).better:
                settings["training.keep_best"] = name
            else:
                foreign.lose("metric_for_best_model", "no such held-out metric: the last weights")
        if patience and patience in foreign and foreign.number(patience) > 0:
            settings["training.early_stop"] = foreign.whole(patience)
        return settings

    return Rule(ENDS, run)
