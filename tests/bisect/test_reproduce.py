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

from fwl_export.bisect.reproduce import SCRIPT_FILE, Reproduced, write_reproducer
from fwl_export.parity.candidates import Candidate

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


def written(folder: Path, name: str, input_name: str, runtime: str, limit: float) -> Reproduced:
    node = helper.make_node("Identity", [input_name], [name])
    graph = helper.make_graph(
        [node],
        "planted",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    budget = types.SimpleNamespace(max_abs=limit)
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
        np.zeros(2),
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
