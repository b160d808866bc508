"""What labelling is asked: a model answers prompts, a reward model makes pairs of the answers."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import find_path
from alignkit.recipe.reading.document import Document, KeyPath
from alignkit.recipe.reading.files import no_file, place_path
from alignkit.recipe.reading.load import without
from alignkit.recipe.reading.problems import describe_problems, file_order
from alignkit.recipe.rows import SourceSpec
from alignkit.recipe.section import PositiveInt, Section

LABEL = "label"
"""Kind of the stage in pipelines."""

Name = Annotated[str, Field(min_length=1)]


class LabelSpec(Section):
    """Preference pairs from a model's own answers: the best of several against the worst."""

    output: Name
    """Folder that gets `pairs.jsonl`; on the command line the .jsonl file itself."""
    model: Name
    """Who answers: anything that `alignkit generate` opens."""
    prompts: Annotated[tuple[SourceSpec, ...], Field(min_length=1)]
    """Sources of prompts, of any row format; answers in them are not used."""
    reward: Name
    """Run of the reward stage, or its adapter/ or merged/ folder."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt."""
    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Divides the logits; nothing else shapes what is sampled from."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the answers."""
    margin: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Prompts whose best and worst reward are no further apart are left out."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of both models."""


_HINTS = {
    "model": "a model, a run folder or a hub id, as in model: runs/dpo",
    "reward": "a run of the reward stage, as in reward: runs/reward",
    "prompts": "a list of sources, as in [{path: prompts.jsonl}]",
    "samples": "the best is set against the worst, so that there must be two; 4 to 16 is usual",
    "temperature": "0.7 to 1 is usual",
    "margin": "in units of the reward model; 0 takes every difference",
}


def resolve_label(document: Document, *, pending: Collection[KeyPath] = ()) -> LabelSpec:
    """The settings that a document holds.

    Args:
        document: keys of `LabelSpec`.
        pending: keys of files and folders that are still to be made, which need not exist.

    Returns:
        The settings with their files found.

    Raises:
        RecipeError: holds every broken rule, in file order.
    """
    problems = _missing_prompts(without(document, pending))
    try:
        spec = LabelSpec.model_validate_json(json.dumps(document.values, allow_nan=True))
    except ValidationError as error:
        found = describe_problems(error, document, LabelSpec)
        problems = [_with_own_hint(problem) for problem in found] + problems
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
    """One error for each file of prompts that does not exist."""
    sources = document.values.get("prompts")
    problems = []
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str) and find_path(path, document.folders) is None:
            problems.append(no_file(("prompts", index, "path"), path, document))
    return problems


def _with_own_hint(problem: AlignkitError) -> AlignkitError:
    """The problem with the hint of this stage where a recipe's would mislead."""
    if " is not a key of a recipe" in problem.message:
        message = problem.message.replace("of a recipe", f"of {LABEL}")
        return AlignkitError(message, hint=problem.hint)
    key = problem.message.partition(": ")[2].partition(" ")[0]
    return AlignkitError(problem.message, hint=_HINTS.get(key, problem.hint))
