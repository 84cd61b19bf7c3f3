"""The performance model of the GPU kernels, against counts worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.kernel_report import GPUS, main, occupancy, work


def _entry(**changes: int) -> dict[str, int]:
    return {"sm": 90, "registers": 64, "warps": 4, "shared_bytes": 0, **changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"registers": 32}, (16, 1.0, "warps")),
        ({"registers": 64}, (8, 0.5, "registers")),
        ({"registers": 65}, (7, 7 * 4 / 64, "registers")),
        ({"registers": 255, "warps": 8}, (1, 8 / 64, "registers")),
        ({"shared_bytes": 100 << 10}, (2, 2 * 4 / 64, "shared memory")),
        ({"sm": 75, "registers": 16, "warps": 1}, (16, 0.5, "programs")),
    ],
)
def test_occupancy(changes: dict[str, int], expected: tuple[int, float, str]) -> None:
    assert occupancy(_entry(**changes)) == expected


def test_decode_of_many_rows_moves_little_but_states() -> None:
    call = work(64, 1, 768, 3072, "float16", 90)
    states = 64 * 2 * 4 * 768 * 3072
    # Queries, keys and values in 2 bytes; outputs and decays in 4.
    assert call.bytes_moved == states + 64 * (2 * (2 * 768 + 3072) + 4 * 3072 + 4)
    assert call.flops == {"fp32": 5 * 64 * 768 * 3072}
    assert call.workspace_bytes == 0
    seconds = call.limits(GPUS[0])
    assert max(seconds, key=lambda name: seconds[name]) == "memory"


def test_prefill_counts_what_its_products_issue() -> None:
    # One chunk of 64 tokens and a state of one tile. Reading the state, writing it, and scores
    # times values (padded to 128 columns) take two tf32 passes each; the scores take one pass.
    call = work(1, 64, 128, 32, "float16", 90)
    assert call.flops == {
        "tf32": 2 * 2 * (2 * 64 * 128 * 32) + 2 * 2 * 64 * 64 * 128,
        "half": 2 * 64 * 64 * 128,
    }
    assert call.workspace_bytes == 2 * 4 * 64 * 32


def test_float32_stays_off_the_tensor_cores() -> None:
    assert work(1, 256, 768, 3072, "float32", 90).flops.keys() == {"fp32"}


def test_the_report_prints_both_tables_and_a_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**_entry(), "name": "decode_fp16_aligned", "kernel": "decode", "aligned": True}
    entry["spill_store_bytes"] = 8
    (tmp_path / "kernels.json").write_text(json.dumps({"kernels": [entry]}))
    monkeypatch.setattr(sys, "argv", ["kernel_report", str(tmp_path)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "90 decode_fp16_aligned 64 8 0.0 8 50% registers"
    summary = json.loads(lines[-1])
    assert summary["variants_that_spill"] == 1
    assert {call["gpu"] for call in summary["calls"]} == {gpu.name for gpu in GPUS}


def test_a_folder_without_kernels_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_report", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "kernels.json does not exist; compile" in capsys.readouterr().err
