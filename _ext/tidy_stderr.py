"""Sphinx extension: drops TensorFlow's start-up notices from the pages' error-stream outputs.

On import TensorFlow's C++ side logs which processor instructions it uses and that it found no CUDA, before
any setting can stop it. Only those lines go; every other line, Python's warnings included, stays.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

# A log line of C++ begins with its severity (I, W, E, F), month and day, and time:
#   I0000 00:00:1795323599.709382   10773 port.cc:153] oneDNN custom operations are on. ...
# E lines stay, but for cuInit's: it fails wherever there is no GPU, and the setup cell names the device.
NOTICES = re.compile(
    r"I\d{4} \d\d:\d\d:[\d.]+ +\d+ [\w./]+:\d+\] "
    r"|E\d{4} \d\d:\d\d:[\d.]+ +\d+ [\w./]+:\d+\] failed call to cuInit: "
    r"|WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR$"
    r"|To enable the following instructions: .* rebuild TensorFlow with the appropriate compiler flags\.$"
)


def setup(app) -> dict[str, Any]:
    """Register the handler."""
    app.connect("doctree-read", tidy_page)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def tidy_page(app, doctree: nodes.document) -> None:
    """Drop the notices from every stderr output of the page, and the output where nothing else is in it."""
    for block in list(doctree.findall(nodes.literal_block)):
        if "stderr" not in block["classes"]:
            continue
        before = block.astext()
        after = without_notices(before)
        if after == before:
            continue
        if after.strip():
            block.replace_self(nodes.literal_block(after, after, **block.attributes))
        else:
            block.parent.remove(block)


def without_notices(text: str) -> str:
    """`text` without the lines that are notices; the other lines as they are."""
    return "".join(line for line in text.splitlines(keepends=True) if not NOTICES.match(line))
