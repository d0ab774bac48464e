"""Pixels: the store against kills and odd files, the rest against naive NumPy, Keras and torchvision."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mura_course import data, pixel_store, pixels
from mura_course.errors import DataError, DataNotFoundError
from mura_course.pixels import KL_AUGMENT, KN_AUGMENT, SCALES, Augment, Batches, PixelStore

SIZE = 24


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """A film-like uint8 image: smooth, so that resampling is well conditioned."""
    coarse = np.random.default_rng(seed).random((5, 4), np.float32)
    return (cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) * 255).astype(np.uint8)


def make_index(root: Path, count: int = 12, sides: tuple[int, int] = (30, 40)) -> pd.DataFrame:
    """`count` grey PNG films of sides between `sides`, and their index, not in the order of its paths."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        part, split = data.BODY_PARTS[number % 7], "test" if number % 4 == 3 else "train"
        path = f"{split}/XR_{part}/patient{number:05d}/study1_negative/image1.png"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(number, *rng.integers(*sides, 2))).save(root / path)
        study = f"{part}/patient{number:05d}/study1"
        rows.append((path, split, part, number, study, 1, number % 2))
    index = pd.DataFrame(rows, columns=list(data.COLUMNS)).sample(frac=1, random_state=0, ignore_index=True)
    index["body_part"] = pd.Categorical(index["body_part"], categories=data.BODY_PARTS)
    index.attrs = {"root": str(root), "name": "MURA-demo", "is_demo": True}
    return index


def with_dev(index: pd.DataFrame) -> pd.DataFrame:
    """`index` with a third of its training images set aside, as `data.split_dev` does."""
    chosen = index["split"].eq("train") & index["patient"].mod(3).eq(0)
    return index.assign(split=index["split"].mask(chosen, "dev"))


@pytest.fixture
def index(tmp_path) -> pd.DataFrame:
    return make_index(tmp_path / "MURA-demo")


def build(index: pd.DataFrame, size: int = SIZE, **options) -> PixelStore:
    return PixelStore.open_or_build(
        index, size, **({"cache": Path(index.attrs["root"]).parent, "progress": False} | options)
    )


def file_of(index: pd.DataFrame, row: int) -> Path:
    return Path(index.attrs["root"], index["path"][row])


# --- One image ----------------------------------------------------------------------------------------


def weights(old: int, new: int) -> np.ndarray:
    """(new, old): how much of each old pixel goes into each new one, straight from the definitions."""
    if new < old:  # the share of the new pixel that the old one covers
        edges, step = np.arange(new)[:, None] * old / new, old / new
        left, right = np.arange(old), np.arange(old) + 1
        return (np.minimum(edges + step, right) - np.maximum(edges, left)).clip(0) / step
    places = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)  # linear between pixel centres
    return (1 - np.abs(places[:, None] - np.arange(old))).clip(0)


def naive_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return weights(image.shape[0], height) @ image.astype(float) @ weights(image.shape[1], width).T


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 90), st.integers(1, 90), st.integers(4, 60))
def test_squash_averages_down_and_interpolates_up(seed, height, width, size):
    image = smooth(seed, height, width)
    ours = pixel_store.resize(image, size).astype(int)
    assert ours.shape == (size, size)
    assert np.abs(ours - naive_resize(image, size, size)).max() <= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 90), st.integers(1, 90), st.integers(4, 60))
def test_pad_keeps_the_aspect_and_pads_black(seed, height, width, size):
    image = np.maximum(smooth(seed, height, width), 1)
    ours = pixel_store.resize(image, size, "pad").astype(int)
    tall, wide = (max(1, round(side * size / max(height, width))) for side in (height, width))
    top, left = (size - tall) // 2, (size - wide) // 2
    inner = ours[top : top + tall, left : left + wide]
    assert np.abs(inner - naive_resize(image, tall, wide)).max() <= 2
    assert ours.shape == (size, size) and ours.sum() == inner.sum()


def test_every_mode_of_file_gives_the_same_film(tmp_path):
    film = smooth(1, 40, 30)
    grey, rgb = Image.fromarray(film), Image.fromarray(np.stack([film] * 3, axis=-1))
    modes = {
        "grey": grey,
        "rgb": rgb,
        "palette": grey.convert("P"),
        "transparent": Image.fromarray(np.dstack([film] * 3 + [np.zeros_like(film)])),
        "grey and alpha": Image.fromarray(np.dstack([film, np.full_like(film, 9)])),
        "16 bit": Image.fromarray(film.astype(np.uint16) * 256 + 200),
    }
    for name, image in modes.items():
        image.save(tmp_path / f"{name}.png")
        for channels in (1, 3):
            read = pixels.read_image(tmp_path / f"{name}.png", 20, channels=channels)
            assert read.shape == (20, 20, channels) and read.dtype == np.uint8, name
            assert np.abs(read.astype(int) - naive_resize(film, 20, 20)[..., None]).max() <= 1, name


def test_colours_keep_their_order_and_one_bit_and_one_pixel_are_read(tmp_path):
    Image.new("RGB", (9, 5), (200, 100, 50)).save(tmp_path / "colour.png")
    assert pixels.read_image(tmp_path / "colour.png", 4, channels=3)[2, 2].tolist() == [200, 100, 50]
    Image.new("1", (9, 5), 1).save(tmp_path / "bit.png")
    assert np.all(pixels.read_image(tmp_path / "bit.png", 4) == 255)
    Image.new("L", (1, 1), 7).save(tmp_path / "dot.png")
    assert np.all(pixels.read_image(tmp_path / "dot.png", 4) == 7)
    assert (pixels.read_image(tmp_path / "dot.png", 4, "pad") == 7).sum() == 16


# --- The store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rule", pixel_store.RULES)
def test_store_holds_each_image_at_its_row_for_any_order(index, rule, channels):
    store = build(index, rule=rule, channels=channels, workers=3)
    assert store.pixels.shape == (12, SIZE, SIZE, channels) and not store.pixels.flags.writeable
    for part in (
        index,
        index[::-1],
        index[index["split"] == "test"],
        index.sample(5, random_state=1),
        index[:0],
    ):
        rows = store.rows(part)
        assert rows.dtype == np.int64 and len(rows) == len(part)
        for row, path in zip(rows, part["path"], strict=True):
            film = pixels.read_image(Path(index.attrs["root"], path), SIZE, rule, channels)
            assert np.array_equal(store.pixels[row], film)


def test_one_store_whatever_the_order_and_the_development_split(index):
    folder = build(index).folder
    split = with_dev(index)
    assert build(index[::-1]).folder == build(split).folder == folder
    assert (
        len({folder, *(build(index, **o).folder for o in ({"size": 25}, {"rule": "pad"}, {"channels": 3}))})
        == 4
    )


def test_opened_again_nothing_is_decoded(index, monkeypatch):
    first = build(index)
    monkeypatch.setattr(pixel_store, "read_image", None)
    assert build(index) == first


def test_other_data_are_refused_and_changed_images_noticed(index, tmp_path):
    store = build(index)
    other = make_index(tmp_path / "other")
    with pytest.raises(DataError, match="open_or_build"):
        store.rows(other)
    other.attrs = {}
    other.loc[3, "path"] = "train/XR_HAND/patient99999/study1_negative/image1.png"
    with pytest.raises(DataError, match="1 images.*patient99999"):
        store.rows(other)
    Image.fromarray(smooth(50, 60, 60)).save(file_of(index, 0))
    assert build(index).folder != store.folder
    assert build(make_index(tmp_path / "copy")).folder != store.folder


@pytest.mark.parametrize(
    "arguments", [{"rule": "crop"}, {"channels": 2}, {"unreadable": "ignore"}], ids=lambda a: next(iter(a))
)
def test_wrong_arguments_name_the_valid_ones(index, arguments):
    with pytest.raises(DataError, match="must be one of"):
        build(index, **arguments)


def test_an_index_without_rows_or_attrs_is_refused(index):
    bare = index.copy()
    bare.attrs = {}
    for bad in (index[:0], bare):
        with pytest.raises(DataError, match="load_index"):
            PixelStore.open_or_build(bad, SIZE)


def spoil(index: pd.DataFrame) -> list[str]:
    """Seven images of seven kinds of unreadable; returns their paths."""
    files = [file_of(index, row) for row in range(7)]
    whole = files[0].read_bytes()
    for file, content in zip(
        files, (whole[:40], whole[: len(whole) // 2], whole[:-8], b"", b"text"), strict=False
    ):
        file.write_bytes(content)
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 255
    files[5].write_bytes(bytes(spoilt))
    files[6].unlink()
    return index["path"][:7].tolist()


def test_unreadable_images_stop_with_one_error_that_lists_them(index):
    whole = {file: file.read_bytes() for file in (file_of(index, row) for row in range(12))}
    bad = spoil(index)
    with pytest.raises(DataError) as caught:
        build(index)
    message = str(caught.value)
    assert "7 of 12 images" in message and "and 2 more" in message and 'unreadable="skip"' in message
    assert sum(path in message for path in bad) == 5

    for file in list(whole)[:6]:
        file.write_bytes(whole[file])
    with pytest.raises(DataError, match="(?s)1 of 12 images.*No such file"):
        build(index, unreadable="raise")
    list(whole)[6].write_bytes(whole[list(whole)[6]])
    store = build(index)
    assert not store.unreadable
    rows = store.rows(index)
    for row, file in zip(rows, whole, strict=True):
        assert np.array_equal(store.pixels[row], pixels.read_image(file, SIZE))


def test_only_what_failed_is_decoded_again(index, monkeypatch):
    file = file_of(index, 4)
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))  # of the same size, so that the store stays the same
    with pytest.raises(DataError, match="1 of 12"):
        build(index)
    file.write_bytes(whole)
    read = []
    original = pixel_store.read_image
    monkeypatch.setattr(pixel_store, "read_image", lambda file, *a: read.append(file) or original(file, *a))
    store = build(index)
    assert read == [file] and not store.unreadable
    assert np.array_equal(store.pixels[store.rows(index)[4]], original(file, SIZE))


def test_skipped_images_are_recorded_and_kept_out_of_batches(index):
    bad = spoil(index)
    store = build(index, unreadable="skip")
    assert (
        set(store.unreadable)
        == set(bad)
        == set(json.loads((store.folder / "store.json").read_text())["unreadable"])
    )
    assert store.usable(index).tolist() == [False] * 7 + [True] * 5
    assert (
        not store.pixels[store.rows(index[:7])].any()
        and store.pixels[store.rows(index[7:])].any(axis=(1, 2)).all()
    )
    with pytest.raises(DataError, match="usable"):
        Batches(store, index)
    assert len(Batches(store, index[store.usable(index)], batch_size=2)) == 3
    with pytest.raises(DataError, match="7 of 12"):
        build(index)
    assert build(index, unreadable="skip") == store


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np, pandas as pd
from mura_course import pixel_store
cache, root, paths = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split("|")
index = pd.DataFrame({"path": paths, "split": "train", "label": 0})
index.attrs = {"root": root, "name": "MURA-demo", "is_demo": True}
pixel_store.BLOCK_BYTES = 3 * 24 * 24
original, kills, noted = pixel_store.read_image, 0, []
def slow(*arguments):
    time.sleep(0.004)
    return original(*arguments)
pixel_store.read_image = slow
while True:
    child = os.fork()
    if not child:
        pixel_store.PixelStore.open_or_build(index, 24, cache=cache, progress=False, workers=2)
        os._exit(0)
    time.sleep(random.uniform(0.0, 0.05 + 0.005 * kills))
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    kills += killed
    for partial in cache.glob("pixels/*.partial"):
        done, _ = pixel_store._progress(partial, 24 * 24)
        noted.append(done)
        stored = np.fromfile(partial / "pixels.u8", np.uint8)
        for row, path in enumerate(sorted(paths)[:done]):
            film = original(Path(root, path), 24).ravel()
            assert np.array_equal(stored[row * 576 : (row + 1) * 576], film), (row, done)
    if not killed:
        break
print(kills, *noted)
"""


def test_killed_at_random_moments_it_continues(tmp_path):
    index = make_index(tmp_path / "MURA-demo", 40)
    command = [
        sys.executable,
        "-c",
        KILLER,
        str(tmp_path / "a"),
        index.attrs["root"],
        "|".join(index["path"]),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    kills, *noted = map(int, result.stdout.split())
    assert kills >= 1 and noted == sorted(noted), result.stdout  # it never starts over
    (survivor,) = tmp_path.glob("a/pixels/*/pixels.u8")
    assert survivor.read_bytes() == (build(index).folder / "pixels.u8").read_bytes()
    assert not list(tmp_path.glob("a/pixels/*.partial"))


def test_a_note_that_promises_more_than_there_is_starts_over(index):
    store = build(index)
    partial = store.folder.rename(store.folder.with_name(store.folder.name + ".partial"))
    (partial / "store.json").unlink()
    os.truncate(partial / "pixels.u8", 3 * SIZE * SIZE + 5)
    assert np.array_equal(
        build(index).pixels[0], pixels.read_image(Path(store.root, min(index["path"])), SIZE)
    )


def test_two_that_want_the_same_store_wait_for_each_other(index, monkeypatch, capsys):
    original, read = pixel_store.read_image, []
    monkeypatch.setattr(
        pixel_store, "read_image", lambda *a: read.append(a) or time.sleep(0.01) or original(*a)
    )
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(build(index))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3 and stores[0] == stores[1] == stores[2]
    assert len(read) == 12 and "waiting" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no store.json", "bad json", "cut short", "format"])
def test_a_damaged_store_is_refused(index, damage):
    store = build(index)
    if damage == "no store.json":
        (store.folder / "store.json").unlink()
    elif damage == "bad json":
        (store.folder / "store.json").write_text("{")
    elif damage == "cut short":
        os.truncate(store.folder / "pixels.u8", 100)
    else:
        info = json.loads((store.folder / "store.json").read_text()) | {"format": 0}
        (store.folder / "store.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="Delete it"):
        PixelStore.open(store.folder)


def test_a_disk_without_room_or_rights_names_folder_and_variable(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DataNotFoundError, match=r"(?s)file.*MURA_CACHE"):
        build(index, cache=tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # a write fails half-way, as on a full disk
    try:
        with pytest.raises(DataNotFoundError, match=r"(?s)limited.*MURA_CACHE"):
            build(index, cache=tmp_path / "limited")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert build(index, cache=tmp_path / "limited").images == 12  # with room again, it goes on
    usage = type("Usage", (), {"free": 1})
    monkeypatch.setattr(pixel_store.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DataNotFoundError, match="GB are free.*MURA_CACHE"):
        build(index, cache=tmp_path / "full")


def big_store(folder: Path, images: int, size: int) -> tuple[PixelStore, pd.DataFrame]:
    """A finished store of so many black images that takes no room on disk, and its index."""
    paths = [f"train/XR_HAND/patient{n:06d}/study1_negative/image1.png" for n in range(images)]
    (folder / "big").mkdir()
    np.save(folder / "big" / "paths.npy", np.array([path.encode() for path in paths]))
    with open(folder / "big" / "pixels.u8", "wb") as file:
        file.truncate(images * size * size)
    info = {
        "size": size,
        "rule": "squash",
        "channels": 1,
        "images": images,
        "name": "MURA-demo",
        "root": "/r",
    }
    (folder / "big" / "store.json").write_text(json.dumps(info | {"format": 1, "unreadable": {}}))
    index = pd.DataFrame({"path": paths, "split": "train", "label": 0})
    index.attrs = {"root": "/r", "name": "MURA-demo", "is_demo": True}
    return PixelStore.open(folder / "big"), index


def test_a_large_store_opens_at_once_and_memory_stays_flat(tmp_path):
    store, index = big_store(tmp_path, 20_000, 128)  # 328 MB
    start = time.perf_counter()
    store = PixelStore.open(store.folder)
    assert time.perf_counter() - start < 0.05
    batches = Batches(store, index, batch_size=200, shuffle=True, channels=1)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    before, most = resident(), 0.0
    for i, (x, _) in enumerate(batches):
        assert x.shape == (200, 128, 128, 1)
        most = max(most, resident()) if i % 10 == 0 else most
    assert most - before < 170, (before, most)  # batches of 13 MB each, not the store


# --- Augmentation -------------------------------------------------------------------------------------


def naive_rotate(image: np.ndarray, degrees: float, mirror_x: bool, mirror_y: bool) -> np.ndarray:
    """Bilinear, edges repeated, straight from the definition: rotate about the centre, then mirror."""
    height, width = image.shape
    rows, columns = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    angle = np.deg2rad(degrees)
    r = np.cos(angle) * rows + np.sin(angle) * columns + (height - 1) / 2
    c = np.cos(angle) * columns - np.sin(angle) * rows + (width - 1) / 2
    r, c = r.clip(0, height - 1), c.clip(0, width - 1)
    r0, c0 = np.floor(r).astype(int), np.floor(c).astype(int)
    r1, c1, fr, fc = np.minimum(r0 + 1, height - 1), np.minimum(c0 + 1, width - 1), r - r0, c - c0
    image = image.astype(float)
    top, bottom = image[r0, c0] * (1 - fc) + image[r0, c1] * fc, image[r1, c0] * (1 - fc) + image[r1, c1] * fc
    turned = top * (1 - fr) + bottom * fr
    return turned[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(2, 50),
    st.integers(2, 50),
    st.floats(-180, 180),
    st.booleans(),
    st.booleans(),
)
def test_rotation_and_mirroring_follow_the_definition(seed, height, width, degrees, mirror_x, mirror_y):
    image = smooth(seed, height, width)
    turned = pixels.rotate(image, degrees, mirror_x, mirror_y)
    tolerance = 1 + 255 * 4 / min(height, width) / 16  # OpenCV places to 1/32 pixel
    assert np.abs(turned - naive_rotate(image, degrees, mirror_x, mirror_y)).max() <= tolerance


def test_rotation_of_nothing_and_of_colours():
    image = smooth(3, 31, 31)
    assert np.array_equal(pixels.rotate(image, 0.0, True, True), image[::-1, ::-1])
    colours = np.dstack([image, 255 - image, image // 2])
    turned = pixels.rotate(colours, 21.0, True)
    for channel in range(3):
        assert np.array_equal(
            turned[..., channel], pixels.rotate(np.ascontiguousarray(colours[..., channel]), 21.0, True)
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 999), st.sampled_from([(9, 7), (9, 7, 3)]))
def test_autocontrast_follows_torchvisions_formula(low, high, seed, shape):
    low, high = sorted((low, high))
    image = np.random.default_rng(seed).integers(low, high, shape, np.uint8, endpoint=True)
    expected = image.copy()
    for channel in np.ndindex(image.shape[2:]):
        values = image[(..., *channel)].astype(np.float32)
        if values.max() > values.min():
            scale = np.float32(255) * (np.float32(1) / (values.max() - values.min()))
            expected[(..., *channel)] = np.clip((values - values.min()) * scale, 0, 255).astype(np.uint8)
    assert np.array_equal(pixels.autocontrast(image), expected)


def test_augment_applies_each_change_with_its_probability():
    image = smooth(4, 20, 20) // 2 + 30
    draws = np.random.default_rng(0).random((2000, 4))
    augment = Augment(flip=0.3, vertical_flip=0.6, autocontrast=0.2)
    looks = {
        (x, y, z): (lambda a: pixels.autocontrast(a) if z else a)(
            image[:: -1 if y else 1, :: -1 if x else 1].copy()
        )
        for x in (0, 1)
        for y in (0, 1)
        for z in (0, 1)
    }
    counts = dict.fromkeys(looks, 0)
    for draw in draws:
        changed = augment(image, draw)
        (look,) = (key for key, value in looks.items() if np.array_equal(value, changed))
        counts[look] += 1
    for axis, probability in enumerate((0.3, 0.6, 0.2)):
        share = sum(count for key, count in counts.items() if key[axis]) / 2000
        assert abs(share - probability) < 0.04


def test_augment_rotates_by_the_whole_range_and_by_no_more(monkeypatch):
    angles = []
    monkeypatch.setattr(pixels, "rotate", lambda image, angle, *mirrors: angles.append(angle) or image)
    for draw in np.random.default_rng(0).random((500, 4)):
        KL_AUGMENT(np.zeros((4, 4), np.uint8), draw)
    assert -30 <= min(angles) < -29 and 29 < max(angles) <= 30 and abs(np.mean(angles)) < 3


@pytest.mark.parametrize(
    "wrong", [{"rotation": -1}, {"rotation": 181}, {"flip": 1.2}, {"autocontrast": float("nan")}]
)
def test_impossible_augmentations_are_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        Augment(**wrong)


# --- Batches ------------------------------------------------------------------------------------------


def whole(batches) -> list[np.ndarray]:
    return [x for x, _ in batches]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


FORMULAS = {
    "0..1": lambda v, c: v / 255,
    "-1..1": lambda v, c: v / 127.5 - 1,
    "0..255": lambda v, c: v,
    "imagenet": lambda v, c: (v / 255 - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c],
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize(("stored", "channels"), [(1, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("scale", SCALES)
def test_floats_are_the_pixels_correctly_rounded(index, scale, stored, channels, layout):
    store = build(index, channels=stored)
    if scale == "imagenet" and channels == 1:
        with pytest.raises(DataError, match="channels"):
            Batches(store, index, scale=scale, channels=channels)
        return
    x, y = Batches(store, index, scale=scale, channels=channels, layout=layout)[0]
    assert x.dtype == y.dtype == np.float32 and x.flags.c_contiguous and x.flags.writeable
    assert x.shape == ((12, SIZE, SIZE, channels) if layout == "nhwc" else (12, channels, SIZE, SIZE))
    assert y.tolist() == index["label"].tolist()
    films = store.pixels[store.rows(index)].astype(np.float64)
    for c in range(channels):
        expected = FORMULAS[scale](films[..., min(c, stored - 1)], c).astype(np.float32)
        assert np.array_equal(x[..., c] if layout == "nhwc" else x[:, c], expected)


@pytest.mark.parametrize("augment", [None, KL_AUGMENT, KN_AUGMENT])
def test_any_number_of_workers_gives_the_same_batches(index, augment):
    store = build(index)
    options = {"batch_size": 5, "shuffle": True, "augment": augment, "seed": 3}
    expected = whole(Batches(store, index, workers=0, **options))
    for workers in (1, 2, 5):
        assert same(whole(Batches(store, index, workers=workers, **options)), expected)
    one_by_one = Batches(store, index, **options)
    assert same([one_by_one[i][0] for i in (2, 0, 1)], [expected[i] for i in (2, 0, 1)])


def test_epochs_are_permutations_that_depend_on_seed_and_epoch(index):
    batches = Batches(build(index), index, 5, shuffle=True, augment=KL_AUGMENT, seed=1)
    orders, epochs = [], []
    for epoch in range(4):
        assert batches.epoch == epoch
        orders.append(batches.order.tolist())
        labels = [y for _, y in (batches[i] for i in range(3))]
        assert np.concatenate(labels).tolist() == index["label"].to_numpy()[batches.order].tolist()
        epochs.append(whole(batches))
    assert all(sorted(order) == list(range(12)) for order in orders) and len(set(map(tuple, orders))) == 4
    resumed = Batches(build(index), index, 5, shuffle=True, augment=KL_AUGMENT, seed=1)
    resumed.set_epoch(2)
    assert np.array_equal(resumed[1][0], epochs[2][1]) and same(whole(resumed), epochs[2])
    other = Batches(build(index), index, 5, shuffle=True, augment=KL_AUGMENT, seed=2)
    assert other.order.tolist() not in orders


def test_the_shuffle_is_pinned(index):
    # Not to change with NumPy, platform or refactoring: published runs depend on it.
    assert Batches(build(index), index, shuffle=True, seed=7).order.tolist() == [
        11,
        7,
        4,
        8,
        2,
        10,
        6,
        5,
        3,
        0,
        9,
        1,
    ]


def test_what_happens_to_an_image_depends_on_its_row_alone(index):
    store = build(index)
    shuffled = Batches(store, index, 5, shuffle=True, augment=KL_AUGMENT, seed=9)
    plain = Batches(store, index, 12, augment=KL_AUGMENT, seed=9)
    assert np.array_equal(np.concatenate([shuffled[i][0] for i in range(3)]), plain[0][0][shuffled.order])
    assert not np.array_equal(plain[0][0], Batches(store, index, 12)[0][0])


def test_lengths_ends_and_last_batches(index):
    store = build(index)
    assert [len(y) for _, y in Batches(store, index, 5)] == [5, 5, 2]
    assert [len(y) for _, y in Batches(store, index, 5, drop_last=True)] == [5, 5]
    batches = Batches(store, index, 5)
    assert len(batches) == 3 and len(batches[-1][1]) == 2
    with pytest.raises(IndexError):
        batches[3]
    for arguments in ({"batch_size": 13, "drop_last": True}, {"batch_size": 0}):
        with pytest.raises(DataError, match="no batch"):
            Batches(store, index, **arguments)
    with pytest.raises(DataError, match="no batch"):
        Batches(store, index[:0])


def test_targets(index):
    store = build(index)
    _, parts = Batches(store, index, target="body_part")[0]
    assert parts.dtype == np.int64 and [data.BODY_PARTS[p] for p in parts] == index["body_part"].tolist()
    hands = index[index["body_part"] == "HAND"].astype({"body_part": str})
    assert set(Batches(store, hands, target="body_part")[0][1]) == {data.BODY_PARTS.index("HAND")}
    _, both = Batches(store, index, target=("label", "body_part"))[0]
    assert np.array_equal(both["body_part"], parts) and both["label"].tolist() == index["label"].tolist()
    with pytest.raises(DataError, match="target"):
        Batches(store, index, target="finding")


def test_batches_that_are_kept_or_seen_through_views_are_never_overwritten(index):
    store = build(index)
    options = {"batch_size": 2, "augment": KL_AUGMENT, "workers": 3}
    views = [x[1:, ::2] for x, _ in Batches(store, index, **options)]
    expected = [x[1:, ::2] for x, _ in Batches(store, index, **(options | {"workers": 0}))]
    assert same(views, expected)


def test_memory_that_nobody_holds_is_used_again(index):
    places = set()
    many = pd.concat([index] * 20)
    for x, _ in Batches(build(index), many, batch_size=6, workers=2):
        places.add(x.ctypes.data)
    assert len(places) <= 6  # of 40 batches


def test_errors_come_through_and_threads_end(index, monkeypatch):
    batches = Batches(build(index), index, batch_size=1, workers=3)
    original, before = batches._batch, threading.active_count()

    def fail(i, *arguments):
        if i == 7:
            raise RuntimeError("seventh")
        return original(i, *arguments)

    monkeypatch.setattr(batches, "_batch", fail)
    seen = 0
    with pytest.raises(RuntimeError, match="seventh"):
        for _ in batches:
            seen += 1
    assert seen == 7 and batches.epoch == 0 and threading.active_count() == before


def test_a_loop_that_is_left_early_stops_cleanly(index):
    batches, before = Batches(build(index), index, batch_size=1, workers=3), threading.active_count()
    threads = cv2.getNumThreads()
    for _ in range(20):
        for _ in batches:
            break
    assert threading.active_count() == before and cv2.getNumThreads() == threads and batches.epoch == 0


def test_no_more_than_a_few_batches_are_made_ahead(index, monkeypatch):
    batches, made = Batches(build(index), index, batch_size=1, workers=2), []
    original = batches._batch
    monkeypatch.setattr(batches, "_batch", lambda i, *a: made.append(i) or original(i, *a))
    stream = iter(batches)
    next(stream)
    time.sleep(0.1)
    assert len(made) <= 5
    stream.close()


def test_opencvs_threads_are_put_back(index):
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        with pixel_store.single_threaded_opencv():
            with pixel_store.single_threaded_opencv():
                assert cv2.getNumThreads() == 1
            assert cv2.getNumThreads() == 1
        for _ in Batches(build(index), index, batch_size=2):
            pass
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_the_wrong_scale_is_refused(index):
    batches = Batches(build(index), index, scale="0..1")
    pixels.check_scale("0..1", batches)
    with pytest.raises(DataError, match=r"'-1..1'.*'0..1'"):
        pixels.check_scale("-1..1", batches)
    with pytest.raises(DataError, match="states no scale"):
        pixels.check_scale("0..1", np.zeros(3))
    with pytest.raises(DataError, match="must be one of"):
        pixels.check_scale("0-1", batches)


# --- The reports' datasets and the adapters -----------------------------------------------------------


@pytest.fixture
def split_index(index) -> pd.DataFrame:
    return with_dev(index)


def test_the_four_datasets_of_kl_table_1(split_index):
    sets = pixels.kl_datasets(split_index, build(split_index), seed=5, batch_size=4)
    assert list(sets) == ["train original", "train augmented", "validation", "test"]
    original, augmented, validation, test = sets.values()
    assert (
        (original.augment, augmented.augment) == (None, KL_AUGMENT) and original.shuffle and augmented.shuffle
    )
    assert np.array_equal(original.order, augmented.order)
    assert {*original.index["split"]} == {*augmented.index["split"]} == {"train"}
    assert {*validation.index["split"]} == {"dev"} and {*test.index["split"]} == {"test"}
    assert not (validation.shuffle or test.shuffle or validation.augment or test.augment)
    assert {part.scale for part in sets.values()} == {"0..1"}
    assert {part.batch_size for part in sets.values()} == {4}
    reported = pixels.kl_datasets(split_index, build(split_index), shuffle_evaluation=True)
    assert all(part.shuffle and part.batch_size == 64 for part in reported.values())


def test_kn_datasets(split_index):
    sets = pixels.kn_datasets(split_index, build(split_index), batch_size=4)
    assert list(sets) == ["train", "validation", "test"]
    assert sets["train"].augment == Augment(flip=0.5, autocontrast=0.5) and sets["train"].shuffle
    assert all(part.scale == "imagenet" and part[0][0].shape[1:] == (3, SIZE, SIZE) for part in sets.values())


def test_datasets_need_a_development_split(index):
    for make in (pixels.kl_datasets, pixels.kn_datasets):
        with pytest.raises(DataError, match="split_dev"):
            make(index, build(index))


@pytest.mark.parametrize("workers", [1, 2])
def test_keras_sees_every_epoch_once(index, workers):
    import keras

    batches = Batches(build(index), index, 3, shuffle=True, augment=KL_AUGMENT, seed=4, workers=workers)
    dataset = batches.keras()
    assert isinstance(dataset, keras.utils.PyDataset) and len(dataset) == 4 and dataset.scale == "0..1"
    pixels.check_scale("0..1", dataset)
    sums: list[float] = []

    class Watch(keras.Model):
        def train_step(self, batch):
            sums.append(float(np.asarray(batch[0], np.float64).sum()))
            return {"loss": 0.0}

    model = Watch()
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(dataset, epochs=2, shuffle=False, verbose=0)
    expected = [float(x.sum(dtype=np.float64)) for _ in range(2) for x, _ in batches]
    assert np.allclose(sums, expected, rtol=1e-5) and dataset.batches.epoch == 2
    dataset.set_epoch(1)
    sums.clear()
    model.fit(dataset, initial_epoch=1, epochs=2, shuffle=False, verbose=0)
    assert np.allclose(sums, expected[4:], rtol=1e-5)


def test_rotation_is_imagedatagenerators():
    import tensorflow as tf

    generator = tf.keras.preprocessing.image.ImageDataGenerator()
    image = smooth(8, 64, 64)
    for theta in (-30.0, -7.5, 12.0, 29.0):
        for mirror in (False, True):
            change = {"theta": theta, "flip_horizontal": mirror}
            theirs = generator.apply_transform(image[..., None].astype(np.float32), change)[..., 0]
            assert np.abs(pixels.rotate(image, theta, mirror) - theirs).max() <= 2


# torchvision needs a process of its own: its import fails hard in one that has loaded TensorFlow.
TORCH = """
import sys, numpy as np, pandas as pd, torch
from torchvision.transforms import functional
from mura_course import pixels
rng = np.random.default_rng(0)
for low, high in ((0, 255), (40, 90), (7, 7), (0, 1), (254, 255), (3, 250)):
    for shape in ((17, 13), (17, 13, 3)):
        image = rng.integers(low, high, shape, np.uint8, endpoint=True)
        tensor = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
        theirs = functional.autocontrast(tensor).permute(1, 2, 0).numpy().reshape(shape)
        assert np.array_equal(pixels.autocontrast(image), theirs), (low, high, shape)
for high in range(256):  # rounding differs from range to range, so every width
    low = int(rng.integers(high + 1)) if high % 3 else 0
    ramp = np.arange(low, high + 1, dtype=np.uint8)[None]
    theirs = functional.autocontrast(torch.from_numpy(ramp[None]))[0].numpy()
    assert np.array_equal(pixels.autocontrast(ramp), theirs), (low, high)
store = pixels.PixelStore.open(sys.argv[1])
index = pd.read_csv(sys.argv[2])
batches = pixels.Batches(store, index, 5, shuffle=True, augment=pixels.KN_AUGMENT, scale="imagenet", seed=2)
loader = batches.torch()
pixels.check_scale("imagenet", loader)
assert isinstance(loader, torch.utils.data.DataLoader) and len(loader) == 3
first, second = list(loader), list(loader)
assert loader.batches.epoch == 2 and first[0][0].shape == (5, 3, 24, 24)
assert first[0][0].dtype == first[0][1].dtype == torch.float32 and first[0][0].is_contiguous()
for epoch, seen in enumerate((first, second)):
    for i, (x, y) in enumerate(seen):
        batches.set_epoch(epoch)
        assert np.array_equal(x.numpy(), batches[i][0].transpose(0, 3, 1, 2))
        assert np.array_equal(y.numpy(), batches[i][1])
loader.set_epoch(1)
assert torch.equal(next(iter(loader))[0], second[0][0])
both = next(iter(pixels.Batches(store, index, target=("label", "body_part")).torch()))[1]
assert both["body_part"].dtype == torch.int64 and both["label"].tolist() == index["label"].tolist()
"""


@pytest.mark.slow
def test_torch_loader_and_torchvisions_autocontrast(index, tmp_path):
    index.to_csv(tmp_path / "index.csv", index=False)
    command = [sys.executable, "-c", TORCH, str(build(index).folder), str(tmp_path / "index.csv")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_neither_framework_is_imported_by_itself():
    code = (
        "import sys; from mura_course import pixels; print({'torch', 'keras', 'tensorflow'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
