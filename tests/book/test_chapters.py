"""Static checks of every chapter: what can be seen without running it. nbval runs them (`make test`)."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(TOP.glob("book/*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
MAX_LINES = 25
# What draws into the page: a function of mura_course.plots, or Matplotlib's own.
DRAWS = re.compile(
    r"\bplots\.(?!use_style|provenance)[a-z_]+\(|\bplt\.show\(|\.(plot|imshow|barh?|hist|scatter)\("
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def markdown(notebook: dict) -> str:
    return "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def labels(directive: str, text: str) -> list[str]:
    """Labels of e.g. all ``{exercise-start}``, whichever fence they use; a solution's is its argument."""
    blocks = re.findall(rf"^[`:]{{3,}}\{{{directive}\}}(.*?)^[`:]{{3,}}", text, re.MULTILINE | re.DOTALL)
    found = [re.search(r"^:label:\s*(\S+)", block, re.MULTILINE) for block in blocks]
    return [match[1] if match else block.split()[0] for match, block in zip(found, blocks, strict=True)]


def without_functions(code: str) -> str:
    """`code` without the functions that it defines: what they draw appears where they are called."""
    lines = code.splitlines()
    for node in ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.MULTILINE)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def drawing_cells(notebook: dict) -> list[dict]:
    """Cells whose figures show: those that draw, or call a function of the notebook that does."""
    hidden, draws = {"remove-output", "remove-cell"}, DRAWS.pattern
    for cell in code_cells(notebook):
        functions = re.split(r"^(?=def |class |\S)", source(cell), flags=re.MULTILINE)
        names = [match[1] for text in functions if (match := re.match(r"def (\w+)", text))
                 and DRAWS.search(text)]  # fmt: skip
        draws += "".join(rf"|(?<![\w.]){name}\(" for name in names)
    cells = [cell for cell in code_cells(notebook) if not hidden & tags(cell)]
    return [cell for cell in cells if re.search(draws, without_functions(source(cell)))]


def solution_code(notebook: dict) -> dict[str, str]:
    """By exercise: the code between its gated solution's start and end."""
    code, current = {}, None
    for cell in notebook["cells"]:
        text = source(cell)
        if cell["cell_type"] == "code":
            if current:
                code[current] += text
        elif started := labels("solution-start", text):
            assert ":class: dropdown" in text, f"the solution of {started[0]} is not folded"
            current = started[0]
            code[current] = ""
        elif "{solution-end}" in text:
            current = None
    assert current is None, f"the solution of {current} does not end"
    return code


def test_there_are_chapters_and_each_is_listed_once():
    toc = yaml.safe_load((TOP / "_toc.yml").read_text())
    listed = [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert len(listed) == len(set(listed))
    pages = [path for path in TOP.glob("book/*") if path.suffix in (".ipynb", ".md")]
    assert sorted(listed) == sorted(f"book/{path.stem}" for path in pages)
    assert NUMBERED


def test_the_page_of_the_package_holds_every_module():
    modules = TOP.glob("mura_course/**/*.py")
    names = [
        ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__") for path in modules
    ]
    page = (TOP / "book/api.md").read_text()
    shown = re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE)
    empty = {"mura_course", "mura_course.keras_tools", "mura_course.torch_tools"}  # bring no names themselves
    assert sorted(shown) == sorted(set(names) - empty)


@every_notebook
def test_stored_without_outputs_for_any_python_3_kernel(path):
    notebook = read(path)
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))


@every_notebook
def test_the_first_code_cell_is_the_one_setup_cell(path):
    """The same in all but its second line, which names the extras that the chapter needs; folded."""
    first, *others = code_cells(read(path))
    lines = source(first).split("\n")
    assert re.fullmatch(r'EXTRAS = "(\w+(,\w+)*)?"', lines[1])
    lines[1] = 'EXTRAS = ""'
    assert lines == (TOP / "book/_setup_cell.py").read_text().rstrip("\n").split("\n")
    assert tags(first) >= {"setup", "hide-input"}
    assert not [cell for cell in others if "setup" in tags(cell) or "chapter.start" in source(cell)]


@every_notebook
def test_begins_with_its_only_title(path):
    notebook = read(path)
    assert notebook["cells"][0]["cell_type"] == "markdown"
    prose = re.sub(r"^(`{3,}|:{3,}).*?^\1", "", markdown(notebook), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^# .+", prose, re.MULTILINE)
    assert len(titles) == 1
    assert source(notebook["cells"][0]).startswith(titles[0])


@every_notebook
def test_code_cells_are_short_and_not_empty(path):
    for cell in code_cells(read(path))[1:]:  # the first one is the folded setup cell
        assert source(cell).strip(), "an empty code cell"
        assert source(cell).count("\n") < MAX_LINES, f"over {MAX_LINES} lines:\n{source(cell)}"


@every_notebook
def test_figures_have_alternative_text_and_a_caption(path):
    for cell in drawing_cells(read(path)):
        options = cell["metadata"].get("mystnb", {})
        alternative = options.get("image", {}).get("alt", "")
        caption = options.get("figure", {}).get("caption", "")
        start = source(cell)[:200]
        assert len(alternative.split()) >= 4, f"no alternative text (mystnb.image.alt):\n{start}"
        assert len(caption.split()) >= 4, f"no caption (mystnb.figure.caption):\n{start}"
        assert alternative != caption, f"the alternative text only repeats the caption:\n{start}"


@every_notebook
def test_every_exercise_has_a_folded_solution_that_checks_itself(path):
    notebook = read(path)
    solutions = solution_code(notebook)
    exercises = labels("exercise-start", markdown(notebook)) + labels("exercise", markdown(notebook))
    assert sorted(exercises) == sorted(solutions)
    assert [label for label, code in solutions.items() if "assert" not in code] == []


@every_chapter
def test_a_chapter_has_two_exercises_or_more(path):
    assert len(solution_code(read(path))) >= 2


@every_notebook
def test_names_no_path_of_one_machine(path):
    text = path.read_text()
    assert re.findall(r"/home/\w+|/Users/\w+|/root/|[A-Z]:\\\\", text) == []


def test_the_results_are_executed_in_every_build_and_know_whose_the_recorded_runs_are():
    notebook = read(TOP / "book/results.ipynb")
    assert notebook["metadata"]["mystnb"] == {"execution_mode": "force"}
    (cell,) = [source(cell) for cell in code_cells(notebook) if source(cell).startswith("CHAPTERS = ")]
    chapters = ast.literal_eval(ast.parse(cell).body[0].value)
    assert set(chapters) <= {path.stem for path in NUMBERED}
    names = [json.loads(file.read_text())["name"] for file in TOP.glob("book/_runs/*/*/*/run.json")]
    owners = {name: [chapter for chapter, runs in chapters.items() if re.match(runs, name)] for name in names}
    assert names and {name: found for name, found in owners.items() if len(found) != 1} == {}


def test_labels_are_unique_in_the_whole_book():
    """Sphinx has one namespace for the exercises, figures and sections of all pages."""
    found = []
    for path in NOTEBOOKS:
        notebook = read(path)
        found += labels("exercise-start", markdown(notebook)) + labels("exercise", markdown(notebook))
        found += re.findall(r"^\(([\w-]+)\)=$", markdown(notebook), re.MULTILINE)
        figures = [cell["metadata"].get("mystnb", {}).get("figure", {}) for cell in code_cells(notebook)]
        found += [figure["name"] for figure in figures if "name" in figure]
    assert sorted(found) == sorted(set(found))


# --- The checks themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["```", "````", ":::"])
def test_labels_finds_every_kind_of_exercise(fence):
    text = f"{fence}{{exercise-start}} A title\n:label: ex-one\n:class: x\n{fence}\n\nText\n"
    text += f"{fence}{{exercise-end}}\n{fence}\n{fence}{{solution-start}} ex-one\n:class: dropdown\n{fence}\n"
    assert labels("exercise-start", text) == ["ex-one"]
    assert labels("solution-start", text) == ["ex-one"]
    assert labels("exercise", text) == []


@pytest.mark.parametrize(
    ("code", "draws"),
    [
        ("plots.learning_curves(history)", True),
        ("counts.plot(kind='bar')", True),
        ("fig, ax = plt.subplots()\nax.imshow(film)", True),
        ("ax.bar(x, y)", True),
        ("from mura_course import plots\nimport matplotlib.pyplot as plt", False),
        ("bar.update(1)", False),
        ("plots.use_style()\ncolour = plots.NORMAL", False),
    ],
)
def test_drawing_cells_are_recognised(code, draws):
    cell = {"cell_type": "code", "metadata": {}, "source": [code]}
    assert bool(drawing_cells({"cells": [cell]})) == draws
    cell["metadata"]["tags"] = ["remove-output"]
    assert drawing_cells({"cells": [cell]}) == []


def test_a_function_draws_where_it_is_called():
    define = {"cell_type": "code", "metadata": {}, "source": ["def show(x):\n    plt.imshow(x)\n\n\nx = 1"]}
    call = {"cell_type": "code", "metadata": {}, "source": ["%time\nshow(x)"]}
    assert drawing_cells({"cells": [define, call]}) == [call]


def test_an_unfolded_or_unended_solution_is_seen():
    start = {"cell_type": "markdown", "metadata": {}, "source": ["```{solution-start} ex\n```\n"]}
    with pytest.raises(AssertionError, match="not folded"):
        solution_code({"cells": [start]})
    start["source"] = ["```{solution-start} ex\n:class: dropdown\n```\n"]
    with pytest.raises(AssertionError, match="does not end"):
        solution_code({"cells": [start]})
