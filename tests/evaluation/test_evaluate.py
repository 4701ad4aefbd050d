import json
from pathlib import Path

from dmr_pipeline.evaluation.evaluate import benchmark_notes


def test_notes_say_of_a_shop_where_its_catalogue_and_nouns_come_from(tmp_path: Path) -> None:
    summary = {"nouns": "every word of letters", "catalogue": "generated, 1,000 products", "test": {"games": 500}}
    (tmp_path / "manifest.json").write_text(json.dumps({"summary": summary}))
    assert benchmark_notes(tmp_path) == [
        "Catalogue of the shop: generated, 1,000 products.",
        "Nouns of the titles, which rewards compare: every word of letters.",
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"summary": {"test": {"games": 200}}}))
    assert benchmark_notes(tmp_path) == []
