"""From stored pixels to the float batches that a model sees: `Augment`, `Batches` (room: data; chapter 4).

Writes nothing. Augments with OpenCV, on uint8, in threads. Imports Keras or torch only where an adapter is
asked for. The pixels come from `store`.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import pandas as pd

from ..errors import DataError, one_of
from .index import BODY_PARTS
from .store import PixelStore, ahead

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

    Raises
    ------
    DataError
        Degrees beyond 180, or a probability beyond 1.
    """

    rotation: float = 0.0
    flip: float = 0.0
    autocontrast: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.rotation <= 180 and 0 <= self.flip <= 1 and 0 <= self.autocontrast <= 1):
            raise DataError(f"Degrees lie between 0 and 180 and probabilities between 0 and 1, not {self}.")

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Change `image`, uint8 (height, width), as the 3 `draws`, uniform in [0, 1), decide."""
        mirror = draws[1] < self.flip
        if self.rotation:
            image = rotate(image, (2 * draws[0] - 1) * self.rotation, mirror)
        elif mirror:
            image = cv2.flip(image, 1)
        return autocontrast(image) if draws[2] < self.autocontrast else image


# KL Table 1 says "rotation, flip", not how much; 30 degrees is the MURA paper's (arXiv 1712.06957).
KL_AUGMENT = Augment(rotation=30.0, flip=0.5)
# KN 2.1: random autocontrast and random horizontal flip, each with a probability of 50 %.
KN_AUGMENT = Augment(flip=0.5, autocontrast=0.5)
AUGMENTS: dict[str, Augment | None] = {"none": None, "KL": KL_AUGMENT, "KN": KN_AUGMENT}
AUGMENTS["flip15"] = Augment(rotation=15.0, flip=0.5)  # what a film may look like in practice


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
    (height, width), angle = image.shape, math.radians(degrees)
    x, y, cos, sin = (width - 1) / 2, (height - 1) / 2, math.cos(angle), math.sin(angle)
    # Edges repeated beforehand: warpAffine is faster where it need not look whether it is still inside.
    pad = math.ceil(max(abs(cos) * x + abs(sin) * y - x, abs(sin) * x + abs(cos) * y - y)) + 1
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    # Where in the padded image each pixel of the new one lies: a turn that leaves the centre in place.
    xx, yx = (-cos, -sin) if mirror else (cos, sin)
    back = np.array([[xx, -sin, pad + x - xx * x + sin * y], [yx, cos, pad + y - yx * x - cos * y]])
    return cv2.warpAffine(padded, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


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
# What a model sees for each grey level: float32 (3, 256), or (1, 256) where the channels are alike. They are
# looked up, so every value is correctly rounded.
SCALES: dict[str, np.ndarray] = {
    "0..1": (_GREY[None] / 255).astype(np.float32),  # KL 1.4
    "-1..1": (_GREY[None] / 127.5 - 1).astype(np.float32),  # EfficientNet-Lite
    "0..255": _GREY[None].astype(np.float32),  # models that scale inside
    "imagenet": ((_GREY / 255 - _MEAN) / _STD).astype(np.float32),  # KN 2.1
}
TABLES = {scale: cv2.merge(list(levels))[None] for scale, levels in SCALES.items()}  # the same, channels last


def check_scale(expected: str | None, batches: object) -> None:
    """Compare the scale that a model expects with the one that `batches` (or their adapter) delivers.

    The wrong scale raises nothing by itself: the model trains badly, or predicts nonsense. A model that
    expects None, such as a head on features, takes any.

    Raises
    ------
    DataError
        They differ, or `batches` states none.
    """
    scale = getattr(batches, "scale", None)
    if expected is not None and scale != one_of("the expected scale", expected, SCALES):
        raise DataError(f"The model expects {expected!r}, not {scale!r}: Batches(..., scale={expected!r}).")


def to_batch(image: np.ndarray, scale: str, layout: str, out: np.ndarray) -> None:
    """Write the uint8 `image` (size, size) into `out`, a view of a batch: scaled three times, or as it is."""
    if layout == "grey":
        out[:] = image
    elif layout == "nhwc":
        cv2.LUT(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB), TABLES[scale], dst=out)
    else:
        for channel, levels in zip(out, SCALES[scale], strict=False):
            cv2.LUT(image, levels, dst=channel)
        out[len(SCALES[scale]) :] = out[0]


# --- Batches ------------------------------------------------------------------------------------------

Targets: TypeAlias = np.ndarray | dict[str, np.ndarray]


@dataclass(repr=False, eq=False)
class Batches:
    """Batches (x, y) of the images of an index, shuffled and augmented, the same for any number of threads.

    ``batches[i]`` depends on seed, epoch and i alone, and what happens to an image on seed, epoch and its row
    in `index`, so training can go on anywhere after `set_epoch`. Iterating makes batches ahead in threads,
    and ends by going to the next epoch.

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
        Threads, at least one.
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

    store: PixelStore
    index: pd.DataFrame
    batch_size: int = 64
    shuffle: bool = False
    augment: Augment | None = None
    seed: int = 0
    scale: str = "0..1"
    layout: str = "nhwc"
    workers: int = 2
    drop_last: bool = False
    target: str | tuple[str, ...] = "label"

    def __post_init__(self) -> None:
        one_of("scale", self.scale, SCALES)
        one_of("layout", self.layout, ("nhwc", "nchw"))
        size, images = self.batch_size, len(self.index)
        if size < 1 or images < (size if self.drop_last else 1):
            raise DataError(f"{images} images make no batch of {size}. Did data.split_dev(index) come first?")
        self._rows = self.store.rows(self.index)
        parts = pd.Categorical(self.index["body_part"], categories=BODY_PARTS).codes
        known = {"label": self.index["label"].to_numpy(np.float32), "body_part": parts.astype(np.int64)}
        names = (self.target,) if isinstance(self.target, str) else self.target
        self._targets = {name: known[one_of("target", name, known)] for name in names}
        self.set_epoch(0)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.index), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Go to `epoch`, counted from 0: to its order and its augmentation."""
        draws = np.random.default_rng((self.seed, epoch)).random((len(self.index), 4))
        # Sorting draws is a shuffle whose result, unlike permutation's, no NumPy version may change.
        self.order = np.argsort(draws[:, 0], kind="stable") if self.shuffle else np.arange(len(draws))
        self.epoch, self._draws = epoch, draws[:, 1:]

    def on_epoch_end(self) -> None:
        """Go to the next epoch."""
        self.set_epoch(self.epoch + 1)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Targets]:
        return self._batch(range(len(self))[i])

    def __iter__(self) -> Iterator[tuple[np.ndarray, Targets]]:
        yield from self.some(range(len(self)))
        self.on_epoch_end()

    def some(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, Targets]]:
        """Yield the batches with these numbers, made ahead as in iterating; stays in this epoch."""
        now = copy.copy(self)
        yield from ahead(lambda k: now._batch(numbers[k]), len(numbers), self.workers)

    def _members(self, i: int) -> np.ndarray:
        """Return the rows of `index` that batch `i` of this epoch holds."""
        return self.order[i * self.batch_size : (i + 1) * self.batch_size]

    def targets(self, members: np.ndarray) -> Targets:
        """Return y of these rows of `index`, as `target` says."""
        y = {name: values[members] for name, values in self._targets.items()}
        return y[self.target] if isinstance(self.target, str) else y

    def _batch(self, i: int) -> tuple[np.ndarray, Targets]:
        """Batch `i` of this epoch."""
        members, size = self._members(i), self.store.size
        shape = {"nhwc": (size, size, 3), "nchw": (3, size, size), "grey": (size, size)}[self.layout]
        kind = "u1" if self.layout == "grey" else "f4"
        x, pixels = np.empty((len(members), *shape), kind), self.store.pixels
        for out, member in zip(x, members, strict=True):
            image = pixels[self._rows[member]]
            if self.augment is not None:
                image = self.augment(image, self._draws[member])
            to_batch(image, self.scale, self.layout, out)
        return x, self.targets(members)

    def keras(self) -> Any:
        """Return a ``tf.data.Dataset``, channels last, with `batches`, `scale` and `set_epoch`.

        TensorFlow is handed grey bytes, a twelfth of the floats, and scales and repeats them itself, within
        1e-6 of `SCALES`. An iteration goes to the next epoch when it begins.
        """
        import tensorflow as tf

        own = copy.copy(self)
        own.layout = "grey"

        def epoch() -> Iterator[tuple[np.ndarray, Targets]]:
            begun = copy.copy(own)
            own.on_epoch_end()  # not at the end: Keras never asks what comes after the last batch
            return iter(begun)

        def to_rgb(x: Any, y: Any) -> Any:
            # A convolution of one pixel repeats and scales in one pass, faster than any other operation.
            black, white = np.broadcast_to(SCALES[own.scale], (3, 256))[:, [0, 255]].T
            rise = np.reshape((white - black) / 255, (1, 1, 1, 3))
            return tf.nn.bias_add(tf.nn.conv2d(tf.cast(x, tf.float32)[..., None], rise, 1, "VALID"), black), y

        specs = tf.nest.map_structure(lambda a: tf.TensorSpec((None, *a.shape[1:]), a.dtype), own[0])
        dataset: Any = tf.data.Dataset.from_generator(epoch, output_signature=specs)
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(own)))
        dataset = (dataset if own.scale is None else dataset.map(to_rgb)).prefetch(2)
        dataset.batches, dataset.scale, dataset.set_epoch = own, own.scale, own.set_epoch
        return dataset

    def torch(self) -> Any:
        """Return a torch DataLoader, channels first, with `batches`, `scale` and `set_epoch`.

        Its data set has one item a batch. A sampler that is put in, as Lightning does with several devices,
        chooses among batches.
        """
        from torch.utils.data import DataLoader, default_convert

        own = copy.copy(self)
        own.layout = "nchw"

        class TorchLoader(DataLoader):
            """Makes batches ahead in threads, in the order of its sampler; needs no processes."""

            batches, scale, set_epoch = own, own.scale, own.set_epoch

            def __iter__(self) -> Any:
                yield from map(default_convert, own.some(list(self.sampler)))  # shares the memory
                own.on_epoch_end()

        return TorchLoader(own, batch_size=None)  # pyright: ignore[reportArgumentType]


# --- The reports' datasets ----------------------------------------------------------------------------


def kl_datasets(split: pd.DataFrame, store: PixelStore, **options: Any) -> dict[str, Batches]:
    """Make the four datasets of KL Table 1.

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
    train, dev, test = (split.loc[split["split"].eq(name), :] for name in ("train", "dev", "test"))
    return {
        "train original": Batches(store, train, shuffle=True, **options),
        "train augmented": Batches(store, train, shuffle=True, augment=KL_AUGMENT, **options),
        "validation": Batches(store, dev, **options),
        "test": Batches(store, test, **options),
    }


def kn_datasets(split: pd.DataFrame, store: PixelStore, **options: Any) -> dict[str, Batches]:
    """Make KN's datasets (KN 2.1): RGB scaled by ImageNet's mean and standard deviation, channels first.

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
    train, dev, test = (split.loc[split["split"].eq(name), :] for name in ("train", "dev", "test"))
    options = {"scale": "imagenet", "layout": "nchw"} | options
    sets = {"train": Batches(store, train, shuffle=True, augment=KN_AUGMENT, **options)}
    if not dev.empty:
        sets["validation"] = Batches(store, dev, **options)
    return sets | {"test": Batches(store, test, **options)}
