"""Every image decoded once: `PixelStore`, a memory-mapped array on disk (room: data; chapter 4).

Reads the images of an index and writes only below ``<cache folder>/pixels``. An array stands on disk with the
hash of its content (`write_array`, `open_array`), whole or not at all. Imports no framework.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import disk, paths
from ..errors import DataError, DiskError, one_of
from .index import pixel_key

FORMAT = 2  # part of a store's key: raise it when what `read_image` returns changes
RULES = ("squash", "pad")
Made = TypeVar("Made")


# --- Threads ------------------------------------------------------------------------------------------

_opencv_lock = threading.Lock()
_opencv_threads: list[int] = []


@contextlib.contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """Keep OpenCV from starting threads, which get in the way of ours.

    The setting is global: the first one in notes the number of threads, and the last one out puts it back.
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


def ahead(make: Callable[[int], Made], count: int, workers: int) -> Iterator[Made]:
    """Yield make(0) .. make(count - 1) in order, at most `workers` + 2 of them made ahead in threads.

    Errors come in their place. The threads end with the loop, also where it is left early.
    """
    if workers == 0:
        yield from map(make, range(count))
        return
    pool, waiting = ThreadPoolExecutor(workers, thread_name_prefix="mura"), deque()
    try:
        for i in range(count):
            waiting.append(pool.submit(make, i))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- One image ----------------------------------------------------------------------------------------


def read_image(file: str | os.PathLike, size: int, rule: str = "squash", channels: int = 1) -> np.ndarray:
    """Decode the image in `file` and resize it.

    Parameters
    ----------
    file : path
        PNG or anything else that OpenCV decodes. 16-bit images keep their high byte, transparency is ignored.
    size : int
        Side of the result in pixels.
    rule : {"squash", "pad"}
        As in `resize`.
    channels : {1, 3}
        Grey or RGB.

    Returns
    -------
    ndarray
        uint8 (size, size, channels).

    Raises
    ------
    DataError
        The file is empty, no image, or cut short.
    OSError
        The file cannot be read, or is no ordinary file.
    """
    encoded = np.frombuffer(disk.read_bytes(Path(file)), np.uint8)
    mode = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    # imdecode, because imread cannot open every path on Windows. It returns None for what it can't decode whole.
    image = cv2.imdecode(encoded, mode | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    if image is None:
        raise DataError("no image, or cut short" if encoded.size else "empty file")
    if channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return resize(image, size, rule).reshape(size, size, channels)


def resize(image: np.ndarray, size: int, rule: str = "squash") -> np.ndarray:
    """Resize `image` (height, width[, channels]) to a square: averages down, interpolates up.

    Parameters
    ----------
    image : ndarray
        uint8.
    size : int
        Side of the square in pixels.
    rule : {"squash", "pad"}
        squash: stretched, as both reports do (KL 1.4, KN 2.1). pad: the longest side becomes `size`, the rest
        is black, the film in the middle.

    Returns
    -------
    ndarray
        uint8 (size, size[, channels]).
    """
    height, width = image.shape[:2]
    if rule == "squash":
        return _resample(image, size, size)
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - height) // 2, (size - width) // 2
    edges = (top, size - height - top, left, size - width - left)
    return cv2.copyMakeBorder(_resample(image, height, width), *edges, cv2.BORDER_CONSTANT)


def _resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """First the side that shrinks, then the one that grows: INTER_AREA averages only where both shrink."""
    smaller = (min(width, image.shape[1]), min(height, image.shape[0]))
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


# --- An array on disk, with its hash ------------------------------------------------------------------

_verified: set[tuple] = set()


def write_array(
    file: Path, shape: tuple[int, ...], dtype: type, blocks: Iterable[np.ndarray], about: dict
) -> None:
    """Write an array piece by piece, in a folder of its own that is whole or absent.

    Parameters
    ----------
    file : Path
        The ``.npy`` file. Its folder must not exist yet; a ``.json`` file beside it holds the SHA-256.
    shape, dtype
        Of the whole array.
    blocks : iterable of ndarray
        Its rows from first to last, C-contiguous.
    about : dict
        What else the JSON file says, for whoever looks into the folder.

    Raises
    ------
    DiskError
        No room or no permission. Errors of `blocks` come through; nothing is left of the folder then.
    """
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with disk.atomic(file.parent) as beside:
        disk.require_room(file.parent.parent, math.prod(shape) * np.dtype(dtype).itemsize)
        beside.mkdir()
        with (beside / file.name).open("wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for block in blocks:
                out.write(block)
        sha256 = disk.digest(beside / file.name)
        disk.write_json(beside / file.with_suffix(".json").name, about | {"sha256": sha256})


def open_array(file: Path) -> np.ndarray:
    """Map an array that `write_array` wrote into memory, read-only; its hash is checked once a process.

    Raises
    ------
    DiskError
        The array or its JSON file is missing or damaged; the message says what to delete.
    """
    remedy = f"Delete the folder {file.parent}; it is made anew."
    sha256 = disk.read_json(file.with_suffix(".json"), remedy).get("sha256")
    try:
        info = file.stat()
        version = (file, info.st_size, info.st_mtime_ns, str(sha256))
        if version not in _verified:
            if not file.is_file() or disk.digest(file) != sha256:
                raise ValueError("its content has changed since it was written")
            _verified.add(version)
        return map_array(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{file} is damaged ({reason}). {remedy}") from error


def map_array(file: Path) -> np.ndarray:
    """The array in a ``.npy`` file, read-only: memory that it touches is given back with it."""
    return np.lib.format.open_memmap(file, mode="r").view(np.ndarray)


# --- The store ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelStore:
    """Every image of an index, decoded once: a uint8 array on disk, of which memory holds what is in use.

    Attributes
    ----------
    folder : Path
        Holds ``pixels.npy`` and ``pixels.json``. Its name holds a hash of paths, sizes and times of all image
        files: where one is replaced, another store is built.
    name, root : str
        The data set's.
    size : int
        Side of the square images in pixels.
    paths : pandas.Index
        Row i of `pixels` is the image ``paths[i]``.
    """

    folder: Path
    name: str
    root: str
    size: int
    paths: pd.Index = field(repr=False, compare=False)

    @classmethod
    def open_or_build(
        cls,
        index: pd.DataFrame,
        size: int,
        workers: int | None = None,
        progress: bool = True,
        rule: str = "squash",
    ) -> PixelStore:
        """Open the store of these images, or build it where there is none.

        Parameters
        ----------
        index : DataFrame
            As `load_index` returns it, before or after `split_dev`.
        size : int
            Side in pixels.
        workers : int, optional
            Threads that decode; by default one a core.
        progress : bool
            Show a progress bar.
        rule : {"squash", "pad"}
            As in `resize`.

        Returns
        -------
        PixelStore
            Whole: a build that was killed leaves nothing, and two processes wait for each other.

        Raises
        ------
        DataError
            Images that cannot be decoded, listed after the last one was tried; or a wrong argument.
        DiskError
            No room, no permission, or a damaged store (its hash is checked once a process).
        """
        one_of("rule", rule, RULES)
        if size < 1 or index.empty or not {"name", "root"} <= index.attrs.keys():
            raise DataError(f"A store needs rows and attrs, as load_index() returns them, and a size: {size}?")
        root, name = os.path.abspath(index.attrs["root"]), index.attrs["name"]  # noqa: PTH100 - keeps links
        key = hashlib.sha256(f"{FORMAT} {pixel_key(index)}".encode()).hexdigest()[:12]
        folder = paths.cache_dir() / "pixels" / f"{name}-{size}-{rule}-{key}"
        store = cls(folder, name, root, size, pd.Index(sorted(set(index["path"]))))
        if not folder.exists():
            with disk.lock(folder):
                if not folder.exists():
                    store._build(rule, workers or os.cpu_count() or 1, progress)
        open_array(store._file)
        return store

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.paths)

    @property
    def pixels(self) -> np.ndarray:
        """All pixels, uint8 (images, size, size), read-only, mapped afresh."""
        return map_array(self._file)

    def rows(self, index: pd.DataFrame) -> np.ndarray:
        """The rows of this store that hold the images of `index`, in its order.

        Parameters
        ----------
        index : DataFrame
            May be filtered, split or sorted.

        Returns
        -------
        ndarray
            int64 (len(index),).

        Raises
        ------
        DataError
            `index` is of other data, or holds an image that the store lacks.
        """
        remedy = "Open the store of these data: PixelStore.open_or_build(index, size)."
        name, root = index.attrs.get("name", self.name), str(index.attrs.get("root", self.root))
        if (name, paths.absolute(root)) != (self.name, Path(self.root)):
            raise DataError(f"The store is of {self.name} in {self.root}, not of {name} in {root}. {remedy}")
        rows = self.paths.get_indexer(pd.Index(index["path"]))
        if (absent := np.flatnonzero(rows < 0)).size:
            first = index["path"].iloc[absent[0]]
            raise DataError(f"{self.folder} lacks {absent.size:,} images, the first {first}. {remedy}")
        return rows.astype(np.int64)

    @property
    def _file(self) -> Path:
        return self.folder / "pixels.npy"

    def _build(self, rule: str, workers: int, progress: bool) -> None:
        """Decode all images; those that fail are listed in one error after the last."""
        failed: dict[str, str] = {}

        def read(row: int) -> np.ndarray:
            file = Path(self.root, self.paths[row])
            try:
                return read_image(file, self.size, rule)
            except (DataError, OSError, cv2.error) as error:
                failed[str(file)] = getattr(error, "strerror", None) or str(error)
                return np.zeros((self.size, self.size), np.uint8)

        def blocks() -> Iterator[np.ndarray]:
            title = f"Decoding {self.name} at {self.size} px"
            options = {"total": self.images, "unit": "image", "leave": False, "disable": not progress}
            with single_threaded_opencv():
                yield from tqdm(ahead(read, self.images, workers), title, **options)
            if failed:
                raise DataError(_complaint(failed, self.images))

        shape, about = (self.images, self.size, self.size), {"root": self.root, "rule": rule}
        write_array(self._file, shape, np.uint8, blocks(), about)


def _complaint(failed: dict[str, str], images: int) -> str:
    """One message about all images that cannot be read."""
    lines = [f"  {file}: {reason}" for file, reason in sorted(failed.items())]
    if len(lines) > 5:
        lines[5:] = [f"  and {len(lines) - 5:,} more"]
    return (
        f"{len(failed):,} of {images:,} images cannot be read. Restore them from the archive, or leave their "
        "rows out of the index:\n" + "\n".join(lines)
    )
