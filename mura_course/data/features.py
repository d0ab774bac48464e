"""What a frozen network makes of the images, computed once and kept (room: data; chapters 5 and 7).

A frozen backbone turns an image into the same features in every epoch, its lower blocks into the same maps,
and an augmented image into others, unless a number of *views* is agreed on. Writes below
``<cache folder>/features``. Imports no framework: an `Extractor` brings it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from .. import paths
from ..errors import DataError
from .batches import Batches, Targets
from .store import cached_array

FORMAT = 2  # part of a key: raise it when what `Batches` makes of an image changes


Extractor: TypeAlias = Any
"""What `extract` wants of a backbone, whichever framework it is made of: it is called with images, float32 as
its `scale` and `layout` say, and gives features, float32 (len(x), dim), or maps, of the shape `dim` each.

Its attributes: `name` and `digest` (str) of the architecture and of its weights (`digest_of`); `size` (int or
None), the side in pixels that it takes, None for any; `dim` (int or tuple of int), how many features it gives
or the shape of its maps; `scale` and `layout` (str), as `Batches` has them.
"""


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """Hash a backbone's weights, in their order, to 12 hexadecimal digits."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]


class FeatureBatches(Batches):
    """Batches (x, y) with features or maps in place of images: x is float32, (n, dim) or (n, ...).

    All else is as in `Batches`.

    Parameters
    ----------
    of : Batches
        Whose rows, orders and targets these are; its own epoch stays where it is.
    views : list of ndarray
        (len(of.index), ...), row i for row i of the index; epoch e brings view e modulo their number.
    """

    def __init__(self, of: Batches, views: list[np.ndarray]) -> None:
        # Features have no scale, and reading them needs no threads.
        vars(self).update(vars(of), scale=None, workers=1)
        self.views = views

    def _batch(self, i: int) -> tuple[np.ndarray, Targets]:
        members = self._members(i)
        view = self.views[self.epoch % len(self.views)][members]
        return np.asarray(view, np.float32), self.targets(members)


def extract(extractor: Extractor, batches: Batches, views: int = 1, progress: bool = True) -> FeatureBatches:
    """Return the features of the images of `batches`, computed where they are not in the cache.

    Parameters
    ----------
    extractor : Extractor
        The frozen backbone.
    batches : Batches
        Which images, in which order, with which targets. Their own scale and layout do not matter.
    views : int
        For batches that augment: how many changed forms of each image there are, those of epochs 0 to
        `views` - 1. With as many views as epochs, nothing differs from augmenting in every epoch.
    progress : bool
        Show a progress bar.

    Returns
    -------
    FeatureBatches

    Raises
    ------
    DataError
        The backbone takes images of another size, or tells no two images apart.
    DiskError
        No room, no permission, or damaged features (their hash is checked once a process).

    Notes
    -----
    An array belongs to the backbone's weights, the pixels (`PixelStore`), the rows of the index and, for a
    view, to augmentation and seed: where one of them changes, other features are computed. A pass that was
    killed leaves nothing.
    """
    size = batches.store.size
    if extractor.size not in (None, size):
        raise DataError(f"{extractor.name} takes images of {extractor.size} px, this store holds {size} px.")
    numbers = range(max(1, views) if batches.augment else 1)
    return FeatureBatches(batches, [_view(extractor, batches, number, progress) for number in numbers])


def _view(extractor: Extractor, batches: Batches, number: int, progress: bool) -> np.ndarray:
    """One cached array: features, float32 (len(batches.index), dim), or maps, float16 (..., *dim)."""
    augment, rows = batches.augment, batches.index["path"].tolist()
    changes = [repr(augment), batches.seed, number] if augment else None
    backbone = [extractor.name, extractor.digest, extractor.scale, extractor.layout, extractor.dim]
    key = [FORMAT, backbone, batches.store.folder.name, changes, rows]
    name = f"{extractor.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    file = paths.cache_dir() / "features" / name / "features.npy"
    dim = extractor.dim if isinstance(extractor.dim, tuple) else (extractor.dim,)
    kind = np.float16 if len(dim) > 1 else np.float32
    found = cached_array(file, (len(rows), *dim), kind, _compute(extractor, batches, number, progress))
    spread = np.std(found[:256], axis=0, dtype=np.float64).max()
    if len(rows) > 1 and not spread > 1e-6:  # also where it is no number
        what = f"{extractor.name} makes the same of every image (standard deviation {spread:.0e})."
        raise DataError(f"{what} Take ImageNet's weights, or call `calibrate` on a random network.")
    return found


def _compute(extractor: Extractor, batches: Batches, number: int, progress: bool) -> Iterator[np.ndarray]:
    """Compute the features of the images in the order of the index, batch by batch."""
    source = replace(batches, shuffle=False, drop_last=False, scale=extractor.scale, layout=extractor.layout)
    source.set_epoch(number)
    made, title = source.some(range(len(source))), f"{extractor.name}, once per image"
    for x, _ in tqdm(made, title, len(source), unit="batch", leave=False, disable=not progress):
        yield extractor(x)
