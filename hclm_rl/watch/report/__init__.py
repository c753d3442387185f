"""One self-contained HTML page of one or more runs; needs the extra `report`."""

from .page import write_report
from .runs import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
