"""The setup cell's `chapter.start`: what it prints, seeds, and says where something is missing."""

import importlib.util
import os
import random
import subprocess
import sys
import types

import numpy as np
import pytest
from making import write_mura

from mura_course import chapter, data, profiles
from mura_course.data import index as data_index
from mura_course.errors import KernelError, MuraError


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch):
    """A machine without mounted data or GPU, and without frameworks to seed."""
    monkeypatch.setattr(data_index, "MOUNTS", ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    for name in ("tensorflow", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_DATA", str(tmp_path / "MURA-demo"))
    return write_mura(tmp_path / "MURA-demo", truth=True)


def fields(printed: str) -> dict[str, str]:
    """The block as a dictionary; lines that go on and several notes are joined."""
    found, name = {}, ""
    for line in printed.splitlines():
        assert line[8] == " " and line[9] != " ", f"not aligned: {line!r}"
        assert len(line) <= 78 or " " not in line[9:].strip(), f"too wide for a page: {line!r}"
        name = line[:8].strip() or name
        found[name] = (found.get(name, "") + " " + line[9:]).strip()
    return found


def test_it_returns_profile_and_index_and_says_what_they_are(demo, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(demo.parent))
    profile, index = chapter.start(seed=3)
    assert profile == profiles.get("demo")
    assert index.equals(data.load_index(demo, quiet=True))
    block = fields(capsys.readouterr().out)
    assert list(block) == ["data", "profile", "device", "weights", "seed", "note"]
    assert block["data"].startswith("MURA-demo (synthetic radiographs), 13 images")
    assert block["data"].endswith(os.path.join("~", "MURA-demo"))
    assert block["profile"] == "demo (to change it, set MURA_PROFILE to smoke, demo, full)"
    assert block["device"].startswith("CPU, ") and "random" in block["weights"]
    assert block["seed"] == "3" and "the setup chapter" in block["note"]


def test_mura_gets_the_full_profile_and_no_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MURA_DATA", str(write_mura(tmp_path / "MURA-v1.1")))
    assert chapter.start()[0].name == "full"
    block = fields(capsys.readouterr().out)
    assert block["data"].startswith("MURA-v1.1 (real radiographs)") and "an error" in block["weights"]
    assert "no GPU" in block["note"] and "demo data" not in block["note"]


def test_without_mura_the_demo_data_are_rendered_once_the_profile_is_known(tmp_path, monkeypatch):
    root, asked = write_mura(tmp_path / "MURA-demo", truth=True), []
    monkeypatch.setattr("mura_demo.ensure_demo", lambda cache, studies: asked.append(studies) or root)
    monkeypatch.setenv("MURA_PROFILE", "dmeo")
    with pytest.raises(MuraError, match="dmeo"):
        chapter.start()
    assert asked == []
    for name in ("demo", "smoke"):
        monkeypatch.setenv("MURA_PROFILE", name)
        assert chapter.start()[0].name == name
    assert asked == [profiles.get("demo").demo_studies, profiles.get("smoke").demo_studies]


def test_seeds_are_fixed_also_of_frameworks_that_are_imported_already(demo, monkeypatch):
    seeds: dict[str, int] = {}
    torch = types.SimpleNamespace(manual_seed=lambda seed: seeds.update(torch=seed))
    set_seed = types.SimpleNamespace(set_seed=lambda seed: seeds.update(tensorflow=seed))

    def draw(seed):
        chapter.start(seed)
        return random.random(), np.random.rand()

    assert draw(1) == draw(1) != draw(2)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(random=set_seed))
    chapter.start(7)
    assert seeds == {"torch": 7, "tensorflow": 7}


TWO_GPUS = "GPU 0: Tesla T4 (UUID: GPU-6ef3c1de-0000)\nGPU 1: NVIDIA H200 (UUID: GPU-6e)\n  MIG 1g.18gb\n"


@pytest.mark.parametrize("answer, visible, expected", [
    (TWO_GPUS, "0", ["Tesla T4", "NVIDIA H200"]),
    (TWO_GPUS, "-1", []),
    ("No devices found.\n", "0", []),
    (subprocess.TimeoutExpired("nvidia-smi", 20), "0", []),
    (FileNotFoundError(), "0", []),
])  # fmt: skip
def test_gpus_are_named_where_this_process_may_use_them(monkeypatch, answer, visible, expected):
    def run(command, **options):
        assert command == ["nvidia-smi", "-L"] and options["timeout"]
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, stdout=answer, stderr="")

    monkeypatch.setattr(chapter.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert chapter.gpu_names() == expected


def test_a_wrong_kernel_is_met_with_a_sentence(monkeypatch):
    find, absent = importlib.util.find_spec, ("pandas", "cv2")
    monkeypatch.setattr(chapter.importlib.util, "find_spec", lambda n: None if n in absent else find(n))
    with pytest.raises(KernelError, match="lacks pandas, cv2. .*Kernel > Change Kernel"):
        chapter.start()
