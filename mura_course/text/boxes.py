"""Room text: what every detector of burned-in text gives and needs; below all of them. Chapter 2.

Changes no image, reads and writes no file.
"""

from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np

from ..errors import TextError

BORDER = 0.18  # fraction of the longest side: markers stand this near the border; findings seldom do


class Found(NamedTuple):
    """What a detector found in one film.

    Attributes
    ----------
    boxes : list of ndarray
        Of each word its corners, float32 (4, 2), x and y in pixels, clockwise from above left.
    mask : ndarray
        bool (H, W), the pixels to repaint.
    """

    boxes: list[np.ndarray]
    mask: np.ndarray


Detector: TypeAlias = Any
"""What finds text: called with a uint8 image, (H, W) or (H, W, 3) RGB, it gives `Found`.

Its attributes: `name` (str), and `versions` (dict of str), which say what decides its results.
"""


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W) of a uint8 image (H, W) or (H, W, 3), RGB; TextError for anything else."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise TextError(f"A film is uint8 (height, width[, 3]), not {image.dtype} {image.shape}.")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def line_mask(boxes: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Boxes filled as the recipe that KL 1.2 follows does it.

    For each box, a line as thick as the box is high, between the midpoints of its short sides. The line's
    round ends reach half a height beyond the box.

    Parameters
    ----------
    boxes : list of ndarray
        As in `Found`.
    shape : tuple of int
        Height and width of the film.

    Returns
    -------
    ndarray
        bool (H, W).
    """
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        a, b, c, d = box.astype(float)
        (left, right), thick = ((a + d) / 2, (b + c) / 2), np.linalg.norm(a - d)
        if np.linalg.norm(a - b) < thick:
            (left, right), thick = ((a + b) / 2, (c + d) / 2), np.linalg.norm(a - b)
        cv2.line(mask, left.astype(int).tolist(), right.astype(int).tolist(), 1, max(1, int(thick)))
    return mask > 0


def from_border(box: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Distance of boxes, (n, 4) as x0, y0, x1, y1, from the nearest border, over the longest side."""
    height, width = shape
    gaps = [box[:, 0], box[:, 1], width - box[:, 2], height - box[:, 3]]
    return np.minimum.reduce(gaps) / max(shape)
