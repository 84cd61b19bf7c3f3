"""The HTML page: what it holds, how it behaves in a browser, and the table for notebooks."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export.bundle.manifest import read_bundle
from fwl_export.parity import check_bundle
from fwl_export.parity.compare import Place
from fwl_export.parity.report.html import to_html
from fwl_export.parity.report.worst_place import WorstPlace
from tests.bundles import VOCABULARY
from tests.parity.report import examples

_CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(_CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 100)
    found = check_bundle(
        read_bundle(tiny_bundle),
        ids,
        tokens=24,
        candidates="onnxruntime",
        cases="text",
        text="play.txt",
    )
    return found.to_dict()


def test_the_page_says_what_the_report_says(report: dict[str, Any]) -> None:
    page = to_html(report)
    assert "Within budget" in page
    assert all(escape(t["name"]) in page for t in report["candidates"][0]["runs"][0]["tensors"])
    assert page.count("<h1>") == 1
    assert page.count('role="img"') == 2  # free-running and teacher-forced
    for outside in ("http:", "https:", "src=", "@import", "<link"):
        assert outside not in page


def test_everything_is_escaped(report: dict[str, Any]) -> None:
    evil = "</script><script>alert(1)</script>"
    planted = copy.deepcopy(report)
    planted["text"]["name"] = planted["command"] = planted["bundle"]["name"] = evil
    planted["problems"] = [evil]
    planted["candidates"][0]["name"] = evil
    planted["candidates"][0]["runs"][0]["tensors"][1]["name"] = evil
    planted["candidates"][0]["worst"]["tokens"] = [{"text": evil}]
    page = to_html(planted)
    assert page.count("<script>") == 1
    assert escape(evil) in page


def test_infinite_errors_and_runtimes_that_did_not_run(report: dict[str, Any]) -> None:
    broken = copy.deepcopy(report)
    broken["status"] = "outside"
    candidate = broken["candidates"][0]
    candidate["use"] = None
    tensor = candidate["runs"][0]["tensors"][0]
    tensor["use"] = tensor["relative_rms"][-1] = tensor["uses"][-1] = None
    absent = {**candidate, "name": "tensorrt", "runs": [], "status": "could not run"}
    broken["candidates"].append({**absent, "reason": "no GPU", "worst": None})
    page = to_html(broken)
    assert "Outside budget" in page
    assert "infinite" in page
    assert "no GPU" in page


def test_notebooks_show_a_table_with_the_verdict_and_everything_escaped() -> None:
    evil = "<script>alert(1)</script>"
    lost = replace(examples.LOST, name=evil, reason=evil)
    place = WorstPlace("text", "free", "logits", 31, 5.0, Place(1, 31, (0, 2), 2.0, 1.0), [], 0)
    found = replace(
        examples.report(examples.GOOD, examples.WRONG, lost),
        bundle=evil,
        reference=evil,
        worst=[None, place, None],
    )
    page = found._repr_html_()
    assert f"Outside budget: some runtime; could not run: {escape(evil)}</b>" in page
    assert page.count("<tr>") == 4
    assert "<td>500%</td><td>logits (text, free-running)</td>" in page
    assert evil not in page
    assert page.count(escape(evil)) == 6


@needs_browser
def test_sorting_works_and_nothing_is_logged_or_fetched(
    report: dict[str, Any], tmp_path: Path
) -> None:
    script = """
      const table = document.querySelector("table.sortable");
      const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
      const button = table.querySelector("button");
      button.click(); const down = names().join(); button.click(); const up = names().join();
      const loaded = performance.getEntriesByType("resource").length;
      document.body.innerHTML = `<p id="result">${down}|${up}|${loaded}</p>`;
    """
    planted = copy.deepcopy(report)
    planted["text"]["name"] = "</script><script>console.error('not escaped')</script>"
    page = to_html(planted).replace("</body>", f"<script>{script}</script></body>")
    result, log = in_browser(tmp_path, page)
    *sorted_names, loaded = result.split("|")
    down, up = (names.split(",") for names in sorted_names)
    assert loaded == "0", "nothing is fetched"
    assert up == down[::-1]
    assert sorted(up) == sorted(t["name"] for t in report["candidates"][0]["runs"][0]["tensors"])
    assert "CONSOLE" not in log


@needs_browser
def test_the_log_of_the_browser_tells_errors(tmp_path: Path) -> None:
    _, log = in_browser(tmp_path, "<p id='result'>x</p><script>nonsense()</script>")
    assert "CONSOLE" in log


@needs_browser
def test_400_pixels_are_enough(report: dict[str, Any], tmp_path: Path) -> None:
    planted = copy.deepcopy(report)
    planted["command"] = "x" * 300
    inner = escape(to_html(planted).replace("<details>", "<details open>"), quote=True)
    page = f"""<iframe width="400" height="900" srcdoc="{inner}"></iframe><p id="result"></p>
      <script>document.querySelector("iframe").addEventListener("load", (event) => {{
        const root = event.target.contentDocument.documentElement;
        document.getElementById("result").textContent = `${{root.scrollWidth}}`;
      }});</script>"""
    result, _ = in_browser(tmp_path, page)
    assert 300 < int(result) <= 400


def in_browser(folder: Path, page: str) -> tuple[str, str]:
    """Load a page; return the text of its element #result and the browser's log."""
    assert _CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
        *("--enable-logging=stderr", "--virtual-time-budget=3000"),
    ]
    done = subprocess.run(
        [_CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'id=["\']result["\']>(.*?)</p>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    return found[1].strip(), done.stderr
