"""Parity: proof that a bundle's runtimes compute what PyTorch does.

    report = check_bundle(read_bundle(Path("bundle")), ids, candidates="onnxruntime,torch:float32")
    print(to_text(report))

`candidates` opens runtimes by name, `cases` and `schedule` make the calls, `drift` drives sessions
over them, `compare` measures, `tolerances` says what is allowed and why, `verdict` decides,
`report` holds it as data, `summary` and `junit` tell it. README.md beside this file has it all.
"""

from fwl_export.parity.candidates import Candidate, parse_candidate, parse_candidates
from fwl_export.parity.cases import CASES, Case
from fwl_export.parity.check import check_bundle
from fwl_export.parity.report.data import Report, read_report
from fwl_export.parity.report.junit import write_junit
from fwl_export.parity.report.text import to_markdown, to_text
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
    "parse_candidate",
    "parse_candidates",
    "read_report",
    "to_markdown",
    "to_text",
    "write_junit",
]
