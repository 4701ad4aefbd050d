"""Intervals of shares, and differences of shares, as text, in percent or in points."""

from dmr_pipeline.evaluation.results import Interval


def in_brackets(interval: Interval, digits: int = 1) -> str:
    return f"[{interval[0] * 100:.{digits}f}, {interval[1] * 100:.{digits}f}]"


def in_percent(interval: Interval, digits: int = 1) -> str:
    return f"{interval[0] * 100:.{digits}f} to {interval[1]:.{digits}%}"


def seen_in_points(smallest_difference: float | None) -> str:
    """What games could have shown at the least."""
    return "none" if smallest_difference is None else f"{smallest_difference * 100:.1f}"


def in_points(interval: Interval) -> str:
    """Of a difference, with signs."""
    return f"{interval[0] * 100:+.1f} to {interval[1] * 100:+.1f}"
