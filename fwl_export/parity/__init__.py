"""Parity: proof that a bundle's runtimes compute what PyTorch does.

    report = check_bundle(read_bundle(Path("bundle")), ids)
    print(report.to_text())

`schedule` makes the calls, `drift` drives sessions over them, `compare` measures, `tolerances`
says what is allowed and why, `verdict` decides, `report` tells.
"""

from fwl_export.parity.report import Report
from fwl_export.parity.run import check_bundle
from fwl_export.parity.schedule import ROWS
from fwl_export.parity.tolerances import TABLE, Tolerance

__all__ = ["ROWS", "TABLE", "Report", "Tolerance", "check_bundle"]
