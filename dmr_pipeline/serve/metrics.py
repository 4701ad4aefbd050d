"""Counts of a server in Prometheus' text format. Labels are of fixed sets; nothing of any text is among them."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TENTHS = tuple(n / 10 for n in range(1, 11))
COUNTERS = {
    "dmr_requests_total": "Chat requests by the precision that served, why it did, and the outcome.",
    "dmr_tokens_total": "Tokens by kind: prompt (all of each transcript), cached (of these, not read again), completion.",
    "dmr_switches_total": "Turns at which another precision acted than the turn before.",
    "dmr_fail_open_total": "Decisions that a router did not give, or answers of another precision than was decided.",
    "dmr_upstream_errors_total": "Tries of an upstream that failed, by precision and kind.",
    "dmr_episodes_total": "Episodes that ended, by outcome.",
    "dmr_episodes_refused_total": "Episodes that ended and were not written down, since the log does not take such ones.",
    "dmr_log_errors_total": "Episodes that could not be written down.",
    "dmr_cost_total": "Cost of all turns, in the report's unit.",
    "dmr_cost_saved_total": "Cost of the same turns by the dearest precision alone, less theirs; at least what is known of it.",
    "dmr_releases_taken_up_total": "Times that another router was released and taken up.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "dmr_router_seconds": ("Time of decisions.", SECONDS),
    "dmr_first_token_seconds": ("Time to the first byte of an answer.", SECONDS),
    "dmr_token_seconds": ("Time of an answer for each of its tokens.", SECONDS),
    "dmr_probability": ("The router's probability that the dearest precision acts.", TENTHS),
}


class Metrics:
    def __init__(self) -> None:
        self._counts: dict[str, dict[tuple[tuple[str, str], ...], float]] = {name: {} for name in COUNTERS}
        self._buckets = {name: [0] * (len(edges) + 1) for name, (_, edges) in HISTOGRAMS.items()}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        self._counts[name][key] = self._counts[name].get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        self._buckets[name][bisect_left(HISTOGRAMS[name][1], value)] += 1
        self._sums[name] += value

    def total(self, name: str, **labels: str) -> float:
        """Over all label sets that hold these labels."""
        return sum(n for found, n in self._counts[name].items() if labels.items() <= dict(found).items())

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """
        Args:
            gauges: name -> what it is, and its value now.
        """
        return "\n".join(self._lines(gauges)) + "\n"

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        for name, help_text in COUNTERS.items():
            yield f"# HELP {name} {help_text}"
            yield f"# TYPE {name} counter"
            for labels, value in self._counts[name].items():
                shown = ",".join(f'{key}="{value}"' for key, value in labels)
                yield f"{name}{{{shown}}} {value:.10g}" if shown else f"{name} {value:.10g}"
        for name, (help_text, edges) in HISTOGRAMS.items():
            yield f"# HELP {name} {help_text}"
            yield f"# TYPE {name} histogram"
            below = 0
            for edge, here in zip([*map(str, edges), "+Inf"], self._buckets[name], strict=True):
                below += here
                yield f'{name}_bucket{{le="{edge}"}} {below}'
            yield f"{name}_sum {self._sums[name]:.10g}"
            yield f"{name}_count {below}"
        for name, (help_text, value) in gauges.items():
            yield f"# HELP {name} {help_text}"
            yield f"# TYPE {name} gauge"
            yield f"{name} {value:.10g}"
