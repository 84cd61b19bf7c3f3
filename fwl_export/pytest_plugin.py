"""pytest plugin: the parity of a bundle as a test.

pytest finds the fixture wherever this package is installed:

    def test_engine(fwl_parity):
        fwl_parity("my-bundle", candidates=["onnxruntime", "tensorrt"], tokens=500)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from fwl_export.parity import Report


@pytest.fixture
def fwl_parity(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., Report]:
    """Return a function that checks a bundle and fails the test unless every candidate passes.

    It takes the bundle's folder and, all optional, `candidates`, `tokens`, `text` (the path of a
    text file) and the other keywords of `fwl_export.parity.check_bundle`, and returns the report.
    The summary is attached to the test: pytest prints it with a failure, and JUnit files have the
    verdict as a property.
    """

    def check(
        bundle: str | Path,
        candidates: str | Sequence[str] = "onnxruntime",
        tokens: int = 500,
        text: str | Path | None = None,
        **options: Any,
    ) -> Report:
        from pathlib import Path

        from fwl_export.bundle.manifest import read_bundle
        from fwl_export.bundle.tokenizer import read_ids
        from fwl_export.demo import HELD_OUT_PLAY
        from fwl_export.parity import check_bundle, to_text, verdict_line
        from fwl_export.runtimes.text import bundle_tokenizer

        opened = read_bundle(Path(bundle))
        source = Path(text) if text else HELD_OUT_PLAY
        ids = read_ids(source, bundle_tokenizer(opened))
        report = check_bundle(
            opened, ids, tokens, candidates=candidates, text=source.name, **options
        )
        request.node.add_report_section("call", "fwl_parity", to_text(report))
        record_property("fwl_parity", verdict_line(report))
        if not report.passed:
            pytest.fail("\n".join(report.problems()), pytrace=False)
        return report

    return check
