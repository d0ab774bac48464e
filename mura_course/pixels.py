"""From image files to the float batches that a model sees: `PixelStore`, `Augment`, `Batches` (chapter 4).

Reads the images of an index once, and writes only below ``<cache folder>/pixels/``. Decoding and augmenting
are OpenCV's, on uint8, in threads; neither Keras nor torch is imported until an adapter is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
        _one_of("rule", rule, RULES)
        _one_of("channels", channels, (1, 3))
        _one_of("unreadable", unreadable, ("raise", "skip"))
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
            raise DataError(
                f"{folder} is no whole pixel store ({error}). Delete it; it is built anew."
            ) from error

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(images, size, size, channels)"""
        return self.images, self.size, self.size, self.channels

    @property
    def pixels(self) -> np.ndarray:
        """All pixels, read-only, mapped afresh: the memory that it touches is given back with it."""
        return np.memmap(self.folder / "pixels.u8", np.uint8, "r", shape=self.shape).view(np.ndarray)

    @property
    def paths(self) -> np.ndarray:
        """The rows' paths, sorted, as UTF-8 bytes, (images,); mapped, not read."""
        return np.load(self.folder / "paths.npy", mmap_mode="r").view(np.ndarray)

    def rows(self, index: pd.DataFrame) -> np.ndarray:
        """The rows of this store that hold the images of `index`, in its order: int64 (len(index),).

        `index` may be filtered, split or sorted. Raises DataError where it is of other data.
        """
        for key, here in (("name", self.name), ("root", self.root)):
            there = index.attrs.get(key, here)
            if (os.path.abspath(there) if key == "root" else there) != here:
                raise DataError(f"This store holds {here}, the index is of {there}. {_REBUILD}")
        paths, wanted = self.paths, np.array([path.encode() for path in index["path"]], dtype=bytes)
        rows = np.searchsorted(paths, wanted).clip(max=self.images - 1)
        if (absent := np.flatnonzero(paths[rows] != wanted)).size:
            first = index["path"].iloc[absent[0]]
            raise DataError(
                f"{absent.size} images are not in the store {self.folder}, as {first}. {_REBUILD}"
            )
        return rows

    def usable(self, index: pd.DataFrame) -> np.ndarray:
        """Which rows of `index` could be decoded, bool (len(index),): ``index[store.usable(index)]``."""
        return ~index["path"].isin(list(self.unreadable)).to_numpy()

    def __len__(self) -> int:
        return self.images

    def __repr__(self) -> str:
        kind = "grey" if self.channels == 1 else "RGB"
        skipped = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        return (
            f"<PixelStore of {self.name}: {self.images:,} {kind} images, {self.size} x {self.size} px "
            f"({self.rule}), {math.prod(self.shape) / 1e9:.2f} GB{skipped}, in {self.folder}>"
        )


_REBUILD = "Open the store of these data: PixelStore.open_or_build(index, size)."


def _one_of(what: str, value: object, valid: Iterable) -> None:
    if value not in valid:
        raise DataError(f"{what} must be one of {', '.join(map(repr, valid))}, not {value!r}.")


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
    except DataNotFoundError:
        raise
    except OSError as error:
        raise DataNotFoundError(
            f"The pixel store {folder} cannot be written ({error.strerror or error}). Make room or allow writing "
            "there, or set the environment variable MURA_CACHE to another folder."
        ) from error


def _build(store: PixelStore, paths: list[bytes], workers: int, progress: bool) -> None:
    """Fill the folder of `store`, going on where a killed build stopped, then write its store.json."""
    store.folder.mkdir(exist_ok=True)
    row_bytes, pixels_file = math.prod(store.shape[1:]), store.folder / "pixels.u8"
    done, unreadable = _progress(store.folder, row_bytes)
    needed, free = (store.images - done) * row_bytes, shutil.disk_usage(store.folder).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
    np.save(store.folder / "paths.npy", np.array(paths))
    pixels_file.touch()
    step = min(256, max(1, BLOCK_BYTES // row_bytes))
    blocks = [range(row, row + 1) for row, path in enumerate(paths) if path.decode() in unreadable]
    blocks += [range(row, min(row + step, store.images)) for row in range(done, store.images, step)]
    title = f"Decoding {store.name} at {store.size} px"
    with (
        open(pixels_file, "r+b") as pixels,
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=store.images, initial=done, desc=title, unit="image", disable=not (progress and blocks)
        ) as bar,
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


def _decode(
    store: PixelStore, paths: list[str], pool: ThreadPoolExecutor
) -> tuple[np.ndarray, dict[str, str]]:
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
    files = [f"\n  {Path(store.root, path)}: {reason}" for path, reason in sorted(store.unreadable.items())]
    more = (
        f"\n  and {len(files) - 5:,} more, listed in {store.folder / 'store.json'}" if len(files) > 5 else ""
    )
    return (
        f"{len(files):,} of {store.images:,} images cannot be read. Restore them from the archive and call again "
        f'(only they are read again), or pass unreadable="skip" to go on without them:{"".join(files[:5])}{more}'
    )


def _write_json(file: Path, content: dict) -> None:
    beside = file.with_name(file.name + ".writing")
    with open(beside, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)


# --- Augmentation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random changes to a uint8 image: first rotated and flipped, in one step, then its contrast stretched.

    rotation: degrees, uniform in [-rotation, rotation], bilinear, edges repeated, as ImageDataGenerator's
    ``rotation_range`` with its default ``fill_mode="nearest"``. flip, vertical_flip: probability of mirroring
    left and right, up and down. autocontrast: probability of `autocontrast`, as torchvision's.
    """

    rotation: float = 0.0
    flip: float = 0.0
    vertical_flip: float = 0.0
    autocontrast: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise DataError(f"rotation must lie between 0 and 180 degrees, not {self.rotation!r}.")
        for name in ("flip", "vertical_flip", "autocontrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is a probability, between 0 and 1, not {getattr(self, name)!r}.")

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """`image`, uint8 (height, width[, 3]), changed as the 4 `draws`, uniform in [0, 1), decide."""
        angle = (2 * draws[0] - 1) * self.rotation
        mirror_x, mirror_y = draws[1] < self.flip, draws[2] < self.vertical_flip
        if angle:
            image = rotate(image, angle, mirror_x, mirror_y)
        else:
            image = cv2.flip(image, 1) if mirror_x else image
            image = cv2.flip(image, 0) if mirror_y else image
        return autocontrast(image) if draws[3] < self.autocontrast else image


# KL Table 1 says "rotation, flip", not how much; 30 degrees is the MURA paper's (arXiv 1712.06957).
KL_AUGMENT = Augment(rotation=30.0, flip=0.5)
# KN 2.1: random autocontrast and random horizontal flip, each with a probability of 50 %.
KN_AUGMENT = Augment(flip=0.5, autocontrast=0.5)


def rotate(image: np.ndarray, degrees: float, mirror_x: bool = False, mirror_y: bool = False) -> np.ndarray:
    """`image` turned about its centre, then mirrored, in one resampling; turns as ImageDataGenerator's theta."""
    height, width = image.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    xx, xy = (-cos if mirror_x else cos), (-sin if mirror_y else sin)
    yx, yy = (sin if mirror_x else -sin), (-cos if mirror_y else cos)
    # Where in the old image each pixel of the new one lies.
    back = np.array([[xx, xy, x - xx * x - xy * y], [yx, yy, y - yx * x - yy * y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, back, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """uint8 `image` (height, width[, 3]), each channel stretched to 0..255 by torchvision's tensor formula.

    ``trunc((v - low) * (255 / (high - low)))`` in float32; a channel of one single value stays as it is.
    """
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    flat = low == high
    low = np.where(flat, 0, low).astype(np.float32)
    scale = np.float32(255) / np.where(flat, 255, high - low).astype(np.float32)
    table = ((np.arange(256, dtype=np.float32).reshape(256, *[1] * low.ndim) - low) * scale).clip(0, 255)
    return cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1))


# --- Scales -------------------------------------------------------------------------------------------

_GREY = np.arange(256.0)
_MEAN, _STD = np.array([[0.485], [0.456], [0.406]]), np.array([[0.229], [0.224], [0.225]])  # ImageNet's, RGB
# What a model sees for each grey level, float32 (3, 256): looked up, so that every value is correctly rounded.
SCALES: dict[str, np.ndarray] = {
    name: np.broadcast_to(levels, (3, 256)).astype(np.float32)
    for name, levels in (
        ("0..1", _GREY / 255),  # KL 1.4
        ("-1..1", _GREY / 127.5 - 1),  # EfficientNet-Lite
        ("0..255", _GREY),  # models that scale inside
        ("imagenet", (_GREY / 255 - _MEAN) / _STD),  # KN 2.1
    )
}


def check_scale(expected: str, batches: object) -> None:
    """Raise DataError unless `batches` (or what its adapters returned) delivers the scale a model expects.

    The wrong scale raises nothing by itself: the model trains badly, or predicts nonsense.
    """
    _one_of("the expected scale", expected, SCALES)
    scale = getattr(batches, "scale", None)
    if scale != expected:
        there = f"these batches deliver {scale!r}" if scale else f"a {type(batches).__name__} states no scale"
        raise DataError(
            f"The model expects pixels scaled to {expected!r}, {there}. Make them with "
            f'Batches(..., scale="{expected}").'
        )


# --- Batches ------------------------------------------------------------------------------------------


class Batches:
    """Batches (x, y) of the images of an index, shuffled and augmented, the same for any number of threads.

    ``batches[i]`` depends on seed, epoch and i alone, and what happens to an image on seed, epoch and its row
    in `index`: so training can resume anywhere after `set_epoch`. Iterating prefetches in `workers` threads
    (0: none), and ends by going to the next epoch.

    x: float32 (n, size, size, channels) or, with layout "nchw", (n, channels, size, size); grey is repeated for
    channels=3. scale: one of `SCALES`. y, (n,): "label" float32; "body_part" int64, its place in the
    categories; a tuple of targets gives a dict of both. augment: an `Augment`, or None.
    order: rows of `index` in the order of this epoch, int64 (n,), to line predictions up with.
    Raises DataError where the store lacks an image or an argument is wrong.
    """

    def __init__(
        self,
        store: PixelStore,
        index: pd.DataFrame,
        batch_size: int = 64,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        scale: str = "0..1",
        channels: int = 3,
        layout: str = "nhwc",
        workers: int = 2,
        drop_last: bool = False,
        target: str | tuple[str, ...] = "label",
    ) -> None:
        _one_of("scale", scale, SCALES)
        _one_of("layout", layout, ("nhwc", "nchw"))
        _one_of("channels", channels, (3,) if store.channels == 3 or scale == "imagenet" else (1, 3))
        if batch_size < 1 or len(index) < (batch_size if drop_last else 1):
            raise DataError(f"{len(index)} images make no batch of {batch_size}. Which step left so few?")
        if bad := int((~store.usable(index)).sum()):
            raise DataError(
                f"{bad} images of the index were skipped as unreadable: index[store.usable(index)]."
            )
        self.store, self.index, self.augment, self.seed = store, index, augment, seed
        self.batch_size, self.shuffle, self.drop_last, self.workers = batch_size, shuffle, drop_last, workers
        self.scale, self.channels, self.layout, self.target = scale, channels, layout, target
        self._rows = store.rows(index)
        self._targets = {
            name: _target(index, name) for name in ([target] if isinstance(target, str) else target)
        }
        self.set_epoch(0)

    def __len__(self) -> int:
        return (
            len(self.index) // self.batch_size if self.drop_last else -(-len(self.index) // self.batch_size)
        )

    def set_epoch(self, epoch: int) -> None:
        """Go to `epoch` (from 0): its order and its augmentation."""
        draws = np.random.default_rng((self.seed, epoch)).random((len(self.index), 5))
        # Sorting draws shuffles: unlike permutation's, their stream is the same in every version of NumPy.
        self.order = np.argsort(draws[:, 0], kind="stable") if self.shuffle else np.arange(len(self.index))
        self.epoch, self._draws = epoch, draws[:, 1:]

    def on_epoch_end(self) -> None:
        """Go to the next epoch."""
        self.set_epoch(self.epoch + 1)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | dict[str, np.ndarray]]:
        return self._batch(range(len(self))[i], self.order, self._draws)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray | dict[str, np.ndarray]]]:
        order, draws = self.order, self._draws
        if self.workers == 0:
            yield from (self._batch(i, order, draws) for i in range(len(self)))
        else:
            yield from _prefetched(lambda i: self._batch(i, order, draws), len(self), self.workers)
        self.on_epoch_end()

    def _batch(self, i: int, order: np.ndarray, draws: np.ndarray):
        members = order[i * self.batch_size : (i + 1) * self.batch_size]
        pixels, size = self.store.pixels, self.store.size
        shape = (size, size, self.channels) if self.layout == "nhwc" else (self.channels, size, size)
        x = np.empty((len(members), *shape), np.float32)
        for out, member in zip(x, members, strict=True):
            image = pixels[self._rows[member]]
            image = image[..., 0] if image.shape[2] == 1 else image
            if self.augment is not None:
                image = self.augment(image, draws[member])
            self._to_float(image, out)
        y = {name: values[members] for name, values in self._targets.items()}
        return x, y[self.target] if isinstance(self.target, str) else y

    def _to_float(self, image: np.ndarray, out: np.ndarray) -> None:
        """Write the uint8 `image` (size, size[, 3]), scaled, into `out`, a view of the batch."""
        table, alike = SCALES[self.scale], self.scale != "imagenet"
        if self.channels == 1:
            cv2.LUT(image, table[0], dst=out.reshape(image.shape))
        elif self.layout == "nhwc":
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image
            cv2.LUT(image, table[0] if alike else cv2.merge(list(table)), dst=out)
        elif image.ndim == 2 and alike:
            cv2.LUT(image, table[0], dst=out[0])
            out[1:] = out[0]
        else:
            for c in range(3):
                cv2.LUT(image if image.ndim == 2 else cv2.extractChannel(image, c), table[c], dst=out[c])

    def keras(self):
        """A ``keras.utils.PyDataset`` of these batches, channels last; has `scale`, `batches`, `set_epoch`.

        ``fit`` also mixes the order of the batches, unless called with ``shuffle=False``.
        """
        return _keras_dataset(self._as("nhwc"))

    def torch(self):
        """A torch DataLoader of these batches, channels first; has `scale`, `batches`, `set_epoch`."""
        return _torch_loader(self._as("nchw"))

    def _as(self, layout: str) -> Batches:
        batches = copy.copy(self)
        batches.layout = layout
        return batches


def _target(index: pd.DataFrame, name: str) -> np.ndarray:
    _one_of("target", name, ("label", "body_part"))
    if name == "label":
        return index["label"].to_numpy(np.float32)
    return index["body_part"].cat.codes.to_numpy(np.int64)


def _prefetched(make: Callable[[int], object], count: int, workers: int) -> Iterator:
    """make(0) .. make(count - 1), in order, at most workers + 2 of them ahead; errors come where they belong."""
    pool, ahead = ThreadPoolExecutor(workers, thread_name_prefix="mura-batches"), deque()
    try:
        for i in range(count + workers + 2):
            if i < count:
                ahead.append(pool.submit(make, i))
            if i >= workers + 2 or i >= count:
                if ahead:
                    yield ahead.popleft().result()
    finally:  # also where the loop over it is left early
        pool.shutdown(cancel_futures=True)


def _keras_dataset(batches: Batches):
    import keras

    class KerasBatches(keras.utils.PyDataset):
        """`Batches` as Keras wants them: it calls ``__getitem__`` from its own threads."""

        def __init__(self) -> None:
            super().__init__(workers=max(1, batches.workers), max_queue_size=batches.workers + 2)
            self.batches, self.scale, self.set_epoch = batches, batches.scale, batches.set_epoch
            self._begun = not hasattr(keras.utils.PyDataset, "on_epoch_begin")

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, i: int):
            return batches[i]

        def on_epoch_begin(self) -> None:
            self._begun = True

        def on_epoch_end(self) -> None:
            # Keras also calls this before the first epoch.
            if self._begun:
                batches.on_epoch_end()
            self._begun = not hasattr(keras.utils.PyDataset, "on_epoch_begin")

    return KerasBatches()


def _torch_loader(batches: Batches):
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    class TorchBatches(IterableDataset):
        """`Batches` as torch wants them; they bring their own threads, so the loader needs no processes."""

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator:
            for x, y in batches:
                to_tensor = torch.from_numpy
                yield (
                    to_tensor(x),
                    {k: to_tensor(v) for k, v in y.items()} if isinstance(y, dict) else to_tensor(y),
                )

    loader = DataLoader(TorchBatches(), batch_size=None)
    loader.batches, loader.scale, loader.set_epoch = batches, batches.scale, batches.set_epoch
    return loader


# --- The reports' datasets ----------------------------------------------------------------------------


def kl_datasets(
    index: pd.DataFrame, store: PixelStore, shuffle_evaluation: bool = False, **options
) -> dict[str, Batches]:
    """The four datasets of KL Table 1: "train original", "train augmented", "validation", "test".

    Needs `data.split_dev` done. options: as `Batches` (batch_size=64, seed, workers, target ...). Table 1
    shuffles validation and test too; that changes no score, but predictions then no longer line up with the
    rows, so it is off unless `shuffle_evaluation`. Pixels in 0..1; 224 px in the report (the store's size).
    """
    train, dev, test = _splits(index)
    return {
        "train original": Batches(store, train, shuffle=True, **options),
        "train augmented": Batches(store, train, shuffle=True, augment=KL_AUGMENT, **options),
        "validation": Batches(store, dev, shuffle=shuffle_evaluation, **options),
        "test": Batches(store, test, shuffle=shuffle_evaluation, **options),
    }


def kn_datasets(index: pd.DataFrame, store: PixelStore, **options) -> dict[str, Batches]:
    """KN's datasets (KN 2.1): "train" (autocontrast and flip, each at 0.5), "validation", "test".

    ImageNet's mean and std, RGB, channels first; 256 px in the report (the store's size). options: as `Batches`.
    """
    train, dev, test = _splits(index)
    options = {"scale": "imagenet", "layout": "nchw"} | options
    return {
        "train": Batches(store, train, shuffle=True, augment=KN_AUGMENT, **options),
        "validation": Batches(store, dev, **options),
        "test": Batches(store, test, **options),
    }


def _splits(index: pd.DataFrame) -> list[pd.DataFrame]:
    parts = [index[index["split"].eq(split)] for split in ("train", "dev", "test")]
    if any(part.empty for part in parts):
        raise DataError(
            "The index must hold the splits train, dev and test: call data.split_dev(index) first."
        )
    return parts
