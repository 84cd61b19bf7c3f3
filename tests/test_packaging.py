"""The wheel: what it contains with and without a compiler, and that it suffices to run a bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from tools import install

REPOSITORY = Path(__file__).parents[1]
LIBRARY = "fwl_export/plugins_lib/libfwl_ort.so"
PLUGIN = "fwl_export/plugins_lib/libfwl_trt.so"
KERNELS = "fwl_export/plugins_lib/gpu/plan.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build the wheel from a copy of the sources, without what git ignores."""
    source = folder / "source"
    skip = shutil.ignore_patterns(
        ".*", "build", "runs", "plugins_lib", "__pycache__", "demo-bundle"
    )
    shutil.copytree(REPOSITORY, source, ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", folder / "wheels", source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "wheels").iterdir()
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_carries_libraries_and_kernels_and_they_are_found(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake or c++ is not installed")
    wheel = build_wheel(tmp_path)
    names = names_in(wheel)
    if LIBRARY not in names:
        pytest.skip("ONNX Runtime's headers cannot be downloaded, so the wheel has no libraries")
    assert "-py3-none-linux" in wheel.name
    assert KERNELS in names
    assert PLUGIN in names
    assert "fwl_export/demo/checkpoint/model.safetensors" in names
    notices = [
        name for name in names if name.endswith(".dist-info/licenses/THIRD_PARTY_NOTICES.md")
    ]
    assert len(notices) == 1
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fwl_export"}

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "from fwl_export.op import cuda\n"
        "from fwl_export.plugins import ONNXRUNTIME, find_plugin\n"
        "print(find_plugin(ONNXRUNTIME, 'required'), cuda._kernel_module('plan').__file__)\n"
    )
    # Without -S, Python would follow an editable installation back to the checkout.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / LIBRARY), str(site / KERNELS)]


def test_without_a_compiler_the_rest_is_installed(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    names = names_in(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in names
    assert "fwl_export/cli/main.py" in names


def path_without_cmake(folder: Path) -> str:
    """Return a PATH with the programs of this one, but without CMake."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            if not program.name.startswith("cmake"):
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return str(folder)


def test_without_cmake_the_rest_is_installed(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, PATH=path_without_cmake(tmp_path / "bin"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in names_in(wheel)


def test_without_its_backend_a_build_says_what_to_install(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")  # has neither scikit-build-core nor pip
    python = tmp_path / "venv" / "bin" / "python"
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tools/backend')!r}); import fwl_build"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "fwl-export is built by scikit-build-core, but 'scikit_build_core' is not installed here; "
        "pip install 'scikit-build-core>=0.11', or leave out --no-build-isolation\n"
    )


def test_without_torch_a_bundle_runs(tmp_path: Path, tiny_bundle: Path) -> None:
    """`pip install 'fwl-export[cpu]'` alone is enough to feed, save, load and generate."""
    wheel = build_wheel(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    python = tmp_path / "venv" / "bin" / "python"
    assert install.install(tmp_path / "venv", "cpu", [], install.Source(wheel)) == 0
    code = """
        import sys
        import numpy as np
        from fwl_export.runtimes import Sampler, Slots, open_session

        session = open_session(sys.argv[1])
        session.feed(np.arange(40) % 64)
        session.save_state("a.state", compress="lowrank")
        other = session.another()
        other.load_state("a.state")
        print(list(other.generate([5, 6], 4, Sampler(0.7, top_k=9))))
        slots = Slots(session.another(batch=2))
        slots.feed({slots.add(): [1, 2, 3]})
        heavy = {"torch", "onnx", "onnxscript", "tokenizers", "typer", "rich"} & set(sys.modules)
        assert not heavy, heavy
        try:
            open_session(sys.argv[1], "torch")
        except Exception as error:
            print(error)
    """
    out = run(python, "-c", textwrap.dedent(code), tiny_bundle, cwd=tmp_path)
    first, second = out.splitlines()
    assert len(first.split(",")) == 4
    assert second == "runtime 'torch' needs 'torch'; pip install 'fwl-export[export]'"
    program = tmp_path / "venv" / "bin" / "fwl-export"
    assert "can run models, not export" in run(program, "doctor", cwd=tmp_path)
    tiny = run(program, "inspect", tiny_bundle, cwd=tmp_path)
    assert "fwl::LinearAttentionUpdate 2" in tiny
    assert "torch" not in run(python, "-m", "pip", "list", cwd=tmp_path)


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
