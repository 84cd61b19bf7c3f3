"""The example programs print what Python computes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.runtimes.text import score_ids
from tests.bundles import VOCABULARY


def run(runtime: Path, program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in (program, *arguments)],
        env={**os.environ, "FWL_RUNTIME": str(runtime)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["generate", "generate_c"])
def test_generate(libfwl: Path, runtime: Path, anchored_bundle: Path, name: str) -> None:
    done = run(runtime, libfwl / name, anchored_bundle, 20, 5, 9, 63)
    assert done.returncode == 0, done.stderr
    expected = open_session(anchored_bundle, plugin="none").generate([5, 9, 63], 20)
    assert done.stdout.split() == [str(token) for token in expected]
    wrong = run(runtime, libfwl / name, anchored_bundle, 20, 64)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: token id 64 (row 0, position 0) is out of range")
    assert run(runtime, libfwl / name).returncode == 2


def test_score(libfwl: Path, runtime: Path, anchored_bundle: Path, tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, VOCABULARY, 301)
    (tmp_path / "ids").write_text(" ".join(map(str, text)))
    done = run(runtime, libfwl / "score", anchored_bundle, tmp_path / "ids")
    session = open_session(anchored_bundle, plugin="none")
    expected = score_ids(session, text).perplexity
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)
    # Read a document, save the state, and continue in another process and language.
    state = tmp_path / "a.state"
    first = run(runtime, libfwl / "score", anchored_bundle, tmp_path / "ids", state)
    assert first.stdout == done.stdout
    python = session.another()
    python.load_state(state)
    assert python.positions == [300]
    second = run(runtime, libfwl / "score", anchored_bundle, tmp_path / "ids", state)
    assert float(second.stdout) == pytest.approx(score_ids(python, text).perplexity, rel=1e-5)

    for wrong in ("1 2 64", "1 2 -1", "1 2 x 4", "1"):  # the last id is predicted but not read
        (tmp_path / "ids").write_text(wrong)
        refused = run(runtime, libfwl / "score", anchored_bundle, tmp_path / "ids")
        assert refused.returncode == 1, wrong
        assert refused.stderr.startswith("error: "), wrong


def test_serve_rows(libfwl: Path, runtime: Path, anchored_bundle: Path) -> None:
    done = run(runtime, libfwl / "serve_rows", anchored_bundle)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 64
    session = open_session(anchored_bundle, plugin="none")
    for n, line in enumerate(lines):
        prompt = [(n * 31 + i * 17) % VOCABULARY for i in range(3 + n % 7)]
        session.reset()
        assert line.split() == [str(token) for token in session.generate(prompt, 12)], n


def test_rollback(libfwl: Path, runtime: Path, anchored_bundle: Path) -> None:
    text = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    done = run(runtime, libfwl / "rollback_c", anchored_bundle, 1.5, *text)
    assert done.returncode == 0, done.stderr
    usual, heavy, after = map(float, done.stdout.split())
    session = open_session(anchored_bundle, plugin="none")
    session.feed(text)
    assert usual == pytest.approx(session.learned().norms[0], rel=1e-5)
    session.feed(text, np.full(40, 10.0))
    assert heavy == pytest.approx(session.learned().norms[0], rel=1e-4)
    assert heavy > 1.5 * usual
    assert after == usual
    kept = run(runtime, libfwl / "rollback_c", anchored_bundle, 1000, *text)
    assert kept.stdout.split()[2] == kept.stdout.split()[1]
    assert run(runtime, libfwl / "rollback_c", anchored_bundle).returncode == 2
    assert run(runtime, libfwl / "rollback_c", anchored_bundle, 2, -1).stderr.startswith("error: t")


def test_soak(
    libfwl: Path, runtime: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "ORT_DISABLE_TELEMETRY", "1"
    )  # otherwise memory grows once; see libfwl's README
    # A leak of 30 bytes per step, or of 70 bytes per round, would be 1 % of the anonymous memory.
    done = run(runtime, libfwl / "soak", tiny_bundle, 5000, 2000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(" in ")[0] for line in done.stdout.splitlines()[::3]] == [
        "steps: 5000",
        "rounds: 2000",
    ]
    assert run(runtime, libfwl / "soak", tiny_bundle, 5000, 0).returncode == 2
