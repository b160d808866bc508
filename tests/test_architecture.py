"""The house rules: which room may import which, and how large and how documented its parts are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import alignkit

PACKAGE = Path(alignkit.__file__).parent

RECIPE = {"recipe", "recipe/stages", "recipe/reading", "recipe/planning", "recipe/importing"}
PLAIN = {"errors", "packed", "files", "terminal", "limits", "rendering", "recipe"}
"""What every room may read: plain values and small specs, never a whole Recipe; `files`, the only
way to replace a file or folder, `terminal`, the only way to print, and `rendering`, the only way
to apply a chat template."""
MODELS = {
    *("models/opening", "models/rewards", "models/merging", "models/adapters", "models/scoring"),
    *("models/attention", "models/export", "models/weights", "models/base", "models/kernels"),
    *("models/quiet", "models/heap", "models/peft_parts", "models/transformers_parts"),
}
LOW = {"data", "objectives", "runtime", *MODELS}
STAGES = {
    *("stages/registry", "stages/supervised", "stages/ppo", "stages/rollouts", "stages/running"),
    "stages/inputs",
    "stages/grpo",
}
DOORS = {"models/peft_parts", "models/transformers_parts"}
ON_MODELS = PLAIN | DOORS | {"models/quiet", "models/heap"}
ON_BASE = ON_MODELS | {"models/base", "models/kernels"}
ON_WEIGHTS = ON_BASE | {"models/weights"}
ON_ADAPTERS = ON_WEIGHTS | {"models/adapters", "models/scoring", "models/attention"}
ON_EVALUATION = PLAIN | RECIPE | LOW | {"generation", "evaluation", "report"}
ON_INPUTS = ON_EVALUATION | {"stages/inputs"}
ON_RUNNING = ON_INPUTS | {"stages/running"}

MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": ON_EVALUATION | STAGES | {"jobs", "pipelines", "peers", "curation"},
    "pipelines": ON_EVALUATION | STAGES | {"jobs"},
    "jobs": ON_EVALUATION | STAGES | {"curation"},
    "curation": PLAIN | {"data", "recipe/importing"},
    "peers": ON_EVALUATION,
    "stages/registry": ON_EVALUATION | STAGES,
    "stages/grpo": ON_RUNNING | {"stages/rollouts"},
    "stages/ppo": ON_RUNNING | {"stages/rollouts"},
    "stages/supervised": ON_RUNNING,
    "stages/rollouts": ON_RUNNING,
    "stages/running": ON_INPUTS,
    "stages/inputs": ON_EVALUATION,
    "report": {"errors", "files", "runtime"} | RECIPE,
    "evaluation": PLAIN | LOW | {"generation"},
    "generation": PLAIN | LOW,
    "data": PLAIN,
    "runtime": PLAIN,
    "objectives": set(),
    "models/opening": ON_ADAPTERS | {"models/rewards"},
    "models/rewards": ON_ADAPTERS | {"models/merging"},
    "models/merging": ON_ADAPTERS,
    "models/adapters": ON_ADAPTERS,
    "models/scoring": ON_MODELS | {"models/attention", "models/kernels"},
    "models/attention": ON_MODELS | {"models/kernels"},
    "models/export": ON_WEIGHTS,
    "models/weights": ON_BASE,
    "models/base": ON_MODELS | {"models/kernels"},
    "models/kernels": {"errors", "packed", "recipe"} | DOORS,
    "models/quiet": set(),
    "models/heap": set(),
    "models/peft_parts": set(),
    "models/transformers_parts": set(),
    "packed": {"errors"},
    "recipe/importing": {"errors", "recipe", "recipe/stages", "recipe/reading"},
    "recipe/planning": {"errors", "recipe", "recipe/stages"},
    "recipe/reading": {"errors", "recipe", "recipe/stages"},
    "recipe/stages": {"errors", "recipe"},
    "recipe": {"errors"},
    "files": {"errors"},
    "terminal": set(),
    "limits": set(),
    "rendering": {"errors", "limits"},
    "errors": set(),
    "__init__": set(),
}
"""Room -> rooms it may import besides itself. Arrows go down only; the four do not meet. A file
beside sub-rooms is a room of its own, except in `recipe`, whose own files are what recipes are
made of."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}
FORBIDDEN = {
    **dict.fromkeys(("recipe", "errors", "packed", "files", "report"), HEAVY),
    "data": {"torch"},
}
"""Room -> packages it must not import at all, not even inside a function."""

OPTIONAL_BACKENDS = {
    "curation/recognizers.py": {"presidio_analyzer"},
    "data/sources.py": {"datasets"},
    "report/drawing.py": {"matplotlib"},
    "data/files/tables.py": {"pyarrow"},
    "generation/rewards/rules.py": {"vaderSentiment"},
}
"""File -> packages that it may import inside a function; only their users pay for them."""

PRIVATE: dict[str, set[str]] = {
    "_active_adapter": {"models/peft_parts.py"},
    "_disable_adapters": {"models/peft_parts.py"},
    "_caches": {"models/peft_parts.py"},
    "_attn_implementation": {"models/transformers_parts.py"},
    "_model_mapping": {"models/transformers_parts.py"},
    "_parameters": {"models/weights/streaming.py", "models/merging/updates.py"},  # of torch
    "_scaled_dot_product_flash_attention_for_cpu": {"models/attention/processor.py"},  # of torch
    "_foreach_copy_": {"models/kernels/factors.py"},  # of torch
    "_foreach_mul": {"models/kernels/factors.py"},  # of torch
    "_reset_state": {"pipelines/running.py"},  # of accelerate
    "_fingerprint": {"data/sources.py"},  # of datasets
    "_exit": {"runtime/confined.py"},  # of os
}
"""Private name of a library -> the files that may touch it. Those of PEFT and of transformers have
one door each, which tests/models/test_library_contracts.py holds against the installed version."""

DOCUMENTED = {
    *("peft", "peft.tuners", "peft.tuners.lora", "peft.tuners.trainable_tokens", "peft.utils"),
    *("peft.tuners.tuners_utils", "peft.utils.merge_utils"),
    *("transformers", "transformers.cache_utils", "transformers.masking_utils"),
    *("transformers.pytorch_utils", "transformers.utils"),
}
"""Modules of both whose names their documentation has; all others are read in the doors only."""

LAYERS = "models/kernels/"
"""Where the forward of a library's layer may be replaced."""

NAMELESS = {"utils", "common", "helpers", "misc", "util"}
MAX_FILE, MAX_FUNCTION, MAX_FOLDER = 320, 60, 20


def violations(package: Path) -> list[str]:
    """Every broken rule of a package folder called `alignkit`, one sentence each."""
    found: list[str] = []
    for path in sources(package):
        name = path.relative_to(package).as_posix()
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        found += [f"{name}: {fault}" for fault in import_faults(tree, name)]
        found += [f"{name}: {fault}" for fault in private_faults(tree, name)]
        found += [f"{name}: {fault}" for fault in shape_faults(tree, text, path.stem)]
    for folder, files in folders(package).items():
        if files > MAX_FOLDER:
            found.append(f"{folder}: has {files} files, more than {MAX_FOLDER}: it holds two rooms")
    return found


def sources(package: Path) -> list[Path]:
    files = sorted(package.rglob("*.py"))
    return [path for path in files if path.relative_to(package).parts[0] != "_assets"]


def folders(package: Path) -> dict[str, int]:
    """Folder -> its modules."""
    counted = Counter(
        path.relative_to(package).parent.as_posix()
        for path in sources(package)
        if path.stem != "__init__"
    )
    return dict(sorted(counted.items()))


def room_of(parts: Sequence[str]) -> str:
    """The room of a module, by its path: the deepest one that the table names."""
    if parts[-1] == "__init__":
        return "__init__"
    return "/".join(parts[:2]) if "/".join(parts[:2]) in MAY_IMPORT else parts[0]


def import_faults(tree: ast.Module, name: str) -> Iterator[str]:
    room = room_of(name.removesuffix(".py").split("/"))
    if room not in MAY_IMPORT:
        yield f"there is no room called {room}"
        return
    top_room = room.split("/")[0]
    inner = {node for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "TYPE_CHECKING":
            yield f"line {node.lineno} hides imports behind TYPE_CHECKING"
        for line, module in imported(node):
            top, _, rest = module.partition(".")
            if top == "alignkit":
                target = room_of(rest.split(".")) if rest else "__init__"
                if target not in MAY_IMPORT[room] | {room, "__init__"}:
                    yield f"line {line}: {room} must not import {target}"
            elif top in FORBIDDEN.get(top_room, ()):
                yield f"line {line}: {room} must not import {top}"
            elif room == "objectives" and top != "torch" and top not in sys.stdlib_module_names:
                yield f"line {line}: objectives import torch only, not {top}"
            if node in inner and room != "cli" and top not in OPTIONAL_BACKENDS.get(name, ()):
                yield f"line {line}: imports {module} inside a function"


def private_faults(tree: ast.Module, name: str) -> Iterator[str]:
    """Private parts of other objects, of PEFT and of transformers, outside their doors."""
    doors = {f"{door}.py" for door in DOORS}
    for node in ast.walk(tree):
        for private in private_names(node):
            if name not in PRIVATE.get(private, ()):
                yield f"line {node.lineno}: {private} is private; PRIVATE names its door, or none"
        for line, module in imported(node):
            inner = module.startswith(("peft.", "transformers."))
            if inner and module not in DOCUMENTED and name not in doors:
                yield f"line {line}: {module} is undocumented: it belongs behind a door"
        if isinstance(node, ast.Assign | ast.AnnAssign) and not name.startswith(LAYERS):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Attribute) and t.attr == "forward" for t in targets):
                yield f"line {node.lineno}: replaces a layer's forward outside {LAYERS}"


def private_names(node: ast.AST) -> list[str]:
    """Private names of other objects or modules that an expression or import touches."""
    names: list[str] = []
    if isinstance(node, ast.Attribute):
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        names = [] if own else [node.attr]
    elif isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        reads = node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        constants = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        names = [str(value) for value in constants] if reads else []
    return [one for one in names if one.startswith("_") and not one.startswith("__")]


def imported(node: ast.AST) -> list[tuple[int, str]]:
    """Line and dotted name of each module that a statement imports."""
    if isinstance(node, ast.Import):
        return [(node.lineno, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return [(node.lineno, "alignkit.relative_imports_are_not_used")]
        if str(node.module).split(".")[0] == "alignkit":  # what is imported may be a module
            return [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return [(node.lineno, str(node.module))]
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


def test_no_arrow_of_the_table_comes_back() -> None:
    reached = {room: set(others) - {room} for room, others in MAY_IMPORT.items()}
    for _ in MAY_IMPORT:
        for others in reached.values():
            others |= {far for other in others for far in reached[other]}
    assert [room for room, others in reached.items() if room in others] == []


ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"


def drawn_rooms(text: str) -> list[str]:
    """The rooms of the picture from top to bottom; one with rooms inside stands below them."""
    picture = text.split("```")[1].strip().splitlines()[1:]
    found: list[str] = []
    outer = ""
    for line in picture:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 2:
            found += [outer] if outer else []
            outer = name.rstrip("/").removesuffix(".py")
        else:
            found.append(f"{outer}/{name.rstrip('/').removesuffix('.py')}")
    return [*found, outer]


def test_the_picture_shows_the_rooms_and_every_arrow_goes_down_in_it() -> None:
    places = drawn_rooms(ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(places) == len(set(places))
    real = {room_of(path.relative_to(PACKAGE).with_suffix("").parts) for path in sources(PACKAGE)}
    assert set(places) - {"models", "stages"} == real - {"__init__"}
    floor = {room: number for number, room in enumerate(places)}
    arrows = {
        (room, room_of(module.split(".")[1:]))
        for path in sources(PACKAGE)
        for room in [room_of(path.relative_to(PACKAGE).with_suffix("").parts)]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for _, module in imported(node)
        if module.startswith("alignkit.") and module.count(".") > 1
    }
    rising = {
        (a, b) for a, b in arrows if a != b and "__init__" not in (a, b) and floor[a] > floor[b]
    }
    assert rising == set()


def test_the_paths_that_architecture_names_exist() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    before, _, after = text.partition("## Old paths")
    named = re.findall(r"`((?:\w+/)*\w+\.py)[`:]", before)
    named += re.findall(
        r"`((?:\w+/)+\w+\.py)`",
        "".join(line.split("|")[2] for line in after.splitlines() if line.count("|") == 3),
    )
    roots = (PACKAGE, PACKAGE.parent)
    short = {path.name for path in sources(PACKAGE)}
    missing = [
        name
        for name in named
        if "NAME" not in name
        and not any((root / name).is_file() for root in roots)
        and name not in short
    ]
    assert missing == []
    assert len(named) > 100


GOOD = '''"""A module."""

from __future__ import annotations
'''

BAD = {
    "upward import": (
        "data/rows.py",
        "from alignkit.stages.supervised.sft import run_sft\n",
        "import stages",
    ),
    "sideways import": ("models/base/a.py", "import alignkit.data.packing\n", "import data"),
    "import of a room by name": ("runtime/a.py", "from alignkit import models\n", "import models"),
    "runtime sees generation": ("runtime/a.py", "import alignkit.generation.sampling\n", "generat"),
    "objective with numpy": ("objectives/kl.py", "import numpy as np\n", "torch only, not numpy"),
    "objective with packed": ("objectives/kl.py", "import alignkit.packed\n", "import packed"),
    "torch in recipe": ("recipe/a.py", "from torch.nn import Linear\n", "must not import torch"),
    "transformers in recipe": ("recipe/a.py", "import transformers\n", "import transformers"),
    "torch in data": ("data/a.py", "def f():\n    '''Do.'''\n    import torch\n", "import torch"),
    "late import": (
        "models/base/a.py",
        "class A:\n    '''A.'''\n    def _f(self):\n        import json\n",
        "imports json inside a function",
    ),
    "type checking": (
        "stages/ppo/a.py",
        "import typing\nif typing.TYPE_CHECKING or TYPE_CHECKING:\n    pass\n",
        "hides imports",
    ),
    "relative import": ("data/a.py", "from . import rows\n", "must not import relative_imports"),
    "whole recipe": (
        "runtime/a.py",
        "from alignkit.recipe.stages.sft import SftRecipe\n",
        "must not import recipe/stages",
    ),
    "utils": ("data/utils.py", "", "in the room whose noun it serves"),
    "unknown room": ("stuff/a.py", "", "there is no room called stuff"),
    "a floor up inside a room": (
        "models/base/a.py",
        "from alignkit.models.adapters.attach import attach_adapter\n",
        "models/base must not import models/adapters",
    ),
    "a module by name": (
        "models/kernels/a.py",
        "from alignkit.models.base import loading\n",
        "models/kernels must not import models/base",
    ),
    "the choice of stages from a stage": (
        "stages/ppo/a.py",
        "import alignkit.stages.registry\n",
        "must not import stages/registry",
    ),
    "a file beside the rooms": ("models/a.py", "", "there is no room called models"),
    "a private flag of PEFT": (
        "models/adapters/a.py",
        "def _f(layer):\n    layer._disable_adapters = True\n",
        "_disable_adapters is private",
    ),
    "a private name of transformers in words": (
        "models/base/a.py",
        "def _f(config):\n    return getattr(config, '_commit_hash', None)\n",
        "_commit_hash is private",
    ),
    "a private name of another room": (
        "models/adapters/a.py",
        "from alignkit.models.attention.prefix import _SLIDING\n",
        "_SLIDING is private",
    ),
    "an undocumented module": (
        "models/weights/a.py",
        "from transformers.core_model_loading import revert_weight_conversion\n",
        "transformers.core_model_loading is undocumented",
    ),
    "a patch outside the kernels": (
        "models/scoring/a.py",
        "def _f(layer):\n    layer.forward = None\n",
        "replaces a layer's forward",
    ),
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


def test_the_checker_catches_a_crowded_folder(tmp_path: Path) -> None:
    folder = tmp_path / "alignkit" / "data"
    folder.mkdir(parents=True)
    for number in range(MAX_FOLDER + 1):
        (folder / f"rows{number}.py").write_text(GOOD, encoding="utf-8")
    assert violations(tmp_path / "alignkit") == [
        f"data: has {MAX_FOLDER + 1} files, more than {MAX_FOLDER}: it holds two rooms"
    ]
    (folder / "rows0.py").unlink()
    assert violations(tmp_path / "alignkit") == []


def test_the_checker_lets_good_code_pass(tmp_path: Path) -> None:
    code = {
        "cli/a.py": "def run():\n    '''Run.'''\n    import torch, alignkit.jobs.merge\n",
        "data/sources.py": "def _read():\n    import datasets\n",
        "data/files/tables.py": "def _read():\n    import pyarrow.parquet\n",
        "objectives/kl.py": "import math\nimport torch\n",
        "stages/supervised/sft.py": "import alignkit.models.scoring.scorer\n",
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
        ("import alignkit.recipe.reading.load, alignkit.recipe.planning.plan, alignkit.packed", []),
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
