"""Comparisons that need what not everyone has: they are left out aloud."""

import os
import sys
from pathlib import Path

from dmr_pipeline.environments.alfworld.official.engine import is_installed

_DATA = os.environ.get("ALFWORLD_DATA", "")
OFFICIAL = sorted((Path(_DATA) / "json_2.1.1" / "valid_seen").glob("*/*/game.tw-pddl")) if _DATA else []


def no_official_games() -> bool:
    if not OFFICIAL:
        sys.stderr.write("left out: official ALFWorld games ($ALFWORLD_DATA is not set)\n")
    return not OFFICIAL


def no_official_engine() -> bool:
    if not is_installed():
        sys.stderr.write("left out: comparison with the official ALFWorld engine (pip install -e '.[alfworld]')\n")
    return not is_installed()
