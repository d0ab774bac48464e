"""Every image decoded once: `PixelStore`, a memory-mapped array on disk (room: data; chapter 4).

Reads the images of an index and writes only below ``<cache folder>/pixels``. An array stands on disk with the
hash of its content (`cached_array`), whole or not at all. Imports no framework.
"""

import functools
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import disk, paths
from ..errors import DataError, DiskError
from .index import few, pixel_key

FORMAT = 2  # part of a store's key: raise it when what `read_image` returns changes
cv2.setNumThreads(1)  # whole images are what our own threads share out

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
        As `decode`.
    """
    mode = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    image = resize(decode(file, mode | cv2.IMREAD_IGNORE_ORIENTATION), size, rule)
    return np.ascontiguousarray(image.reshape(size, size, channels)[..., ::-1])  # OpenCV's BGR becomes RGB


def decode(file: str | os.PathLike, mode: int = cv2.IMREAD_GRAYSCALE) -> np.ndarray:
    """Decode the image in `file` as one of OpenCV's modes of ``imread`` says; colours are BGR.

    Raises
    ------
    DataError
        The file is no ordinary one or cannot be read, is empty, no image, or cut short; the message names it.
    """
    reason: object = "empty, no image, or cut short"
    try:  # imdecode, because imread cannot open every path on Windows
        encoded = np.frombuffer(disk.read_bytes(Path(file)), np.uint8)
        if encoded.size and (image := cv2.imdecode(encoded, mode)) is not None:
            return image
    except (OSError, cv2.error) as error:  # OpenCV's: more pixels than it takes
        reason = getattr(error, "strerror", None) or error
    raise DataError(f"{file}: {reason}. Restore it from the archive.")


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


def cached_array(file: Path, shape: tuple, dtype: type, blocks: Iterator[np.ndarray]) -> np.ndarray:
    """Map an array into memory, and write it first where it does not exist.

    Parameters
    ----------
    file : Path
        ``.npy``, in a folder of its own, whole or absent. A ``.json`` file beside it holds its SHA-256.
    shape, dtype
        Of the array.
    blocks : iterator of ndarray
        Its rows from first to last; not begun where the array exists.

    Returns
    -------
    ndarray
        Read-only.

    Raises
    ------
    DiskError
        No room to write, or the files are damaged (the hash is checked once a process). Errors of `blocks`
        come through; then nothing is left of the folder.
    """
    folder = file.parent
    with disk.lock(folder):
        for killed in folder.parent.glob(f".{folder.name}.*.part"):
            disk.remove(killed)
        if not folder.exists():
            _write(file, shape, dtype, blocks)
    remedy = f"Delete the folder {folder}; it is made anew."
    sha256 = disk.read_json(file.with_suffix(".json"), remedy).get("sha256")
    if not file.is_file() or _digest(file, file.stat().st_mtime_ns) != sha256:
        raise DiskError(f"{file} is missing, or it is damaged: not what was written. {remedy}")
    return np.load(file, mmap_mode="r").view(np.ndarray)


def _write(file: Path, shape: tuple, dtype: type, blocks: Iterator[np.ndarray]) -> None:
    """Write array and hash, both or neither. Not through a memory map: a full disk would end the process."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with disk.atomic(file.parent) as beside:
        beside.mkdir()
        # Large pieces: what is written in large pieces is mapped in large pieces.
        with (beside / file.name).open("wb", buffering=1 << 24) as out:
            np.lib.format.write_array_header_1_0(out, header)
            out.writelines(np.ascontiguousarray(block, dtype).data for block in blocks)
        sha256 = disk.digest(beside / file.name)
        disk.write_json(beside / file.with_suffix(".json").name, {"sha256": sha256})


# The hash of this version of a file, computed once a process.
_digest = functools.cache(lambda file, changed: disk.digest(file))


def ahead(make: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """Yield make(0) .. make(count - 1) in order, at most `workers` + 2 of them made ahead in threads.

    Errors come in their place. The threads end with the loop, also where it is left early.
    """
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for i in range(count):
            waiting.append(pool.submit(make, i))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- The store ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelStore:
    """Every image of an index, decoded once: a uint8 array on disk, of which memory holds what is in use.

    Attributes
    ----------
    folder : Path
        Holds ``pixels.npy`` and ``pixels.json``. Its name holds a hash of paths, sizes and times of all image
        files: where one is replaced, another store is built.
    root : Path
        The folder of the data set.
    size : int
        Side of the square images in pixels.
    images : int
        How many there are.
    paths : pandas.Index
        Row i of `pixels` is the image ``paths[i]``.
    """

    folder: Path
    root: Path
    size: int
    images: int
    paths: pd.Index = field(repr=False, compare=False)

    @classmethod
    def open_or_build(cls, index: pd.DataFrame, size: int, workers: int = 0, progress: bool = True) -> Self:
        """Open the store of these images, or build it where there is none.

        Parameters
        ----------
        index : DataFrame
            As `load_index` returns it, before or after `split_dev`.
        size : int
            Side in pixels.
        workers : int
            Threads that decode; 0: one a core.
        progress : bool
            Show a progress bar.

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
        if size < 1 or index.empty or not {"name", "root"} <= index.attrs.keys():
            what = f"{len(index)} images of size {size}"
            raise DataError(f"No store of {what}: pass an index, as load_index makes it, and a size above 0.")
        key = hashlib.sha256(f"{FORMAT} {pixel_key(index)}".encode()).hexdigest()[:12]
        folder = paths.cache_dir() / "pixels" / f"{index.attrs['name']}-{size}-{key}"
        images = pd.Index(index["path"].unique()).sort_values()
        store = cls(folder, paths.absolute(index.attrs["root"]), size, len(images), images)
        films = store._decode(workers, progress)
        cached_array(folder / "pixels.npy", (len(images), size, size), np.uint8, films)
        return store

    @property
    def pixels(self) -> np.ndarray:
        """All pixels, uint8 (images, size, size), read-only; memory that the array touches goes with it."""
        return np.load(self.folder / "pixels.npy", mmap_mode="r").view(np.ndarray)

    def rows(self, index: pd.DataFrame) -> np.ndarray:
        """Find the rows of this store that hold the images of `index`, in its order.

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
        root, rows = index.attrs.get("root", self.root), self.paths.get_indexer(pd.Index(index["path"]))
        if paths.absolute(root) != self.root or (rows < 0).any():
            first = index["path"].iloc[int(rows.argmin())]
            what = f"The store of {self.root} lacks {(rows < 0).sum():,} images of {root}, e.g. {first}."
            raise DataError(f"{what} Open their own: PixelStore.open_or_build(index, size).")
        return rows

    def _decode(self, workers: int, progress: bool) -> Iterator[np.ndarray]:
        """Decode image after image; those that fail are listed in one error after the last."""
        failed: list[str] = []

        def read(row: int) -> np.ndarray:
            try:
                return read_image(self.root / self.paths[row], self.size)
            except DataError as error:
                failed.append(str(error))
                return np.zeros((self.size, self.size), np.uint8)

        images = ahead(read, self.images, workers or os.cpu_count() or 1)
        yield from tqdm(images, "Decoding", self.images, unit="image", leave=False, disable=not progress)
        if failed:
            what = f"{len(failed):,} of {self.images:,} images cannot be read"
            raise DataError(f"{what}; their rows may be left out of the index:{few(sorted(failed))}")
