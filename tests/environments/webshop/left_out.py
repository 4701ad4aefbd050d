"""Comparisons that need the authors' files: they are left out aloud."""

import os
import sys
from pathlib import Path

WEBSHOP_DATA = Path(os.environ.get("WEBSHOP_DATA", ""))


def no_webshop_files() -> bool:
    there = "WEBSHOP_DATA" in os.environ
    if not there:
        sys.stderr.write("left out: the authors' WebShop files ($WEBSHOP_DATA is not set)\n")
    return not there
