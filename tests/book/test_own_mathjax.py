"""Formulas need no connection: the book brings its MathJax along, or says what is missing."""

import importlib.util
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from sphinx.errors import ExtensionError

_FILE = Path(__file__).resolve().parents[2] / "_ext/own_mathjax.py"
_SPEC = importlib.util.spec_from_file_location("own_mathjax", _FILE)
own_mathjax = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(own_mathjax)


def an_app(folder: Path, format: str = "html"):
    return SimpleNamespace(outdir=str(folder), builder=SimpleNamespace(format=format))


def test_the_pages_get_a_mathjax_that_loads_nothing_else(tmp_path):
    own_mathjax.copy_mathjax(an_app(tmp_path), None)
    (copied,) = (tmp_path / "_static").iterdir()
    text = copied.read_text(encoding="utf-8")
    assert copied.name == own_mathjax.FILE and "MathJax" in text
    assert ".woff" not in text  # fonts of the other output format are files of their own


@pytest.mark.parametrize(("format", "error"), [("html", ValueError("a page failed")), ("latex", None)])
def test_nothing_is_copied_for_a_failed_build_or_another_format(tmp_path, format, error):
    own_mathjax.copy_mathjax(an_app(tmp_path, format), error)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(own_mathjax, "distribution", missing)
    with pytest.raises(ExtensionError, match=r"sphinx-mathjax-offline .*pip install -e '\.\[book\]'"):
        own_mathjax.copy_mathjax(an_app(tmp_path), None)


def test_sphinx_is_told_where_mathjax_lies():
    loaded = []
    app = SimpleNamespace(
        config=SimpleNamespace(), setup_extension=loaded.append, connect=lambda event, handler: None
    )
    assert own_mathjax.setup(app)["parallel_read_safe"]
    assert loaded == ["sphinx.ext.mathjax"]
    assert app.config.mathjax_path == own_mathjax.FILE
