"""Rules for the losses of preference pairs, labelled answers and reward models."""

from __future__ import annotations

from typing import Any

from alignkit.recipe.importing.fields import Field, Foreign, Rule, Settings

KINDS = {
    "sigmoid": "dpo",
    "dpo": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "robust": "robust",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "orpo": "orpo",
    "simpo": "simpo",
    "cpo": "cpo",
}
"""Their name of a loss -> the kind of objective."""

_KIND, _SMOOTHING = "objective.kind", "objective.label_smoothing"
_STRENGTH = ("objective.beta", "objective.tau")
_GAMMA, _NLL = "objective.gamma", "objective.nll_weight"


def pair_fields(
    loss: str,
    betas: tuple[str, ...],
    smoothing: str,
    gamma: str,
    nll: str = "",
    beside_simpo: str = "",
) -> tuple[Field, ...]:
    """Rows of the loss of pairs, which share one rule.

    Args:
        loss: their key of the loss.
        betas: of its strength; the first that a file has counts, else the first with a default.
        smoothing: of the share of wrong labels.
        gamma: of SimPO's margin.
        nll: of the weight of CPO's likelihood; empty if there is none.
        beside_simpo: of the weight of the likelihood that SimPO has there; empty if it has none.
    """
    rule = _pairs(loss, betas, smoothing, gamma, nll, beside_simpo)

    def row(key: str, example: Any, *gives: str, **beside: Any) -> Field:
        return Field(key, rule, "", example, beside, ("dpo",), gives=gives)

    cpo = (row(nll, 0.7, _NLL, **{loss: "cpo"}),) if nll else ()
    return (
        row(loss, "hinge" if loss != "rl" else "ipo", _KIND, *_STRENGTH, "objective.per_token"),
        *(row(beta, 0.5, *_STRENGTH) for beta in betas),
        row(smoothing, 0.1, _KIND, _SMOOTHING),
        row(gamma, 0.7, _GAMMA, **{loss: "simpo"}),
        *cpo,
    )


def _pairs(
    loss: str, betas: tuple[str, ...], smoothing: str, gamma: str, nll: str, beside_simpo: str
) -> Rule:
    def run(foreign: Foreign, key: str) -> Settings:
        beta = next((name for name in betas if name in foreign), "") or next(
            name for name in betas if name in foreign.defaults
        )
        name = _name_of(foreign, loss)
        smooth = foreign.number(smoothing) if foreign.get(smoothing) is not None else 0.0
        kind = "cdpo" if KINDS[name] == "dpo" and smooth else KINDS[name]
        settings: Settings = {_KIND: kind}
        settings[_STRENGTH[kind == "ipo"]] = foreign.number(beta)
        if kind == "ipo":
            settings["objective.per_token"] = True
        if kind in ("cdpo", "robust"):
            settings[_SMOOTHING] = smooth
        elif smooth:
            foreign.lose(smoothing, f"{name} has no label smoothing")
        if kind == "simpo":
            settings[_GAMMA] = foreign.number(gamma)
            _without_likelihood(foreign, loss, beside_simpo)
        else:
            foreign.lose(gamma, f"{name} has no margin")
        if kind == "cpo":
            settings[_NLL] = foreign.number(nll) if foreign.get(nll) is not None else 1.0
        else:
            foreign.lose(nll, f"{name} has no likelihood of its own")
        return settings

    ours = (_KIND, *_STRENGTH, "objective.per_token", _SMOOTHING, _GAMMA, _NLL)
    return Rule(ours, run)


def _without_likelihood(foreign: Foreign, loss: str, nll: str) -> None:
    """SimPO through a trainer of CPO: its likelihood is part of the loss, unless it is 0."""
    if not nll:
        return
    weight = foreign.number(nll) if foreign.get(nll) is not None else 1
    if weight:
        foreign.differ(
            loss,
            f"there the NLL of the chosen answers is added to SimPO's loss, with {nll}: {weight}"
            f"{'' if nll in foreign else ', the default'}; here it is not added",
        )


def _name_of(foreign: Foreign, loss: str) -> str:
    named = foreign.names(loss)
    if foreign.script == "orpo":
        foreign.lose(loss, "the trainer of ORPO has one loss, and does not read it")
        return "orpo"
    if len(named) > 1:
        foreign.lose(loss, f"one loss a run: {named[0]}")
    name = named[0] if named else "sigmoid"
    if foreign.script == "cpo":
        name = "cpo" if name == "sigmoid" else name
        if name not in ("cpo", "simpo"):
            foreign.wrong(
                loss,
                "names a loss of CPO that alignkit does not have",
                hint="without a reference, its losses are sigmoid and simpo; or write your own as "
                "objective: {kind: custom, file: my_loss.py}, and import without this key",
            )
    if name not in KINDS:
        foreign.wrong(
            loss,
            "names a loss that alignkit does not have",
            hint=f"its losses of pairs: {', '.join(dict.fromkeys(KINDS.values()))}; or write your "
            "own as objective: {kind: custom, file: my_loss.py}, and import without this key",
        )
    return name


def centering(key: str) -> Rule:
    """The weight that keeps a reward model's scores near 0."""

    def run(foreign: Foreign, _: str) -> Settings:
        return {"objective.center": foreign.number(key) if foreign.get(key) is not None else 0.0}

    return Rule(("objective.center",), run)
