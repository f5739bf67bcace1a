from __future__ import annotations

import os

import gist

# The reference imports DGL, which writes a file into the home directory if no backend is named.
os.environ.setdefault("DGLBACKEND", "pytorch")

project = "gist"
author = "The gist authors"
copyright = f"2026, {author}"
release = version = gist.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# A tutorial that fails, fails the build. They run in a temporary folder and never from a cache,
# which would not notice that the code under them has changed.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300

# torchvision's compiled part may be for another build of torch; the reference needs names alone.
autodoc_mock_imports = ["timm", "torchvision"]
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Links to other projects need their inventories, so a network.
if os.environ.get("GIST_DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "torch_geometric": ("https://pytorch-geometric.readthedocs.io/en/stable", None),
    }
