r"""Text from files, made safe to show: on a terminal, in a log, in Markdown, XML and HTML.

Names, tokens and messages of libraries come from files that others wrote. Escape sequences in them
move a terminal's cursor, change its title or hide what was printed before; line breaks forge lines
of a log; characters that change the direction of writing make a name look like another one. All of
these are shown as Python would write them, e.g. `\x1b`.
"""

from __future__ import annotations

import re

# Control characters but for tab and line feed; soft hyphen; marks and overrides of direction; zero
# width, except the two joiners that scripts need; line separators; surrogates without a partner;
# noncharacters, which XML forbids; invisible tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile("[\t\n]")

# Lines that runners of CI obey: GitHub's and Azure's, and TeamCity's.
_CI_LINE = re.compile(r"^(\s*)(?=::\w)", re.MULTILINE)
_CI_WORD = re.compile(r"##(?=\[|vso\[|teamcity\[)")

_MARKDOWN = re.compile(r"([\\`*_\[\]<>&|~])")


def printable(text: str) -> str:
    """Return text of several lines in which no character acts on what shows it.

    Args:
      text: Text from anywhere; line feeds and tabs stay.
    """
    return _HIDDEN.sub(_escape, text)


def one_line(text: str) -> str:
    """Return text in which no character acts on what shows it, on a single line.

    Args:
      text: Text from anywhere, such as a name.
    """
    return _BREAKS.sub(_escape, printable(text))


def indented(text: str) -> str:
    """Return text whose further lines are indented, so that none looks like a line of its own.

    Args:
      text: A message, such as that of a library's exception.
    """
    return printable(text).replace("\n", "\n  ")


def without_ci_commands(text: str) -> str:
    """Return text in which no line is an instruction to the CI system that shows it.

    Args:
      text: Output of a command.
    """
    return _CI_WORD.sub(r"#\\#", _CI_LINE.sub(r"\1\\", text))


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, also in a cell of a table.

    Args:
      text: Text from anywhere.
    """
    # A mention of a person or team needs the character right before the name.
    return _MARKDOWN.sub(r"\\\1", one_line(text)).replace("@", "@\u200d")


def markdown_code(text: str) -> str:
    """Return text as a span of code in Markdown, also in a cell of a table.

    Args:
      text: Text from anywhere.
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{one_line(text)}{space}{fence}".replace("|", r"\|")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
