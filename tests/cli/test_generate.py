"""`fwl-export generate`: where the text ends, what goes in, and what comes out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fwl_export import Sampler, open_text_session
from fwl_export.cli.generate import generate
from tests.cli.run import Result, run

PROMPT = "THE KING"


class Input(io.StringIO):
    """Standard input with some bytes in it."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.buffer = io.BytesIO(content)


def generated(
    capsys: pytest.CaptureFixture[str], bundle: Path, *more: object, prompt: str = PROMPT
) -> Result:
    result = run(capsys, "generate", bundle, "--prompt", prompt, "--max-new", 12, *more)
    assert result.code == 0, result.err
    return result


def as_json(capsys: pytest.CaptureFixture[str], bundle: Path, *more: object) -> dict[str, object]:
    data: dict[str, object] = json.loads(generated(capsys, bundle, *more, "--json").out)
    return data


def test_a_stop_string_ends_the_text(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = as_json(capsys, tiny_bundle, "--seed", 3)
    assert whole["finish_reason"] == "length"
    text = str(whole["text"])
    stop = text[8:11]
    cut = as_json(capsys, tiny_bundle, "--seed", 3, "--stop", "NEVER", "--stop", stop)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == text[: text.index(stop)]
    plain = generated(capsys, tiny_bundle, "--seed", 3, "--stop", stop).out
    assert plain == f"{PROMPT}{cut['text']}\n"


def test_it_is_what_the_python_api_says(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--min-p", 0.02, "--repetition-penalty", 1.4, "--top-k", 30, "--seed", 5)
    found = as_json(capsys, tiny_bundle, *options, "--logprobs", 2, "--no-learn")
    sampler = Sampler(0.8, 30, seed=5, min_p=0.02, repetition_penalty=1.4)
    expected = open_text_session(tiny_bundle).generate(
        PROMPT, sampler=sampler, max_tokens=12, logprobs=2, learn=False
    )
    assert found["tokens"] == expected.tokens
    assert found["text"] == expected.text
    assert found["prompt_tokens"] == expected.prompt_tokens == len(PROMPT)
    logprobs = found["logprobs"]
    assert isinstance(logprobs, list)
    assert [each["token"] for each in logprobs] == expected.tokens
    assert set(logprobs[0]) == {"token", "text", "logprob", "top"}
    assert set(logprobs[0]["top"][0]) == {"token", "text", "logprob"}
    assert [len(each["top"]) for each in logprobs] == [2] * 12


def test_several_samples(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = as_json(capsys, tiny_bundle, "-n", 3, "--seed", 4)
    samples = data["samples"]
    assert isinstance(samples, list)
    for number, sample in enumerate(samples):
        assert sample == {
            key: value
            for key, value in as_json(capsys, tiny_bundle, "--seed", 4 + number).items()
            if key != "prompt"
        }
    shown = generated(capsys, tiny_bundle, "-n", 2, "--seed", 4).out
    assert shown == (
        f"sample 1, seed 4\n{PROMPT}{samples[0]['text']}\n"
        f"sample 2, seed 5\n{PROMPT}{samples[1]['text']}\n"
    )
    result = run(capsys, "generate", tiny_bundle, "--prompt", "A", "-n", 2, "--temperature", 0)
    assert (result.code, result.out) == (1, "")
    assert "the sampler always takes the most likely token" in result.err


@pytest.mark.parametrize("content", [b"THE KING", b"THE KING\n", b"\xef\xbb\xbfTHE KING\r\n"])
def test_a_prompt_from_elsewhere(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
) -> None:
    expected = generated(capsys, tiny_bundle).out
    monkeypatch.setattr("sys.stdin", Input(content))
    assert generated(capsys, tiny_bundle, prompt="-").out == expected
    (tmp_path / "prompt.txt").write_bytes(content)
    result = run(
        *(capsys, "generate", tiny_bundle, "--prompt-file", tmp_path / "prompt.txt"),
        *("--max-new", 12),
    )
    assert result.out == expected


def test_one_prompt_and_no_more(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "generate", tiny_bundle)
    assert (result.code, result.out) == (1, "")
    assert "neither of --prompt and --prompt-file was given; expected one of them" in result.err
    result = run(capsys, "generate", tiny_bundle, "--prompt", "A", "--prompt-file", "b")
    assert "both of --prompt and --prompt-file was given" in result.err
    result = run(capsys, "generate", tiny_bundle, "--prompt-file", tmp_path / "no.txt")
    assert result.code == 1
    assert "no.txt" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repetition-penalty", 0), "repetition_penalty is 0.0; expected more than 0"),
        (("--stop", ""), "stop is [''] ; expected texts that are not empty"),
        (("--top-p", 0), "top_p is 0.0; expected more than 0 and 1 at most"),
    ],
)
def test_options_out_of_range(
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    message: str,
) -> None:
    result = run(capsys, "generate", tiny_bundle, "--prompt", "A", *options)
    assert (result.code, result.out) == (1, "")
    assert message.replace("] ;", "];") in result.err


def test_it_can_be_called_as_a_function(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny_bundle, PROMPT, max_new=12, temperature=1.5, seed=7)
    called = capsys.readouterr().out
    assert called == generated(capsys, tiny_bundle, "--temperature", 1.5, "--seed", 7).out
