"""No test module is a library: what tests share is in tests/helpers or is a fixture of a conftest."""

import re

from tests.helpers.fake_project import REPOSITORY

BORROWED = re.compile(r"\b(?:from|import) +tests\.(?!helpers\b)[\w.]+")


def test_tests_import_helpers_alone():
    """In the text of scripts that they start too."""
    files = sorted((REPOSITORY / "tests").rglob("*.py"))
    found = {
        str(file.relative_to(REPOSITORY)): borrowed
        for file in files
        if (borrowed := BORROWED.findall(file.read_text(encoding="utf-8")))
    }
    assert len(files) > 100
    assert found == {}
