"""How the documentation is built: `sphinx-build -W -n -b html docs docs/_build/html`. Nothing is fetched from a network."""

from __future__ import annotations

import sys
from pathlib import Path

import rlbridge

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "rlbridge"
version = release = rlbridge.__version__

extensions = ["myst_parser", "config_reference"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_ext", "examples"]

html_theme = "furo"
html_title = f"rlbridge {version}"
html_show_sphinx = False
html_copy_source = False
