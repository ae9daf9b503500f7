"""A run directory or a comparison in pictures: one HTML page and the PNGs on it."""

from accel_gpt2.report.comparison import write_comparison_report
from accel_gpt2.report.page import write_report

__all__ = ["write_comparison_report", "write_report"]
