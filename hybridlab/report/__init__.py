"""Documents written from committed results files alone: no number is typed by hand."""

from hybridlab.report.documents import report_files, stale_files, write_report
from hybridlab.report.evidence import Evidence
from hybridlab.report.pictures import charts_beginning, claims_browser, criteria_table
from hybridlab.report.validation import at_a_glance
