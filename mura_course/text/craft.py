"""A text detector in a process of its own, and all that keras-ocr needs today (chapter 2).

`Worker` starts `python -m mura_course.text_worker` and hands it work. keras-ocr always runs so: it needs
Keras 2, which TensorFlow gives only where TF_USE_LEGACY_KERAS is set before it is loaded, and then to all in
that process; there, nobody else is. Writes nothing but keras-ocr's weights, in its own folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from .errors import MuraError
from .text_detection import Found, TextBox, TextDetectionError, get_detector, grey, line_mask, require

# CRAFT's weights as keras-ocr 0.9.3 names them (keras_ocr/detection.py, PRETRAINED_WEIGHTS).
WEIGHTS_URL = "https://github.com/faustomorales/keras-ocr/releases/download/v0.8.4/craft_mlt_25k.h5"
WEIGHTS_SHA256 = "7283ce2ff05a0617e9740c316175ff3bacdd7215dbdf1a726890d5099431f899"


class WeightsError(MuraError, OSError):
    """keras-ocr's weights are not there and cannot be had, or are not the right ones."""


# --- keras-ocr ----------------------------------------------------------------------------------------


def craft_weights(
    url: str = WEIGHTS_URL,
    sha256: str = WEIGHTS_SHA256,
    folder: str | Path | None = None,
    timeout: float = 30,
    download: bool = True,
) -> Path:
    """The file of CRAFT's weights in `folder`, downloaded where it is missing, and verified in any case.

    folder: by default keras-ocr's own, KERAS_OCR_CACHE_DIR or ~/.keras-ocr. timeout: seconds without a byte.
    download: False takes only a file that is there.
    Raises WeightsError, naming file, URL, checksum and folder: no connection, or a wrong checksum.
    """
    folder = Path(folder or os.environ.get("KERAS_OCR_CACHE_DIR") or "~/.keras-ocr").expanduser()
    file = folder / url.rpartition("/")[2]
    byhand = f"Download {url} (SHA-256 {sha256}) by other means and place it in {folder} as {file.name}."
    if not file.is_file() and not download:
        raise WeightsError(f"keras-ocr's weights are not in {folder}. {byhand}")
    if not file.is_file():
        print(f"Downloading {url} to {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Beside, then renamed: half a file is never taken for a whole one.
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                arrived = Path(beside, file.name)
                with urllib.request.urlopen(url, timeout=timeout) as source, open(arrived, "wb") as copy:
                    while block := source.read(1 << 20):
                        copy.write(block)
                _verify(arrived, sha256, f"What {url} sent", byhand)
                arrived.replace(file)
        except WeightsError:
            raise
        except (OSError, http.client.HTTPException) as error:  # no connection, no page, no folder, no sense
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise WeightsError(f"keras-ocr's weights cannot be downloaded ({reason}). {byhand}") from error
    _verify(file, sha256, f"{file}, keras-ocr's weights,", f"Delete it. {byhand}")
    return file


def _verify(file: Path, sha256: str, what: str, remedy: str) -> None:
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise WeightsError(f"{what} has {file.stat().st_size:,} bytes and the checksum {found}. {remedy}")


class KerasOCR:
    """The detector "keras-ocr", for whoever asks here; the work is done in a `Worker`.

    Arguments and errors as `craft_weights`, and TextDetectionError where keras-ocr is not installed.
    """

    name = "keras-ocr"

    def __init__(self, **weights) -> None:
        for package in ("keras-ocr", "tf-keras", "tensorflow"):
            require(package)
        self._worker = Worker(self.name, str(craft_weights(**weights)))
        self.versions = self._worker.versions

    def __call__(self, image: np.ndarray) -> Found:
        return self._worker(_detect, image)


def _detect(detector, image: np.ndarray) -> Found:
    return detector(image)


class _Craft:
    """keras-ocr's text detector in this process, which must be one that has not loaded TensorFlow.

    weights: a file; "" leaves the network untrained, for tests.
    """

    name = "keras-ocr"
    scale = 2  # keras-ocr's pipeline doubles every image before it looks for text, up to 2,048 px

    def __init__(self, weights: str) -> None:
        if "tensorflow" in sys.modules:
            raise TextDetectionError("keras-ocr must come before TensorFlow: get_detector('keras-ocr').")
        os.environ["TF_USE_LEGACY_KERAS"] = "1"  # tf.keras is then tf-keras, which is Keras 2
        if not hasattr(np, "sctypes"):  # gone in NumPy 2; imgaug, which keras-ocr imports, reads it
            np.sctypes = {
                "int": [np.int8, np.int16, np.int32, np.int64],
                "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
                "float": [np.float16, np.float32, np.float64],
                "complex": [np.complex64, np.complex128],
                "others": [bool, object, bytes, str, np.void],
            }
        import keras_ocr

        self.versions = {name: require(name) for name in ("keras-ocr", "tf-keras", "tensorflow")}
        # weights=None: the file has been verified; keras-ocr would look for it, and download it, again.
        self._detector = keras_ocr.detection.Detector(weights=None)
        if weights:
            self._detector.model.load_weights(weights)

    def __call__(self, image: np.ndarray) -> Found:
        film = cv2.cvtColor(grey(image), cv2.COLOR_GRAY2RGB)
        scale = min(self.scale, 2048 / max(film.shape))
        large = cv2.resize(film, None, fx=scale, fy=scale)
        corners = self._detector.detect([large], verbose=0)[0]
        boxes = [TextBox(np.float32(box) / scale, source=self.name) for box in corners]
        return Found(boxes, line_mask(boxes, film.shape[:2]))


# --- A process of its own -----------------------------------------------------------------------------


class Worker:
    """A process that holds one detector. It ends when this object is dropped or its process is killed.

    name: as `get_detector`. weights: keras-ocr's file. threads: of its network, 0 for all cores. Has the
    detector's `versions`. Raises what the detector raises at its start, TextDetectionError where it dies.
    """

    def __init__(self, name: str, weights: str = "", threads: int = 0) -> None:
        self._log = tempfile.TemporaryFile()  # of all that libraries say, for the error where they die
        places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        if threads:
            numbers = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
            environment |= dict.fromkeys(numbers, str(threads))
        command = [sys.executable, "-P", "-m", __name__, name, weights, str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self.versions = self._answer()

    def __call__(self, function: Callable, *arguments):
        """`function(detector, *arguments)`, called there; the function must be a module's own, for pickle."""
        try:
            pickle.dump((function, arguments), self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; the answer says so
        return self._answer()

    def _answer(self):
        try:
            well, value = pickle.load(self._process.stdout)
        except EOFError:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip()[-2000:]
            raise TextDetectionError(
                f"The detector's process ended (exit code {self._process.returncode}). It said last:\n{said}"
            ) from None
        if not well:
            raise value
        return value

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has died before it read all
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def __del__(self) -> None:
        if hasattr(self, "_process") and not self._process.stdout.closed:
            self.close()


def _serve(name: str, weights: str, threads: str) -> None:
    """The worker's side: answers calls until the other side closes the pipe, as it also does when killed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    cv2.setNumThreads(int(threads) or -1)

    def answer(well: bool, value) -> None:
        pickle.dump((well, value), answers)
        answers.flush()

    def attempt(function: Callable, *arguments) -> None:
        try:
            answer(True, function(*arguments))
        except (MuraError, OSError) as error:
            answer(False, error)
        except Exception:  # whatever a library raises: told to the process that asked, not lost in this one
            answer(False, TextDetectionError(f"The detector failed:\n{traceback.format_exc()}"))

    made = []

    def start() -> dict[str, str]:
        made.append(_Craft(weights) if name == _Craft.name else get_detector(name, int(threads)))
        return made[0].versions

    attempt(start)
    while made:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        attempt(function, made[0], *arguments)


if __name__ == "__main__":
    from mura_course import text_worker  # not this module's twin __main__, or classes would not be the same

    text_worker._serve(*sys.argv[1:])
