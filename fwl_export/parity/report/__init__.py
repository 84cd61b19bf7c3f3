"""The result of a check: as data, text, Markdown, JUnit XML and an HTML page."""

from fwl_export.parity.report.data import CaseRun, Report, read_report
from fwl_export.parity.report.html import to_html
from fwl_export.parity.report.junit import write_junit
from fwl_export.parity.report.text import to_markdown, to_text, verdict_line

__all__ = [
    "CaseRun",
    "Report",
    "read_report",
    "to_html",
    "to_markdown",
    "to_text",
    "verdict_line",
    "write_junit",
]
