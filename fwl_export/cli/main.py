"""Entry point of `fwl-export`: its verbs, and what happens to errors.

`commands.EXIT_CODES` lists the exit codes. A user's mistake ends with one sentence on standard
error; a bug shows its traceback.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import time
from typing import Annotated

import typer

from fwl_export.cli.bench import bench
from fwl_export.cli.bisect import bisect
from fwl_export.cli.build import build
from fwl_export.cli.chat import chat
from fwl_export.cli.check import check
from fwl_export.cli.commands import Verb, add_verb, new_application, start_logging
from fwl_export.cli.compare_adaptation import compare_adaptation
from fwl_export.cli.demo import demo
from fwl_export.cli.doctor import doctor
from fwl_export.cli.export import export
from fwl_export.cli.generate import generate
from fwl_export.cli.import_block import import_block_group
from fwl_export.cli.inspect import inspect
from fwl_export.cli.logs import logging_for_one_command
from fwl_export.cli.options import GENERAL, LogFileOption, QuietOption, VerboseOption
from fwl_export.cli.precision import precision
from fwl_export.cli.read import read
from fwl_export.cli.score import score
from fwl_export.cli.terminal import flush_output, print_exception, safe_streams
from fwl_export.cli.train import train
from fwl_export.errors import FwlError, missing_account, missing_export_package
from fwl_export.printable import indented

# Headings of `fwl-export --help`, and the verbs under each.
SECTIONS: dict[str, tuple[Verb | typer.Typer, ...]] = {
    "Start here": (demo, doctor),
    "Make a bundle": (train, import_block_group, export, build),
    "Check it": (check, bisect, precision),
    "Use it": (score, read, generate, chat, inspect),
    "Measure it": (bench, compare_adaptation),
}
VERBS: tuple[Verb, ...] = tuple(
    verb for verbs in SECTIONS.values() for verb in verbs if not isinstance(verb, typer.Typer)
)


def app() -> typer.Typer:
    """Return the command-line application."""
    application = new_application(
        name="fwl-export",
        help="Take Fast Weight Layer language models, which learn while they read, from PyTorch "
        "to ONNX and TensorRT, run them, and prove that they compute what PyTorch computes.\n\n"
        "`fwl-export VERB --help` describes a verb.",
    )
    application.callback()(_options)
    for section, verbs in SECTIONS.items():
        for verb in verbs:
            if isinstance(verb, typer.Typer):
                application.add_typer(verb, rich_help_panel=section)
            else:
                add_verb(application, verb, section=section)
    return application


def main() -> None:
    """Run the command line; a user's mistake ends with its message and an exit code."""
    # Like Ctrl-C, so that half-written files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with safe_streams(), logging_for_one_command() as logger:
        try:
            try:
                _run(logger)
            finally:
                flush_output()
        except FwlError as error:
            _fail(logger, str(error), error.exit_code)
        except ModuleNotFoundError as error:
            missing = missing_export_package("this command", error)
            if missing is None:
                raise
            _fail(logger, str(missing))
        except (RuntimeError, KeyError) as error:
            homeless = missing_account(error)
            if homeless is None:
                raise
            _fail(logger, str(homeless))
        except OSError as error:
            if homeless := missing_account(error):
                _fail(logger, str(homeless))
            if error.filename is None and error.errno is None:
                raise
            # What is written to files names them, see `files.named_errors`.
            where = "standard output"
            if error.filename not in (None, where):
                where = f"'{error.filename}'"
            full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            named = f"{error.strerror or error}: {where}"
            _fail(logger, named if error.filename or full else f"{error}")


def _run(logger: logging.Logger) -> None:
    """Run the command line; the log gets how it ended, whatever happens."""
    began = time.perf_counter()
    code: object = 0
    try:
        app()(prog_name="fwl-export")
    except SystemExit as end:
        code = end.code
        raise
    except FwlError as error:
        code = error.exit_code
        raise
    except Exception:
        code = 1
        sys.excepthook = print_exception  # only now: Typer sets its own
        logger.debug("the command failed", exc_info=True)
        raise
    finally:
        logger.debug("exit code %s after %.1f s", code or 0, time.perf_counter() - began)


def _fail(logger: logging.Logger, message: str, code: int = 1) -> None:
    logger.error(message)
    print(f"error: {indented(message)}", file=sys.stderr)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fwl_export import __version__

        print(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
            rich_help_panel=GENERAL,
        ),
    ] = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
    log_file: LogFileOption = None,
) -> None:
    start_logging(verbose, quiet, log_file)
