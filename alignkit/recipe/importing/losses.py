"""Rules for the losses of preference pairs, labelled answers and reward models."""

from __future__ import annotations

from alignkit.recipe.importing.fields import Foreign, Rule, Settings

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

SHOWN = (
    "objective.kind",
    "objective.beta",
    "objective.tau",
    "objective.per_token",
    "objective.label_smoothing",
    "objective.gamma",
    "objective.nll_weight",
)


def pairs(loss: str, beta: str, smoothing: str, gamma: str, nll: str) -> Rule:
    """The objective of pairs.

    Args:
        loss: their key of the loss; empty if the file's stage alone says it (`losses.loss`).
        beta: of the strength.
        smoothing: of the share of wrong labels.
        gamma: of SimPO's margin.
        nll: of the weight of CPO's likelihood.
    """

    def run(foreign: Foreign, key: str) -> Settings:
        name = _name_of(foreign, loss)
        smooth = foreign.number(smoothing) if foreign.get(smoothing) is not None else 0.0
        kind = KINDS[name]
        if kind == "dpo" and smooth:
            kind = "cdpo"
        settings: Settings = {"objective.kind": kind}
        strength = "objective.tau" if kind == "ipo" else "objective.beta"
        if foreign.get(beta) is not None:
            settings[strength] = foreign.number(beta)
        if kind == "ipo":
            settings["objective.per_token"] = True
        if kind in ("cdpo", "robust"):
            settings["objective.label_smoothing"] = smooth
        elif smooth:
            foreign.lose(smoothing, f"{name} has no label smoothing")
        if kind == "simpo" and foreign.get(gamma) is not None:
            settings["objective.gamma"] = foreign.number(gamma)
        elif gamma in foreign:
            foreign.lose(gamma, f"{name} has no margin")
        if kind == "cpo" and foreign.get(nll) is not None:
            settings["objective.nll_weight"] = foreign.number(nll)
        elif nll in foreign:
            foreign.lose(nll, f"{name} has no such term here")
        return settings

    return Rule(SHOWN, run)


def _name_of(foreign: Foreign, loss: str) -> str:
    named = foreign.names(loss)
    if len(named) > 1:
        foreign.lose(loss, f"one loss a run: {named[0]}")
    name = named[0] if named else "sigmoid"
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
