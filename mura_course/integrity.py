"""Is the data folder whole? Compares it with what MURA v1.1 must hold, and opens every image.

`check` collects all problems in one table, where `data.load_index` stops at the first. It mends nothing.
`mura_course.image_files` opens the files, `mura_course.archive` unpacks the zip file.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

import pandas as pd

from . import data
from .archive import extract
from .errors import DataError, DataNotFoundError, MuraError
from .image_files import SIDES, Verdict, judge, open_all

__all__ = ["COUNTS", "MURA", "check", "counts", "extract", "judge", "report"]

SHOWN = 5  # examples of each problem
COUNTS = ["normal images", "abnormal images", "normal studies", "abnormal studies", "patients"]
_PUBLISHED = {  # counted from the CSV files that Stanford published: COUNTS of train, then of valid
    "ELBOW": (2925, 2006, 1094, 660, 1711, 235, 230, 92, 66, 152),
    "FINGER": (3138, 1968, 1280, 655, 1865, 214, 247, 92, 83, 166),
    "FOREARM": (1164, 661, 590, 287, 865, 150, 151, 69, 64, 129),
    "HAND": (4059, 1484, 1497, 521, 1945, 271, 189, 101, 66, 159),
    "HUMERUS": (673, 599, 321, 271, 587, 148, 140, 68, 67, 132),
    "SHOULDER": (4211, 4168, 1364, 1457, 2694, 285, 278, 99, 95, 173),
    "WRIST": (5765, 3987, 2134, 1326, 3267, 364, 295, 140, 97, 207),
}
_FOLDERS = {split: folder for folder, split in data.SPLITS.items()}
_CELLS = pd.MultiIndex.from_product([_FOLDERS, data.BODY_PARTS], names=["split", "body_part"])
_NUMBERS = [_PUBLISHED[part][5 * side : 5 * side + 5] for side in (0, 1) for part in data.BODY_PARTS]
MURA = pd.DataFrame(_NUMBERS, _CELLS, COUNTS)  # what `counts` gives for MURA v1.1

_DEMO_FILES = ("truth.csv", "manifest.csv", "manifest.json")  # rendered data have all three, MURA none
_SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
_UNPACK = "unpack the archive again; where that does not help, download it again."
_RENDER = "Delete the folder and render it again: mura-course demo."
REMEDIES = {
    "CSV file unusable": "Mend it first: what depends on it is checked after that.",
    "images absent": f"{_UNPACK.capitalize()} For a part of MURA, take their lines out of the CSV files.",
    "empty file": _UNPACK.capitalize(),
    "truncated": _UNPACK.capitalize(),
    "damaged": _UNPACK.capitalize(),
    "unreadable": "Allow this user to read them. Where that is so, the disk or the connection is at fault.",
    "not a PNG": "Take them from the archive, or convert them: renaming makes no PNG.",
    "unusual mode": "8-bit grey and RGB are usual. The book reads these too, but ignores transparency and "
    "lower bits. Convert them, or take them from the archive.",
    "unusual size": f"Sides of {SIDES[0]} to {SIDES[1]:,} px are usual. Take them from the archive.",
    "file that no CSV file names": "No chapter reads them. Remove them, or add them to the CSV files.",
    "patient in both train and valid": "Scores on the test set come out too good. Take the patient's lines "
    "out of one side's CSV files, or take all CSV files from the archive.",
    "incomplete": "A part of MURA taken on purpose is well, but its scores are not MURA's. "
    f"If all of MURA was meant, {_UNPACK}",
    "counts differ from MURA's": "Files or labels were added, moved or changed, and scores are not "
    f"comparable. If that was not on purpose, {_UNPACK}",
    "file of the demo data missing": _RENDER,
    "manifest.csv unusable": _RENDER,
    "manifest.csv and CSV files differ": _RENDER,
    "changed since rendered": _RENDER,
}


def check(
    root: str | os.PathLike | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    expected: pd.DataFrame | None = MURA,
    again: bool = False,
) -> pd.DataFrame:
    """Every problem of the data set at `root` (default: see `data.find_root`); an empty table: all is well.

    Columns: ``problem`` (str), ``count`` (int: files, lines, patients or missing images), ``examples`` (list
    of str, the first few), ``remedy`` (str). ``attrs``: ``root``, ``name``, ``is_demo``, ``compared_with``,
    ``images`` and ``studies`` (in the CSV files), ``opened`` and ``remembered`` (files), ``seconds``.

    workers: threads, by default one a core. expected: what `counts` must give, by default MURA v1.1's;
    None compares nothing. Demo data are compared with their manifest.csv (bytes and SHA-256) instead.
    again: open even those files that an earlier check opened and that have kept their size and time since.
    Raises DataNotFoundError where there is no data folder, or the cache folder cannot be written.
    """
    start, root = time.perf_counter(), data.find_root(root)
    is_demo = any((root / name).is_file() for name in _DEMO_FILES)
    found = _Findings(is_demo)
    images, on_disk = _read_index(root, found), _files_on_disk(root)
    named = set(images["path"].dropna())
    manifest = _read_manifest(root, set(images["name"]), found) if is_demo else {}
    # What a CSV file that was not read whole would name is not held against the folder.
    whole = [folder for folder in data.SPLITS if data.csv_files(root, folder)[0] not in found.unread]
    _add_absent(images, found)
    unnamed = sorted(path for path in on_disk - named - manifest.keys() if path.split("/")[0] in whole)
    found.add("file that no CSV file names", unnamed)
    _add_patients(images, found)
    if expected is not None and not is_demo:
        _add_counts(counts(images), expected, [data.SPLITS[folder] for folder in whole], found)
    paths = sorted(named | {path for path in on_disk if path.lower().endswith(".png")})
    films, opened = open_all(root, paths, hashed=is_demo, workers=workers, progress=progress, again=again)
    _add_films(films, manifest, found)
    rows = [(problem, *row) for problem, row in found.items()]
    table = pd.DataFrame(rows, columns=["problem", "count", "examples", "remedy"])
    published = "nothing" if expected is None else "MURA v1.1"
    table.attrs = {
        "root": str(root),
        "name": "MURA-demo" if is_demo else "MURA-v1.1",
        "is_demo": is_demo,
        "compared_with": "its manifest.csv" if is_demo else published,
        "images": len(images),
        "studies": len(images.drop_duplicates(["split", "study"])),
        "opened": opened,
        "remembered": len(films) - opened,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return table


class _Findings(dict):
    """Problem -> [count, examples, remedy], and the CSV files that could not be read whole."""

    def __init__(self, is_demo: bool):
        super().__init__()
        self.is_demo = is_demo
        self.unread: set[Path] = set()

    def add(self, problem: str, items: Iterable[str], remedy: str = "", count: int = 0, shown: int = SHOWN):
        if self.is_demo and problem not in ("unreadable", "file that no CSV file names"):
            remedy = _RENDER  # they came from no archive
        if items := list(items):
            row = self.setdefault(problem, [0, [], remedy or REMEDIES[problem]])
            row[0] += count or len(items)
            row[1] += [
                "".join(c if c.isprintable() else "?" for c in i) for i in items[: shown - len(row[1])]
            ]

    def parse(self, parse: Callable, file: Path, folder: str) -> pd.DataFrame | None:
        """What `parse` of `data` makes of `file`; None, and a finding, where it is missing or no text."""
        try:
            return parse(file, folder, self.refuse)
        except MuraError as error:
            self.unread.add(file)
            return self.add("CSV file unusable", [str(error)])

    def refuse(
        self, file: Path, rows: pd.DataFrame, bad: pd.Series, problem: str, remedy: str, error=DataError
    ):
        """Called by `data` where `data.load_index` would stop."""
        if bad.any() and error is not DataNotFoundError:  # absent images: see _add_absent
            self.unread |= {file} if problem in data.UNUSABLE_LINES else set()
            lines = rows.loc[bad, "line"].items()
            self.add(problem, (f"{file.name} line {number}: {line}" for number, line in lines), remedy)


def _read_index(root: Path, found: _Findings) -> pd.DataFrame:
    """The index as far as it can be read, with the ``name`` that the CSV file has for an image.

    ``path`` is missing where the image is; ``label`` is the folder name's, as contradictions are reported.
    """
    columns = [*data.COLUMNS, "name"]
    parts = [pd.DataFrame(columns=columns)]
    for folder, split in data.SPLITS.items():
        image_file, label_file = data.csv_files(root, folder)
        images = found.parse(data.parse_images, image_file, folder)
        studies = found.parse(data.parse_labels, label_file, folder)
        if images is None:
            continue
        if (
            label_file in found.unread
        ):  # which is one problem, not one for each image that it leaves unlabelled
            studies = images.drop_duplicates("folder").assign(label=0)
        images = data.label_images(root, image_file, images, label_file, studies, found.refuse)
        images["name"] = images["path"].fillna(images["folder"] + "/" + images["image"])
        images["label"] = images["sign"].eq("positive")
        parts.append(images.assign(split=split).drop_duplicates("name"))
    return pd.concat(parts, ignore_index=True)[columns].astype({"patient": "int64", "label": "int64"})


def _files_on_disk(root: Path) -> set[str]:
    """Paths of all files below train and valid, but for those that operating systems leave there."""
    found = set()
    for top in data.SPLITS:
        for folder, inner, names in os.walk(root / top, followlinks=True):
            place = Path(folder).relative_to(root).as_posix()
            # Two levels deeper than MURA goes, then no further: a link may lead round in a circle.
            inner[:] = [name for name in inner if not name.startswith(".") and place.count("/") < 5]
            found |= {f"{place}/{n}" for n in names if not n.startswith(".") and n not in _SYSTEM_FILES}
    return found


def _add_absent(images: pd.DataFrame, found: _Findings) -> None:
    absent = images[images["path"].isna()]
    names = absent["name"].head(SHOWN).tolist()
    if len(absent) > SHOWN:
        parts = (absent["split"].map(_FOLDERS) + " " + absent["body_part"]).value_counts()
        names.append("by part: " + ", ".join(f"{part} {count:,}" for part, count in parts.items()))
    found.add("images absent", names, count=len(absent), shown=SHOWN + 1)


def _add_patients(images: pd.DataFrame, found: _Findings) -> None:
    folders = images["name"].astype("str").str.rsplit("/", n=1).str[0]
    studies = images.assign(folder=folders).drop_duplicates(["patient", "split"])
    both = studies[studies.duplicated("patient", keep=False)].groupby("patient")["folder"]
    found.add("patient in both train and valid", both.agg(" and ".join))


def _add_films(films: list[Verdict], manifest: dict[str, tuple[str, str]], found: _Findings) -> None:
    for film in films:
        if manifest.get(film.path) == (str(film.size), film.sha256):
            continue  # as it was rendered, and then sound however small
        if film.problem:
            found.add(film.problem, [f"{film.path}: {film.detail}" if film.detail else film.path])
        elif film.path in manifest:
            found.add("changed since rendered", [film.path])


def counts(index: pd.DataFrame) -> pd.DataFrame:
    """Images, studies and patients of an index (as `data.load_index` gives it) in the form of `MURA`.

    int64 (14, 5); rows: split (train, test) and body part; columns: `COUNTS`. Patients count in each part.
    """
    kind = index["label"].map({0: "normal", 1: "abnormal"})
    study = ~index.duplicated(["split", "study", "label"])
    table = {f"{sign} images": kind.eq(sign) for sign in ("normal", "abnormal")}
    table |= {f"{sign} studies": kind.eq(sign) & study for sign in ("normal", "abnormal")}
    table["patients"] = ~index.duplicated(["split", "body_part", "patient"])
    sums = pd.DataFrame(table).groupby([index["split"], index["body_part"].astype(str)]).sum()
    return sums.reindex(_CELLS, fill_value=0).astype("int64")


def _add_counts(held: pd.DataFrame, expected: pd.DataFrame, splits: list[str], found: _Findings) -> None:
    wanted = expected.reindex(_CELLS, fill_value=0)[COUNTS].to_numpy().tolist()
    for (split, part), has, wants in zip(_CELLS, held.to_numpy().tolist(), wanted, strict=True):
        name, lacking = f"{_FOLDERS[split]} {part}", sum(wants[:2]) - sum(has[:2])
        if split not in splits or has == wants:
            continue
        if lacking > 0 and all(h <= w for h, w in zip(has, wants, strict=True)):
            images = f"{sum(has[:2]):,} of {sum(wants[:2]):,} images"
            text = f"{name}: {images}, {sum(has[2:4]):,} of {sum(wants[2:4]):,} studies"
            found.add("incomplete", [text], count=lacking, shown=len(_CELLS))
        else:
            wrong = [
                f"{h:,} {c} instead of {w:,}" for h, c, w in zip(has, COUNTS, wants, strict=True) if h != w
            ]
            found.add("counts differ from MURA's", [f"{name}: {', '.join(wrong)}"], shown=len(_CELLS))


def _read_manifest(root: Path, named: set[str], found: _Findings) -> dict[str, tuple[str, str]]:
    """Bytes and SHA-256 of the films of demo data by path; empty where there is no telling."""
    found.add("file of the demo data missing", [name for name in _DEMO_FILES if not (root / name).is_file()])
    try:
        table = pd.read_csv(root / "manifest.csv", dtype=str, keep_default_na=False)
        manifest = {row.path: (row.bytes, row.sha256) for row in table.itertuples()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        found.add("manifest.csv unusable", [str(error)])
        return {}
    if not found.unread:
        differing = [f"{path}: only in manifest.csv" for path in sorted(manifest.keys() - named)]
        differing += [f"{path}: not in manifest.csv" for path in sorted(named - manifest.keys())]
        found.add("manifest.csv and CSV files differ", differing)
    return manifest


def report(table: pd.DataFrame) -> str:
    """The table of `check` as text of at most 100 columns, below what was checked and compared."""
    about = table.attrs
    kind = "demo data: synthetic radiographs" if about["is_demo"] else "real radiographs"
    head = (
        f"{about['name']} ({kind}): {about['images']:,} images in {about['studies']:,} studies",
        f"Folder: {data.short_path(about['root'])}",
        f"Compared with {about['compared_with']}. Opened {about['opened']:,} files in {about['seconds']:,} "
        f"s; {about['remembered']:,} are known from an earlier check.",
    )
    lines = [line for text in head for line in _wrap(text, 100)]
    if table.empty:
        return "\n".join([*lines, "All is well."])
    lines += ["", *_row("Problem", "Number", ["Examples, and what to do"])]
    for problem, count, examples, remedy in table.itertuples(index=False):
        cut = problem != "incomplete" and len(examples) == SHOWN < count
        more = [f"... and {count - SHOWN:,} more"] if cut else []
        lines += ["-" * 100, *_row(problem, f"{count:,}", [*examples, *more, f"What to do: {remedy}"])]
    return "\n".join(lines)


def _row(problem: str, count: str, texts: list[str]) -> list[str]:
    right = [line for text in texts for line in _wrap(text, 68)]
    cells = zip_longest(_wrap(problem, 20), [count], right, fillvalue="")
    return [f"{name:20}  {number:>8}  {text}".rstrip() for name, number, text in cells]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
