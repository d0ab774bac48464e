"""The pixel store: images against naive NumPy, the files against damage, kills and odd files."""

from __future__ import annotations

import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import flip_byte, make_films, smooth
from PIL import Image

from mura_course.data import PixelStore, read_image, resize, store
from mura_course.errors import DataError, DataNotFoundError, DiskError

SIZE = 24


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path) -> pd.DataFrame:
    """12 films of 40 x 30 px: 8 train, 2 dev, 2 test."""
    return make_films(tmp_path / "MURA-demo", (40, 30), patients=6)


def build(index: pd.DataFrame, size: int = SIZE, **options) -> PixelStore:
    return PixelStore.open_or_build(index, size, progress=False, **options)


def file_of(index: pd.DataFrame, row: int) -> Path:
    return Path(index.attrs["root"], index["path"].iloc[row])


def weights(old: int, new: int) -> np.ndarray:
    """(new, old): how much of each old pixel goes into each new one, straight from the definitions."""
    if new < old:  # the fraction of the new pixel that the old one covers
        edges, step = np.arange(new)[:, None] * old / new, old / new
        left, right = np.arange(old), np.arange(old) + 1
        return (np.minimum(edges + step, right) - np.maximum(edges, left)).clip(0) / step
    places = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)  # linear between pixel centres
    return (1 - np.abs(places[:, None] - np.arange(old))).clip(0)


def naive_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return weights(image.shape[0], height) @ image.astype(float) @ weights(image.shape[1], width).T


@settings(max_examples=60)
@given(st.integers(0, 99), st.integers(1, 90), st.integers(1, 90), st.integers(4, 60))
def test_squash_and_pad_average_down_and_interpolate_up(seed, height, width, size):
    image = np.maximum(smooth(seed, height, width), 1)
    assert np.abs(resize(image, size).astype(int) - naive_resize(image, size, size)).max() <= 2
    padded = resize(image, size, "pad").astype(int)
    tall, wide = (max(1, round(side * size / max(height, width))) for side in (height, width))
    top, left = (size - tall) // 2, (size - wide) // 2
    inner = padded[top : top + tall, left : left + wide]
    assert np.abs(inner - naive_resize(image, tall, wide)).max() <= 2
    assert padded.shape == (size, size) and padded.sum() == inner.sum()  # all else is black


def test_every_mode_of_file_gives_the_same_film(tmp_path):
    film = smooth(1, 40, 30)
    grey, rgb = Image.fromarray(film), Image.fromarray(np.stack([film] * 3, axis=-1))
    modes = {"grey": grey, "rgb": rgb, "palette": grey.convert("P")}
    modes["transparent"] = Image.fromarray(np.dstack([film] * 3 + [np.zeros_like(film)]))
    modes["grey and alpha"] = Image.fromarray(np.dstack([film, np.full_like(film, 9)]))
    modes["16 bit"] = Image.fromarray(film.astype(np.uint16) * 256 + 200)
    for name, image in modes.items():
        image.save(tmp_path / f"{name}.png")
        for channels in (1, 3):
            read = read_image(tmp_path / f"{name}.png", 20, channels=channels)
            assert read.shape == (20, 20, channels) and read.dtype == np.uint8, name
            assert np.abs(read.astype(int) - naive_resize(film, 20, 20)[..., None]).max() <= 1, name
    Image.new("RGB", (9, 5), (200, 100, 50)).save(tmp_path / "colour.png")
    assert read_image(tmp_path / "colour.png", 4, channels=3)[2, 2].tolist() == [200, 100, 50]


def test_store_holds_each_image_at_its_row_for_any_order_and_decodes_once(index, monkeypatch):
    one = build(index, workers=3)
    assert one.pixels.shape == (12, SIZE, SIZE) and not one.pixels.flags.writeable and one.images == 12
    test = index[index["split"] == "test"]
    for part in (index, index[::-1], test, index.sample(5, random_state=1), index[:0]):
        rows = one.rows(part)
        assert rows.dtype == np.int64 and len(rows) == len(part)
        for row, path in zip(rows, part["path"], strict=True):
            assert np.array_equal(one.pixels[row], read_image(Path(index.attrs["root"], path), SIZE)[..., 0])
    assert len({one.folder, build(index, 25).folder, build(index[:6]).folder}) == 3
    monkeypatch.setattr(store, "read_image", None)
    assert build(index[::-1]) == build(index.assign(split="train")) == build(index) == one


def test_other_data_are_refused(index, tmp_path):
    one, other = build(index), make_films(tmp_path / "other", patients=6)
    with pytest.raises(DataError, match="open_or_build"):
        one.rows(other)
    other.attrs = {}  # as after some operations of pandas
    assert len(one.rows(other)) == 12
    with pytest.raises(DataError, match=r"lacks 1 images.*99-1\.png"):
        one.rows(other.replace("3-1.png", "99-1.png"))


def test_fault_7_a_replaced_image_is_noticed_though_its_file_is_as_large(index):
    one, file = build(index), file_of(index, 0)
    before = one.pixels[one.rows(index)[0]].copy()
    size, time_before = file.stat().st_size, file.stat().st_mtime_ns
    cv2.imwrite(str(file), np.full((40, 30), 200, np.uint8))
    file.write_bytes(file.read_bytes() + bytes(size - file.stat().st_size))
    os.utime(file, ns=(time_before, time_before + 1))
    assert file.stat().st_size == size
    new = build(index)
    assert new.folder != one.folder and np.all(new.pixels[new.rows(index)[0]] == 200) and before.std() > 0


@pytest.mark.parametrize("place", [128, -1, 20])  # the first pixel, the last, the header
def test_fault_7_a_flipped_byte_of_the_stored_pixels_is_noticed(index, place):
    flip_byte(build(index).folder / "pixels.npy", place)
    store._digest.cache_clear()  # as in another process
    with pytest.raises(DiskError, match=r"pixels\.npy.*damaged.*Delete the folder"):
        build(index)


DAMAGE = (b"", b"{", b"[]", b"\xff\xfe", b'{"sha256": 5}', b'{"sha": ""}', Path.mkdir, os.mkfifo, id)


@pytest.mark.parametrize("name", ["pixels.json", "pixels.npy"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_fault_9_a_damaged_small_file_or_a_fifo_gives_one_line_with_the_remedy(index, name, damage):
    file = build(index).folder / name
    file.unlink()
    damage(file) if callable(damage) else file.write_bytes(damage)  # id: nothing takes its place
    store._digest.cache_clear()
    with pytest.raises(DiskError, match="Delete the folder") as caught:
        build(index)
    assert "\n" not in str(caught.value) and str(file.parent) in str(caught.value)


def test_unreadable_images_stop_with_one_error_that_lists_them(index, cache):
    whole = file_of(index, 0).read_bytes()
    spoilt = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :]
    for row, content in enumerate((whole[:40], whole[: len(whole) // 2], whole[:-8], b"", b"text", spoilt)):
        file_of(index, row).write_bytes(content)
    with pytest.raises(DataError, match="6 of 12 images(?s:.*)Restore it") as caught:
        build(index)
    message = str(caught.value)
    assert sum(path in message for path in index["path"][:6]) == 5 and "1 more" in message
    assert message.count(": empty, no image, or cut short.") == 5
    assert [file.name for file in (cache / "pixels").iterdir() if file.suffix != ".lock"] == []


def test_fault_9_a_fifo_among_the_images_does_not_hang_the_store(index, monkeypatch):
    file_of(index, 3).unlink()
    os.mkfifo(file_of(index, 3))
    with pytest.raises(DataNotFoundError, match=r"1 images are absent.*\n.*1-2\.png"):
        build(index)
    monkeypatch.setattr(store, "pixel_key", lambda index: "it came when the files had been listed")
    with pytest.raises(DataError, match=r"1 of 12 images cannot be read.*\n.*1-2\.png: no ordinary file"):
        build(index)


def test_two_that_want_the_same_store_wait_for_each_other(index, monkeypatch, capsys):
    read = []
    monkeypatch.setattr(store, "read_image", lambda *a: read.append(a) or time.sleep(0.01) or read_image(*a))
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: build(index), range(3))
    assert others == [first, first] and len(read) == 12 and "waiting" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing_and_the_variable_is_named(index, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # a write fails half-way, as on a full disk
    try:
        with pytest.raises(DiskError, match=r"cannot be written.*MURA_CACHE"):
            build(index)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [file for file in (cache / "pixels").iterdir() if file.suffix != ".lock"]
    folder = build(index).folder
    folder.rename(folder.with_name(f".{folder.name}.1.part"))  # left by a process that was killed
    assert build(index).images == 12 and not list((cache / "pixels").glob(".*.part"))


@pytest.mark.slow
def test_killed_at_random_moments_the_store_is_whole_or_absent(index, cache, monkeypatch):
    monkeypatch.setattr(store, "read_image", lambda *a: time.sleep(0.01) or read_image(*a))
    rng, killed = np.random.default_rng(0), 0
    for _ in range(12):
        child = os.fork()
        if not child:
            build(index, workers=1)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        for folder in (cache / "pixels").glob("[!.]*-????????????"):
            assert sorted(file.name for file in folder.iterdir()) == ["pixels.json", "pixels.npy"]
        if list((cache / "pixels").glob("[!.]*-????????????")):
            break
    assert killed
    one = build(index)
    assert np.array_equal(one.pixels, [read_image(one.root / path, SIZE)[..., 0] for path in one.paths])
    assert not list((cache / "pixels").glob(".*.part"))  # nothing is left of the killed ones
