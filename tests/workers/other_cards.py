"""Runs a script with the dataset cards of another folder: ``other_cards.py FOLDER SCRIPT ...``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from gist.catalog import cards

if __name__ == "__main__":
    cards._PLACES = (Path(sys.argv[1]),)
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
