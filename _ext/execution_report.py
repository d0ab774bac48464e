"""Sphinx extension: writes down how each notebook's execution went, for `scripts/build_book.py` to report.

Writes one file, ``executions.json``, beside the folder of HTML pages, at the end of a build:
``{page: {"seconds": float, "finished": Unix time, "succeeded": bool, "error": str or null}}``.
Reads what myst-nb recorded; changes nothing in the pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_NAME = "executions.json"


def setup(app) -> dict[str, Any]:
    """Register the handler."""
    app.connect("build-finished", write_report)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def write_report(app, exception: Exception | None) -> None:
    """Collect myst-nb's record of each page and write the file, also after a build with errors."""
    records = getattr(app.env, "nb_metadata", {})
    report = {
        page: {
            "seconds": record["runtime"],
            "finished": record["mtime"],
            "succeeded": bool(record["succeeded"]),
            "error": record["error"],
        }
        for page, data in sorted(records.items())
        if (record := data.get("exec_data"))
    }
    Path(app.outdir).parent.joinpath(FILE_NAME).write_text(json.dumps(report, indent=1) + "\n")
