"""Shared fixtures: a cache folder of the tests' own, and tiny data sets in MURA's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import settings

# (split folder, body part, patient, study, positive, number of views): some patients have several studies
# and several parts, with mixed labels; patients of train and valid differ, as in MURA.
STUDIES = (
    ("train", "HAND", 11, 1, True, 2),
    ("train", "HAND", 11, 2, False, 1),
    ("train", "ELBOW", 11, 1, False, 3),
    ("train", "WRIST", 12, 1, True, 1),
    ("train", "ELBOW", 13, 1, True, 1),
    ("train", "WRIST", 14, 1, False, 2),
    ("valid", "SHOULDER", 21, 1, True, 2),
    ("valid", "HAND", 22, 1, False, 1),
)


# Hypothesis' own limit of time per example would be a timed test, which a busy machine fails.
settings.register_profile("book", deadline=None)
settings.load_profile("book")

# Whoever starts the longest file last waits for it alone: they go first where files run side by side.
LONGEST = (
    *("test_keras_transfer", "test_text_removal", "test_radiographs", "test_keras_models"),
    *("test_pixels", "test_tuning", "test_integrity"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache, data or choice of profile.

    The bone clouds alone are shared with it: they take long to build, and are kept by a hash of their recipe.
    """
    from mura_course.data import cache_dir

    bones = cache_dir() / "bones"
    bones.mkdir(exist_ok=True)
    own = tmp_path_factory.mktemp("cache")
    (own / "bones").symlink_to(bones, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MURA_CACHE", str(own))
        for name in ("MURA_DATA", "MURA_PROFILE", "MURA_RUNS"):
            patch.delenv(name, raising=False)
        yield


def write_mura(
    root: Path,
    studies: Iterable[tuple] = STUDIES,
    *,
    header: bool = False,
    newline: str = "\n",
    bom: bool = False,
    prefix: str = "MURA-v1.1/",
    extension: str = ".png",
    macos: bool = False,
    truth: bool = False,
) -> Path:
    """Write empty image files and four CSV files; `extension` is the disk's, the CSV files say ``.png``."""
    lines = {
        f"{folder}_{kind}": [] for folder in ("train", "valid") for kind in ("image_paths", "labeled_studies")
    }
    for folder, part, patient, study, positive, views in studies:
        sign = "positive" if positive else "negative"
        place = f"{folder}/XR_{part}/patient{patient:05d}/study{study}_{sign}"
        (root / place).mkdir(parents=True)
        lines[f"{folder}_labeled_studies"].append(f"{prefix}{place}/,{int(positive)}")
        for view in range(1, views + 1):
            (root / place / f"image{view}{extension}").touch()
            lines[f"{folder}_image_paths"].append(f"{prefix}{place}/image{view}.png")
            if macos:
                (root / place / f"._image{view}.png").touch()
                lines[f"{folder}_image_paths"].append(f"{prefix}{place}/._image{view}.png")
    for name, rows in lines.items():
        titles = ["Img_Path" if name.endswith("paths") else "path,label"] if header else []
        text = newline.join([*titles, *rows, ""])
        (root / f"{name}.csv").write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    if truth:
        (root / "truth.csv").write_text("path,finding\n")
    return root


@pytest.fixture
def mura_folder(tmp_path) -> Callable[..., Path]:
    """``mura_folder(name, **options of write_mura)`` writes a tiny data set and returns its root."""

    def make(name: str = "MURA-v1.1", **options) -> Path:
        return write_mura(tmp_path / name, **options)

    return make
