"""Parity: proof that a bundle's runtimes compute what PyTorch does.

    report = check_bundle(read_bundle(Path("bundle")), ids, candidates="onnxruntime,torch:float32")
    print(to_text(report))

`candidates` opens runtimes by name, `cases` and `schedule` plan the calls, `drift` drives sessions
through them, `compare` measures, `tolerances` says what is allowed and why, `verdict` decides, and
`report` presents the result. README.md in this folder describes the method.
"""

from fwl_export.deprecations import renamed_attributes
from fwl_export.parity.candidates import Candidate, parse_candidate, parse_candidates
from fwl_export.parity.cases import CASES, Case, choose_cases
from fwl_export.parity.check import check_bundle
from fwl_export.parity.report import (
    Report,
    read_report,
    to_html,
    to_markdown,
    to_text,
    verdict_line,
    write_junit,
)
from fwl_export.parity.schedule import ROWS
from fwl_export.parity.tolerances import TABLE, Tolerance

__all__ = [
    "CASES",
    "ROWS",
    "TABLE",
    "Candidate",
    "Case",
    "Report",
    "Tolerance",
    "check_bundle",
    "choose_cases",
    "parse_candidate",
    "parse_candidates",
    "read_report",
    "to_html",
    "to_markdown",
    "to_text",
    "verdict_line",
    "write_junit",
]

__getattr__ = renamed_attributes(
    __name__,
    Backend="Candidate",
    parse_backend="parse_candidate",
    parse_backends="parse_candidates",
)
