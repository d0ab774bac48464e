"""What a frozen backbone makes of the images, computed once and kept: `FeatureStore`, `FeatureBatches`.

A frozen backbone turns an image into the same numbers in every epoch; an augmented image, in every epoch into
others, unless a number of *views* is agreed on. Writes below `<cache folder>/features`. Imports no
deep-learning framework before an adapter is asked for. Chapter 5 explains features, chapter 7 views.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

from . import data, pixels
from .errors import DataError, DataNotFoundError

SECONDS_BETWEEN_NOTES = 10.0  # what a kill can cost of a pass over the images


class Extractor(Protocol):
    """What a `FeatureStore` wants of a backbone, whichever framework it is made of.

    name, digest: of the architecture and of its weights, part of the folder's name. size: the side in pixels
    that it takes, None for any. dim: how many features it gives. scale, layout: as `pixels.Batches` has them.
    """

    name: str
    digest: str
    size: int | None
    dim: int
    scale: str
    layout: str

    def __call__(self, x: np.ndarray, batch_size: int) -> np.ndarray:
        """Images -> float32 (len(x), dim); `batch_size` is the most images that a call brings."""
        ...


@dataclass(frozen=True)
class View:
    """One of the changed forms of each training image: as `augment` makes them in epoch `number`."""

    augment: pixels.Augment
    number: int
    seed: int = 0


@dataclass(frozen=True, repr=False)
class FeatureStore:
    """What a frozen backbone makes of the images of a PixelStore: float32 (images, dim) on disk.

    folder: holds ``features.f32`` (row i belongs to row i of the pixel store) and ``notes.npz``: which rows
    have been computed, and in how many seconds. The folder's name holds the pixel store's (the data's
    fingerprint, the size), a hash of the backbone's weights and, for a view, of all that changes its images:
    other weights, another folder.
    """

    folder: Path
    store: pixels.PixelStore
    extractor: Extractor
    view: View | None = None

    @classmethod
    def open_or_compute(
        cls,
        extractor: Extractor,
        store: pixels.PixelStore,
        index: pd.DataFrame,
        batch_size: int = 64,
        workers: int = 2,
        cache: str | os.PathLike | None = None,
        progress: bool = True,
        view: View | None = None,
    ) -> FeatureStore:
        """The features of the images of `index`, of which only those not known yet are computed.

        view: of the images as `Batches(store, index, augment=view.augment, seed=view.seed)` change them in
        epoch view.number; None: of the images as they are. A pass that was killed goes on where it was; two
        processes that want the same features wait for each other. Raises DataError where sizes do not fit or
        the store lacks an image, DataNotFoundError, naming the folder, where there is no room.
        """
        if extractor.size not in (None, store.size):
            raise DataError(
                f"The backbone takes images of {extractor.size} px, {store.folder} holds {store.size} px. "
                f"Open a store of that size: PixelStore.open_or_build(index, {extractor.size})."
            )
        name = f"{store.folder.name}-{extractor.name}-{extractor.digest}{_view_name(view, index)}"
        features = cls(Path(cache or data.cache_dir()) / "features" / name, store, extractor, view)
        try:
            features.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(features.folder / "lock"):
                features._compute(index, batch_size, workers, progress)
        except OSError as error:
            raise DataNotFoundError(
                f"The features in {features.folder} cannot be written ({error.strerror or error}). Make room "
                "or allow writing there, or set the environment variable MURA_CACHE to another folder."
            ) from error
        return features

    @property
    def shape(self) -> tuple[int, int]:
        """(images, dim)"""
        return self.store.images, self.extractor.dim

    @property
    def values(self) -> np.ndarray:
        """All rows, float32 (images, dim), mapped read-only; rows never asked for are zero."""
        return np.memmap(self.folder / "features.f32", np.float32, "r", shape=self.shape).view(np.ndarray)

    def batches(self, of: pixels.Batches) -> FeatureBatches:
        """`of` with features in place of images: same rows, same order in each epoch, same targets."""
        return FeatureBatches([self], of)

    def notes(self) -> tuple[np.ndarray, float]:
        """Which rows have been computed, bool (images,), and how many seconds that took in all."""
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(self.folder / "notes.npz") as notes:
                done, seconds = notes["done"], float(notes["seconds"])
            whole = (self.folder / "features.f32").stat().st_size == 4 * self.shape[0] * self.shape[1]
            if whole and done.shape == self.shape[:1] and done.dtype == bool:
                return done, seconds
        return np.zeros(self.shape[0], bool), 0.0

    def _compute(self, index: pd.DataFrame, batch_size: int, workers: int, progress: bool) -> None:
        (done, seconds), rows = self.notes(), self.store.rows(index)
        if done[rows].all():
            return
        needed, free = np.count_nonzero(~done[rows]) * 4 * self.shape[1], shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"they need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
        title = f"{self.extractor.name}, once per image"
        with (
            open(self.folder / "features.f32", "r+b" if done.any() else "w+b") as file,
            tqdm(total=np.count_nonzero(~done[rows]), desc=title, unit="image", disable=not progress) as bar,
        ):
            file.truncate(4 * self.shape[0] * self.shape[1])  # rows that nobody asks for take no room
            start = noted = time.perf_counter()
            for members, x in self._images(index, done, batch_size, workers):
                for row, values in zip(members, self.extractor(x, batch_size), strict=True):
                    file.seek(4 * self.shape[1] * int(row))
                    file.write(values.tobytes())
                done[members] = True
                bar.update(len(x))
                now = time.perf_counter()
                if now - noted > SECONDS_BETWEEN_NOTES or done[rows].all():
                    file.flush()
                    os.fsync(file.fileno())  # features first, then the note: no row is done that is not
                    beside = self.folder / "notes.writing"
                    with open(beside, "wb") as notes:
                        np.savez(notes, done=done, seconds=seconds + now - start)
                    os.replace(beside, self.folder / "notes.npz")
                    noted = now

    def _images(self, index: pd.DataFrame, done: np.ndarray, batch_size: int, workers: int) -> Iterator:
        """Batches (rows of the store, x) of the images whose features are not there yet."""
        augment, seed, epoch = None, 0, 0
        if self.view is None:
            index = index[~done[self.store.rows(index)]].drop_duplicates("path")
        else:  # what happens to an image hangs on its row in the index: so none may be left out of it
            augment, seed, epoch = self.view.augment, self.view.seed, self.view.number
        options = {"scale": self.extractor.scale, "layout": self.extractor.layout, "workers": workers}
        source = pixels.Batches(self.store, index, batch_size, augment=augment, seed=seed, **options)
        source.set_epoch(epoch)
        rows = self.store.rows(index)
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        wanted = [i for i, part in enumerate(parts) if not done[part].all()]
        for i, (x, _) in zip(wanted, source.some(wanted), strict=True):
            yield parts[i], x


def digest_of(weights: Iterable[np.ndarray]) -> str:
    """A short hash of a backbone's weights, in their order."""
    digest = hashlib.sha256()
    for array in weights:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def _view_name(view: View | None, index: pd.DataFrame) -> str:
    if view is None:
        return ""
    digest = hashlib.sha256(repr((view.augment, view.seed)).encode())
    digest.update("\n".join(index["path"]).encode())
    return f"-{digest.hexdigest()[:8]}-view{view.number}"


class FeatureBatches:
    """Batches (x, y) as those of `pixels.Batches`, but x is float32 (n, dim), the images' features.

    views: one store of features as they are, where `of` does not augment; else one for each view, of which
    epoch e brings view e modulo their number. With as many views as epochs, nothing differs from augmenting
    in every epoch. Raises DataError where views and augmentation do not fit, or features are missing.
    """

    scale = None  # features have none

    def __init__(self, views: list[FeatureStore], of: pixels.Batches):
        expected = [View(of.augment, n, of.seed) for n in range(len(views))] if of.augment else [None]
        if [features.view for features in views] != expected:
            raise DataError(
                "These batches augment: an image that changes has other features in each epoch. Use batches "
                "that do not, or features of changed images: feature_store.augmented(...)."
                if of.augment
                else "These batches do not augment, and the features are of changed images. Use others."
            )
        self.of, self.index, self.workers = of, of.index, 0
        self._rows = [features.store.rows(of.index) for features in views]
        self._views = [features.values for features in views]
        for features, rows in zip(views, self._rows, strict=True):
            if missing := np.count_nonzero(~features.notes()[0][rows]):
                raise DataError(
                    f"{missing:,} images have no features yet: FeatureStore.open_or_compute(...) first."
                )

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | dict[str, np.ndarray]]:
        members = self.order[i * self.of.batch_size : (i + 1) * self.of.batch_size]
        view = self.of.epoch % len(self._views)
        return self._views[view][self._rows[view][members]], self.of.targets(members)

    def __iter__(self) -> Iterator:
        yield from (self[i] for i in range(len(self)))
        self.on_epoch_end()

    @property
    def order(self) -> np.ndarray:
        return self.of.order

    @property
    def shuffle(self) -> bool:
        return self.of.shuffle

    def set_epoch(self, epoch: int) -> None:
        self.of.set_epoch(epoch)

    def on_epoch_end(self) -> None:
        self.of.on_epoch_end()

    def keras(self):
        """A ``keras.utils.PyDataset``, as `pixels.Batches.keras`."""
        return pixels.keras_dataset(self)

    def torch(self):
        """A torch DataLoader, as `pixels.Batches.torch`."""
        return pixels.torch_loader(self)


def augmented(extractor: Extractor, of: pixels.Batches, views: int, **options) -> FeatureBatches:
    """The features of augmenting batches, `views` of each image, computed where they are not known yet.

    options: as `FeatureStore.open_or_compute`, whose errors it raises. `of` is used up: its epochs are those
    of the result.
    """
    stores = [
        FeatureStore.open_or_compute(
            extractor, of.store, of.index, view=View(of.augment, number, of.seed), **options
        )
        for number in range(views)
    ]
    return FeatureBatches(stores, of)
