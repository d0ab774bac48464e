"""Room `data`: is a data folder whole? Compare it with what it must hold; unpack MURA's zip file safely.

Opens every image; `extract` alone writes. Knows `index`, whose `load_index` reads the CSV files. The setup
chapter explains ``mura-course check``.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm  # not tqdm.auto: it warns where ipywidgets are missing

from .. import disk, paths
from ..errors import DataError, DataNotFoundError, MuraError, printable
from .index import SPLITS, few, find_root, load_index

# What `counts` gives for MURA v1.1, counted from the CSV files that Stanford published.
MURA = pd.read_csv(Path(__file__).with_name("mura_v1.1.csv"), index_col=["split", "body_part"])
REMEDIES = {
    "index unusable": "Solve this first: names and numbers are compared after that.",
    "file that no CSV file names": "No chapter reads it. Remove it, or add it to the CSV files.",
    "number that is not MURA's": "If it should be, unpack the archive again. Else scores are not comparable.",
    "image that cannot be used": "Take it from the archive, or download it again. Demo data: render again.",
}


def check(
    root: str | os.PathLike | None = None, *, workers: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """List the problems of a data set: its CSV files, its numbers, and every image that cannot be decoded.

    Parameters
    ----------
    root : path, optional
        The data folder; without it, see `find_root`.
    workers : int, optional
        Threads that open images, by default one a core.
    progress : bool
        Show a progress bar.

    Returns
    -------
    DataFrame
        Columns ``problem`` (str), ``count`` (int64), ``examples`` (list of str, five at most), ``remedy``
        (str); no row where all is well. ``attrs``: ``root`` (str), ``images`` (int: how many were opened).

    Raises
    ------
    DataNotFoundError
        There is no data folder.

    Notes
    -----
    MURA is compared with the numbers that Stanford published. Where `load_index` stops, its message is the
    one problem of the CSV files; names and numbers are compared once it is solved.
    """
    root, found = find_root(root), {}
    there = _files(root)
    films = {path for path in there if path.lower().endswith(".png")}
    try:
        index = load_index(root, quiet=True)
    except MuraError as error:
        found["index unusable"] = [str(error)]
    else:
        found["file that no CSV file names"] = sorted(there - set(index["path"]))
        found["number that is not MURA's"] = [] if index.attrs["is_demo"] else _differences(index)
        films |= set(index["path"])
    names = sorted(films)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        verdicts = pool.map(lambda path: judge(root / path), names)
        bar = tqdm(verdicts, "Opening images", len(names), leave=False, unit="image", disable=not progress)
        broken = [f"{path}: {verdict}" for path, verdict in zip(names, bar, strict=True) if verdict]
    found["image that cannot be used"] = broken
    rows = [
        (problem, len(items), [printable(item) for item in items[:5]], REMEDIES[problem])
        for problem, items in found.items()
        if items
    ]
    table = pd.DataFrame(rows, columns=["problem", "count", "examples", "remedy"])
    table.attrs = {"root": str(root), "images": len(names)}
    return table


def report(table: pd.DataFrame) -> str:
    """Put the table of `check` into words, safe for a terminal."""
    lines = [f"Opened {table.attrs['images']:,} images in {paths.short_path(table.attrs['root'])}."]
    for problem, count, examples, remedy in table.itertuples(index=False):
        more = f"\n  ... and {count - len(examples):,} more" if count > len(examples) else ""
        lines.append(f"{problem}: {count:,}{few(examples)}{more}\n  What to do: {remedy}")
    return printable("\n\n".join(lines if len(table) else [*lines, "All is well."]))


def counts(index: pd.DataFrame) -> pd.DataFrame:
    """Count images, studies and patients by split and body part: int64 (14, 5).

    A patient counts in each of their body parts. Rows and columns are those of `MURA`.
    """
    flags = {
        f"{name} {what}": index["label"].eq(label) & counted
        for what, counted in (("images", True), ("studies", ~index.duplicated("study")))
        for label, name in enumerate(("normal", "abnormal"))
    }
    flags["patients"] = ~index.duplicated(["split", "body_part", "patient"])
    sums: Any = pd.DataFrame(flags).groupby([index["split"], index["body_part"].astype(str)]).sum()
    return sums.reindex(MURA.index, fill_value=0).astype("int64")


def _differences(index: pd.DataFrame) -> list[str]:
    held = counts(index).to_dict("index")
    return [
        f"{' '.join(map(str, cell))}: {held[cell][what]:,} {what} instead of {wants:,}"
        for cell, row in MURA.to_dict("index").items()
        for what, wants in row.items()
        if held[cell][what] != wants
    ]


def _files(root: Path) -> set[str]:
    """Return the paths of the files below train and valid, except what operating systems leave there."""
    files = (file for top in SPLITS for file in (root / top).rglob("[!.]*") if file.is_file())
    return {f.relative_to(root).as_posix() for f in files if f.name not in ("Thumbs.db", "desktop.ini")}


def judge(file: Path) -> str:
    """Return what is wrong with an image file, "" for nothing: first its checksums, then its pixels."""
    try:
        content = io.BytesIO(disk.read_bytes(file))
        with Image.open(content, formats=["PNG"]) as image:
            image.verify()  # checksums alone
        with Image.open(content, formats=["PNG"]) as image:
            image.load()
    except UnidentifiedImageError:
        return "no PNG"
    except Exception as error:  # Pillow raises many kinds on damage
        return getattr(error, "strerror", None) or str(error)
    return ""


def extract(archive: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Unpack MURA's zip file into the new folder `out`/<name of the archive>, whole or not at all.

    Parameters
    ----------
    archive : path
        The zip file.
    out : path, optional
        By default the folder that the archive lies in.

    Returns
    -------
    Path
        The data folder in it.

    Raises
    ------
    DataNotFoundError
        There is no such file.
    DataError
        It is no zip file, damaged or encrypted, holds no data in MURA's layout, or a path or link that leads
        outside, or a file twice; nothing is written then. Or the folder exists already.
    DiskError
        No room, or no permission.
    """
    archive = paths.absolute(archive)
    target = (paths.absolute(out) if out else archive.parent) / archive.stem
    if not archive.is_file():
        raise DataNotFoundError(f"The archive {archive} does not exist. Correct its path.")
    if os.path.lexists(target):
        raise DataError(f"{target} exists already. Check it, or unpack elsewhere: --out FOLDER.")
    try:
        with zipfile.ZipFile(archive) as packed:
            _refuse_unsafe(archive, packed)
            with disk.atomic(target, "") as beside:
                disk.require_room(beside.parent, sum(info.file_size for info in packed.infolist()), "")
                for info in tqdm(packed.infolist(), "Unpacking", leave=False, unit="file"):
                    packed.extract(info, beside)
    except MuraError:
        raise
    except Exception as error:  # zipfile raises many kinds on damage
        raise DataError(f"{archive} cannot be unpacked ({error}). Download it again.") from error
    return find_root(target)


def _refuse_unsafe(archive: Path, packed: zipfile.ZipFile) -> None:
    """Raise DataError, before anything is written, unless the names in the archive are safe, and MURA's."""
    seen: set[str] = set()
    for info in packed.infolist():
        name, parts = info.filename, PurePosixPath(info.filename).parts
        place = "/".join(parts).lower()  # on some systems, upper and lower case name the same file
        if name.startswith("/") or {"..", *"\\:"} & {*parts, *name} or not name.isprintable():
            problem = "leads out of the folder"
        elif stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif place in seen:
            problem = "stands there twice"
        else:
            seen.add(place)
            continue
        raise DataError(f"{archive}: {name!r} {problem}; nothing was unpacked. Download it again.")
    if not any(re.search(r"(^|/)train(_image_paths\.csv$|/xr_)", place) for place in seen):
        raise DataError(f"{archive} holds no data in MURA's layout. Name the archive that you downloaded.")
