"""Room text: the detector "rapidocr": strokes, and what RapidOCR's networks find and read. Chapter 2.

Changes no image, reads and writes no file; the networks' weights lie in RapidOCR's own package.
"""

from importlib.metadata import version
from typing import Any

import cv2
import numpy as np

from .boxes import BORDER, Found, from_border, grey
from .strokes import NEIGHBOURS, Strokes, grey_range, top_hat

SIDE = 512  # pixels of the longest side, as the first network sees a film
SCORE = 0.8  # a reading less certain than this is none


class RapidOCR:
    """The detector "rapidocr", some tenths of a second a film.

    RapidOCR's boxes alone would not do: bones and screws are boxed as well. So a box counts only where it has
    a marker's height, lies near the border and is read as letters or digits with certainty; and of a box that
    counts, only the strokes are repainted.

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
        self.versions = self._strokes.versions | {p: version(p) for p in ("rapidocr", "onnxruntime")}
        from rapidocr import RapidOCR as Engine

        options = {"Global.log_level": "critical", "Global.text_score": 0.0}
        options |= {"Det.limit_type": "max", "Det.limit_side_len": SIDE, "Det.thresh": 0.2}
        options |= {"Det.box_thresh": 0.3, "EngineConfig.onnxruntime.intra_op_num_threads": threads or -1}
        # An engine keeps what it was last told to do. Two that always do the same can be called from threads.
        self._finder, self._reader = Engine(params=options), Engine(params=options)

    def __call__(self, image: np.ndarray) -> Found:
        """Find text in `image`, uint8 (H, W) or (H, W, 3) RGB."""
        film = grey(image)
        found, hat, boxes = self._strokes(film), top_hat(film), self.read(film)
        mask, read = found.mask.copy(), np.zeros(film.shape, np.uint8)
        for box in boxes:
            filled = np.zeros(film.shape, np.uint8)
            cv2.fillPoly(filled, [np.round(box).astype(np.int32)], [1])
            inside, read = filled > 0, read | filled
            gaps = inside & ~(found.mask & inside).any(axis=0)
            if gaps.any(axis=0).sum() > 0.15 * inside.any(axis=0).sum():
                # It is read, so there is text, however faint: a threshold of its own where no stroke is yet.
                peak = np.percentile(hat[inside], 95)
                faint = inside & (hat >= max(0.35 * peak, 0.04 * grey_range(film)))
                mask |= (cv2.dilate(faint.astype(np.uint8), NEIGHBOURS) > 0) & gaps
        unread = [box for box in found.boxes if not read[tuple(box.mean(axis=0).astype(int)[::-1])]]
        return Found(boxes + unread, mask)

    def read(self, film: np.ndarray) -> list[np.ndarray]:
        """Boxes of a marker's height near the border of a grey film that are read as letters or digits."""
        scale, boxes = SIDE / max(film.shape), []
        large = cv2.resize(film, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        found: Any = self._finder(large, use_cls=False, use_rec=False)
        for corners in [] if found.boxes is None else np.float32(found.boxes) / scale:
            height = np.linalg.norm(corners[3] - corners[0])
            extent = np.array([[*corners.min(axis=0), *corners.max(axis=0)]])
            if height > 0.16 * max(film.shape) or from_border(extent, film.shape)[0] > BORDER:
                continue
            (x0, y0), (x1, y1) = extent[0, :2].clip(0).astype(int), np.ceil(extent[0, 2:]).astype(int)
            result: Any = self._reader(film[y0:y1, x0:x1], use_det=False, use_cls=False)
            word, score = (result.txts[0], float(result.scores[0])) if result.txts else ("", 0.0)
            letters = [c for c in word if c.isascii() and c.isalnum()]
            # Of single letters only the side's: a screw reads as 1.
            if score >= SCORE and (len(letters) > 1 or letters in (["L"], ["R"])):
                boxes.append(corners)
        return boxes
