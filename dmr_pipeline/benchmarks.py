"""Which benchmarks there are: the names that recipes give them (`benchmark.environment`), and where each is written down."""

from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, TypeVar

from dmr_pipeline.errors import UserError

ENTRY_POINTS = "dmr_pipeline.benchmarks"
"""Group of the entry points by which an installed package brings benchmarks: name -> "module:class"."""

_KNOWN: dict[str, Any] = {
    "alfworld": "dmr_pipeline.environments.alfworld.benchmark:GeneratedGames",
    "alfworld-official": "dmr_pipeline.environments.alfworld.benchmark:OfficialGames",
    "webshop": "dmr_pipeline.environments.webshop.benchmark:GeneratedShop",
    "webshop-official": "dmr_pipeline.environments.webshop.benchmark:OfficialShop",
}
"""Name -> a class (`environments.benchmark.Benchmark`), or where it is: it is imported once a recipe names it."""

BenchmarkClass = TypeVar("BenchmarkClass", bound=type)


def register(benchmark: BenchmarkClass) -> BenchmarkClass:
    """Make a benchmark known in this process, under the name that its recipe section has by default; a class decorator.

    Raises:
        ValueError: another one has this name.
    """
    name = benchmark.section.model_fields["environment"].default  # type: ignore[attr-defined] # a Benchmark: see above
    if name in _KNOWN:
        raise ValueError(f"there is a benchmark called {name!r} already")
    _KNOWN[name] = benchmark
    return benchmark


def names() -> list[str]:
    """Of all benchmarks, sorted."""
    return sorted({*_KNOWN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find(name: str) -> Any:  # noqa: ANN401 - a Benchmark, which this module is below
    """The class of a benchmark.

    Raises:
        KeyError: none has this name.
        UserError: an installed package names a class that cannot be imported.
    """
    known = _KNOWN.get(name)
    if known is not None and not isinstance(known, str):
        return known
    place = known or next((point.value for point in entry_points(group=ENTRY_POINTS, name=name)), None)
    if place is None:
        raise KeyError(name)
    try:
        _KNOWN[name] = resolve_name(place)
    except (ImportError, AttributeError) as error:
        raise UserError(f"benchmark {name!r}: there is no {place} ({error}): mend or remove the package") from error
    return _KNOWN[name]
