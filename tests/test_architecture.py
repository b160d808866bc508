"""The house rules: which room may import which, and how large and how documented its parts are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignkit

PACKAGE = Path(alignkit.__file__).parent

LOWEST = {"errors", "recipe"}
MIDDLE = LOWEST | {"packed"}
FOUR = {"data", "models", "objectives", "runtime"}

MAY_IMPORT = {
    "errors": set(),
    "recipe": {"errors"},
    "packed": LOWEST,
    "data": MIDDLE,
    "models": MIDDLE,
    "objectives": set(),
    "runtime": MIDDLE,
    "generation": MIDDLE | FOUR,
    "evaluation": MIDDLE | FOUR | {"generation"},
    "stages": MIDDLE | FOUR | {"generation", "evaluation"},
    "report": MIDDLE | FOUR | {"generation", "evaluation"},
    "peers": MIDDLE | FOUR | {"generation", "evaluation"},
    "cli": MIDDLE | FOUR | {"generation", "evaluation", "stages", "report", "peers"},
    "__init__": set(),
    "__main__": {"cli"},
}
"""Room -> rooms it may import besides itself. Arrows go down only; the four do not meet."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}
FORBIDDEN = {"recipe": HEAVY, "errors": HEAVY, "packed": HEAVY, "data": {"torch"}, "report": HEAVY}
"""Room -> packages it must not import at all, not even inside a function."""

OPTIONAL_BACKENDS = {
    "data/sources.py": {"datasets", "pyarrow"},
    "generation/rules.py": {"vaderSentiment"},
}
"""File -> packages that it may import inside a function; only their users pay for them."""

WHOLE_RECIPE = {"cli", "stages", "peers", "recipe"}
"""Rooms that see a whole Recipe; the others take plain values or a small spec."""

NAMELESS = {"utils", "common", "helpers", "misc", "util"}
MAX_FILE, MAX_FUNCTION = 320, 60


def violations(package: Path) -> list[str]:
    """Every broken rule of a package folder called `alignkit`, one sentence each."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.startswith("_assets/"):
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        room = name.split("/")[0].removesuffix(".py")
        found += [f"{name}: {fault}" for fault in import_faults(tree, name, room)]
        found += [f"{name}: {fault}" for fault in shape_faults(tree, text, path.stem)]
    return found


def import_faults(tree: ast.Module, name: str, room: str) -> Iterator[str]:
    if room not in MAY_IMPORT:
        yield f"there is no room called {room}"
        return
    inner = {node for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "TYPE_CHECKING":
            yield f"line {node.lineno} hides imports behind TYPE_CHECKING"
        for module in imported(node):
            top, _, rest = module.partition(".")
            if top == "alignkit":
                target = rest.split(".")[0] or "__init__"
                if target not in MAY_IMPORT[room] | {room, "__init__"}:
                    yield f"line {node.lineno}: {room} must not import {target}"
            elif top in FORBIDDEN.get(room, ()):
                yield f"line {node.lineno}: {room} must not import {top}"
            elif room == "objectives" and top != "torch" and top not in sys.stdlib_module_names:
                yield f"line {node.lineno}: objectives import torch only, not {top}"
            if node in inner and room != "cli" and top not in OPTIONAL_BACKENDS.get(name, ()):
                yield f"line {node.lineno}: imports {module} inside a function"
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "alignkit.recipe.schema"
            and room not in WHOLE_RECIPE
            and any(alias.name.endswith("Recipe") for alias in node.names)
        ):
            yield f"line {node.lineno}: {room} must not see a whole Recipe"


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return ["alignkit.relative_imports_are_not_used"]
        if node.module == "alignkit":  # from alignkit import room
            return [f"alignkit.{alias.name}" for alias in node.names]
        return [str(node.module)]
    return []


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def shape_faults(tree: ast.Module, text: str, stem: str) -> Iterator[str]:
    lines = text.count("\n")
    if stem in NAMELESS:
        yield "a function lives in the room whose noun it serves"
    if lines > MAX_FILE:
        yield f"has {lines} lines, more than {MAX_FILE}: it holds two things"
    if ast.get_docstring(tree) is None:
        yield "the module has no docstring"
    for function in functions(tree):
        length = int(function.end_lineno or 0) - function.lineno + 1
        described = ast.get_docstring(function, clean=False) or ""
        length -= described.count("\n") + 1 if described else 0  # words do not count as code
        if length > MAX_FUNCTION:
            yield f"{function.name} has {length} lines, more than {MAX_FUNCTION}"
    yield from docstring_faults(tree)


def docstring_faults(holder: ast.Module | ast.ClassDef) -> Iterator[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in holder.body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            yield from docstring_faults(node)


def test_the_house_is_in_order() -> None:
    assert violations(PACKAGE) == []


GOOD = '''"""A module."""

from __future__ import annotations
'''

BAD = {
    "upward import": ("data/rows.py", "from alignkit.stages.sft import run_sft\n", "import stages"),
    "sideways import": ("models/a.py", "import alignkit.data.packing\n", "import data"),
    "import of a room by name": ("runtime/a.py", "from alignkit import models\n", "import models"),
    "runtime sees generation": ("runtime/a.py", "import alignkit.generation.sampling\n", "generat"),
    "objective with numpy": ("objectives/kl.py", "import numpy as np\n", "torch only, not numpy"),
    "objective with packed": ("objectives/kl.py", "import alignkit.packed\n", "import packed"),
    "torch in recipe": ("recipe/a.py", "from torch.nn import Linear\n", "must not import torch"),
    "transformers in recipe": ("recipe/a.py", "import transformers\n", "import transformers"),
    "torch in data": ("data/a.py", "def f():\n    '''Do.'''\n    import torch\n", "import torch"),
    "late import": (
        "models/a.py",
        "class A:\n    '''A.'''\n    def _f(self):\n        import json\n",
        "imports json inside a function",
    ),
    "type checking": (
        "stages/a.py",
        "import typing\nif typing.TYPE_CHECKING or TYPE_CHECKING:\n    pass\n",
        "hides imports",
    ),
    "relative import": ("data/a.py", "from . import rows\n", "must not import relative_imports"),
    "whole recipe": (
        "runtime/a.py",
        "from alignkit.recipe.schema import SftRecipe\n",
        "must not see a whole Recipe",
    ),
    "utils": ("data/utils.py", "", "in the room whose noun it serves"),
    "unknown room": ("stuff/a.py", "", "there is no room called stuff"),
    "long file": ("data/a.py", "x = 1\n" * 330, "more than 320"),
    "long function": ("data/a.py", "def _f():\n" + "    x = 1\n" * 61, "more than 60"),
    "no docstring": ("data/a.py", "def read():\n    return 1\n", "read has no docstring"),
    "no docstring on a method": (
        "data/a.py",
        "class Row:\n    '''A row.'''\n    def show(self):\n        return 1\n",
        "show has no docstring",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_checker_catches(case: str, tmp_path: Path) -> None:
    name, code, expected = BAD[case]
    good = tmp_path / "alignkit" / "errors.py"
    bad = tmp_path / "alignkit" / name
    for path, text in ((good, GOOD), (bad, GOOD + code)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = violations(tmp_path / "alignkit")
    assert any(expected in fault for fault in found), found
    assert all(fault.startswith(f"{name}: ") for fault in found)


def test_the_checker_lets_good_code_pass(tmp_path: Path) -> None:
    code = {
        "cli/a.py": "def run():\n    '''Run.'''\n    import torch, alignkit.stages.sft\n",
        "data/sources.py": "def _read():\n    import datasets\n    import pyarrow.parquet\n",
        "objectives/kl.py": "import math\nimport torch\n",
        "stages/sft.py": "import alignkit.models.scorer\nimport alignkit.data.packing\n",
    }
    for name, text in code.items():
        path = tmp_path / "alignkit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(GOOD + text, encoding="utf-8")
    assert violations(tmp_path / "alignkit") == []


SHOW_HEAVY = (
    "import sys; heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'};"
    "print('loaded:', sorted((heavy | set(light)) & set(sys.modules)))"
)
"""Ends a program that has set `light`: further packages that it can do without."""

LIGHT = ["pydantic", "yaml", "jinja2", "numpy", "importlib.metadata"]


@pytest.mark.parametrize(
    ("code", "light"),
    [
        ("import alignkit.cli.main", LIGHT),
        # typer leaves with SystemExit after the help text
        (
            "import sys, alignkit.cli.main as m\nsys.argv = ['alignkit', '--help']\n"
            "try: m.main()\nexcept SystemExit: pass",
            LIGHT,
        ),
        # typer takes options apart with pydantic, which reads the packages' metadata
        (
            "import sys, alignkit.cli.main as m\nsys.argv = ['alignkit', 'sft', '--help']\n"
            "try: m.main()\nexcept SystemExit: pass",
            ["yaml", "jinja2", "numpy"],
        ),
        ("import alignkit.recipe.load, alignkit.recipe.plan, alignkit.packed", []),
    ],
    ids=["import", "help", "sft-help", "recipe"],
)
def test_the_command_line_loads_nothing_heavy(code: str, light: list[str]) -> None:
    program = f"{code}\nlight = {light}\n{SHOW_HEAVY}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_data_does_not_load_torch() -> None:
    code = f"import alignkit.data.dataset, alignkit.data.packing\nlight = []\n{SHOW_HEAVY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr
