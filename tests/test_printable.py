"""Text from files is shown, never obeyed: by terminals, logs, Markdown, XML and CI systems."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from fwl_export.printable import (
    indented,
    markdown,
    markdown_code,
    one_line,
    printable,
    without_ci_commands,
)

CHARACTERS = [chr(number) for number in range(sys.maxunicode + 1)]
_JOINERS = ("\u200c", "\u200d")
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def test_no_character_that_acts_is_left() -> None:
    left = [c for c in CHARACTERS if printable(c) == c]
    kinds = {unicodedata.category(c) for c in left if c not in ("\n", "\t", *_JOINERS)}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    assert not [c for c in left if unicodedata.bidirectional(c) in _DIRECTIONS]
    assert not [c for c in left if "ZERO WIDTH" in unicodedata.name(c, "") and c not in _JOINERS]


def test_letters_of_every_script_stay() -> None:
    for text in ("déjà vu → x²", "日本語", "नमस्ते", "نمی\u200cخواهم", "👩\u200d🚀", "a\tb\nc"):
        assert printable(text) == text
    letters = [c for c in CHARACTERS if unicodedata.category(c)[0] in "LMNPS"]
    assert "".join(letters) == printable("".join(letters))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("safe\rerror", r"safe\rerror"),
        ("abc\b\b\b", r"abc\x08\x08\x08"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_they_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_name_is_one_line_and_a_message_begins_one() -> None:
    assert one_line("name\nerror: forged\t!") == r"name\nerror: forged\t!"
    assert indented("a\nerror: forged\r\nb") == "a\n  error: forged\\r\n  b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("::add-mask::a", r"\::add-mask::a"),
        ("a\n  ::stop-commands::x", "a\n  \\::stop-commands::x"),
        ("##[set-output name=a]b", r"#\#[set-output name=a]b"),
        ("x ##vso[task.setvariable]", r"x #\#vso[task.setvariable]"),
        ("fwl::LinearAttentionUpdate", "fwl::LinearAttentionUpdate"),
        ("## Heading", "## Heading"),
    ],
)
def test_ci_systems_obey_no_line(text: str, shown: str) -> None:
    assert without_ci_commands(text) == shown


def test_markdown_shows_text_as_it_is() -> None:
    name = "a|b\n| forged | `code` <img src=x> [link](x) @team"
    assert markdown("fast.up_kernel") == r"fast.up\_kernel"
    text = markdown(name)
    assert "\n" not in text
    assert r"a\|b" in text
    assert r"\<img src=x\>" in text
    assert "@team" not in text
    assert markdown_code("fast.up_kernel") == "`fast.up_kernel`"
    assert markdown_code("a`b``c|d\ne") == r"``` a`b``c\|d\ne ```"


def test_escapes_are_ascii() -> None:
    hidden = "".join(c for c in CHARACTERS if printable(c) != c)
    assert printable(hidden).isascii()
    assert json.loads(json.dumps(printable(hidden))) == printable(hidden)
