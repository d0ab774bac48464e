"""From stored pixels to the float batches that a model sees: `Augment`, `Batches` (chapter 4).

Writes nothing. Augments with OpenCV, on uint8, in threads, and imports neither Keras nor torch before an
adapter is asked for. `PixelStore`, `read_image` and `resize` come from `mura_course.pixel_store`.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from . import data
from .errors import DataError
from .pixel_store import PixelStore, one_of, read_image, resize, single_threaded_opencv

__all__ = [
    "KL_AUGMENT",
    "KN_AUGMENT",
    "SCALES",
    "Augment",
    "Batches",
    "PixelStore",
    "autocontrast",
    "check_scale",
    "kl_datasets",
    "kn_datasets",
    "read_image",
    "resize",
    "rotate",
]


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
    """`image` turned about its centre, then mirrored, in one resampling; `degrees` is Keras' ``theta``."""
    height, width = image.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Edges repeated beforehand: warpAffine is faster where it need not look whether it is still inside.
    outside = max(abs(cos) * x + abs(sin) * y - x, abs(sin) * x + abs(cos) * y - y)
    pad = math.ceil(outside) + 1
    image = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    # Where in the padded image each pixel of the new one lies.
    xx, yx = (-cos, -sin) if mirror_x else (cos, sin)
    xy, yy = (sin, -cos) if mirror_y else (-sin, cos)
    back = np.array([[xx, xy, pad + x - xx * x - xy * y], [yx, yy, pad + y - yx * x - yy * y]])
    return cv2.warpAffine(image, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """uint8 `image` (height, width[, 3]), each channel stretched to 0..255 by torchvision's tensor formula.

    ``trunc((v - low) * (1 / (high - low) * 255))`` in float32, rounded in this order, which is torch's for
    a number divided by a tensor; a channel of one single value stays as it is.
    """
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    flat = low == high
    low = np.where(flat, 0, low).astype(np.float32)
    scale = np.float32(255) * (np.float32(1) / np.where(flat, 255, high - low).astype(np.float32))
    table = ((np.arange(256, dtype=np.float32).reshape(256, *[1] * low.ndim) - low) * scale).clip(0, 255)
    return cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1))


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
    """Raise DataError unless `batches` (or what its adapters returned) delivers the scale a model expects.

    The wrong scale raises nothing by itself: the model trains badly, or predicts nonsense.
    """
    one_of("the expected scale", expected, SCALES)
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
    in `index`: so training can resume anywhere after `set_epoch`. Iterating makes batches ahead in `workers`
    threads (0: none), and ends by going to the next epoch.

    x: float32 (n, size, size, channels) or, with layout "nchw", (n, channels, size, size); grey is repeated
    where channels=3. scale: one of `SCALES`. y, (n,): "label" float32; "body_part" int64, its place in
    `data.BODY_PARTS`; a tuple of targets gives a dict. augment: an `Augment`, or None.
    order: rows of `index` in this epoch's order, int64 (len(index),), to line predictions up with.
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
        one_of("scale", scale, SCALES)
        one_of("layout", layout, ("nhwc", "nchw"))
        one_of("channels", channels, (3,) if store.channels == 3 or scale == "imagenet" else (1, 3))
        if batch_size < 1 or len(index) < (batch_size if drop_last else 1):
            raise DataError(f"{len(index)} images make no batch of {batch_size}. Which step left so few?")
        if bad := int((~store.usable(index)).sum()):
            raise DataError(f"{bad} images could not be read. Leave them out: index[store.usable(index)].")
        self.store, self.index, self.augment, self.seed = store, index, augment, seed
        self.batch_size, self.shuffle, self.drop_last, self.workers = batch_size, shuffle, drop_last, workers
        self.scale, self.channels, self.layout, self.target = scale, channels, layout, target
        self._rows = store.rows(index)
        names = (target,) if isinstance(target, str) else target
        self._targets = {name: _target(index, name) for name in names}
        self.set_epoch(0)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.index), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Go to `epoch`, counted from 0: to its order and its augmentation."""
        draws = np.random.default_rng((self.seed, epoch)).random((len(self.index), 5))
        # Sorting draws is a shuffle whose result, unlike permutation's, no NumPy version may change.
        self.order = np.argsort(draws[:, 0], kind="stable") if self.shuffle else np.arange(len(self.index))
        self.epoch, self._draws = epoch, draws[:, 1:]

    def on_epoch_end(self) -> None:
        """Go to the next epoch."""
        self.set_epoch(self.epoch + 1)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | dict[str, np.ndarray]]:
        return self._batch(range(len(self))[i], self.order, self._draws, np.empty)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray | dict[str, np.ndarray]]]:
        yield from self.some(range(len(self)))
        self.on_epoch_end()

    def some(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray | dict[str, np.ndarray]]]:
        """The batches with these numbers, made ahead as in iterating; stays in this epoch."""
        order, draws, empty = self.order, self._draws, _Recycler(self.workers + 4).empty
        make = lambda k: self._batch(numbers[k], order, draws, empty)  # noqa: E731
        yield from _ahead(make, len(numbers), self.workers)

    def _batch(self, i: int, order: np.ndarray, draws: np.ndarray, empty: Callable):
        members, size = order[i * self.batch_size : (i + 1) * self.batch_size], self.store.size
        shape = (size, size, self.channels) if self.layout == "nhwc" else (self.channels, size, size)
        x, pixels = empty((len(members), *shape), np.float32), self.store.pixels
        with single_threaded_opencv():
            for out, member in zip(x, members, strict=True):
                image = pixels[self._rows[member]]
                image = image[..., 0] if image.shape[2] == 1 else image
                if self.augment is not None:
                    image = self.augment(image, draws[member])
                self._to_float(image, out)
        return x, self.targets(members)

    def targets(self, members: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
        """y of these rows of `index`."""
        y = {name: values[members] for name, values in self._targets.items()}
        return y[self.target] if isinstance(self.target, str) else y

    def _to_float(self, image: np.ndarray, out: np.ndarray) -> None:
        """Write the uint8 `image` (size, size[, 3]), scaled, into `out`, a view of the batch."""
        table, alike = SCALES[self.scale], self.scale != "imagenet"
        if self.channels == 1:
            cv2.LUT(image, table[0], dst=out.reshape(image.shape))
        elif self.layout == "nhwc":
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image
            cv2.LUT(image, table[0] if alike else cv2.merge(list(table))[None], dst=out)
        elif image.ndim == 2 and alike:
            cv2.LUT(image, table[0], dst=out[0])
            out[1:] = out[0]
        else:
            for c in range(3):
                cv2.LUT(image if image.ndim == 2 else cv2.extractChannel(image, c), table[c], dst=out[c])

    def keras(self):
        """A ``keras.utils.PyDataset``, channels last, that also has `scale`, `batches` and `set_epoch`.

        ``fit`` mixes the batches of an epoch once more, unless called with ``shuffle=False``.
        """
        return keras_dataset(self._with_layout("nhwc"))

    def torch(self):
        """A torch DataLoader, channels first, that also has `scale`, `batches` and `set_epoch`."""
        return torch_loader(self._with_layout("nchw"))

    def _with_layout(self, layout: str) -> Batches:
        batches = copy.copy(self)
        batches.layout = layout
        return batches


def _target(index: pd.DataFrame, name: str) -> np.ndarray:
    one_of("target", name, ("label", "body_part"))
    if name == "label":
        return index["label"].to_numpy(np.float32)
    return pd.Categorical(index["body_part"], categories=data.BODY_PARTS).codes.astype(np.int64)


def _ahead(make: Callable[[int], object], count: int, workers: int) -> Iterator:
    """make(0) .. make(count - 1), in order, at most workers + 2 of them ahead; errors come in their place."""
    if workers == 0:
        yield from map(make, range(count))
        return
    pool, waiting = ThreadPoolExecutor(workers, thread_name_prefix="mura-batches"), deque()
    try:
        for i in range(count):
            waiting.append(pool.submit(make, i))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also where the loop over it is left early
        pool.shutdown(cancel_futures=True)


class _Recycler:
    """Arrays handed out again once nobody refers to them: fresh memory takes as long to get as to fill."""

    def __init__(self, most: int) -> None:
        self._arrays, self._most, self._lock = [], most, threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
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


_IDLE = _references([np.empty(0)], 0)  # measured, for Python versions count differently


def keras_dataset(batches):
    """What `Batches.keras` returns, of anything with its methods."""
    import keras

    class KerasBatches(keras.utils.PyDataset):
        """`Batches` as Keras wants them: it makes them ahead in threads of its own."""

        def __init__(self) -> None:
            super().__init__(workers=max(1, batches.workers), max_queue_size=batches.workers + 2)
            self.batches, self.scale, self.set_epoch = batches, batches.scale, batches.set_epoch
            self._begun = False

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, i: int):
            return batches[i]

        def on_epoch_begin(self) -> None:
            self._begun = True

        def on_epoch_end(self) -> None:
            if self._begun:  # Keras calls this once before the first epoch, too
                batches.on_epoch_end()
            self._begun = False

    return KerasBatches()


def torch_loader(batches):
    """What `Batches.torch` returns, of anything with its methods."""
    from torch.utils.data import DataLoader, IterableDataset, default_convert

    class TorchBatches(IterableDataset):
        """`Batches` as torch wants them: the loader needs no processes, for they bring their threads."""

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator:
            return map(default_convert, batches)  # shares the arrays' memory

    loader = DataLoader(TorchBatches(), batch_size=None)
    loader.batches, loader.scale, loader.set_epoch = batches, batches.scale, batches.set_epoch
    return loader


# --- The reports' datasets ----------------------------------------------------------------------------


def kl_datasets(
    index: pd.DataFrame, store: PixelStore, shuffle_evaluation: bool = False, **options
) -> dict[str, Batches]:
    """The four datasets of KL Table 1: "train original", "train augmented", "validation", "test".

    index: with a development split. options: as `Batches` (batch_size=64, seed, workers, target ...). Pixels
    in 0..1; the side is the store's, 224 px in the report. Table 1 shuffles validation and test too: that
    changes no score, but predictions no longer line up with rows, so it is off but for `shuffle_evaluation`.
    """
    train, dev, test = _splits(index)
    return {
        "train original": Batches(store, train, shuffle=True, **options),
        "train augmented": Batches(store, train, shuffle=True, augment=KL_AUGMENT, **options),
        "validation": Batches(store, dev, shuffle=shuffle_evaluation, **options),
        "test": Batches(store, test, shuffle=shuffle_evaluation, **options),
    }


def kn_datasets(
    index: pd.DataFrame, store: PixelStore, needs_dev: bool = True, **options
) -> dict[str, Batches]:
    """KN's datasets (KN 2.1): "train" (autocontrast and flip, each at 0.5), "validation", "test".

    RGB scaled by ImageNet's mean and std, channels first; the side is the store's, 256 px in the report.
    index, options: as `kl_datasets`. Without needs_dev, no "validation" where the index has no dev images.
    """
    train, dev, test = _splits(index, needs_dev)
    options = {"scale": "imagenet", "layout": "nchw"} | options
    sets = {"train": Batches(store, train, shuffle=True, augment=KN_AUGMENT, **options)}
    if not dev.empty:
        sets["validation"] = Batches(store, dev, **options)
    return sets | {"test": Batches(store, test, **options)}


def _splits(index: pd.DataFrame, needs_dev: bool = True) -> list[pd.DataFrame]:
    parts = [index[index["split"].eq(split)] for split in ("train", "dev", "test")]
    if any(part.empty for part in (parts if needs_dev else parts[::2])):
        raise DataError("The index must hold train, dev and test images: call data.split_dev(index) first.")
    return parts
