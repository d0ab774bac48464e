"""Room text: the detector "strokes", which needs no network: what burned-in strokes look like. Chapter 2.

Changes no image, reads and writes no file. Tuned on training films of the demo data, whose truth it never
sees; nothing of it has been measured on MURA. Finds only text that is brighter than its surroundings, near
the film's border.
"""

from typing import TypeAlias

import cv2
import numpy as np

from .boxes import BORDER, Found, from_border, grey

# Lengths are fractions of the film's longest side, grey levels fractions of the film's own range.
HAT = 0.04  # what is wider than this is no stroke of a letter, but bone or flesh
LEVELS = (0.07, 0.13, 0.2, 0.32, 0.5)  # how far strokes stand out; a level parts what lower ones join
HEIGHTS, WIDEST, THICKEST = (0.015, 0.14), 0.35, 0.025  # of a glyph; a framed or joined one may be wide
HOLES = 3  # an 8 or a framed R has two; bone under a threshold is a net with many
NEIGHBOURS, WIDER = np.ones((3, 3), np.uint8), np.ones((5, 5), np.uint8)  # what a dilation reaches


Stroke: TypeAlias = tuple[tuple[slice, slice], np.ndarray, tuple[float, ...]]
"""A connected, thin, bright shape: a glyph, part of one, or bone that looks like one.

Its window: rows and columns of the shape with its soft rim; that shape there, bool; and nine measures. x0,
y0, x1, y1 in pixels. Grey of its core, and how far that is above the ring two pixels around it: fractions of
the film's range. Spread of the core's grey over this contrast; the contrast over the spread of the ring. 1
for a bar, which is longer than letters are, like a pin or the edge of a bone.
"""


class Strokes:
    """The detector "strokes": text is bright, thin, sharp-edged, of one even grey, near the border.

    A shape that is so beyond doubt counts alone. Fainter ones count in a row of like height and grey, as the
    digits of a date. Bone fails by its uneven grey, metal by what is around it. Some milliseconds a film.
    """

    name = "strokes"
    # The first is raised by hand where the masks change (a test holds some): then the films are other data.
    versions = {"strokes": "1", "opencv": cv2.__version__}

    def __call__(self, image: np.ndarray) -> Found:
        """Find text in a film.

        Parameters
        ----------
        image : ndarray
            uint8 (H, W), or (H, W, 3) RGB.

        Returns
        -------
        Found
            Upright boxes around words, and the pixels to repaint.

        Raises
        ------
        TextError
            The image has another type or shape.
        """
        strokes, mask = _candidates(grey(image)), np.zeros(image.shape[:2], bool)
        measures = np.reshape([measures for *_, measures in strokes], (-1, 9))
        for i in np.flatnonzero(_accept(measures, max(mask.shape))):
            window, grown, _ = strokes[i]
            mask[window] |= grown
        # Upright boxes around the words: gaps up to a letter's width are bridged.
        bridge = np.ones((1, max(3, round(0.045 * max(mask.shape)))), np.uint8)
        words = cv2.morphologyEx(np.pad(mask, ((0, 0), (30, 30))).astype(np.uint8), cv2.MORPH_CLOSE, bridge)
        stats = cv2.connectedComponentsWithStats(words[:, 30:-30], connectivity=8)[2][1:]
        corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h)) for x, y, w, h, _ in stats]
        return Found([np.array(four, np.float32) for four in corners], mask)


def top_hat(film: np.ndarray, width: float = 0.0) -> np.ndarray:
    """uint8 (H, W): how far pixels stand out from the film without what is bright and below `width` px."""
    side = max(5, round(width or HAT * max(film.shape))) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return cv2.morphologyEx(film, cv2.MORPH_TOPHAT, kernel)


def grey_range(film: np.ndarray) -> float:
    """From nearly the darkest to nearly the brightest, in grey levels; at least 64, or noise would count."""
    low, high = np.percentile(film[::2, ::2], (0.5, 99.5))
    return max(high - low, 64.0)


def _candidates(film: np.ndarray) -> list[Stroke]:
    """Shapes of a glyph's size near the border that stand out, at each of `LEVELS`."""
    longest, span, hat = max(film.shape), grey_range(film), top_hat(film)
    edges = cv2.morphologyEx(film, cv2.MORPH_GRADIENT, NEIGHBOURS).ravel()
    strokes = []
    for level in LEVELS:
        above = (hat > level * span).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
        x, y, width, height, area = stats.T
        sharp = np.bincount(labels.ravel(), edges, count) / area.clip(1) / span
        good = (area >= 6) & (width <= WIDEST * longest) & (sharp > max(0.08, level))
        good &= (height >= HEIGHTS[0] * longest) & (height <= HEIGHTS[1] * longest)
        good &= from_border(np.stack([x, y, x + width, y + height], axis=1), film.shape) <= BORDER
        measured = (_measure(film, hat, labels, i, stats[i], span) for i in np.flatnonzero(good) if i)
        strokes += [stroke for stroke in measured if stroke]
    return strokes


def _measure(
    film: np.ndarray, hat: np.ndarray, labels: np.ndarray, i: np.intp, stats: np.ndarray, span: float
) -> Stroke | None:
    """Make the `Stroke` of component `i`, or None where it is too thick, too faint or a net."""
    x, y, width, height, _ = stats
    top, left = max(0, y - 3), max(0, x - 3)
    window = np.s_[top : y + height + 3, left : x + width + 3]
    hat, film = hat[window], film[window]
    member = labels[window] == i
    peak = _quantile(hat[member], 0.9)
    # Without what hangs on to it faintly, such as noise beside a letter.
    shape = (member & (hat >= 0.35 * peak)).astype(np.uint8)
    framed = cv2.copyMakeBorder(shape, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    thick = 2 * cv2.distanceTransform(framed, cv2.DIST_L2, 3).max() - 1
    longest = max(labels.shape)
    rim = cv2.dilate(shape, NEIGHBOURS)
    ring = (cv2.dilate(shape, WIDER) > rim).astype(bool)
    if thick > min(max(0.35 * height, 0.012 * longest), THICKEST * longest) or not ring.any():
        return None
    inside = shape.astype(bool)
    core = film[inside][hat[inside] >= _quantile(hat[inside], 0.6)]
    level, around = _quantile(core, 0.5), film[ring]
    contrast = (level - _quantile(around, 0.5)) / span
    lines, tree = cv2.findContours(shape, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if contrast < 0.05 or (tree[0, :, 3] >= 0).sum() > HOLES:
        return None
    grown = (rim > 0) | ((cv2.dilate(shape, WIDER) > 0) & (hat >= 0.15 * peak))
    x, y, width, height = cv2.boundingRect(shape)
    box = (left + x, top + y, left + x + width, top + y + height)
    uneven, clear = core.std() / span / contrast, contrast / max(around.std() / span, 0.02)
    return window, grown, (*box, level / span, contrast, uneven, clear, _is_bar(shape, lines))


def _is_bar(shape: np.ndarray, lines: tuple[np.ndarray, ...]) -> bool:
    """Whether a shape is over twice as long as wide, however it lies; the frame around a marker is none."""
    _, sides, _ = cv2.minAreaRect(np.concatenate(lines))
    long, wide = max(sides) + 1, min(sides) + 1
    encloses = max(map(cv2.contourArea, lines)) > 0.75 * max(sides) * min(sides)
    return long > 2 * wide and not (encloses and shape.sum() < 0.5 * long * wide)


def _quantile(values: np.ndarray, fraction: float) -> float:
    """One of the values; many times as fast as NumPy's quantile on the few pixels of a glyph."""
    place = int(fraction * (len(values) - 1))
    return float(np.partition(values, place)[place])


def _accept(measures: np.ndarray, longest: int) -> np.ndarray:
    """Which strokes are text, bool (n,), by their measures, (n, 9): beyond doubt, or in a row."""
    x0, y0, x1, y1, _, contrast, uneven, clear, bar = measures.T
    certain = (y1 - y0 >= 0.02 * longest) & (bar == 0) & (clear >= 2.2)
    certain &= contrast >= np.maximum(0.2, 0.12 + 3.5 * uneven)
    likely = certain | ((contrast >= np.maximum(0.1, uneven)) & (clear >= 1.4))
    accepted, rows = certain.copy(), np.flatnonzero(likely)
    row_of = _rows(*measures[rows, :5].T)
    for row in np.unique(row_of):
        members = rows[row_of == row]
        count, letters = (_side_by_side(x0[m], x1[m]) for m in (members, members[bar[members] == 0]))
        if count >= 2 and (certain[members].any() or (count >= 3 and letters >= 2)):
            accepted[members] = True
    return accepted


def _rows(x0: np.ndarray, y0: np.ndarray, x1: np.ndarray, y1: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Link neighbours of like height, place and grey, and number the rows that they make."""
    from scipy.sparse.csgraph import connected_components

    height = y1 - y0
    smaller, taller = np.minimum(height[:, None], height), np.maximum(height[:, None], height)
    overlap = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    gap = np.maximum(x0[:, None], x0) - np.minimum(x1[:, None], x1)
    linked = (overlap >= 0.7 * smaller) & (taller <= 1.6 * smaller) & (np.abs(level[:, None] - level) <= 0.12)
    linked &= (gap <= 0.9 * taller) & (gap > -0.3 * smaller)
    return connected_components(linked, directed=False)[1]


def _side_by_side(x0: np.ndarray, x1: np.ndarray) -> int:
    """How many strokes stand beside one another; those that overlap count once."""
    order = np.lexsort((x1, x0))
    ends = np.maximum.accumulate(np.r_[-np.inf, x1[order]])  # of all before each
    return int((x0[order] >= ends[:-1] - 1).sum())
