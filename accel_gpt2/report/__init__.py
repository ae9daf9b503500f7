"""A run directory in pictures: one HTML page and the PNGs on it."""

from accel_gpt2.report.page import write_report

__all__ = ["write_report"]
