"""The setup cell's `chapter.start`: what it prints, seeds, and says where something is missing."""

import importlib.util
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest

from mura_course import chapter, data, profiles
from mura_course.errors import KernelError, MuraError


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch):
    """A machine without mounted data, GPU or notebook platform, and without frameworks to seed."""
    monkeypatch.setattr(data, "MOUNTS", ())
    monkeypatch.setattr(chapter.shutil, "which", lambda program: None)
    for name in ("MURA_DATA", "MURA_PROFILE", "KAGGLE_KERNEL_RUN_TYPE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("google.colab", "kaggle_secrets", "tensorflow", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def demo(mura_folder, monkeypatch):
    root = mura_folder("MURA-demo", truth=True)
    monkeypatch.setenv("MURA_DATA", str(root))
    return root


@pytest.fixture
def mura(mura_folder, monkeypatch):
    root = mura_folder("MURA-v1.1")
    monkeypatch.setenv("MURA_DATA", str(root))
    return root


def fields(printed: str) -> dict[str, str]:
    """The block as a dictionary; lines that go on and several notes are joined."""
    found, name = {}, ""
    for line in printed.splitlines():
        assert line[8] == " " and line[9] != " ", f"not aligned: {line!r}"
        assert len(line) <= 78 or " " not in line[9:].strip(), f"too wide for a page: {line!r}"
        name = line[:8].strip() or name  # a long text goes on below, indented
        found[name] = (found.get(name, "") + " " + line[9:]).strip()
    return found


def test_it_returns_profile_and_index_and_says_what_they_are(demo, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(demo.parent))
    monkeypatch.setenv("USERPROFILE", str(demo.parent))
    profile, index = chapter.start(seed=3)
    assert profile == profiles.get("demo")
    assert index.equals(data.load_index(demo, quiet=True))
    block = fields(capsys.readouterr().out)
    assert list(block) == ["data", "profile", "device", "weights", "seed", "note"]
    assert block["data"].startswith("MURA-demo (synthetic radiographs), 13 images")
    assert block["data"].endswith(os.path.join("~", "MURA-demo"))
    assert block["profile"] == "demo (to change it, set MURA_PROFILE to smoke, demo or full)"
    assert block["device"].startswith("CPU, ") and block["device"].endswith(" cores")
    assert "random" in block["weights"]
    assert block["seed"] == "3"
    assert "MURA_DATA" in block["note"]


def test_mura_is_not_called_synthetic_and_gets_the_full_profile(mura, capsys):
    profile, _ = chapter.start()
    block = fields(capsys.readouterr().out)
    assert profile.name == "full"
    assert block["data"].startswith("MURA-v1.1 (real radiographs)")
    assert "an error" in block["weights"] and "random" not in block["weights"]
    assert "no GPU" in block["note"] and "demo data" not in block["note"]


def test_the_full_profile_on_demo_data_is_allowed_with_a_warning(demo, capsys, monkeypatch):
    monkeypatch.setenv("MURA_PROFILE", "full")
    profile, index = chapter.start()
    assert profile.name == "full" and index.attrs["is_demo"]
    assert "these are demo data" in fields(capsys.readouterr().out)["note"]


def test_a_misspelt_profile_is_reported_before_anything_is_rendered(monkeypatch):
    renderer = types.ModuleType("mura_course.radiographs")
    renderer.ensure_demo = lambda studies: pytest.fail("rendered")
    monkeypatch.setitem(sys.modules, "mura_course.radiographs", renderer)
    monkeypatch.setattr("mura_course.radiographs", renderer, raising=False)
    monkeypatch.setenv("MURA_PROFILE", "dmeo")
    with pytest.raises(MuraError, match="dmeo"):
        chapter.start()


def test_without_mura_the_demo_data_are_rendered_in_the_profiles_size(mura_folder, monkeypatch):
    root = mura_folder("MURA-demo", truth=True)
    asked = []
    renderer = types.ModuleType("mura_course.radiographs")
    renderer.ensure_demo = lambda studies: asked.append(studies) or root
    monkeypatch.setitem(sys.modules, "mura_course.radiographs", renderer)
    monkeypatch.setattr("mura_course.radiographs", renderer, raising=False)
    assert chapter.start()[0].name == "demo"
    monkeypatch.setenv("MURA_PROFILE", "smoke")
    assert chapter.start()[0].name == "smoke"
    assert asked == [profiles.get("demo").demo_studies, profiles.get("smoke").demo_studies]


def test_seeds_are_fixed(demo):
    def draw(seed):
        chapter.start(seed)
        return random.random(), np.random.rand()

    assert draw(1) == draw(1) != draw(2)


def test_frameworks_are_seeded_where_they_are_imported_already(demo, monkeypatch):
    seeds = {}
    torch = types.SimpleNamespace(manual_seed=lambda seed: seeds.update(torch=seed))
    tensorflow = types.SimpleNamespace(
        random=types.SimpleNamespace(set_seed=lambda seed: seeds.update(tensorflow=seed))
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    chapter.start(7)
    assert seeds == {"torch": 7, "tensorflow": 7}


def test_it_loads_no_framework(demo):
    code = (
        "import sys; from mura_course import chapter; chapter.start(); "
        "print({'torch', 'tensorflow'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


# --- Platforms and devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("module, variable, platform, advice", [
    (None, None, "own machine", ["MURA_DATA"]),
    ("google.colab", None, "colab", ["Google Drive", "/content", "Change runtime type"]),
    ("kaggle_secrets", None, "kaggle", ["Add Input", "/kaggle/input", "Internet on", "Accelerator"]),
    (None, "KAGGLE_KERNEL_RUN_TYPE", "kaggle", ["Add Input"]),
])  # fmt: skip
def test_advice_suits_the_platform(demo, capsys, monkeypatch, module, variable, platform, advice):
    if module:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    if variable:
        monkeypatch.setenv(variable, "Interactive")
    assert chapter.platform() == platform
    chapter.start()
    note = fields(capsys.readouterr().out)["note"]
    assert all(words in note for words in advice)


def _smi(monkeypatch, stdout="", error=None):
    def run(command, **options):
        assert command == ["nvidia-smi", "-L"] and options["timeout"]
        if error:
            raise error
        return subprocess.CompletedProcess(command, 0, stdout=stdout, stderr="")

    monkeypatch.setattr(chapter.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(chapter.subprocess, "run", run)


TWO_GPUS = """\
GPU 0: Tesla T4 (UUID: GPU-6ef3c1de-0000-0000-0000-000000000000)
GPU 1: NVIDIA H200 (UUID: GPU-6ef3c1de-1111-0000-0000-000000000000)
  MIG 1g.18gb     Device  0: (UUID: MIG-6ef3c1de-2222)
"""


def test_gpus_are_named(demo, capsys, monkeypatch):
    _smi(monkeypatch, TWO_GPUS)
    assert chapter.gpu_names() == ["Tesla T4", "NVIDIA H200"]
    chapter.start()
    assert fields(capsys.readouterr().out)["device"] == "Tesla T4, NVIDIA H200"


@pytest.mark.parametrize("stdout, error", [
    ("No devices found.\n", None),
    ("", None),
    ("", subprocess.TimeoutExpired("nvidia-smi", 20)),
    ("", PermissionError()),
])  # fmt: skip
def test_a_driver_without_gpus_is_a_cpu(monkeypatch, stdout, error):
    _smi(monkeypatch, stdout, error)
    assert chapter.gpu_names() == []


@pytest.mark.parametrize("visible, expected", [("", 0), ("-1", 0), ("0", 2)])
def test_hidden_gpus_are_not_reported(monkeypatch, visible, expected):
    _smi(monkeypatch, TWO_GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(chapter.gpu_names()) == expected


# --- A wrong kernel ---------------------------------------------------------------------------------------


def test_an_old_python_is_met_with_a_sentence(monkeypatch):
    monkeypatch.setattr(chapter, "_PYTHON", (99, 0))
    with pytest.raises(KernelError, match=r"Python 3\.\d+.*Choose another kernel"):
        chapter.start()


def test_a_kernel_without_the_packages_is_met_with_a_sentence(monkeypatch):
    find = importlib.util.find_spec
    absent = ("pandas", "cv2")
    monkeypatch.setattr(
        chapter.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    with pytest.raises(KernelError, match="lacks pandas, cv2: .*Kernel > Change Kernel"):
        chapter.start()
