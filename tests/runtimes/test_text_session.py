"""Text sessions: what is read, what is written, where it ends, and what is left afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export import Sampler, open_session, open_text_session
from fwl_export.bundle.manifest import read_bundle
from fwl_export.bundle.text_tokenizer import TextTokenizer, bundle_text_tokenizer
from fwl_export.errors import ConfigError, NotFiniteError, ShapeError, StateError, TokenError
from fwl_export.runtimes import Generation, TextSession
from tests.runtimes.scripted import (
    byte_tokenizer,
    read_ids,
    read_weights,
    runner,
    saying,
    scripted,
    sentencepiece_tokenizer,
)

PLAIN = byte_tokenizer()
WITH_BOS = byte_tokenizer(bos="<|start|>")


def ids(text: str, tokenizer: TextTokenizer = PLAIN) -> list[int]:
    found: list[int] = tokenizer.encode(text, start=False, special=True).tolist()
    return found


def session(*answers: str, tokenizer: TextTokenizer = PLAIN, **settings: Any) -> TextSession:
    return scripted(saying(tokenizer, *answers), tokenizer, **settings)


class TestReading:
    def test_a_text_is_read(self) -> None:
        text = session()
        assert text.read("Exit, pursued") == 13
        text.read(" by a bear.", learn=False)
        assert read_ids(text) == ids("Exit, pursued by a bear.")
        assert read_weights(text) == [1.0] * 13 + [0.0] * 11

    def test_the_first_token_comes_once(self, tmp_path: Path) -> None:
        text = session("C", "F", tokenizer=WITH_BOS)
        start = WITH_BOS.bos_id
        text.read("A")
        text.read("B")
        text.generate("", max_tokens=1)
        assert read_ids(text) == [start, *ids("AB")]
        text.save_state(tmp_path / "a.state")
        text.load_state(tmp_path / "a.state")
        text.read("D")
        assert read_ids(text) == [start, *ids("ABCD")]
        text.reset()
        text.generate("E", max_tokens=1)
        assert read_ids(text) == [start, *ids("E")]

    def test_an_empty_prompt_begins_with_the_first_token(self) -> None:
        text = session("yes", tokenizer=WITH_BOS)
        assert text.generate(max_tokens=3).text == "yes"
        assert read_ids(text) == [WITH_BOS.bos_id, *ids("ye")]

    def test_there_is_nothing_to_continue(self) -> None:
        text = session()
        with pytest.raises(TokenError, match="the prompt is empty; expected at least one token"):
            text.generate("")
        with pytest.raises(TokenError, match="a prompt is empty; expected at least one token"):
            text.generate(["A", ""])
        assert text.read("") == 0
        assert read_ids(text) == []

    def test_control_tokens_in_a_text_are_text(self) -> None:
        text = session()
        text.read("<|end|>")
        assert PLAIN.decode(read_ids(text)) == "<|end|>"
        text.reset()
        text.read("<|end|>", special=True)
        assert read_ids(text) == ids("<|end|>") == sorted(PLAIN.end_ids)

    def test_a_failure_leaves_the_session_as_it_was(self) -> None:
        text = session("ab", "c")
        text.generate("x", max_tokens=2)
        runner(text).broken = 1
        for call in (lambda: text.read("y"), lambda: text.generate("y"), text.flush):
            runner(text).broken = 1
            with pytest.raises(NotFiniteError):
                call()
        assert read_ids(text) == ids("xa")
        assert text.generate("y", max_tokens=1).text == "c"
        assert read_ids(text) == ids("xaby")


class TestWriting:
    def test_pieces_come_one_by_one(self) -> None:
        text = session("a naïve café 🙂!")
        stream = text.stream("x", max_tokens=len(ids("a naïve café 🙂!")))
        pieces = list(stream)
        assert "".join(pieces) == "a naïve café 🙂!"
        assert "🙂" in pieces
        assert all(pieces)
        assert stream.finish_reason == "length"

    def test_the_end_token_ends_it_and_is_not_shown(self) -> None:
        found = session("done<|end|>more").generate("x")
        assert (found.text, found.finish_reason) == ("done", "end")
        assert found.tokens == ids("done<|end|>")
        assert found.prompt_tokens == 1

    def test_it_can_go_on_after_an_end_token(self) -> None:
        found = session("done<|end|>more").generate("x", ignore_end=True, max_tokens=9)
        assert (found.text, found.finish_reason) == ("donemore", "length")

    def test_it_does_not_end_too_early(self) -> None:
        end = next(iter(PLAIN.end_ids))
        found = scripted(lambda read: end, PLAIN).generate("x", min_tokens=3)
        assert len(found.tokens) == 4
        assert end not in found.tokens[:3]
        assert found.finish_reason == "end"

    @pytest.mark.parametrize(
        ("written", "stop", "expected"),
        [
            ("one\ntwo", "\n", "one"),
            ("one\n\ntwo", ["\n\n"], "one"),
            ("one\ntwo\n\nthree", ["\n\n"], "one\ntwo"),
            ("aaab", "aab", "a"),
            ("a STOP", ["STOP", "a"], ""),
            ("xyz", ["yz", "xyz"], ""),
            ("<en<end", "<end", "<en"),
            ("café", "é", "caf"),
            ("ab🙂c", "🙂", "ab"),
        ],
    )
    def test_a_stop_string_ends_it_and_is_never_shown(
        self, written: str, stop: str | list[str], expected: str
    ) -> None:
        text = session(written)
        stream = text.stream("x", stop=stop)
        shown = "".join(stream)
        assert (shown, stream.finish_reason) == (expected, "stop")
        assert stream.generation.text == shown

    @pytest.mark.parametrize("end", ["<|end|>", ""])
    def test_what_only_begins_like_a_stop_string_is_shown_at_the_end(self, end: str) -> None:
        text = session(f"one ST{end}")
        stream = text.stream("x", stop=["STOP"], max_tokens=6 + bool(end))
        assert [*stream][-1] == "ST"
        assert stream.generation.text == "one ST"

    def test_an_unfinished_character_is_shown_once(self) -> None:
        found = session("ab🙂").generate("x", max_tokens=4)
        assert (found.text, found.finish_reason) == ("ab\ufffd", "length")

    def test_the_space_after_a_prompt_is_kept(self) -> None:
        tokenizer = sentencepiece_tokenizer()
        word = tokenizer.tokenizer.token_to_id("▁the")
        text = scripted(lambda read: word, tokenizer)
        assert text.generate("so", max_tokens=2).text == " the the"
        assert text.generate("", max_tokens=1).text == " the"
        text.reset()
        text.read("so")
        assert text.generate("", max_tokens=1).text == " the"
        text.reset()
        assert text.generate(["so", "x"], max_tokens=1)[1].text == " the"

    def test_ids_that_are_no_token_are_never_drawn(self) -> None:
        padded = byte_tokenizer(padding=62)
        favourite = padded.vocab_size - 1
        samplers: list[Any] = [None, Sampler(3.0), lambda logits: int(logits.argmax())]
        samplers.append(Sampler(processors=[lambda ids, logits: np.arange(len(logits))]))
        for sampler in samplers:
            text = scripted(lambda read: favourite, padded)
            for found in (
                text.generate("x", max_tokens=40, sampler=sampler, ignore_end=True),
                *text.generate(["x", "y"], max_tokens=9, sampler=sampler, ignore_end=True),
            ):
                assert not set(found.tokens) & set(padded.unused_ids.tolist())

    def test_what_was_written_counts_as_read(self) -> None:
        text = session("ab", "cd<|end|>")
        text.generate("x", max_tokens=2, learn=False)
        assert read_ids(text) == ids("xa")
        text.generate("y")
        assert read_ids(text) == ids("xabycd")
        text.flush()
        text.flush()
        assert read_ids(text) == ids("xabycd<|end|>")
        assert read_weights(text) == [0.0] * 3 + [1.0] * 4

    def test_it_goes_on_after_what_was_read(self) -> None:
        text = session("ab", "c")
        text.read("xy")
        assert text.generate("", max_tokens=2).text == "ab"
        assert text.generate("", max_tokens=1).text == "c"
        assert read_ids(text) == ids("xyab")

    def test_it_ends_where_the_model_can_read_no_more(self) -> None:
        text = session("abcdefghij", max_positions=6)
        found = text.generate("xyz")
        assert (found.text, found.finish_reason) == ("abcd", "length")
        with pytest.raises(TokenError, match="would read 2 more, but this model reads at most 6"):
            text.read("v")
        other = session("abcdefghij", max_positions=6)
        assert [each.text for each in other.generate(["xyz", "x"])] == ["abcd", "abcdef"]

    def test_the_prompt_is_read_with_the_first_piece(self) -> None:
        text = session("abc")
        stream = text.stream("x")
        assert read_ids(text) == []
        next(stream)
        assert read_ids(text) == ids("x")

    def test_log_probabilities_are_the_models_own(self) -> None:
        logits = np.log(np.array([0.5, 0.25, 0.125, 0.125])).astype(np.float32)
        wide = np.full(PLAIN.vocab_size, -60, np.float32)
        wide[:4] = logits
        text = scripted(lambda read: wide, PLAIN)
        sampler = Sampler(9.0, top_k=3, seed=1)
        found = text.generate("x", max_tokens=20, sampler=sampler, logprobs=2)
        assert found.logprobs is not None
        assert [each.token for each in found.logprobs] == found.tokens
        for each in found.logprobs:
            assert each.logprob == pytest.approx(logits[each.token], abs=1e-6)
            assert [top.token for top in each.top] == [0, 1]
            assert [top.logprob for top in each.top] == pytest.approx(np.log([0.5, 0.25]))
            assert each.text == PLAIN.decode([each.token])
        assert len(set(found.tokens)) > 1
        json.dumps(dataclasses.asdict(found))
        none = text.generate("x", max_tokens=2, logprobs=0)
        assert none.logprobs is not None
        assert [each.top for each in none.logprobs] == [(), ()]
        assert text.generate("x", max_tokens=2).logprobs is None


class TestLeaving:
    def test_a_stream_that_is_left_has_written_what_it_showed(self) -> None:
        text = session("abcdef", "z")
        for piece in text.stream("x"):
            if piece == "b":
                break
        assert text.generate("y", max_tokens=1).text == "a"
        assert read_ids(text) == ids("xaby")

    def test_a_stream_does_not_go_on_after_the_session_did(self) -> None:
        text = session("abcdef")
        stream = text.stream("x")
        assert next(stream) == "a"
        text.read("y")
        with pytest.raises(StateError, match="this stream was left: it was closed, or the session"):
            next(stream)
        assert stream.generation == Generation("a", ids("a"), None, 1)
        assert read_ids(text) == ids("xay")

    def test_a_closed_stream(self) -> None:
        text = session("abcdef")
        stream = text.stream("x")
        next(stream)
        stream.close()
        stream.close()
        with pytest.raises(StateError, match="this stream was left"):
            next(stream)

    def test_a_finished_stream_stays_finished(self) -> None:
        text = session("ab<|end|>")
        stream = text.stream("x")
        assert list(stream) == ["a", "b"]
        text.read("y")
        assert list(stream) == []
        assert stream.result().finish_reason == "end"

    def test_an_error_in_the_middle_leaves_what_was_written(self) -> None:
        text = session("abcdef", "z")
        stream = text.stream("x")
        next(stream), next(stream)
        runner(text).broken = 1
        with pytest.raises(NotFiniteError):
            next(stream)
        text.flush()
        assert read_ids(text) == ids("xab")

    def test_a_sampler_that_fails_leaves_what_was_read(self) -> None:
        text = session("abc")

        def fail(logits: np.ndarray) -> int:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            text.generate("x", sampler=fail)
        assert read_ids(text) == ids("x")
        assert text.generate("", max_tokens=1).text == "a"

    def test_a_session_that_others_moved_forgets_what_it_had_not_read(self) -> None:
        text = session("ab", "c")
        text.generate("x", max_tokens=2)
        text.session.reset()
        text.read("y")
        assert read_ids(text) == ids("y")


class TestSeveral:
    def test_each_prompt_ends_where_it_would_alone(self, tiny_bundle: Path) -> None:
        prompts = ["THE KING", "A", "EXIT, PURSUED BY A BEAR. THOU MET'ST WITH"]
        text = open_text_session(tiny_bundle)
        text.read("A SAD TALE'S BEST FOR WINTER.")
        options: Any = {"max_tokens": 30, "stop": ["Q", "7"], "logprobs": 1}
        found = text.generate(prompts, sampler=Sampler(1.0, seed=4), **options)
        assert len({len(each.tokens) for each in found}) > 1, "ragged ends"
        for row, prompt in enumerate(prompts):
            alone = open_text_session(tiny_bundle)
            alone.read("A SAD TALE'S BEST FOR WINTER.")
            expected = alone.generate(prompt, sampler=Sampler(1.0, seed=4 + row), **options)
            assert found[row].text == expected.text
            assert found[row].tokens == expected.tokens
            assert found[row].finish_reason == expected.finish_reason
            assert found[row].prompt_tokens == expected.prompt_tokens

    def test_continuations_of_one_state(self, tiny_bundle: Path) -> None:
        text = open_text_session(tiny_bundle)
        text.read("A SAD TALE'S BEST FOR WINTER.")
        before = text.session.state
        found = text.generate("THE", n=3, sampler=Sampler(1.0, seed=4), max_tokens=12)
        assert all(np.array_equal(before[name], text.session.state[name]) for name in before)
        assert len({each.text for each in found}) == 3
        for number, each in enumerate(found):
            alone = open_text_session(tiny_bundle)
            alone.read("A SAD TALE'S BEST FOR WINTER.")
            sampler = Sampler(1.0, seed=4 + number)
            assert alone.generate("THE", sampler=sampler, max_tokens=12) == each
        assert text.generate("THE", n=3, sampler=Sampler(1.0, seed=4), max_tokens=12) == found

    def test_what_was_not_read_yet_comes_first(self) -> None:
        text = session("ab")
        text.generate("x", max_tokens=2)
        seen: list[list[int]] = []

        def script(read: list[int]) -> int:
            seen.append(read)
            return 5

        runner(text).script = script
        text.generate(["p", "qr"], max_tokens=1)
        assert seen == [ids("xabp"), ids("xabqr")]
        text.generate("", n=2, max_tokens=1, sampler=lambda logits: 7)
        assert seen[2] == ids("xab")

    def test_wrong_use(self, tiny_bundle: Path) -> None:
        text = session("abc")
        with pytest.raises(ConfigError, match="n is 2, but the sampler always takes the most lik"):
            text.generate("x", n=2)
        with pytest.raises(ConfigError, match="n is 0; expected 1 or more continuations"):
            text.generate("x", n=0)
        with pytest.raises(ConfigError, match="there are no prompts"):
            text.generate([])
        with pytest.raises(ConfigError, match="prompt is 7; expected text"):
            text.generate([7])  # type: ignore[list-item]
        with pytest.raises(ShapeError, match="prompt is 7"):
            text.generate(7)  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match=r"prompt is b'x'; expected text"):
            text.stream(b"x")  # type: ignore[arg-type]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens is 0; expected a whole number of 1 or more"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"logprobs": -1}, "logprobs is -1; expected a whole number of 0 or more"),
    ({"stop": ""}, "stop is ''; expected texts that are not empty"),
    ({"stop": ["a", ""]}, r"stop is \['a', ''\]"),
    ({"stop": 5}, "stop is 5"),
    ({"stop": None}, "stop is None"),
    ({"learn": "no"}, "learn is 'no'; expected True or False"),
    ({"special": 1}, "special is 1; expected True or False"),
    ({"sampler": 0.8}, "sampler is 0.8; expected a Sampler"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        session().stream("x", **options)


@pytest.mark.parametrize("token", [-1, 10**6, 1.5, None])
def test_a_sampler_that_returns_no_token(token: Any) -> None:
    with pytest.raises(TokenError, match=r"the sampler returned .*; expected a token id, 0 to"):
        session("a").generate("x", sampler=lambda logits: token)


def test_sessions_that_do_not_fit(tiny_bundle: Path) -> None:
    tokenizer = bundle_text_tokenizer(read_bundle(tiny_bundle))
    with pytest.raises(ShapeError, match="a text session needs a session of one row; this one has"):
        TextSession(open_session(tiny_bundle, batch=2), tokenizer)
    with pytest.raises(ConfigError, match="the tokenizer is for 258 token ids, but the session's"):
        TextSession(open_session(tiny_bundle), PLAIN)
    with pytest.raises(ConfigError, match="a text session has one row, so it takes no `batch`"):
        open_text_session(tiny_bundle, batch=2)


def test_it_shows_what_it_is() -> None:
    text = session("abc")
    assert repr(text).startswith("<TextSession at token 0: <Session in Scripted: batch=1")
    stream = text.stream("x", max_tokens=2)
    next(stream)
    assert repr(stream) == "<TextStream: 1 tokens, finish_reason=None>"


class TestAsyncio:
    def test_other_tasks_go_on(self) -> None:
        text = session("abcdef")
        gate = runner(text).gate
        seen: list[str] = []

        async def write() -> None:
            seen.extend([piece async for piece in text.astream("x", max_tokens=6)])

        async def main() -> None:
            gate.clear()
            writing = asyncio.create_task(write())
            while not runner(text).calls:
                await asyncio.sleep(0)
            assert seen == []  # the model is in a call, and this task goes on
            gate.set()
            await writing

        asyncio.run(main())
        assert "".join(seen) == "abcdef"

    def test_a_cancelled_task_leaves_a_usable_session(self) -> None:
        text = session("abcdef")
        gate = runner(text).gate

        async def write(seen: list[str]) -> None:
            async for piece in text.astream("x", max_tokens=6):
                seen.append(piece)
                gate.clear()

        async def main() -> None:
            seen: list[str] = []
            writing = asyncio.create_task(write(seen))
            while runner(text).calls < 2:
                await asyncio.sleep(0)
            writing.cancel()
            threading.Timer(0.05, gate.set).start()
            with pytest.raises(asyncio.CancelledError):
                await writing
            assert seen == ["a"]

        asyncio.run(main())
        text.flush()
        assert read_ids(text) == ids("xab")  # the call that had begun wrote one more
        assert text.generate("y", max_tokens=1).text == "a"

    def test_a_time_limit(self) -> None:
        text = session("abcdef")
        gate = runner(text).gate

        async def main() -> None:
            gate.clear()
            stream = text.astream("x")
            threading.Timer(0.1, gate.set).start()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)

        asyncio.run(main())
        assert text.generate("", max_tokens=1).text == "b"

    def test_errors_reach_the_task(self) -> None:
        text = session("abc")
        runner(text).broken = 2

        async def main() -> list[str]:
            return [piece async for piece in text.astream("x")]

        with pytest.raises(NotFiniteError):
            asyncio.run(main())
        assert text.generate("", max_tokens=1).text == "b"

    def test_a_loop_that_is_left(self) -> None:
        text = session("abcdef")

        async def main() -> None:
            stream = text.astream("x")
            async for _ in stream:
                break
            await stream.aclose()

        asyncio.run(main())
        text.flush()
        assert read_ids(text) == ids("xa")


def test_threads_take_turns() -> None:
    text = session("abcdefghij" * 20)
    stream = text.stream("x", max_tokens=100)
    errors: list[Exception] = []

    def pull() -> None:
        try:
            for _ in stream:
                time.sleep(0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert stream.generation.text == ("abcdefghij" * 20)[:100]
    assert len(read_ids(text)) == 100


def test_a_real_model_reads_what_its_session_would(tiny_bundle: Path) -> None:
    text = open_text_session(tiny_bundle)
    found = text.generate("THE KING", max_tokens=20, sampler=Sampler(0.8, seed=3))
    prompt = text.tokenizer.encode("THE KING", start=True)
    expected = list(open_session(tiny_bundle).generate(prompt, 20, Sampler(0.8, seed=3)))
    assert found.tokens == expected
    both = text.tokenizer.decode([*prompt, *expected])
    assert text.tokenizer.decode(prompt) + found.text == both


CALLS: list[Callable[[TextSession], object]] = [
    lambda text: text.read("x", learn=3),  # type: ignore[arg-type]
    lambda text: text.read(b"x"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("call", CALLS)
def test_wrong_types_are_named(call: Callable[[TextSession], object]) -> None:
    with pytest.raises(ConfigError, match=r"(learn is 3|text is b'x'); expected"):
        call(session())
