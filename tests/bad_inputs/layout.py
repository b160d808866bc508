"""The files of a case: what every case has, and what it puts over that.

A file is a text, or a mapping that says how it is made:

    copy: PATH           a copy of a file or folder
    link: TARGET         a symbolic link
    folder: true         an empty folder
    delete: true         nothing, where something stood
    json: {key: value}   the JSON file that stands there with these keys changed; drop: [keys]
    make: NAME           what a function of `generators.py` makes; the other keys are its arguments
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from running import make_labelled, make_pairs, make_prompts, make_rows

from bad_inputs import generators

RECIPE = """\
stage: STAGE
output: run
model: {base: $BASE, dtype: float32}
adapter: {kind: lora, rank: 4, alpha: 8}
data: {train: [{path: ROWS}], max_length: 256}
"""
"""The first five lines of each recipe."""
ROWS_STEPS = "training: {max_steps: 2, batch_size: 4, warmup: 0}\nmerge: false\n"
PPO_STEPS = (
    "training: {max_steps: 1, warmup: 0}\nmerge: false\n"
    "rollout: {prompts_per_step: 4, max_new_tokens: 4}\nreward: {rule: regex, pattern: e}\n"
)
PIPELINE = """\
output: out
stages:
  first:
    recipe: recipe.yaml
    merge: true
  second:
    recipe: dpo.yaml
    model: {base: '$${first}'}
"""


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _recipe(stage: str, rows: str, steps: str = ROWS_STEPS) -> str:
    return RECIPE.replace("STAGE", stage).replace("ROWS", rows) + steps


COMMON = {
    "rows.jsonl": _lines(make_rows(6)),
    "pairs.jsonl": _lines(make_pairs(6)),
    "labelled.jsonl": _lines(make_labelled(6)),
    "prompts.jsonl": _lines(make_prompts(6)),
    "recipe.yaml": _recipe("sft", "rows.jsonl"),
    "reward.yaml": _recipe("reward", "pairs.jsonl"),
    "dpo.yaml": _recipe("dpo", "pairs.jsonl"),
    "kto.yaml": _recipe("kto", "labelled.jsonl"),
    "ppo.yaml": _recipe("ppo", "prompts.jsonl", PPO_STEPS),
    "pipeline.yaml": PIPELINE,
}
"""Files of every case."""


def fill(text: str, places: Mapping[str, str]) -> str:
    """`$BASE` and the like replaced; other dollars stay."""
    return Template(text).safe_substitute(places)


def lay_out(folder: Path, files: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Write the files of a case.

    Args:
        folder: exists and is empty.
        files: over the common ones.
        places: `BASE` and the like -> path.
    """
    for name, content in (COMMON | dict(files)).items():
        path = folder / name
        if isinstance(content, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(fill(content, places).encode("utf-8", "surrogatepass"))
        else:
            _make(path, dict(content), places)


def _make(path: Path, how: dict[str, Any], places: Mapping[str, str]) -> None:
    if how.get("delete"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if "copy" in how:
        source = Path(fill(how["copy"], places))
        source = source if source.is_absolute() else path.parent / source
        shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    elif "link" in how:
        path.symlink_to(fill(how["link"], places))
    elif how.get("folder"):
        path.mkdir()
    elif "make" in how:
        filled = {k: fill(v, places) if isinstance(v, str) else v for k, v in how.items()}
        getattr(generators, filled.pop("make"))(path, **filled)
    else:
        text = fill(json.dumps(how.get("json", {})), places)
        _edit(path, json.loads(text), how.get("drop", []))


def _edit(path: Path, values: dict[str, Any], dropped: list[str]) -> None:
    """Change keys of a JSON file; dots stand between nested ones."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, value in values.items():
        *parents, last = key.split(".")
        here = content
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    for key in dropped:
        del content[key]
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def snapshot(folder: Path) -> dict[str, str]:
    """What a folder holds: name -> what identifies its content."""
    found: dict[str, str] = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here) / name
            shown = str(path.relative_to(folder))
            if path.is_symlink():
                found[shown] = f"link to {path.readlink()}"
            elif path.is_dir():
                found[shown] = "folder"
            elif path.is_file():
                digest = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
                found[shown] = f"{path.stat().st_size} bytes {digest}"
    return found
