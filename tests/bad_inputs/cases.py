"""The table: one case a list item of the YAML files in `cases/`.

name: of the case, unique
run: what follows `alignkit`; $BASE, $RUN, $REWARD, $GGUF, $GEMMA and $HERE are folders and files,
        $LONG, $BYTE and the like odd texts (`ODD` in the test)
files: name -> its text, or how it is made (see `layout.py`); laid out in this order, over the
    rows and recipes that every case has
stdin, env: what the command reads, and further environment variables
encoding: of the terminal; UTF-8 if it is not given
code: exit code, or a list of accepted ones; 2 if it is not given
says: fragments of what is printed, in any case and however the lines are broken
never: fragments that must not be printed
hint: whether a `hint:` must be printed
usage: whether the command line itself is refused, which looks different
stdout_json: whether one JSON document, and nothing else, must be printed on stdout
holds, lacks: file -> fragments that must, or must not, stand in it afterwards
leaves: patterns of new or changed files; all others must be as they were
own_process: run in a process of its own: it changes the process, or must be bounded
before: with own_process, Python that runs in it first, as to lower a limit of time
memory: with own_process, gigabytes that the process may take on top of its imports
seconds: that the command may take; generous
size: characters that may be printed
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """One item of a table; see the module's text."""

    name: str
    run: str | list[str]
    files: dict[str, Any] = field(default_factory=dict)
    stdin: str = ""
    env: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    code: int | list[int] = 2
    says: list[str | list[str]] = field(default_factory=list)
    never: list[str] = field(default_factory=list)
    hint: bool = False
    usage: bool = False
    leaves: list[str] = field(default_factory=list)
    stdout_json: bool = False
    holds: dict[str, list[str]] = field(default_factory=dict)
    lacks: dict[str, list[str]] = field(default_factory=dict)
    own_process: bool = False
    before: str = ""
    memory: float = 0.0
    seconds: float = 60.0
    size: int = 6000


def read_cases() -> list[Case]:
    """All cases, in the order of the files' names."""
    known = {part.name for part in dataclasses.fields(Case)}
    cases: list[Case] = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for item in yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader):
            unknown = set(item) - known
            assert not unknown, f"{path.name}: {item.get('name')}: {unknown}"
            cases.append(Case(**item))
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}
    return cases
