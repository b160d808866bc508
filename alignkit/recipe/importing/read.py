"""A foreign file -> its values with their places, and whose file it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RecipeError
from alignkit.recipe.assets import show_file
from alignkit.recipe.importing.axolotl import AXOLOTL
from alignkit.recipe.importing.commands import find_command
from alignkit.recipe.importing.fields import Foreign, Toolkit
from alignkit.recipe.importing.llama_factory import LLAMA_FACTORY
from alignkit.recipe.importing.trl import TRL
from alignkit.recipe.reading.yaml_values import YamlValues, read_text, read_values

TOOLKITS = {toolkit.name: toolkit for toolkit in (TRL, LLAMA_FACTORY, AXOLOTL)}
"""Name -> toolkit."""

_DATA = (".yaml", ".yml", ".json")
_WHOSE = f"say whose file it is: --from {', --from '.join(TOOLKITS)}"


def read_foreign(path: Path, processes: int | None = None) -> Foreign:
    """The values of a file.

    Args:
        path: YAML, JSON, or a text with a command line of TRL.
        processes: that share a step, if the user says so.

    Raises:
        RecipeError: it cannot be read, holds no settings, or writes a key twice.
    """
    name, text = show_file(path), read_text(path)
    folders = (Path.cwd(), *path.resolve().parents)
    is_data = path.suffix.lower() in _DATA
    command = None if is_data else find_command(text, name)
    if command is None and not is_data and text.startswith("#!"):
        raise _no_settings(name)
    if command is None:
        read = _mapping(text.expandtabs(2) if path.suffix == ".json" else text, name)
        values, places = _flat(read)
        return Foreign(name, folders, values, places, processes)
    values, places = {}, {}
    config = command.values.pop("config", None)
    if config is not None:
        where = f"{name}:{command.lines['config']}"
        values, places = _flat(_config(str(config), folders, where))
    places |= {key: f"{name}:{line}" for key, line in command.lines.items()}
    started = command.values.pop("num_processes", command.processes)
    count = processes if processes is not None else started
    foreign = Foreign(name, folders, values | command.values, places, count, command.script)
    for other in command.others:
        foreign.differ(
            "", f"not read: {other}. The first command is read: write each to a file of its own"
        )
    return foreign


def _config(name: str, folders: Sequence[Path], where: str) -> YamlValues:
    """The file that `--config` of a command line names."""
    for folder in folders:
        if (folder / name).is_file():
            return _mapping(read_text(folder / name), show_file(folder / name))
    problem = AlignkitError(
        f"{where}: --config names no file: {name!r}",
        hint="looked in the working folder and in the folders above the script",
    )
    raise RecipeError([problem])


def _mapping(text: str, name: str) -> YamlValues:
    read = read_values(text, name)
    if read.problems:
        raise RecipeError(read.problems)
    if not isinstance(read.values, dict):
        raise _no_settings(name)
    return read


def _no_settings(name: str) -> RecipeError:
    problem = AlignkitError(
        f"{name}: holds no settings of a toolkit that alignkit knows",
        hint="name a YAML or JSON file of LLaMA-Factory, Axolotl or TRL, or a script with a "
        "command such as `trl sft --model_name_or_path …`",
    )
    return RecipeError([problem])


def _flat(read: YamlValues) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys of the file, and of the mappings that a toolkit nests, as `trl.beta`."""
    nested = {key for toolkit in TOOLKITS.values() for key in toolkit.nested}
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for key, value in read.values.items():
        places[key] = read.places[(key,)]
        if key in nested and isinstance(value, dict):
            values |= {f"{key}.{inner}": item for inner, item in value.items()}
            places |= {f"{key}.{inner}": read.places[key, inner] for inner in value}
        else:
            values[key] = value
    return values, places


def toolkit_of(foreign: Foreign, wanted: str | None = None) -> Toolkit:
    """The toolkit that a file belongs to.

    Args:
        foreign: as read.
        wanted: its name, if the user says so; it wins.

    Raises:
        RecipeError: the keys fit none, or two equally well.
        AlignkitError: there is no toolkit of that name.
    """
    if wanted is not None:
        if wanted not in TOOLKITS:
            raise AlignkitError(
                f"--from {wanted}: alignkit does not read this toolkit",
                hint=f"one of {', '.join(TOOLKITS)}",
            )
        return TOOLKITS[wanted]
    if foreign.script:
        return TRL
    if {"model", "data", "output"} <= foreign.values.keys():
        rule = f"{foreign.file}: is a recipe of alignkit already"
        raise RecipeError([AlignkitError(rule, hint="run `alignkit plan` with it")])
    keys = {name: {row.key for row in toolkit.table} for name, toolkit in TOOLKITS.items()}
    own = {
        name: len(
            known.intersection(foreign.values).difference(
                *(others for other, others in keys.items() if other != name)
            )
        )
        for name, known in keys.items()
    }
    (first, most), (second, next_most), *_ = sorted(own.items(), key=lambda item: -item[1])
    if most == next_most:
        rule = (
            f"could be of {TOOLKITS[first].title} or of {TOOLKITS[second].title}"
            if most
            else "has no key by which a toolkit could be told"
        )
        raise RecipeError([AlignkitError(f"{foreign.file}: {rule}", hint=_WHOSE)])
    return TOOLKITS[first]
