"""Sphinx extension: a page holds each of its small scripts once, and none that nothing on it uses.

Sphinx writes scripts twice that an extension adds while pages are read, so that browsers stop at the second
``const``. sphinx-thebe, which Jupyter Book loads for everybody, adds its scripts although this book offers no
cells that run in the page. Reads and changes the list of scripts in a page's context.
"""

from __future__ import annotations

from typing import Any


def setup(app) -> dict[str, Any]:
    """Register the handler, after all others that add scripts."""
    app.connect("html-page-context", tidy_scripts, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def tidy_scripts(app, pagename: str, templatename: str, context: dict[str, Any], doctree) -> None:
    """Drop thebe's scripts, where no page has its button, and every repetition."""
    buttons = app.config.html_theme_options.get("launch_buttons", {})
    kept = {}
    for script in context.get("script_files", []):
        name = str(getattr(script, "filename", None) or script)
        body = getattr(script, "attributes", {}).get("body", "")
        if buttons.get("thebe") or "thebe" not in f"{name} {body}".lower():
            kept.setdefault((name if not body else "", body), script)
    context["script_files"] = list(kept.values())
