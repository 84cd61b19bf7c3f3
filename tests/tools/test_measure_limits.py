"""The measurement of docs/concepts/limits.md, on a tiny model and short texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwl_export import open_session
from tests.bundles import VOCABULARY
from tools import measure_limits


def test_the_tables(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BEFORE": 20, "PART": 16, "SHOWN": (0, 1), "STREAM": 64}.items():
        monkeypatch.setattr(measure_limits, name, value)
    monkeypatch.setattr(measure_limits, "ONE_TOKEN", (1, 100))
    play = np.random.default_rng(0).integers(0, VOCABULARY, 1200)
    monkeypatch.setattr(measure_limits, "read_ids", lambda *_: play)
    measure_limits.main(tiny_bundle)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| read in between | norm | 1 to 16 | 17 to 32 |"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    titles = [row[0] for row in rows]
    assert titles[2:4] == ["1 token of weight 1", "1 token of weight 100"]
    assert float(rows[2][2]) < 1000
    assert "two tokens in turn" in titles
    assert lines[-2].startswith("a decode step: ")
    session = open_session(tiny_bundle)
    session.feed(play[:20])
    session.feed(play[20:21])
    assert float(rows[2][1]) == pytest.approx(session.learned().norms[0], rel=1e-3)
