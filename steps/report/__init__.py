"""The report of a grid: results.json, results.csv, a Markdown table and figures."""

from steps.report.build import ReportArtifact, RowResult, build

__all__ = ["ReportArtifact", "RowResult", "build"]
