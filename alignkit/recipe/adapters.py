"""What is trained, as recipes name it."""

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
            description="A run or adapter folder whose adapter is trained on, over the same base; "
            "its rank, targets and so on are taken from there. Not where a reference model is "
            "compared with: name the run as model.base there.",
        ),
    )
}
_Continued: Any = create_model("_Continued", __base__=Section, **_FROM)


class EvaSpec(Section):
    """How a start from the rows is found."""

    rho: Annotated[float, Field(ge=1.0, le=64.0)] = 1.0
    """Above 1, ranks move to the layers whose inputs they explain best: up to `rho` times its own
    rank for a layer, down to none, the same sum over all. PEFT takes 2."""
    tau: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """A layer's directions have settled when each one's cosine with what it was before the last
    pass is at least this. Rows are read until all have, or `max_tokens` or the rows are used up."""
    use_label_mask: bool = True
    """Only look at states that predict a trained token; false looks at all tokens of the rows."""
    max_tokens: PositiveInt = 32768
    """No further row is read once so many tokens are."""


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
    Stacks of experts go by their names too, such as `experts.down_proj`."""
    init: Literal["default", "pissa", "pissa_niter_16", "olora", "loftq", "eva"] = "default"
    """Where A and B start: `default` at no update; `pissa` (https://arxiv.org/abs/2404.02948) and
    `olora` (https://arxiv.org/abs/2406.01775) with the base's own largest part, which a frozen half
    takes off again, so that the base stays the reference; `pissa_niter_16` finds it faster in large
    layers; `loftq` (https://arxiv.org/abs/2310.08659) with what quantization lost. Files of the
    first three have twice the rank, and weight decay leaves their factors alone. `eva` starts A at
    the main directions of each layer's inputs over the run's rows, B at 0, and may move ranks
    between layers (https://arxiv.org/abs/2410.07170)."""
    eva: EvaSpec | None = None
    """How `init: eva` finds its start."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead: high ranks learn as fast as low ones
    (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction
    (https://arxiv.org/abs/2402.09353). Computed by PEFT's own code, which is slower."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Ranks of single modules: end of a module's name, or a regular expression for it -> rank."""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """The same for alpha."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained as a whole beside the adapter, such as `[embed_tokens, lm_head]`:
    ends of their names."""
    b_learning_rate: Annotated[float, Field(gt=0.0, le=1024.0)] = 1.0
    """Learning rate of B as a multiple of A's; LoRA+ takes 16 (https://arxiv.org/abs/2402.12354)."""


class Ia3Spec(_Continued):
    """Learned scales of a few layers' outputs or inputs, and nothing else
    (https://arxiv.org/abs/2205.05638)."""

    kind: Literal["ia3"]
    """`ia3` trains one scale for each output of some layers over a frozen base."""
    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the modules that are scaled; `auto` is PEFT's choice for the architecture: keys or
    queries, values, and the feed-forward layer's last module."""
    feedforward: Literal["auto"] | tuple[str, ...] = "auto"
    """Those among them whose input is scaled instead of their output."""


class PrefixSpec(_Continued):
    """Trained keys and values that every row has before its own, in each layer
    (https://arxiv.org/abs/2101.00190)."""

    kind: Literal["prefix"]
    """`prefix` trains what attention finds before each row, over a frozen base. No weight can hold
    it: the run ends with adapter/ and without merged/."""
    tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """Keys and values of each layer and key head. They take room in the context as tokens do."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """Text whose own keys and values they start as, repeated or cut to so many tokens; null is a
    plain instruction. An instruction that fits the rows is a better start."""
    projection: bool = False
    """Train them through a small network that makes all layers' from one vector for each token, as
    the paper does. It starts at random, far from any text; what is saved are the keys and values
    it ends with."""
    projection_width: PositiveInt = 512
    """Hidden width of that network."""


class FullSpec(Section):
    """All weights are trained."""

    kind: Literal["full"]
    """`full` trains every weight: about 16 bytes a parameter instead of 2."""
    freeze: tuple[str, ...] = ()
    """Weights that stay as they are: starts of their names, such as `model.embed_tokens` and
    `model.layers.0`, or regular expressions for whole names."""


AnyAdapter = LoraSpec | Ia3Spec | PrefixSpec
"""What is trained over a frozen base."""

AnySpec = AnyAdapter | FullSpec
"""What is trained."""

AdapterSpec = Annotated[AnySpec, Field(discriminator="kind")]


def has_adapter(spec: AnySpec) -> bool:
    """Whether the base stays frozen under what is trained."""
    return not isinstance(spec, FullSpec)


def is_mergeable(spec: AnySpec) -> bool:
    """Whether weights of the base's shapes can hold what is trained."""
    return not isinstance(spec, PrefixSpec)


def rate_key(spec: AnySpec) -> str:
    """What the usual learning rates depend on: the kind, and whether a network makes a prefix."""
    return "projection" if isinstance(spec, PrefixSpec) and spec.projection else spec.kind


def continues(spec: AnySpec) -> str | None:
    """The folder of the adapter that is trained on; None for a fresh one."""
    found: str | None = getattr(spec, "from", None)
    return found


def takes_from_base(spec: AnySpec) -> bool:
    """Whether LoRA's factors start with a part of the base, and have a frozen half."""
    return isinstance(spec, LoraSpec) and spec.init in ("pissa", "pissa_niter_16", "olora")


def eva_of(spec: LoraSpec) -> EvaSpec:
    """How its start is found, with the defaults where the recipe does not say."""
    return spec.eva or EvaSpec()


def moves_ranks(spec: AnySpec) -> bool:
    """Whether the rows decide how large the rank of each layer is."""
    return isinstance(spec, LoraSpec) and spec.init == "eva" and eva_of(spec).rho > 1


def spelled_out(spec: AnySpec) -> AnySpec:
    """The same with the defaults of `eva` where its start is found that way."""
    if not isinstance(spec, LoraSpec) or spec.init != "eva":
        return spec
    return spec.model_copy(update={"eva": eva_of(spec)})


def check_adapter(spec: AnySpec, quantization: str | None, *, adds_tokens: bool) -> None:
    """Refuse what does not go together.

    Args:
        spec: of the recipe.
        quantization: of the base, `none` for a plain one; None where it is not known.
        adds_tokens: whether the vocabulary grows.

    Raises:
        ValueError: says what does not fit.
    """
    if isinstance(spec, LoraSpec):
        _check_start(spec, quantization)
    if isinstance(spec, Ia3Spec | PrefixSpec) and adds_tokens:
        raise ValueError(
            f"has kind = {spec.kind}, which trains no rows of model.add_tokens: use lora"
        )
    if isinstance(spec, PrefixSpec) and spec.text and (spec.projection or continues(spec)):
        raise ValueError("has text, where its projection or from says how it starts")
    if isinstance(spec, PrefixSpec) and not spec.projection and _differs(spec, "projection_width"):
        raise ValueError("has projection_width, which does nothing without projection: true")
    if isinstance(spec, FullSpec) and quantization not in ("none", None):
        raise ValueError(
            f"trains all weights, and model.quantization = {quantization} freezes them"
        )


def _differs(spec: Section, key: str) -> bool:
    """Whether a value is not the default: a run's own recipe has defaults written out."""
    return bool(getattr(spec, key) != type(spec).model_fields[key].default)


def _check_start(spec: LoraSpec, quantization: str | None) -> None:
    if spec.eva is not None and spec.init != "eva":
        raise ValueError(f"has eva, which does nothing with init = {spec.init}: set init: eva")
    if spec.init == "eva" and continues(spec):
        raise ValueError("has init = eva, which does not go with from: that adapter has its start")
    if spec.init not in ("default", "eva") and (spec.dora or continues(spec)):
        raise ValueError(f"has init = {spec.init}, which goes with neither dora nor from")
    if spec.init == "loftq" and quantization == "none":
        raise ValueError("has init = loftq, which needs model.quantization")


def b_rate(spec: AnySpec) -> float:
    """Learning rate of LoRA's B as a multiple of all others'."""
    return spec.b_learning_rate if isinstance(spec, LoraSpec) else 1.0
