"""Measure what heavy tokens do to a session, and what the norms of what was learned are.

For each case a session reads the beginning of the play that ships, then some tokens with a weight
or ids of the case, then the play again. The tables show the perplexity of the play after that, per
token and in stretches of 256 tokens, and the norms that `Session.learned` tells.

    python -m tools.measure_limits demo-bundle
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from fwl_export.bundle.manifest import Bundle, read_bundle
from fwl_export.bundle.state import Array
from fwl_export.bundle.tokenizer import read_ids
from fwl_export.demo import HELD_OUT_PLAY
from fwl_export.errors import NotFiniteError
from fwl_export.runtimes import Session, open_session
from fwl_export.runtimes.text import bundle_tokenizer, token_losses

BEFORE = 1024  # tokens of the play that are read before the case
PART = 256  # tokens of one stretch
SHOWN = (0, 3, 7)  # numbers of the stretches after the case that are shown
ONE_TOKEN = (1, 3, 10, 30, 100, 1e3, 1e4)  # weights
STREAM = 1 << 14  # tokens of a long text
CLIPS = (math.inf, 2000, 1000, 500, 250, 100)  # norms
CLIPPED_TEXT = 4096  # tokens of the play that are read under each norm


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder of the demo model's bundle.")],
) -> None:
    """Print the tables of docs/concepts/limits.md."""
    opened = read_bundle(bundle)
    play = read_ids(HELD_OUT_PLAY, bundle_tokenizer(opened))
    session = open_session(opened, threads=1, max_learning_weight=math.inf)
    random = np.random.default_rng(0)
    vocabulary = session.vocab_size
    _heavy_tokens(session, play, random.integers(0, vocabulary, 1024))
    _norms(session, play, random)
    _clipped(opened, play, random)
    _times(opened, play)


def _heavy_tokens(session: Session, play: Array, noise: Array) -> None:
    shown = " | ".join(f"{n * PART + 1} to {(n + 1) * PART}" for n in SHOWN)
    print(f"| read in between | norm | {shown} |\n|---|---|{'---|' * len(SHOWN)}")
    here = play[BEFORE:]
    for weight in ONE_TOKEN:
        _row(session, play, f"1 token of weight {weight:g}", here[:1], weight)
    for count in (64, 256, 1024):
        _row(session, play, f"{count} tokens of weight 10", here[:count], 10)
    _row(session, play, f"{len(noise)} random tokens of weight 1", noise, 1)
    _row(session, play, f"{len(noise)} random tokens of weight 10", noise, 10)


def _row(session: Session, play: Array, title: str, ids: Array, weight: float) -> None:
    session.reset()
    _perplexities(session, play[: BEFORE + 1])
    _read(session, ids, weight)
    norm = session.learned().norms[0]
    rest = play[BEFORE + 1024 :][: (max(SHOWN) + 1) * PART + 1]  # the same text after every case
    try:
        found = _perplexities(session, rest)
    except NotFiniteError:
        found = [math.inf] * (max(SHOWN) + 1)
    print(f"| {title} | {norm:.4g} | {' | '.join(f'{found[n]:.4g}' for n in SHOWN)} |", flush=True)


def _norms(session: Session, play: Array, random: np.random.Generator) -> None:
    texts: dict[str, Callable[[], Array]] = {
        "the play": lambda: play[:STREAM],
        "one token, repeated": lambda: np.full(STREAM, 7),
        "two tokens in turn": lambda: np.tile([5, 9], STREAM // 2),
        "random tokens": lambda: random.integers(0, session.vocab_size, STREAM),
    }
    print("\n| text | largest norm |\n|---|---|")
    for title, ids in texts.items():
        session.reset()
        norms = [_norm_after(session, part) for part in np.split(ids(), STREAM // PART)]
        print(f"| {title} | {max(norms):.4g} |", flush=True)


def _norm_after(session: Session, ids: Array) -> float:
    session.feed(ids, last_only=True)
    return session.learned().norms[0]


def _clipped(bundle: Bundle, play: Array, random: np.random.Generator) -> None:
    """Print what `clip_update_norm` does to texts: to the play, and to it after repeated tokens."""
    print("\n| clip_update_norm | the play | after 2048 repeated tokens | after random ones |")
    print("|---|---|---|---|")
    repeated = np.full(2048, 7)
    noise = random.integers(0, bundle.manifest.config.vocab_size, 2048)
    for norm in CLIPS:
        session = open_session(bundle, threads=1, clip_update_norm=norm)
        cells = []
        for before in (play[:0], repeated, noise):
            session.reset()
            for part in np.array_split(before, max(len(before) // PART, 1)):
                if len(part):
                    session.feed(part, last_only=True)
            losses = np.log(_perplexities(session, play[: CLIPPED_TEXT + 1]))
            cells.append(f"{math.exp(losses.mean()):.4g}")
        shown = "none" if norm == math.inf else f"{norm:g}"
        print(f"| {shown} | {' | '.join(cells)} |", flush=True)


def _times(bundle: Bundle, play: Array) -> None:
    """Compare decode steps and prefill without limits and with each, in turns, in CPU time."""
    limits: tuple[dict[str, Any], ...] = ({}, {"max_update_norm": 1e9}, {"clip_update_norm": 500})
    sessions = [open_session(bundle, threads=1, **each) for each in limits]
    steps = [_seconds(sessions, play[n : n + 1]) for n in range(min(2048, len(play)))]
    off, on, clips = np.mean(steps, 0) * 1e3  # the mean, because one step in 32 is clipped
    print(f"\na decode step: {off:.3f} ms", end="")
    print(f", with max_update_norm {on / off:.3f} times, with clip_update_norm {clips / off:.3f}")
    starts = range(0, min(16 * PART, len(play) - PART + 1), PART)
    prefill = [_seconds(sessions, play[n : n + PART]) for n in starts]
    off, _, clips = np.median(prefill, 0) * 1e3
    print(f"{PART} tokens at once: {off:.1f} ms, with clip_update_norm {clips / off:.2f} times")


def _seconds(sessions: Sequence[Session], ids: Array) -> list[float]:
    found = []
    for session in sessions:
        began = time.process_time()
        session.feed(ids, last_only=True)
        found.append(time.process_time() - began)
    return found


def _read(session: Session, ids: Array, weight: float) -> None:
    session.feed(ids, np.full(len(ids), weight), last_only=True)


def _perplexities(session: Session, ids: Array) -> list[float]:
    """Read a text with weight 1, and return the perplexity of each stretch of it."""
    found = []
    for start in range(0, len(ids) - 1, PART):
        part = ids[start : start + PART + 1]
        logits = session.feed(part[:-1])
        loss = float(token_losses(logits[0], part[1:]).mean())
        found.append(math.exp(loss) if loss < 700 else math.inf)
    return found


if __name__ == "__main__":
    typer.run(main)
