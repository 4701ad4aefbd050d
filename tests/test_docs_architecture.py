"""The committed pictures of the architecture are those that the code makes."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from dmr_pipeline.pipeline import STAGES
from tests.helpers.fake_project import REPOSITORY
from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    return load_script(REPOSITORY / "docs" / "architecture.py")


def test_committed_pictures_are_up_to_date(architecture: ModuleType) -> None:
    pictures = architecture.pictures()
    assert len(pictures) == 2
    for path, content in pictures.items():
        assert path.read_text(encoding="utf-8") == content, f"{path}: run `python docs/architecture.py`"


def test_each_module_of_the_package_has_a_box(architecture: ModuleType) -> None:
    boxes = set(re.findall(r">(\w+)</text>", architecture.draw_layers()))
    package = REPOSITORY / "dmr_pipeline"
    modules = {file.stem for file in package.glob("*.py")} | {
        file.parent.name for file in package.glob("*/__init__.py")
    }
    assert boxes == modules - {"__init__"}


def test_what_the_edges_import_is_found(architecture: ModuleType) -> None:
    assert architecture.imported("versioning") == ["DVC"]
    assert architecture.imported("defs")[0] == "Dagster"
    assert architecture.imported("rollout") == []


def test_no_arrow_is_missing(architecture: ModuleType) -> None:
    """Whatever a stage reads can be reached along the arrows, and each arrow is something that is read."""
    direct = {stage.name: architecture.direct_inputs(stage, STAGES) for stage in STAGES}

    def reached(name: str) -> set[str]:
        return set(direct[name]).union(*map(reached, direct[name]))

    for stage in STAGES:
        assert set(direct[stage.name]) <= set(stage.inputs) <= reached(stage.name)
    assert sum(map(len, direct.values())) == architecture.draw_stages(STAGES).count("<path d=") - 1
    assert direct["kl_router"] == ["sensitivity_dataset"]


def test_boxes_do_not_overlap(architecture: ModuleType) -> None:
    for content in architecture.pictures().values():
        found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', content)
        boxes = [tuple(map(float, box)) for box in found]
        assert len(boxes) >= len(STAGES)
        for i, (x, y, width, height) in enumerate(boxes):
            assert 0 <= x <= x + width <= architecture.WIDTH
            for left, top, wide, high in boxes[:i]:
                assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y


def test_no_line_is_wider_than_the_picture(architecture: ModuleType) -> None:
    """By the width that a letter of a common font has in the mean."""
    for path, content in architecture.pictures().items():
        texts = re.findall(
            r'<text x="([\d.]+)" y="[\d.]+" font-size="([\d.]+)"[^>]*text-anchor="start"[^>]*>([^<]+)<', content
        )
        assert len(texts) > 5
        for x, size, text in texts:
            assert float(x) + 0.52 * float(size) * len(text) < architecture.WIDTH + 8, (Path(path).name, text)
