"""Documents written from committed results files alone: no number is typed by hand."""

from hybridlab.report.documents import report_files, stale_files, write_report

__all__ = ["report_files", "stale_files", "write_report"]
