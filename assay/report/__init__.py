"""Results -> report.html. `write_report(folder)` for a study's folder, `render(results, title)` for Results in hand."""

from assay.report.page import render, write_report

__all__ = ["render", "write_report"]
