"""Sphinx extension: the book as one page (and so as a PDF) builds like the book of many pages.

Sphinx looks for an extension's nodes under the builder's name first and, only where nothing at all is listed
there, under its format. sphinx-exercise lists its nodes for ``singlehtml``, which hides those that other
extensions list for ``html``: sphinx-design's cards, for one. Adds the hidden ones. And Sphinx writes the page
into the first page's folder, with links as from the top: it is moved there, to ``index.html``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def setup(app) -> dict[str, Any]:
    """Register the handlers; the last one after Jupyter Book has written a redirection to ``index.html``."""
    app.connect("builder-inited", add_hidden_nodes)
    app.connect("build-finished", move_page, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def add_hidden_nodes(app) -> None:
    """Let ``singlehtml`` draw every node that ``html`` draws."""
    handlers = app.registry.translation_handlers
    handlers["singlehtml"] = handlers.get("html", {}) | handlers.get("singlehtml", {})


def move_page(app, exception: Exception | None) -> None:
    """Let the page stand where its links to styles and images lead, and its links within it stay within."""
    page = Path(app.outdir) / f"{app.config.root_doc}.html"
    if app.builder.name != "singlehtml" or exception or not page.exists():
        return
    text = page.read_text(encoding="utf-8").replace(f'href="{app.config.root_doc}.html#', 'href="#')
    page.unlink()
    (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")
