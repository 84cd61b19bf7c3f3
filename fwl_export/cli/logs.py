"""Logging of the command line: what `-v`, `-q` and `--log-file` do.

The package logs to loggers below "fwl_export", named as its modules are, and prints nothing. Here
their records reach the terminal or a file.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fwl_export.printable import indented

ROOT = "fwl_export"
# What is already shown as progress, so that -v does not show it a second time.
PROGRESS = f"{ROOT}.progress"

# By number of -v. Warnings are always shown, errors are printed by `main`.
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


class _Terminal(logging.Handler):
    """Prints records on standard error, which progress bars replace while they are drawn."""

    def __init__(self) -> None:
        super().__init__(_LEVELS[0])
        self.quiet = False
        self.verbosity = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and not record.name.startswith(PROGRESS):
            text = indented(record.getMessage())
            print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)


class _LineFormatter(logging.Formatter):
    """Formats records so that no text in them looks like a record of its own."""

    def format(self, record: logging.LogRecord) -> str:
        return indented(super().format(record))


class _LogFile(logging.FileHandler):
    """Appends records to a file. If one cannot be written, the command ends with this error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        logging.getLogger(ROOT).removeHandler(self)
        self.close()
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from None
        super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # what did not fit was told already
            super().close()


_terminal = _Terminal()


def is_quiet() -> bool:
    """Return whether the user asked for no progress and no notes."""
    return _terminal.quiet


@contextmanager
def logging_for_one_command() -> Iterator[logging.Logger]:
    """Send the package's records to standard error until the block ends; yields its logger."""
    global _terminal  # noqa: PLW0603 - one command line per process, in tests several in turn
    logger = logging.getLogger(ROOT)
    before = list(logger.handlers), logger.level
    _terminal = _Terminal()
    logger.addHandler(_terminal)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _logged(logger, warnings.showwarning)
            yield logger
    finally:
        for handler in set(logger.handlers) - set(before[0]):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[1])
        _terminal = _Terminal()


def _logged(logger: logging.Logger, show: Callable[..., None]) -> Callable[..., None]:
    """Return a function that logs the package's own warnings, and shows others as Python does.

    Args:
      logger: Where to log them.
      show: Function that shows the others, `warnings.showwarning`.
    """

    def show_or_log(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category.__module__.startswith(ROOT):
            logger.warning(str(message))
        else:
            show(message, category, *place)

    return show_or_log


def configure(verbose: int, quiet: bool, log_file: Path | None) -> None:
    """Apply the options; those given before the verb and those after it add up.

    Args:
      verbose: How often -v was given: 1 shows what is read, chosen and written, 2 everything.
      quiet: Show neither progress nor notes nor warnings.
      log_file: File to which every record is appended, or None.

    Raises:
      OSError: The log file cannot be opened.
    """
    logger = logging.getLogger(ROOT)
    _terminal.verbosity += verbose
    _terminal.quiet = _terminal.quiet or quiet
    level = _LEVELS[min(_terminal.verbosity, len(_LEVELS) - 1)]
    _terminal.setLevel(logging.ERROR if _terminal.quiet and not _terminal.verbosity else level)
    if log_file is not None:
        handler = _LogFile(log_file, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(_LineFormatter(_FILE_FORMAT, "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    has_file = any(isinstance(handler, logging.FileHandler) for handler in logger.handlers)
    logger.setLevel(logging.DEBUG if has_file else _terminal.level)


def warn(message: str) -> None:
    """Show a warning, unless the user asked for quiet."""
    logging.getLogger(ROOT).warning(message)
