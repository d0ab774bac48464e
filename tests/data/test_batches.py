"""Batches against naive NumPy, torchvision, Keras and torch; augmentation, threads, samplers."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import BODY_PARTS, make_films, smooth
from scipy import ndimage

from mura_course import data
from mura_course.data import AUGMENTS, KL_AUGMENT, Augment, Batches, PixelStore, rotate
from mura_course.errors import DataError

SIZE = 24


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    """20 films in no particular order: 12 train, 4 dev, 4 test."""
    films = make_films(tmp_path_factory.mktemp("films"), (40, 30), patients=10)
    return films.sample(frac=1, random_state=0, ignore_index=True)


@pytest.fixture(scope="module")
def store(index) -> PixelStore:
    return PixelStore.open_or_build(index, SIZE, progress=False)


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


@settings(max_examples=80)
@given(st.integers(0, 99), st.integers(2, 50), st.integers(2, 50), st.floats(-180, 180), st.booleans())
def test_rotation_and_mirroring_follow_the_definition(seed, height, width, degrees, mirror):
    image = smooth(seed, height, width)
    expected = ndimage.rotate(image.astype(float), degrees, reshape=False, order=1, mode="nearest")
    turned, tolerance = rotate(image, degrees, mirror), 1 + 255 * 4 / min(height, width) / 16
    assert np.abs(turned - expected[:, :: -1 if mirror else 1]).max() <= tolerance  # OpenCV: to 1/32 pixel
    assert np.array_equal(rotate(image, 0.0, True), image[:, ::-1])


@settings(max_examples=60)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 999))
def test_autocontrast_follows_torchvisions_formula(low, high, seed):
    low, high = sorted((low, high))
    image = np.random.default_rng(seed).integers(low, high, (9, 7), np.uint8, endpoint=True)
    expected, values = image, image.astype(np.float32)
    if values.max() > values.min():
        scale = np.float32(255) * (np.float32(1) / (values.max() - values.min()))
        expected = np.clip((values - values.min()) * scale, 0, 255).astype(np.uint8)
    assert np.array_equal(data.autocontrast(image), expected)


def test_augment_draws_from_the_whole_range_and_with_each_probability(monkeypatch):
    turned, stretched = [], []
    monkeypatch.setattr(data.batches, "rotate", lambda image, *how: turned.append(how) or image)
    monkeypatch.setattr(data.batches, "autocontrast", lambda image: stretched.append(image) or image)
    augment = Augment(rotation=30, flip=0.3, autocontrast=0.2)
    for draw in np.random.default_rng(0).random((2000, 3)):
        augment(np.zeros((4, 4), np.uint8), draw)
    angles, mirrored = np.array(turned).T
    assert -30 <= angles.min() < -29.5 and 29.5 < angles.max() <= 30 and abs(angles.mean()) < 1.5
    assert abs(mirrored.mean() - 0.3) < 0.04 and abs(len(stretched) / 2000 - 0.2) < 0.04
    left, right = np.uint8([[1, 2]]), np.uint8([[2, 1]])
    for probability, expected in ((0.4, left), (0.6, right)):
        assert np.array_equal(Augment(flip=probability)(left, np.full(3, 0.5)), expected)


FORMULAS = {
    "0..1": lambda v, c: v / 255,
    "-1..1": lambda v, c: v / 127.5 - 1,
    "0..255": lambda v, c: v,
    "imagenet": lambda v, c: (v / 255 - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c],
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("scale", data.SCALES)
def test_floats_are_the_pixels_correctly_rounded(index, store, scale, layout):
    x, y = Batches(store, index, scale=scale, layout=layout)[0]
    assert x.dtype == y.dtype == np.float32 and x.flags.c_contiguous and x.flags.writeable
    assert x.shape == ((20, SIZE, SIZE, 3) if layout == "nhwc" else (20, 3, SIZE, SIZE))
    assert y.tolist() == index["label"].tolist()
    films = store.pixels[store.rows(index)].astype(np.float64)
    for c in range(3):
        expected = FORMULAS[scale](films, c).astype(np.float32)
        assert np.array_equal(x[..., c] if layout == "nhwc" else x[:, c], expected)


@pytest.mark.parametrize("augment", [None, KL_AUGMENT, AUGMENTS["KN"]])
def test_any_number_of_workers_gives_the_same_batches(index, store, augment):
    options = {"batch_size": 5, "shuffle": True, "augment": augment, "seed": 3}
    one_by_one = Batches(store, index, **options)
    expected = [one_by_one[i][0] for i in range(4)]
    for workers in (0, 1, 2, 5):
        assert same([x for x, _ in Batches(store, index, workers=workers, **options)], expected)


def test_epochs_are_permutations_that_depend_on_seed_and_epoch(index, store):
    batches = Batches(store, index, 7, shuffle=True, augment=KL_AUGMENT, seed=1)
    orders, epochs = [], []
    for epoch in range(4):
        assert batches.epoch == epoch
        orders.append(batches.order.tolist())
        labels = [y for _, y in (batches[i] for i in range(3))]
        assert np.concatenate(labels).tolist() == index["label"].to_numpy()[batches.order].tolist()
        epochs.append([x for x, _ in batches])
    assert all(sorted(order) == list(range(20)) for order in orders) and len(set(map(tuple, orders))) == 4
    resumed = Batches(store, index, 7, shuffle=True, augment=KL_AUGMENT, seed=1)
    resumed.set_epoch(2)
    assert np.array_equal(resumed[1][0], epochs[2][1]) and same([x for x, _ in resumed], epochs[2])
    assert Batches(store, index, 7, shuffle=True, seed=2).order.tolist() not in orders
    # Not to change with NumPy, platform or refactoring: recorded runs depend on it.
    assert Batches(store, index[:8], shuffle=True, seed=7).order.tolist() == [6, 5, 3, 1, 0, 7, 2, 4]


def test_what_happens_to_an_image_depends_on_its_row_alone(index, store):
    shuffled = Batches(store, index, 5, shuffle=True, augment=KL_AUGMENT, seed=9)
    plain = Batches(store, index, 20, augment=KL_AUGMENT, seed=9)
    assert np.array_equal(np.concatenate([shuffled[i][0] for i in range(4)]), plain[0][0][shuffled.order])
    assert not np.array_equal(plain[0][0], Batches(store, index, 20)[0][0])


def test_lengths_last_batches_and_targets(index, store):
    _, parts = Batches(store, index, target="body_part")[0]
    assert parts.dtype == np.int64 and [BODY_PARTS[p] for p in parts] == index["body_part"].tolist()
    _, both = Batches(store, index, target=("label", "body_part"))[0]
    assert np.array_equal(both["body_part"], parts) and both["label"].tolist() == index["label"].tolist()
    assert [len(y) for _, y in Batches(store, index, 6)] == [6, 6, 6, 2]
    assert [len(y) for _, y in Batches(store, index, 6, drop_last=True)] == [6, 6, 6]
    batches = Batches(store, index, 6)
    assert len(batches) == 4 and len(batches[-1][1]) == 2
    with pytest.raises(IndexError):
        batches[4]


def test_errors_come_through_and_threads_end_with_the_loop(index, store, monkeypatch):
    original, before = Batches._batch, threading.active_count()

    def fail(self, i):
        if i == 7:
            raise RuntimeError("seventh")
        return original(self, i)

    monkeypatch.setattr(Batches, "_batch", fail)
    batches, seen = Batches(store, index, batch_size=1, workers=3), 0
    with pytest.raises(RuntimeError, match="seventh"):
        for _ in batches:
            seen += 1
    next(iter(batches))  # a loop that is left early
    assert seen == 7 and batches.epoch == 0 and threading.active_count() == before


def test_the_datasets_of_both_reports(index, store):
    kl, kn = (make(index, store, seed=5, batch_size=4) for make in (data.kl_datasets, data.kn_datasets))
    assert [(name, part.augment, part.shuffle, *set(part.index["split"])) for name, part in kl.items()] == [
        ("train original", None, True, "train"),
        ("train augmented", KL_AUGMENT, True, "train"),
        ("validation", None, False, "dev"),
        ("test", None, False, "test"),
    ]
    assert np.array_equal(kl["train original"].order, kl["train augmented"].order)
    assert {(part.scale, part[0][0].shape) for part in kl.values()} == {("0..1", (4, SIZE, SIZE, 3))}
    assert {(part.scale, part[0][0].shape) for part in kn.values()} == {("imagenet", (4, 3, SIZE, SIZE))}
    assert list(kn) == ["train", "validation", "test"] and kn["train"].augment == AUGMENTS["KN"]
    undivided = index[index["split"].ne("dev")]
    assert list(data.kn_datasets(undivided, store)) == ["train", "test"]
    with pytest.raises(DataError, match="split_dev"):
        data.kl_datasets(undivided, store)


@pytest.fixture
def torch():
    pytest.importorskip("mura_course.torch_tools")  # makes Lightning importable beside TensorFlow
    return pytest.importorskip("torch")


@pytest.mark.parametrize("scale", data.SCALES)
def test_keras_sees_every_epoch_once_and_the_pixels_that_numpy_sees(index, store, scale):
    keras = pytest.importorskip("keras")
    batches, seen = Batches(store, index, 6, shuffle=True, augment=KL_AUGMENT, seed=4, scale=scale), []
    dataset = batches.keras()
    data.check_scale(scale, dataset)

    class Watch(keras.Model):
        def train_step(self, batch):
            seen.append([part.numpy() for part in batch])
            return {"loss": 0.0}

    model = Watch()
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(dataset, epochs=2, shuffle=False, verbose=0)
    assert dataset.batches.epoch == 2 and len(dataset) == 4
    dataset.set_epoch(1)
    model.fit(dataset, initial_epoch=1, epochs=2, shuffle=False, verbose=0)
    expected = [batch for _ in range(2) for batch in batches]
    for (x, y), (pixels, labels) in zip(seen, [*expected, *expected[4:]], strict=True):
        assert x.dtype == np.float32 and np.allclose(x, pixels, rtol=0, atol=1e-6 if scale != "0..255" else 0)
        assert np.array_equal(y, labels)


def test_torch_sees_every_epoch_once(index, store, torch):
    batches = Batches(store, index, 6, shuffle=True, augment=AUGMENTS["KN"], scale="imagenet", seed=2)
    loader = batches.torch()
    data.check_scale("imagenet", loader)
    assert isinstance(loader, torch.utils.data.DataLoader) and len(loader) == 4
    epochs = [list(loader), list(loader)]
    assert loader.batches.epoch == 2 and epochs[0][0][0].shape == (6, 3, SIZE, SIZE)
    for epoch, seen in enumerate(epochs):
        batches.set_epoch(epoch)
        for i, (x, y) in enumerate(seen):
            assert x.dtype == y.dtype == torch.float32 and x.is_contiguous()
            assert np.array_equal(x.numpy(), batches[i][0].transpose(0, 3, 1, 2))
            assert np.array_equal(y.numpy(), batches[i][1])
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader))[0], epochs[1][0][0])


@pytest.mark.parametrize("put_in_by", ["hand", "Lightning"])
def test_two_ranks_see_every_batch_once(index, store, torch, put_in_by):
    whole_set, seen = Batches(store, index, 5, shuffle=True, seed=3), []
    loaders = [Batches(store, index, 5, shuffle=True, seed=3, layout="nchw").torch() for _ in range(2)]
    for rank, loader in enumerate(loaders):
        sampler = torch.utils.data.DistributedSampler(loader.dataset, 2, rank, shuffle=False)
        if put_in_by == "Lightning":
            inner = pytest.importorskip("lightning.pytorch.utilities.data")
            ranked = inner._update_dataloader(loader, sampler)
        else:
            ranked = type(loader)(loader.dataset, batch_size=None, sampler=sampler)
        assert len(ranked) == 2 and ranked.scale == "0..1" and ranked.batches is loader.batches
        seen += [(2 * k + rank, x) for k, (x, _) in enumerate(ranked)]
        assert ranked.batches.epoch == 1
    assert sorted(i for i, _ in seen) == [0, 1, 2, 3]
    for i, x in seen:
        assert np.array_equal(x.numpy(), whole_set[i][0].transpose(0, 3, 1, 2))
