"""The `adapter` section of a recipe: which weights are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from alignkit.recipe.section import Positive, PositiveInt, Section

Rank = Annotated[int, Field(ge=1, le=4096)]


_FROM: dict[str, Any] = {  # `from` cannot be written as an attribute
    "from": (
        str | None,
        Field(
            default=None,
            description="A run or adapter folder whose adapter is trained further on the same "
            "base; its rank, targets and so on are taken from there. Not possible with a reference "
            "model: name the run as model.base instead.",
        ),
    )
}
_Continued: Any = create_model("_Continued", __base__=Section, **_FROM)


class EvaSpec(Section):
    """Settings of `init: eva`, which starts LoRA from the inputs that the rows produce."""

    rho: Annotated[float, Field(ge=1.0, le=64.0)] = 1.0
    """Above 1, ranks move to the layers whose inputs they explain best: up to `rho` times its own
    rank for a layer (among layers with the same input, the largest), down to none, with the same
    sum over all layers. PEFT's default is 2."""
    tau: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """A layer's directions have converged when the cosine of each with its value before the last
    pass is at least this. Reading stops when all have, or at `max_tokens` or the last row."""
    use_label_mask: bool = True
    """Use only states that predict a trained token; false uses all tokens of the rows."""
    max_tokens: PositiveInt = 32768
    """Stop reading rows after this many tokens."""


class LoraSpec(_Continued):
    """Low-rank adapters, W + (alpha / rank) · B A (https://arxiv.org/abs/2106.09685)."""

    kind: Literal["lora"] = "lora"
    """`lora` trains low-rank adapters over a frozen base."""
    rank: Rank = 16
    """Inner dimension of the update."""
    alpha: Positive = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module names such as `[q_proj, v_proj]`, or a regular expression.
    Stacks of experts have names too, such as `experts.down_proj`."""
    init: Literal["default", "pissa", "pissa_niter_16", "olora", "loftq", "eva"] = "default"
    """Where A and B start: `default` at a zero update; `pissa` (https://arxiv.org/abs/2404.02948)
    and `olora` (https://arxiv.org/abs/2406.01775) at the base's largest components, which a frozen
    half subtracts again, so that the base stays the reference; `pissa_niter_16` finds them faster
    in large layers; `loftq` (https://arxiv.org/abs/2310.08659) at what quantization lost. Files of
    pissa, pissa_niter_16 and olora have twice the rank, and weight decay skips their factors.
    `eva` starts A at the main directions of each layer's inputs over the run's rows, B at 0, and
    may move ranks between layers (https://arxiv.org/abs/2410.07170)."""
    eva: EvaSpec | None = None
    """Settings of `init: eva`."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead: high ranks learn as fast as low ones
    (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train the norm of each output's weights separately from their direction
    (https://arxiv.org/abs/2402.09353). Computed by PEFT's own code, which is slower."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Ranks of single modules: end of the module's name, or a regular expression -> rank."""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """The same for alpha."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full alongside the adapter, such as `[embed_tokens, lm_head]`: ends of
    their names."""
    b_learning_rate: Annotated[float, Field(gt=0.0, le=1024.0)] = 1.0
    """Learning rate of B as a multiple of A's; LoRA+ uses 16 (https://arxiv.org/abs/2402.12354)."""


class Ia3Spec(_Continued):
    """Learned scales of some layers' outputs or inputs (https://arxiv.org/abs/2205.05638)."""

    kind: Literal["ia3"]
    """`ia3` trains one scale for each output of some layers over a frozen base."""
    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the scaled modules; `auto` is PEFT's choice for the architecture: keys or queries,
    values, and the feed-forward layer's last module."""
    feedforward: Literal["auto"] | tuple[str, ...] = "auto"
    """Those of `targets` whose input is scaled instead of their output."""


class PrefixSpec(_Continued):
    """Trained keys and values before those of every row, in each layer
    (https://arxiv.org/abs/2101.00190)."""

    kind: Literal["prefix"]
    """`prefix` trains keys and values that attention sees before each row, over a frozen base. They
    cannot be merged into weights: the run ends with adapter/ and without merged/."""
    tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """Length of the prefix in each layer and key head. It counts towards the context length."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """Text whose keys and values the prefix starts from, repeated or cut to `tokens`; null uses a
    plain instruction. An instruction that fits the rows is a better start."""
    projection: bool = False
    """Train the prefix through a small network that computes the keys and values of all layers from
    one vector per token, as in the paper. It starts at random, far from any text; only the final
    keys and values are saved."""
    projection_width: PositiveInt = 512
    """Hidden width of the projection network."""


class FullSpec(Section):
    """All weights are trained."""

    kind: Literal["full"]
    """`full` trains every weight: about 16 bytes per parameter instead of 2."""
    freeze: tuple[str, ...] = ()
    """Weights that are not trained: starts of their names, such as `model.embed_tokens` and
    `model.layers.0`, or regular expressions for whole names."""


AnyAdapter = LoraSpec | Ia3Spec | PrefixSpec
"""Adapters over a frozen base."""

AnySpec = AnyAdapter | FullSpec
"""Any `adapter` section."""

AdapterSpec = Annotated[AnySpec, Field(discriminator="kind")]


def has_adapter(spec: AnySpec) -> bool:
    """Whether an adapter is trained over a frozen base."""
    return not isinstance(spec, FullSpec)


def is_remade(spec: AnySpec) -> bool:
    """Whether layers compute in the function that makes its inputs again for the backward pass."""
    return isinstance(spec, LoraSpec) and not spec.dora and not spec.dropout


def is_mergeable(spec: AnySpec) -> bool:
    """Whether the trained weights can be merged into weights of the base's shapes."""
    return not isinstance(spec, PrefixSpec)


def rate_key(spec: AnySpec) -> str:
    """Key of `Recipe.rates`: the adapter's kind, or `projection` for a prefix with projection."""
    return "projection" if isinstance(spec, PrefixSpec) and spec.projection else spec.kind


def continues(spec: AnySpec) -> str | None:
    """The folder of the adapter that is trained further; None for a new one."""
    folder: str | None = getattr(spec, "from", None)
    return folder


def takes_from_base(spec: AnySpec) -> bool:
    """Whether LoRA's factors start from components of the base and have a frozen half."""
    return isinstance(spec, LoraSpec) and spec.init in ("pissa", "pissa_niter_16", "olora")


def eva_of(spec: LoraSpec) -> EvaSpec:
    """The settings of `init: eva`, or their defaults."""
    return spec.eva or EvaSpec()


def moves_ranks(spec: AnySpec) -> bool:
    """Whether the rank of each layer is chosen from the rows."""
    return isinstance(spec, LoraSpec) and spec.init == "eva" and eva_of(spec).rho > 1


def spelled_out(spec: AnySpec) -> AnySpec:
    """The same, with the defaults of `eva` filled in for `init: eva`."""
    if not isinstance(spec, LoraSpec) or spec.init != "eva":
        return spec
    return spec.model_copy(update={"eva": eva_of(spec)})


def check_adapter(spec: AnySpec, quantization: str | None, *, adds_tokens: bool) -> None:
    """Refuse settings that cannot be combined.

    Args:
        spec: the recipe's `adapter` section.
        quantization: of the base, `none` for a plain one; None if unknown.
        adds_tokens: whether model.add_tokens is set.

    Raises:
        ValueError: the settings cannot be combined.
    """
    if isinstance(spec, LoraSpec):
        _check_start(spec, quantization)
    if isinstance(spec, Ia3Spec | PrefixSpec) and adds_tokens:
        raise ValueError(f"has kind = {spec.kind}, which cannot train model.add_tokens: use lora")
    if isinstance(spec, PrefixSpec) and spec.text and (spec.projection or continues(spec)):
        raise ValueError("has text, which does nothing with projection or from")
    if isinstance(spec, PrefixSpec) and not spec.projection and _differs(spec, "projection_width"):
        raise ValueError("has projection_width, which does nothing without projection: true")
    if isinstance(spec, FullSpec) and quantization not in ("none", None):
        raise ValueError(
            f"trains all weights, but model.quantization = {quantization} freezes them"
        )


def _differs(spec: Section, key: str) -> bool:
    """Whether a value differs from its default; the recipe stored in a run spells defaults out."""
    return bool(getattr(spec, key) != type(spec).model_fields[key].default)


def _check_start(spec: LoraSpec, quantization: str | None) -> None:
    if spec.eva is not None and spec.init != "eva":
        raise ValueError(f"has eva, which does nothing with init = {spec.init}: set init: eva")
    if spec.init == "eva" and continues(spec):
        raise ValueError("has init = eva, which cannot be combined with from")
    if spec.init not in ("default", "eva") and (spec.dora or continues(spec)):
        raise ValueError(f"has init = {spec.init}, which cannot be combined with dora or from")
    if spec.init == "loftq" and quantization == "none":
        raise ValueError("has init = loftq, which needs model.quantization")


def b_rate(spec: AnySpec) -> float:
    """Learning rate of LoRA's B as a multiple of the other weights'."""
    return spec.b_learning_rate if isinstance(spec, LoraSpec) else 1.0
