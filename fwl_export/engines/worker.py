"""Build engines in a process of their own, the worker.

A builder cannot be interrupted from Python, may abort its process on a broken plugin, prints
where it likes, and cannot share a process with the other TensorRT variant. So the caller starts a
worker, waits for it second by second, and kills it when interrupted.

The caller passes a request as JSON on the command line: {"do": "describe", "variant": NAME} or
{"do": "build", ...} with the fields of a `BuildRequest`. The worker answers with JSON on standard
output: {"result": ...}, or one of the errors of `_describe_error`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fwl_export import errors
from fwl_export.engines.compile import compile_engine
from fwl_export.engines.metadata import NetworkMetadata
from fwl_export.engines.request import BuildRequest
from fwl_export.engines.variant import (
    VARIANTS,
    LoadedVariant,
    buildable_sms,
    check_installed,
    find_variant,
    load_variant,
    plugin_environment,
)
from fwl_export.errors import EngineError, FwlError

# Not `python -m`: that would put the working directory first in the path, and import a user's
# inspect.py instead of Python's.
_CHILD = "import sys; sys.path[:] = {path!r}; from fwl_export.engines.worker import main; main()"


@dataclass(frozen=True)
class Probe:
    """What a variant can do on this machine.

    Attributes:
      version: Version of the variant, or "" if it is not available.
      sms: Compute capabilities that it can build for on this machine.
      versions: Versions of the tools that take part in a build, by package.
      reason: Why the variant is not available, or "".
    """

    version: str
    sms: Sequence[int]
    versions: dict[str, str]
    reason: str

    @property
    def available(self) -> bool:
        """Whether the variant can be loaded."""
        return not self.reason


def probe_variant(name: str) -> Probe:
    """Load a variant in a worker and ask what it can do; never raises."""
    try:
        return describe_variant(name)
    except FwlError as error:
        return Probe("", (), {}, str(error))


def describe_variant(name: str) -> Probe:
    """Load a variant in a worker and ask what it can do.

    Raises:
      EngineError: The name is unknown.
      MissingDependencyError: The variant is not installed, or its libraries cannot be loaded.
    """
    check_installed(find_variant(name))
    return Probe(**_ask({"do": "describe", "variant": name}), reason="")


def build_in_worker(request: BuildRequest, tick: Callable[[float], None]) -> NetworkMetadata:
    """Build an engine in a worker, see `compile_engine`.

    Args:
      request: The engine to build.
      tick: Called every second with the seconds that have passed.

    Raises:
      FwlError: What `compile_engine` raises; or EngineError, if the worker died.
      OSError: The output cannot be written.
    """
    message = {"do": "build", **request.to_dict()}
    if request.plugin is None:
        return NetworkMetadata.from_dict(_ask(message, tick))
    with plugin_environment(find_variant(request.variant)) as environment:
        return NetworkMetadata.from_dict(_ask(message, tick, environment))


def _ask(
    request: dict[str, Any],
    tick: Callable[[float], None] = lambda seconds: None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a worker on a request and return the result of its answer.

    Args:
      request: What to do, see above.
      tick: Called every second with the seconds that have passed.
      environment: Environment variables of the worker; None means those of this process.

    Raises:
      FwlError: What the worker raised; or EngineError, if it died.
      OSError: The worker could not write its output.
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
    return _result_of(json.loads(answer))


def _result_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the result in a worker's answer, or raise the error in it."""
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
    """Answer the request on the command line; the whole life of a worker process."""
    # Ctrl-C reaches every process of a terminal; the caller decides and kills this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The libraries print on standard output. Keep it for the answer, and send what they print to
    # standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        json.dump(_handle(json.loads(sys.argv[1])), answer)


def _handle(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    try:
        loaded = load_variant(request["variant"])
        if request["do"] == "describe":
            return {"result": _describe(loaded)}
        return {"result": compile_engine(loaded, BuildRequest.from_dict(request)).to_dict()}
    except (FwlError, OSError) as error:
        return _describe_error(error, request.get("output"))


def _describe(loaded: LoadedVariant) -> dict[str, Any]:
    """Return the fields of a `Probe`."""
    versions = {
        loaded.variant.module: loaded.version,
        "polygraphy": loaded.polygraphy_version,
    }
    return {"version": loaded.version, "sms": buildable_sms(loaded), "versions": versions}


def _describe_error(error: FwlError | OSError, output: str | None) -> dict[str, Any]:
    """Return the answer for an error; see `_result_of`, which raises it again.

    Args:
      error: What was raised. An OSError without a number is a bug and is raised again.
      output: The file that an OSError without a file name is about.
    """
    if isinstance(error, FwlError):
        return {"error": type(error).__name__, "message": str(error)}
    if error.errno is None:
        raise error
    return {"errno": error.errno, "filename": str(error.filename or output)}
