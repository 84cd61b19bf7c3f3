"""The CMake package: other projects find the libraries and call them. Also the build's options."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.builds import PLUGINS, built, run

# One token, one row: S = 0.5 * 2 + 3 * 4 = 13, o = 5 * 13 = 65.
PROGRAM = """\
#include <vector>
#include "kernels/cpu/linear_attention_update.h"

int main() {
  using namespace fwl::cpu;
  const Sizes sizes{1, 1, 1, 1, Activation::kFloat32};
  const float query = 5, key = 3, value = 4, decay = 0.5f, past = 2;
  float output = 0, present = 0;
  const Tensors tensors{&query, &key, &value, &decay, &past, &output, &present};
  const InstructionSet set = best_instruction_set();
  std::vector<char> workspace(workspace_bytes(sizes, set));
  const ParallelFor serial{
      [](void*, void (*task)(void*, size_t), size_t count, void* context) {
        for (size_t i = 0; i < count; ++i) task(context, i);
      },
      nullptr};
  linear_attention_update(sizes, tensors, set, workspace.data(), serial);
  return present == 13 && output == 65 ? 0 : 1;
}
"""


def consumers(folder: Path, installed: Path, name: str, source: str, *targets: str) -> list[Path]:
    """Build a program from a source file in C or C++, once with each target of the package."""
    language = {".c": "C", ".cpp": "CXX"}[Path(name).suffix]
    project = folder / language
    lines = [
        "cmake_minimum_required(VERSION 3.20)",
        f"project(consumer LANGUAGES {language})",
        "find_package(fwl 0.2 REQUIRED)",
    ]
    for target in targets:
        lines += [
            f"add_executable(with_{target} {name})",
            f"target_link_libraries(with_{target} PRIVATE fwl::{target})",
        ]
    project.mkdir()
    (project / "CMakeLists.txt").write_text("\n".join(lines))
    (project / name).write_text(source)
    run("cmake", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", project / "build")
    return [project / "build" / f"with_{target}" for target in targets]


@pytest.mark.slow
def test_find_package(builds: Path, tmp_path: Path) -> None:
    folder = built(builds, "package", "-DFWL_ONNXRUNTIME=OFF", "-DFWL_GPU=OFF")
    installed = tmp_path / "installed"
    run("cmake", "--install", folder, "--prefix", installed)
    (program,) = consumers(tmp_path, installed, "main.cpp", PROGRAM, "cpu")
    run(program)


@pytest.mark.slow
def test_libfwl_is_found_by_cmake_and_pkg_config(
    libraries: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    import onnxruntime

    installed = tmp_path / "installed"
    run("cmake", "--install", libraries, "--prefix", installed)
    examples = PLUGINS / "libfwl" / "examples"
    in_cpp, in_c = (examples / name for name in ("generate.cpp", "generate.c"))
    programs = consumers(tmp_path, installed, "main.cpp", in_cpp.read_text(), "fwl", "fwl_static")
    programs += consumers(tmp_path, installed, "main.c", in_c.read_text(), "fwl", "fwl_static")
    (config,) = installed.glob("**/fwl.pc")

    def flags(*more: str) -> list[str]:
        return subprocess.run(
            ["pkg-config", "--cflags", "--libs", *more, "fwl"],
            env={**os.environ, "PKG_CONFIG_PATH": str(config.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    programs += [tmp_path / "c99", tmp_path / "c99_static"]
    compiler = ("cc", "-std=c99", "-Wall", "-Werror", in_c, "-o")
    run(*compiler, programs[-2], *flags())
    # The meaning of -lfwl where the shared library is not installed.
    static = [flag.replace("-lfwl", "-l:libfwl.a") for flag in flags("--static")]
    run(*compiler, programs[-1], *static)
    capi = Path(onnxruntime.__file__).parent / "capi"
    environment = {
        **os.environ,
        "FWL_RUNTIME": str(next(capi.glob("libonnxruntime.so.*"))),
        "LD_LIBRARY_PATH": str(config.parents[1]),
    }
    outputs = {
        subprocess.run(
            [each, tiny_bundle, "5", "1", "2", "3"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for each in programs
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 5


def test_the_old_name_of_the_option_still_works(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    command = ["cmake", "-S", str(PLUGINS), "-B", str(tmp_path)]
    command += ["-DFWL_EMBED=OFF", "-DFWL_ONNXRUNTIME=OFF", "-DFWL_GPU=OFF"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "The option FWL_EMBED is now called FWL_LIBFWL." in done.stderr
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert "FWL_LIBFWL:BOOL=OFF" in cache
    assert "FWL_EMBED" not in cache
