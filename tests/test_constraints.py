"""The versions of constraints.txt."""

import tomllib
from importlib.metadata import distributions

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.helpers.fake_project import REPOSITORY


def constrained() -> dict[str, SpecifierSet]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one.specifier for one in found}


def test_all_take_the_oldest_python() -> None:
    """That of Debian 12 is 3.11.2."""
    said = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    (oldest,) = SpecifierSet(said)
    wanted, seen, refused = constrained(), set[str](), {}
    for distribution in distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if name in wanted and wanted[name].contains(distribution.version):
            seen.add(name)
            needs = distribution.metadata.get("Requires-Python")
            if needs is not None and not SpecifierSet(needs).contains(oldest.version):
                refused[name] = needs
    assert len(seen) > 100
    assert not refused
