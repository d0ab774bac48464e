"""`import mura_course` is light, and the package's rooms load no deep-learning framework."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mura_course

HEAVY = ("tensorflow", "keras", "torch", "torchvision", "pandas", "matplotlib", "cv2", "numpy", "sklearn")


def _loaded_after(statement: str) -> tuple[set[str], float]:
    code = (
        f"import sys, time; t = time.perf_counter(); {statement}; "
        f"print(time.perf_counter() - t, *[m for m in {HEAVY!r} if m in sys.modules])"
    )
    seconds, *loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    return set(loaded), float(seconds)


def test_importing_the_package_is_fast_and_loads_nothing_heavy():
    loaded, seconds = _loaded_after("import mura_course")
    assert loaded == set()
    assert seconds < 0.3


@pytest.mark.parametrize("module, allowed", [
    ("errors", set()),
    ("profiles", set()),
    ("chapter", set()),
    ("data", {"numpy", "pandas"}),
])  # fmt: skip
def test_a_room_loads_no_more_than_it_needs(module, allowed):
    loaded, _ = _loaded_after(f"import mura_course.{module}")
    assert loaded <= allowed


def test_the_version_is_the_one_of_the_distribution():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)[1] == mura_course.__version__
