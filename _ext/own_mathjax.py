"""Sphinx extension: formulas are drawn by a MathJax that lies in the book, so that they show offline, too.

Sphinx's own default loads MathJax from another host whenever a page is opened. Here one file goes along with
the pages: MathJax with its fonts as SVG shapes, from the package sphinx-mathjax-offline, whose own extension
would copy all of its 24 MB into each book.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

PACKAGE = "sphinx-mathjax-offline"
FILE = "tex-svg.js"


def setup(app) -> dict[str, Any]:
    """Name the file as MathJax's place, and copy it when the pages are written."""
    app.setup_extension("sphinx.ext.mathjax")
    app.config.mathjax_path = FILE
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def copy_mathjax(app, error: Exception | None) -> None:
    """Put the file beside the pages' other static files; ExtensionError where the package is missing."""
    if error is None and app.builder.format == "html":
        copy_asset(str(mathjax_file()), str(Path(app.outdir) / "_static"))


def mathjax_file() -> Path:
    """Where the package keeps the file; ExtensionError where it does not."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == FILE:
            return Path(file.locate())
    raise ExtensionError(f"{PACKAGE} with its {FILE} is needed for formulas: pip install -e '.[book]'")
