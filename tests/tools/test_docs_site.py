from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

import fwl_export
from fwl_export import errors
from fwl_export.cli.main import VERBS
from tools import docs_site


def test_the_reference_of_the_command_line_has_every_verb_and_option() -> None:
    page = docs_site.cli_page()
    for verb in VERBS:
        assert f"### fwl-export {verb.__name__.replace('_', '-')}\n" in page
    for option in ("--candidates", "--loss-normalizer", "--sizes"):
        assert f"| `{option} " in page
    assert "### fwl-export import jax\n" in page


def test_help_that_must_not_be_wrapped_is_code_and_examples_follow_the_options() -> None:
    def verb(name: str = typer.Argument(help="A name, <any>|none.")) -> None:
        r"""Do it.

        \b
        first
          second

        Example: app
          verb x
        """

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name="verb")(verb)
    app.command(name="other")(lambda: None)
    lines = list(docs_site._command("app", typer.main.get_command(app), 2, []))
    text = "\n".join(lines)
    assert "```text\nfirst\n  second\n```" in text
    assert text.index("A name, &lt;any>\\|none.") < text.index("```bash\napp verb x\n```")
    assert "\b" not in text


@pytest.mark.parametrize(
    ("text", "prose", "examples"),
    [
        ("Do it.\n\nExample: a b\n  c", ["Do it.", ""], ["a b c"]),
        ("Do it.\n\nExamples:\n  a b\n  a c", ["Do it.", ""], ["a b", "a c"]),
        ("A:\n\n  b\n    c\n\nD", ["A:", "", "```text", "b\n  c", "```", "", "D", ""], []),
    ],
)
def test_parts_of_a_help_text(text: str, prose: list[str], examples: list[str]) -> None:
    assert docs_site.help_parts(text) == (prose, examples)


def test_options_that_are_documented_above_are_not_repeated() -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.callback()
    def common(quiet: bool = typer.Option(False, "--quiet", help="Say less.")) -> None:
        pass

    @app.command()
    def verb(
        quiet: bool = typer.Option(False, "--quiet", help="Say less."),
        other: bool = typer.Option(False, "--other", help="Say more."),
    ) -> None:
        pass

    page = "\n".join(docs_site._command("app", typer.main.get_command(app), 2, []))
    assert page.count("`--quiet`") == 1
    assert page.count("`--other`") == 1


def test_the_reference_of_python_has_every_public_name() -> None:
    page = docs_site.python_page()
    for name in fwl_export.__all__:
        assert re.search(rf"(?:^::: fwl_export\.[\w.]*\b|^### `|^\| `){name}\b", page, re.MULTILINE)
    for name in vars(errors):
        if name.endswith("Error"):
            assert f"| `{name}`" in page


HEADER = """/* About.
 *
 *   code();
 */
#ifndef FWL_H
#define FWL_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
/* A number. */
#define FWL_ABI_VERSION 1

typedef enum fwl_kind {
  FWL_A = 0 /* first */
} fwl_kind;

/** Opens.
 *
 *   code();
 *
 * @param name   Name of it,
 *               which goes on.
 * @return The kind.
 */
FWL_API fwl_kind fwl_open(const char* name,
                                  int flags);
FWL_API void fwl_close(void);

FWL_API void fwl_other(void);
#endif
"""


def test_a_comment_belongs_to_what_follows_it_without_a_gap() -> None:
    page = docs_site.c_page(HEADER)
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == [
        "`FWL_ABI_VERSION`",
        "`fwl_kind`",
        "`fwl_open`, `fwl_close`",
        "`fwl_other`",
    ]
    assert "Opens.\n" in page
    assert "```text\ncode();\n```" in page
    assert "- `name` Name of it, which goes on.\n- **Returns** The kind.\n" in page
    assert "fwl_kind fwl_open(const char* name,\n        int flags);" in page
    assert "FWL_API" not in page


def test_the_reference_of_c_has_every_function_of_the_header() -> None:
    header = (docs_site.HEADERS / "fwl.h").read_text(encoding="utf-8")
    functions = re.findall(r"^FWL_API [^;(]*?(fwl_\w+)\(", header, re.MULTILINE)
    assert len(functions) > 10
    titles = re.findall(r"^## (.*)", docs_site.c_page(header), re.MULTILINE)
    for function in functions:
        assert sum(f"`{function}`" in title for title in titles) == 1, function


def test_the_reference_of_cpp_has_the_public_declarations_without_bodies() -> None:
    page = docs_site.cpp_page((docs_site.HEADERS / "fwl.hpp").read_text(encoding="utf-8"))
    for name in ("Error", "Options", "Session", "Model"):
        assert f"## `fwl::{name}`" in page
    assert "std::vector<int64_t> positions() const;" in page
    assert "explicit Error(const fwl_error& error);" in page
    code = re.sub(r"/\*.*?\*/", "", page.partition("```cpp")[2], flags=re.DOTALL)
    assert "return" not in re.sub(r"//.*", "", code)
    assert "handle_" not in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](CONTRIBUTING.md#b)", "[a](contributing.md#b)"),
        ("[a](docs/tutorial.md)", "[a](tutorial.md)"),
        ("[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("[a](docs/train.toml)", "[a](train.toml)"),
        ("[a `b`](fwl_export/op/spec.py)", "a `b`"),
        ("![a](docs/parity-light.png)", "![a](parity-light.png)"),
        ("![a](x/y.png)", "![a](assets/y.png)"),
    ],
)
def test_links_of_a_copied_page_lead_to_pages(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(docs_site, "REPOSITORY", tmp_path)
    (tmp_path / "A.md").write_text(text)
    page, pictures = docs_site.copied_page("A.md", "a.md")
    assert page == expected
    assert pictures == ({"x/y.png"} if "x/y" in text else set())


def test_links_of_a_copied_page_are_relative_to_its_place() -> None:
    page, pictures = docs_site.copied_page("fwl_export/parity/README.md", "reference/parity.md")
    assert "../parity-drift-10000.png" in page
    assert pictures == set()
