"""The offline dashboard: reads result rows, draws, writes one HTML file; also CSV and a summary for the terminal."""

from attention_zoo.report.build import build_report
from attention_zoo.report.sources import read
from attention_zoo.report.summary import Findings, headline, markdown_table, rich_table, write_csv

__all__ = ["Findings", "build_report", "headline", "markdown_table", "read", "rich_table", "write_csv"]
