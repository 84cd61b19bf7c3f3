"""Write a software bill of materials (CycloneDX, JSON) of the environment, with licences.

    python -m tools.write_sbom -o build/sbom.json

Lists every package of the Python environment that runs it, as `cyclonedx-py` finds them, and adds
what is compiled into the wheel's libraries: the components of THIRD_PARTY_NOTICES.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fwl_export import __version__
from fwl_export.files import replaced_file

REPOSITORY = Path(__file__).resolve().parents[1]

# Name, version and licence of what is compiled in. THIRD_PARTY_NOTICES.md says into which library.
COMPILED_IN = (
    ("ONNX Runtime C API header", "1.17.0", "MIT"),
    ("TensorRT headers", "10.14.1", "Apache-2.0"),
    ("nlohmann/json", "3.12.0", "MIT"),
    ("libc++ and compiler-rt", "", "Apache-2.0 WITH LLVM-exception"),
    ("libstdc++ and libgcc", "", "GPL-3.0-or-later WITH GCC-exception-3.1"),
)


def components() -> list[dict[str, Any]]:
    """Return what is compiled in, as CycloneDX components."""
    return [
        {
            "type": "library",
            "bom-ref": f"compiled-in-{name.replace(' ', '-')}",
            "name": name,
            **({"version": version} if version else {}),
            "licenses": [{"expression": licence}],
            "description": "compiled into libraries of fwl-export, see THIRD_PARTY_NOTICES.md",
        }
        for name, version, licence in COMPILED_IN
    ]


def environment() -> dict[str, Any]:
    """Return the SBOM of this Python environment, as cyclonedx-py writes it.

    Raises:
      RuntimeError: cyclonedx-py failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sbom.json"
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
        command += ["--pyproject", str(REPOSITORY / "pyproject.toml"), "--mc-type", "library"]
        done = subprocess.run(
            [*command, "--of", "JSON", "-o", str(path), sys.executable],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def completed(sbom: dict[str, Any]) -> dict[str, Any]:
    """Return an SBOM with our version, without our own package, and with what is compiled in.

    Args:
      sbom: CycloneDX data of an environment.
    """
    installed = [c for c in sbom.get("components", []) if c["name"] != "fwl-export"]
    root = {**sbom["metadata"]["component"], "version": __version__}
    return {
        **sbom,
        "metadata": {**sbom["metadata"], "component": root},
        "components": [*installed, *components()],
    }


def main() -> int:
    """Write the SBOM; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if importlib.util.find_spec("cyclonedx_py") is None:
        print("error: this needs cyclonedx-py; pip install -e '.[release]'", file=sys.stderr)
        return 1
    sbom = completed(environment())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(options.output) as path:
        path.write_text(json.dumps(sbom, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}: {len(sbom['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
