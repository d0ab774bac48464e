"""Writes a demo data set in MURA's folder layout: many workers, one result, whole or absent.

The films are written into `MURA-demo.partial` and the folder is renamed once everything stands, so a killed
run continues where it was.  Only this module of the renderer touches the disk (besides the cloud cache).
Explained in the appendix `a_demo_radiographs`.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm  # not tqdm.auto: it warns, in every chapter, where ipywidgets are missing

from .anatomy import PARTS, clouds
from .studies import Study, film_study, plan

BYTES_PER_PIXEL = 1.2  # of a finished film, measured generously; for the check of free space
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


def recipe() -> str:
    """Hash of the renderer's source: data made by another version of it are not mixed with this one's."""
    sources = sorted(
        s for s in Path(__file__).parent.glob("*.py") if s.name != "audit.py"
    )  # only reads films
    return hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:10]


def bone_cache() -> Path:
    """Folder of the bone clouds."""
    from ..data import cache_dir

    return cache_dir() / "bones"


def ensure_demo(studies: int, seed: int = 0, long_side: int = 320) -> Path:
    """Folder `MURA-demo` with so many studies in the user's cache, rendered on first use with a progress bar.

    Raises OSError naming the folder and MURA_CACHE where it can't be written.
    """
    from ..data import cache_dir

    out = cache_dir() / "demo" / f"{studies}-studies-{long_side}px-seed{seed}-{recipe()}"
    return write_demo(out, studies, seed, long_side)


def write_demo(
    out: Path,
    studies: int,
    seed: int = 0,
    long_side: int = 320,
    text: bool = True,
    workers: int | None = None,
) -> Path:
    """Render a data set into `out`/MURA-demo and return that folder; at once where it is already there.

    text: False makes the text-free twin of the same data set.  workers: processes, by default one a core.
    Raises FileExistsError where the folder holds other data, OSError where it can't be written or filled.
    """
    order = {"studies": studies, "seed": seed, "long_side": long_side, "text": text, "recipe": recipe()}
    final, partial = Path(out) / "MURA-demo", Path(out) / "MURA-demo.partial"
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with FileLock(str(final) + ".lock"):
            if final.exists():
                _check_same(final, order)
                return final
            plan(studies, seed)  # refuses a bad order before anything is written
            _prepare(partial, order)
            _render(partial, order, workers or os.cpu_count() or 1)
            _finish(partial, order)
            partial.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise OSError(
                error.errno,
                f"{error.strerror}: can't write the demo data into {out}. Make room there, "
                "or set the variable MURA_CACHE to a folder with room that you may write",
            ) from error
        raise
    return final


def _check_same(final: Path, order: dict) -> None:
    made = json.loads((final / "manifest.json").read_text()) if (final / "manifest.json").exists() else {}
    if any(made.get(key) != value for key, value in order.items()):
        raise FileExistsError(f"{final} holds other data: choose another folder, or delete it first")


def _prepare(partial: Path, order: dict) -> None:
    """An empty folder with the order in it, or the remains of an interrupted run of the same order."""
    note = partial / "order.json"
    if partial.exists() and not (note.exists() and json.loads(note.read_text()) == order):
        shutil.rmtree(partial)
    (partial / "done").mkdir(parents=True, exist_ok=True)
    need = 2.75 * order["studies"] * order["long_side"] ** 2 * BYTES_PER_PIXEL
    if shutil.disk_usage(partial).free < need:
        raise OSError(errno.ENOSPC, f"No room, about {need / 1e6:,.0f} MB needed")
    _write(note, json.dumps(order).encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it: it is whole or absent."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    beside.replace(path)


def _render(partial: Path, order: dict, workers: int) -> None:
    """Start the workers and follow them.  They end by themselves when this process is killed."""
    studies = plan(order["studies"], order["seed"])
    for part in tqdm(PARTS, desc="bones", leave=False):  # built once, before the workers need them
        clouds(part, bone_cache())
    todo = [s for i, s in enumerate(studies) if not (partial / "done" / f"{i}.json").exists()]
    receive, send = os.pipe()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    logs = [partial / f"worker{w}.log" for w in range(workers)]
    running = []
    for w, log in enumerate(logs):
        arguments = map(str, (partial, bone_cache(), w, workers))
        command = [sys.executable, "-P", "-m", __package__, *arguments]
        with open(log, "wb") as errors:
            running.append(subprocess.Popen(command, stdout=send, stderr=errors, env=environment))
    os.close(send)
    try:
        with (
            open(receive) as messages,
            tqdm(total=sum(len(s.views) for s in todo), desc="films", unit=" films") as bar,
        ):
            for line in messages:
                bar.update(int(line))
    finally:
        for process in running:  # finished already, unless this process was interrupted
            process.terminate()
            process.wait()
    failed = [
        log.read_text().strip() for log, p in zip(logs, running, strict=True) if p.returncode not in (0, -15)
    ]
    missing = sum(not (partial / "done" / f"{i}.json").exists() for i in range(len(studies)))
    if failed or missing:
        report = "\n".join(failed)
        code = errno.ENOSPC if "No space left" in report else errno.EIO
        raise OSError(
            code, f"{missing} studies were not rendered; a worker said: {report[-2000:] or 'nothing'}"
        )


def work(partial: Path, cache: Path, worker: int, workers: int) -> None:
    """Render every `workers`-th study that is not done; after each, write its number of films to stdout."""
    cv2.setNumThreads(1)
    order = json.loads((partial / "order.json").read_text())
    if order["recipe"] != recipe():
        raise RuntimeError(f"the worker runs another version of mura_course, from {__file__}")
    for i, study in enumerate(plan(order["studies"], order["seed"])):
        note = partial / "done" / f"{i}.json"
        if i % workers != worker or note.exists():
            continue
        rows = [
            _save(partial, *taken)
            for taken in film_study(study, order["seed"], order["long_side"], cache, order["text"])
        ]
        _write(note, json.dumps(rows).encode())
        os.write(1, b"%d\n" % len(rows))  # one write, which never mixes with another worker's


def _save(partial: Path, path: str, film, truth: dict) -> dict:
    png = cv2.imencode(".png", film.image, [cv2.IMWRITE_PNG_COMPRESSION, 4])[1].tobytes()
    (partial / path).parent.mkdir(parents=True, exist_ok=True)
    _write(partial / path, png)
    return truth | {"bytes": len(png), "sha256": hashlib.sha256(png).hexdigest()}


def _finish(partial: Path, order: dict) -> None:
    """MURA's four CSV files, truth, manifest and README, from the notes of the workers."""
    studies = plan(order["studies"], order["seed"])
    rows = [
        row for i in range(len(studies)) for row in json.loads((partial / "done" / f"{i}.json").read_text())
    ]
    table = pd.DataFrame(rows)
    for split in ("train", "valid"):
        paths = [f"MURA-demo/{p}" for p in table.path if p.startswith(split)]
        _write(partial / f"{split}_image_paths.csv", "".join(f"{p}\n" for p in paths).encode())
        labels = [f"MURA-demo/{s.folder}/,{s.label}\n" for s in studies if s.split == split]
        _write(partial / f"{split}_labeled_studies.csv", "".join(labels).encode())
    measured = ["bytes", "sha256"]
    _write(partial / "manifest.csv", table[["path", *measured]].to_csv(index=False).encode())
    _write(partial / "truth.csv", table.drop(columns=measured).to_csv(index=False).encode())
    versions = {"numpy": np.__version__, "opencv": cv2.__version__}
    _write(
        partial / "manifest.json",
        json.dumps(order | {"images": len(table), "versions": versions}, indent=1).encode(),
    )
    _write(partial / "README.txt", README.encode())
    shutil.rmtree(partial / "done")
    for scaffold in [partial / "order.json", *partial.glob("worker*.log")]:
        scaffold.unlink()


def text_free_twins(root: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """The films at `paths` (relative to `root`) as they would be without burned-in text, by path.

    Raises ValueError where the folder was rendered by another version, KeyError for a path that is not in it.
    """
    made = json.loads((Path(root) / "manifest.json").read_text())
    if made["recipe"] != recipe():
        raise ValueError(
            f"{root} was rendered by another version of mura_course: render it again (mura-course demo)"
        )
    by_folder: dict[str, Study] = {s.folder: s for s in plan(made["studies"], made["seed"])}
    twins: dict[str, np.ndarray] = {}
    for folder in dict.fromkeys(p.rsplit("/", 1)[0] for p in paths):
        films = film_study(by_folder[folder], made["seed"], made["long_side"], bone_cache(), text=False)
        twins |= {path: film.image for path, film, _ in films}
    return {path: twins[path] for path in paths}
