"""From stored pixels to the float batches that a model sees: `Augment`, `Batches` (room: data; chapter 4).

Writes nothing. Augments with OpenCV, on uint8, in threads. Imports Keras or torch only where an adapter is asked
for. The pixels come from `store`.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from ..errors import DataError, one_of
from .index import BODY_PARTS
from .store import PixelStore, ahead, single_threaded_opencv

# --- Augmentation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augment:
    """Random changes to a grey image: first rotated and flipped, in one step, then its contrast stretched.

    Attributes
    ----------
    rotation : float
        Degrees; the angle is uniform in [-rotation, rotation]. Bilinear, edges repeated, as
        ImageDataGenerator's ``rotation_range``.
    flip : float
        Probability of mirroring left and right.
    autocontrast : float
        Probability of `autocontrast`.
    """

    rotation: float = 0.0
    flip: float = 0.0
    autocontrast: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise DataError(f"rotation must lie between 0 and 180 degrees, not {self.rotation!r}.")
        for name in ("flip", "autocontrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is a probability, between 0 and 1, not {getattr(self, name)!r}.")

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """`image`, uint8 (height, width), changed as the 3 `draws`, uniform in [0, 1), decide."""
        angle, mirror = (2 * draws[0] - 1) * self.rotation, draws[1] < self.flip
        if angle:
            image = rotate(image, angle, mirror)
        elif mirror:
            image = cv2.flip(image, 1)
        return autocontrast(image) if draws[2] < self.autocontrast else image


# KL Table 1 says "rotation, flip", not how much; 30 degrees is the MURA paper's (arXiv 1712.06957).
KL_AUGMENT = Augment(rotation=30.0, flip=0.5)
# KN 2.1: random autocontrast and random horizontal flip, each with a probability of 50 %.
KN_AUGMENT = Augment(flip=0.5, autocontrast=0.5)
AUGMENTS: dict[str, Augment | None] = {"none": None, "KL": KL_AUGMENT, "KN": KN_AUGMENT}


def rotate(image: np.ndarray, degrees: float, mirror: bool = False) -> np.ndarray:
    """Turn `image` about its centre, then mirror it left and right, in one resampling.

    Parameters
    ----------
    image : ndarray
        uint8 (height, width).
    degrees : float
        The angle, counted as Keras counts ``theta``.
    mirror : bool
        Whether to mirror.

    Returns
    -------
    ndarray
        uint8 of the same shape; the edge is repeated where the turned image leaves a corner empty.
    """
    height, width = image.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Edges repeated beforehand: warpAffine is faster where it need not look whether it is still inside.
    outside = max(abs(cos) * x + abs(sin) * y - x, abs(sin) * x + abs(cos) * y - y)
    pad = math.ceil(outside) + 1
    image = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    # Where in the padded image each pixel of the new one lies.
    xx, yx = (-cos, -sin) if mirror else (cos, sin)
    back = np.array([[xx, -sin, pad + x - xx * x + sin * y], [yx, cos, pad + y - yx * x - cos * y]])
    return cv2.warpAffine(image, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretch a grey image to 0..255, bit for bit as torchvision does with a tensor.

    Parameters
    ----------
    image : ndarray
        uint8 (height, width).

    Returns
    -------
    ndarray
        ``trunc((v - low) * (255 * (1 / (high - low))))`` in float32, rounded in this order. An image of one
        single value stays as it is.
    """
    low, high = np.float32(image.min()), np.float32(image.max())
    if low == high:
        return image
    levels = (np.arange(256, dtype=np.float32) - low) * (np.float32(255) * (np.float32(1) / (high - low)))
    return cv2.LUT(image, levels.clip(0, 255).astype(np.uint8))


# --- Scales -------------------------------------------------------------------------------------------

_GREY = np.arange(256.0)
_MEAN, _STD = np.array([[0.485], [0.456], [0.406]]), np.array([[0.229], [0.224], [0.225]])  # ImageNet, RGB
# What a model sees for each grey level, float32 (3, 256). Looked up, so every value is correctly rounded.
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
    """Compare the scale that a model expects with the one that `batches` (or their adapter) delivers.

    The wrong scale raises nothing by itself: the model trains badly, or predicts nonsense.

    Raises
    ------
    DataError
        They differ, or `batches` states none.
    """
    one_of("the expected scale", expected, SCALES)
    scale = getattr(batches, "scale", None)
    if scale != expected:
        there = f"these batches deliver {scale!r}" if scale else f"a {type(batches).__name__} states no scale"
        raise DataError(
            f"The model expects pixels scaled to {expected!r}, {there}. Make them with "
            f'Batches(..., scale="{expected}").'
        )


def _to_float(image: np.ndarray, scale: str, layout: str, out: np.ndarray) -> None:
    """Write the uint8 `image` (size, size), scaled, three times into `out`, a view of a batch."""
    table, alike = SCALES[scale], scale != "imagenet"
    if layout == "nhwc":
        table = table[0] if alike else cv2.merge(list(table))[None]
        cv2.LUT(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), table, dst=out)
    elif alike:
        cv2.LUT(image, table[0], dst=out[0])
        out[1:] = out[0]
    else:
        for c in range(3):
            cv2.LUT(image, table[c], dst=out[c])


# --- Batches ------------------------------------------------------------------------------------------

Targets = np.ndarray | dict[str, np.ndarray]


class _Epoch(NamedTuple):
    """All that is random in an epoch: rows in their order, and three draws for each row."""

    number: int
    order: np.ndarray
    draws: np.ndarray


class Batches:
    """Batches (x, y) of the images of an index, shuffled and augmented, the same for any number of threads.

    ``batches[i]`` depends on seed, epoch and i alone, and what happens to an image on seed, epoch and its row
    in `index`, so training can go on anywhere after `set_epoch`. Iterating makes batches ahead in threads, and
    ends by going to the next epoch.

    Parameters
    ----------
    store : PixelStore
        Where the pixels are.
    index : DataFrame
        The images, rows of the index that the store was made of.
    batch_size : int
        Images in a batch; the last one may have fewer, unless `drop_last`.
    shuffle : bool
        Another order in each epoch.
    augment : Augment, optional
        What happens to the images, e.g. ``AUGMENTS["KL"]``.
    seed : int
        Of order and augmentation.
    scale : str
        One of `SCALES`.
    layout : {"nhwc", "nchw"}
        Channels last (Keras) or first (torch); grey is repeated three times.
    workers : int
        Threads; 0: none.
    drop_last : bool
        Leave an incomplete last batch out.
    target : str or tuple of str
        "label": float32 (n,). "body_part": int64 (n,), the place in `BODY_PARTS`. A tuple: a dict of them.

    Attributes
    ----------
    order : ndarray
        Rows of `index` in this epoch's order, int64 (len(index),), to line predictions up with.
    epoch : int
        From 0.

    Raises
    ------
    DataError
        The store lacks an image, or an argument is wrong.
    """

    scale: str | None

    def __init__(
        self,
        store: PixelStore,
        index: pd.DataFrame,
        batch_size: int = 64,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        scale: str = "0..1",
        layout: str = "nhwc",
        workers: int = 2,
        drop_last: bool = False,
        target: str | tuple[str, ...] = "label",
    ) -> None:
        one_of("scale", scale, SCALES)
        one_of("layout", layout, ("nhwc", "nchw"))
        if batch_size < 1 or len(index) < (batch_size if drop_last else 1):
            raise DataError(f"{len(index)} images make no batch of {batch_size}. Which step left so few?")
        if workers < 0:
            raise DataError(f"workers is a number of threads, 0 or more, not {workers!r}.")
        self.store, self.index, self.augment, self.seed = store, index, augment, seed
        self.batch_size, self.shuffle, self.drop_last, self.workers = batch_size, shuffle, drop_last, workers
        self.scale, self.layout, self.target = scale, layout, target
        self._rows = store.rows(index)
        names = (target,) if isinstance(target, str) else target
        self._targets = {name: _target(index, name) for name in names}
        self.set_epoch(0)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.index), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def epoch(self) -> int:
        """The epoch's number, from 0."""
        return self._epoch.number

    @property
    def order(self) -> np.ndarray:
        """Rows of `index` in this epoch's order, int64 (len(index),)."""
        return self._epoch.order

    def set_epoch(self, epoch: int) -> None:
        """Go to `epoch`, counted from 0: to its order and its augmentation."""
        draws = np.random.default_rng((self.seed, epoch)).random((len(self.index), 4))
        # Sorting draws is a shuffle whose result, unlike permutation's, no NumPy version may change.
        order = np.argsort(draws[:, 0], kind="stable") if self.shuffle else np.arange(len(self.index))
        self._epoch = _Epoch(epoch, order, draws[:, 1:])

    def on_epoch_end(self) -> None:
        """Go to the next epoch."""
        self.set_epoch(self.epoch + 1)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Targets]:
        return self._batch(range(len(self))[i], self._epoch, np.empty)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Targets]]:
        yield from self.some(range(len(self)))
        self.on_epoch_end()

    def some(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, Targets]]:
        """The batches with these numbers, made ahead as in iterating; stays in this epoch."""
        epoch, empty = self._epoch, _Recycler(self.workers + 4).empty
        yield from ahead(lambda k: self._batch(numbers[k], epoch, empty), len(numbers), self.workers)

    def targets(self, members: np.ndarray) -> Targets:
        """y of these rows of `index`, as `target` says."""
        y = {name: values[members] for name, values in self._targets.items()}
        return y[self.target] if isinstance(self.target, str) else y

    def _batch(self, i: int, epoch: _Epoch, empty: Callable) -> tuple[np.ndarray, Targets]:
        """Batch `i` of an epoch, in memory that `empty` gives."""
        members, size = epoch.order[i * self.batch_size : (i + 1) * self.batch_size], self.store.size
        shape = (size, size, 3) if self.layout == "nhwc" else (3, size, size)
        x, pixels = empty((len(members), *shape), np.float32), self.store.pixels
        with single_threaded_opencv():
            for out, member in zip(x, members, strict=True):
                image = pixels[self._rows[member]]
                if self.augment is not None:
                    image = self.augment(image, epoch.draws[member])
                _to_float(image, self.scale, self.layout, out)
        return x, self.targets(members)

    def keras(self) -> Any:
        """A ``keras.utils.PyDataset``, channels last, that also has `batches`, `scale` and `set_epoch`.

        ``fit`` mixes the batches of an epoch once more, unless called with ``shuffle=False``.
        """
        return _keras_dataset(self._with_layout("nhwc"))

    def torch(self) -> Any:
        """A torch DataLoader, channels first, that also has `batches`, `scale` and `set_epoch`.

        Its data set has one item a batch. A sampler that is put in, as Lightning does with several devices,
        chooses among batches.
        """
        return _torch_loader(self._with_layout("nchw"))

    def _with_layout(self, layout: str) -> Batches:
        batches = copy.copy(self)
        batches.layout = layout
        return batches


def _target(index: pd.DataFrame, name: str) -> np.ndarray:
    """y of all rows."""
    one_of("target", name, ("label", "body_part"))
    if name == "label":
        return index["label"].to_numpy(np.float32)
    return pd.Categorical(index["body_part"], categories=BODY_PARTS).codes.astype(np.int64)


class _Recycler:
    """Arrays handed out again once nobody refers to them: fresh memory takes as long to get as to fill."""

    def __init__(self, most: int) -> None:
        self._arrays, self._most, self._lock = [], most, threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array of any content."""
        with self._lock:
            for i in range(len(self._arrays)):  # no name for the array: it would be one reference more
                if self._arrays[i].shape == shape and _references(self._arrays, i) == _IDLE:
                    return self._arrays[i]
            fresh = np.empty(shape, dtype)
            if len(self._arrays) < self._most:
                self._arrays.append(fresh)
            return fresh


def _references(arrays: list, i: int) -> int:
    return sys.getrefcount(arrays[i])


_IDLE = _references([np.empty(0)], 0)  # measured, because Python versions count differently


# --- Adapters -----------------------------------------------------------------------------------------


def _keras_dataset(batches: Batches) -> Any:
    """What `Batches.keras` returns."""
    import keras

    class KerasBatches(keras.utils.PyDataset):
        """`Batches` as Keras wants them: it makes them ahead in threads of its own."""

        def __init__(self) -> None:
            super().__init__(workers=max(1, batches.workers), max_queue_size=batches.workers + 2)
            self.batches, self.scale, self.set_epoch = batches, batches.scale, batches.set_epoch
            self._begun = False

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, i: int) -> tuple[np.ndarray, Targets]:
            return batches[i]

        def on_epoch_begin(self) -> None:
            self._begun = True

        def on_epoch_end(self) -> None:
            if self._begun:  # Keras calls this once before the first epoch, too
                batches.on_epoch_end()
            self._begun = False

    return KerasBatches()


def _torch_loader(batches: Batches) -> Any:
    """What `Batches.torch` returns."""
    from torch.utils.data import DataLoader, Dataset, default_convert

    class TorchBatches(Dataset):
        """Item i is batch i."""

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, i: int) -> Any:
            return default_convert(batches[i])

    class TorchLoader(DataLoader):
        """Makes batches ahead in threads, in the order of its sampler; needs no processes."""

        def __init__(self, dataset: Dataset, **options: Any) -> None:
            super().__init__(dataset, **options)
            self.batches, self.scale, self.set_epoch = batches, batches.scale, batches.set_epoch

        def __iter__(self) -> Any:
            yield from map(default_convert, batches.some(list(self.sampler)))  # shares the arrays' memory
            batches.on_epoch_end()

    return TorchLoader(TorchBatches(), batch_size=None)


# --- The reports' datasets ----------------------------------------------------------------------------


def kl_datasets(split: pd.DataFrame, store: PixelStore, **options: Any) -> dict[str, Batches]:
    """The four datasets of KL Table 1.

    Parameters
    ----------
    split : DataFrame
        An index with a development split, as `split_dev` returns it.
    store : PixelStore
        Its side is the batches', 224 px in the report.
    **options
        As `Batches` takes them; by default pixels in 0..1 and batches of 64.

    Returns
    -------
    dict
        "train original", "train augmented", "validation", "test". The last two are not shuffled, unlike in
        Table 1: predictions line up with the rows of the index, and no score changes.

    Raises
    ------
    DataError
        Train, dev or test is empty, or an option is wrong.
    """
    train, dev, test = _parts(split, needed=("train", "dev", "test"))
    return {
        "train original": Batches(store, train, shuffle=True, **options),
        "train augmented": Batches(store, train, shuffle=True, augment=KL_AUGMENT, **options),
        "validation": Batches(store, dev, **options),
        "test": Batches(store, test, **options),
    }


def kn_datasets(split: pd.DataFrame, store: PixelStore, **options: Any) -> dict[str, Batches]:
    """KN's datasets (KN 2.1): RGB scaled by ImageNet's mean and standard deviation, channels first.

    Parameters
    ----------
    split, store, **options
        As in `kl_datasets`; the report's side is 256 px.

    Returns
    -------
    dict
        "train" (autocontrast and flip, each with probability 0.5), "validation" (absent where `split` has no
        dev images), "test".

    Raises
    ------
    DataError
        Train or test is empty, or an option is wrong.
    """
    train, dev, test = _parts(split, needed=("train", "test"))
    options = {"scale": "imagenet", "layout": "nchw"} | options
    sets = {"train": Batches(store, train, shuffle=True, augment=KN_AUGMENT, **options)}
    if not dev.empty:
        sets["validation"] = Batches(store, dev, **options)
    return sets | {"test": Batches(store, test, **options)}


def _parts(split: pd.DataFrame, needed: tuple[str, ...]) -> list[pd.DataFrame]:
    """The rows of train, dev and test."""
    parts = {name: split[split["split"].eq(name)] for name in ("train", "dev", "test")}
    if any(parts[name].empty for name in needed):
        raise DataError(f"The index must hold {', '.join(needed)} images: call data.split_dev(index) first.")
    return list(parts.values())
