"""The public API: exactly these names, each importable, documented and found by editors."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import fwl_export
from fwl_export import errors

# Spelled out, so that adding or removing a public name is a decision that a reviewer sees.
PUBLIC = {
    "Bundle",
    "BundleError",
    "CheckError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "EngineError",
    "ExportError",
    "FWLModel",
    "BackboneConfig",
    "FastWeightsConfig",
    "FwlError",
    "Generation",
    "MissingDependencyError",
    "ModelConfig",
    "NotFiniteError",
    "OutputBusyError",
    "OutputExistsError",
    "PluginError",
    "PrecisionPolicy",
    "Report",
    "ReportError",
    "Sampler",
    "Session",
    "ShapeError",
    "Slots",
    "StateError",
    "TextSession",
    "TextStream",
    "TokenError",
    "TrainingError",
    "UpdateNormError",
    "bisect_bundle",
    "build_engines",
    "check_bundle",
    "export_bundle",
    "load_checkpoint",
    "open_session",
    "open_text_session",
    "read_bundle",
    "save_checkpoint",
}

NEED_TORCH = {
    "Checkpoint",
    "FWLModel",
    "PrecisionPolicy",
    "bisect_bundle",
    "export_bundle",
    "load_checkpoint",
    "save_checkpoint",
}

WITHOUT_TORCH = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "torch":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    sys.meta_path.insert(0, Block())
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name == "torch" else found(name)
    import fwl_export
    """


def test_the_public_names_are_exactly_these() -> None:
    assert set(fwl_export.__all__) == PUBLIC
    assert len(fwl_export.__all__) == len(PUBLIC)


def test_every_error_is_public() -> None:
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c)}
    assert {name for name in classes if issubclass(getattr(errors, name), Exception)} <= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_name_is_imported_and_documented(name: str) -> None:
    value = getattr(fwl_export, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert name in dir(fwl_export)


def test_type_checkers_see_the_names_of_the_table() -> None:
    tree = ast.parse(Path(fwl_export.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {name: f"fwl_export.{module}" for name, module in fwl_export._PUBLIC.items()}
    # `as` tells type checkers that the name is exported, not just used here.
    assert all(alias.asname == alias.name for node in imports for alias in node.names)


def test_a_name_is_the_one_of_its_module() -> None:
    for name, module in fwl_export._PUBLIC.items():
        expected = getattr(importlib.import_module(f"fwl_export.{module}"), name)
        assert getattr(fwl_export, name) is expected


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'fwl_export' has no attribute 'Bundel'"):
        _ = fwl_export.Bundel
    assert not hasattr(fwl_export, "numpy")


def test_help_shows_the_package() -> None:
    text = pydoc.plain(pydoc.render_doc(fwl_export))
    assert "learns while it reads" in text
    assert "class Session" in text
    assert "open_session(" in text


def test_the_example_of_the_docstring_runs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-bundle").symlink_to(tiny_bundle)
    assert fwl_export.__doc__ is not None
    _, _, rest = fwl_export.__doc__.partition("    from fwl_export import")
    code, _, _ = ("    from fwl_export import" + rest).partition("\n\nWhere")
    scope: dict[str, object] = {}
    exec(textwrap.dedent(code), scope)
    logits = scope["logits"]
    assert isinstance(logits, np.ndarray)
    assert logits.shape[-1] == 64
    assert (tmp_path / "after.state").is_file()


def test_importing_the_package_loads_nothing_large() -> None:
    code = """
        import sys
        import fwl_export
        dir(fwl_export)
        fwl_export.FwlError
        print({"numpy", "torch", "onnx", "onnxruntime", "tokenizers"} & set(sys.modules))
        """
    assert run(code) == "set()"


def test_without_torch_the_names_that_need_it_say_what_to_install() -> None:
    code = """
    missing = set()
    for name in fwl_export.__all__:
        try:
            getattr(fwl_export, name)
        except fwl_export.MissingDependencyError as error:
            missing.add(name)
            assert str(error) == (
                f"fwl_export.{name} needs 'torch', which is not installed; "
                "pip install 'fwl-export[export]'"
            ), error
    print(*sorted(missing))
    """
    assert set(run(WITHOUT_TORCH + code).split()) == NEED_TORCH


def test_without_torch_help_still_works() -> None:
    code = """
    import pydoc
    text = pydoc.plain(pydoc.render_doc(fwl_export))
    assert "class Session" in text
    assert not {"FWLModel", "export_bundle"} & set(dir(fwl_export))
    """
    assert run(WITHOUT_TORCH + code) == ""


def test_a_name_imported_from_the_package_without_torch() -> None:
    code = """
    try:
        from fwl_export import FWLModel
    except fwl_export.FwlError as error:
        print(error)
    """
    assert run(WITHOUT_TORCH + code).startswith("fwl_export.FWLModel needs 'torch'")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
