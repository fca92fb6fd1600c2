"""The site of djdist, which ``make docs`` builds; it needs no internet."""

import shutil
import sys
import warnings
from importlib.metadata import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

warnings.filterwarnings("ignore", "No datajoint.json found")
import djdist  # noqa: E402 - the one beside this folder

TUTORIALS = HERE / "tutorials" / "notebooks"  # ignored by git: Sphinx follows no links out of its folder
shutil.rmtree(TUTORIALS, ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", TUTORIALS, ignore=shutil.ignore_patterns(".*"))

ADDRESSES = dict(line.split(", ") for line in metadata("djdist").get_all("Project-URL") or [])
REPOSITORY = ADDRESSES.get("Repository", "https://github.com/djdist/djdist")

project = "djdist"
author = "djdist contributors"
copyright = author
version = release = djdist.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",
]
smartquotes_action = "D"  # dashes; quotes may be those of SQL
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3
# [text](source:path/in/the/repository)
myst_url_schemes = {"http": None, "https": None, "source": f"{REPOSITORY}/blob/main/{{{{path}}}}"}
nb_execution_mode = "off"  # their outputs are committed, and the tests execute them

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!djdist\b).*")]  # of other projects' names nothing is known offline
autodoc_typehints = "none"  # docstrings say the types
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "djdist"
html_theme_options = {
    "github_url": REPOSITORY,
    "use_edit_page_button": False,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
