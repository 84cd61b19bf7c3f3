"""Extract third-party C headers from a pinned PyPI wheel, for builds without an SDK.

    python tools/fetch_headers.py onnxruntime DESTINATION

The headers are neither committed nor shipped; THIRD_PARTY_NOTICES.md says what is compiled in.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Source:
    """A wheel that contains headers.

    Attributes:
      requirement: Requirement for pip that names the wheel and its exact version.
      sha256: Hash of the wheel, in hexadecimal.
      headers: Paths of headers in the wheel; they are written without their folders.
      folder: Folder in the wheel whose files are all written, with their paths below it; "" for
        none.
    """

    requirement: str
    sha256: str
    headers: tuple[str, ...] = ()
    folder: str = ""


_QUARK = "quark/onnx/operators/custom_ops/include/onnxruntime-1.17.0/onnxruntime/core/session"

SOURCES = {
    # Release 2.13.10. The wheel asks for Python 3.12 or newer, but its header does not.
    "catch2": Source(
        "comma-deps-catch2==2.13.10.post96",
        "ab456417e68147784be2e42d47919067cf20500913be1fac0a53877c546c46fb",
        folder="catch2/install/include/",
    ),
    "json": Source(
        "nlohmann-json==3.12.0",
        "5f6132720fb25d0d70bf0742f8397b49a540dcc193e7312a914f6aa49f054810",
        folder="nlohmann_json/include/",
    ),
    "onnxruntime": Source(
        "amd-quark==0.13",
        "3b3e58a4cbbcff20d27815b641aa4de4d698efde3c782306cb4a6a05bcf55c8c",
        (f"{_QUARK}/onnxruntime_c_api.h",),
    ),
    "tensorrt": Source(
        "kernel-lens==2.0.1",
        "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0",
        tuple(
            f"kernel_lens/include/tensorrt/NvInfer{part}.h"
            for part in (
                "Impl",
                "LegacyDims",
                "PluginBase",
                "Runtime",
                "RuntimeBase",
                "RuntimeCommon",
                "RuntimePlugin",
                "Version",
            )
        ),
    ),
}


class FetchError(Exception):
    """The wheel cannot be downloaded, or is not the one that was pinned."""


def fetch(source: Source, destination: Path) -> None:
    """Download a wheel with pip and extract its headers.

    Args:
      source: Wheel to download, and the headers in it.
      destination: Folder to write the headers to.

    Raises:
      FetchError: The wheel cannot be downloaded, or is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check"]
        command += ["--ignore-requires-python"]  # its Python code is not run
        done = subprocess.run(
            [*command, "--dest", folder, source.requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise FetchError(f"pip cannot download {source.requirement}: {done.stderr.strip()}")
        extract(wheels[0], source, destination)


def extract(wheel: Path, source: Source, destination: Path) -> None:
    """Extract the headers from a downloaded wheel.

    Args:
      wheel: Path of the wheel.
      source: What the wheel should be, and the headers in it.
      destination: Folder to write the headers to.

    Raises:
      FetchError: The wheel's hash is not the pinned one.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != source.sha256:
        raise FetchError(f"{wheel.name} has sha256 {found}; expected {source.sha256}")
    destination.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        targets = {header: PurePosixPath(header).name for header in source.headers}
        for name in archive.namelist():
            if source.folder and name.startswith(source.folder) and not name.endswith("/"):
                targets[name] = name.removeprefix(source.folder)
        for name, place in targets.items():
            target = destination / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def main() -> int:
    """Fetch the headers that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SOURCES, help="library whose headers to fetch")
    parser.add_argument("destination", type=Path, help="folder to write them to")
    arguments = parser.parse_args()
    try:
        fetch(SOURCES[arguments.what], arguments.destination)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
