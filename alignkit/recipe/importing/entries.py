"""Items of `datasets:`, as Axolotl and TRL have it -> `ForeignRows`; see datasets.py."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from alignkit.errors import DataError
from alignkit.recipe.importing.datasets import (
    ForeignRows,
    mapping_in,
    text_in,
    unknown,
    with_text_keys,
)
from alignkit.recipe.importing.locating.places import LOADERS, place_of
from alignkit.recipe.rows import RowFormat


def axolotl_rows(entry: Mapping[str, Any], rl: str | None = None) -> ForeignRows:
    """One item of Axolotl's `datasets:`.

    Args:
        entry: the item.
        rl: the file's `rl`; `reward` for `reward_model: true`.

    Raises:
        DataError: no path, or a type that alignkit has no format for.
    """
    place = place_of(entry)
    notes = [says for key, says in _IGNORED.items() if entry.get(key) not in (None, False)]
    for note in (*unknown(entry, _KEYS), *dict.fromkeys(notes)):
        place = _with(place, note=note)
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return _user_defined(place, with_text_keys(kind, f"{place.name}: type"), rl)
    name = str(kind or "").partition(":")[0]
    base, _, function = name.partition(".")
    if base.startswith("chat_template") or base in ("sharegpt", "bradley_terry") or not name:
        return _axolotl_turns(place, entry, base or "chat_template", function, rl)
    known = _AXOLOTL_RL if rl in ("dpo", "ipo", "orpo", "simpo", "reward") else _AXOLOTL
    known = _AXOLOTL_KTO if rl == "kto" else known
    found = known.get(name) or known.get(f"chatml.{function}") or known.get(base)
    if found is None:
        near = difflib.get_close_matches(name, [*known, "chat_template"], n=1)
        raise DataError(
            f"{place.name} has the type {name}, which alignkit has no format for",
            hint=f"did you mean {near[0]}?"
            if near
            else "write the rows as messages or prompt and completion (docs/data.md)",
        )
    row_format, columns, note = found
    if name == "completion" and entry.get("field"):
        columns = {"text": text_in(entry, "field") or "text"}
    layout: Any = "segments" if name.startswith("input_output") else "rows"
    return _with(place, format=row_format, columns=columns, layout=layout, note=note)


_KEYS = (
    *("path", "name", "split", "type", "data_files", "ds_type", "revision", "trust_remote_code"),
    *("field", "field_human", "field_model", "field_messages", "field_tools", "field_thinking"),
    *("field_chosen", "field_rejected", "field_prompt", "field_completion", "field_label"),
    *("message_field_role", "message_field_content", "message_property_mappings", "roles"),
    *("message_field_training", "message_field_training_detail", "template_thinking_key"),
    *("chat_template", "chat_template_jinja", "roles_to_train", "train_on_eos", "train_on_eot"),
    *("drop_system_message", "split_thinking", "conversation", "shards", "shards_idx"),
    *("preprocess_shards", "input_format", "input_transform", "logprobs_field", "temperature"),
)
_SHARD = "shards are not read: all rows are taken, not one part of them"
_NAMED = "{} is not read: name the column in data.train, under columns"
_IGNORED = {
    "shards": _SHARD,
    "shards_idx": _SHARD,
    "revision": "the newest revision is read",
    "trust_remote_code": "no code of a dataset is run",
    "input_transform": "input_transform is not read: rows are taken as they are",
    "input_format": "input_format is not read: rows are taken as they are",
    "conversation": "conversation is not read: the model's chat template writes the turns",
    "train_on_eot": "the token that ends a trained turn is trained, no other",
    "split_thinking": "reasoning is read from the turn's reasoning_content",
    "template_thinking_key": "reasoning is read from the turn's reasoning_content",
    "logprobs_field": "log-probabilities in rows are not read",
    "temperature": "log-probabilities in rows are not read",
} | {
    f"field_{name}": _NAMED.format(f"field_{name}")
    for name in ("human", "model", "prompt", "completion", "label")
}
"""Keys of an entry that are not read, and what happens instead."""
_TEXT = "the model's chat template takes the place of Axolotl's own prompt text"
_ALPACA: tuple[RowFormat, dict[str, str], str] = ("alpaca", {}, _TEXT)
_AXOLOTL: dict[str, tuple[RowFormat, dict[str, str], str]] = {
    "alpaca": _ALPACA,
    "alpaca_chat": _ALPACA,
    "alpaca_instruct": _ALPACA,
    "alpaca_w_system": _ALPACA,
    "gpteacher": ("alpaca", {"output": "response"}, _TEXT),
    "completion": ("text", {}, ""),
    "pretrain": ("text", {}, ""),
    "input_output": ("prompt_completion", {}, ""),
}
_AXOLOTL_RL: dict[str, tuple[RowFormat, dict[str, str], str]] = {
    "chatml.intel": ("preference", {"instruction": "question"}, _TEXT),
    "chatml.icr": ("preference", {"instruction": "input"}, _TEXT),
    "chatml.prompt_pairs": ("preference", {"instruction": "prompt"}, _TEXT),
    "chatml.ultra": ("preference", {}, _TEXT),
    "chatml.argilla": (
        "preference",
        {"chosen": "chosen_response", "rejected": "rejected_response"},
        _TEXT,
    ),
    "chatml.argilla_chat": ("preference", {}, _TEXT),
    "orpo": ("preference", {}, ""),
    "passthrough": ("preference", {}, ""),
}
_AXOLOTL_KTO: dict[str, tuple[RowFormat, dict[str, str], str]] = {
    "chatml.intel": ("alpaca", {"instruction": "question", "output": "completion"}, _TEXT),
    "chatml.prompt_pairs": ("alpaca", {"instruction": "prompt", "output": "completion"}, _TEXT),
    "chatml.ultra": ("alpaca", {"instruction": "prompt", "output": "completion"}, _TEXT),
    "chatml.argilla": ("alpaca", {"output": "completion"}, _TEXT),
    "chatml.argilla_chat": ("messages", {"messages": "completion"}, _TEXT),
}
"""Type -> format, columns, and what is different; `llama3.x` and so on are read like `chatml.x`."""


def _with(place: ForeignRows, *, note: str = "", **changes: Any) -> ForeignRows:
    values = {**place.__dict__, **changes, "notes": (*place.notes, *([note] if note else []))}
    values["columns"] = {k: v for k, v in values["columns"].items() if k != v}
    return ForeignRows(**values)


def _user_defined(place: ForeignRows, kind: Mapping[str, Any], rl: str | None) -> ForeignRows:
    """A type that is a mapping of field names and of texts with places for them."""
    formats = [key for key in kind if key.endswith("format") and kind[key] not in _PLAIN]
    note = f"{_TEXT} ({', '.join(formats)})" if formats else _TEXT
    if kind.get("system_prompt"):
        note += "; system_prompt is not added: write it in the rows, as `system`"
    given = {key: text_in(kind, key) for key in kind if key in _FIELDS}
    names = {key.removeprefix("field_"): column for key, column in given.items() if column}
    if rl in ("dpo", "ipo", "orpo", "simpo", "reward"):
        ours = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
        names = {"prompt": "prompt"} | names
        row_format: RowFormat = "preference"
    elif rl == "kto":
        ours = {"prompt": "instruction", "completion": "output", "label": "label"}
        names = {"prompt": "prompt", "completion": "completion"} | names
        row_format = "alpaca"
    else:
        ours = {"instruction": "instruction", "input": "input", "output": "output"}
        row_format = "alpaca"
    ours["system"] = "system"
    columns = {ours[name]: column for name, column in names.items() if name in ours}
    return _with(place, format=row_format, columns=columns, note=note)


_FIELDS = tuple(
    f"field_{name}"
    for name in (
        *("system", "instruction", "input", "output", "prompt", "chosen", "rejected"),
        *("completion", "label"),
    )
)
_PLAIN = (None, "", "{instruction}", "{prompt}", "{chosen}", "{rejected}", "{completion}")


def _axolotl_turns(
    place: ForeignRows, entry: Mapping[str, Any], base: str, function: str, rl: str | None
) -> ForeignRows:
    """Rows of turns, whose keys and speakers the entry may name."""
    old = base == "sharegpt"
    keys = {"role": "from", "content": "value"} if old else {"role": "role", "content": "content"}
    for ours, theirs in (("role", "message_field_role"), ("content", "message_field_content")):
        keys[ours] = text_in(entry, theirs) or keys[ours]
    given = mapping_in(entry, "message_property_mappings") or {}
    keys |= {ours: text_in(given, ours) or keys[ours] for ours in ("role", "content")}
    trained, tools = text_in(entry, "message_field_training"), text_in(entry, "field_tools")
    if trained:
        keys["train"] = trained
    speakers = _speakers(mapping_in(entry, "roles"), keys["role"])
    notes = [says for key, says in _TURN_NOTES.items() if entry.get(key)]
    messages = text_in(entry, "field_messages") or ("conversations" if old else "messages")
    columns, row_format = _turn_format(entry, messages, keys["role"], base, function, rl)
    if tools:
        columns["tools"] = tools
    return _with(
        place,
        format=row_format,
        columns=columns,
        turn_keys={} if base == "bradley_terry" else keys,
        speakers={} if base == "bradley_terry" else speakers,
        note="; ".join(notes),
    )


def _turn_format(
    entry: Mapping[str, Any], messages: str, role: str, base: str, function: str, rl: str | None
) -> tuple[dict[str, str], RowFormat]:
    """Columns and format of rows of turns."""
    pairs = {key: text_in(entry, f"field_{key}") or key for key in ("chosen", "rejected")}
    if base == "bradley_terry":
        return {"instruction": "input"} | pairs, "preference"
    if rl in ("orpo", "reward") or function in ("argilla", "argilla_chat"):
        return pairs, "preference"
    if rl in ("dpo", "ipo", "simpo"):
        return {"conversations": messages} | pairs, "sharegpt_preference"
    if role == "from":
        return {"conversations": messages}, "sharegpt"
    return {"messages": messages}, "messages"


_TURN_NOTES = {
    "chat_template": "one chat template renders all rows: set model.chat_template",
    "drop_system_message": "system turns stay: remove them from the rows",
    "message_field_training_detail": "turns are trained whole, not by ranges of characters",
    "train_on_eos": "the token that ends a trained turn is trained, no other",
    "field_thinking": "reasoning is read from the turn's reasoning_content",
}


def _speakers(roles: Mapping[str, Any] | None, role: str) -> dict[str, str]:
    """A turn's speaker -> ours; `roles` replaces the usual ones."""
    if roles is not None:
        return {
            str(theirs): str(ours)
            for ours, named in roles.items()
            for theirs in (named if isinstance(named, list) else [named])
        }
    usual = {"user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
    return usual | ({"human": "user", "gpt": "assistant"} if role != "role" else {})


def trl_rows(entry: Mapping[str, Any]) -> ForeignRows:
    """One item of TRL's `datasets:`, or its `dataset_name` as `path`.

    Args:
        entry: path, name, data_files, split, columns and so on.

    Raises:
        DataError: no path, or several data_files.
    """
    with_text_keys(entry, "an entry")
    path = text_in(entry, "path") or ""
    if path in LOADERS and not entry.get("data_files"):
        raise DataError(f"{path or 'an entry'} names no file", hint="as in path: rows.jsonl")
    notes = [
        says
        for key, says in (
            ("columns", "all columns are read"),
            ("fraction", "all rows are read: take counts rows, weight draws a share of them"),
            ("data_dir", "the folder inside the dataset is not looked at"),
        )
        if entry.get(key)
    ]
    notes += unknown(entry, _TRL_KEYS)
    return _with(place_of(entry), note="; ".join(notes))


_TRL_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
