"""Removes text from films: finds it, repaints it, for one image or for a whole data set (chapter 2, KL 1.2).

`remove_text` takes an image and returns another. `clean_dataset`, the command `mura-course remove-text`,
reads one data folder and writes another, never the same; killed half-way it continues, and the folder is
whole or absent. `text_detection` decides what is text, `text_scores` measures how well it was removed.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import json
import os
import queue
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from . import __version__, data
from .errors import DataError, MuraError
from .text_detection import DETECTORS, Found, get_detector
from .text_worker import Worker, craft_weights

RECORD = data.TEXT_REMOVED  # in a cleaned folder: what was done to it
BOXES = "text_boxes.csv"  # and where
METHODS = {"ns": cv2.INPAINT_NS, "telea": cv2.INPAINT_TELEA}


class TextRemovalError(MuraError, ValueError):
    """A folder that cannot be cleaned, or not into that place; the message says what to do."""


# --- One image ----------------------------------------------------------------------------------------


def remove_text(image: np.ndarray, detector) -> tuple[np.ndarray, Found]:
    """`image` without what `detector` found in it, and what that was.

    image: uint8 (H, W) or (H, W, 3) RGB. detector: as `text_detection.get_detector` returns it.
    """
    found = detector(image)
    return inpaint(image, found.mask), found


def inpaint(image: np.ndarray, mask: np.ndarray, radius: float = 7, method: str = "ns") -> np.ndarray:
    """`image` with the pixels of `mask` filled in from around them; a copy, all other pixels untouched.

    image: uint8 or uint16, (H, W) or (H, W, channels); a fourth channel, transparency, stays. mask: bool
    (H, W). radius: of the pixels that each one is made from. method: "ns" (Navier-Stokes, KL's) or "telea".
    Once for all boxes: the recipe's own loop, a call for each box, does the same work over and over.
    """
    image, mask = image.copy(), mask.astype(np.uint8)
    if not mask.any():
        return image
    # Only around the mask: OpenCV's time grows with the image, too.
    x, y, width, height = cv2.boundingRect(mask)
    margin = int(radius) + 2
    window = np.s_[max(0, y - margin) : y + height + margin, max(0, x - margin) : x + width + margin]
    planes = image[window] if image.ndim == 3 else image[window][..., None]  # a view: written through
    before = [np.ascontiguousarray(planes[..., c]) for c in range(min(3, planes.shape[2]))]
    for c, plane in enumerate(before):
        if c and np.array_equal(plane, before[0]):  # grey stored as RGB stays exactly grey, and costs once
            planes[..., c] = planes[..., 0]
        else:
            planes[..., c] = cv2.inpaint(plane, mask[window], radius, METHODS[method])
    return image


def clean_file(detector, source: Path, target: Path) -> dict:
    """Write `source` without text to `target`, in the same mode; byte for byte the same where none is found.

    Returns {"bytes", "sha256", "pixels" (repainted), "boxes"}, or {"unreadable": reason}.
    """
    encoded = source.read_bytes()
    film = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED) if encoded else None
    if film is None or film.dtype not in (np.uint8, np.uint16):
        return {"unreadable": "no image, or cut short" if encoded else "empty file"}
    shown = film if film.dtype == np.uint8 else (film >> 8).astype(np.uint8)
    found = detector(shown if film.ndim == 2 else shown[..., 2::-1] if film.shape[2] >= 3 else shown[..., 0])
    if found.mask.any():
        encoded = cv2.imencode(".png", inpaint(film, found.mask))[1].tobytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, encoded)
    return {
        "bytes": len(encoded),
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "pixels": int(found.mask.sum()),
        "boxes": [[b.corners.round(1).ravel().tolist(), b.text, b.score, b.source] for b in found.boxes],
    }


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".writing")
    beside.write_bytes(content)
    os.replace(beside, path)


# --- A data set ---------------------------------------------------------------------------------------


def clean_dataset(
    source: str | Path,
    target: str | Path,
    detector: str = "rapidocr",
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Write the data in `source` (see `data.find_root`) to the new folder `target`, without text; the record.

    `data.load_index(target)` then works as it did. The data folder's other files are copied, but for a
    manifest's checksums, which are made anew; `RECORD` and `BOXES` are added. Until all is done there is
    `<target>.partial`, which a next call continues. workers: processes, by default two, or one for keras-ocr.

    Raises TextRemovalError: `target` in, above or equal to `source`, or holding something else; a `.partial`
    of another order; no room. DataError: images that cannot be read, listed after all others are done. And
    what `data.load_index` and `get_detector` raise.
    """
    if detector not in DETECTORS:
        get_detector(detector)  # raises, with the names that there are
    index = data.load_index(source, quiet=True)
    root, target = Path(index.attrs["root"]), Path(os.path.abspath(Path(target).expanduser()))
    _check_places(root, target)
    order = {"source": index.attrs["name"], "fingerprint": data.fingerprint(index), "detector": detector}
    order |= {"mura_course": __version__, "program": _program()}
    if target.exists():
        return _finished(target, order)
    partial = target.with_name(target.name + ".partial")
    with _held(partial, order), contextlib.ExitStack() as crew_ends:
        began, notes = time.perf_counter(), _notes(partial)
        todo = [path for path in index["path"] if path not in notes]
        weights = str(craft_weights()) if detector == "keras-ocr" else ""
        count = min(workers or (1 if weights else 2), max(1, len(todo)))
        crew = []
        for _ in range(count):
            crew.append(Worker(detector, weights, threads=1 if count > 1 else 0))
            crew_ends.callback(crew[-1].close)
        bar = tqdm(total=len(index), desc="Removing text", unit="film", disable=not progress)
        fresh = _clean_all(root, partial, todo, crew, bar)
        notes = {path: (notes | fresh)[path] for path in index["path"]}
        record = order | {"versions": crew[0].versions} | _counts(notes)
        record |= {"seconds": round(time.perf_counter() - began, 1), "films_in_these_seconds": len(fresh)}
        _complete(root, partial, notes, record)
    (partial / "lock").unlink(missing_ok=True)
    os.replace(partial, target)
    return record


def _check_places(root: Path, target: Path) -> None:
    inside, outside = Path(os.path.realpath(target)), Path(os.path.realpath(root))
    if inside == outside or inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise TextRemovalError(
            f"{target} and the data in {root} lie one in the other: the films there must stay as they are. "
            "Name a new folder elsewhere."
        )


def _program() -> str:
    """Hash of what decides the result: a half-cleaned folder is not continued by another version."""
    names = ("text_detection.py", "text_worker.py", "text_removal.py")
    return hashlib.sha256(b"".join(Path(__file__).with_name(n).read_bytes() for n in names)).hexdigest()[:12]


def _finished(target: Path, order: dict) -> dict:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        if all(record.get(key) == value for key, value in order.items()):
            return record
    raise TextRemovalError(
        f"{target} exists already, and not from this order. Name another folder, or delete it."
    )


@contextlib.contextmanager
def _held(partial: Path, order: dict) -> Iterator[None]:
    """The folder `partial` with its order in it, locked; the disk's errors named."""
    note = partial / "order.json"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / "lock", timeout=0):
            if any(p.name != "lock" for p in partial.iterdir()) and (
                not note.exists() or json.loads(note.read_text(encoding="utf-8")) != order
            ):
                raise TextRemovalError(
                    f"{partial} was left by another order (data, detector or version). Delete it first."
                )
            _write(note, json.dumps(order).encode())
            yield
    except Timeout:
        raise TextRemovalError(f"Another process is writing to {partial}. Wait for it.") from None
    except OSError as error:
        if isinstance(error, MuraError):
            raise
        raise TextRemovalError(
            f"Cannot write {partial} ({error.strerror or error}). Make room or allow writing there and call "
            "again: it continues."
        ) from error


def _notes(partial: Path) -> dict[str, dict]:
    """What earlier, killed calls did: {path: note}. A kill may have cut the last line short."""
    notes = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (partial / "done.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                path, note = json.loads(line)
                file = partial / path
                if file.is_file() and file.stat().st_size == note["bytes"]:
                    notes[path] = note
    return notes


def _clean_all(root: Path, partial: Path, paths: list[str], crew: list[Worker], bar: tqdm) -> dict:
    """Clean the films at `paths` with all workers, noting each; DataError at the end lists the unreadable."""
    idle: queue.SimpleQueue = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def clean(path: str) -> dict:
        worker = idle.get()
        try:
            return worker(clean_file, root / path, partial / path)
        finally:
            idle.put(worker)

    notes, unreadable = {}, []
    bar.update(bar.total - len(paths))
    with (
        bar,
        ThreadPoolExecutor(len(crew)) as pool,
        open(partial / "done.jsonl", "a", encoding="utf-8") as log,
    ):
        if log.tell():
            log.write("\n")  # ends a line that a kill cut short
        futures = {pool.submit(clean, path): path for path in paths}
        try:
            for future in as_completed(futures):
                path, note = futures[future], future.result()
                bar.update()
                if "unreadable" in note:
                    unreadable.append(f"\n  {root / path}: {note['unreadable']}")
                    continue
                notes[path] = note
                log.write(json.dumps([path, note]) + "\n")
                log.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    if unreadable:
        more = f"\n  and {len(unreadable) - 5:,} more" if len(unreadable) > 5 else ""
        raise DataError(
            f"{len(unreadable):,} images cannot be read. Restore them from the archive and call again; the "
            f"others are done.{''.join(sorted(unreadable)[:5])}{more}"
        )
    return notes


def _counts(notes: dict[str, dict]) -> dict[str, int]:
    return {
        "films": len(notes),
        "films_with_text": sum(note["pixels"] > 0 for note in notes.values()),
        "boxes": sum(len(note["boxes"]) for note in notes.values()),
        "pixels_repainted": sum(note["pixels"] for note in notes.values()),
    }


def _complete(root: Path, partial: Path, notes: dict[str, dict], record: dict) -> None:
    """All that lies beside the films; then the scaffold goes."""
    for file in root.iterdir():
        if file.is_file() and file.name not in (RECORD, BOXES):
            shutil.copyfile(file, partial / file.name)
    if (partial / "manifest.csv").exists():
        sums = [{"path": path, "bytes": n["bytes"], "sha256": n["sha256"]} for path, n in notes.items()]
        pd.DataFrame(sums).to_csv(partial / "manifest.csv", index=False)
    with open(partial / BOXES, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "x0", "y0", "x1", "y1", "x2", "y2", "x3", "y3", "text", "score", "source"])
        for path, note in notes.items():
            table.writerows([path, *corners, *rest] for corners, *rest in note["boxes"])
    finished = {"finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    _write(partial / RECORD, json.dumps(record | finished, indent=1).encode())
    for scaffold in ("order.json", "done.jsonl"):
        (partial / scaffold).unlink()
