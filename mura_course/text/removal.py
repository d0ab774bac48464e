"""Room text: removes text from one film or from a whole data set; on top of all detectors. Chapter 2, KL 1.2.

`remove_text` takes an image and returns another. `clean_dataset`, the command ``mura-course remove-text``,
reads one data folder and writes another, never the same.
"""

import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from .. import data, disk
from ..data.store import ahead, decode
from ..errors import TextError, one_of
from ..paths import absolute, cores
from .boxes import Detector, Found
from .craft import KerasOCR
from .rapid import RapidOCR
from .strokes import Strokes

DETECTORS = ("keras-ocr", "rapidocr", "strokes")
RECORD = "removed_text.json"  # in a cleaned folder: what was done to it (`data` reads it)
NOT_COPIED = {RECORD, "manifest.csv"}  # the last: checksums of the films as they were


def get_detector(name: str, threads: int = 0) -> Detector:
    """Make one of the detectors of burned-in text.

    Parameters
    ----------
    name : {"strokes", "rapidocr", "keras-ocr"}
        "strokes": no network, milliseconds a film (`strokes.Strokes`). "rapidocr": the same, and what
        RapidOCR's networks find and read; works offline. "keras-ocr": CRAFT as in KL 1.2.
    threads : int
        Of RapidOCR's networks; 0 for all cores.

    Returns
    -------
    Detector
        Called with a uint8 image, (H, W) or (H, W, 3) RGB, it returns `Found`; it has `name` and `versions`.

    Raises
    ------
    TextError
        No such detector, not installed, or it cannot run.
    WeightsError
        keras-ocr's weights are missing and cannot be downloaded.
    """
    one_of("A text detector", name, DETECTORS, TextError)
    try:
        if name == "keras-ocr":
            return KerasOCR()
        return RapidOCR(threads) if name == "rapidocr" else Strokes()
    except PackageNotFoundError as error:
        raise TextError(f"{name} needs {error.name}, which is missing: pip install {error.name}") from error


def remove_text(image: np.ndarray, detector: Detector) -> tuple[np.ndarray, Found]:
    """Return a copy of `image` without what `detector` found in it, and what that was.

    Parameters
    ----------
    image : ndarray
        uint8 (H, W), or (H, W, 3) RGB.
    detector : Detector
        From `get_detector`.
    """
    found = detector(image)
    return inpaint(image, found.mask), found


def inpaint(image: np.ndarray, mask: np.ndarray, radius: int = 7) -> np.ndarray:
    """Fill in the pixels of `mask` from around them, by Navier-Stokes, as in KL 1.2; returns a copy.

    Parameters
    ----------
    image : ndarray
        uint8, (H, W) or (H, W, 3).
    mask : ndarray
        bool (H, W), all boxes at once: a call for each box would do the same work over and over.
    radius : int
        In pixels, of the surroundings that each pixel is made from.
    """
    return cv2.inpaint(image, mask.astype(np.uint8), radius, cv2.INPAINT_NS)


def clean_dataset(source: str | Path, target: str | Path, detector: str = "rapidocr") -> dict[str, Any]:
    """Copy a data set into a new folder, without the text in its films.

    Parameters
    ----------
    source, target : path
        The data (see `data.index.find_root`), and a folder that does not exist yet, elsewhere.
    detector : str
        A name that `get_detector` takes.

    Returns
    -------
    dict
        What `RECORD` holds: source, fingerprint, detector, versions, films, films_with_text, ...

    Raises
    ------
    TextError
        `target` exists, or lies in or above `source`; the remains of a call on other films or with another
        detector are in the way.
    DataError
        A film that cannot be read.
    DiskError
        No room or no permission.

    Notes
    -----
    The new folder is whole or absent: until all is done there is ``<target>.partial``, and a call that was
    killed, called again, goes on with the films not yet written. A film without text is copied byte for byte;
    one with text becomes an 8-bit PNG. The data folder's other files are copied, without `NOT_COPIED`.
    """
    one = get_detector(detector, threads=1)
    index = data.load_index(source, quiet=True)
    root, target = Path(index.attrs["root"]), absolute(target)
    inside, outside = target.resolve(), root.resolve()  # also by way of a link
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise TextError(f"{target} and the data in {root} lie one in the other. Name a folder elsewhere.")
    order = {"source": index.attrs["name"], "fingerprint": data.fingerprint(index)}
    order |= {"pixels": data.pixel_key(index), "detector": detector, "versions": one.versions}
    work, names = target.with_name(f"{target.name}.partial"), index["path"].tolist()
    with disk.named(target, ""), disk.lock(target, ""):
        _claim(target, work, order)
        films = ahead(lambda i: _clean_film(one, root, work, names[i]), len(names), cores())
        with_text = sum(tqdm(films, "Removing text", len(names), unit="film"))
        for file in root.iterdir():
            if file.is_file() and file.name not in NOT_COPIED:
                shutil.copyfile(file, work / file.name)
        for scrap in work.rglob(".*.part"):  # of a write that was killed
            disk.remove(scrap)
        record = order | {"films": len(names), "films_with_text": with_text}
        disk.write_json(work / RECORD, record, "")
        work.replace(target)
        disk.remove(target.with_name(f"{target.name}.lock"))  # who waits for it finds `target`
    return record


def _claim(target: Path, work: Path, order: dict[str, Any]) -> None:
    """Make the working folder, with the order in it; TextError where something else is there."""
    if target.exists():
        raise TextError(f"{target} exists already. Name another folder, or delete it.")
    if not any(disk.workdir(work, "").iterdir()):
        disk.write_json(work / RECORD, order, "")
    remedy = f"Delete or move {work}, or name another folder."
    noted = disk.read_json(work / RECORD, remedy)
    if any(noted.get(key) != value for key, value in order.items()):
        raise TextError(f"{work} was left by a call on other films, or with another detector. {remedy}")


def _clean_film(one: Detector, root: Path, work: Path, path: str) -> bool:
    """Write a film without its text, unless an earlier call has; returns whether it had any."""
    film = decode(root / path, cv2.IMREAD_ANYCOLOR)
    if not (work / path).exists():
        found = one(film if film.ndim == 2 else cv2.cvtColor(film, cv2.COLOR_BGR2RGB))
        clean = cv2.imencode(".png", inpaint(film, found.mask))[1].tobytes() if found.mask.any() else None
        with disk.atomic(work / path, "") as beside:
            beside.write_bytes(clean or (root / path).read_bytes())
    return (work / path).read_bytes() != (root / path).read_bytes()
