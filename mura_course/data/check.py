"""Room `data`: is a data folder whole? Compare it with what it must hold; unpack MURA's zip file safely.

Opens every image; `extract` alone writes. Knows `index`, whose `load_index` reads the CSV files. The setup
chapter explains ``mura-course check``.
"""

import hashlib
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
from ..errors import DataError, MuraError, printable
from .index import SPLITS, demo_table, few, find_root, load_index

# What `counts` gives for MURA v1.1, counted from the CSV files that Stanford published.
MURA = pd.read_csv(Path(__file__).with_name("mura_v1.1.csv"), index_col=["split", "body_part"])
REMEDIES = {
    "index unusable": "Solve this first: names and numbers are compared after that.",
    "image that no CSV file names": "No chapter reads it. Remove it, or add it to the CSV files.",
    "number that is not MURA's": "If it should be, unpack the archive again. Else scores are not comparable.",
    "image that cannot be used": "Take it from the archive, or download it again. Demo data: render again.",
}


def check(root: str | os.PathLike | None = None, *, progress: bool = True) -> pd.DataFrame:
    """List the problems of a data set: its CSV files, its numbers, and every image that cannot be decoded.

    Parameters
    ----------
    root : path, optional
        The data folder; without it, see `find_root`.
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
    MURA is compared with the numbers that Stanford published, demo films with the hashes in ``manifest.csv``.
    Where `load_index` stops, its message is the one problem of the CSV files; names and numbers are compared
    once it is solved.
    """
    root, found, sums = find_root(root), {}, {}
    there = {f.relative_to(root).as_posix() for top in SPLITS for f in (root / top).rglob("[!.]*.png")}
    try:
        index = load_index(root, quiet=True)
        if index.attrs["name"] == "MURA-demo":  # films without their text are others, and have no such file
            sums = demo_table(index, "manifest.csv", ["path", "sha256"])["sha256"].to_dict()
    except MuraError as error:
        found["index unusable"] = [str(error)]
    else:
        found["image that no CSV file names"] = sorted(there - set(index["path"]))
        found["number that is not MURA's"] = [] if index.attrs["is_demo"] else _differences(index)
        there |= set(index["path"])
    names = sorted(there)
    with ThreadPoolExecutor(paths.cores()) as pool:
        verdicts = pool.map(lambda path: judge(root / path, sums.get(path)), names)
        bar = tqdm(verdicts, "Opening images", len(names), leave=False, unit="image", disable=not progress)
        broken = [f"{path}: {verdict}" for path, verdict in zip(names, bar, strict=True) if verdict]
    found["image that cannot be used"] = broken
    rows = [(problem, len(items), items[:5], REMEDIES[problem]) for problem, items in found.items() if items]
    table = pd.DataFrame(rows, columns=["problem", "count", "examples", "remedy"])
    table.attrs = {"root": str(root), "images": len(names)}
    return table


def report(table: pd.DataFrame) -> str:
    """Put the table of `check` into words, safe for a terminal."""
    lines = [f"Opened {table.attrs['images']:,} images in {paths.short_path(table.attrs['root'])}."]
    for problem, count, examples, remedy in table.itertuples(index=False):
        lines.append(f"{problem}: {count:,}{few(examples)}\n  What to do: {remedy}")
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
    """Say which cells of the table of `counts` are not MURA's."""
    cells: Any = pd.DataFrame({"held": counts(index).stack(), "published": MURA.stack()})
    wrong = cells[cells["held"].ne(cells["published"])].itertuples()
    return [f"{' '.join(place)}: {held:,} instead of {published:,}" for place, held, published in wrong]


def judge(file: Path, sha256: str | None = None) -> str:
    """Return what is wrong with an image file, "" for nothing: of its hash, its checksums, its pixels."""
    try:
        content = io.BytesIO(disk.read_bytes(file))
        if sha256 and hashlib.sha256(content.getvalue()).hexdigest() != sha256:
            return "not the film that was rendered"
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
    DataError
        It is missing or no zip file, damaged or encrypted, holds no data in MURA's layout, or a link, a
        name twice or one that leads outside; nothing is written then. Or the folder exists already.
    DiskError
        No room, or no permission.
    """
    archive = paths.absolute(archive)
    target = (paths.absolute(out) if out else archive.parent) / archive.stem
    if os.path.lexists(target):
        raise DataError(f"{target} exists already. Check it, or unpack elsewhere: --out FOLDER.")
    try:
        with zipfile.ZipFile(archive) as packed, disk.atomic(target, "") as beside:
            _refuse_unsafe(archive, packed.infolist())
            for entry in tqdm(packed.infolist(), "Unpacking", leave=False, unit="file"):
                packed.extract(entry, beside)
    except MuraError:
        raise
    except Exception as error:  # zipfile raises many kinds on damage
        raise DataError(f"{archive} cannot be unpacked ({error}). Download it again.") from error
    return find_root(target)


def _refuse_unsafe(archive: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise DataError, before anything is written, unless the archive's entries are safe, and MURA's."""
    names: set[str] = set()
    for entry in entries:
        name, place = entry.filename, str(PurePosixPath(entry.filename)).lower()
        problem = "stands in it twice" if place in names else ""
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        if name.startswith("/") or {"..", *"\\:"} & {*PurePosixPath(name).parts, *name}:
            problem = "leads out of the folder"
        if problem:
            raise DataError(f"{archive}: {name!r} {problem}. Download the archive again.")
        names.add(place)
    if not any(re.search(r"(^|/)train(_image_paths\.csv$|/xr_)", name) for name in names):
        raise DataError(f"{archive} holds no data in MURA's layout. Name the archive that you downloaded.")
