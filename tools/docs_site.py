"""Documentation pages that are generated from the code: a hook of MkDocs, see mkdocs.yml.

`on_files` adds the command-line reference (from the Typer app), the Python reference (from
`fwl_export.__all__`), the C and C++ references (from libfwl's headers), and Markdown files that
live next to the code, such as CHANGELOG.md. They are generated again on every build.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
HEADERS = REPOSITORY / "plugins" / "libfwl" / "include" / "fwl"

# Markdown files beside the code that are pages of the site, by their place in it.
COPIED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "attacks/README.md": "reference/attacks.md",
    "fwl_export/demo/checkpoint/README.md": "demo-model.md",
    "fwl_export/model/README.md": "concepts/maths.md",
    "fwl_export/parity/FAULTS.md": "reference/faults.md",
    "fwl_export/parity/README.md": "reference/parity.md",
    "plugins/kernels/gpu/README.md": "reference/gpu-kernels.md",
    "plugins/libfwl/README.md": "reference/libfwl.md",
}

# Sections of the Python reference. A public name that none of them lists comes last.
PUBLIC = {
    "Run a bundle": ("open_session", "Session", "Slots", "Sampler"),
    "Text in, text out": ("open_text_session", "TextSession", "TextStream", "Generation"),
    "Models and checkpoints": (
        "FWLModel",
        "ModelConfig",
        "BackboneConfig",
        "FastWeightsConfig",
        "load_checkpoint",
        "save_checkpoint",
        "Checkpoint",
    ),
    "Bundles and engines": (
        "export_bundle",
        "PrecisionPolicy",
        "read_bundle",
        "Bundle",
        "build_engines",
    ),
    "Checks": ("check_bundle", "Report", "bisect_bundle"),
}

_COMMENT = r"(?:/\*(?:(?!\*/)[\s\S])*\*/\n|(?://[^\n]*\n)+)"  # of C++, before a declaration
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the pictures that copied pages show."""
    from mkdocs.structure.files import File

    pages = {
        "reference/cli.md": cli_page(),
        "reference/python.md": python_page(),
        "reference/c.md": c_page((HEADERS / "fwl.h").read_text(encoding="utf-8")),
        "reference/cpp.md": cpp_page((HEADERS / "fwl.hpp").read_text(encoding="utf-8")),
    }
    pictures: set[str] = set()
    for source, page in COPIED.items():
        text, shown = copied_page(source, page)
        pages[page] = text
        pictures |= shown
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted(pictures):
        files.append(
            File.generated(
                config, picture_place(picture), content=(REPOSITORY / picture).read_bytes()
            )
        )
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let pages below docs/ link to files of the repository, as they do where they are stored."""
    source = f"docs/{page.file.src_uri}"
    if not (REPOSITORY / source).is_file():
        return markdown
    return with_links_of_the_site(markdown, source, page.file.src_uri)[0]


def copied_page(source: str, page: str) -> tuple[str, set[str]]:
    """Return a Markdown file of the repository as a page, and the pictures to copy for it.

    Args:
      source: Path of the file inside the repository.
      page: Path of the page inside the site.
    """
    text = (REPOSITORY / source).read_text(encoding="utf-8")
    return with_links_of_the_site(text, source, page)


def with_links_of_the_site(text: str, source: str, page: str) -> tuple[str, set[str]]:
    """Return Markdown whose links lead to places of the site, and the pictures it shows.

    Links to files that are pages lead to these pages; links to files that the site does not have
    become plain text.

    Args:
      text: Markdown with links that are right in the repository.
      source: Path of its file inside the repository.
      page: Path of its page inside the site.
    """
    pictures: set[str] = set()

    def relative(target: str) -> str:
        return os.path.relpath(target, PurePosixPath(page).parent)

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        if path in COPIED:
            return f"{mark}[{text}]({relative(COPIED[path])}{anchor or ''})"
        if path.startswith("docs/"):
            return f"{mark}[{text}]({relative(path.removeprefix('docs/'))}{anchor or ''})"
        if mark:
            pictures.add(path)
            return f"![{text}]({relative(picture_place(path))})"
        return text

    return _LINK.sub(link, text), pictures


def picture_place(picture: str) -> str:
    """Return where a picture of the repository lies in the site."""
    return f"assets/{PurePosixPath(picture).name}"


def cli_page() -> str:
    """Return the reference of the command line: every verb, argument and option."""
    import typer

    main = importlib.import_module("fwl_export.cli.main")
    root = typer.main.get_command(main.app())
    lines = [
        "# Command line",
        "",
        "Generated from the program itself; `fwl-export VERB --help` prints the same.",
        "`python -m fwl_export` is the same program. Options of `fwl-export` that a verb takes too",
        "are listed once, at the top.",
        "",
        *_command("fwl-export", root, 2, []),
    ]
    return "\n".join(lines) + "\n"


def _command(path: str, command: click.Command, level: int, known: list[str]) -> Iterator[str]:
    """Yield the section of a command and those of the commands below it.

    Args:
      path: What to type, such as "fwl-export bench op".
      command: The command of Typer or click.
      level: Level of its heading.
      known: Rows of options that are documented above.
    """
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    prose, examples = help_parts(command.help or "")
    yield from (f"{'#' * level} {path}", "", "```text", f"{path} {usage}", "```", "", *prose)
    rows = [_parameter(p, context) for p in command.params if not getattr(p, "hidden", False)]
    rows = [row for row in rows if row not in known]
    if rows:
        yield from ("| argument or option | what it is |", "|---|---|", *rows, "")
    if examples:
        yield from ("```bash", *examples, "```", "")
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _command(f"{path} {name}", child, min(level + 1, 3), [*known, *rows])


def help_parts(text: str) -> tuple[list[str], list[str]]:
    r"""Return a command's help as Markdown, and the commands of its examples.

    What is indented, or follows a line with a `\b` alone, becomes a block.
    """
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        first, *rest = lines = paragraph.split("\n")
        if first.startswith("Example"):
            command = first.partition(":")[2].strip()
            stripped = [line.strip() for line in rest]
            examples += [" ".join([command, *stripped])] if command else stripped
        elif first.strip() in ("\b", "\\b"):
            prose += ["```text", *rest, "```", ""]
        elif all(line.startswith("  ") for line in lines):
            prose += ["```text", textwrap.dedent(paragraph), "```", ""]
        else:
            prose += [*lines, ""]
    return prose, examples


def _parameter(parameter: click.Parameter, context: click.Context) -> str:
    """Return a parameter's row of the table: how it is written, and what `--help` says."""
    names, words = parameter.get_help_record(context) or (parameter.name, "")
    return f"| `{_cell(str(names)).replace('&lt;', '<')}` | {_cell(words)} |"


def _cell(text: str) -> str:
    """Return text as a table's cell; angle brackets would be read as HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def python_page() -> str:
    """Return the reference of the Python package: directives that mkdocstrings fills."""
    package = importlib.import_module("fwl_export")
    errors = importlib.import_module("fwl_export.errors")
    public = [name for name in package.__all__ if not hasattr(errors, name)]
    listed = {name for names in PUBLIC.values() for name in names}
    sections = {**PUBLIC, "Others": tuple(name for name in public if name not in listed)}
    lines = ["# Python API", "", "Import these names from `fwl_export`.", ""]
    for title, names in sections.items():
        found = [name for name in names if name in public]
        lines += [f"## {title}", ""] if found else []
        for name in found:
            value = getattr(package, name)
            where = getattr(value, "__module__", "")
            if where.startswith("fwl_export"):
                lines += [f"::: {where}.{value.__qualname__}", ""]
            elif not inspect.ismodule(value):
                lines += [f"### `{name}`", "", f"`{value!r}`", ""]
    lines += [
        "## Errors",
        "",
        "Every error that a user can cause is a `FwlError`. Its message says which thing is wrong, "
        "what was received, what was expected, and what to do next.",
        "",
        "| error | raised when | exit code of `fwl-export` |",
        "|---|---|---|",
        *(_error_row(error) for error in _errors(errors)),
    ]
    return "\n".join(lines) + "\n"


def _errors(module: Any) -> list[type]:
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    return [error for error in classes if error.__module__ == module.__name__]


def _error_row(error: type) -> str:
    summary = inspect.cleandoc(error.__doc__ or "").partition("\n\n")[0]
    base = error.__bases__[0].__name__
    name = f"`{error.__name__}`" + (
        f" (a `{base}`)" if base not in ("Exception", "FwlError") else ""
    )
    return f"| {name} | {_cell(summary)} | {getattr(error, 'exit_code', 1)} |"


def c_page(header: str) -> str:
    """Return the reference of the C interface, from its header.

    A comment that ends right above a declaration is that declaration's text.
    """
    lines = ["# C API", "", "Generated from `fwl/fwl.h`.", ""]
    overview, rest = re.fullmatch(r"/\*(.*?)\*/(.*)", header.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
    lines += [*_prose(overview), ""]
    for comment, code in _declarations(rest):
        bare = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
        names = re.findall(r"\b(?:FWL_ABI_VERSION|fwl_\w+)(?=\s*\(|;|\s+\d)", bare)
        if not names:
            continue
        title = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
        shown = re.sub(r"\n {8,}", "\n        ", code.strip().replace("FWL_API ", ""))
        lines += [f"## {title}", "", *_prose(comment), "", "```c", shown, "```", ""]
    return "\n".join(lines) + "\n"


def _declarations(text: str) -> Iterator[tuple[str, str]]:
    """Yield comment and code of each declaration of a C header, without conditions."""
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif\n", "", text, flags=re.DOTALL)
    text = re.sub(
        r"^#(?:if|elif|else|endif|ifndef|include|define FWL_(?:API|FWL_H))[^\n]*\n",
        "",
        text,
        flags=re.MULTILINE,
    )
    pattern = re.compile(
        r"(?:/\*(?P<comment>(?:(?!\*/).)*)\*/\s*)?"
        r"(?P<code>#define [^\n]*|typedef (?:enum|struct) \w+ \{.*?\} \w+;"
        r"|(?:FWL_API|typedef)[^;{]*;)",
        re.DOTALL,
    )
    comment, code, end = "", "", 0
    for match in pattern.finditer(text):
        if (
            not match["comment"] and text[end : match.start()] == "\n"
        ):  # the comment above belongs to both
            code += f"\n{match['code']}"
        else:
            yield comment, code
            comment, code = match["comment"] or "", match["code"]
        end = match.end()
    yield comment, code


def _prose(comment: str) -> list[str]:
    """Return a comment as Markdown: what is indented is code, `@param` and `@return` are a list."""
    lines = [
        re.sub(r"^\s*(?:/?\*+|//) ?", "", line).rstrip() for line in comment.strip().split("\n")
    ]
    text = "\n".join(line for line in lines if line != "@file")
    text, *tags = re.split(r"^@(?=param |return )", text, flags=re.MULTILINE)
    result: list[str] = []
    for paragraph in text.strip("\n").split("\n\n"):
        indented = all(line.startswith("  ") for line in paragraph.split("\n"))
        code = ["```text", textwrap.dedent(paragraph), "```"]
        result += [*(code if indented else [paragraph]), ""]
    for tag in tags:
        kind, _, rest = tag.partition(" ")
        name, _, words = rest.partition(" ") if kind == "param" else ("", "", rest)
        result.append(f"- {f'`{name}`' if name else '**Returns**'} {' '.join(words.split())}")
    return result


def cpp_page(header: str) -> str:
    """Return the reference of the C++ interface: its public declarations, without their bodies."""
    overview = re.match(rf"{_COMMENT}", header)
    lines = ["# C++ API", "", "Generated from `fwl/fwl.hpp`.", ""]
    lines += [*(_prose(overview[0].removesuffix("*/\n")) if overview else []), ""]
    body = re.sub(r"namespace detail \{.*?\n\} // namespace detail", "", header, flags=re.DOTALL)
    pattern = re.compile(
        rf"(?P<comment>{_COMMENT})?"
        r"(?P<head>(?:class|struct) (?P<name>\w+)[^{;]*)\{(?P<body>.*?)\n\};",
        re.DOTALL,
    )
    for match in pattern.finditer(body):
        comment = _prose((match["comment"] or "").removesuffix("*/\n"))
        lines += [f"## `fwl::{match['name']}`", "", *comment, "", "```cpp"]
        lines += [f"{match['head'].strip()} {{", *_public(match["body"]), "};", "```", ""]
    return "\n".join(lines) + "\n"


def _public(body: str) -> Iterator[str]:
    """Yield the public lines of a class, with `;` for the bodies of its functions."""
    body = re.sub(r"\nprivate:.*", "", body, flags=re.DOTALL)
    body = re.sub(r"\)( noexcept)?\s*: [^;{]*\{", r")\1 {", body)  # what a constructor initializes
    depth = 0
    for line in body.strip("\n").split("\n"):
        before = depth
        depth += line.count("{") - line.count("}")
        if before == 0 and depth == 0:
            yield re.sub(r"\s*\{.*\}$", ";", line) if line.endswith("}") else line
        elif before == 0:
            yield re.sub(r"\s*\{\s*$", ";", line)
