"""Which layers of a model an adapter changes, and which weights stay frozen."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from alignkit.errors import ModelError
from alignkit.models.adapters.patterns import is_plain, pattern_fault
from alignkit.models.adapters.stacks import (
    ROUTING,
    Adaptable,
    linear_layers,
    read_as_experts,
    require_plain,
    stack_names,
    stacked_weights,
)
from alignkit.models.peft_parts import IA3_FEEDFORWARD, IA3_TARGETS
from alignkit.recipe.adapters import FullSpec, Ia3Spec, LoraSpec

T = TypeVar("T", int, float)


def adapted_layers(model: nn.Module, spec: LoraSpec | Ia3Spec) -> dict[str, Adaptable]:
    """Name -> linear layer, or parameter of experts, that the adapter changes.

    Args:
        model: with or without storage.
        spec: says which.

    Raises:
        ModelError: a target or a pattern matches nothing (the hint lists close names), or PEFT
            cannot adapt a target that way.
    """
    linear = linear_layers(model)
    stacks = stacked_weights(model) if isinstance(spec, LoraSpec) else {}
    targets = ia3_names(model, spec)[0] if isinstance(spec, Ia3Spec) else spec.targets
    if isinstance(spec, LoraSpec):
        _require_quick_patterns(model, spec)
    if isinstance(spec, LoraSpec) and targets == "all-linear":
        return _all_linear(model, spec, linear, stacks)
    every = linear | stacks
    what = "linear layer or stack of experts" if stacks else "linear layer"
    names = [*linear_names(model), *stack_names(stacks)]
    if isinstance(targets, str):
        adapted = {name: layer for name, layer in every.items() if _fits(targets, name, "targets")}
        _require([] if adapted else [targets], "targets", what, names)
    else:
        fitting = {t: [n for n in every if _names_target(n, t, stacks)] for t in targets}
        missing = [t for t, own in fitting.items() if not own]
        parts = [t for t in missing if stacks and read_as_experts(model, t)]
        if parts:
            raise ModelError(
                f"adapter.targets names {parts[0]!r}, but the experts of this model are not "
                "separate layers: they are stored in stacks",
                hint=f"name the stacks, or leave them out: this model has {', '.join(names)}",
            )
        _require(missing, "targets", what, names)
        chosen = {name for own in fitting.values() for name in own}
        adapted = {name: layer for name, layer in every.items() if name in chosen}
    if isinstance(spec, LoraSpec):
        _refuse_misread(model, adapted)
        _check(adapted, spec)
    return adapted


def _require_quick_patterns(model: nn.Module, spec: LoraSpec) -> None:
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    _require_quick([spec.targets] if isinstance(spec.targets, str) else [], "targets", names)
    for key in ("rank_pattern", "alpha_pattern"):
        keys = [one for one in getattr(spec, key) if not is_plain(one)]
        _require_quick([rf"(.*\.)?({one})" for one in keys], key, names)


def _require_quick(patterns: Iterable[str], key: str, names: Iterable[str]) -> None:
    """Refuse patterns that do not come to an end over some names."""
    odd = [pattern for pattern in patterns if not is_plain(pattern)]
    fault = pattern_fault(tuple(odd), tuple(sorted(names))) if odd else ""
    if fault.startswith("takes"):  # `_fits` says what is wrong with one that is no expression
        raise ModelError(
            f"adapter.{key}: a pattern {fault}: {odd[0][:80]!r}",
            hint="name the modules in a list" if key == "targets" else "use module names",
        )


def _all_linear(
    model: nn.Module,
    spec: LoraSpec,
    linear: dict[str, Adaptable],
    stacks: dict[str, Adaptable],
) -> dict[str, Adaptable]:
    """Every linear layer but the output head, and stacks of experts, but not their routers."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    adapted = {name: layer for name, layer in linear.items() if layer.module is not head}
    lasts = {name.rpartition(".")[2] for name in adapted}
    left = {last for last in lasts if read_as_experts(model, last)}
    left |= lasts & set(ROUTING) if stacks else set()
    adapted = {name: la for name, la in adapted.items() if name.rpartition(".")[2] not in left}
    adapted |= {name: layer for name, layer in stacks.items() if layer.stacked}
    _check(adapted, spec)
    return adapted


def _names_target(name: str, target: str, stacks: Collection[str]) -> bool:
    """Whether a target stands for a layer or parameter; a router goes by its module's name too."""
    return _ends(name, target) or (name in stacks and _ends(name.removesuffix(".weight"), target))


def _refuse_misread(model: nn.Module, adapted: dict[str, Adaptable]) -> None:
    """Refuse layers that PEFT, by the end of their names, takes for parts of the experts."""
    for name in (name for name, layer in adapted.items() if not layer.parameter):
        last = name.rpartition(".")[2]
        if read_as_experts(model, last):
            free = [one for one in linear_names(model) if not read_as_experts(model, one)]
            raise ModelError(
                f"adapter.targets names {name}, which PEFT cannot adapt in this model: it reads "
                f"{last!r} as a part of the experts",
                hint=f"name others: {', '.join([*free, *stack_names(stacked_weights(model))])}",
            )


def layer_ranks(layers: Iterable[str], spec: LoraSpec) -> dict[str, int]:
    """Name of each adapted layer -> rank of its update; the first pattern that fits decides."""
    ranks = patterned(layers, spec.rank_pattern, "rank_pattern")
    return {name: ranks.get(name, spec.rank) for name in layers}


def patterned(layers: Iterable[str], patterns: dict[str, T], key: str) -> dict[str, T]:
    """Name of each layer that a pattern fits -> value of the first one that does."""
    values = {}
    for name in layers:
        fitting = (value for pattern, value in patterns.items() if _pattern(pattern, key, name))
        for value in fitting:
            values[name] = value
            break
    return values


def _check(layers: dict[str, Adaptable], spec: LoraSpec) -> None:
    require_plain(layers, spec)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(spec, key)
        missing = [p for p in patterns if not any(_pattern(p, key, name) for name in layers)]
        _require(missing, key, "adapted layer", (name.rsplit(".", 1)[-1] for name in layers))
    for name, rank in layer_ranks(layers, spec).items():
        layer = layers[name]
        size, last = min(layer.in_features, layer.out_features), name.rsplit(".", 1)[-1]
        if rank > size:
            raise ModelError(
                f"adapter.rank = {rank} is more than {name} can hold: "
                f"{layer.in_features} × {layer.out_features}",
                hint=f"at most {size} there: adapter.rank_pattern={{{last}: {size}}}",
            )


def saved_modules(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Names of the modules that are trained as a whole.

    Raises:
        ModelError: a name matches no module with weights, or one that LoRA adapts too.
    """
    own = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    wanted = spec.modules_to_save
    missing = [t for t in wanted if not any(_ends(name, t) for name in own)]
    _require(missing, "modules_to_save", "module with weights", (n.rsplit(".", 1)[-1] for n in own))
    saved = [name for name in own if any(_ends(name, t) for t in wanted)]
    adapted = adapted_layers(model, spec) if saved else {}
    owners = {n.rpartition(".")[0] if layer.parameter else n for n, layer in adapted.items()}
    twice = sorted(set(saved) & owners)
    if twice:
        raise ModelError(
            f"adapter.modules_to_save names {twice[0]}, which is among adapter.targets too",
            hint="remove it from one of them: it is trained as a whole, or by LoRA",
        )
    return saved


def vocabulary_ends(model: Any) -> dict[str, Any]:
    """Name -> module of the embedding and, if there is one, of the output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if any(m is end for end in ends)}


def require_free_vocabulary(model: nn.Module, spec: LoraSpec | Ia3Spec) -> None:
    """Refuse to train both embedding or head and the rows of new tokens in them.

    Raises:
        ModelError: the adapter changes one of the two.
    """
    trained = set(adapted_layers(model, spec))
    if isinstance(spec, LoraSpec):
        trained |= set(saved_modules(model, spec))
    twice = sorted(trained & vocabulary_ends(model).keys())
    if twice:
        raise ModelError(
            f"the adapter trains {twice[0]}, in which model.add_tokens trains rows",
            hint="remove it from adapter.targets and adapter.modules_to_save, or add the tokens "
            "in an earlier run",
        )


def ia3_names(model: nn.Module, spec: Ia3Spec) -> tuple[list[str], list[str]]:
    """Names of the modules that IA3 scales, and of those whose input it scales.

    Raises:
        ModelError: `auto`, and PEFT does not know the architecture; or a feed-forward module that
            is not a target.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    names = []
    for key, known in (("targets", IA3_TARGETS), ("feedforward", IA3_FEEDFORWARD)):
        value: str | Sequence[str] = getattr(spec, key)
        if value == "auto" and kind not in known:
            raise ModelError(
                f"adapter.{key} = auto, but PEFT does not know what to scale in a {kind!r} model",
                hint=f"name the modules: this model has {', '.join(linear_names(model))}",
            )
        names.append(list(known[kind] if value == "auto" else value))
    targets, feedforward = names
    if spec.feedforward == "auto":  # under the target's own name
        feedforward = [t for t in targets if any(_ends(t, f) or _ends(f, t) for f in feedforward)]
    odd = sorted(set(feedforward) - set(targets))
    if odd:
        raise ModelError(
            f"adapter.feedforward names {odd[0]!r}, which is not among adapter.targets",
            hint=f"name some of the targets: {', '.join(targets)}",
        )
    return targets, feedforward


def frozen_weights(names: Iterable[str], spec: FullSpec) -> set[str]:
    """Names of the weights that stay frozen.

    Args:
        names: of all weights.
        spec: says which are frozen.

    Raises:
        ModelError: a pattern matches nothing, or nothing is left to train.
    """
    every = list(names)

    _require_quick(spec.freeze, "freeze", every)

    def fits(pattern: str, name: str) -> bool:
        return name == pattern or name.startswith(f"{pattern}.") or _fits(pattern, name, "freeze")

    missing = [p for p in spec.freeze if not any(fits(p, name) for name in every)]
    modules = (".".join(n.split(".")[:i]) for n in every for i in range(1, n.count(".") + 1))
    _require(missing, "freeze", "weight", sorted(set(modules)))
    frozen = {name for name in every if any(fits(pattern, name) for pattern in spec.freeze)}
    if len(frozen) == len(every):
        raise ModelError(
            "adapter.freeze leaves nothing to train",
            hint="name fewer modules, or set adapter.kind=lora",
        )
    return frozen


def linear_names(model: nn.Module) -> dict[str, int]:
    """Last name part of every linear layer except the output head -> how many there are."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names: dict[str, int] = {}
    for name, layer in linear_layers(model).items():
        if layer.module is not head:
            last = name.rsplit(".", 1)[-1]
            names[last] = names.get(last, 0) + 1
    return names


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _pattern(pattern: str, key: str, name: str) -> bool:
    """As PEFT reads the keys of its patterns."""
    return _fits(rf"(.*\.)?({pattern})", name, key)


def _fits(pattern: str, name: str, key: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModelError(
            f"adapter.{key} is not a regular expression: {pattern!r} ({error})",
            hint="use a list of module names, or all-linear"
            if key == "targets"
            else "use module names",
        ) from None


def _require(missing: Sequence[str], key: str, what: str, known: Iterable[str]) -> None:
    """Refuse names of a recipe that match nothing in the model."""
    if not missing:
        return
    names = list(dict.fromkeys(known))
    near = [m for t in missing for m in difflib.get_close_matches(t, names, n=2)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    raise ModelError(
        f"adapter.{key} matches no {what}: {', '.join(map(repr, missing))}",
        hint=f"{hint}this model has {', '.join(names) or 'none that can be named'}",
    )
