"""Room text: removes text from one film or from a whole data set; on top of all detectors. Chapter 2, KL 1.2.

`remove_text` takes an image and returns another. `clean_dataset`, the command ``mura-course remove-text``,
reads one data folder and writes another, never the same. `scores` measures how well text was removed.
"""

from __future__ import annotations

import csv
import datetime
import shutil
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from .. import __version__, data, disk
from ..errors import DataError, TextError, one_of
from ..paths import absolute
from . import craft
from .boxes import Detector, Found
from .rapid import RapidOCR
from .strokes import Strokes

DETECTORS = ("keras-ocr", "rapidocr", "strokes")
RECORD = "removed_text.json"  # in a cleaned folder: what was done to it (`data` reads it)
BOXES = "text_boxes.csv"  # and where, a row a box
COLUMNS = ["path", "x0", "y0", "x1", "y1", "x2", "y2", "x3", "y3", "text", "score", "source"]
NOT_COPIED = {RECORD, BOXES, "manifest.csv"}  # the last: checksums of the films as they were


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
        No such detector, or not installed.
    WeightsError
        keras-ocr's weights are missing and cannot be downloaded.
    """
    one_of("A text detector", name, DETECTORS, TextError)
    if name == "keras-ocr":
        return craft.KerasOCR()
    return RapidOCR(threads) if name == "rapidocr" else Strokes()


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
    image = image.copy()
    if mask.any():  # only around the mask: OpenCV's time grows with the image, too
        holes, margin = mask.astype(np.uint8), radius + 2
        x, y, width, height = cv2.boundingRect(holes)
        window = np.s_[max(0, y - margin) : y + height + margin, max(0, x - margin) : x + width + margin]
        image[window] = cv2.inpaint(image[window], holes[window], radius, cv2.INPAINT_NS)
    return image


def clean_dataset(
    source: str | Path,
    target: str | Path,
    detector: str = "rapidocr",
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Copy a data set into a new folder, without the text in its films.

    Parameters
    ----------
    source, target : path
        The data (see `data.find_root`), and a folder that does not exist yet, elsewhere.
    detector : str
        A name that `get_detector` takes.
    workers : int, optional
        Processes; by default two, or one for keras-ocr.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        What `RECORD` holds: source, fingerprint, detector, versions, films, films_with_text, boxes, ...

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
    one_of("A text detector", detector, DETECTORS, TextError)
    index = data.load_index(source, quiet=True)
    root, target = Path(index.attrs["root"]), absolute(target)
    _check_places(root, target)
    work, paths = target.with_name(f"{target.name}.partial"), index["path"].tolist()
    pool = craft.processes(workers or (1 if detector == "keras-ocr" else 2))
    try:
        order = {"source": index.attrs["name"], "fingerprint": data.fingerprint(index)}
        order |= {"pixels": data.pixel_key(index), "detector": detector}
        order |= {"versions": pool.submit(_versions, detector).result(), "mura_course": __version__}
        with disk.named(target, ""), disk.lock(target, ""):
            _claim(target, work, order)
            todo = _resume(work, paths)
            results = pool.map(partial(_clean_film, detector, root), todo)
            bar = tqdm(results, "Removing text", len(todo), unit="film", disable=not progress)
            _write_films(work, zip(todo, bar, strict=True))
            record = order | {"films": len(paths)} | _complete(root, work)
            disk.write_json(work / RECORD, record, "")
            work.replace(target)
            target.with_name(f"{target.name}.lock").unlink(missing_ok=True)  # who waits for it finds `target`
    except BrokenProcessPool as error:
        raise TextError(craft.ENDED) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return record


def _check_places(root: Path, target: Path) -> None:
    inside, outside = target.resolve(), root.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise TextError(
            f"{target} and the data in {root} lie one in the other: the films there must stay as they are. "
            "Name a new folder elsewhere."
        )


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


def _resume(work: Path, paths: list[str]) -> list[str]:
    """List the films that are not yet written, and leave only boxes of the others in the table."""
    done, rows = {path for path in paths if (work / path).is_file()}, []
    if (work / BOXES).exists():
        with (work / BOXES).open(encoding="utf-8", errors="replace", newline="") as table:
            rows = [row for row in csv.reader(table) if row and row[0] in done]
    with disk.atomic(work / BOXES, "") as beside, beside.open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([COLUMNS, *rows])
    return [path for path in paths if path not in done]


def _write_films(work: Path, results: Iterable[tuple[str, tuple[bytes, list[list]]]]) -> None:
    """Write each film after its boxes: the table may hold boxes of a film too many, never too few."""
    with (work / BOXES).open("a", encoding="utf-8", newline="") as table:
        for path, (encoded, boxes) in results:
            csv.writer(table).writerows([path, *box] for box in boxes)
            table.flush()
            with disk.atomic(work / path, "") as beside:
                beside.write_bytes(encoded)


def _complete(root: Path, work: Path) -> dict[str, Any]:
    """Copy what lies beside the films; return what the record says about the work done."""
    for file in root.iterdir():
        if file.is_file() and file.name not in NOT_COPIED:
            shutil.copyfile(file, work / file.name)
    for scrap in work.rglob(".*.part"):  # of a write that was killed
        disk.remove(scrap)
    with (work / BOXES).open(encoding="utf-8", newline="") as table:
        marked = [row[0] for row in csv.reader(table)][1:]
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"films_with_text": len(set(marked)), "boxes": len(marked), "finished": finished}


# --- In the pool's processes --------------------------------------------------------------------------


@cache
def _one_thread(name: str) -> Detector:
    cv2.setNumThreads(1)  # its neighbours use the other cores
    return get_detector(name, threads=1)


def _versions(name: str) -> dict[str, str]:
    return _one_thread(name).versions


def _clean_film(name: str, root: Path, path: str) -> tuple[bytes, list[list]]:
    """Make the file of a film without text, and what `BOXES` says about it."""
    film, reason = None, "no image, or cut short"
    try:
        encoded = disk.read_bytes(root / path)
        film = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_ANYCOLOR)
    except OSError as error:
        reason = error.strerror or str(error)
    except cv2.error as error:  # an empty file, or more pixels than OpenCV takes
        reason = error.err
    if film is None:
        raise DataError(
            f"{root / path} cannot be read ({reason}). Restore it from the archive and call again: it goes "
            f"on. To see all such films first: mura-course check {root}"
        )
    found = _one_thread(name)(film if film.ndim == 2 else cv2.cvtColor(film, cv2.COLOR_BGR2RGB))
    if found.mask.any():
        encoded = cv2.imencode(".png", inpaint(film, found.mask))[1].tobytes()
    return encoded, [[*b.corners.round(1).ravel().tolist(), b.text, b.score, b.source] for b in found.boxes]
