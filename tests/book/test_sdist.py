"""The source distribution: its licence is one that packaging tools read, it is whole, and its tests run."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('dist'))"
RUN = "MURA-demo-0/demo/a-0/run.json"
NOT_SOURCES = (".git", ".venv", "_build", "build", "dist", "*.egg-info", "__pycache__", ".ipynb_checkpoints")
CACHES = (
    ".pytest_cache",
    ".ruff_cache",
    ".import_linter_cache",
    ".grimp_cache",
    ".hypothesis",
    ".coverage*",
    "htmlcov",
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> tuple[Path, Path, str]:
    """The repository's sources, the folder that its distribution unpacks to, and what setuptools said."""
    folder = tmp_path_factory.mktemp("sdist")
    sources = folder / "sources"
    shutil.copytree(TOP, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES, *CACHES))
    for name in (RUN, "MURA-demo-0/demo/b-0.partial/last.ckpt"):
        (sources / "book/_runs" / name).parent.mkdir(parents=True)
        (sources / "book/_runs" / name).write_text("{}")
    command = [sys.executable, "-c", BUILD.format("sdist")]
    result = subprocess.run(command, cwd=sources, check=True, capture_output=True, text=True)
    with tarfile.open(next((sources / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return sources, next(folder.glob("mura_course-*")), result.stdout + result.stderr


@pytest.mark.slow
def test_it_holds_every_file_of_the_repository(unpacked):
    sources, inside, _ = unpacked
    files = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith(("dist/", "mura_course.egg-info/"))}
    assert len(files) > 100
    assert sorted(name for name in files if not (inside / name).exists()) == []


@pytest.mark.slow
def test_a_wheel_of_it_brings_every_room_and_the_recorded_runs(unpacked, tmp_path):
    _, inside, _ = unpacked
    command = [sys.executable, "-c", BUILD.format("wheel")]
    subprocess.run(command, cwd=inside, check=True, capture_output=True)
    with zipfile.ZipFile(next((inside / "dist").glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    rooms = [*TOP.glob("mura_course/**/*.py"), *TOP.glob("mura_demo/**/*.py"), *TOP.glob("mura_*/**/*.csv")]
    assert [room for room in rooms if not (tmp_path / room.relative_to(TOP)).is_file()] == []
    assert (tmp_path / "mura_course/_runs" / RUN).is_file() and not list(tmp_path.rglob("*.ckpt"))
    command = [sys.executable, "-c", "from mura_course import paths; print(paths.recorded_runs())"]
    for place, runs in ((tmp_path, tmp_path / "mura_course/_runs"), (inside, inside / "book/_runs")):
        environment = os.environ | {"PYTHONPATH": str(place)}
        said = subprocess.run(command, cwd=tmp_path.parent, env=environment, capture_output=True, text=True)
        assert said.stdout.strip() == str(runs), said.stderr


@pytest.mark.slow
def test_the_licence_is_one_that_packaging_tools_read(unpacked):
    """As a table it stops building in 2027; setuptools warned at every build."""
    _, inside, said = unpacked
    metadata = (inside / "PKG-INFO").read_text()
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nLicense-File: LICENSE\n" in metadata
    assert "License :: " not in metadata
    assert "Deprecat" not in said


@pytest.mark.slow
def test_its_tests_run_where_it_was_unpacked(unpacked):
    _, inside, _ = unpacked
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_foundation.py",
        "tests/book/test_repository.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(inside)}
    result = subprocess.run(command, cwd=inside, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert f"rootdir: {inside}" in result.stdout
