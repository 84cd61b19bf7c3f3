"""What may import what: floors, optional packages, and a command line that starts at once."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "fwl_export"

FLOOR_TABLE = REPOSITORY / "CONTRIBUTING.md"


def read_floors(text: str) -> dict[str, tuple[int, list[str]]]:
    """Return floor and files of every part of the table in CONTRIBUTING.md.

    Args:
      text: rows of the form "| 2 | `bundle/` | what it is | `config`, `manifest` |".
    """
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    return {part: (int(floor), re.findall(r"`(.+?)`", files)) for floor, part, files in rows}


OPTIONAL = (
    "cuda",
    "google_crc32c",
    "matplotlib",
    "msgpack",
    "onnxruntime",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "tensorstore",
    "transformers",
    "triton",
)

HEAVY = (*OPTIONAL, "google", "numpy", "onnx", "onnxscript", "safetensors", "tokenizers", "torch")


def test_files_import_only_from_floors_below() -> None:
    assert violations(PACKAGE, FLOOR_TABLE.read_text(encoding="utf-8")) == []


def test_every_file_stands_in_the_table_and_nothing_else_does() -> None:
    table = read_floors(FLOOR_TABLE.read_text(encoding="utf-8"))
    written = {part: [] for part in table} | written_files(PACKAGE)
    assert {part: files for part, (_, files) in table.items()} == written


# What runs a bundle or judges it must not share code with what wrote it.
INDEPENDENT = ("runtimes", "parity", "bench", "bisect", "pytest_plugin")


@pytest.mark.parametrize("part", INDEPENDENT)
def test_no_runtime_and_no_judge_imports_the_exporter(part: str) -> None:
    modules = [name for name, _ in _modules(PACKAGE) if name.split(".")[1:2] == [part]]
    assert modules
    imports = "\n".join(f"import {name}" for name in modules)
    assert _imported_by(imports, ("fwl_export.export",)) == []
    names = {name for name, _ in _modules(PACKAGE)}
    paths = [path for name, path in _modules(PACKAGE) if name in modules]
    found = {target for path in paths for target in _imports(path, names, PACKAGE.name)}
    assert not [target for target in found if target.startswith("fwl_export.export")]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fwl_export", ("torch", "onnx", "onnxruntime", "numpy")),
        ("fwl_export.bundle", ("torch", "onnx", "onnxruntime")),
        ("fwl_export.bundle.defaults", ("torch", "onnx", "onnxruntime", "numpy")),
        ("fwl_export.runtimes", ("torch", "onnx", "onnxruntime")),
        ("fwl_export.parity.against", ("torch", "onnx", "onnxruntime")),
        ("fwl_export.runtimes.torch", ("onnx", "onnxruntime")),
    ],
)
def test_what_an_import_does_not_bring(module: str, absent: tuple[str, ...]) -> None:
    assert _imported_by(f"import {module}", absent) == []


PLANTED_FLOORS = """
| 4 | `cli/` | . | |
| 3 | `model/` | . | `a`, `config` |
| 2 | `state.py` | . | |
| 2 | `text.py` | . | |
| 1 | `errors.py` | . | |
"""


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("state.py", "from fwl_export.model.config import X", "state imports model"),
        ("state.py", "import fwl_export.model.config", "state imports model"),
        ("state.py", "from fwl_export import model", "state imports model"),
        ("state.py", "def f():\n    from fwl_export.model import config", "state imports model"),
        ("state.py", "from fwl_export.text import X", "state imports text"),
        ("state.py", "from fwl_export import open_session", "state imports the package itself"),
        ("new.py", "", "'new' has no floor"),
        (
            "model/config.py",
            "import fwl_export.model.a",
            "circle: model.a > model.config > model.a",
        ),
        ("model/config.py", "from .a import X", "model.config: relative import"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, found: str) -> None:
    package = _planted(tmp_path)
    assert violations(package, PLANTED_FLOORS) == []
    (package / file).write_text(source, encoding="utf-8")
    (violation,) = violations(package, PLANTED_FLOORS)
    assert found in violation


def test_every_module_imports_without_the_optional_packages() -> None:
    modules = [name for name, _ in _modules(PACKAGE)]
    assert _import_without(OPTIONAL, modules) == ""


def test_a_planted_import_of_an_optional_package_is_found() -> None:
    failure = _import_without(OPTIONAL, ["json", "onnxruntime"])
    assert failure == "onnxruntime: onnxruntime is blocked"


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    if not (PACKAGE / "cli" / "main.py").exists():
        pytest.skip("fwl_export/cli/main.py is not there yet")
    script = """
        import contextlib, io, sys
        from fwl_export.cli.main import VERBS, main

        for verb in (None, *(verb.__name__.replace("_", "-") for verb in VERBS)):
            sys.argv = ["fwl-export", *([verb] if verb else []), "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                main()
            assert "Usage: fwl-export" in out.getvalue(), (verb, out.getvalue())
        """
    assert _imported_by(script) == []


def test_a_planted_heavy_import_is_found() -> None:
    assert _imported_by("import json, safetensors") == ["safetensors"]


def written_files(package: Path) -> dict[str, list[str]]:
    """Return the files of every part, as the table names them."""
    files: dict[str, list[str]] = {}
    for name, path in _modules(package):
        part, *rest = name.removeprefix(package.name).lstrip(".").split(".")
        if path.name != "__init__.py" and part:
            files.setdefault(part, []).extend(["/".join(rest)] if rest else [])
    return {part: sorted(found) for part, found in files.items()}


def violations(package: Path, table: str) -> list[str]:
    """Return a line for every import that points upwards, sideways or in a circle."""
    floors = {part: floor for part, (floor, _) in read_floors(table).items()}
    names = {name for name, _ in _modules(package)}
    top = package.name
    lines: list[str] = []
    inside: dict[str, set[str]] = {}
    for name, path in _modules(package):
        if name == top:
            continue
        part, module = name.split(".")[1], name.removeprefix(f"{top}.")
        if part not in floors:
            lines.append(f"'{part}' has no floor; give it one in CONTRIBUTING.md")
            continue
        for target in _imports(path, names | {f"{top}.{part}" for part in floors}, top):
            if target == ".":
                lines.append(f"{module}: relative import; write the whole name")
            elif target == top:
                lines.append(f"{module} imports the package itself; import from its module")
            elif (other := target.split(".")[1]) == part:
                inside.setdefault(name, set()).add(target)
            elif floors.get(other, math.inf) >= floors[part]:
                lines.append(f"{module} imports {target.removeprefix(f'{top}.')}, not below it")
    return lines + _circles(inside, top)


def _modules(package: Path) -> list[tuple[str, Path]]:
    """Return dotted name and path of every module, packages by their own name."""
    modules = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return modules


def _imports(path: Path, names: set[str], top: str) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere; "." for a relative import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == top)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "."
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] != top:
                continue
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                # The version is a constant that is set before anything else is imported.
                if submodule != f"{top}.__version__":
                    found = submodule if submodule in names else node.module
                    yield found


def _circles(graph: dict[str, set[str]], top: str) -> list[str]:
    """Return one line per circle that a depth-first walk finds."""
    lines: list[str] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            circle = [*trail[trail.index(name) :], name]
            lines.append("circle: " + " > ".join(m.removeprefix(f"{top}.") for m in circle))
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                walk(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return lines


def _planted(folder: Path) -> Path:
    """Return a small package that breaks no rule."""
    package = folder / "fwl_export"
    sources = {
        "__init__.py": "__version__ = '0'\nfrom fwl_export.model.config import X",
        "errors.py": "",
        "text.py": "from fwl_export.errors import X\nfrom fwl_export import __version__",
        "model/__init__.py": "",
        "model/a.py": "from fwl_export.model.config import X\nfrom fwl_export import state",
        "model/config.py": "from fwl_export.errors import X",
    }
    for name, source in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


def _import_without(blocked: tuple[str, ...], modules: list[str]) -> str:
    """Import modules in a process where the blocked packages cannot be found.

    Returns:
      a line for each module that failed, and why.
    """
    script = f"""
        import importlib, sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {blocked!r}:
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Block())
        for name in {modules!r}:
            try:
                importlib.import_module(name)
            except Exception as error:
                print(f"{{name}}: {{error}}")
        """
    return _run(script).strip()


def _imported_by(script: str, modules: tuple[str, ...] = HEAVY) -> list[str]:
    """Return which of the modules are in memory after the script."""
    loaded = f"\nimport sys\nprint(*(name for name in {modules!r} if name in sys.modules))"
    return _run(textwrap.dedent(script) + loaded).split()


def _run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
