"""`fwl-export chat`: messages in, answers out, and what stays between them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fwl_export import open_text_session
from tests.bundles import MAX_TOKENS, write_bundle, write_checkpoint
from tests.cli.run import run
from tests.cli.test_generate import Input

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] | upper }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny random model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = write_checkpoint(folder / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    return write_bundle(folder / "bundle", checkpoint, max_tokens=MAX_TOKENS)


def test_each_line_is_a_message(
    chat_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "manual.txt").write_text("HOLD THE BUTTON.")
    options = ("--system", "BE BRIEF", "--read", tmp_path / "manual.txt", "--max-new", 8)
    options += ("--temperature", 0, "--save-state", tmp_path / "after.state")
    monkeypatch.setattr("sys.stdin", Input(b"HELLO\r\n\n  \nAGAIN"))
    result = run(capsys, "chat", chat_bundle, *options)
    assert result.code == 0, result.err

    text = open_text_session(chat_bundle)
    text.read("HOLD THE BUTTON.")
    system = {"role": "system", "content": "BE BRIEF"}
    first = text.chat([system, {"role": "user", "content": "HELLO"}], max_tokens=8)
    second = text.chat("AGAIN", max_tokens=8)
    assert result.out == f"{first.text}\n{second.text}\n"

    text.load_state(tmp_path / "after.state")
    after = text.session.positions
    monkeypatch.setattr("sys.stdin", Input(b"AND\n"))
    options = ("--state", tmp_path / "after.state", "--max-new", 8, "--json", "--no-learn")
    data = json.loads(run(capsys, "chat", chat_bundle, *options).out)
    assert data["message"] == "AND"
    assert data["finish_reason"] == "length"
    assert len(data["tokens"]) == 8
    assert after == [len("HOLD THE BUTTON.S:BE BRIEF;U:HELLO;A:;U:AGAIN;A:") + 16]


def test_json_is_a_line_for_each_answer(
    chat_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Input(b"HELLO\nAGAIN\n"))
    result = run(capsys, "chat", chat_bundle, "--json", "--max-new", 3, "--seed", 2)
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [each["message"] for each in answers] == ["HELLO", "AGAIN"]


def test_a_model_that_cannot_chat(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Input(b"HELLO\n"))
    result = run(capsys, "chat", tiny_bundle)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: this model has no chat template, so it was not trained")


def test_input_that_is_no_text(
    chat_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Input(b"OK\n\xff\xfe\n"))
    result = run(capsys, "chat", chat_bundle, "--max-new", 2)
    assert result.code == 1
    assert "line 2 of standard input is no text" in result.err
    monkeypatch.setattr("sys.stdin", None)
    result = run(capsys, "chat", chat_bundle)
    assert "standard input is closed; expected messages" in result.err


def test_on_a_terminal(chat_bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C ends an answer and not the chat, and Ctrl-D ends the chat."""
    command = "import sys; from fwl_export.cli.main import main; sys.argv[0] = 'fwl-export'; main()"
    arguments = ["chat", chat_bundle, "--max-new", "100000", "--save-state", tmp_path / "a.state"]
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", command, *map(str, arguments)],
        stdin=side,
        stdout=side,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(side)
    try:
        terminal = Terminal(main)
        terminal.wait_for("> ")
        os.write(main, b"HELLO\n")
        terminal.wait_for("HELLO", more=30)  # the answer is being written
        process.send_signal(2)
        terminal.wait_for("\n> ")
        os.write(main, b"AGAIN\n")
        terminal.wait_for("AGAIN", more=30)
        process.send_signal(2)
        terminal.wait_for("\n> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert (tmp_path / "a.state").is_file()


class Terminal:
    """Reads what a program writes to its terminal."""

    def __init__(self, file: int) -> None:
        self._file, self._text = file, ""

    def wait_for(self, text: str, more: int = 0) -> None:
        """Read until a text, and some more characters, have come."""
        deadline = time.monotonic() + 60
        while text not in self._text or len(self._text.partition(text)[2]) < more:
            assert time.monotonic() < deadline, self._text[-200:]
            if select.select([self._file], [], [], 1)[0]:
                self._text += os.read(self._file, 4096).decode().replace("\r\n", "\n")
        self._text = self._text.partition(text)[2]
