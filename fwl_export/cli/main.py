"""Entry point of `fwl-export`: verbs, and how errors end.

Exit codes: 0 done; 1 the user's input cannot be used, or a check failed; 2 the command line
itself is wrong, or a check could not run; 130 interrupted; 143 terminated. A bug shows its
traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import typer

from fwl_export.cli.bench import bench
from fwl_export.cli.bisect import bisect
from fwl_export.cli.build import build
from fwl_export.cli.check import check
from fwl_export.cli.compare_adaptation import compare_adaptation
from fwl_export.cli.demo import demo
from fwl_export.cli.doctor import doctor
from fwl_export.cli.export import export
from fwl_export.cli.generate import generate
from fwl_export.cli.import_block import import_block_group
from fwl_export.cli.inspect import inspect
from fwl_export.cli.precision import precision
from fwl_export.cli.read import read
from fwl_export.cli.score import score
from fwl_export.cli.train import train
from fwl_export.errors import FwlError

VERBS: tuple[Callable[..., None], ...] = (
    export,
    build,
    check,
    bisect,
    precision,
    score,
    compare_adaptation,
    read,
    generate,
    inspect,
    train,
    doctor,
    demo,
)

_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript")


def app() -> typer.Typer:
    """Return the command-line application."""
    application = typer.Typer(
        name="fwl-export",
        help="Take Fast Weight Layer models, which learn while they read, to production: "
        "ONNX, TensorRT engines, sessions, and proof that they compute what PyTorch does.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback(invoke_without_command=True)(_options)
    for verb in VERBS:
        application.command(name=verb.__name__.replace("_", "-"))(verb)
    application.add_typer(bench)
    application.add_typer(import_block_group)
    return application


def main() -> None:
    """Run the command line; a user's mistake ends with its message and exit code 1."""
    # Like Ctrl-C, so that what is half-written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()()
    except FwlError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXPORT_PACKAGES:
            raise
        _fail(f"this needs '{name}', which is not installed; pip install 'fwl-export[export]'")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.strerror or error}: '{error.filename}'" if error.filename else f"{error}")


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from fwl_export import __version__

        print(__version__)
        raise typer.Exit
