"""The Kaggle button: on every notebook page, in the theme's launch group, and nowhere else."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

_FILE = Path(__file__).resolve().parents[2] / "_ext/kaggle_button.py"
_SPEC = importlib.util.spec_from_file_location("kaggle_button", _FILE)
kaggle_button = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kaggle_button)

OPTIONS = {
    "repository_url": "https://github.com/someone/a-book",
    "repository_branch": "main",
    "path_to_docs": "",
}
PAGE = object()  # stands for a page's doctree; generated pages have none


def header(*launchers: str) -> list[dict]:
    """Header buttons as the theme leaves them: with a launch group only where a launcher is configured."""
    source = {"type": "group", "label": "source-buttons", "buttons": [{"text": "Repository"}]}
    launch = {"type": "group", "label": "launch-buttons", "buttons": [{"text": t} for t in launchers]}
    return [launch, source] if launchers else [source]


def handle(context: dict, source: str = "book/01_exploring.ipynb", doctree=PAGE, **options) -> None:
    app = SimpleNamespace(
        config=SimpleNamespace(html_theme_options=OPTIONS | options),
        env=SimpleNamespace(doc2path=lambda page, base=True: source),
    )
    page = source.rsplit(".", 1)[0]
    kaggle_button.add_kaggle_button(app, page, "page.html", context, doctree)


def texts(buttons: list[dict]) -> list[list[str]]:
    return [[button["text"] for button in group["buttons"]] for group in buttons]


def test_a_notebook_gets_the_button_last_in_the_launch_group():
    context = {"header_buttons": header("Binder", "Colab")}
    handle(context)
    assert texts(context["header_buttons"]) == [["Binder", "Colab", "Kaggle"], ["Repository"]]
    button = context["header_buttons"][0]["buttons"][-1]
    assert button["type"] == "link"
    assert button["url"] == (
        "https://kaggle.com/kernels/welcome?"
        "src=https://github.com/someone/a-book/blob/main/book/01_exploring.ipynb"
    )


def test_the_launch_group_is_made_where_no_other_launcher_made_one():
    context = {"header_buttons": header()}
    handle(context)
    assert texts(context["header_buttons"]) == [["Repository"], ["Kaggle"]]
    assert context["header_buttons"][-1]["label"] == "launch-buttons"


@pytest.mark.parametrize(
    ("context", "arguments"),
    [
        ({"header_buttons": header("Binder")}, {"source": "book/setup.md"}),
        ({"header_buttons": header("Binder")}, {"doctree": None}),  # search, genindex
        ({"header_buttons": header("Binder")}, {"repository_url": ""}),
        ({}, {}),  # another theme
    ],
    ids=["markdown page", "generated page", "no repository", "no header buttons"],
)
def test_other_pages_stay_as_they_are(context, arguments):
    before = texts(context.get("header_buttons", []))
    handle(context, **arguments)
    assert texts(context.get("header_buttons", [])) == before


def test_pages_do_not_share_buttons():
    first, second = {"header_buttons": header()}, {"header_buttons": header()}
    handle(first)
    handle(second)
    assert texts(second["header_buttons"]) == [["Repository"], ["Kaggle"]]


@pytest.mark.parametrize("folder", ["", "docs", "/docs/"])
@pytest.mark.parametrize("path", ["book/a b&c.ipynb", "book/#1?.ipynb", "book/é.ipynb"])
def test_any_path_comes_back_out_of_the_address(path, folder):
    context = {"header_buttons": header()}
    handle(context, source=path, path_to_docs=folder)
    query = parse_qs(urlsplit(context["header_buttons"][-1]["buttons"][0]["url"]).query)
    prefix = "/docs" if folder else ""
    assert query == {"src": [f"https://github.com/someone/a-book/blob/main{prefix}/{path}"]}


def test_it_comes_after_the_theme():
    connected = []
    app = SimpleNamespace(connect=lambda event, handler, priority: connected.append((event, priority)))
    kaggle_button.setup(app)
    ((event, priority),) = connected
    assert event == "html-page-context"
    assert priority > 501, "the theme makes its launch group at 501"
