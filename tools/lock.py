"""Write the hashes of constraints.txt and constraints-cuda.txt; check that each pin has some.

    python -m tools.lock                     # new pins get hashes; unchanged ones keep theirs too
    python -m tools.lock --wheel torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl

To move to other releases, change the versions first and install them: which extras need a package
is read from the environment. The hashes are those of all files of a release that the package index
lists, for every platform and Python. A wheel from elsewhere, such as torch's builds without CUDA,
is added by its file. Needs `uv`, which asks the index; it installs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from tools.install import BASE, LOCKS, REPOSITORY, Pin, normalized, read_lock

# uv answers for one Python; the hashes it lists are those of all.
PYTHON = "3.12"

# Extras whose packages are pinned.
EXTRAS = ("cpu", "dev", "docs", "export", "gguf", "hf", "import", "plots", "rtx", "tensorboard")

# Where the pins are for.
MACHINES = [
    {"python_version": version, "python_full_version": f"{version}.9", "platform_machine": machine}
    for version in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


class LockError(Exception):
    """uv is missing, or knows no hashes of a release."""


def ask_index(pins: Iterable[Pin]) -> dict[str, Pin]:
    """Return the pins with the hashes that the package index lists.

    Args:
      pins: Releases to ask for.

    Raises:
      LockError: uv is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        names, found = Path(folder) / "pins.in", Path(folder) / "pins.txt"
        text = "".join(f"{pin.name}=={pin.version}\n" for pin in pins)
        names.write_text(text, encoding="utf-8")
        command = ["uv", "pip", "compile", "--no-deps", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", "--python-version", PYTHON, "--quiet"]
        try:
            subprocess.run([*command, "-o", str(found), str(names)], check=True)
        except FileNotFoundError:
            raise LockError("uv is not installed; pip install uv") from None
        except subprocess.CalledProcessError as error:
            raise LockError(f"uv failed with exit code {error.returncode}; see above") from None
        return read_lock(found.read_text(encoding="utf-8"))


def with_hashes(old: Pin, new: Pin | None, wheels: Iterable[Path]) -> Pin:
    """Return a pin with its old hashes, those of the index and those of wheels of its release.

    Args:
      old: Pin as the file has it.
      new: Pin as the index answers, or None.
      wheels: Wheels from elsewhere.

    Raises:
      LockError: There are none.
    """
    hashes = {*old.hashes, *(new.hashes if new else ())}
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        if (normalized(name), version.partition("+")[0]) == (old.name, old.version):
            hashes.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    if not hashes:
        raise LockError(f"the index lists no hashes of {old.name}=={old.version}")
    return Pin(old.name, old.version, tuple(sorted(hashes)))


def needed(extra: str) -> set[str]:
    """Return the names of all packages that an extra needs, from what is installed here.

    Args:
      extra: Name of the extra, or `BASE`.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    options: Mapping[str, list[str]] = project["optional-dependencies"]
    lines = [*project["dependencies"], *options.get(extra, [])]
    found: set[tuple[str, str]] = set()
    left = [(Requirement(line), "") for line in lines]
    while left:
        requirement, asked_by = left.pop()
        name = normalized(requirement.name)
        if not _applies(requirement, asked_by):
            continue
        for part in ("", *requirement.extras):
            if (name, part) in found:
                continue
            found.add((name, part))
            left += [(Requirement(line), part) for line in _requires(name, part, options)]
    return {name for name, _ in found} - {"fwl-export"}


def _applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**m, "extra": extra}) for m in MACHINES)


def _requires(name: str, extra: str, options: Mapping[str, list[str]]) -> list[str]:
    if name == "fwl-export":
        return options.get(extra, [])
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def lock(
    text: str, wheels: Iterable[Path] = (), extras: Mapping[str, set[str]] | None = None
) -> str:
    """Return the content of a file of constraints with the hashes of its pins.

    The comment at its top stays. A pin whose version was changed by hand must be without hashes.

    Args:
      text: Content of the file.
      wheels: Wheels from elsewhere.
      extras: Names of the packages that each extra needs; None writes no extras.
    """
    pins = read_lock(text)
    answers = ask_index(pins.values())
    head = [line for line in text.splitlines() if line.startswith("#")]
    for name in sorted(pins):
        pin = with_hashes(pins[name], answers.get(name), wheels)
        users = frozenset(extra for extra, names in (extras or {}).items() if name in names)
        head.append(replace(pin, extras=users).line().rstrip("\n"))
    return "\n".join(head) + "\n"


def main() -> int:
    """Rewrite both files; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--wheel", type=Path, action="append", default=[], help="wheel from elsewhere to allow"
    )
    wheels = parser.parse_args().wheel
    extras = {extra: needed(extra) for extra in (BASE, *EXTRAS)}
    for name, users in zip(LOCKS, (extras, None), strict=True):
        path = REPOSITORY / name
        try:
            text = lock(path.read_text(encoding="utf-8"), wheels, users)
        except LockError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        path.write_text(text, encoding="utf-8")
        print(f"wrote {name}: {len(read_lock(text))} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
