"""What an evaluation measures, and the recipes of the runs among its models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import ModelError
from alignkit.models.base.identity import same_weights, weights_fingerprint
from alignkit.recipe.model import ModelSpec
from alignkit.recipe.objectives import CustomSpec
from alignkit.recipe.reading.load import load_recipe
from alignkit.recipe.reading.stored import NAME, is_remembered, stored_recipe
from alignkit.recipe.stages.base import Recipe
from alignkit.report.run_files import read_about
from alignkit.stages.inputs.base import start_model


@dataclass(frozen=True)
class Question:
    """What is measured, and how.

    Args:
        data: file of rows; None takes the held-out rows of the first run folder.
        max_length: longest row of `data` in tokens; longer ones are dropped and counted.
        take: only this many rows of `data`, the first ones.
        dtype: compute precision of all models; `auto` is that of the first one's run, else the
            fastest here.
        base: of adapters that name another.
        reference: model to compare log-probs of pairs with; None takes the base of a dpo or kto
            run, and plain log-probs for any other model.
        trust_recipe: read what the recipe of a run names though the run was not made here.
        trust_remote_code: run code that comes with the base of a run.
        say: gets lines about what is measured.
    """

    data: str | None = None
    max_length: int | None = None
    take: int | None = None
    dtype: str = "auto"
    base: str | None = None
    reference: str | None = None
    trust_recipe: bool = False
    trust_remote_code: bool = False
    say: Callable[[str], None] = lambda text: None

    def check(self) -> None:
        """Refuse what would be ignored.

        Raises:
            ModelError: options that need a file.
        """
        if self.data is None and (self.take is not None or self.max_length is not None):
            raise ModelError(
                "--take and --max-length go with --data: the run's own rows follow its recipe",
                hint="name the file with --data",
            )


def useless_reference(what: str) -> ModelError:
    """The error for a --reference that nothing would be compared with."""
    return ModelError(
        f"--reference has no use for {what}: it is what log-probs of preferences are compared with",
        hint="leave it out",
    )


def run_with_recipe(names: list[str]) -> Path:
    """The first run folder among the names.

    Raises:
        ModelError: there is none, so there are no rows to evaluate on.
    """
    for name in names:
        folder = run_of(name)
        if folder is not None:
            return folder
    raise ModelError(
        "there are no rows to evaluate on",
        hint="name a file with --data, or a run folder whose recipe holds out rows",
    )


def run_of(name: str) -> Path | None:
    """The run folder that a name is, or is inside."""
    path = Path(name).expanduser()
    folders = (folder for folder in (path, path.parent) if (folder / NAME).is_file())
    return next(folders, None)


def recipe_of(name: str, question: Question) -> Recipe | None:
    """The recipe of a run, whether or not its rows are still there; None for any other model.

    Raises:
        ModelError: measuring would run a file that the recipe names, and the run was not made here.
    """
    folder = run_of(name)
    if folder is None:
        return None
    recipe = stored_recipe(folder / NAME)
    objective = getattr(recipe, "objective", None)
    if isinstance(objective, CustomSpec):
        _require_own(folder, question, f"runs {objective.file}", "read that file first")
    return recipe


def own_base(name: str, recipe: Recipe, question: Question) -> str:
    """The base that the recipe of a run names, to compare the run's model with.

    Raises:
        ModelError: the run was not made here: the recipe would choose what is opened or fetched.
    """
    folder, base = run_of(name), recipe.model.base
    if folder is not None:
        _require_own(folder, question, f"opens {base}", "name the model with --reference")
    return base


def followed_recipe(run: Path, question: Question) -> Recipe:
    """The recipe of a run, with the files that it names.

    Raises:
        ModelError: the run was not made here, and nothing says that its recipe may be followed.
        RecipeError: a file is missing.
    """
    sources = stored_recipe(run / NAME).data
    named = [source.label for source in (*sources.train, *sources.eval)]
    _require_own(run, question, f"reads {', '.join(named)}", "name rows with --data")
    trust = json.dumps(question.trust_remote_code)
    return load_recipe(str(run / NAME), [f"model.trust_remote_code={trust}"]).recipe


def _require_own(run: Path, question: Question, act: str, instead: str) -> None:
    if not question.trust_recipe and not is_remembered(run / NAME):
        raise ModelError(
            f"{run} was not made on this machine, and its recipe {act}",
            hint=f"{instead}; --trust-recipe follows its recipe",
        )


def say_if_changed(name: str, base: str, question: Question) -> None:
    """Warn if the base of a run is no longer the one it was trained from."""
    run = run_of(name)
    if run is None or not (run / "run.json").is_file():
        return
    recorded = read_about(run).get("base", {}).get("fingerprint")
    current = weights_fingerprint(start_model(ModelSpec(base=base)))
    if recorded is not None and not same_weights(recorded, current):
        question.say(
            f"warning: {base} has changed since {name} was trained from it: its implicit rewards "
            "are relative to another model"
        )
