"""The CMake package: a program of another project finds the kernel and calls it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.plugins.builds import built, run

PROJECT = """\
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES CXX)
find_package(fwl 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE fwl::cpu)
"""

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


@pytest.mark.slow
def test_find_package(builds: Path, tmp_path: Path) -> None:
    folder = built(builds, "package", "-DFWL_ONNXRUNTIME=OFF", "-DFWL_GPU=OFF")
    installed = tmp_path / "installed"
    run("cmake", "--install", folder, "--prefix", installed)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "consumer")


EMBEDDING = """\
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES C CXX)
find_package(fwl 0.1 REQUIRED)
add_executable(shared main.cpp)
target_link_libraries(shared PRIVATE fwl::fwl)
add_executable(static main.cpp)
target_link_libraries(static PRIVATE fwl::fwl_static)
"""

IN_C = """\
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES C)
find_package(fwl 0.1 REQUIRED)
add_executable(static_c main.c)
target_link_libraries(static_c PRIVATE fwl::fwl_static)
"""


@pytest.mark.slow
def test_libfwl_is_found_by_cmake_and_pkg_config(
    libraries: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    import onnxruntime

    installed = tmp_path / "installed"
    run("cmake", "--install", libraries, "--prefix", installed)
    (tmp_path / "CMakeLists.txt").write_text(EMBEDDING)
    examples = Path(__file__).parents[2] / "plugins" / "embed" / "examples"
    (tmp_path / "main.cpp").write_text((examples / "generate.cpp").read_text())
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path / "build")
    (config,) = installed.glob("**/fwl.pc")

    def flags(*more: str) -> list[str]:
        return subprocess.run(
            ["pkg-config", "--cflags", "--libs", *more, "fwl"],
            env={**os.environ, "PKG_CONFIG_PATH": str(config.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    program = tmp_path / "c99"
    run("cc", "-std=c99", "-Wall", "-Werror", examples / "generate.c", "-o", program, *flags())
    in_c = tmp_path / "in_c"
    in_c.mkdir()
    (in_c / "CMakeLists.txt").write_text(IN_C)
    (in_c / "main.c").write_text((examples / "generate.c").read_text())
    run("cmake", "-S", in_c, "-B", in_c / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", in_c / "build")
    for shared in config.parents[1].glob("libfwl.so*"):
        shared.rename(tmp_path / shared.name)  # then pkg-config's -lfwl is the other
    run("cc", examples / "generate.c", "-o", tmp_path / "c_static", *flags("--static"))
    for shared in tmp_path.glob("libfwl.so*"):
        shared.rename(config.parents[1] / shared.name)
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
        for each in (
            program,
            tmp_path / "c_static",
            tmp_path / "build" / "shared",
            tmp_path / "build" / "static",
            in_c / "build" / "static_c",
        )
    }
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 5
