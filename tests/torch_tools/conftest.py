"""Fixtures of the PyTorch half's tests; without torch they are skipped."""

import pytest
from making import make_films

pytest.importorskip("torch")

import torch  # noqa: E402
from torch_tools import tiny as small  # noqa: E402

from mura_course import data  # noqa: E402
from mura_course.torch_tools import models  # noqa: E402

torch.set_num_threads(1)  # networks so small gain nothing from more


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """ResNet18 is a network as small as can be, 6 features instead of 512; each test has its own cache."""
    monkeypatch.setitem(models.BACKBONES, "ResNet18", small.TINY)
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def store(films):
    return data.PixelStore.open_or_build(films, 32, progress=False)


@pytest.fixture
def sets(films, store):
    return data.kn_datasets(films, store, batch_size=8, workers=0)
