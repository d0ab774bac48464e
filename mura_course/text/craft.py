"""Room text: the detector "keras-ocr", which is KL 1.2's, in a process of its own. Chapter 2.

keras-ocr needs Keras 2. TensorFlow gives that only where TF_USE_LEGACY_KERAS is set before it is loaded, and
then to all in that process; in this one, nobody else is. Writes nothing but keras-ocr's weights, where
keras-ocr keeps them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .. import weights
from ..errors import MuraError, TextError
from .boxes import Found, TextBox, grey, line_mask, require

# CRAFT's weights as keras-ocr 0.9.3 names them (keras_ocr/detection.py, PRETRAINED_WEIGHTS).
URL = "https://github.com/faustomorales/keras-ocr/releases/download/v0.8.4/craft_mlt_25k.h5"
SHA256 = "7283ce2ff05a0617e9740c316175ff3bacdd7215dbdf1a726890d5099431f899"
PACKAGES = ("keras-ocr", "tf-keras", "tensorflow")
GUARD = 'In a script, put the work below `if __name__ == "__main__":`.'
ENDED = f"A text detector's process has ended; it ran out of memory, or was killed. Call again. {GUARD}"


def weights_file() -> Path:
    """Where CRAFT's weights lie, or will: in ``KERAS_OCR_CACHE_DIR`` or ``~/.keras-ocr``."""
    folder = os.environ.get("KERAS_OCR_CACHE_DIR") or "~/.keras-ocr"
    return Path(folder).expanduser() / URL.rpartition("/")[2]


class KerasOCR:
    """The detector "keras-ocr": CRAFT as in KL 1.2, boxes filled whole and unfiltered.

    Its process starts here and ends when this object is dropped. A script that uses it needs the usual
    ``if __name__ == "__main__":`` around its work, as with all processes that Python spawns.

    Raises
    ------
    TextError
        keras-ocr is not installed, or cannot run.
    WeightsError
        Its weights are not there and cannot be downloaded.
    """

    name = "keras-ocr"

    def __init__(self) -> None:
        self.versions = require(*PACKAGES)
        self._weights = str(weights.retrieve(URL, weights_file(), SHA256))
        self._process = processes(1)
        self._ask(_load)

    def __call__(self, image: np.ndarray) -> Found:
        """Find text in `image`, uint8 (H, W) or (H, W, 3) RGB."""
        film = grey(image)
        boxes = [TextBox(corners, source=self.name) for corners in self._ask(_detect, film)]
        return Found(boxes, line_mask(boxes, film.shape))

    def _ask(self, function: Callable, *arguments: Any) -> Any:
        """`function(weights, *arguments)`, called in the detector's process."""
        try:
            return self._process.submit(function, self._weights, *arguments).result()
        except MuraError:
            raise
        except Exception as error:  # whatever a library raised there, or that the process died
            raise TextError(f"keras-ocr failed ({type(error).__name__}): {error} {GUARD}") from error


def _load(weights: str) -> None:
    _craft(weights)


def _detect(weights: str, film: np.ndarray) -> list[np.ndarray]:
    """Corners of the boxes in a grey film, each float32 (4, 2)."""
    # keras-ocr's pipeline doubles every image before it looks for text, up to 2,048 px.
    scale = min(2, 2048 / max(film.shape))
    large = cv2.resize(cv2.cvtColor(film, cv2.COLOR_GRAY2RGB), None, fx=scale, fy=scale)
    return [np.asarray(box, np.float32) / scale for box in _craft(weights).detect([large], verbose=0)[0]]


@cache
def _craft(weights: str) -> Any:
    """keras-ocr's network in this process, which must be one that has not loaded TensorFlow."""
    if "tensorflow" in sys.modules:
        raise TextError(f"keras-ocr's process has loaded TensorFlow already. {GUARD}")
    os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}  # tf.keras is then Keras 2
    if not hasattr(np, "sctypes"):  # gone in NumPy 2; imgaug, which keras-ocr imports, reads it
        sizes = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}
        known = {kind: [np.dtype(f"{kind}{bits}").type for bits in sizes[kind]] for kind in sizes}
        np.__dict__["sctypes"] = known
    keras_ocr = importlib.import_module("keras_ocr")

    # weights=None: the file has been verified; keras-ocr would look for it, and download it, again.
    detector = keras_ocr.detection.Detector(weights=None)
    if weights:  # a test has none
        detector.model.load_weights(weights)
    return detector


def processes(count: int) -> ProcessPoolExecutor:
    """Fresh Python processes, which end with the last reference to the pool, or when this one is killed."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent)


def _end_with_parent() -> None:
    """End this process when its parent is gone: the pool's own processes would wait for work for ever."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
