"""Finds text burned into a film: three detectors by name, one kind of answer (chapter 2).

An image goes in; boxes, and a mask of the pixels to repaint, come out. Changes no image and writes nothing:
`text_removal` repaints, `text_worker` runs keras-ocr in a process of its own. Tuned on training films of the
demo data, whose truth it never sees; on MURA nothing of it has been measured. Only text that is brighter than
its surroundings is found, and only near the film's border; keras-ocr alone looks everywhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import cv2
import numpy as np

from .errors import MuraError

DETECTORS = ("keras-ocr", "rapidocr", "strokes")

# Lengths are shares of the film's longest side, grey levels shares of the film's own range.
HAT = 0.04  # what is wider than this is no stroke of a letter, but bone or flesh
LEVELS = (0.07, 0.13, 0.2, 0.32, 0.5)  # how far strokes stand out; a level parts what lower ones join
HEIGHTS, WIDEST, THICKEST = (0.015, 0.14), 0.35, 0.025  # of a glyph; a framed or joined one may be wide
HOLES = 3  # an 8 or a framed R has two; bone under a threshold is a net with many
BORDER = 0.18  # markers stand near the border; findings seldom do
OCR_SIDE, OCR_SCORE = 512, 0.8
_3, _5 = np.ones((3, 3), np.uint8), np.ones((5, 5), np.uint8)


class TextDetectionError(MuraError, ValueError):
    """A detector that there is not or that cannot run, or an image that it cannot take."""


@dataclass(frozen=True, eq=False)
class TextBox:
    """Where text is: `corners`, float32 (4, 2), x and y in pixels, clockwise from above left.

    text: as read, "" where nothing read it. score: of the reading, 0 to 1, nan without. source: the detector
    that found it, which within "rapidocr" may be "strokes".
    """

    corners: np.ndarray
    text: str = ""
    score: float = float("nan")
    source: str = ""

    @property
    def height(self) -> float:
        """Length in pixels of the sides on the left and right of upright text."""
        return float(np.linalg.norm(self.corners[3] - self.corners[0]))


@dataclass(frozen=True, eq=False)
class Found:
    """What a detector found in one film: `boxes`, and `mask`, bool (H, W), the pixels to repaint."""

    boxes: list[TextBox]
    mask: np.ndarray


def get_detector(name: str, threads: int = 0):
    """The detector called `name`: an object with `name`, `versions` (dict) and `detector(image) -> Found`.

    "strokes": no network, milliseconds a film; see `find_strokes`. "rapidocr": the same, and what RapidOCR's
    networks find and read; their weights lie in its wheel, so it works offline. "keras-ocr": CRAFT as in
    KL 1.2, boxes filled whole and unfiltered; runs in a process of its own (`text_worker`).
    image: uint8 (H, W), or (H, W, 3) RGB. threads: of RapidOCR's networks, 0 for all cores. Raises
    TextDetectionError: no such detector, or not installed; text_worker.WeightsError: keras-ocr's are missing.
    """
    if name == "keras-ocr":
        from .text_worker import KerasOCR

        return KerasOCR()
    if name not in DETECTORS:
        raise TextDetectionError(f"There is no detector {name!r}. Choose one of: {', '.join(DETECTORS)}.")
    return Strokes() if name == "strokes" else RapidOCR(threads)


def require(package: str) -> str:
    """The version of a package of the extra `text`; raises TextDetectionError where it is missing."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise TextDetectionError(
            f"The detector needs {package}, which is not installed here. Run: pip install {package}"
        )
    return importlib.metadata.version(package)


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W) of `image`, uint8 (H, W) or (H, W, 3); raises TextDetectionError for anything else."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise TextDetectionError(
            f"A film is uint8 (height, width) or (height, width, 3), not {image.dtype} {image.shape}."
        )
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def line_mask(boxes: list[TextBox], shape: tuple[int, int]) -> np.ndarray:
    """bool (H, W): boxes filled as the recipe that KL 1.2 follows does it.

    For each, a line as thick as the box is high, between the midpoints of its short sides; the line's round
    ends reach half a height beyond the box.
    """
    mask = np.zeros(shape, np.uint8)
    for box in boxes:
        a, b, c, d = box.corners.astype(float)
        (left, right), thick = ((a + d) / 2, (b + c) / 2), np.linalg.norm(a - d)
        if np.linalg.norm(a - b) < thick:
            (left, right), thick = ((a + b) / 2, (c + d) / 2), np.linalg.norm(a - b)
        ends = (tuple(int(v) for v in end) for end in (left, right))
        cv2.line(mask, *ends, 1, max(1, int(thick)))
    return mask > 0


# --- Strokes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stroke:
    """A connected, thin, bright shape: a glyph, part of one, or bone that looks like one.

    box: x0, y0, x1, y1. corner: y, x of `grown`, bool, the shape with its soft rim. grey: of its core.
    contrast: core above the ring two pixels around it. uneven: spread of the core's grey, as a share of the
    contrast. clear: contrast over the spread of the ring. bar: longer than letters are, like a pin or the
    edge of a bone. Grey levels are shares of the film's range.
    """

    box: tuple[int, int, int, int]
    corner: tuple[int, int]
    grown: np.ndarray
    grey: float
    contrast: float
    uneven: float
    clear: float
    bar: bool


def find_strokes(image: np.ndarray) -> Found:
    """Text by what burned-in strokes look like: bright, thin, sharp-edged, of one even grey, near the border.

    A shape that is so beyond doubt counts alone; fainter ones count in a row of like height and grey, as the
    digits of a date. Bone fails by its uneven grey, metal by what is around it. image: as `get_detector`.
    """
    return _found(_candidates(grey(image)), image.shape[:2])


def top_hat(film: np.ndarray) -> np.ndarray:
    """uint8 (H, W): how far each pixel stands out from what remains when thin bright things are removed."""
    side = max(5, round(HAT * max(film.shape))) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return cv2.morphologyEx(film, cv2.MORPH_TOPHAT, kernel)


def grey_range(film: np.ndarray) -> float:
    """From nearly the darkest to nearly the brightest, in grey levels; at least 64, or noise would count."""
    low, high = np.percentile(film[::2, ::2], (0.5, 99.5))
    return max(high - low, 64.0)


def _candidates(film: np.ndarray) -> list[Stroke]:
    """Shapes of a glyph's size near the border that stand out, at each of `LEVELS`."""
    longest, span, hat = max(film.shape), grey_range(film), top_hat(film)
    edges = cv2.morphologyEx(film, cv2.MORPH_GRADIENT, _3).ravel()
    strokes = []
    for level in LEVELS:
        above = (hat > level * span).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
        x, y, width, height, area = stats.T
        sharp = np.bincount(labels.ravel(), edges, count) / area.clip(1) / span
        good = (area >= 6) & (width <= WIDEST * longest) & (sharp > max(0.08, level))
        good &= (height >= HEIGHTS[0] * longest) & (height <= HEIGHTS[1] * longest)
        good &= _from_border(np.stack([x, y, x + width, y + height], axis=1), film.shape) <= BORDER
        for i in np.flatnonzero(good[1:]) + 1:
            if stroke := _measure(film, hat, labels, i, stats[i], span):
                strokes.append(stroke)
    return strokes


def _measure(film: np.ndarray, hat: np.ndarray, labels: np.ndarray, i: int, stats, span: float):
    """The `Stroke` of component `i`, or None where it is too thick, too faint or a net."""
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
    rim = cv2.dilate(shape, _3)
    ring = (cv2.dilate(shape, _5) > rim).astype(bool)
    if thick > min(max(0.35 * height, 0.012 * longest), THICKEST * longest) or not ring.any():
        return None
    inside = shape.astype(bool)
    core = film[inside][hat[inside] >= _quantile(hat[inside], 0.6)]
    level, around = _quantile(core, 0.5), film[ring]
    contrast = (level - _quantile(around, 0.5)) / span
    lines, tree = cv2.findContours(shape, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if contrast < 0.05 or (tree[0, :, 3] >= 0).sum() > HOLES:
        return None
    grown = (rim > 0) | ((cv2.dilate(shape, _5) > 0) & (hat >= 0.15 * peak))
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    clear = contrast / max(around.std() / span, 0.02)
    uneven = core.std() / span / contrast
    bar = _is_bar(shape, lines)
    return Stroke(tuple(map(int, box)), (top, left), grown, level / span, contrast, uneven, clear, bar)


def _is_bar(shape: np.ndarray, lines: tuple[np.ndarray, ...]) -> bool:
    """Whether a shape is over twice as long as wide, however it lies; the frame around a marker is none."""
    _, sides, _ = cv2.minAreaRect(np.concatenate(lines))
    long, wide = max(sides) + 1, min(sides) + 1
    encloses = max(map(cv2.contourArea, lines)) > 0.75 * max(sides) * min(sides)
    return long > 2 * wide and not (encloses and shape.sum() < 0.5 * long * wide)


def _quantile(values: np.ndarray, share: float) -> float:
    """One of the values; many times as fast as NumPy's quantile on the few pixels of a glyph."""
    place = int(share * (len(values) - 1))
    return float(np.partition(values, place)[place])


def _accept(strokes: list[Stroke], shape: tuple[int, int]) -> np.ndarray:
    """Which strokes are text, bool (n,): those beyond doubt, and those in a row with their like."""
    if not strokes:
        return np.zeros(0, bool)
    box = np.array([s.box for s in strokes], float)
    contrast, uneven, clear = (
        np.array([getattr(s, name) for s in strokes]) for name in ("contrast", "uneven", "clear")
    )
    tall = box[:, 3] - box[:, 1] >= 0.02 * max(shape)
    bar = np.array([s.bar for s in strokes])
    certain = tall & ~bar & (contrast >= np.maximum(0.2, 0.12 + 3.5 * uneven)) & (clear >= 2.2)
    likely = certain | ((contrast >= np.maximum(0.1, uneven)) & (clear >= 1.4))
    accepted, rows = certain.copy(), np.flatnonzero(likely)
    row_of = _rows(box[rows], np.array([strokes[i].grey for i in rows]))
    for row in np.unique(row_of):
        members = rows[row_of == row]
        count, letters = (_side_by_side(box[m]) for m in (members, members[~bar[members]]))
        if count >= 2 and (certain[members].any() or (count >= 3 and letters >= 2)):
            accepted[members] = True
    return accepted


def _from_border(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Distance of boxes (n, 4) from the nearest border, as a share of the longest side."""
    height, width = shape
    gaps = [box[:, 0], box[:, 1], width - box[:, 2], height - box[:, 3]]
    return np.minimum.reduce(gaps) / max(shape)


def _rows(box: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The number of the row that each stroke stands in: neighbours of like height, place and grey."""
    from scipy.sparse.csgraph import connected_components

    x0, y0, x1, y1 = box.T
    height = y1 - y0
    smaller, taller = np.minimum(height[:, None], height), np.maximum(height[:, None], height)
    overlap = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    gap = np.maximum(x0[:, None], x0) - np.minimum(x1[:, None], x1)
    linked = (overlap >= 0.7 * smaller) & (taller <= 1.6 * smaller) & (np.abs(level[:, None] - level) <= 0.12)
    linked &= (gap <= 0.9 * taller) & (gap > -0.3 * smaller)
    return connected_components(linked, directed=False)[1]


def _side_by_side(box: np.ndarray) -> int:
    """How many of the boxes stand beside one another; those that overlap count once."""
    count, end = 0, -np.inf
    for left, right in sorted(zip(box[:, 0], box[:, 2], strict=True)):
        count += left >= end - 1
        end = max(end, right)
    return count


def _found(strokes: list[Stroke], shape: tuple[int, int]) -> Found:
    mask = np.zeros(shape, bool)
    for stroke in (s for s, good in zip(strokes, _accept(strokes, shape), strict=True) if good):
        (top, left), (height, width) = stroke.corner, stroke.grown.shape
        mask[top : top + height, left : left + width] |= stroke.grown
    return Found(_boxes(mask), mask)


def _boxes(mask: np.ndarray) -> list[TextBox]:
    """Upright boxes around the words of a mask: gaps up to a letter's width are bridged."""
    bridge = np.ones((1, max(3, round(0.045 * max(mask.shape)))), np.uint8)
    words = cv2.morphologyEx(np.pad(mask, ((0, 0), (30, 30))).astype(np.uint8), cv2.MORPH_CLOSE, bridge)
    stats = cv2.connectedComponentsWithStats(words[:, 30:-30], connectivity=8)[2][1:]
    return [TextBox(_corners(x, y, x + w, y + h), source="strokes") for x, y, w, h, _ in stats]


def _corners(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float32)


class Strokes:
    """The detector "strokes"."""

    name = "strokes"

    def __init__(self) -> None:
        self.versions = {"opencv": cv2.__version__}

    def __call__(self, image: np.ndarray) -> Found:
        return find_strokes(image)


# --- RapidOCR -----------------------------------------------------------------------------------------


class RapidOCR:
    """The detector "rapidocr": `find_strokes`, completed by what RapidOCR finds, and reads.

    Its boxes alone would not do: bones and screws are boxed as well. So a box counts only where it has a
    marker's height, lies near the border and is read as letters or digits with certainty; and of a box that
    counts, only the strokes are repainted. threads: for ONNX Runtime, 0 for all cores.
    """

    name = "rapidocr"

    def __init__(self, threads: int = 0) -> None:
        self.versions = {"opencv": cv2.__version__}
        self.versions |= {package: require(package) for package in ("rapidocr", "onnxruntime")}
        from rapidocr import RapidOCR as Engine

        options = {"Global.log_level": "critical", "Global.text_score": 0.0}
        options |= {"Det.limit_type": "max", "Det.limit_side_len": OCR_SIDE, "Det.thresh": 0.2}
        options |= {"Det.box_thresh": 0.3, "EngineConfig.onnxruntime.intra_op_num_threads": threads or -1}
        self._engine = Engine(params=options)

    def __call__(self, image: np.ndarray) -> Found:
        film = grey(image)
        found = find_strokes(film)
        hat, mask, read = top_hat(film), found.mask.copy(), np.zeros(film.shape, bool)
        boxes = self.read(film)
        for box in boxes:
            inside = _filled(box, film.shape)
            read |= inside
            gaps = inside & ~(found.mask & inside).any(axis=0)
            if gaps.any(axis=0).sum() > 0.15 * inside.any(axis=0).sum():
                # It is read, so there is text, however faint: a threshold of its own where no stroke is yet.
                peak = np.percentile(hat[inside], 95)
                faint = inside & (hat >= max(0.35 * peak, 0.04 * grey_range(film)))
                mask |= (cv2.dilate(faint.astype(np.uint8), _3) > 0) & gaps
        boxes += [box for box in found.boxes if not read[_centre(box)]]
        return Found(boxes, mask)

    def read(self, film: np.ndarray) -> list[TextBox]:
        """Boxes of a marker's height near the border of a grey film that are read as letters or digits."""
        longest, boxes = max(film.shape), []
        for box in self.boxes(film):
            extent = np.array([[*box.corners.min(axis=0), *box.corners.max(axis=0)]])
            if box.height > 0.16 * longest or _from_border(extent, film.shape)[0] > BORDER:
                continue
            word, score = self._recognise(film, box)
            letters = [c for c in word if c.isascii() and c.isalnum()]
            # Of single letters only the side's: a screw reads as 1.
            if score >= OCR_SCORE and (len(letters) > 1 or letters in (["L"], ["R"])):
                boxes.append(TextBox(box.corners, word, score, self.name))
        return boxes

    def boxes(self, film: np.ndarray) -> list[TextBox]:
        """All that RapidOCR's detection network boxes in a film, uint8 (H, W), unread and unfiltered."""
        scale = OCR_SIDE / max(film.shape)
        large = cv2.resize(film, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        result = self._run(large, use_det=True, use_rec=False)
        corners = [] if result.boxes is None else [np.float32(box) / scale for box in result.boxes]
        return [TextBox(c, source=self.name) for c in corners]

    def _recognise(self, film: np.ndarray, box: TextBox) -> tuple[str, float]:
        """What RapidOCR's second network reads in a box, and its certainty; ("", 0.0) for nothing."""
        x0, y0 = np.floor(box.corners.min(axis=0)).clip(0).astype(int)
        x1, y1 = np.ceil(box.corners.max(axis=0)).astype(int)
        result = self._run(film[y0:y1, x0:x1], use_det=False, use_rec=True)
        return (result.txts[0], float(result.scores[0])) if result.txts else ("", 0.0)

    def _run(self, film: np.ndarray, use_det: bool, use_rec: bool):
        # The engine keeps what it was last told: always say both.
        bgr = cv2.cvtColor(film, cv2.COLOR_GRAY2BGR)
        return self._engine(bgr, use_det=use_det, use_cls=False, use_rec=use_rec)


def _filled(box: TextBox, shape: tuple[int, int]) -> np.ndarray:
    """bool (H, W), true inside the box."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(box.corners).astype(np.int32)], 1)
    return mask > 0


def _centre(box: TextBox) -> tuple[int, int]:
    """Row and column of a box's middle."""
    x, y = box.corners.mean(axis=0)
    return int(y), int(x)
