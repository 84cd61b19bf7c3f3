"""Engines are built in a process of their own.

A builder cannot be interrupted from Python, may abort its process on a broken plugin, prints
where it likes, and does not share a process with the other variant. So the caller starts a
worker, waits for it second by second, and kills it when interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fwl_export import errors
from fwl_export.engines.compile import PluginUse, Range, compile_engine
from fwl_export.engines.variant import (
    VARIANTS,
    buildable_sms,
    check_installed,
    find_variant,
    load_variant,
    plugin_environment,
)
from fwl_export.errors import EngineError, FwlError

# A path of its own instead of `-m`, which would put the working directory first: a user's
# inspect.py there would be imported instead of Python's.
_CHILD = "import sys; sys.path[:] = {path!r}; from fwl_export.engines.worker import main; main()"


@dataclass(frozen=True)
class Probe:
    """What a variant can do on this machine.

    Attributes:
      version: of the variant, "" if it is not available.
      sms: that it can build for here.
      versions: of the tools that take part in a build.
      reason: why it is not available, or "".
    """

    version: str
    sms: Sequence[int]
    versions: dict[str, str]
    reason: str

    @property
    def available(self) -> bool:
        """Whether it can be loaded."""
        return not self.reason


def probe_variant(name: str) -> Probe:
    """Load a variant in a process of its own and ask what it can do; never raises."""
    try:
        return describe_variant(name)
    except FwlError as error:
        return Probe("", (), {}, str(error))


def describe_variant(name: str) -> Probe:
    """Load a variant in a process of its own and ask what it can do.

    Raises:
      EngineError: the name is unknown.
      MissingDependencyError: it is not installed, or its libraries cannot be loaded.
    """
    check_installed(find_variant(name))
    return Probe(**_ask({"do": "describe", "variant": name}), reason="")


def build_in_worker(
    variant: str,
    model: Path,
    sm: int,
    ranges: Sequence[Range],
    output: Path,
    plugin: PluginUse | None,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    """Build an engine in a process of its own, see `compile_engine`.

    Args:
      variant: its name.
      model: ONNX file.
      sm: compute capability to build for.
      ranges: of the optimisation profiles.
      output: file to write.
      plugin: for the fast-weight updates; None builds them from the function body.
      tick: called every second with the seconds that have passed.
    """
    request = {
        "do": "build",
        "variant": variant,
        "model": str(model),
        "sm": sm,
        "ranges": [asdict(scope) for scope in ranges],
        "output": str(output),
        "plugin": None if plugin is None else {**asdict(plugin), "path": str(plugin.path)},
    }
    if plugin is None:
        return _ask(request, tick)
    with plugin_environment(find_variant(variant)) as environment:
        return _ask(request, tick, environment)


def _ask(
    request: dict[str, Any],
    tick: Callable[[float], None] = lambda seconds: None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a worker on a request.

    Returns:
      Its answer.

    Raises:
      FwlError: as raised in the worker; or EngineError, if it died.
      OSError: it could not write its output.
    """
    code = _CHILD.format(path=sys.path)
    command = [sys.executable, "-c", code, json.dumps(request)]
    pipe, began = subprocess.PIPE, time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        try:
            while True:
                try:
                    answer, log = process.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    tick(time.monotonic() - began)
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise EngineError(
            f"{VARIANTS[request['variant']].title} ended its process with {name}{_last_line(log)}"
        )
    if process.returncode or not answer:
        raise RuntimeError(f"the engine worker failed:\n{log}")
    return _unpack(json.loads(answer))


def _unpack(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        kind: type[FwlError] = getattr(errors, answer["error"])
        raise kind(answer["message"])
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["filename"])
    result: dict[str, Any] = answer["result"]
    return result


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"; its last words: {lines[-1]}" if lines else ""


def main() -> None:
    """Answer the request in the command line, as the worker process."""
    # Ctrl-C reaches every process of a terminal; the caller decides and kills this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print on standard output; the answer goes to where it led, the rest to the log.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        json.dump(_handle(json.loads(sys.argv[1])), answer)


def _handle(request: dict[str, Any]) -> dict[str, Any]:
    try:
        loaded = load_variant(request["variant"])
        if request["do"] == "describe":
            versions = {
                loaded.variant.module: loaded.version,
                "polygraphy": loaded.polygraphy_version,
            }
            sms = buildable_sms(loaded)
            return {"result": {"version": loaded.version, "sms": sms, "versions": versions}}
        ranges = [Range(**scope) for scope in request["ranges"]]
        model, output = Path(request["model"]), Path(request["output"])
        plugin = request["plugin"]
        if plugin is not None:
            plugin = PluginUse(**{**plugin, "path": Path(plugin["path"])})
        return {"result": compile_engine(loaded, model, request["sm"], ranges, output, plugin)}
    except FwlError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        if error.errno is None:
            raise
        return {"errno": error.errno, "filename": str(error.filename or request.get("output"))}
