"""What stands in more than one file of the repository agrees: versions, addresses, dependencies, commands."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REPOSITORY = PROJECT["urls"]["Repository"]


def pins() -> dict[str, str]:
    lines = (TOP / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt may hold nothing but name==version"
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(names) == len(set(names))
    return dict(zip(names, (version for _, version in pairs), strict=True))


def read_yaml(path: str) -> dict:
    return yaml.safe_load((TOP / path).read_text())


def requirements() -> list[Requirement]:
    listed = PROJECT["dependencies"] + [
        line for name, lines in EXTRAS.items() if name != "all" for line in lines
    ]
    return [Requirement(line) for line in listed]


def test_the_version_is_the_same_everywhere():
    init = (TOP / "mura_course/__init__.py").read_text()
    assert re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)[1] == PROJECT["version"]
    assert read_yaml("CITATION.cff")["version"] == PROJECT["version"]
    assert f"\n## {PROJECT['version']}" in (TOP / "CHANGELOG.md").read_text()


def test_the_repository_address_is_the_same_everywhere():
    assert read_yaml("_config.yml")["repository"]["url"] == REPOSITORY
    assert read_yaml("CITATION.cff")["repository-code"] == REPOSITORY
    setup_cell = (TOP / "book/_setup_cell.py").read_text()
    assert f'VERSION, REPOSITORY = "{PROJECT["version"]}", "{REPOSITORY}"' in setup_cell
    assert f"git clone {REPOSITORY} " in (TOP / "README.md").read_text()


@pytest.mark.parametrize("pattern", ["*", "book/*", "mura_course/**/*.py", ".github/workflows/*"])
def test_no_file_names_another_address_of_this_repository(pattern):
    files = [path for path in TOP.glob(pattern) if path.is_file()]
    assert files
    for path in files:
        text = path.read_text(errors="ignore")
        for address in re.findall(r"https://github\.com/[\w.-]+/mura-course\b", text):
            assert address == REPOSITORY, path


def test_all_is_the_union_of_the_other_extras():
    everything = [Requirement(line) for line in EXTRAS["all"]]
    assert {requirement.name for requirement in everything} == {PROJECT["name"]}
    assert set().union(*(requirement.extras for requirement in everything)) == set(EXTRAS) - {"all"}


def test_users_are_bound_from_below_only():
    """An upper bound would break Colab and Kaggle; two have a reason, which pyproject.toml gives."""
    bounded_above = {
        r.name for r in requirements() if any(s.operator in ("<", "<=", "==", "~=") for s in r.specifier)
    }
    assert bounded_above == {"myo-sim", "jupyter-book"}
    assert [r.name for r in requirements() if not str(r.specifier)] == []


def test_every_dependency_is_pinned_at_a_version_that_users_may_have():
    pinned = pins()
    for requirement in requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_pins_name_no_local_build():
    assert not [name for name, version in pins().items() if "+" in version or "@" in version]
    assert "mura-course" not in pins()


def test_environment_lists_nothing_that_pyproject_lists():
    """So conda's and Binder's environment cannot drift: all packages but Python come from pyproject.toml."""
    environment = read_yaml("environment.yml")
    assert environment["name"] == PROJECT["name"]
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip", "jupyterlab"]
    python = conda[0].removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    options = [line for line in pip["pip"] if not line.startswith("--extra-index-url ")]
    assert options == ["-c constraints.txt", "-e .[all]"]


def test_pre_commit_runs_the_pinned_versions():
    hooks = {repo["repo"].rsplit("/", 1)[1]: repo for repo in read_yaml(".pre-commit-config.yaml")["repos"]}
    assert hooks["ruff-pre-commit"]["rev"] == f"v{pins()['ruff']}"
    assert hooks["nbstripout"]["rev"] == pins()["nbstripout"]
    strip = " ".join(hooks["nbstripout"]["hooks"][0]["args"])
    assert f"STRIP := {strip}\n" in (TOP / "Makefile").read_text()


@pytest.mark.parametrize("workflow", sorted(TOP.glob(".github/workflows/*.yml")), ids=lambda path: path.name)
def test_workflows_pin_actions_and_call_what_exists(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions), actions
    commands = [word for step in steps for word in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))]
    targets = re.findall(r"^([\w-]+):", (TOP / "Makefile").read_text(), re.MULTILINE)
    assert set(commands) <= set(targets)


def test_ci_runs_lint_tests_and_the_book_of_the_readers():
    script = TOP / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert lines == ["make lint", "make test", "make book"]


@pytest.mark.parametrize("blind", ["TensorFlow", "PyTorch"])
def test_a_gpu_test_fails_where_a_framework_sees_no_gpu(blind, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOP / "scripts")
    import require_gpu

    seen = {"TensorFlow": ["NVIDIA H100"], "PyTorch": ["NVIDIA H100"]}
    monkeypatch.setattr(require_gpu, "gpus", lambda: seen)
    assert require_gpu.main() == 0
    seen[blind] = []
    assert require_gpu.main() == 1
    assert f"{blind} sees no GPU: .venv/bin/pip install" in capsys.readouterr().out


def test_the_gpu_workflow_brings_cuda_checks_for_it_and_keeps_its_cache():
    jobs = read_yaml(".github/workflows/gpu.yml")["jobs"]
    for job in jobs.values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert any("tensorflow[and-cuda]" in command for command in commands)
        assert any(re.search("make test-gpu|require_gpu.py", command) for command in commands)
        assert "runner.temp" not in str(job)
    assert "make test-gpu" in str(jobs["chapters"]) and "make book" in str(jobs["full"])
    recipe = (TOP / "Makefile").read_text().split("test-gpu: $(INSTALLED)\n")[1].split("\n\n")[0]
    assert recipe.index("require_gpu.py") < recipe.index("--nbval-lax") < recipe.index("book/*.ipynb")


def test_help_names_every_command():
    listing = make(TOP).stdout
    for target in ("book", "pdf", "test", "test-gpu", "lint", "bench", "serve", "clean"):
        assert f"make {target} " in listing


# --- The Makefile's installation, with a Python that only pretends ----------------------------------

FAKE = "PYTHON=./fake-python"
FAKE_VENV_PYTHON = """#!/bin/sh
[ "$3" = install ] || exit 0
echo "$@" >> installs.txt
test ! -e broken
"""
FAKE_PYTHON = f"""#!/bin/sh
[ "$1" = -c ] && exit 0
[ "$1 $2" = "-m venv" ] || exit 9
mkdir -p .venv/bin
cat > .venv/bin/python << 'EOF'
{FAKE_VENV_PYTHON}
EOF
chmod +x .venv/bin/python
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(TOP / name, tmp_path)
    python = tmp_path / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # Not the variables that a `make test` around these tests hands down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MURA"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def installs(folder: Path) -> int:
    log = folder / "installs.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_install_is_skipped_until_a_dependency_file_changes(checkout):
    assert make(checkout, "install", FAKE).returncode == 0
    assert "install -e .[all] -c constraints.txt" in (checkout / "installs.txt").read_text()
    assert make(checkout, "install", FAKE).returncode == 0
    assert installs(checkout) == 1
    stamp = checkout / ".venv/mura-course-installed"
    assert float(stamp.read_text()) >= 0
    for count, name in enumerate(("pyproject.toml", "constraints.txt"), start=2):
        later = stamp.stat().st_mtime - 10
        os.utime(stamp, (later, later))
        os.utime(checkout / name)
        assert make(checkout, "install", FAKE).returncode == 0
        assert installs(checkout) == count


def test_a_failed_install_is_not_taken_for_done(checkout):
    (checkout / "broken").touch()
    for attempt in (1, 2):
        assert make(checkout, "install", FAKE).returncode != 0
        assert installs(checkout) == attempt
        assert not list(checkout.glob(".venv/mura-course-installed*"))
    (checkout / "broken").unlink()
    assert make(checkout, "install", FAKE).returncode == 0


def test_an_old_or_missing_python_is_met_with_a_sentence(checkout):
    for python in ("false", "./no-such-python"):
        result = make(checkout, "book", f"PYTHON={python}")
        assert result.returncode != 0
        assert "needs Python 3.11" in result.stderr
        assert "make book PYTHON=" in result.stderr
    assert not (checkout / ".venv").exists()


def test_serving_a_book_that_is_not_there_says_what_to_do(checkout):
    result = make(checkout, "serve", "MURA_PROFILE=smoke")
    assert result.returncode != 0
    assert "make book MURA_PROFILE=smoke" in result.stderr


def test_the_bare_package_brings_no_deep_learning_framework():
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not base & {"torch", "torchvision", "tensorflow", "keras", "lightning", "keras-ocr"}


def test_published_numbers_have_a_source_a_level_and_data():
    """Chapter 10 quotes them; an interval holds its value."""
    table = pd.read_csv(TOP / "mura_course/published_kappas.csv")
    assert table[["source", "reader", "body_part", "level", "evaluated_on", "kappa"]].notna().all(axis=None)
    assert not table.duplicated(["source", "reader", "body_part", "evaluated_on"]).any()
    assert set(table["level"]) == {"image", "study", "not stated"}
    stated = table[table["low"].notna()]
    assert (
        len(stated) == 4
        and (stated["low"] < stated["kappa"]).all()
        and (stated["kappa"] < stated["high"]).all()
    )
    assert table[["auroc", "kappa", "sensitivity", "specificity"]].stack().dropna().between(0, 1).all()
    paper = table[table["evaluated_on"].str.contains("hidden")].groupby("reader")["body_part"].nunique()
    assert (paper.drop("best ensemble") == 8).all()
