"""Features of a frozen backbone: whose they are, when they are computed, what damage and kills do to them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from making import flip_byte, make_films

from mura_course.data import AUGMENTS, Batches, PixelStore, store
from mura_course.data.features import digest_of, extract
from mura_course.errors import DataError, DiskError

SIZE = 24


class Projection:
    """An `Extractor` of NumPy alone: three fixed weighted sums of the pixels."""

    name, size, dim, scale, layout = "projection", None, 3, "-1..1", "nchw"

    def __init__(self, seed: int = 0, stop_at: int | None = None) -> None:
        self.weights = np.random.default_rng(seed).normal(size=(3 * SIZE * SIZE, 3)).astype(np.float32)
        self.digest, self.stop_at, self.seen = digest_of([self.weights]), stop_at, []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        assert x.shape[1:] == (3, SIZE, SIZE) and x.min() >= -1 and x.max() <= 1
        self.seen.append(len(x))
        return x.reshape(len(x), -1) @ self.weights


class Trunk(Projection):
    """Gives maps: the image itself, every second pixel of it."""

    dim = (3, SIZE // 2, SIZE // 2)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(len(x))
        return x[:, :, ::2, ::2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def index(tmp_path) -> pd.DataFrame:
    return make_films(tmp_path / "films", patients=10)


def batches(index: pd.DataFrame, **options) -> Batches:
    images = PixelStore.open_or_build(index, SIZE, progress=False)
    return Batches(images, index, **{"batch_size": 6, "seed": 4} | options)


def compute(of: Batches, extractor: Projection | None = None, **options):
    return extract(extractor or Projection(), of, progress=False, **options)


def assert_features_of(found, images: Batches, extractor: Projection, epoch: int) -> None:
    """Batch for batch in this epoch: the features of the images, their targets, their order."""
    found.set_epoch(epoch)
    images.set_epoch(epoch)
    assert len(found) == len(images) and np.array_equal(found.order, images.order)
    for i in range(len(images)):
        np.testing.assert_allclose(found[i][0], extractor(images[i][0]), rtol=1e-4, atol=1e-3)
        assert found[i][0].dtype == np.float32 and np.array_equal(found[i][1], images[i][1])


@pytest.mark.parametrize("kind, dtype", [(Projection, np.float32), (Trunk, np.float16)])
def test_features_are_those_of_each_image_in_any_order_and_computed_once(index, kind, dtype):
    extractor, options = kind(), {"scale": "-1..1", "layout": "nchw", "shuffle": True}
    found, images = compute(batches(index, shuffle=True), extractor), batches(index, **options)
    assert sum(extractor.seen) == len(index) and found.views[0].dtype == dtype
    for epoch in (0, 3):
        assert_features_of(found, images, extractor, epoch)
    assert found.index is not None and found.scale is None and found.epoch == 3
    again = kind()
    whole = compute(batches(index, drop_last=True, target="body_part", batch_size=9), again, views=5)
    assert again.seen == [] and len(whole) == 2 and whole[0][1].dtype == np.int64
    assert [len(x) for x, _ in found] == [6, 6, 6, 2] and found.epoch == 4


def test_as_many_views_as_epochs_are_augmenting_in_every_epoch(index):
    extractor, augment = Projection(), {"augment": AUGMENTS["KL"], "shuffle": True}
    found = compute(batches(index, **augment), extractor, views=3)
    images = batches(index, scale="-1..1", layout="nchw", **augment)
    assert sum(extractor.seen) == 3 * len(index)
    for epoch in range(3):
        assert_features_of(found, images, extractor, epoch)


def test_other_weights_images_seeds_or_augmentations_have_other_features(index, cache):
    part, augment = index[index["split"].eq("train")], AUGMENTS["KL"]
    for of, extractor in (
        (batches(index), Projection()),
        (batches(index), Projection(seed=1)),
        (batches(part), Projection()),
        (batches(index[::-1]), Projection()),
        (batches(index, augment=augment), Projection()),
        (batches(index, augment=augment, seed=5), Projection()),
        (batches(index, augment=AUGMENTS["KN"]), Projection()),
    ):
        compute(of, extractor)
        assert sum(extractor.seen) == len(of.index)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 7


def test_fault_7_a_replaced_image_has_new_features(index):
    before = compute(batches(index))[0][0]
    cv2.imwrite(str(Path(index.attrs["root"], index["path"][2])), np.full((32, 32), 90, np.uint8))
    after = compute(batches(index))[0][0]
    assert np.array_equal(np.flatnonzero((before != after).any(axis=1)), [2])


def test_fault_7_a_flipped_byte_of_cached_features_is_noticed(index, cache):
    compute(batches(index))
    (file,) = cache.glob("*/features.npy")
    flip_byte(file, -5)
    store._digest.cache_clear()  # as in another process
    with pytest.raises(DiskError, match=r"features\.npy.*damaged.*Delete the folder"):
        compute(batches(index))


def test_an_interrupted_pass_leaves_nothing_and_a_backbone_without_a_signal_is_refused(index, cache):
    with pytest.raises(KeyboardInterrupt):
        compute(batches(index), Projection(stop_at=3))
    assert [entry for entry in cache.iterdir() if entry.suffix != ".lock"] == []
    extractor = Projection()
    extractor.size = 48
    with pytest.raises(DataError, match="projection takes images of 48 px, this store holds 24 px"):
        compute(batches(index), extractor)
    for seed, factor in enumerate((0, 1e-12, np.nan), start=1):
        dead = Projection(seed)
        dead.weights *= factor
        with pytest.raises(DataError, match="projection makes the same of every image.*ImageNet.*calibrate"):
            compute(batches(index), dead)
        assert len(compute(batches(index[:1]), dead).index) == 1  # one image says nothing
