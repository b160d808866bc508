"""`alignkit recipes`: list, copy, explain, describe and import recipes."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from alignkit.cli.output import print_json, say, stdout
from alignkit.cli.training.importing import import_recipe
from alignkit.errors import AlignkitError
from alignkit.files import output_path, write_text

recipes = typer.Typer(no_args_is_help=True)
recipes.command("import")(import_recipe)


@recipes.command("list")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Shipped recipes and pipelines with their first comment line."""
    from alignkit.recipe.assets import assets_root
    from alignkit.recipe.reading.load import shipped_pipelines, shipped_recipes

    root = assets_root() / "recipes"
    pipelines = shipped_pipelines()
    listed = {}
    for name in [*shipped_recipes(), *pipelines]:
        first = (root / name).read_text(encoding="utf-8").split("\n")[0]
        about = first.lstrip("# ") if first.startswith("#") else ""
        listed[name] = f"pipeline: {about}" if name in pipelines else about
    if as_json:
        print_json(listed)
        return
    width = max(map(len, listed), default=0)
    for name, about in listed.items():
        stdout.print(Text(f"{name:<{width}}  ", style="bold") + Text(about))


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe or pipeline.")],
    target: Annotated[Path | None, typer.Argument(help="File to write.")] = None,
) -> None:
    """Copy a shipped recipe, to edit it."""
    from alignkit.recipe.reading.load import find_recipe

    source = find_recipe(name)
    path = output_path(target or Path(source.name))
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise AlignkitError(f"{path} already exists", hint="name another file")
    write_text(path, source.read_text(encoding="utf-8"))
    say(f"wrote {path}")


@recipes.command("explain")
def explain(
    key: Annotated[str | None, typer.Argument(help="A key such as training.warmup.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage of the recipe. Default: the first that has the key.")
    ] = None,
) -> None:
    """What every key of a recipe means, with its default."""
    from alignkit.recipe.stages.registry import stages

    if stage is not None and stage not in stages():
        raise AlignkitError(f"there is no stage {stage!r}", hint=f"stages: {', '.join(stages())}")
    lines: dict[str, tuple[str, str, str]] = {}
    wanted: dict[str, tuple[str, str, str]] = {}
    for name in [stage] if stage else stages():
        here = dict(_explanations(stages()[name], ""))
        lines = here | lines
        wanted = {path: text for path, text in here.items() if key is None or _inside(path, key)}
        if wanted:
            break
    if not wanted:
        near = difflib.get_close_matches(str(key), map(_without_kinds, lines), n=1)
        last = {name.rsplit(".", 1)[-1]: name for name in lines}
        near = near or [last[n] for n in difflib.get_close_matches(str(key), last, n=1)]
        hint = f"did you mean {near[0]}?" if near else "alignkit recipes explain shows all keys"
        raise AlignkitError(f"there is no key {key!r}", hint=hint)
    for name, (kind, default, text) in wanted.items():
        stdout.print(Text(name, style="bold") + Text(f"  {kind}{default}", style="dim"))
        stdout.print(Text(f"    {text}"))


@recipes.command("schema")
def schema(
    stage: Annotated[str, typer.Option(help="Stage of the recipe.")] = "sft",
) -> None:
    """The JSON schema of a recipe, for editors."""
    from alignkit.recipe.stages.registry import stages

    if stage not in stages():
        raise AlignkitError(f"there is no stage {stage!r}", hint=f"stages: {', '.join(stages())}")
    print_json(stages()[stage].model_json_schema())


def _inside(name: str, key: str) -> bool:
    """Whether the key of a recipe is `key` or a part of it; `key` may name a kind."""
    bare = _without_kinds(key)
    return f"{_without_kinds(name)}.".startswith(f"{bare}.") and (
        bare == key or name.startswith(key)
    )


def _without_kinds(name: str) -> str:
    """`objective[ipo].tau` as a recipe writes it: `objective.tau`."""
    return re.sub(r"\[\w+\]", "", name)


def _explanations(
    model: type[Any], parent: str
) -> typing.Iterator[tuple[str, tuple[str, str, str]]]:
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined

    from alignkit.recipe.reading.problems import choice_of, sections_of

    for name, field in model.model_fields.items():
        path = f"{parent}.{name}" if parent else name
        default = field.get_default(call_default_factory=True)
        sections = sections_of(field.annotation)
        if field.is_required() or default is PydanticUndefined:
            shown = "  required"
        elif isinstance(default, BaseModel) or sections:
            shown = ""
        else:
            shown = f"  default {_plain(default)}"
        text = inspect.cleandoc(field.description or "").replace("\n", " ")
        yield path, (_kind(field.annotation, sections), shown, text)
        choices = {section: choice_of(section) for section in sections}
        several = len([choice for choice in choices.values() if choice]) > 1
        if several and isinstance(default, BaseModel) and hasattr(default, "kind"):
            kinds = " | ".join(choice[1] for choice in choices.values() if choice)
            yield f"{path}.kind", (kinds, f"  default {default.kind}", "Which of these.")
        for section, choice in choices.items():
            inside = path
            if several and choice:
                by, named = choice
                inside = f"{path}[{named}]"
                about = inspect.cleandoc(section.__doc__ or "").replace("\n", " ")
                yield inside, (f"{by}: {named}" if by != named else f"by {by}", "", about)
            for inner, value in _explanations(section, inside):
                if not (several and inner.endswith(".kind")):
                    yield inner, value


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return "{}" if isinstance(value, dict) else str(value)


def _kind(annotation: Any, sections: list[type[Any]]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if sections:
        return "list of sections" if origin is tuple else "section"
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return _kind(arguments[0], sections)
    if origin is tuple:
        return f"list of {_kind(arguments[0], sections)}"
    if arguments and origin is not dict:
        return " | ".join(_kind(part, sections) for part in arguments)
    if annotation is type(None):
        return "null"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false"}
    return names.get(annotation, "mapping")
