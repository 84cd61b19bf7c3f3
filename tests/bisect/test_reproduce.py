"""The reproducer: a constant program, whatever the names in the model are."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from fwl_export.bisect.expose import open_probe
from fwl_export.bisect.reproduce import SCRIPT_FILE, Reproduced, write_reproducer
from fwl_export.parity.candidates import Candidate
from fwl_export.parity.tolerances import Budget

NAMES = (
    "plain",
    "'] + [__import__('os').abort()] + ['",
    '""" + open("pwned", "w").name + """',
    "{run}{0}%s%n NAME",
    "$(touch pwned) `touch pwned` ; touch pwned",
    "../../pwned",
    "/etc/passwd",
    "line\nimport os\n",
    "\x1b]0;title\x07\x9b2J\u202e",
    "file",  # numpy.savez's own argument
    "expected",  # another array of the same file
    "名前",
)


def written(
    folder: Path,
    name: str,
    input_name: str,
    runtime: str,
    limit: float,
    relative_rms: float = 1e300,
    expected: Any = (1e-9, 1e-9),
) -> Reproduced:
    node = helper.make_node("Identity", [input_name], [name])
    graph = helper.make_graph(
        [node],
        "planted",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    budget = Budget(limit, relative_rms)
    located: Any = types.SimpleNamespace(
        tensor=name,
        nodes=[node],
        inputs=[input_name],
        outside=types.SimpleNamespace(budget=budget),
    )
    folder.mkdir()
    return write_reproducer(
        folder,
        model,
        located,
        {input_name: np.ones(2, np.float32)},
        np.array(expected),
        Candidate(runtime, runtime),
    )


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / SCRIPT_FILE)]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_data(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "repro"
    constant = importlib.resources.files("fwl_export.bisect").joinpath(SCRIPT_FILE).read_bytes()
    shown = written(folder, f"{name}.out", name, "onnx-reference", 0.5)
    assert shown == Reproduced(reproduces=True, file_is_wrong=True)
    assert (folder / SCRIPT_FILE).read_bytes() == constant
    assert json.loads((folder / "repro.json").read_text())["tensor"] == f"{name}.out"
    done = run(folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.isprintable() or done.stdout.count("\n") == 1
    assert "\x1b" not in done.stdout
    assert f"{f'{name}.out'!a}: max abs 1 at [[0]], allowed 0.5" in done.stdout
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert files == {
        "repro",
        *(f"repro/{file}" for file in ("repro.onnx", "repro.json", "arrays.npz", SCRIPT_FILE)),
    }


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx-reference"])
@pytest.mark.parametrize(("limit", "code"), [(0.5, 1), (1.0, 0)])
def test_the_exit_code_says_whether_the_tensor_is_right(
    tmp_path: Path, runtime: str, limit: float, code: int
) -> None:
    written(tmp_path / "repro", "y", "x", runtime, limit)
    assert run(tmp_path / "repro").returncode == code


class _Off:
    """A probe whose runtime is off by some amounts."""

    def __init__(self, amounts: Any) -> None:
        self.amounts = np.array(amounts, np.float32)

    def run(self, inputs: Any) -> Any:
        return {"out": inputs["in"] + self.amounts}


# The nodes pass on [1, 1]. Either they should, and the runtime is off, or [2, 1] is right.
@pytest.mark.parametrize(
    ("limit", "relative_rms"), [(1e-3, 10.0), (10.0, 1e-3)], ids=["largest", "rms"]
)
@pytest.mark.parametrize("file_is_wrong", [True, False])
def test_what_located_a_tensor_also_says_whose_fault_it_is(
    limit: float,
    relative_rms: float,
    file_is_wrong: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault that shows in one measure only is blamed on the right side by that measure."""
    amounts = [0, 0] if file_is_wrong else [1, 0]

    def probe(candidate: Candidate, path: Path) -> Any:
        if candidate.runtime == "onnxruntime":
            return _Off(amounts)
        return open_probe(candidate, path)

    monkeypatch.setattr("fwl_export.bisect.reproduce.open_probe", probe)
    expected = np.array([2.0, 1.0]) if file_is_wrong else np.ones(2)
    shown = written(tmp_path / "repro", "out", "in", "onnxruntime", limit, relative_rms, expected)
    assert shown == Reproduced(reproduces=True, file_is_wrong=file_is_wrong)
    settings = tmp_path / "repro" / "repro.json"
    settings.write_text(settings.read_text().replace("onnxruntime", "onnx-reference"))
    assert run(tmp_path / "repro").returncode == int(file_is_wrong)


def test_nodes_that_are_right_alone_blame_nobody(tmp_path: Path) -> None:
    shown = written(tmp_path / "repro", "out", "in", "onnxruntime", 0.1, 0.1, np.ones(2))
    assert shown == Reproduced(reproduces=False, file_is_wrong=None)
