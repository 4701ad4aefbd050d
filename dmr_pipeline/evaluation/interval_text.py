"""Intervals of shares as text, in percent or in points."""

from dmr_pipeline.evaluation.results import Interval


def in_brackets(interval: Interval, digits: int = 1) -> str:
    return f"[{interval[0] * 100:.{digits}f}, {interval[1] * 100:.{digits}f}]"


def in_percent(interval: Interval, digits: int = 1) -> str:
    return f"{interval[0] * 100:.{digits}f} to {interval[1]:.{digits}%}"


def in_points(interval: Interval) -> str:
    """Of a difference, with signs."""
    return f"{interval[0] * 100:+.1f} to {interval[1] * 100:+.1f}"
