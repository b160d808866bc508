"""A pipeline file: named stages that run one after another, and the references between them.

A stage is a recipe written in the file, or `recipe: NAME` with keys that override it. `${name}` in
any text stands for the output of an earlier stage. Everything is checked before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from os.path import expanduser, isfile, realpath
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.adapters import is_mergeable
from alignkit.recipe.assets import show_file
from alignkit.recipe.reading.document import (
    Document,
    apply_overrides,
    lay_over,
    part_of,
    read_document,
)
from alignkit.recipe.reading.label import LABEL, LabelSpec, resolve_label
from alignkit.recipe.reading.load import find_recipe, resolve_recipe
from alignkit.recipe.reading.references import STAGE_NAME, anchor_files, replace_references
from alignkit.recipe.reading.yaml_values import KeyPath, show_path
from alignkit.recipe.stages.base import Recipe

Reader = Callable[[Document, Collection[KeyPath]], Any]

TRAINING = "train"

READERS: dict[str, Reader] = {
    TRAINING: lambda document, pending: resolve_recipe(document, pending=pending),
    LABEL: lambda document, pending: resolve_label(document, pending=pending),
}
"""Kind of stage -> function that checks its mapping and returns its settings; it also gets the keys
whose files an earlier stage will create. A stage whose only key is the name of another kind, as in
`label: {...}`, is of that kind; `alignkit.pipelines.steps.RUNNERS` runs it."""


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline.

    Args:
        name: as in the file.
        kind: a key of `READERS`.
        document: its mapping, with references replaced by absolute paths.
        references: keys that refer to earlier stages, and the names of those.
        settings: returned by its reader: a Recipe for a training stage. Files of earlier stages may
            not exist yet.
    """

    name: str
    kind: str
    document: Document
    references: dict[KeyPath, tuple[str, ...]]
    settings: Any

    @property
    def output(self) -> str:
        """The folder or file that the stage creates."""
        return str(self.document.values["output"])

    def settle(self) -> Any:
        """Its settings once the earlier stages are done, with their files located.

        Raises:
            RecipeError: a file that it names does not exist.
        """
        return READERS[self.kind](self.document, ())


@dataclass(frozen=True)
class Pipeline:
    """A validated pipeline.

    Args:
        name: the file as shown in messages.
        path: the file.
        output: the pipeline's folder.
        steps: in the order they run.
    """

    name: str
    path: Path
    output: str
    steps: tuple[Step, ...]


def load_pipeline(name: str, overrides: list[str] | None = None) -> Pipeline:
    """Read and validate a pipeline and all recipes in it.

    Args:
        name: file or shipped name.
        overrides: `output=…`, and `stage.key.sub=value` for the keys of a stage.

    Returns:
        The pipeline, with each stage checked as if it ran now, except that files of earlier stages
        need not exist.

    Raises:
        RecipeError: holds every broken rule of every stage.
    """
    path = find_recipe(name)
    document = read_document(path)
    _require_pipeline(document, name)
    own, theirs = _split_overrides(document, overrides or [])
    apply_overrides(document, own)
    reading = _Reading(document)
    for stage in document.values["stages"]:
        reading.add(stage, theirs.get(stage, []))
    reading.check_kinds()
    reading.check_outputs()
    if reading.problems:
        raise RecipeError(list({str(problem): problem for problem in reading.problems}.values()))
    return Pipeline(show_file(path), path.resolve(), reading.output, tuple(reading.steps))


def _require_pipeline(document: Document, name: str) -> None:
    values = document.values
    if "stages" not in values and "stage" in values:
        hint = f"run `alignkit {values['stage']} {name}`"
        problem = AlignkitError(f"{document.name}: is a recipe, not a pipeline", hint=hint)
        raise RecipeError([problem])
    stages = values.get("stages")
    if not isinstance(stages, dict) or not stages:
        where = document.place(("stages",))
        rule = "is required and missing" if stages is None else f"must be a mapping, got {stages!r}"
        hint = "name each stage, as in stages: {sft: {recipe: quickstart/sft.yaml}}"
        raise RecipeError([AlignkitError(f"{where}: stages {rule}", hint=hint)])


def _split_overrides(
    document: Document, overrides: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of the pipeline file itself, and those of each stage."""
    stages = list(document.values["stages"])
    own: list[str] = []
    theirs: dict[str, list[str]] = {}
    problems = []
    for text in overrides:
        first, _, rest = text.removeprefix("stages.").partition("=")[0].partition(".")
        if "=" not in text or (first == "output" and not rest):
            own.append(text)
        elif first not in stages:
            near = difflib.get_close_matches(first, stages, n=1)
            hint = f"did you mean {near[0]}?" if near else f"stages: {', '.join(stages)}"
            problems.append(AlignkitError(f"command line: there is no stage {first!r}", hint=hint))
        elif rest in ("", "recipe"):
            own.append(f"stages.{text.removeprefix('stages.')}")
        else:
            short = text.removeprefix("stages.").partition(".")[2]
            theirs.setdefault(first, []).append(short)
    if problems:
        raise RecipeError(problems)
    return own, theirs


@dataclass
class _Reading:
    """A pipeline file whose stages are being read.

    Args:
        document: the pipeline file with its own overrides.
        steps: read so far.
        outputs: stage -> its output, for all stages read so far, even broken ones.
        problems: found so far.
    """

    document: Document
    steps: list[Step] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    problems: list[AlignkitError] = field(default_factory=list)

    def __post_init__(self) -> None:
        output = self.document.values.get("output")
        self.output = expanduser(output) if isinstance(output, str) and output else "runs"
        if not isinstance(output, str) or not output:
            rule = "is required and missing" if output is None else f"must be text, got {output!r}"
            self._problem(("output",), f"output {rule}", "as in output: runs/my-pipeline")
        for key in self.document.values:
            if key not in ("output", "stages"):
                near = difflib.get_close_matches(key, ["output", "stages"], n=1)
                hint = f"did you mean {near[0]}?" if near else "keys here: output, stages"
                self._problem((key,), f"{key} is not a key of a pipeline", hint)

    def add(self, name: str, overrides: list[str]) -> None:
        """Read one stage and collect its problems."""
        folder = f"{self.output.rstrip('/')}/{name}"
        try:
            kind, document = self._mapping(name, overrides)
            output = document.values.get("output", folder)
            document.values["output"] = expanduser(output) if isinstance(output, str) else output
            every = self.document.values["stages"]
            references = replace_references(document, name, self.outputs, every)
            settings = READERS[kind](document, references)
            self.steps.append(Step(name, kind, document, references, settings))
            folder = document.values["output"]
        except RecipeError as error:
            self.problems += [_of_stage(problem, name) for problem in error.problems]
        self.outputs[name] = folder

    def check_kinds(self) -> None:
        """Check that references name a stage of the right kind: a policy, a reward model."""
        settings = {step.name: step.settings for step in self.steps}
        trained = {name: each for name, each in settings.items() if isinstance(each, Recipe)}
        for step in self.steps:
            for key, names in step.references.items():
                recipe = trained.get(names[0])
                if recipe is None:
                    continue
                own = ("model",) if isinstance(step.settings, LabelSpec) else ("model", "base")
                if key == own and recipe.scalar_head:
                    rule = f"{show_path(key)} is stage {names[0]}, which trains a reward model"
                    hint = "name the stage it was trained from, which can generate text"
                elif key == ("model", "base") and not is_mergeable(recipe.adapter):
                    rule = f"{show_path(key)} is stage {names[0]}, whose prefix cannot be merged"
                    hint = "train that stage with adapter.kind = lora"
                elif _gives_reward(key) and not recipe.scalar_head:
                    rule = f"{show_path(key)} is stage {names[0]}, which trains no reward model"
                    hint = "name a stage with stage: reward"
                else:
                    continue
                where = step.document.place(key)
                self.problems.append(AlignkitError(f"{where}: {rule}", hint=hint))

    def check_outputs(self) -> None:
        """Check that no stage can delete the pipeline's folder or another stage's output."""
        folders = {step.name: Path(realpath(step.output)) for step in self.steps}
        for index, step in enumerate(self.steps):
            here = folders[step.name]
            if Path(realpath(self.output)).is_relative_to(here):
                rule = f"output is or contains the pipeline's folder: {step.output}"
            else:
                others = [
                    other.name
                    for other in self.steps[:index]
                    if here.is_relative_to(folders[other.name])
                    or folders[other.name].is_relative_to(here)
                ]
                if not others:
                    continue
                rule = f"output overlaps that of stage {others[0]}: {step.output}"
            where = step.document.place(("output",))
            hint = f"remove the key to use {self.output}/{step.name}"
            self.problems.append(AlignkitError(f"{where}: {rule}", hint=hint))

    def _mapping(self, name: str, overrides: list[str]) -> tuple[str, Document]:
        """Kind and merged mapping of a stage, with overrides applied."""
        path: KeyPath = ("stages", name)
        where = self.document.place(path)
        values = self.document.values["stages"][name]
        if not isinstance(values, dict):
            rule = f"stages.{name} must be a mapping of keys to values, got {values!r}"
            _fail(f"{where}: {rule}", f"as in {name}: {{recipe: quickstart/sft.yaml}}")
        if not STAGE_NAME.fullmatch(name):
            rule = f"stages.{name} is not a valid stage name"
            _fail(f"{where}: {rule}", "use letters, digits, - and _, as in sft-2")
        document = part_of(self.document, path)
        document.places[()] = where
        if "recipe" in values:
            document = self._with_recipe(document, name)
        if "extends" in document.values:
            hint = "write recipe: FILE instead; the stage's other keys override it"
            _fail(f"{document.place(('extends',))}: a stage cannot use extends", hint)
        apply_overrides(document, overrides)
        kind = next((key for key in READERS if key in document.values and key != TRAINING), None)
        if kind is None:
            return TRAINING, document
        others = [key for key in document.values if key != kind]
        if others or not isinstance(document.values[kind], dict):
            rule = f"stages.{name} must contain the mapping {kind} and nothing else"
            _fail(f"{where}: {rule}", f"move {', '.join(others)} into it" if others else "")
        return kind, part_of(document, (kind,))

    def _with_recipe(self, document: Document, name: str) -> Document:
        """The stage over the recipe file that it names."""
        where, wanted = document.place(("recipe",)), document.values.pop("recipe")
        if not isinstance(wanted, str):
            _fail(f"{where}: stages.{name}.recipe must be a file or shipped name, got {wanted!r}")
        nearby = [folder / wanted for folder in document.folders]
        try:
            file = next((path for path in nearby if isfile(path)), None) or find_recipe(wanted)
        except RecipeError as error:
            rule = f"stages.{name}.recipe names no recipe: {wanted!r}"
            _fail(f"{where}: {rule}", error.problems[0].hint)
        recipe = read_document(file)
        if isinstance(recipe.values.get("stages"), dict):
            _fail(f"{where}: stages.{name}.recipe names a pipeline: {wanted!r}", "name a recipe")
        # Every recipe file has its own output; in a pipeline the run goes to the pipeline's folder.
        recipe.values.pop("output", None)
        merged = lay_over(anchor_files(recipe), anchor_files(document))
        merged.places = {(): document.places[()]} | {k: p for k, p in merged.places.items() if k}
        return merged

    def _problem(self, key: KeyPath, rule: str, hint: str) -> None:
        self.problems.append(AlignkitError(f"{self.document.place(key)}: {rule}", hint=hint))


def _gives_reward(key: KeyPath) -> bool:
    """Whether the key names a reward model: `reward.model`, or a label stage's `reward`."""
    return key[0] == "reward" and key[-1] in ("reward", "model")


def _fail(message: str, hint: str = "") -> None:
    raise RecipeError([AlignkitError(message, hint=hint)])


def _of_stage(problem: AlignkitError, name: str) -> AlignkitError:
    """The problem with the stage's name if it comes from the command line, which has no lines."""
    start = "command line: "
    if not problem.message.startswith(start):
        return problem
    message = f"{start}{name}: {problem.message.removeprefix(start)}"
    return AlignkitError(message, hint=problem.hint)
