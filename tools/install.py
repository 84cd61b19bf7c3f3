"""Create a virtual environment and install fwl-export into it; `make install` runs this.

    python3 tools/install.py --venv .venv --extras export,cpu,dev -- [MORE OPTIONS FOR PIP]

Runs on the bare Python that will be the environment's, so it uses the standard library only. Says
what takes the time, keeps pip's own output in VENV/install.log, and shows its end if pip fails.
Nothing is installed if the packages, constraints and options are those of the last run.

Every file that pip installs must have a sha256 that constraints.txt or constraints-cuda.txt lists:
pip first says which releases it would take, without installing them, and then installs these, in
its hash-checking mode (VENV/requirements.txt). fwl-export itself is built by the pinned build
backend. Releases that are not pinned, such as those of the extra `gpu`, are named; pip checks them
against the hashes that the index states.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)

# What is installed, and what torch's CUDA builds bring in addition or instead.
LOCKS = ("constraints.txt", "constraints-cuda.txt")

# What builds fwl-export and packages that have no wheel; pip installs it first.
BUILD = ("scikit-build-core", "packaging", "pathspec", "setuptools")

# Downloads below this size are not worth a line each.
LARGE_MB = 10

# Large packages, with the extras that bring them.
LARGE = {
    "torch": {"export", "hf"},
    "TensorRT-RTX": {"rtx"},
    "TensorRT": {"gpu"},
    "Triton": {"dev"},
    "transformers": {"hf"},
    "ONNX Runtime": {"cpu", "gpu"},
}

_DOWNLOAD = re.compile(r"(Downloading|Using cached) (\S+?) \(([\d.]+) (kB|MB|GB)\)")
_UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}

Say = Callable[[str], None]


def main() -> int:
    """Install what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder to create")
    parser.add_argument("--extras", default="", help="extras of fwl-export, with commas between")
    parser.add_argument(
        "--package",
        type=Path,
        default=REPOSITORY,
        help="wheel to install, default: this checkout, editable",
    )
    parser.add_argument("pip", nargs="*", help="more options for pip, after --")
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        print(
            f"error: fwl-export needs Python {OLDEST[0]}.{OLDEST[1]} or newer, but this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}. Name another one: "
            "make install PYTHON=python3.11",
            file=sys.stderr,
        )
        return 1
    stamp = options.venv / ".installed"
    wanted = fingerprint(options.extras, [*options.pip, str(options.package)])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return 0
    code = install(options.venv, options.extras, options.pip, options.package)
    if code == 0:
        stamp.write_text(wanted, encoding="utf-8")
    return code


def fingerprint(extras: str, pip_options: Iterable[str]) -> str:
    """Return a digest of all that decides what is installed.

    Args:
      extras: Extras of fwl-export, with commas between.
      pip_options: More options for pip.
    """
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    parts = [project["build-system"], project["project"], extras, list(pip_options), sys.version]
    constraints = [(REPOSITORY / name).read_text(encoding="utf-8") for name in LOCKS]
    text = json.dumps([*parts, *constraints], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() + "\n"


def install(venv: Path, extras: str, pip_options: Iterable[str], package: Path = REPOSITORY) -> int:
    """Create the environment, install the packages, and say what is being done.

    Args:
      venv: Folder of the virtual environment.
      extras: Extras of fwl-export, with commas between.
      pip_options: More options for pip.
      package: Wheel of fwl-export, or the checkout, which becomes an editable installation.

    Returns:
      pip's exit code, or that of creating the environment.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        start = f"[{time.monotonic() - began:4.0f} s] "
        indent = " " * len(start)
        print(textwrap.fill(start + text, 79, subsequent_indent=indent), flush=True)

    python = venv / "bin" / "python"
    if not python.exists():
        say(f"creating the environment {venv} with Python {sys.version.split()[0]}")
        done = subprocess.run([sys.executable, "-m", "venv", venv], check=False)
        if done.returncode:
            print(
                "error: Python cannot create a virtual environment. On Debian and Ubuntu: "
                "apt-get install python3-venv",
                file=sys.stderr,
            )
            return done.returncode
    say(f"installing fwl-export[{extras}]; nothing is compiled. {expected(extras)}".strip())
    log = venv / "install.log"
    log.unlink(missing_ok=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *pip_options]
    code = install_locked(command, venv, extras, package, say)
    if code:
        explain(log)
    else:
        say(f"done; `. {venv}/bin/activate` puts fwl-export on the path")
    return code


def install_locked(pip: list[str], venv: Path, extras: str, package: Path, say: Say) -> int:
    """Install the package, and what it needs by the hashes of the constraints.

    Args:
      pip: Beginning of a command line that installs something.
      venv: Folder of the virtual environment.
      extras: Extras of fwl-export, with commas between.
      package: Wheel of fwl-export, or the checkout.
      say: Function that shows a line to the user.

    Returns:
      The exit code of the first run of pip that failed, or 0.
    """
    log, locked, report = venv / "install.log", read_locks(), venv / "resolved.json"
    build, requirements = venv / "build-requirements.txt", venv / "requirements.txt"
    pins = venv / "constraints.txt"
    wanted = [locked[0][name] for name in BUILD]
    build.write_text("".join(wanted_line(pin, pin.hashes) for pin in wanted), encoding="utf-8")
    pins.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in free(locked)), "utf-8")
    target = f"{package}[{extras}]" if extras else str(package)
    source = [target] if package.is_file() else ["-e", target]
    by_hash = ["--no-deps", "--require-hashes", "--no-build-isolation"]
    code = run_pip([*pip, *by_hash, "-r", str(build)], log, say)
    if code:
        return code
    dry = ["--dry-run", "--report", str(report), "--no-build-isolation", "-c", str(pins)]
    code = run_pip([*pip, *dry, *source], log, say)
    if code:
        return code
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines, loose = chosen(found, locked)
    if loose:
        say(f"not pinned, so taken as the index has them: {', '.join(loose)}")
    requirements.write_text("".join(lines), encoding="utf-8")
    if lines:
        code = run_pip([*pip, *by_hash, "-r", str(requirements)], log, say)
    source[-1] = str(package)
    return code or run_pip([*pip, "--no-deps", "--no-build-isolation", *source], log, say)


@dataclass(frozen=True)
class Pin:
    """A release that the constraints name.

    Attributes:
      name: Name of the package, normalized.
      version: Its version.
      hashes: sha256 of the release's files, in hexadecimal.
    """

    name: str
    version: str
    hashes: tuple[str, ...]


Locks = tuple[dict[str, Pin], ...]


def read_locks() -> Locks:
    """Return the pins of each file of constraints, by name."""
    return tuple(read_lock((REPOSITORY / name).read_text(encoding="utf-8")) for name in LOCKS)


def read_lock(text: str) -> dict[str, Pin]:
    """Return the pins of a file of constraints, by name.

    Args:
      text: Content of the file: `name==version`, and its hashes as pip's options.
    """
    pins = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)", line):
            name = normalized(match[1])
            pins[name] = Pin(name, match[2], tuple(re.findall(r"--hash=sha256:(\w{64})", line)))
    return pins


def normalized(name: str) -> str:
    """Return a package's name as indexes compare it.

    Args:
      name: Name as somebody wrote it.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def free(locked: Locks) -> list[Pin]:
    """Return the pins that decide what pip resolves: those that no other build of torch changes.

    Args:
      locked: Pins of the files of constraints.
    """
    return [pin for name, pin in locked[0].items() if name not in locked[1]]


def wanted_line(pin: Pin, hashes: Iterable[str]) -> str:
    """Return a line of a requirements file.

    Args:
      pin: Release to install.
      hashes: sha256 of the files that may be installed.
    """
    options = "".join(f" --hash=sha256:{digest}" for digest in hashes)
    return f"{pin.name}=={pin.version}{options}\n"


def chosen(found: Iterable[dict[str, Any]], locked: Locks) -> tuple[list[str], list[str]]:
    """Return lines of a requirements file for what pip chose, and the names of what is not pinned.

    Args:
      found: What pip would install, from its report.
      locked: Pins of the files of constraints.
    """
    lines, loose = [], []
    for item in found:
        name, version = normalized(item["metadata"]["name"]), item["metadata"]["version"]
        if name == "fwl-export":
            continue
        public = version.partition("+")[0]  # 2.13.0+cpu is a build of 2.13.0
        pins = [lock[name] for lock in locked if name in lock]
        hashes = [h for pin in pins if pin.version in (public, version) for h in pin.hashes]
        if not hashes:
            stated = item["download_info"].get("archive_info", {}).get("hashes", {})
            hashes = [stated["sha256"]] if "sha256" in stated else []
            loose.append(f"{name} {version}")
        lines.append(wanted_line(Pin(name, version, ()), hashes))
    return lines, loose


def expected(extras: str) -> str:
    """Return what to expect of the download, naming the large packages.

    Args:
      extras: Extras of fwl-export, with commas between.
    """
    names = [extra.strip() for extra in extras.split(",")]
    large = [package for package, bringing in LARGE.items() if bringing & {*names}]
    if not large:
        return ""
    text = f"Large: {', '.join(large)}."
    if "torch" in large:
        text += " About 400 MB to download and 1.6 GB on disk; several GB for torch with CUDA."
    return f"{text} Usually 1 to 3 minutes."


def run_pip(command: list[str], log: Path, say: Say) -> int:
    """Run pip, write its output to a log, and say which large steps it has come to.

    Args:
      command: pip's command line.
      log: File to append pip's output to.
      say: Function that shows a line to the user.

    Returns:
      pip's exit code.
    """
    with (
        log.open("a", encoding="utf-8") as stream,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        with heartbeat(say) as doing:
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                if text := progress(line):
                    doing(text)
    return process.returncode


@contextmanager
def heartbeat(say: Say, seconds: float = 15) -> Iterator[Say]:
    """Repeat what is being done whenever nothing was said for some time.

    Args:
      say: Function that shows a line to the user.
      seconds: Time without a line before the last one is repeated.

    Yields:
      The function to call with what is being done; it shows that at once.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def repeat() -> None:
        last = "waiting for pip"
        while True:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                say(f"still {last}")
                continue
            if line is None:
                return
            last = line
            say(line)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join()


def progress(line: str) -> str:
    """Return what a line of pip's output tells a user who waits, or "".

    Args:
      line: One line that pip printed.
    """
    line = line.strip()
    if match := _DOWNLOAD.search(line):
        how, file, number, unit = match.groups()
        size = float(number) * _UNITS[unit]
        name = "-".join(Path(file).name.split("-")[:2])
        how = "downloading" if how == "Downloading" else "taking from pip's cache"
        return f"{how} {name}, {size:.0f} MB" if size >= LARGE_MB else ""
    if line.startswith("Installing collected packages:"):
        count = len(line.partition(":")[2].split(","))
        return f"unpacking {count} packages"
    return ""


def explain(log: Path) -> None:
    """Show the end of pip's log and what can be done.

    Args:
      log: File with pip's output.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    print(*(f"  {line}" for line in lines[-15:]), sep="\n", file=sys.stderr)
    print(
        f"error: pip failed; the lines above are the end of {log}.\n"
        "  No network, or a mirror:  make install PIP_ARGS='--index-url URL'\n"
        "  No room on the disk:      make install EXTRAS=export,cpu (leaves out RTX and tests)\n"
        "  torch without CUDA:       make install PIP_ARGS='--extra-index-url URL of its builds'\n"
        "  Hashes do not match:      see 'Set-up' in CONTRIBUTING.md, for another build of torch\n"
        "  To start over:            remove the folder of the environment, then make install",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
