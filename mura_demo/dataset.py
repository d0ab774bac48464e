"""Writes a demo data set in MURA's folder layout: many workers, one result, whole or absent.

The films are written into a folder inside `MURA-demo.partial`, which takes its place once everything stands,
so a killed call goes on where it was. Only this module and the cache of bone clouds touch the disk. Explained
in the appendix `a_demo_radiographs`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from threadpoolctl import threadpool_limits
from tqdm import tqdm  # not tqdm.auto: it warns, in every chapter, where ipywidgets are missing

from .anatomy import PARTS, clouds
from .film import Film
from .recipe import RECIPE
from .studies import Study, film_study, plan

BYTES_PER_PIXEL = 1.2  # of a finished film, measured generously; for the check of free space
FILMS_PER_STUDY = 2.75
# What an order may ask for. Every body part and label needs 60 studies; MURA itself has 14,656. Bones are
# points some 0.6 mm apart, which shows in larger films.
LIMITS = {"studies": (60, 100_000), "seed": (0, 2**32 - 1), "long_side": (32, 2048), "workers": (1, 256)}
ORDER = ("studies", "seed", "long_side", "text", "recipe")  # what fixes every pixel
REMEDY = "Make room or allow writing there, or choose another folder (--out, or the variable MURA_CACHE)."
README = """\
MURA-demo: synthetic radiographs
================================
These images are NOT radiographs of people. They were rendered by the package `mura_course` from bone meshes,
in the folder layout of Stanford's MURA v1.1, so that the course runs where MURA is not at hand. Findings are
drawn, not diagnosed; nothing learned from them holds for patients. Not for clinical use.

Bones: MyoSim (Apache-2.0; Caggiano et al. 2022), whose arm derives from OpenSim bone geometry, the MoBL-ARMS
model (Holzbaur et al. 2005, Saul et al. 2015) and the 2nd-Hand model (McFarland et al. 2019). A related
package's notice says that MoBL-ARMS carries a non-commercial restriction upstream: ask its authors before
any commercial use.

truth.csv     what is in each film: finding, severity (0 subtle, 1 plain), its box in pixels where half of it
              or more can be seen, view, side, and the boxes of burned-in text
manifest.csv  size and SHA-256 of every film
manifest.json how the data were made
"""


def ensure_demo(cache: Path, studies: int, seed: int = 0, long_side: int = 320) -> Path:
    """Find the demo data in the cache, or render them there on first use, with a progress bar.

    Parameters
    ----------
    cache : Path
        The course's cache folder; the data lie in ``demo/`` below it, the bones' clouds in ``bones/``.
    studies, seed, long_side : int
        As `write_demo` takes them.

    Returns
    -------
    Path
        The folder ``MURA-demo``.

    Raises
    ------
    ValueError, OSError
        As `write_demo` raises them.
    """
    cache = Path(cache)
    out = cache / "demo" / f"{studies}-studies-{long_side}px-seed{seed}-recipe{RECIPE}"
    return write_demo(out, studies, seed, long_side, cache=cache)


def write_demo(
    out: Path,
    studies: int,
    seed: int = 0,
    long_side: int = 320,
    text: bool = True,
    workers: int | None = None,
    cache: Path | None = None,
) -> Path:
    """Render a demo data set, or return at once where it already exists.

    Parameters
    ----------
    out : Path
        The folder to put ``MURA-demo`` into. It is made if need be.
    studies : int
        Train and test together, 60 to 100,000.
    seed : int
        Another seed, other patients.
    long_side : int
        Longest side of the largest films in pixels, 32 to 2048.
    text : bool
        False makes the same films without burned-in text.
    workers : int, optional
        Processes; by default one a core. The films do not depend on it.
    cache : Path, optional
        Bones' clouds are kept in ``bones/`` below it; by default they are made for this call alone.

    Returns
    -------
    Path
        The folder ``MURA-demo``: MURA's four CSV files, the films, ``truth.csv``, ``manifest.json``,
        ``manifest.csv`` and ``README.txt``.

    Raises
    ------
    ValueError
        A number out of its range; the message names the range.
    OSError
        `out` holds other data, cannot be written or has too little room; the message names it and a remedy.
    """
    workers = _number("workers", os.cpu_count() or 1 if workers is None else workers)
    order = _checked({"studies": studies, "seed": seed, "long_side": long_side, "text": text})
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file. Name the folder that MURA-demo shall be put into.")
    final, partial = out / "MURA-demo", out / "MURA-demo.partial"
    if not final.exists():
        with _named(out), _locked(final):
            if not final.exists():  # another process may have made it by now
                _require_room(partial, order)
                _prepare(partial, order)
                planned = plan(order["studies"], order["seed"])
                _render(partial, order, planned, workers, (Path(cache) if cache else partial) / "bones")
                _finish(partial, order, planned)
                (partial / "MURA-demo").rename(final)
                shutil.rmtree(partial)
    _check_same(final, order)
    return final


def read_manifest(root: Path) -> dict[str, Any]:
    """Read how the demo data in a folder were made.

    Parameters
    ----------
    root : Path
        A demo data folder, or a copy of one without its text.

    Returns
    -------
    dict
        ``manifest.json``, with at least the keys ``studies``, ``seed``, ``long_side``, ``text``, ``recipe``.

    Raises
    ------
    ValueError
        There is none, it is damaged, or another recipe made the films.
    """
    again = "Render the data again: mura-course demo."
    made = _read(Path(root) / "manifest.json")
    if made is None or not set(ORDER) <= set(made):
        raise ValueError(f"{root} holds no manifest.json of demo data, or a damaged one. {again}")
    if made["recipe"] != RECIPE:
        raise ValueError(
            f"{root} was rendered by another version of the renderer "
            f"(recipe {made['recipe']}; this one is {RECIPE}). {again}"
        )
    try:
        return made | _checked(made)
    except ValueError as error:
        raise ValueError(f"{root}: manifest.json is damaged ({error}) {again}") from error


def text_free_twins(root: Path, paths: list[str], cache: Path) -> dict[str, np.ndarray]:
    """Render films of a demo data set as they would be without burned-in text.

    Parameters
    ----------
    root : Path
        The demo data folder.
    paths : list of str
        Films, relative to `root`.
    cache : Path
        The course's cache folder, with the bones' clouds.

    Returns
    -------
    dict
        By path: uint8 (H, W), or (H, W, 3) where the film is stored in colour.

    Raises
    ------
    ValueError
        The folder holds no demo data of this recipe, or a path is not one of its films.
    """
    made = read_manifest(root)
    by_folder: dict[str, Study] = {s.folder: s for s in plan(made["studies"], made["seed"])}
    twins: dict[str, np.ndarray] = {}
    for folder in dict.fromkeys(p.rpartition("/")[0] for p in paths):
        if folder in by_folder:
            films = film_study(
                by_folder[folder], made["seed"], made["long_side"], cache / "bones", text=False
            )
            twins |= {path: film.image for path, film, _ in films}
    if unknown := [path for path in paths if path not in twins]:
        raise ValueError(f"{root} holds no film {unknown[0]}. Take paths from its index.")
    return {path: twins[path] for path in paths}


def _number(name: str, value: Any) -> int:
    """`value` as a whole number within `LIMITS`."""
    low, high = LIMITS[name]
    with contextlib.suppress(TypeError):
        if low <= (number := operator.index(value)) <= high:
            return number
    option = f"{name} (--{name.replace('_', '-')})"
    raise ValueError(f"{option} must be a whole number from {low:,} to {high:,}, not {value!r}.")


def _checked(order: dict[str, Any]) -> dict[str, Any]:
    """Check the order's numbers and add this renderer's recipe: what fixes every pixel."""
    numbers = {name: _number(name, order[name]) for name in ("studies", "seed", "long_side")}
    return numbers | {"text": bool(order["text"]), "recipe": RECIPE}


def _read(file: Path) -> dict[str, Any] | None:
    """Read the JSON object in a file; None where there is none, or a damaged one."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn the disk's own errors, which seldom say where, into one that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of this module's own, which says all
            raise
        place = f" at {error.filename}" if error.filename else ""
        raise OSError(f"{folder} cannot be written ({error.strerror}{place}). {REMEDY}") from error


@contextlib.contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Let one process at a time make `final`; others wait and say so."""
    final.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(final.with_name(f"{final.name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(f"Another process is rendering {final}; waiting for it.")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _check_same(final: Path, order: dict[str, Any]) -> None:
    made = _read(final / "manifest.json") or {}
    if other := [name for name, value in order.items() if made.get(name) != value]:
        asked = ", ".join(f"{name} {made.get(name, 'unknown')} instead of {order[name]}" for name in other)
        raise FileExistsError(f"{final} holds other data ({asked}). Choose another folder, or move it away.")


def _require_room(partial: Path, order: dict[str, Any]) -> None:
    """Refuse an order whose films, as far as they are not there yet, find no room."""
    each = FILMS_PER_STUDY * (BYTES_PER_PIXEL * order["long_side"] ** 2 + 4096)  # a file fills whole blocks
    free = shutil.disk_usage(partial.parent).free
    done = sum(1 for _ in partial.glob("done/*")) if _read(partial / "order.json") == order else 0
    needed = (order["studies"] - done) * each
    if needed > free:
        raise OSError(
            f"{partial.parent} has too little room: {needed / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} "
            f"GB are free, enough for some {done + int(free / each):,} studies (--studies). {REMEDY}"
        )


def _prepare(partial: Path, order: dict[str, Any]) -> None:
    """Make a folder with the order in it, or keep what a killed call with the same order left."""
    note = partial / "order.json"
    if partial.is_symlink() or partial.exists():
        before = _read(note)
        ours = before is not None and set(before) == set(ORDER)
        just_made = partial.is_dir() and {f.name for f in partial.iterdir()} <= {"order.json.tmp"}
        if partial.is_symlink() or not (ours or just_made):
            raise FileExistsError(
                f"{partial} stands where the films would be made, and is not the renderer's. Move it away, "
                "or choose another folder."
            )
        if before != order:
            shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    _write(note, json.dumps(order).encode())
    (partial / "done").mkdir(exist_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it: it is whole or absent."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    beside.replace(path)


def _render(partial: Path, order: dict[str, Any], planned: list[Study], workers: int, bones: Path) -> None:
    """Render what is not done yet in worker processes. They end by themselves when this one is killed."""
    todo = {i: s for i, s in enumerate(planned) if _read(partial / "done" / f"{i}.json") is None}
    with _named(bones):
        for part in tqdm(PARTS, desc="bones", leave=False):  # built once, before the workers need them
            clouds(part, bones)
    workers = max(1, min(workers, len(todo)))
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool,
        tqdm(total=sum(len(s.views) for s in todo.values()), desc="films", unit=" films", leave=False) as bar,
    ):
        try:
            with _without_main():
                tasks = [pool.submit(_render_study, partial, order, i, s, bones) for i, s in todo.items()]
            for task in as_completed(tasks):
                bar.update(task.result())
        except BrokenProcessPool as error:
            raise OSError(
                "A process that rendered films was ended from outside, most likely for lack of memory. "
                "Start again with fewer (--workers 1): what is done is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the caller's script: new processes would run it again, and wait for the one that started them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker() -> None:
    """One thread, deaf to Ctrl-C (which the parent hears), gone when the parent is."""

    def follow() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threadpool_limits(1)


def _render_study(partial: Path, order: dict[str, Any], number: int, study: Study, bones: Path) -> int:
    """Write the films of a study, then the note that they are done; returns how many."""
    films = film_study(study, order["seed"], order["long_side"], bones, order["text"])
    rows = [_save(partial, *taken) for taken in films]
    _write(partial / "done" / f"{number}.json", json.dumps({"films": rows}).encode())
    return len(rows)


def _save(partial: Path, path: str, film: Film, truth: dict[str, Any]) -> dict[str, Any]:
    png = cv2.imencode(".png", film.image, [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes()
    file = partial / "MURA-demo" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, png)
    return truth | {"bytes": len(png), "sha256": hashlib.sha256(png).hexdigest()}


def _finish(partial: Path, order: dict[str, Any], planned: list[Study]) -> None:
    """Write MURA's four CSV files, truth, manifest and README, from the notes of the workers."""
    notes = [json.loads((partial / "done" / f"{i}.json").read_bytes()) for i in range(len(planned))]
    table = pd.DataFrame([row for note in notes for row in note["films"]])
    data = partial / "MURA-demo"
    for split in ("train", "valid"):
        paths = [f"MURA-demo/{p}" for p in table.path if p.startswith(split)]
        _write(data / f"{split}_image_paths.csv", "".join(f"{p}\n" for p in paths).encode())
        labels = [f"MURA-demo/{s.folder}/,{s.label}\n" for s in planned if s.split == split]
        _write(data / f"{split}_labeled_studies.csv", "".join(labels).encode())
    measured = ["bytes", "sha256"]
    _write(data / "manifest.csv", table[["path", *measured]].to_csv(index=False).encode())
    _write(data / "truth.csv", table.drop(columns=measured).to_csv(index=False).encode())
    versions = {"numpy": np.__version__, "opencv": cv2.__version__}
    made = order | {"images": len(table), "versions": versions}
    _write(data / "manifest.json", json.dumps(made, indent=1).encode())
    _write(data / "README.txt", README.encode())
