"""The README's picture is the one that the committed table makes."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.fake_project import REPOSITORY
from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    return load_script(REPOSITORY / "docs" / "picture.py")


def test_points_are_the_rows_of_the_table(picture: ModuleType) -> None:
    text = picture.TABLE.read_text(encoding="utf-8")
    points = {point.policy: point for point in picture.points(text)}
    assert list(points) == list(picture.LOOKS)
    assert points["kl_router"][1:] == (86.0, 80.5, 90.1, 0.784)
    assert all(point.low <= point.success <= point.high for point in points.values())


def test_the_picture_is_up_to_date(picture: ModuleType, tmp_path: Path) -> None:
    """Coordinates, as far as another matplotlib would give them too."""
    picture.draw(picture.points(picture.TABLE.read_text(encoding="utf-8")), tmp_path / "new.svg")
    new, committed = (
        [float(number) for number in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+"', text)]
        for text in ((tmp_path / "new.svg").read_text(), picture.PICTURE.read_text())
    )
    assert len(new) > len(picture.LOOKS)
    assert new == pytest.approx(committed, abs=0.5)
