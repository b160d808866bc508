"""Settings of the label stage: a model answers prompts, a reward model pairs the responses."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import find_path
from alignkit.recipe.reading.document import Document
from alignkit.recipe.reading.files import no_file, place_path
from alignkit.recipe.reading.load import without
from alignkit.recipe.reading.problems import describe_problems, file_order
from alignkit.recipe.reading.yaml_values import KeyPath
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.section import Folder, PositiveInt, Section, Temperature

LABEL = "label"
"""Kind of the stage in a pipeline."""

Name = Annotated[str, Field(min_length=1)]


class LabelSpec(Section):
    """Preference pairs from a model's own responses: the best of several against the worst."""

    output: Folder
    """Folder for `pairs.jsonl`; on the command line the .jsonl file itself."""
    model: Name
    """The model that responds: anything that `alignkit generate` opens."""
    prompts: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    """Sources of prompts, in any row format; completions in them are not used."""
    reward: Name
    """Run of the reward stage, or its adapter/ or merged/ folder."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Responses per prompt."""
    max_new_tokens: PositiveInt = 128
    """Longest response, in tokens."""
    temperature: Temperature = 1.0
    """Divides the logits; there is no other sampling filter."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampling."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """Skip prompts whose best and worst rewards differ by no more than this."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision of both; `auto` is that of the model's run, else the fastest here."""


_HINTS = {
    "model": "a model, a run folder or a hub id, as in model: runs/dpo",
    "reward": "a run of the reward stage, as in reward: runs/reward",
    "prompts": "a list of sources, as in [{path: prompts.jsonl}]",
    "samples": "at least two: the best is paired with the worst; 4 to 16 is usual",
    "temperature": "0.7 to 1 is usual",
    "margin": "in units of the reward model; 0 accepts any difference",
}


def resolve_label(document: Document, *, pending: Collection[KeyPath] = ()) -> LabelSpec:
    """The settings in a document.

    Args:
        document: holds the keys of `LabelSpec`.
        pending: keys of files and folders that an earlier stage will create.

    Returns:
        The settings with their files located.

    Raises:
        RecipeError: holds every broken rule, in file order.
    """
    problems = _missing_prompts(without(document, pending))
    try:
        spec = LabelSpec.model_validate_json(json.dumps(document.values, allow_nan=True))
    except ValidationError as error:
        broken = describe_problems(error, document, LabelSpec)
        problems = [_with_own_hint(problem) for problem in broken] + problems
    if problems:
        raise RecipeError(sorted(problems, key=lambda problem: file_order(problem.message)))
    prompts = tuple(
        source.model_copy(update={"path": place_path(source.path, document) or source.path})
        if source.path
        else source
        for source in spec.prompts
    )
    places = {key: place_path(getattr(spec, key), document) for key in ("model", "reward")}
    changes = {key: place for key, place in places.items() if place}
    return spec.model_copy(update={**changes, "prompts": prompts})


def _missing_prompts(document: Document) -> list[AlignkitError]:
    """One error for each prompt file that does not exist."""
    sources = document.values.get("prompts")
    problems = []
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str) and find_path(path, document.folders) is None:
            problems.append(no_file(("prompts", index, "path"), path, document))
    return problems


def _with_own_hint(problem: AlignkitError) -> AlignkitError:
    """The problem with this stage's own wording or hint where that of a recipe would mislead."""
    if " is not a key of a recipe" in problem.message:
        message = problem.message.replace("of a recipe", f"of {LABEL}")
        return AlignkitError(message, hint=problem.hint)
    key = problem.message.partition(": ")[2].partition(" ")[0]
    return AlignkitError(problem.message, hint=_HINTS.get(key, problem.hint))
