"""Rules that turn foreign datasets, folders and files into sources of a recipe."""

from __future__ import annotations

import difflib
import json
import shlex
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, DataError, RecipeError
from alignkit.recipe.assets import show_file
from alignkit.recipe.importing.datasets import UNREAD, ForeignRows, llama_factory_rows
from alignkit.recipe.importing.entries import axolotl_rows, trl_rows
from alignkit.recipe.importing.fields import Foreign, Rule, Settings
from alignkit.recipe.reading.yaml_values import KeyPath, read_text


def find(foreign: Foreign, name: str) -> Path | None:
    """The file or folder of a path that is relative to the foreign working folder.

    Args:
        foreign: says where to look: the working folder, then those above the foreign file.
        name: the path.
    """
    path = Path(name).expanduser()
    places = (folder / path for folder in foreign.folders)
    return next((place for place in places if place.exists()), None)


def place(foreign: Foreign, name: str, key: KeyPath) -> str:
    """A path as the recipe names it; one that is not found is noted and kept.

    Args:
        foreign: where it is noted.
        name: the path.
        key: of the recipe.
    """
    if find(foreign, name) is None:
        foreign.missing.append(name)
        foreign.pending.append(key)
    return _from_here(foreign, name)


def _from_here(foreign: Foreign, name: str) -> str:
    """The path for someone in the working folder; as it is if it is not found."""
    path = find(foreign, name)
    return name if path is None or (Path.cwd() / name).exists() else str(path.resolve())


def base_model(key: str) -> Rule:
    """The model to start from: a folder, else a name on the hub."""

    def run(foreign: Foreign, _: str) -> Settings:
        name = foreign.text(key)
        if not name:
            return {}
        path = find(foreign, name)
        if path is None and name.startswith((".", "/", "~")):
            foreign.missing.append(name)
        return {"model.base": _from_here(foreign, name)}

    return Rule(("model.base",), run)


def template_file(key: str) -> Rule:
    """A file with a chat template."""

    def run(foreign: Foreign, _: str) -> Settings:
        name = foreign.text(key)
        if not name:
            return {}
        if "{" in name or "\n" in name:
            foreign.lose(key, "write the template to a file, and name that")
            return {}
        path = find(foreign, name)
        if path is not None and path.is_dir():
            path, name = path / "chat_template.jinja", f"{name}/chat_template.jinja"
        return {"model.chat_template": place(foreign, name, ("model", "chat_template"))}

    return Rule(("model.chat_template",), run)


def add_source(
    foreign: Foreign, key: str, side: str, rows: ForeignRows, command: str, *, known: bool = True
) -> None:
    """Add one source of a recipe.

    Args:
        foreign: gets the notes.
        key: the foreign key that names the rows.
        side: `train` or `eval`.
        rows: as read, their path as the foreign file has it.
        command: that rewrites them, without its output.
        known: false if their description was not found: then they are rewritten.
    """
    for note in rows.notes:
        foreign.differ(key, f"{rows.name}: {note}")
    sources = foreign.sources[side]
    here: KeyPath = ("data", side, len(sources), "path")
    if known and rows.in_place:
        source = rows.source()
        if rows.path:
            source["path"] = place(foreign, rows.path, here)
    else:
        output = f"{Path(rows.name).stem}.jsonl"
        if output == rows.path:
            output = f"{Path(rows.name).stem}-converted.jsonl"
        if rows.path and rows.path.endswith(UNREAD):
            command = f"# write the rows of {rows.path} as JSON, one a line,"
        foreign.first.append(f"{command} -o {shlex.quote(output)}")
        foreign.pending.append(here)
        source = {"path": output} | ({"take": rows.take} if rows.take else {})
        foreign.differ(key, f"{rows.name}: {_why(rows, known)}, by the command below")
    sources.append(source)


def _why(rows: ForeignRows, known: bool) -> str:
    """Why rows are rewritten, in words."""
    if not known:
        return "described in a file that is not here; rewritten first"
    if not rows.turn_keys:
        return "rewritten first"
    keys = " and ".join(rows.turn_keys.values())
    speakers = ", ".join(f"{theirs} is {ours}" for theirs, ours in rows.speakers.items())
    return f"turns of {keys}, where {speakers}; rewritten first"


def llama_factory_data(key: str, side: str) -> Rule:
    """Names of `dataset_info.json`."""

    def run(foreign: Foreign, _: str) -> Settings:
        names = foreign.names(key)
        if not names:
            return {}
        folder = foreign.text("dataset_dir")
        info = {} if folder == "ONLINE" else _dataset_info(foreign, folder)
        for name in names:
            if folder == "ONLINE":
                rows = ForeignRows(name, hub=name)
            elif info is None:
                rows = ForeignRows(name)
            else:
                rows = _named(foreign, key, name, info, folder)
            if foreign.get("max_samples") is not None:
                most = foreign.whole("max_samples")
                rows = _taking(rows, min(most, rows.take or most))
            file = shlex.quote(_from_here(foreign, f"{folder}/dataset_info.json"))
            command = f"alignkit data convert {file} --name {shlex.quote(name)}"
            add_source(foreign, key, side, rows, command, known=info is not None)
        return {f"data.{side}": foreign.sources[side]}

    return Rule((f"data.{side}",), run)


def _named(foreign: Foreign, key: str, name: str, info: dict[str, Any], folder: str) -> ForeignRows:
    if name not in info:
        near = difflib.get_close_matches(name, info, n=1)
        rule = f"{foreign.place(key)} names {name}, which {folder}/dataset_info.json does not have"
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(info)}"
        raise RecipeError([AlignkitError(rule, hint=hint)])
    try:
        rows = llama_factory_rows(name, info[name])
    except DataError as error:
        raise RecipeError(
            [AlignkitError(f"{foreign.place(key)}: {error.message}", hint=error.hint)]
        ) from None
    if rows.path:
        rows = ForeignRows(**{**rows.__dict__, "path": str(Path(folder) / rows.path)})
    return rows


def _taking(rows: ForeignRows, take: int) -> ForeignRows:
    return ForeignRows(**{**rows.__dict__, "take": take})


def _dataset_info(foreign: Foreign, folder: str) -> dict[str, Any] | None:
    """The values of dataset_info.json; None if it is not found."""
    name = f"{folder}/dataset_info.json"
    path = find(foreign, name)
    if path is None:
        if name not in foreign.missing:
            foreign.missing.append(name)
        return None
    try:
        info = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        problem = AlignkitError(f"{show_file(path)}: is not JSON: {error}", hint="correct it")
        raise RecipeError([problem]) from None
    if isinstance(info, dict) and all(isinstance(entry, dict) for entry in info.values()):
        return info
    problem = AlignkitError(f"{show_file(path)}: must be a mapping of names to mappings")
    raise RecipeError([problem])


def entries(key: str, side: str) -> Rule:
    """A list of `datasets:`, as Axolotl and TRL have it."""

    def run(foreign: Foreign, _: str) -> Settings:
        items = foreign.get(key) or []
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            foreign.wrong(key, "must be a list of mappings", "as in [{path: rows.jsonl}]")
        for item in items:
            _add_entry(foreign, key, side, item)
        return {f"data.{side}": foreign.sources[side]} if items else {}

    return Rule((f"data.{side}",), run)


def _add_entry(foreign: Foreign, key: str, side: str, item: dict[str, Any]) -> None:
    of_axolotl = "base_model" in foreign or "type" in item
    try:
        if of_axolotl:
            rows = axolotl_rows(item, foreign.text("rl") or _reward(foreign))
        else:
            rows = trl_rows(item)
    except DataError as error:
        problem = AlignkitError(f"{foreign.place(key)}: {error.message}", hint=error.hint)
        raise RecipeError([problem]) from None
    if not rows.in_place and rows.path and find(foreign, rows.path) is None:
        foreign.missing.append(rows.path)
    name = shlex.quote(str(item.get("path")))
    command = f"alignkit data convert {shlex.quote(foreign.file)} --name {name}"
    add_source(foreign, key, side, rows, command)


def _reward(foreign: Foreign) -> str | None:
    return "reward" if foreign.flag("reward_model") else None


def held_out_share(key: str) -> Rule:
    """The share of rows that are held out."""

    def run(foreign: Foreign, _: str) -> Settings:
        share = foreign.number(key) if foreign.get(key) is not None else 0.0
        if share >= 1:
            foreign.lose(key, "a share of the rows is held out, not a number: set eval_fraction")
        return {"data.eval_fraction": share} if 0 < share < 1 else {}

    return Rule(("data.eval_fraction",), run)


def named_dataset() -> Rule:
    """TRL's `dataset_name` with its configuration and splits."""

    def run(foreign: Foreign, _: str) -> Settings:
        name = foreign.text("dataset_name")
        if not name:
            return {}
        rows = {"path": name, "name": foreign.get("dataset_config")}
        _add_entry(foreign, "dataset_name", "train", rows | {"split": foreign.text(_TRAIN)})
        settings = {"data.train": foreign.sources["train"]}
        if foreign.text("eval_strategy") in ("", "no"):
            return settings
        if "path" in foreign.sources["train"][0]:
            foreign.differ("eval_strategy", "a file has no test split: set data.eval")
            return settings
        _add_entry(foreign, "dataset_name", "eval", rows | {"split": foreign.text(_TEST)})
        return settings | {"data.eval": foreign.sources["eval"]}

    return Rule(("data.train", "data.eval"), run)


_TRAIN, _TEST = "dataset_train_split", "dataset_test_split"


def text_column(key: str) -> Rule:
    """The column of plain text."""

    def run(foreign: Foreign, _: str) -> Settings:
        name = foreign.text(key)
        if name in ("", "text") or not foreign.sources["train"]:
            return {}
        for source in foreign.sources["train"]:
            source.update({"format": "text", "columns": {"text": name}})
        return {"data.train": foreign.sources["train"]}

    return Rule(("data.train",), run)
