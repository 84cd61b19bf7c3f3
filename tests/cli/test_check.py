"""`fwl-export check` as a user meets it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fwl_export.demo
from tests.cli.run import run
from tests.parity import faults
from tests.parity.faults import broken_bundle


def test_a_good_bundle_passes_and_leaves_a_report(
    own_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "check", own_bundle, "--text", text, "--tokens", 60)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "against torch:float64; text play.txt, seed 0" in lines[0]
    assert lines[1].startswith("cases: text 60, mixed ")
    assert lines[-2].startswith("within budget: ")
    target = own_bundle / "reports" / "parity.json"
    assert lines[-1].endswith(f"report: {target}")
    report = json.loads(target.read_text())
    assert report["passed"] is True
    settings = report["settings"]
    assert (report["text"]["name"], settings["tokens"], settings["seed"]) == ("play.txt", 60, 0)
    assert {path.name for path in target.parent.iterdir()} == {"parity.json", "parity.html"}
    assert run(capsys, "inspect", own_bundle).code == 0, "the bundle is as it was"


def test_json_goes_to_standard_output_and_the_report_where_it_is_asked_for(
    own_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "report.json"
    arguments = (
        "--text",
        text,
        "--tokens",
        30,
        "--seed",
        3,
        "--cases",
        "text",
        "--report",
        target,
        "--json",
    )
    result = run(capsys, "check", own_bundle, *arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads(target.read_text())
    assert json.loads(result.out)["settings"]["seed"] == 3
    assert not (own_bundle / "reports").exists()


def test_the_default_text_is_the_held_out_play(
    own_bundle: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fwl_export.demo, "HELD_OUT_PLAY", text)
    result = run(capsys, "check", own_bundle, "--tokens", 20, "--cases", "text")
    assert result.code == 0, result.err
    assert "text play.txt" in result.out
    assert "cases: text 20 tokens" in result.out


@pytest.mark.parametrize("suffix", ["json", "html"])
def test_a_full_disk_ends_with_2_and_names_the_file(
    suffix: str,
    own_bundle: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Path.write_text

    def full(path: Path, *arguments: object, **options: object) -> int:
        if path.suffix == f".{suffix}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    target = tmp_path / "report.json"
    given = ("--text", text, "--tokens", 20, "--cases", "text", "--candidates", "onnxruntime")
    result = run(capsys, "check", own_bundle, *given, "--report", target)
    assert result.code == 2
    assert f"No space left on device: '{target.with_suffix('.' + suffix)}'" in result.err
    assert "Traceback" not in result.err
    assert target.exists() == (suffix == "html")


def test_standard_output_that_is_full_is_not_a_verdict(
    own_bundle: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fwl_export.cli.check._print", full)
    given = ("--text", text, "--tokens", 20, "--cases", "text", "--candidates", "onnxruntime")
    result = run(capsys, "check", own_bundle, *given)
    assert result.code == 2
    assert "No space left on device: 'standard output'" in result.err


def test_all_ids_are_read_on_request(
    own_bundle: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--text", text, "--tokens", 10, "--cases", "long", "--candidates", "onnxruntime")
    some = run(capsys, "check", own_bundle, *given)
    every = run(capsys, "check", own_bundle, *given, "--all-ids", "--json")
    assert "tried: token ids 40 of 64 read, 39 learned from" in some.out
    data = json.loads(every.out)
    assert data["coverage"]["token_ids_read"] == data["coverage"]["token_ids_learned"] == 64
    assert data["settings"]["cases"] == ["long@65"]
    assert "--all-ids" in shlex.split(data["command"])


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        (faults.weight("fast_weights.up_kernel", (2, 3), factor=1.01), "pending."),
        (faults.stale("cache.0.key"), "cache.0.key"),
    ],
    ids=["one weight", "stale cache"],
)
def test_a_broken_bundle_exits_with_1_and_says_where_and_what_next(
    fault: faults.Fault,
    tensor: str,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", fault).folder
    given = ("--text", text, "--tokens", 40, "--cases", "text", "--candidates", "onnxruntime")
    result = run(capsys, "check", broken, *given)
    assert result.code == 1
    assert "OUTSIDE BUDGET: " in result.out
    assert f"error: onnxruntime is outside its budget, first in '{tensor}" in result.err
    assert "fwl-export bisect BUNDLE --report" in result.err
    assert "says whether the file or the runtime is at fault" in " ".join(result.err.split())
    assert str(broken / "reports" / "parity.json") in result.err
    assert "Traceback" not in result.err
    assert json.loads((broken / "reports" / "parity.json").read_text())["passed"] is False


def test_nan_exits_with_1_and_names_the_first_step(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = faults.not_a_number("fast.down.bias", 20)
    broken = broken_bundle(tiny_bundle, tmp_path / "broken", fault).folder
    given = ("--text", text, "--tokens", 40, "--cases", "text", "--candidates", "onnxruntime")
    result = run(capsys, "check", broken, *given, "--json")
    assert result.code == 1
    assert "onnxruntime is not finite up to token " in result.err
    assert "(case 'text', free-running, call " in result.err
    assert "state 'fast.down.bias' is nan in row " in result.err
    assert json.loads(result.out)["candidates"][0]["runs"][0]["failure"]["runtime"] == "onnxruntime"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"TOO SHORT", "the text has 9 tokens; reading 60 and predicting the next one takes 61"),
        (b"\xff\xfe\xff", "as text"),
        (b"", "has 0 tokens"),
    ],
)
def test_texts_that_cannot_be_used(
    content: bytes,
    message: str,
    own_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    result = run(capsys, "check", own_bundle, "--text", path, "--tokens", 60)
    assert result.code == 2
    assert message in result.err
    assert not (own_bundle / "reports").exists()


def test_a_report_is_replayed_with_its_own_command(
    own_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, junit, markdown = (tmp_path / n for n in ("1.json", "2.json", "j.xml", "m.md"))
    given = ("--text", text, "--tokens", 30, "--cases", "text,decode@20", "--report", first)
    candidates = ("--candidates", "onnxruntime:no-plugin,torch", "--junit", junit)
    result = run(capsys, "check", own_bundle, *given, *candidates, "--markdown", markdown)
    assert result.code == 0, result.err
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    names = {(c.get("classname"), c.get("name")) for c in suite.iter("testcase")}
    assert {("parity.onnxruntime:no-plugin", "logits"), ("parity.torch", "fast")} <= names
    assert "| `torch` | within budget | 20% |" in markdown.read_text()

    result = run(capsys, "check", own_bundle, "--replay", first, "--report", again)
    assert result.code == 0, result.err
    before, after = json.loads(first.read_text()), json.loads(again.read_text())
    assert before["candidates"] == after["candidates"]
    command = shlex.split(before["command"])
    assert command[:3] == ["fwl-export", "check", str(own_bundle)]
    result = run(capsys, *command[1:], "--report", again)
    assert before["candidates"] == json.loads(again.read_text())["candidates"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--candidates", "onnxruntme"), "'onnxruntme' is not a runtime; expected onnxruntime, "),
        (("--candidates", "torch:int8"), "torch has no option 'int8'; it has: float64, float32"),
        (("--candidates", "torch:float32:float64"), "two of its options set the same thing"),
        (("--candidates", "torch,torch"), "'torch' is named twice"),
        (("--cases", "texts"), "'texts' is not a case; expected text, mixed"),
        (("--replay", "report.json", "--tokens", "5"), "--replay takes text, cases, tokens"),
        (("--replay", "report.json"), "schema_version is 1, but this fwl-export reads 3; run"),
        (
            ("--baseline", "report.json"),
            "schema_version is 1, but this fwl-export reads 3; run",
        ),
        (("--baseline", "other.json"), "is not a report of `fwl-export check`"),
        (("--baseline", "none.json"), "cannot read report 'none.json'"),
        (
            ("--tolerances", "tolerances.json"),
            "no tensor name begins with 'logit'; expected one of position",
        ),
        (("--tolerances", "report.json"), "tolerances: no tensor name begins with"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_says_why(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.json").write_text(json.dumps({"schema_version": 1, "candidates": []}))
    Path("other.json").write_text("[]")
    Path("tolerances.json").write_text(json.dumps({"logit": {"floor": 2}}))
    where = () if "--replay" in arguments else ("--text", text, "--tokens", 20)
    result = run(capsys, "check", tiny_bundle, *where, *arguments, "--report", "new.json")
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert not Path("new.json").exists()


def test_a_trace_is_recorded_and_compared_with(
    own_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "a.trace"
    given = ("--text", text, "--tokens", 30, "--cases", "text")
    result = run(capsys, "check", own_bundle, *given, "--record", trace)
    assert result.code == 0, result.err
    assert result.out.startswith(f"wrote {trace}: ")
    (command,) = (line for line in result.out.splitlines() if line.startswith("next: "))
    assert shlex.split(command)[1:] == [
        *("fwl-export", "check", str(own_bundle), "--against", str(trace))
    ]
    shutil.rmtree(own_bundle / "checkpoint")
    result = run(capsys, *shlex.split(command)[2:], "--candidates", "onnxruntime:no-plugin")
    assert result.code == 0, result.err
    assert "text play.txt, recorded in a.trace" in result.out
    again = shlex.split(json.loads((own_bundle / "reports" / "parity.json").read_text())["command"])
    assert run(capsys, *again[1:]).code == 0
    trace.write_bytes(trace.read_bytes()[:-1])
    result = run(capsys, "check", own_bundle, "--against", trace)
    assert result.code == 2
    assert "was truncated or changed" in result.err


def test_trusted_weights_are_named_by_their_folder(
    own_bundle: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.move(own_bundle / "checkpoint", tmp_path / "mine"))
    given = ("--text", text, "--tokens", 30, "--cases", "text", "--candidates", "onnxruntime")
    result = run(capsys, "check", own_bundle, *given, "--checkpoint", mine)
    assert result.code == 0, result.err
    command = json.loads((own_bundle / "reports" / "parity.json").read_text())["command"]
    assert f"--checkpoint {mine}" in command
    result = run(capsys, "check", own_bundle, *given, "--checkpoint", "demo")
    assert result.code == 2
    assert "is not of this bundle's model: vocab_size is 2048, but 64 in the bundle" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--record", "a", "--against", "b"), "give one of the two"),
        (("--against", "a", "--checkpoint", "b"), "give --against or --checkpoint"),
        (("--record", "a", "--candidates", "torch"), "checks nothing; leave out --candidates"),
        (("--record", "a", "--strict", "--html", "b"), "leave out --strict and --html"),
        (
            ("--against", "a", "--text", "b", "--seed", 0),
            "from its trace; leave out --text",
        ),
        (("--fwl", "a"), "--fwl needs a language model of Hugging Face as --checkpoint"),
    ],
)
def test_what_to_compare_with_is_said_once(
    options: tuple[object, ...],
    message: str,
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = run(capsys, "check", tiny_bundle, *options)
    assert result.code == 2
    assert message in result.err


def test_a_missing_library_is_said_where_a_candidate_was_named(
    own_bundle: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fwl_export.plugins.FOLDER", tmp_path)
    given = ("--text", text, "--tokens", 20, "--cases", "text")
    both = "onnxruntime,onnxruntime:no-plugin"
    result = run(capsys, "check", own_bundle, *given, "--candidates", both)
    assert result.code == 2
    assert "error: onnxruntime could not run: libfwl_ort" in result.err
    assert (
        "it would be the same as onnxruntime:no-plugin; build it with `make plugins`" in result.err
    )
    for named in (("--candidates", "onnxruntime"), ()):
        result = run(capsys, "check", own_bundle, *given, *named)
        assert result.code == 0, result.err
        assert "the update runs in standard operators, since libfwl_ort" in result.err
        assert "`make plugins` builds it" in result.err
    result = run(capsys, "check", own_bundle, *given, "--candidates", "onnxruntime:plugin")
    assert result.code == 2
    assert "is required and not in" in result.err
