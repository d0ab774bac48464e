"""`import mura_course` is light, and no room but the frameworks' own loads a framework."""

import subprocess
import sys

import pytest

FRAMEWORKS = {"tensorflow", "keras", "torch", "torchvision", "lightning"}
HEAVY = FRAMEWORKS | {"pandas", "matplotlib", "cv2", "numpy", "sklearn"}


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{HEAVY!r} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "module", ["", ".errors", ".paths", ".disk", ".profiles", ".recipes", ".chapter", ".cli"]
)
def test_the_package_and_its_floor_load_nothing_heavy(module):
    assert loaded_after(f"import mura_course{module}") == set()


@pytest.mark.parametrize("modules", ["data", "text, runs", "metrics, reports, plots, weights"])
def test_rooms_load_no_framework(modules):
    assert not loaded_after(f"from mura_course import {modules}") & FRAMEWORKS


@pytest.mark.slow
@pytest.mark.parametrize("room, foreign", [("keras_tools", "torch"), ("torch_tools", "tensorflow")])
def test_a_frameworks_room_does_not_load_the_other_framework(room, foreign):
    loaded = loaded_after(f"from mura_course.{room} import models, training")
    assert loaded & FRAMEWORKS and foreign not in loaded
