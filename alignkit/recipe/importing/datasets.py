"""How other toolkits describe rows -> what alignkit must know to read them.

Pure functions of plain values: nothing is opened. Entries of LLaMA-Factory's `dataset_info.json`
are read here, items of Axolotl's and TRL's `datasets:` in entries.py. What comes out says where the
rows are, which of alignkit's formats they have, and how their columns, the keys of their turns and
their speakers are called. Where alignkit reads them as they are (`ForeignRows.in_place`), a recipe
names them; where turns must be rewritten, `alignkit data convert` writes a file that it reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alignkit.errors import DataError
from alignkit.recipe.rows import RowFormat

READ = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv")
"""Ends of the files of rows that alignkit reads."""

UNREAD = (".txt", ".arrow")
"""Ends of files of rows that it does not."""

_OURS = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "observation": "tool",
    "function_call": "function_call",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_MARKS = ("weight", "train", "trainable", "loss", "loss_weight", "loss_mask")


_KEYS = (
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"),
    *("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags"),
    "revision",
)
_CHOICES = {
    "num_samples": "its first num_samples rows are taken; there they are drawn at random, and "
    "repeated if there are too few",
    "revision": "the newest revision is read",
    "folder": "the folder inside the dataset is not looked at",
}
"""Keys that choose rows, which are read differently."""
_COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "tools", "images"),
    *("videos", "audios", "chosen", "rejected", "kto_tag"),
)
_TAGS = (
    *("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag"),
    *("function_tag", "system_tag"),
)


@dataclass(frozen=True)
class ForeignRows:
    """One source of rows, as another toolkit describes it.

    Args:
        name: what the toolkit calls it.
        path: a file or folder; None for a dataset on the hub.
        hub: a dataset on the hub; None for a file.
        subset: configuration of the hub dataset.
        split: of the hub dataset.
        format: one of alignkit's.
        columns: alignkit's key -> the rows' column, as in `SourceSpec.columns`.
        turn_keys: `role`, `content` and perhaps `train` -> what a turn calls it; empty without
            turns.
        speakers: a turn's speaker -> user, assistant, system, tool or function_call.
        take: only this many rows, from the start.
        layout: `segments` for Axolotl's input_output, lists of {label, text} whose last trained
            part is the completion; `rows` otherwise.
        notes: what is done differently, one sentence each.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    format: RowFormat = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    turn_keys: Mapping[str, str] = field(default_factory=dict)
    speakers: Mapping[str, str] = field(default_factory=dict)
    take: int | None = None
    layout: Literal["rows", "segments"] = "rows"
    notes: tuple[str, ...] = ()

    @property
    def in_place(self) -> bool:
        """Whether alignkit reads the rows as they are, given format and columns."""
        if self.layout != "rows" or (self.path and self.path.endswith(UNREAD)):
            return False
        if not self.turn_keys:
            return True
        if self.turn_keys.get("train", _MARKS[0]) not in _MARKS:
            return False
        keys = (self.turn_keys["role"], self.turn_keys["content"])
        known = {("role", "content"): _OURS, ("from", "value"): _SHAREGPT}.get(keys)
        return known is not None and self.speakers.items() <= known.items()

    def source(self) -> dict[str, Any]:
        """The source as an item of a recipe's `data.train`, for rows that are read in place."""
        place = {"path": self.path} if self.path else {"hub": self.hub, "name": self.subset}
        values: dict[str, Any] = {key: value for key, value in place.items() if value}
        if self.hub and self.split != "train":
            values["split"] = self.split
        if self.format != "auto":
            values["format"] = self.format
        if self.columns:
            values["columns"] = dict(self.columns)
        return values | ({"take": self.take} if self.take else {})


def llama_factory_rows(name: str, entry: Mapping[str, Any]) -> ForeignRows:
    """One entry of a `dataset_info.json`.

    Args:
        name: its key.
        entry: its value.

    Returns:
        The rows; a path is relative to the folder of dataset_info.json.

    Raises:
        DataError: an unknown formatting, or rows that lie where alignkit does not look.
    """
    with_text_keys(entry, name)
    shape = text_in(entry, "formatting") or "alpaca"
    if shape not in ("alpaca", "sharegpt", "openai"):
        raise DataError(
            f"{name}: formatting is {shape!r}", hint="known: alpaca, sharegpt and openai"
        )
    hub, path = text_in(entry, "hf_hub_url"), text_in(entry, "file_name")
    if not hub and not path:
        raise DataError(
            f"{name}: has neither file_name nor hf_hub_url",
            hint="alignkit reads files and the Hugging Face hub; download the rows and name the "
            "file as file_name",
        )
    given, tags = mapping_in(entry, "columns"), mapping_in(entry, "tags")
    for named in (given or {}, tags or {}):
        for key in named:
            text_in(named, key)
    columns = _alpaca_columns(given) if shape == "alpaca" else _turn_columns(given)
    ranking, take = _flag_in(entry, "ranking"), _count_in(entry, "num_samples")
    turns = shape != "alpaca"
    role, content, speakers = _tags(tags) if turns else ("", "", {})
    notes = [
        f"{kind} are left out: alignkit trains on text"
        for kind in ("images", "videos", "audios")
        if (given or {}).get(kind)
    ]
    notes += unknown(entry, _KEYS) + unknown(given, _COLUMNS) + unknown(tags, _TAGS)
    notes += [says for key, says in _CHOICES.items() if entry.get(key)]
    if shape == "alpaca" and "query" in columns:
        notes.append("instruction and input are joined by an empty line, there by a line break")
    return ForeignRows(
        name,
        path=None if hub else path,
        hub=hub or None,
        subset=text_in(entry, "subset"),
        split=text_in(entry, "split") or "train",
        format=_llama_factory_format(columns, turns=turns, ranking=ranking, role=role),
        columns=_renames(columns, turns=turns, ranking=ranking, role=role),
        turn_keys={"role": role, "content": content} if turns else {},
        speakers=speakers,
        take=take,
        notes=tuple(notes),
    )


def mapping_in(entry: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The mapping under a key; None if there is none.

    Raises:
        DataError: there is something else.
    """
    value = entry.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"{key} must be a mapping, got {value!r}", hint="as in {key: name}")
    return None if value is None else with_text_keys(value, key)


def with_text_keys(given: Mapping[Any, Any], where: str) -> Mapping[str, Any]:
    """A mapping whose keys are text.

    Raises:
        DataError: one is not.
    """
    for key in given:
        if not isinstance(key, str):
            raise DataError(
                f"{where}: a key must be text, got {key!r}", hint="put it in quotes, or remove it"
            )
    return given


def text_in(entry: Mapping[str, Any], key: str) -> str | None:
    """The text under a key; None if there is none.

    Raises:
        DataError: there is something else.
    """
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{key} must be text, got {value!r}", hint="a number goes in quotes")
    return value


def _count_in(entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(
        f"{key} must be a whole number of 1 or more, got {value!r}", hint=f"as in {key}: 1000"
    )


def _flag_in(entry: Mapping[str, Any], key: str) -> bool:
    value = entry.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{key} must be true or false, got {value!r}", hint="without quotes")
    return bool(value)


def unknown(given: Mapping[str, Any] | None, known: Iterable[str]) -> list[str]:
    """A note for each key of a mapping that nobody reads.

    Args:
        given: the mapping; None for none.
        known: keys that are read, or known to mean nothing here.
    """
    names, notes = list(known), []
    for key in given or {}:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
            resembles = f"; it resembles {near[0]}" if near else ""
            notes.append(f"{key} is not a key that alignkit knows of{resembles}")
    return notes


def _alpaca_columns(given: Mapping[str, Any] | None) -> dict[str, str]:
    """Their keys -> columns. With `columns`, those that it does not name do not exist."""
    standard = {"prompt": "instruction", "query": "input", "response": "output"}
    return {k: str(v) for k, v in (standard if given is None else given).items() if v}


def _turn_columns(given: Mapping[str, Any] | None) -> dict[str, str]:
    return {k: str(v) for k, v in ({"messages": "conversations"} | dict(given or {})).items() if v}


def _tags(tags: Mapping[str, Any] | None) -> tuple[str, str, dict[str, str]]:
    """Keys of a turn, and its speakers. With `tags`, those that it does not name do not exist."""
    meant = {
        "user_tag": ("user", "human"),
        "assistant_tag": ("assistant", "gpt"),
        "observation_tag": ("tool", "observation"),
        "function_tag": ("function_call", "function_call"),
        "system_tag": ("system", "system"),
    }
    if tags is None:
        return "from", "value", {usual: ours for ours, usual in meant.values()}
    speakers = {str(tags[tag]): ours for tag, (ours, _) in meant.items() if tags.get(tag)}
    speakers = speakers or {usual: ours for ours, usual in meant.values()}
    return str(tags.get("role_tag") or "from"), str(tags.get("content_tag") or "value"), speakers


def _llama_factory_format(
    columns: Mapping[str, str], *, turns: bool, ranking: bool, role: str
) -> RowFormat:
    if ranking:
        return "sharegpt_preference" if turns else "preference"
    if turns:
        return "messages" if role == "role" else "sharegpt"
    return "alpaca" if "response" in columns else "text"


def _renames(
    columns: Mapping[str, str], *, turns: bool, ranking: bool, role: str
) -> dict[str, str]:
    """Our key -> column, without those of the same name."""
    messages = "messages" if role == "role" and not ranking else "conversations"
    ours = {
        **({"messages": messages} if turns else {"prompt": "instruction", "query": "input"}),
        "response": "output",
        "history": "history",
        "system": "system",
        "tools": "tools",
        **({"chosen": "chosen", "rejected": "rejected"} if ranking else {}),
        "kto_tag": "label",
    }
    if not turns and not ranking and "response" not in columns:
        ours = {"prompt": "text"}  # plain text, as for pre-training
    named = {ours[theirs]: column for theirs, column in columns.items() if theirs in ours}
    return {key: column for key, column in named.items() if key != column}
