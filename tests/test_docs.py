"""The documents: what they tell a reader to type exists, and they name nobody's machine."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"

# Public sites that a document may link to. A machine's own name or address is none of them.
HOSTS = {
    "aclanthology.org",
    "arxiv.org",
    "developer.nvidia.com",
    "docs.nvidia.com",
    "docs.pytorch.org",
    "github.com",
    "keepachangelog.com",
    "onnx.ai",
    "onnxruntime.ai",
    "pypi.org",
    "pytorch.org",
    "semver.org",
    "www.apache.org",
}

_FOLDERS = "builds|data|etc|home|media|mnt|opt|private|root|scratch|srv|tmp|usr|Users|var|work"
_PRIVATE = (
    re.compile(rf"(?<![\w.$}}~/:-])/(?:{_FOLDERS})\b[^\s`'\")]*"),
    re.compile(r"\b[A-Z]:\\\S*"),
    re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}\b"),  # not a version: rtx-1.7.1.116
    re.compile(r"\b[\w-]+(?:\.[\w-]+)*\.(?:corp|example|internal|intranet|lan|local)\b"),
)
_URL = re.compile(r"https?://[^\s)>\"'`\]]+")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELLS = {"bash", "console", "sh", "shell"}


def _documents() -> list[Path]:
    folders = ("fwl_export", "plugins", "tools", "tests", "docs")
    return [
        *sorted(REPOSITORY.glob("*.md")),
        *(path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.md"))),
    ]


needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


@pytest.mark.parametrize("path", _documents(), ids=lambda path: path.name)
def test_documents_name_no_private_path_or_host(path: Path) -> None:
    assert private_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "see /home/anna/notes",
        "in `/tmp/bundle`",
        "(/srv/models)",
        r"C:\models",
        "at 10.0.0.7:8000",
        "on build-3.corp",
        "pip install -i https://mirror.fast.net/simple",
    ],
)
def test_a_planted_private_name_is_found(planted: str) -> None:
    assert len(private_names(planted)) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        "https://arxiv.org/abs/2212.02475",
        "input/output and/or tests/data, ./tmp/x, ~/work, $HOME/work, torch 2.13.0",
        "fwl_export/op/spec.py",
    ],
)
def test_harmless_text_is_not_taken_for_a_private_name(harmless: str) -> None:
    assert private_names(harmless) == []


@needs_readme
def test_commands_of_the_readme_exist() -> None:
    commands = list(shell_commands(README.read_text(encoding="utf-8")))
    assert any(words[0].endswith("fwl-export") for words in commands)
    assert [wrong for words in commands if (wrong := wrong_command(words))] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("fwl-export exprot demo", "no verb 'exprot'"),
        ("fwl-export export demo --presicion fp16", "'export' has no option --presicion"),
        (".venv/bin/fwl-export exprot", "no verb 'exprot'"),
        ("make dmeo", "no target 'dmeo'"),
        ("python tools/none.py", "no file tools/none.py"),
    ],
)
def test_a_planted_wrong_command_is_found(line: str, found: str) -> None:
    (words,) = shell_commands(f"```bash\n{line}\n```")
    assert found in wrong_command(words)


def test_shell_commands_skips_output_and_joins_lines() -> None:
    text = (
        "```console\n$ make demo\nexport: done\n```\n```bash\n# why\nA=1 make \\\n  test # now\n```"
    )
    assert list(shell_commands(text)) == [["make", "demo"], ["make", "test"]]


@needs_readme
def test_python_of_the_readme_uses_what_the_package_has() -> None:
    blocks = [
        code for kind, code in _blocks(README.read_text(encoding="utf-8")) if kind == "python"
    ]
    assert [wrong for code in blocks for wrong in wrong_names(code)] == []


def test_a_planted_wrong_name_is_found() -> None:
    code = "import fwl_export\nfrom fwl_export.errors import NoError\nfwl_export.open_sesame()"
    assert wrong_names(code) == ["fwl_export.errors.NoError", "fwl_export.open_sesame"]


def test_verbs_that_the_package_and_its_documents_mention_exist() -> None:
    sources = [*_documents(), *sorted((REPOSITORY / "fwl_export").rglob("*.py"))]
    mentioned = {
        verb
        for path in sources
        for verb in re.findall(r"`fwl-export ([a-z][\w-]*)", path.read_text(encoding="utf-8"))
    }
    assert mentioned
    assert {verb for verb in mentioned if not _help(verb)} == set()


def private_names(text: str) -> list[str]:
    """Return absolute paths, addresses, private hosts, and links to sites not in HOSTS."""
    links = [url for url in _URL.findall(text) if urlsplit(url).hostname not in HOSTS]
    rest = _URL.sub("", text)
    return links + [match.group() for pattern in _PRIVATE for match in pattern.finditer(rest)]


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command in a document's shell blocks.

    A block with prompts ("$ ") holds output too: there only lines with a prompt are commands.
    """
    for kind, code in _blocks(text):
        if kind not in _SHELLS:
            continue
        lines = code.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def wrong_command(words: list[str]) -> str:
    """Return what is wrong with a command of ours, or "": others are not judged."""
    program, *arguments = words
    plain = [word for word in arguments if not word.startswith("-") and "=" not in word]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        return "".join(f"no target '{word}'" for word in plain if word not in targets)
    if Path(program).name.startswith("python"):
        scripts = [word for word in plain[:1] if word.endswith(".py")]
        return "".join(f"no file {word}" for word in scripts if not (REPOSITORY / word).exists())
    if Path(program).name != "fwl-export" or not plain:
        return ""
    shown = _help(plain[0])
    if not shown:
        return f"no verb '{plain[0]}'"
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if not re.search(rf"{option}\b", shown)]
    return "".join(f"'{plain[0]}' has no option {option}" for option in unknown)


def wrong_names(code: str) -> list[str]:
    """Return names of ours that a piece of Python uses and the package does not have."""
    used = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fwl_export"):
            used += [(node.module, alias.name) for alias in node.names]
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "fwl_export"
        ):
            used.append(("fwl_export", node.attr))
    return [f"{m}.{name}" for m, name in used if not hasattr(importlib.import_module(m), name)]


def _blocks(text: str) -> list[tuple[str, str]]:
    return _FENCE.findall(text)


@functools.cache
def _help(verb: str) -> str:
    """Return the help text of a verb, "" if there is no such verb."""
    from typer.testing import CliRunner

    main = importlib.import_module("fwl_export.cli.main")
    result = CliRunner().invoke(
        main.app(), [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    return result.output if result.exit_code == 0 else ""


@pytest.mark.parametrize(("language", "example"), [("cpp", "generate.cpp"), ("c", "generate.c")])
def test_programs_of_the_readme_are_the_examples(language: str, example: str) -> None:
    blocks = [text for kind, text in _FENCE.findall(README.read_text()) if kind == language]
    program = (REPOSITORY / "plugins" / "libfwl" / "examples" / example).read_text()
    assert blocks == [program]
    assert len(program.splitlines()) < 60


def test_the_python_programs_of_the_readme_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-bundle").symlink_to(tiny_bundle)
    blocks = [text for kind, text in _FENCE.findall(README.read_text()) if kind == "python"]
    assert len(blocks) == 2
    for block in blocks:
        assert len(block.splitlines()) < 60
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "document.state").is_file()
