"""Every image decoded once: `PixelStore`, a memory-mapped uint8 array on disk (chapter 4).

Reads the images of an index and writes only below ``<cache folder>/pixels/``. Killed half-way, a build
continues; a finished store is a folder that was renamed whole. `mura_course.pixels` makes batches of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from . import data
from .errors import DataError, DataNotFoundError

STORE_FORMAT = 1  # part of a store's key: raise it when what `read_image` returns changes
RULES = ("squash", "pad")
BLOCK_BYTES = 1 << 24  # pixels decoded between two notes of progress: what a kill can cost


def one_of(what: str, value: object, valid: Iterable) -> None:
    """Raise DataError, listing the `valid` values, unless `value` is one of them."""
    if value not in valid:
        raise DataError(f"{what} must be one of {', '.join(map(repr, valid))}, not {value!r}.")


_opencv_lock, _opencv_threads = threading.Lock(), []


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """OpenCV without threads of its own, for they get in the way of ours.

    The setting is global: so the first one in notes the number of threads, and the last one out puts it back.
    """
    with _opencv_lock:
        _opencv_threads.append(_opencv_threads[0] if _opencv_threads else cv2.getNumThreads())
        cv2.setNumThreads(1)
    try:
        yield
    finally:
        with _opencv_lock:
            threads = _opencv_threads.pop()
            if not _opencv_threads:
                cv2.setNumThreads(threads)


# --- One image ----------------------------------------------------------------------------------------


def read_image(file: str | os.PathLike, size: int, rule: str = "squash", channels: int = 1) -> np.ndarray:
    """The image in `file` as uint8 (size, size, channels), grey (1) or RGB (3), resized by `rule`.

    squash: stretched to a square, as both reports do (KL 1.4, KN 2.1). pad: longest side to `size`, the rest
    black, centred. 16-bit images keep their high byte; transparency is ignored. Raises DataError where
    the file cannot be decoded, OSError where it cannot be read.
    """
    encoded = np.fromfile(file, np.uint8)
    mode = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    # imdecode, for imread cannot open every path on Windows; it returns None for what it can't decode whole.
    image = cv2.imdecode(encoded, mode | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    if image is None:
        raise DataError("no image, or cut short" if encoded.size else "empty file")
    if channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return resize(image, size, rule).reshape(size, size, channels)


def resize(image: np.ndarray, size: int, rule: str = "squash") -> np.ndarray:
    """`image` (height, width[, channels]) as (size, size[, channels]); averages down, interpolates up."""
    height, width = image.shape[:2]
    if rule == "squash":
        return _resample(image, size, size)
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - height) // 2, (size - width) // 2
    edges = (top, size - height - top, left, size - width - left)
    return cv2.copyMakeBorder(_resample(image, height, width), *edges, cv2.BORDER_CONSTANT)


def _resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    # First the side that shrinks, then the one that grows: INTER_AREA averages only where both shrink.
    smaller = (min(width, image.shape[1]), min(height, image.shape[0]))
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


# --- The store ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PixelStore:
    """Every image of an index, decoded once: a uint8 array (images, size, size, channels) on disk.

    folder: holds ``pixels.u8`` (the array's bytes), ``paths.npy`` (sorted; row i is paths[i]) and, written
    last, ``store.json``. root, name: the data set's. unreadable: path -> reason of images that are black
    here because they could not be decoded. Nothing is kept in memory: opening takes milliseconds.
    """

    folder: Path
    size: int
    rule: str
    channels: int
    images: int
    name: str
    root: str
    unreadable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open_or_build(
        cls,
        index: pd.DataFrame,
        size: int,
        rule: str = "squash",
        channels: int = 1,
        unreadable: str = "raise",
        workers: int | None = None,
        cache: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> PixelStore:
        """The store of these data: opened where it is finished, else built, with `workers` threads.

        index: as `data.load_index` returns it, before or after `data.split_dev`. size: side in pixels.
        channels: 1 (grey, as radiographs are) or 3 (RGB). cache: by default `data.cache_dir()`. A build that
        was killed continues; two processes that want the same store wait for each other. An edited image is
        noticed where the edit changes the size of one of 64 sampled files.

        unreadable: "raise" stops, after the last image, with one DataError that lists all that could not be
        decoded; the next call tries only those again. "skip" records them: see `usable`.
        Raises DataNotFoundError, naming folder and variable, where there is no room or no right to write.
        """
        one_of("rule", rule, RULES)
        one_of("channels", channels, (1, 3))
        one_of("unreadable", unreadable, ("raise", "skip"))
        if index.empty or not {"name", "root"} <= index.attrs.keys():
            raise DataError("A store needs an index with rows and attrs, as data.load_index() returns it.")
        root, name = os.path.abspath(index.attrs["root"]), index.attrs["name"]
        folder = _store_folder(index, root, size, rule, channels, cache)
        finished = folder / "store.json"
        if not finished.exists() or (unreadable == "raise" and cls.open(folder).unreadable):
            paths = sorted({path.encode() for path in index["path"]})
            with _disk(folder), _locked(folder):
                place = folder if finished.exists() else folder.with_name(folder.name + ".partial")
                plan = cls(place, size, rule, channels, len(paths), name, root)
                _build(plan, paths, workers or os.cpu_count() or 1, progress)
                os.replace(place, folder)
        store = cls.open(folder)
        if store.unreadable and unreadable == "raise":
            raise DataError(_complaint(store))
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike) -> PixelStore:
        """The finished store in `folder`; raises DataError where it is none, or is damaged."""
        folder = Path(folder)
        try:
            info = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            if info.pop("format") != STORE_FORMAT:
                raise ValueError(f"its format is not {STORE_FORMAT}")
            store = cls(folder, **info)
            if (folder / "pixels.u8").stat().st_size != math.prod(store.shape):
                raise ValueError("pixels.u8 is cut short")
            return store
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{folder} is no whole pixel store ({error}). Delete it; it is built anew."
            raise DataError(problem) from error

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(images, size, size, channels)"""
        return self.images, self.size, self.size, self.channels

    @property
    def pixels(self) -> np.ndarray:
        """All pixels, read-only, mapped afresh: the memory that it touches is given back with it."""
        return np.memmap(self.folder / "pixels.u8", np.uint8, "r", shape=self.shape).view(np.ndarray)

    def rows(self, index: pd.DataFrame) -> np.ndarray:
        """The rows of this store that hold the images of `index`, in its order: int64 (len(index),).

        `index` may be filtered, split or sorted. Raises DataError where it is of other data.
        """
        remedy = "Open the store of these data: PixelStore.open_or_build(index, size)."
        name, root = index.attrs.get("name", self.name), os.path.abspath(index.attrs.get("root", self.root))
        if (name, root) != (self.name, self.root):
            raise DataError(f"The store is of {self.name} in {self.root}, not of {name} in {root}. {remedy}")
        paths = np.load(self.folder / "paths.npy", mmap_mode="r").view(np.ndarray)
        wanted = np.array([path.encode() for path in index["path"]], dtype=bytes)
        rows = np.searchsorted(paths, wanted).clip(max=self.images - 1)
        if (absent := np.flatnonzero(paths[rows] != wanted)).size:
            first = index["path"].iloc[absent[0]]
            raise DataError(f"{self.folder} lacks {absent.size:,} images, the first {first}. {remedy}")
        return rows

    def usable(self, index: pd.DataFrame) -> np.ndarray:
        """Which rows of `index` could be decoded, bool (len(index),): ``index[store.usable(index)]``."""
        return ~index["path"].isin(list(self.unreadable)).to_numpy()

    def __repr__(self) -> str:
        kind = "grey" if self.channels == 1 else "RGB"
        skipped = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        return (
            f"<PixelStore of {self.name}: {self.images:,} {kind} images, {self.size} x {self.size} px "
            f"({self.rule}), {math.prod(self.shape) / 1e9:.2f} GB{skipped}, in {self.folder}>"
        )


def _store_folder(index: pd.DataFrame, root: str, size: int, rule: str, channels: int, cache) -> Path:
    # A development split moves images from train to dev: the same pixels, so the same store. The folder and
    # a sample of file sizes tell apart copies with other pixels: text removed, rendered anew.
    splits = index["split"].astype(str).replace("dev", "train")
    paths = sorted(index["path"])
    files = [os.path.join(root, path) for path in paths[:: max(1, len(paths) // 64)]]
    sizes = [os.path.getsize(file) if os.path.isfile(file) else -1 for file in files]
    key = json.dumps([STORE_FORMAT, data.fingerprint(index.assign(split=splits)), root, sizes])
    name = f"{index.attrs['name']}-{size}-{rule}-{channels}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return Path(cache or data.cache_dir()) / "pixels" / name


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")  # the system lets go of it when the process ends, killed or not
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is building {folder}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataNotFoundError(
            f"The pixel store {folder} cannot be written ({error.strerror or error}). Make room or allow "
            "writing there, or set the environment variable MURA_CACHE to another folder."
        ) from error


def _build(store: PixelStore, paths: list[bytes], workers: int, progress: bool) -> None:
    """Fill the folder of `store`, going on where a killed build stopped, then write its store.json."""
    store.folder.mkdir(exist_ok=True)
    row_bytes, pixels_file = math.prod(store.shape[1:]), store.folder / "pixels.u8"
    done, unreadable = _progress(store.folder, row_bytes)
    needed, free = (store.images - done) * row_bytes, shutil.disk_usage(store.folder).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
    if not done:
        np.save(store.folder / "paths.npy", np.array(paths))
    pixels_file.touch()
    step = min(256, max(1, BLOCK_BYTES // row_bytes))
    blocks = [range(row, row + 1) for row, path in enumerate(paths) if path.decode() in unreadable]
    blocks += [range(row, min(row + step, store.images)) for row in range(done, store.images, step)]
    title, quiet = f"Decoding {store.name} at {store.size} px", not (progress and blocks)
    with (
        open(pixels_file, "r+b") as pixels,
        ThreadPoolExecutor(workers) as pool,
        single_threaded_opencv(),
        tqdm(total=store.images, initial=done, desc=title, unit="image", disable=quiet) as bar,
    ):
        for block in blocks:
            names = [paths[row].decode() for row in block]
            images, failed = _decode(store, names, pool)
            pixels.seek(block.start * row_bytes)
            pixels.write(images)
            pixels.flush()
            os.fsync(pixels.fileno())  # pixels first, then the note: no row is taken for done that is not
            unreadable = {name: unreadable[name] for name in unreadable.keys() - set(names)} | failed
            bar.update(max(0, block.stop - done))
            done = max(done, block.stop)
            _write_json(store.folder / "progress.json", {"rows": done, "unreadable": unreadable})
    info = {key: value for key, value in vars(store).items() if key != "folder"}
    _write_json(store.folder / "store.json", info | {"format": STORE_FORMAT, "unreadable": unreadable})


def _progress(folder: Path, row_bytes: int) -> tuple[int, dict[str, str]]:
    """How many rows an earlier, killed build finished, and which of them it could not read."""
    with contextlib.suppress(FileNotFoundError):
        note = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        if (folder / "pixels.u8").stat().st_size >= note["rows"] * row_bytes:
            return note["rows"], note["unreadable"]
    return 0, {}


def _decode(store: PixelStore, paths: list[str], pool: ThreadPoolExecutor) -> tuple[np.ndarray, dict]:
    """Pixels of `paths`, uint8 (len(paths), size, size, channels), and a reason for each that stays black."""
    images, failed = np.zeros((len(paths), *store.shape[1:]), np.uint8), {}

    def read(i: int) -> None:
        try:
            images[i] = read_image(Path(store.root, paths[i]), store.size, store.rule, store.channels)
        except (DataError, OSError, cv2.error) as error:
            failed[paths[i]] = getattr(error, "strerror", None) or str(error)

    list(pool.map(read, range(len(paths))))
    return images, failed


def _complaint(store: PixelStore) -> str:
    files = [f"\n  {Path(store.root, path)}: {why}" for path, why in sorted(store.unreadable.items())]
    more = f"\n  and {len(files) - 5:,} more, all in {store.folder / 'store.json'}" if len(files) > 5 else ""
    return (
        f"{len(files):,} of {store.images:,} images cannot be read. Restore them from the archive and call "
        'again (only they are read again), or pass unreadable="skip" to go on without them:'
        + "".join(files[:5])
        + more
    )


def _write_json(file: Path, content: dict) -> None:
    beside = file.with_name(file.name + ".writing")
    with open(beside, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)
