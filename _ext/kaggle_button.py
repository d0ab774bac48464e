"""Sphinx extension: adds "Kaggle" to the launch buttons of every chapter that is a notebook.

The theme offers Binder, Colab, JupyterHub and Thebe, but not Kaggle. Reads the repository's address from
the theme options (``_config.yml``); touches nothing but the list of header buttons in a page's context.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

KAGGLE = "https://kaggle.com/kernels/welcome"


def setup(app) -> dict[str, Any]:
    """Register the handler. The theme makes its launch group at priority 501, so ours comes after."""
    app.connect("html-page-context", add_kaggle_button, priority=600)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def kaggle_url(repository: str, branch: str, path: str) -> str:
    """The address that opens the notebook at `path` (from the repository's top) as a new Kaggle notebook."""
    blob = f"{repository.rstrip('/')}/blob/{branch}/{path}"
    return f"{KAGGLE}?src={quote(blob, safe=':/')}"


def add_kaggle_button(app, pagename: str, templatename: str, context: dict[str, Any], doctree) -> None:
    """Append the button to the page's launch group; make the group where no other launcher has.

    Does nothing on generated pages (search, index), on pages that are not notebooks, under a theme without
    header buttons, and where no repository is configured.
    """
    options = app.config.html_theme_options
    repository = options.get("repository_url")
    header = context.get("header_buttons")
    if doctree is None or header is None or not repository:
        return
    source = app.env.doc2path(pagename, base=False)
    if not str(source).endswith(".ipynb"):
        return
    path = PurePosixPath(options.get("path_to_docs", "").strip("/")) / source
    button = {
        "type": "link",
        "text": "Kaggle",
        "tooltip": "Launch on Kaggle",
        "icon": "fab fa-kaggle",
        "url": kaggle_url(repository, options.get("repository_branch") or "main", str(path)),
    }
    _launch_group(header)["buttons"].append(button)


def _launch_group(header: list[dict[str, Any]]) -> dict[str, Any]:
    for group in header:
        if group.get("label") == "launch-buttons":
            return group
    group = {
        "type": "group",
        "tooltip": "Launch interactive content",
        "icon": "fas fa-rocket",
        "buttons": [],
        "label": "launch-buttons",
    }
    header.append(group)
    return group
