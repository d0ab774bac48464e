"""What a reader's browser gets, seen on real builds of a book of two pages: scripts, one page, the focus."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
CONFIG = f"""\
title: A book
only_build_toc_files: true
parse: {{myst_enable_extensions: [colon_fence]}}
sphinx:
  extra_extensions: [sphinx_exercise]
  local_extensions: {{one_script: {TOP}/_ext, single_page: {TOP}/_ext}}
"""
FIRST = """\
# First

::::{grid} 2
:::{grid-item-card} A card
:link: second
:link-type: doc

Its text.
:::
::::
"""
SECOND = "# Second\n\n```{exercise} A title\n:label: ex-one\n\nSay something.\n```\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The book in a folder of its own, built as pages and as one page; its folder of outputs."""
    top = tmp_path_factory.mktemp("pages")
    (top / "text").mkdir()
    files = {"_config.yml": CONFIG, "text/first.md": FIRST, "text/second.md": SECOND}
    files["_toc.yml"] = "format: jb-book\nroot: text/first\nchapters:\n- file: text/second\n"
    for name, content in files.items():
        (top / name).write_text(content)
    for builder in ("html", "singlehtml"):
        command = [Path(sys.executable).with_name("jupyter-book"), "build", top, "-W", "--builder", builder]
        subprocess.run(command, check=True, capture_output=True)
    return top / "_build"


@pytest.mark.slow
def test_no_script_stands_twice_on_a_page_and_none_of_thebes(built):
    page = (built / "html/text/second.html").read_text()
    scripts = re.findall(r"<script\b[^>]*>.*?</script>", page, re.DOTALL)
    assert len(scripts) > 10
    assert len(scripts) == len(set(scripts))
    assert not [script for script in scripts if "THEBE_JS_URL" in script or "sphinx-thebe" in script]


@pytest.mark.slow
def test_the_book_as_one_page_has_cards_and_exercises(built):
    """It is what a PDF is printed from; the cards of the first page ended the build."""
    page = (built / "singlehtml/index.html").read_text()
    assert "sd-card-title" in page and "Its text." in page
    assert "Say something." in page


@pytest.mark.slow
def test_what_the_one_page_needs_lies_where_it_looks(built):
    page = (built / "singlehtml/index.html").read_text()
    links = re.findall(r'(?:href|src)="([^"#?]+)', page)
    local = {link for link in links if not re.match(r"\w+:|//|search|genindex", link)}
    assert any(link.endswith(".css") for link in local)
    assert [link for link in local if not (built / "singlehtml" / link).exists()] == []


def test_the_headers_buttons_show_the_keyboards_focus():
    """The theme takes the ring from four of them."""
    rules = re.findall(r"([^{}]+)\{([^}]*)\}", (TOP / "_static/book.css").read_text())
    (ring,) = [body for selector, body in rules if ".bd-header-article .btn:focus-visible" in selector]
    assert re.search(r"outline: \dpx solid var\(--pst-color-accent\) !important;", ring)
