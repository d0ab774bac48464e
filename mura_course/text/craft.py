"""Room text: the detector "keras-ocr", which is KL 1.2's, in a process of its own. Chapter 2.

keras-ocr needs Keras 2. TensorFlow gives that only where TF_USE_LEGACY_KERAS is set before it is loaded, and
then to all in that process; in this one, nobody else is. Writes nothing but keras-ocr's weights, where
keras-ocr keeps them.
"""

import importlib
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np

from .. import weights
from ..errors import TextError
from .boxes import Found, grey, line_mask

GUARD = 'In a script, load no TensorFlow outside `if __name__ == "__main__":`, and call this inside it.'


class KerasOCR:
    """The detector "keras-ocr": CRAFT as in KL 1.2, boxes filled whole and unfiltered.

    Its process starts here and ends when this object is dropped. A script that uses it needs the usual
    ``if __name__ == "__main__":`` around its work, as with all processes that Python spawns.

    Raises
    ------
    importlib.metadata.PackageNotFoundError
        keras-ocr or what it needs is not installed.
    TextError
        keras-ocr cannot run.
    WeightsError
        Its weights are not there and cannot be downloaded.
    """

    name = "keras-ocr"

    def __init__(self) -> None:
        self.versions = {package: version(package) for package in ("keras-ocr", "tf-keras", "tensorflow")}
        self._weights = str(weights.file("CRAFT"))
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
        self(np.zeros((32, 32), np.uint8))  # loads the network, or says now why it does not run

    def __call__(self, image: np.ndarray) -> Found:
        """Find text in `image`, uint8 (H, W) or (H, W, 3) RGB."""
        film = grey(image)
        try:
            boxes = self._process.submit(_detect, self._weights, film).result()
        except Exception as error:  # whatever a library raised there, or that the process died
            raise TextError(f"keras-ocr failed ({type(error).__name__}): {error} {GUARD}") from error
        return Found(boxes, line_mask(boxes, film.shape))


# --- In the detector's process ------------------------------------------------------------------------


def _end_with_parent() -> None:
    """End this process when its parent is killed: it would wait for work for ever."""
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def _detect(weights: str, film: np.ndarray) -> list[np.ndarray]:
    """Corners of the boxes in a grey film, each float32 (4, 2)."""
    # keras-ocr's pipeline doubles every image before it looks for text, up to 2,048 px.
    scale = min(2, 2048 / max(film.shape))
    large = cv2.resize(cv2.cvtColor(film, cv2.COLOR_GRAY2RGB), None, fx=scale, fy=scale)
    return [np.asarray(box, np.float32) / scale for box in _craft(weights).detect([large], verbose=0)[0]]


@cache
def _craft(weights: str) -> Any:
    """keras-ocr's network, in a process that has not loaded TensorFlow."""
    if "tensorflow" in sys.modules:  # perhaps with Keras 3, which keras-ocr would take without a word
        raise ImportError("TensorFlow is loaded already.")
    os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}  # tf.keras is then Keras 2
    # Gone in NumPy 2; imgaug, which keras-ocr imports, reads it, and this detector does not use.
    np.__dict__["sctypes"] = {"int": [], "uint": [], "float": []}
    # weights=None: the file has been verified; keras-ocr would look for it, and download it, again.
    detector = importlib.import_module("keras_ocr").detection.Detector(weights=None)
    if weights:  # a test has none
        detector.model.load_weights(weights)
    return detector
