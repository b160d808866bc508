"""Rules that the tables of several toolkits share: values, batches, warm-up, precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignkit.recipe.importing.fields import Foreign, Rule, Settings

_DTYPES = (
    *(("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")),
    *(("float16", "float16"), ("float32", "float32")),
)
"""Their keys of a precision -> the dtype."""
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def number(ours: str) -> Rule:
    """The value as a number."""
    return Rule((ours,), lambda foreign, key: _set(foreign, key, ours, foreign.number))


def whole(ours: str) -> Rule:
    """The value as a whole number."""
    return Rule((ours,), lambda foreign, key: _set(foreign, key, ours, foreign.whole))


def flag(ours: str) -> Rule:
    """The value as true or false."""
    return Rule((ours,), lambda foreign, key: _set(foreign, key, ours, foreign.flag))


def text(ours: str) -> Rule:
    """The value as text."""
    return Rule((ours,), lambda foreign, key: _set(foreign, key, ours, foreign.text))


def names(ours: str) -> Rule:
    """The value as a list of texts."""
    return Rule((ours,), lambda foreign, key: _set(foreign, key, ours, foreign.names))


def _set(foreign: Foreign, key: str, ours: str, read: Callable[[str], Any]) -> Settings:
    return {} if foreign.get(key) is None else {ours: read(key)}


def stage() -> Rule:
    """The stage, which has been found before."""
    return Rule(("stage",), lambda foreign, key: {"stage": foreign.stage})


def positive(ours: str) -> Rule:
    """A whole number that counts from 1; 0 and -1 mean that it is not set."""

    def run(foreign: Foreign, key: str) -> Settings:
        if foreign.get(key) is None or foreign.number(key) <= 0:
            return {}
        if foreign.number(key) < 1:
            foreign.lose(key, f"counted in steps, not as a share of them: set {ours}")
            return {}
        return {ours: foreign.whole(key)}

    return Rule((ours,), run)


def batch(micro: str, accumulate: str, total: str = "") -> Rule:
    """Examples of one optimizer step: rows of a pass × passes × processes.

    Args:
        micro: their key of rows in a pass.
        accumulate: of passes.
        total: of the product, which wins.
    """

    def run(foreign: Foreign, key: str) -> Settings:
        if total in foreign:
            return {"training.batch_size": foreign.whole(total)}
        rows = foreign.whole(micro) * foreign.whole(accumulate) * (foreign.processes or 1)
        if foreign.processes is None:
            foreign.differ(
                micro,
                "counted for one process; give --processes N if there were more",
            )
        return {"training.batch_size": rows}

    return Rule(("training.batch_size",), run)


def warmup(key_of_schedule: str) -> Rule:
    """Warm-up in steps, else as a share of the steps."""

    def run(foreign: Foreign, key: str) -> Settings:
        if foreign.text(key_of_schedule) == "constant":  # it has no warm-up there
            return {"training.warmup": 0}
        steps, share = (
            foreign.number(name) if foreign.get(name) is not None else 0
            for name in ("warmup_steps", "warmup_ratio")
        )
        if steps and share:
            foreign.lose("warmup_ratio", "warmup_steps wins, there as here")
        elif share >= 1:
            rule = "must be less than 1: it is the share of the steps that warm up"
            foreign.wrong("warmup_ratio", rule, "write the steps as warmup_steps")
        return {"training.warmup": steps or share}

    return Rule(("training.warmup",), run)


def precision(*dtypes: str) -> Rule:
    """Compute precision of `bf16`, `fp16` and further keys that name a dtype."""

    def run(foreign: Foreign, key: str) -> Settings:
        for name, dtype in _DTYPES:
            value = str(foreign.get(name) or False).lower()
            if value == "auto":
                return {"model.dtype": "auto"}
            if value == "full" or (value and foreign.flag(name)):
                foreign.differ(name, "model.dtype: auto would measure what is fastest here")
                return {"model.dtype": dtype}
        for name in dtypes:
            if foreign.get(name) is not None:
                dtype = foreign.text(name).removeprefix("torch.")
                short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
                return {"model.dtype": short.get(dtype, dtype)}
        foreign.differ("", "model.dtype: auto, which measures what is fastest on the machine")
        return {}

    return Rule(("model.dtype",), run)


def clipping(key: str) -> Rule:
    """Largest norm of the gradients; 0 never clips."""

    def run(foreign: Foreign, _: str) -> Settings:
        return {"training.max_grad_norm": foreign.number(key) or None}

    return Rule(("training.max_grad_norm",), run)


def every(ours: str, steps: str, strategy: str, usual: str = "steps") -> Rule:
    """Steps between two evaluations or checkpoints.

    Args:
        ours: key of the recipe.
        steps: their key of the number.
        strategy: of what is counted.
        usual: what is counted if the file does not say.
    """

    def run(foreign: Foreign, key: str) -> Settings:
        how = foreign.text(strategy) or usual
        if how == "epoch" or how == "best":
            foreign.lose(strategy, f"counted in steps: set {ours}")
            return {}
        if how == "no" or foreign.get(steps) is None:
            return {}
        if 0 < foreign.number(steps) < 1:
            foreign.lose(steps, f"counted in steps, not as a share of them: set {ours}")
            return {}
        return {ours: foreign.whole(steps)}

    return Rule((ours,), run)


def checkpointing(key: str) -> Rule:
    """Whether activations are computed again in the backward pass."""

    def run(foreign: Foreign, _: str) -> Settings:
        if foreign.get(key) is None:
            return {}
        if str(foreign.get(key)).startswith("offload"):
            foreign.differ(key, "activations are computed again, not moved to main memory")
            return {"training.gradient_checkpointing": True}
        return {"training.gradient_checkpointing": foreign.flag(key)}

    return Rule(("training.gradient_checkpointing",), run)


def trackers(key: str = "report_to") -> Rule:
    """Experiment trackers."""

    def run(foreign: Foreign, _: str) -> Settings:
        wanted = [name for name in foreign.names(key) if name != "none"]
        unknown = [name for name in wanted if name not in _TRACKERS]
        if unknown:
            foreign.lose(key, f"trackers are {', '.join(_TRACKERS)}; no {', '.join(unknown)}")
        known = [name for name in wanted if name in _TRACKERS]
        return {"training.trackers": known} if known else {}

    return Rule(("training.trackers",), run)


def attention(key: str) -> Rule:
    """How attention is computed; the fast ways are found by alignkit."""

    def run(foreign: Foreign, _: str) -> Settings:
        name = foreign.text(key)
        if name in ("sdpa", "eager"):
            return {"model.attention": name}
        if name and name not in ("auto", "disabled"):
            foreign.differ(
                key, "attention: auto packs rows and takes the fastest kernel that is exact"
            )
        return {}

    return Rule(("model.attention",), run)


def targets(key: str, all_of_them: tuple[str, ...]) -> Rule:
    """Modules that LoRA changes; PEFT's own choice where the file names none."""

    def run(foreign: Foreign, _: str) -> Settings:
        if foreign.get(key) is None:
            foreign.differ("", "adapter.targets: PEFT's choice for most models; look at yours")
            return {"adapter.targets": ["q_proj", "v_proj"]}
        wanted = foreign.names(key)
        if len(wanted) == 1 and wanted[0] in all_of_them:
            return {"adapter.targets": "all-linear"}
        if isinstance(foreign.get(key), str) and any(sign in foreign.text(key) for sign in "*(|\\"):
            return {"adapter.targets": foreign.text(key)}  # a regular expression
        return {"adapter.targets": wanted}

    return Rule(("adapter.targets",), run)


def policy_only(ours: str, why: str, read: Rule) -> Rule:
    """A rule that does not hold where a policy samples: there the value is lost."""

    def run(foreign: Foreign, key: str) -> Settings:
        settings = read.run(foreign, key)
        if foreign.stage in ("ppo", "grpo"):
            if settings.get(ours):
                foreign.lose(key, why)
            return {}
        return settings

    return Rule((ours,), run)


def dropout() -> Rule:
    """Dropout of LoRA."""
    ours = "adapter.dropout"
    return policy_only(ours, "the policy that samples must be the one trained", number(ours))


def saved_modules() -> Rule:
    """Modules trained in full beside LoRA."""
    ours = "adapter.modules_to_save"
    return policy_only(ours, "not trained where a policy samples", names(ours))


def going_on(key: str) -> Rule:
    """An adapter that is trained further."""

    def run(foreign: Foreign, _: str) -> Settings:
        if foreign.get(key) is None:
            return {}
        if foreign.stage in ("sft", "reward"):
            return {"adapter.from": foreign.text(key)}
        foreign.lose(
            key,
            "the reference would be the bare base: merge it with alignkit merge-lora, and name "
            "the result as model.base",
        )
        return {}

    return Rule(("adapter.from",), run)
