"""Shared fixtures: a cache folder of the tests' own, and tiny data sets in MURA's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from making import write_mura

# Hypothesis' own limit of time per example would be a timed test, which a busy machine fails.
settings.register_profile("book", deadline=None)
settings.load_profile("book")

# Whoever starts the longest file last waits for it alone: these rooms go first where files run side by side.
LONGEST = ("keras_tools", "torch_tools", "demo", "text", "book", "data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.parent.name).index(item.path.parent.name))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache, data or choice of profile.

    The bone clouds alone are shared with it: they take long to build, and are kept by a hash of their recipe.
    """
    from mura_course.paths import cache_dir

    bones = cache_dir() / "bones"
    bones.mkdir(parents=True, exist_ok=True)
    own = tmp_path_factory.mktemp("cache")
    (own / "bones").symlink_to(bones, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MURA_CACHE", str(own))
        for name in ("MURA_DATA", "MURA_PROFILE", "MURA_RUNS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def mura_folder(tmp_path) -> Callable[..., Path]:
    """``mura_folder(name, **options of making.write_mura)`` writes a tiny data set and returns its root."""

    def make(name: str = "MURA-v1.1", **options) -> Path:
        return write_mura(tmp_path / name, **options)

    return make
