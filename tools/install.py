"""Create a virtual environment and install fwl-export into it; `make install` runs this.

    python3 tools/install.py --venv .venv --extras export,cpu,dev -- [MORE OPTIONS FOR PIP]

Runs on the bare Python that will be the environment's, so it uses the standard library only. Says
what takes the time, keeps pip's own output in VENV/install.log, and shows its end if pip fails.
Nothing is installed if the packages, constraints and options are those of the last run.

Every file that pip takes must have a sha256 that constraints.txt lists, or constraints-cuda.txt for
torch's CUDA builds: pip runs in its hash-checking mode, and the pinned build backend builds
fwl-export itself. Extras that are not pinned, such as `gpu`, are installed after that, without
hashes, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)

# What is installed, and what torch's CUDA builds bring in addition or instead.
LOCKS = ("constraints.txt", "constraints-cuda.txt")

# Stands for what is needed without any extra, in the lists of the constraints.
BASE = "always"

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
    parser.add_argument(
        "--unhashed", default="", help="packages of which any build will do, such as torch"
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
    source = Source(options.package, frozenset(filter(None, options.unhashed.split(","))))
    wanted = fingerprint(options.extras, [*options.pip, str(source.package), options.unhashed])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return 0
    code = install(options.venv, options.extras, options.pip, source)
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


@dataclass(frozen=True)
class Source:
    """What to install.

    Attributes:
      package: Wheel of fwl-export, or the checkout, which becomes an editable installation.
      unhashed: Names of pinned packages of which any build will do: their hashes are not checked.
    """

    package: Path = REPOSITORY
    unhashed: frozenset[str] = frozenset()


def install(
    venv: Path, extras: str, pip_options: Iterable[str], source: Source | None = None
) -> int:
    """Create the environment, install the packages, and say what is being done.

    Args:
      venv: Folder of the virtual environment.
      extras: Extras of fwl-export, with commas between.
      pip_options: More options for pip.
      source: What to install; by default the checkout.

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
    code = install_locked(command, venv, extras, source or Source(), say)
    if code:
        explain(log)
    else:
        say(f"done; `. {venv}/bin/activate` puts fwl-export on the path")
    return code


def install_locked(pip: list[str], venv: Path, extras: str, source: Source, say: Say) -> int:
    """Install the package, and what it needs by the hashes of the constraints.

    Args:
      pip: Beginning of a command line that installs something.
      venv: Folder of the virtual environment.
      extras: Extras of fwl-export, with commas between.
      source: What to install.
      say: Function that shows a line to the user.

    Returns:
      The exit code of the first run of pip that failed, or 0.
    """
    log, wheels = venv / "install.log", venv / "wheels"
    main, cuda = (read_lock((REPOSITORY / name).read_text(encoding="utf-8")) for name in LOCKS)
    chosen = {name.strip() for name in extras.split(",") if name.strip()}
    by_hash = ["--require-hashes", "--no-build-isolation", "-r"]

    def run(command: list[str], pins: Iterable[Pin]) -> int:
        file = venv / "requirements.txt"
        file.write_text("".join(pin.line() for pin in pins), encoding="utf-8")
        return run_pip([*pip[:3], *command, *pip[4:], *by_hash, str(file)], log, say)

    code = run(["install", "--no-deps"], [main[name] for name in BUILD])
    pins = {name: pin for name, pin in main.items() if pin.extras & {BASE, *chosen}}
    if any_build := [f"{name}=={pins.pop(name).version}" for name in source.unhashed & {*pins}]:
        say(f"without hashes, as asked: {', '.join(any_build)}")
        code = code or run_pip([*pip, "--no-deps", *any_build], log, say)
    if "torch" in pins and not torch_metadata(venv, pins["torch"].version):
        # Only the wheel says whether it is a CUDA build, and pip would not look at it twice.
        ask = [*pip[:3], "download", *pip[4:], "--no-deps", "--dest", str(wheels)]
        code = code or run_pip([*ask, f"torch=={pins['torch'].version}"], log, say)
        pins["torch"] = replace(pins["torch"], file=next(iter(wheels.glob("torch-*.whl")), None))
    if re.search("^Requires-Dist: (nvidia|cuda-toolkit)", torch_metadata(venv), re.MULTILINE):
        pins |= cuda
    code = code or run(["install"], pins.values())
    shutil.rmtree(wheels, ignore_errors=True)
    package, last = str(source.package), ["--no-deps"]
    if loose := chosen - {extra for pin in main.values() for extra in pin.extras}:
        say(f"without hashes, because nothing pins them: extras {', '.join(sorted(loose))}")
        package, last = f"{package}[{','.join(sorted(loose))}]", []
    editable = [] if source.package.is_file() else ["-e"]
    return code or run_pip([*pip, *last, "--no-build-isolation", *editable, package], log, say)


def torch_metadata(venv: Path, version: str = "") -> str:
    """Return the metadata of torch as it was downloaded or is installed, or "".

    Args:
      venv: Folder of the virtual environment, with the downloaded wheel in its folder `wheels`.
      version: Release that must be installed, without the name of its build; "" for any.
    """
    for wheel in (venv / "wheels").glob("torch-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            return archive.read(name).decode()
    for folder in venv.glob("lib/*/site-packages/torch-*.dist-info"):
        found = folder.name.removeprefix("torch-").removesuffix(".dist-info").partition("+")[0]
        if version in ("", found):
            return (folder / "METADATA").read_text(encoding="utf-8")
    return ""


@dataclass(frozen=True)
class Pin:
    """A release that the constraints name.

    Attributes:
      name: Name of the package, normalized.
      version: Its version.
      hashes: sha256 of the release's files, in hexadecimal.
      extras: Extras of fwl-export that need it, or `BASE`.
      file: Wheel on this machine to install it from, or None.
    """

    name: str
    version: str
    hashes: tuple[str, ...] = ()
    extras: frozenset[str] = frozenset()
    file: Path | None = None

    def line(self) -> str:
        """Return the lines of a requirements file that ask for the release."""
        options = "".join(f" \\\n    --hash=sha256:{digest}" for digest in self.hashes)
        comment = f"    # for: {', '.join(sorted(self.extras))}\n" if self.extras else ""
        what = f"{self.name}=={self.version}" if self.file is None else str(self.file.resolve())
        return f"{what}{options}\n{comment}"


def read_lock(text: str) -> dict[str, Pin]:
    """Return the pins of a file of constraints, by name.

    Args:
      text: Content of the file: requirements with their hashes, as `Pin.line` writes them.
    """
    pins = {}
    for match in re.finditer(r"^([\w.-]+)==(\S+)(.*\n(?: +.*\n)*)", text, re.MULTILINE):
        hashes = tuple(re.findall(r"--hash=sha256:(\w{64})", match[3]))
        extras = re.search(r"# for: (.*)", match[3])
        name = normalized(match[1])
        pins[name] = Pin(name, match[2], hashes, frozenset(extras[1].split(", ") if extras else ()))
    return pins


def normalized(name: str) -> str:
    """Return a package's name as indexes compare it.

    Args:
      name: Name as somebody wrote it.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


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
        "  Hash of torch differs:    make install UNHASHED=torch, for a build that is not listed\n"
        "  To start over:            remove the folder of the environment, then make install",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
