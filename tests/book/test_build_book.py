"""Builds of the book: what is executed again and what is not, what counts as failed, what pages leave out."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from docutils import nodes
from making import write_mura
from sphinx.errors import ExtensionError

TOP = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, TOP / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_book = load("scripts/build_book.py")
tidy_stderr = load("_ext/tidy_stderr.py")
execution_report = load("_ext/execution_report.py")
execution_cache = load("_ext/execution_cache.py")


class Book:
    """A small repository, and in place of Jupyter Book a function that counts and leaves what it would."""

    def __init__(self, top: Path, monkeypatch) -> None:
        self.top, self.calls, self.broken, self.code, self.runs = top, 0, set(), 0, []
        for path in build_book.PAGE_SOURCES:
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            if "." in Path(path).name:
                (top / path).write_text("first\n")
            else:
                (top / path).mkdir()
        (top / "book/01.ipynb").write_text("{}")
        monkeypatch.setattr(build_book, "TOP", top)
        monkeypatch.setattr(build_book, "execute_ahead", lambda notebooks, folder: [])
        monkeypatch.setattr(build_book, "finished_runs", lambda: self.runs)
        monkeypatch.setattr(build_book.subprocess, "run", self._jupyter_book)

    def build(self, profile: str = "demo", key: str = "a profile, a package, data"):
        self.last = build_book.Build(self.top / "_build" / profile, key)
        return self.last.run()

    def _jupyter_book(self, command, cwd, env):
        self.calls += 1
        self.command, self.environment = command, env
        output = Path(command[command.index("--path-output") + 1]) / "_build"
        cache = output / ".jupyter_cache"
        self.had_cache = cache.exists()
        self.left_over = [p.name for p in output.glob("*")]
        cache.mkdir(parents=True, exist_ok=True)
        (output / "html").mkdir()
        (output / "html/index.html").touch()
        ok = {"seconds": 2.0, "finished": time.time(), "succeeded": True, "error": None}
        bad = ok | {"succeeded": False, "error": "CellExecutionError"}
        report = {"book/01": ok} | {page: bad for page in self.broken}
        (output / "executions.json").write_text(json.dumps(report))
        return SimpleNamespace(returncode=self.code)


@pytest.fixture
def book(tmp_path, monkeypatch):
    return Book(tmp_path, monkeypatch)


def test_nothing_is_done_twice(book):
    assert book.build() == []
    assert book.build() == []
    assert book.calls == 1


def test_warnings_are_errors_and_every_page_is_read_anew(book):
    book.build()
    assert {"-n", "-W", "--keep-going", "--all"} <= set(book.command)


def test_the_kernel_is_this_environments_and_draws_into_the_page(book, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    book.build()
    assert book.environment["JUPYTER_PREFER_ENV_PATH"] == "1"
    assert "MPLBACKEND" not in book.environment


@pytest.mark.parametrize(
    "path", ["book/setup.md", "_static/book.css", "_toc.yml", "_config.yml", "_ext/new.py"]
)
def test_a_change_of_pages_renders_anew_and_keeps_the_executions(book, path):
    book.build()
    (book.top / path).write_text("second\n")
    assert book.build() == []
    assert book.calls == 2
    assert book.left_over == [".jupyter_cache"]  # and no page of a chapter that is gone


def test_what_results_depend_on_is_asked_for_at_every_build(book):
    book.build()
    book.build(key="another package")
    assert book.calls == 2
    assert book.left_over == [".jupyter_cache"]


def test_a_run_finished_elsewhere_renders_anew_and_one_of_the_build_itself_does_not(book, monkeypatch):
    monkeypatch.setattr(build_book, "execute_ahead", lambda *_: book.runs.append("of a chapter") or [])
    for calls, run in ((1, None), (1, None), (2, "trained elsewhere"), (2, None)):
        book.runs += [run] if run else []
        assert book.build() == []
        assert book.calls == calls


def test_speed_and_results_are_not_executed_beside_the_chapters(book, monkeypatch):
    for name in ("04_input_pipelines", "results"):
        (book.top / f"book/{name}.ipynb").write_text("{}")
    ahead = []
    monkeypatch.setattr(build_book, "execute_ahead", lambda notebooks, folder: ahead.extend(notebooks) or [])
    book.build()
    assert [path.stem for path in ahead] == ["01"]


def test_each_profile_has_a_folder_of_its_own(book):
    book.build()
    book.build("smoke")
    assert not book.had_cache
    book.build()
    assert book.calls == 2


def test_checkpoints_and_dates_are_no_change(book):
    book.build()
    (book.top / "book/.ipynb_checkpoints").mkdir()
    (book.top / "book/.ipynb_checkpoints/01.ipynb").touch()
    os.utime(book.top / "book/01.ipynb", (1, 1))
    book.build()
    assert book.calls == 1


@pytest.mark.parametrize("how", ["cell", "warning"])
def test_a_failed_build_fails_again_until_it_is_mended(book, how):
    """A second run must not take the first one's unfinished pages for current ones."""
    book.broken = {"book/06"} if how == "cell" else set()
    book.code = 1
    for attempt in (1, 2):
        (failure,) = book.build()
        assert ("book/06: CellExecutionError" in failure) == (how == "cell")
        assert book.calls == attempt
    assert book.had_cache  # what succeeded need not run again
    book.broken, book.code = set(), 0
    assert book.build() == []


def test_a_failed_cell_counts_whatever_the_exit_code(book):
    book.broken, book.code = {"book/06"}, 0
    assert len(book.build()) == 1


def test_a_deleted_page_is_built_again(book):
    book.build()
    book.last.first_page.unlink()
    assert book.build() == []
    assert book.calls == 2


def test_times_tell_what_was_executed_now_from_what_was_before(book, capsys):
    began = time.time() - 1
    book.build()
    executed, cached = book.last.executions(since=began)
    assert (executed, cached) == ({"book/01": 2.0}, {})
    assert book.last.executions(since=time.time() + 1) == ({}, {"book/01": 2.0})
    build_book.print_times({"install": 1.0, **executed}, {"book/02": 3.0})
    lines = capsys.readouterr().out.splitlines()
    assert ["book/01", "2.0"] in [line.split() for line in lines]
    assert lines[-1].split()[:2] == ["book/02", "-"]


def test_installing_counts_only_when_it_was_done_in_this_run(tmp_path):
    stamp = tmp_path / "stamp"
    assert build_book._install_seconds(stamp, 0) == 0
    stamp.write_text("21\n")
    assert build_book._install_seconds(stamp, stamp.stat().st_mtime - 1) == 21
    assert build_book._install_seconds(stamp, stamp.stat().st_mtime + 1) == 0


# --- The execution cache ---------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    package = tmp_path / "mura_course"
    (package / "__pycache__").mkdir(parents=True)
    for name in ("data.py", "runs.py", "__pycache__/data.pyc"):
        (package / name).write_text("first\n")
    return package


@pytest.mark.parametrize("change", [
    lambda package: (package / "data.py").write_text("second\n"),
    lambda package: (package / "new.py").touch(),
    lambda package: (package / "data.py").unlink(),
    lambda package: (package / "data.py").rename(package / "other.py"),
], ids=["changed", "new", "removed", "renamed"])  # fmt: skip
def test_a_change_of_the_package_is_a_change(sources, change):
    before = execution_cache.digest([sources])
    change(sources)
    assert execution_cache.digest([sources]) != before


def test_compiled_files_and_dates_are_no_change_of_the_package(sources):
    before = execution_cache.digest([sources])
    (sources / "__pycache__/data.pyc").write_text("second\n")
    os.utime(sources / "data.py", (1, 1))
    assert execution_cache.digest([sources]) == before


def test_results_depend_on_profile_data_and_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(execution_cache, "PACKAGES", ())
    keys = []
    for root in (write_mura(tmp_path / "one"), write_mura(tmp_path / "two")):
        monkeypatch.setenv("MURA_DATA", str(root))
        for profile in ("smoke", "demo"):
            monkeypatch.setenv("MURA_PROFILE", profile)
            keys += [execution_cache.execution_key()]
    assert execution_cache.execution_key() == keys[-1]
    monkeypatch.setattr(execution_cache, "versions_of_libraries", lambda: ["numpy 3"])
    assert len({*keys, execution_cache.execution_key()}) == 5


def test_every_library_that_chapters_run_on_counts():
    named = {line.split()[0] for line in execution_cache.versions_of_libraries()}
    assert {"numpy", "tensorflow", "torch", "lightning", "rapidocr", "keras-ocr"} <= named
    assert not named & {"ruff", "pytest", "mura-course"}  # a newer linter changes no result


def an_app(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(outdir=folder / "html", config=SimpleNamespace(nb_execution_cache_path=""))


def test_only_the_latest_caches_stay(tmp_path, monkeypatch):
    app = an_app(tmp_path)
    for number in range(6):
        monkeypatch.setattr(execution_cache, "execution_key", lambda number=number: f"key{number}")
        app.config.nb_execution_cache_path = ""
        execution_cache.choose_cache(app, app.config)
        os.utime(app.config.nb_execution_cache_path, (number, number))
    left = sorted(path.name for path in (tmp_path / ".jupyter_cache").iterdir())
    assert left == ["key2", "key3", "key4", "key5"]


def test_a_build_without_data_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ExtensionError, match="nowhere.*MURA_DATA"):
        execution_cache.choose_cache(an_app(tmp_path), an_app(tmp_path).config)


@pytest.fixture
def tiny_book(tmp_path):
    """A page, and one of results: their only cell prints the profile and leaves a line in `executed`."""
    top = tmp_path / "tiny"
    top.mkdir()
    code = "import os\nprint('shown:', os.environ['MURA_PROFILE'])\nprint('once', file=open('executed', 'a'))"
    cells = [nbformat.v4.new_markdown_cell("# A page"), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), top / "page.ipynb")
    (top / "book").mkdir()
    always = {"mystnb": {"execution_mode": "force"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=always), top / "book/results.ipynb")
    (top / "_toc.yml").write_text("format: jb-book\nroot: page\nchapters:\n- file: book/results\n")
    (top / "_config.yml").write_text(
        "title: tiny\nonly_build_toc_files: true\nexecute: {execute_notebooks: cache}\n"
        f"sphinx: {{local_extensions: {{execution_cache: {TOP / '_ext'}}}}}\n"
    )
    return top


@pytest.mark.slow
def test_plain_jupyter_book_shows_no_results_of_another_profile_package_or_data_set(tiny_book, tmp_path):
    """Built in smoke, in demo, on other data, in smoke once more, and with a change in the package."""
    one, two = (write_mura(tmp_path / name / "MURA-v1.1") for name in ("one", "two"))
    for package in execution_cache.PACKAGES:
        shutil.copytree(TOP / package, tmp_path / package)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(tiny_book)]
    executions = []
    for profile, root in (("smoke", one), ("demo", one), ("demo", two), ("smoke", one), ("smoke", one)):
        if len(executions) == 4:
            (tmp_path / "mura_demo/new.py").touch()
        settings = {"MURA_PROFILE": profile, "MURA_DATA": str(root), "PYTHONPATH": str(tmp_path)}
        subprocess.run(command, env=os.environ | settings, check=True, capture_output=True)
        page = (tiny_book / "_build/html/page.html").read_text()
        assert f"shown: {profile}" in page
        executions.append(len((tiny_book / "executed").read_text().split()))
    assert executions == [1, 2, 3, 3, 4]
    assert (tiny_book / "book/executed").read_text().split() == ["once"] * 5


@pytest.mark.slow
def test_two_notebooks_at_a_time_are_executed_ahead_and_a_failed_one_is_not_kept(tmp_path, monkeypatch):
    """The first two wait until both have begun; the third fails until a file exists."""
    meet = "import os, time\nopen('{}', 'a').write('x')\nwhile not os.path.exists('{}'): time.sleep(0.05)"
    codes = {"a": meet.format("A", "B"), "b": meet.format("B", "A"), "c": "assert open('C')"}
    for name, code in codes.items():
        show = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['MPLBACKEND'])"
        cells = [nbformat.v4.new_code_cell(source) for source in (code, show)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(build_book, "has_gpu", lambda: False)
    monkeypatch.setattr(build_book.os, "cpu_count", lambda: 4)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebooks, folder = sorted(tmp_path.glob("*.ipynb")), tmp_path / "cache"
    before = dict(os.environ)
    assert build_book.execute_ahead(notebooks, folder) == ["a", "b"]
    (tmp_path / "C").touch()
    assert build_book.execute_ahead(notebooks, folder) == ["c"]
    assert build_book.execute_ahead(notebooks, folder) == []
    assert dict(os.environ) == before
    assert (tmp_path / "A").read_text() == "x"
    cache = build_book.get_cache(str(folder))
    said = {Path(r.uri).stem: cache.get_cache_bundle(r.pk).nb for r in cache.list_cache_records()}
    shown = {name: notebook.cells[1].outputs[0].text.split() for name, notebook in said.items()}
    inline = "module://matplotlib_inline.backend_inline"
    assert shown == {"a": ["2", inline], "b": ["2", inline], "c": ["None", inline]}


# --- The extensions --------------------------------------------------------------------------------

NOTICES = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795323599.709382   10773 port.cc:153] oneDNN custom operations are on.
I0000 00:00:1795323599.801942   10773 cpu_feature_guard.cc:227] This TensorFlow binary is optimized ...
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow with the \
appropriate compiler flags.
E0000 00:00:1795323605.070400   10773 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error
"""
PROBLEMS = """\
<ipython-input-1>:3: UserWarning: the loss is not a number
W0000 00:00:1795323605.070400   10773 gpu_device.cc:2342] Cannot dlopen some GPU libraries.
E0000 00:00:1795323605.070400   10773 bfc_allocator.cc:497] Allocator ran out of memory
I am a line of the chapter's own
WARNING: All data are synthetic
"""


def page_with(text: str, *classes: str) -> tuple[nodes.document, nodes.container]:
    from docutils.utils import new_document

    cell = nodes.container()
    cell += nodes.literal_block(text, text, classes=list(classes), language="none")
    document = new_document("page")
    document += cell
    return document, cell


def test_tensorflows_notices_leave_the_page_and_problems_stay():
    document, cell = page_with(NOTICES + PROBLEMS, "output", "stderr")
    tidy_stderr.tidy_page(None, document)
    (block,) = cell.children
    assert block.astext() == PROBLEMS
    assert block["classes"] == ["output", "stderr"]
    assert block["language"] == "none"


def test_an_output_of_nothing_but_notices_goes():
    document, cell = page_with(NOTICES, "output", "stderr")
    tidy_stderr.tidy_page(None, document)
    assert cell.children == []


@pytest.mark.parametrize("classes", [("output", "stream"), ()])
def test_what_is_not_error_output_is_left_alone(classes):
    document, cell = page_with(NOTICES, *classes)
    tidy_stderr.tidy_page(None, document)
    assert cell.astext() == NOTICES


def test_the_report_holds_every_executed_page(tmp_path):
    record = {
        "runtime": 1.5,
        "mtime": 7.0,
        "method": "cache",
        "succeeded": False,
        "error": "X",
        "traceback": "x",
    }
    metadata = {"book/02": {"exec_data": record}, "book/index": {}, "book/setup": {"exec_data": None}}
    app = SimpleNamespace(env=SimpleNamespace(nb_metadata=metadata), outdir=tmp_path / "html")
    execution_report.write_report(app, None)
    report = json.loads((tmp_path / "executions.json").read_text())
    assert report == {"book/02": {"seconds": 1.5, "finished": 7.0, "succeeded": False, "error": "X"}}
