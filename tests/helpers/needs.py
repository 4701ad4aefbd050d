"""What not every machine has: a test that needs it is skipped there, with the reason."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from dmr_pipeline.environments.alfworld.official.engine import is_installed
from dmr_pipeline.environments.webshop.nouns import installed_tagger

ALFWORLD_DATA = Path(os.environ.get("ALFWORLD_DATA", "no-data"))
OFFICIAL_GAMES = sorted((ALFWORLD_DATA / "json_2.1.1" / "valid_seen").glob("*/*/game.tw-pddl"))
"""Those of the split valid_seen."""
WEBSHOP_DATA = Path(os.environ.get("WEBSHOP_DATA", "no-data"))

official_games = pytest.mark.skipif(not OFFICIAL_GAMES, reason="no official ALFWorld games: $ALFWORLD_DATA is not set")
official_engine = pytest.mark.skipif(
    not is_installed(), reason="ALFWorld's own engine is not installed: pip install 'dmr-pipeline[alfworld]'"
)
webshop_files = pytest.mark.skipif(
    "WEBSHOP_DATA" not in os.environ, reason="no WebShop files: $WEBSHOP_DATA is not set"
)
spacy_model = pytest.mark.skipif(installed_tagger() != "spacy", reason="spaCy's model en_core_web_sm is not installed")
llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="llama.cpp's server is not installed: pip install xllamacpp"
)
