"""How benchmarks are found by name."""

from importlib.metadata import EntryPoint

import pytest

from dmr_pipeline import benchmarks
from dmr_pipeline.environments.alfworld.benchmark import GeneratedGames
from dmr_pipeline.environments.benchmark import Benchmark, benchmark_of
from dmr_pipeline.errors import UserError
from dmr_pipeline.recipe.reading import load_recipe, recipe_names
from tests.helpers.fake_project import REPOSITORY


def install(monkeypatch: pytest.MonkeyPatch, **places: str) -> None:
    """As a package does whose entry points these are."""
    points = [EntryPoint(name, place, benchmarks.ENTRY_POINTS) for name, place in places.items()]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [point for point in points if point.group == group and name in (None, point.name)]

    monkeypatch.setattr(benchmarks, "entry_points", entry_points)
    monkeypatch.setattr(benchmarks, "_KNOWN", dict(benchmarks._KNOWN))


@pytest.mark.parametrize("name", benchmarks._KNOWN)
def test_each_has_the_name_that_its_section_has_by_default(name: str) -> None:
    found = benchmarks.find(name)
    assert issubclass(found, Benchmark)
    assert found.section.model_fields["environment"].default == name
    assert found.task_types


def test_every_recipe_has_its_benchmark() -> None:
    for name in recipe_names(REPOSITORY / "recipes"):
        settings = load_recipe(name, REPOSITORY / "recipes").benchmark
        assert type(settings) is benchmark_of(settings).section


def test_an_installed_package_brings_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, hanoi="dmr_pipeline.environments.alfworld.benchmark:GeneratedGames")
    assert "hanoi" in benchmarks.names()
    assert benchmarks.find("hanoi") is GeneratedGames
    with pytest.raises(KeyError):
        benchmarks.find("mars")


@pytest.mark.parametrize("place", ["no_such_package.games:Hanoi", "dmr_pipeline.environments.base:Hanoi"])
def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    install(monkeypatch, hanoi=place)
    with pytest.raises(UserError, match=f"benchmark 'hanoi': there is no {place}") as caught:
        benchmarks.find("hanoi")
    assert "\n" not in str(caught.value)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a benchmark called 'alfworld' already"):
        benchmarks.register(GeneratedGames)
