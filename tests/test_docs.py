"""The documents: their code runs, what they tell a reader to type exists, their site builds, and
they name no private machine.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import torch
from safetensors import safe_open

from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig
from fwl_export.demo import CHECKPOINT
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.streaming import state_specs
from tests.bundles import tiny_tokenizer
from tests.cli.run import run
from tests.foreign_model import ForeignModel
from tests.tolerances import assert_close

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

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
# A comment above a block says why a test cannot run it; `title` names a file to write.
_BLOCK = re.compile(
    r"^(?:<!-- not (?:run|compiled): (?P<reason>[^\n]+) -->\n)?"
    r'```(?P<kind>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```',
    re.MULTILINE | re.DOTALL,
)


def _documents() -> list[Path]:
    folders = ("fwl_export", "plugins", "tools", "tests", "docs", "attacks", "docker")
    return [
        *sorted(REPOSITORY.glob("*.md")),
        *(path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.md"))),
    ]


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", _documents(), ids=_name)
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


@pytest.mark.parametrize("path", _documents(), ids=_name)
def test_commands_of_the_documents_exist(path: Path) -> None:
    commands = list(shell_commands(path.read_text(encoding="utf-8")))
    assert [wrong for words in commands if (wrong := wrong_command(words))] == []
    if path == README:
        assert any(words[0].endswith("fwl-export") for words in commands)


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


@pytest.mark.parametrize("path", _documents(), ids=_name)
def test_python_of_the_documents_uses_what_the_package_has(path: Path) -> None:
    blocks = [code for kind, code in _blocks(path.read_text(encoding="utf-8")) if kind == "python"]
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
    """Return the fault of a command of this project, or "". Other commands are not checked."""
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
    shown += _help(plain[0], *plain[1:2])  # of the verbs with verbs below them: import, bench
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if not re.search(rf"{option}\b", shown)]
    return "".join(f"'{plain[0]}' has no option {option}" for option in unknown)


def wrong_names(code: str) -> list[str]:
    """Return the names that Python code imports from this package and that it does not have."""
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
def _help(*verbs: str) -> str:
    """Return the help text of a verb, "" if there is no such verb."""
    from typer.testing import CliRunner

    main = importlib.import_module("fwl_export.cli.main")
    result = CliRunner().invoke(
        main.app(), [*verbs, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    return result.output if result.exit_code == 0 else ""


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
      reason: why it cannot run here; "" if it can.
      kind: its language.
      title: name of the file that it shows; "" if it shows none.
      code: its text.
    """

    reason: str
    kind: str
    title: str
    code: str


def page_blocks(text: str) -> list[Block]:
    return [Block(*(group or "" for group in found)) for found in _BLOCK.findall(text)]


@pytest.mark.parametrize("example", ["generate.cpp", "generate.c"])
def test_the_programs_of_the_pages_are_the_examples(example: str) -> None:
    text = (DOCS / "howto" / "embed-c.md").read_text(encoding="utf-8")
    included = re.findall(r'^ *--8<-- "([^"]+)"$', text, re.MULTILINE)
    program = REPOSITORY / "plugins" / "libfwl" / "examples" / example
    assert str(program.relative_to(REPOSITORY)) in included
    assert len(program.read_text(encoding="utf-8").splitlines()) < 60


def test_programs_of_c_and_cpp_are_compiled_or_say_why_not() -> None:
    found = [
        (path, block)
        for path in PAGES
        for block in page_blocks(path.read_text(encoding="utf-8"))
        if block.kind in ("c", "cpp") and not block.reason
    ]
    assert found == []  # whole programs are included from the examples, which tests/libfwl runs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```bash\nmake\n```\n", Block("", "bash", "", "make\n")),
        ("<!-- not run: slow -->\n```bash\nmake\n```\n", Block("slow", "bash", "", "make\n")),
        ('```text title="a.txt"\nA\n```\n', Block("", "text", "a.txt", "A\n")),
    ],
)
def test_blocks_of_a_page_are_found(text: str, expected: Block) -> None:
    assert page_blocks(f"before\n\n{text}\nafter\n") == [expected]


def test_every_block_of_a_page_is_found() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert [(b.kind, b.code) for b in page_blocks(text)] == _blocks(text), path


def _runnable(path: Path) -> bool:
    blocks = page_blocks(path.read_text(encoding="utf-8"))
    return any(block.kind in ("python", "bash") and not block.reason for block in blocks)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=_name(path), marks=[pytest.mark.slow] * (path.stem == "tutorial"))
        for path in filter(_runnable, PAGES)
    ],
)
def test_the_code_of_a_page_runs(
    path: Path,
    own_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-bundle").symlink_to(own_bundle)
    names: dict[str, object] = {}
    for block in page_blocks(path.read_text(encoding="utf-8")):
        if block.title:
            (tmp_path / block.title).write_text(block.code, encoding="utf-8")
        elif block.kind == "python" and not block.reason:
            assert len(block.code.splitlines()) < 60
            exec(compile(block.code, path.name, "exec"), names)
        elif block.kind == "bash" and not block.reason:
            run_commands(block.code, capsys)


def run_commands(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the commands of a block: ours in this process, which is faster, others in a shell."""
    for words in shell_commands(f"```bash\n{code}```"):
        if words[0] == "fwl-export":
            result = run(capsys, *words[1:])
            assert result.code == 0, f"{words}: {result.out}{result.err}"
        else:
            folder = str(Path(sys.executable).parent)
            path = os.pathsep.join((folder, os.environ["PATH"]))
            done = subprocess.run(
                words, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def test_a_block_that_fails_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="is not a bundle"):
        run_commands("fwl-export inspect no-such-bundle\n", capsys)
    with pytest.raises(AssertionError):
        run_commands("false\n", capsys)


@pytest.mark.parametrize("path", _documents(), ids=_name)
def test_relative_links_of_the_documents_lead_to_files(path: Path) -> None:
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
    # References that are made from the code exist in the site only; MkDocs checks links to them.
    missing = [
        target
        for target in targets
        if "://" not in target
        and not (path.parent / target).exists()
        and os.path.relpath((path.parent / target).resolve(), DOCS) not in generated_pages()
    ]
    assert missing == []


def generated_pages() -> set[str]:
    return {f"reference/{name}.md" for name in ("c", "cli", "cpp", "python")}


def test_the_site_builds_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed; pip install 'fwl-export[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        assert loaded_from_elsewhere(page.read_text(encoding="utf-8")) == [], page


def loaded_from_elsewhere(page: str) -> list[str]:
    """Return what a browser would fetch from other hosts to show a page; links do not count."""
    tags = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>", page)
    return tags + re.findall(r"<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>", page)


def test_what_a_page_loads_from_elsewhere_is_found() -> None:
    page = (
        '<a href="https://a.b/"></a><script src="https://a.b/c.js"></script><link href=//a.b/d.css>'
    )
    assert len(loaded_from_elsewhere(page)) == 2


def table_rows(path: Path) -> dict[str, list[str]]:
    """Return the rows of a page's tables, by the names in code that their first two cells hold."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for name in re.findall(r"`([^`]+)`", "".join(cells[:2])):
            rows.setdefault(name, cells)
    return rows


def test_the_page_on_checkpoints_has_every_tensor_of_the_demo() -> None:
    rows = table_rows(DOCS / "formats" / "checkpoint.md")
    with safe_open(CHECKPOINT / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    documented = {re.sub(r"blocks\.\d+\.", "blocks.N.", name): s for name, s in shapes.items()}
    assert documented == {
        name: ast.literal_eval(cells[2])
        for name, cells in rows.items()
        if name.startswith(("fast_weights.", "backbone.")) and cells[1].startswith("[")
    }


def test_the_reading_path_leads_through_files_of_the_size_it_says() -> None:
    rows = table_rows(DOCS / "reading-path.md")
    files = {name: int(cells[2]) for name, cells in rows.items() if name.endswith(".py")}
    assert len(files) == 8
    for name, lines in files.items():
        found = len((REPOSITORY / name).read_text(encoding="utf-8").splitlines())
        assert abs(found - lines) <= 0.15 * lines, f"{name} has {found} lines"


def test_the_page_on_checkpoints_has_every_key_of_the_config() -> None:
    rows = table_rows(DOCS / "formats" / "checkpoint.md")
    for prefix, part in (("backbone", BackboneConfig), ("fast_weights", FastWeightsConfig)):
        for field in dataclasses.fields(part):
            assert f"{prefix}.{field.name}" in rows


def test_the_page_on_state_files_has_every_tensor_of_the_demo() -> None:
    rows = table_rows(DOCS / "formats" / "state-file.md")
    model = load_checkpoint(CHECKPOINT).model
    for spec in state_specs(model.config, model, 256):
        name = re.sub(r"cache\.\d+\.", "cache.N.", spec.name)
        if not name.startswith("anchor."):
            assert ast.literal_eval(rows[name][2]) == [1, *spec.shape], name


def test_the_converter_of_the_page_converts_a_model_that_shares_no_code_with_ours(
    tmp_path: Path,
) -> None:
    text = (DOCS / "formats" / "checkpoint.md").read_text(encoding="utf-8")
    code, *_ = (code for kind, code in _blocks(text) if kind == "python")
    names: dict[str, object] = {}
    exec(compile(code, "checkpoint.md", "exec"), names)
    function = code[code.index("def convert") :]
    assert len(function.splitlines()) <= 20
    foreign = ForeignModel()
    names["convert"](foreign, tiny_tokenizer(40), tmp_path / "converted")  # type: ignore[operator]
    ours, theirs = load_checkpoint(tmp_path / "converted").model.double(), foreign.double()
    ids = torch.randint(0, 40, (40,))
    adapting, slow = ours(ids[None], ids.roll(-1)[None])
    expected = theirs(ids)
    assert_close("docs.converter", adapting[0].numpy(), expected.numpy())
    assert (slow[0] - expected).abs().max() > 0.1  # it did learn
