"""Room text: the detector "rapidocr": strokes, and what RapidOCR's networks find and read. Chapter 2.

Changes no image, reads and writes no file; the networks' weights lie in RapidOCR's own package.
"""

from importlib.metadata import version
from typing import Any

import cv2
import numpy as np

from .boxes import Found, grey
from .strokes import NEIGHBOURS, Strokes, grey_range, top_hat

SIDE = 736  # pixels of the longest side, as the first network sees a film
TALLEST = 0.2  # of a box, as a fraction of the film's longest side
CROWDED = 0.35  # letters fill no more of a box
BLURRED = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))  # the rim of letters in the beam is wide
SCORE = 0.8  # a reading less certain than this is none


class RapidOCR:
    """The detector "rapidocr", some tenths of a second a film.

    RapidOCR's boxes alone would not do: bones and screws are boxed as well. So a box counts only where it has
    a marker's height and is read as letters or digits with certainty, wherever it lies; and of a box that
    counts, only the letters are repainted.

    Parameters
    ----------
    threads : int
        For ONNX Runtime; 0 for all cores.

    Raises
    ------
    importlib.metadata.PackageNotFoundError
        RapidOCR or ONNX Runtime is not installed.
    """

    name = "rapidocr"

    def __init__(self, threads: int = 0) -> None:
        self._strokes = Strokes()
        # The first is raised by hand where the masks change: then the films are other data.
        self.versions = {"letters": "1", **{p: version(p) for p in ("rapidocr", "onnxruntime")}}
        self.versions |= self._strokes.versions
        from rapidocr import RapidOCR as Engine

        options = {"Global.log_level": "critical", "Global.text_score": 0.0}
        options |= {"Det.limit_type": "max", "Det.limit_side_len": SIDE, "Det.thresh": 0.2}
        options |= {"Det.box_thresh": 0.3, "EngineConfig.onnxruntime.intra_op_num_threads": threads or -1}
        # An engine keeps what it was last told to do. Two that always do the same can be called from threads.
        self._finder, self._reader = Engine(params=options), Engine(params=options)

    def __call__(self, image: np.ndarray) -> Found:
        """Find text in `image`, uint8 (H, W) or (H, W, 3) RGB."""
        film = grey(image)
        found, boxes = self._strokes(film), self.read(film)
        mask, read = found.mask.copy(), np.zeros(film.shape, bool)
        for box in boxes:
            inside = cv2.fillPoly(np.zeros_like(film), [np.round(box).astype(np.int32)], [1]) > 0
            mask, read = mask | _letters(film, inside), read | inside
        unread = [box for box in found.boxes if not read[tuple(box.mean(axis=0).astype(int)[::-1])]]
        return Found(boxes + unread, mask)

    def read(self, film: np.ndarray) -> list[np.ndarray]:
        """Boxes of a marker's height in a grey film that are read as letters or digits."""
        scale, boxes = SIDE / max(film.shape), []
        large = cv2.resize(film, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        found: Any = self._finder(large, use_cls=False, use_rec=False)
        for corners in [] if found.boxes is None else np.float32(found.boxes) / scale:
            (x0, x1), (y0, y1) = ((max(0, int(c.min())), int(np.ceil(c.max()))) for c in corners.T)
            is_low = min(cv2.minAreaRect(corners)[1]) <= TALLEST * max(film.shape)
            if is_low and self._is_read(film[y0:y1, x0:x1]):
                boxes.append(corners)
        return boxes

    def _is_read(self, crop: np.ndarray) -> bool:
        """Whether letters or digits are read, also mirrored or turned: letters of metal may lie so."""
        for number, view in enumerate((crop, crop[:, ::-1], np.rot90(crop), np.rot90(crop, -1))):
            read: Any = self._reader(np.ascontiguousarray(view), use_det=False, use_cls=False)
            word, score = (read.txts[0], float(read.scores[0])) if read.txts else ("", 0.0)
            letters = "".join(c for c in word if c.isascii() and c.isalnum())
            # Of single letters only the side's: a screw reads as 1. Turned, a comb of screws reads as TTT.
            if score >= SCORE and (letters[:1] in ("L", "R") or (number == 0 and len(letters) > 1)):
                return True
        return False


def _letters(film: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Pixels of the letters in a box that was read, and their rim: bool (H, W).

    They are thin, stand out, and share one grey. Where so many pixels do that bone must be among them, the
    greys taken for one are fewer.
    """
    (y0, y1), (x0, x1) = (np.flatnonzero(box.any(axis=axis))[[0, -1]] for axis in (1, 0))
    hat, span = top_hat(film, 0.35 * min(y1 - y0 + 1, x1 - x0 + 1)), grey_range(film)
    peak, box = np.percentile(hat[box], 95), cv2.dilate(box.astype(np.uint8), NEIGHBOURS) > 0
    greys = np.convolve(np.bincount(film[box & (hat >= 0.5 * peak)], minlength=256), np.ones(7), "same")
    apart, thin = np.abs(film - float(greys.argmax())), box & (hat >= max(0.3 * peak, 0.04 * span))
    alike = [thin & (apart <= part * span) for part in (0.2, 0.12, 0.06, 0.03)]
    letters = next((some for some in alike if some.sum() <= CROWDED * box.sum()), alike[-1]).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(letters, connectivity=8)
    letters *= (stats[:, cv2.CC_STAT_AREA] >= 10)[labels]
    depth = cv2.distanceTransform(letters, cv2.DIST_L2, 3)
    is_fat = letters.any() and np.percentile(depth[depth > 0], 90) >= 1.8
    return cv2.dilate(letters, BLURRED if is_fat else NEIGHBOURS) > 0
