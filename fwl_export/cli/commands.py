"""Commands and their help pages: options in groups, summaries in full, examples as typed.

Typer's own pages need `rich`, which takes longer to load than `--help` may take; click's cut the
summaries and break the examples.
"""

from __future__ import annotations

import functools
import inspect
import logging
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fwl_export.cli import logs
from fwl_export.cli.options import GENERAL, OUTPUT, LogFileOption, QuietOption, VerboseOption
from fwl_export.deprecations import REMOVED_IN

Verb = Callable[..., None]

EXIT_CODES = (
    ("0", "Done. From check and bisect: everything is within its budget."),
    ("1", "The input cannot be used, or a check failed."),
    ("2", "The command line is wrong, or a check could not run."),
    ("130, 141, 143", "Interrupted (Ctrl-C), its output closed, or terminated."),
)

# Parameters whose option had another name until 0.2.
_OLD_NAMES = {"runtime": "backend", "variant": "flavour"}

# What every verb takes: parameters, their options, and their defaults.
_COMMON: dict[str, tuple[Any, Any]] = {
    "verbose": (VerboseOption, 0),
    "quiet": (QuietOption, False),
    "log_file": (LogFileOption, None),
}

# Placeholders for the values of options in help pages, by the names that releases of Typer use.
_VALUES = (
    (r"<int( range)?>|INTEGER( RANGE)?", "N"),
    (r"<float( range)?>|FLOAT( RANGE)?", "X"),
    (r"<path>", "PATH"),
    (r"<str>", "TEXT"),
)


def new_application(**settings: Any) -> typer.Typer:
    """Return a Typer application whose help pages are those of this module."""
    return typer.Typer(
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def add_verb(
    application: typer.Typer, verb: Verb, name: str = "", section: str = "", help_text: str = ""
) -> None:
    """Add a verb under its function's name, with the options that every verb has.

    Args:
      application: Application to add it to.
      verb: Function that the verb runs; its docstring becomes the help page.
      name: Name to type, if it is not the function's.
      section: Heading of the verb in the application's help.
      help_text: The help page, if it is not the docstring.
    """
    name = name or verb.__name__.replace("_", "-")
    register = application.command(
        name=name, cls=Command, rich_help_panel=section or None, help=help_text or None
    )
    register(_with_common_options(verb))


def _with_common_options(verb: Verb) -> Verb:
    """Return the verb with the options of logging, and its options' old names, hidden."""
    signature = inspect.signature(verb, eval_str=True)
    old = {name: _OLD_NAMES[name] for name in signature.parameters if name in _OLD_NAMES}

    @functools.wraps(verb)
    def run(**arguments: Any) -> None:
        start_logging(*(arguments.pop(name) for name in _COMMON))
        _log_command()
        for name, before in old.items():
            if (value := arguments.pop(before)) is not None:
                logs.warn(f"--{before} is now --{name}; the old name goes away in {REMOVED_IN}")
                arguments[name] = value
        verb(**arguments)

    added = [_parameter(name, *what) for name, what in _COMMON.items()]
    added += [
        _parameter(before, Annotated[str | None, typer.Option(f"--{before}", hidden=True)], None)
        for before in old.values()
    ]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def start_logging(verbose: int, quiet: bool, log_file: Any) -> None:
    """Apply the options of logging, as they were given before or after the verb.

    Raises:
      typer.BadParameter: The log file cannot be written.
    """
    try:
        logs.configure(verbose, quiet, log_file)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot write --log-file '{log_file}': {error.strerror}"
        ) from None


class _HelpPage:
    """The parts of a help page that commands and groups share."""

    help: str | None

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        # Typer puts required arguments in braces; the usual notation has none.
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        pieces = [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in pieces]
        return [piece if piece == "[OPTIONS]" else piece.upper() for piece in pieces]

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the first paragraph of the help, whole."""
        return " ".join(inspect.cleandoc(self.help or "").partition("\n\n")[0].split())

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring: paragraphs are wrapped, indented blocks are kept as they are."""
        with formatter.indentation():
            for lines in _blocks(inspect.cleandoc(self.help or "")):
                formatter.write_paragraph()
                if any(line.startswith(" ") for line in lines):
                    indent = " " * formatter.current_indent
                    formatter.write("".join(f"{indent}{line}".rstrip() + "\n" for line in lines))
                else:
                    formatter.write_text(" ".join(lines))

    def format_parameters(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, grouped by their panels."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(_section(parameter), []).append(_readable(parameter, *record))
        last = [name for name in (OUTPUT, GENERAL) if name in sections]
        for name in [*(name for name in sections if name not in last), *last]:
            if sections[name]:
                with formatter.section(name):
                    formatter.write_dl(sections[name])


class Command(_HelpPage, TyperCommand):
    """A verb."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        self.format_parameters(ctx, formatter)


class Group(_HelpPage, TyperGroup):
    """The application, or a verb that has verbs of its own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs by their sections, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panel = getattr(command, "rich_help_panel", None)
            panel = panel if isinstance(panel, str) else "Commands"
            sections.setdefault(panel, []).append((name, command.get_short_help_str()))
        width = max(len(name) for rows in sections.values() for name, _ in rows)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])
        self.format_parameters(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the exit codes, below the help of the whole application."""
        if ctx.parent is None:
            with formatter.section("Exit codes"):
                formatter.write_dl(list(EXIT_CODES))


def _section(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    general = parameter.name in ("help", "install_completion", "show_completion")
    panel = getattr(parameter, "rich_help_panel", None)
    return GENERAL if general else panel if isinstance(panel, str) else "Options"


def _readable(parameter: Any, name: str, text: str) -> tuple[str, str]:
    """Return an entry of a help page without the jargon of type systems."""
    if parameter.param_type_name == "argument":
        name = re.sub(r"[\[\]{}]", "", name.partition(" ")[0]).upper()
    for pattern, word in _VALUES:
        name = re.sub(pattern, word, name)
    text = text.replace(r"\[", "[")  # some releases of Typer escape it for rich
    text = re.sub(r"x>=(\S+?)(?=[;\]])", r"at least \1", text)
    text = re.sub(r"default: \((.*?)\)(?=[;\]])", r"default: \1", text)
    return name, text


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield the paragraphs of a text as lists of lines."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            yield paragraph.splitlines()


def _log_command() -> None:
    from fwl_export import __version__

    log = logging.getLogger(logs.ROOT)
    log.debug("%s", shlex.join(["fwl-export", *sys.argv[1:]]))
    where = (__version__, platform.python_version(), Path.cwd())
    log.debug("fwl-export %s, Python %s, in folder '%s'", *where)
