"""Room `data`: find the data and read their index, a row an image. Chapter 1 explains it.

Reads the CSV files and lists the folders of a data set in MURA's layout; opens no image, writes nothing.
Knows the foundation only: no framework, no later stage. A row comes from a path such as
``train/XR_HAND/patient00011/study1_positive/image1.png``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from .. import disk, paths, profiles
from ..errors import DataError, DataNotFoundError, DiskError, MuraError, printable

BODY_PARTS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")
COLUMNS = ("path", "split", "body_part", "patient", "study", "view", "label")
# MURA's folder names against the book's: the public "valid" set is the test set, as in both reports.
SPLITS = {"train": "train", "valid": "test"}

# Where Kaggle and Colab put data sets, below "/", each searched two folders deep, in this order.
MOUNTS = ("kaggle/input/*", "kaggle/input/datasets/*/*", "content", "content/drive/MyDrive")
RECIPE = ("recipe", "seed", "long_side", "text")  # what fixes the pixels of demo films, in manifest.json
DEMO_FILES = ("truth.csv", "manifest.json", "manifest.csv")  # rendered data have all three, MURA none
TEXT_REMOVED = "removed_text.json"  # in a folder whose text was removed (chapter 2)
RENDER = "Render the demo data again (mura-course demo)."
ORIGINAL = "Correct the file, or take it from the original archive."

_STUDY = (
    rf"(?:^|/)(?P<folder>{{folder}}/XR_(?P<body_part>{'|'.join(BODY_PARTS)})"
    r"/(?P<patient_folder>patient(?P<patient>\d{{1,9}}))/(?P<study_name>study\d+)_(?P<sign>positive|negative))"
)
_IMAGE = _STUDY + r"/(?P<image>image(?P<view>\d{{1,9}})\.(?i:png))$"
_LABEL = _STUDY + r"/?\s*,\s*(?P<label>[01])(?:\.0*)?$"


# --- Where the data are -------------------------------------------------------------------------------


def find_root(root: str | os.PathLike | None = None) -> Path:
    """Find the folder that holds ``train/``, ``valid/`` and the CSV files.

    Parameters
    ----------
    root : path, optional
        Where to look; the data may lie one or two folders down. Without it: the environment variable
        ``MURA_DATA``, else the places where Kaggle and Colab mount data, else the demo data in the cache
        folder, rendered on first use.

    Returns
    -------
    Path
        An absolute path.

    Raises
    ------
    DataNotFoundError
        A folder that was named holds no data.
    DataError
        It holds several data sets, or the demo data cannot be rendered.
    DiskError
        The disk refuses the demo data.
    """
    if root is not None:
        return _root_below(paths.absolute(root), "the folder asked for")
    if named := os.environ.get("MURA_DATA", "").strip():
        return _root_below(paths.absolute(named), "the environment variable MURA_DATA")
    for mount in (folder for pattern in MOUNTS for folder in sorted(Path("/").glob(pattern))):
        if found := _candidates(mount):
            return found[0]
    import mura_demo  # the renderer, needed only here

    cache, studies = paths.cache_dir(), profiles.current().demo_studies
    try:
        return mura_demo.ensure_demo(cache, studies)
    except (OSError, ValueError) as error:
        raise (DiskError if isinstance(error, OSError) else DataError)(str(error)) from error


def _root_below(folder: Path, source: str) -> Path:
    if not folder.is_dir():
        reason = "is a file. Unpack it, and name the folder" if folder.exists() else "does not exist. Mend it"
        raise DataNotFoundError(f"The data folder {folder} ({source}) {reason}.")
    found = _candidates(folder)
    if not found:
        raise DataNotFoundError(
            f"{folder} ({source}) holds no data in MURA's layout: train_image_paths.csv is neither there nor "
            "one or two folders down. Name the folder that the archive was unpacked into."
        )
    if len(found) > 1:
        raise DataError(f"{folder} ({source}) holds {len(found)} data sets. Name one of them:{few(found)}")
    return found[0]


def _candidates(folder: Path) -> list[Path]:
    """Return the data folders at the shallowest level that has any: unpacking often nests one in another."""
    level = [folder]
    for _ in range(3):
        # A folder with images but no CSV file counts: then the error can name the file that is missing.
        if found := [
            f for f in level if (f / "train_image_paths.csv").is_file() or any(f.glob("train/XR_*"))
        ]:
            return found
        inner = (f for place in level for f in place.glob("[!._]*") if f.suffix != ".partial")
        level = sorted(f for f in inner if f.is_dir())
    return []


# --- The index ----------------------------------------------------------------------------------------


def load_index(root: str | os.PathLike | None = None, *, quiet: bool = False) -> pd.DataFrame:
    """Read the index of a data set, a row an image, in the order of its CSV files.

    Parameters
    ----------
    root : path, optional
        The data folder; without it, see `find_root`.
    quiet : bool
        Do not print the line that says which data these are.

    Returns
    -------
    DataFrame
        Columns ``path`` (str, relative to the root, as on disk), ``split`` (``train`` or ``test``),
        ``body_part`` (categorical of `BODY_PARTS`), ``patient`` (int64), ``study`` (str, unique:
        ``HAND/patient00011/study1``), ``view`` (int64), ``label`` (int64: 0 normal, 1 abnormal).
        ``attrs``: ``root`` (str), ``name`` (``MURA-v1.1`` or ``MURA-demo``, and ``-no-text`` where chapter 2
        removed the text), ``is_demo``, and ``content`` (str), which fixes the pixels: see `fingerprint`.

    Raises
    ------
    DataNotFoundError
        A folder, a CSV file or images are missing.
    DataError, DiskError
        A file is wrong. Every message names the file and the remedy.
    """
    scan = Scan(find_root(root))
    if scan.problems:
        raise scan.problems[0].as_error()
    index = scan.images[list(COLUMNS)].reset_index(drop=True)
    name = "MURA-demo" if scan.is_demo else "MURA-v1.1"
    content = _record(scan.root / "manifest.json", RECIPE, RENDER) if scan.is_demo else scan.sizes()
    if (scan.root / TEXT_REMOVED).is_file():
        remedy = "Remove the text again (mura-course remove-text)."
        name += "-no-text"
        content += _record(scan.root / TEXT_REMOVED, ("detector", "versions"), remedy)
    index.attrs = {"root": str(scan.root), "name": name, "is_demo": scan.is_demo, "content": content}
    if not quiet:
        print(f"Data: {describe(index)}")
    return index


def describe(index: pd.DataFrame) -> str:
    """One line: name, synthetic or not, counts, folder."""
    kind = "synthetic radiographs" if index.attrs["is_demo"] else "real radiographs"
    counts = f"{len(index):,} images in {index['study'].nunique():,} studies"
    return printable(f"{index.attrs['name']} ({kind}), {counts}, in {paths.short_path(index.attrs['root'])}")


class Problem(NamedTuple):
    """What is wrong with a file of the data: ``kind`` in words, ``lines`` that show it, and the remedy."""

    file: Path
    kind: str
    lines: list[str]
    remedy: str
    error: type[MuraError] = DataError

    def as_error(self) -> MuraError:
        """Return the exception that says this."""
        count = f" {len(self.lines):,} lines:" if self.lines else ""
        return self.error(f"{self.file}:{count} {self.kind}. {self.remedy}{few(self.lines)}")


class Scan:
    """A data folder as its CSV files and folders show it, read as far as they can be read.

    ``images`` has the columns of the index and more; ``path`` is missing where the image is. ``problems``
    holds what is wrong, the first thing first: `load_index` raises it, `check.check` tells them all.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.unread: set[Path] = set()  # files of which a line or more could not be used
        self.files: dict[str, os.stat_result] = {}
        self.is_demo = any((root / name).is_file() for name in DEMO_FILES)
        self.images = pd.concat([self._side(*side) for side in SPLITS.items()], ignore_index=True)
        self.images["body_part"] = pd.Categorical(self.images["body_part"], categories=list(BODY_PARTS))
        people = self.images.drop_duplicates(["patient", "split"])
        both = people.loc[people["patient"].duplicated(), "patient_folder"].tolist()
        remedy = "Scores on the test set come out too good. Take their lines out of one side's CSV files."
        self._note(root, "a patient in both train and valid", both, remedy)
        for name in DEMO_FILES[: 2 * self.is_demo]:  # the films' truth and recipe: no going on without
            if not (root / name).is_file():
                remedy = f"{RENDER} If these are MURA's films, remove {', '.join(DEMO_FILES)}."
                self.problems.append(Problem(root / name, "a file of the demo data is missing", [], remedy))

    def sizes(self) -> str:
        """Return a hash over the path and the size in bytes of every image."""
        rows = sorted(f"{path}\t{self.files[path].st_size}" for path in self.images["path"])
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def _note(self, file: Path, kind: str, lines: list[str], remedy: str = ORIGINAL, **more: Any) -> None:
        if lines:
            self.problems.append(Problem(file, kind, lines, remedy, **more))

    def _side(self, folder: str, split: str) -> pd.DataFrame:
        """Read the images of one of MURA's two folders, with their labels and where they lie."""
        image_file, label_file = (self.root / f"{folder}_{k}.csv" for k in ("image_paths", "labeled_studies"))
        images = self._parse(image_file, _IMAGE, folder, "image<N>.png")
        studies = self._parse(label_file, _LABEL, folder, ",<0 or 1>")
        contradicts = studies["label"].eq("1") != studies["sign"].eq("positive")
        self._note(label_file, "a label contradicts its folder name", _lines(studies[contradicts]))
        # The sign is left out of the key: one study cannot be both positive and negative.
        twice = studies.duplicated(["body_part", "patient_folder", "study_name"], keep=False)
        self._note(label_file, "a study is listed more than once", _lines(studies[twice]))
        if label_file not in self.unread:
            unlabelled = ~images["folder"].isin(studies["folder"])
            self._note(image_file, f"a study has no label in {label_file.name}", _lines(images[unlabelled]))
        files = list_files(self.root, images["folder"].unique())
        self.files |= files
        # As the disk spells it: ``.png`` may be ``.PNG`` there.
        path, any_case = images["folder"] + "/" + images["image"], {name.lower(): name for name in files}
        images["path"] = path.where(path.isin(files.keys()), path.str.lower().map(any_case))
        absent = _lines(images[images["path"].isna()])
        remedy = "Unpack the archive again, or take these lines out."
        self._note(image_file, "images absent", absent, remedy, error=DataNotFoundError)
        twice = images["path"].duplicated(keep=False) & images["path"].notna()
        self._note(image_file, "an image is listed more than once", _lines(images[twice]))
        images["study"] = images["body_part"] + "/" + images["patient_folder"] + "/" + images["study_name"]
        images["label"] = images["sign"].eq("positive")
        return images.assign(split=split).astype({"patient": "int64", "view": "int64", "label": "int64"})

    def _parse(self, file: Path, pattern: str, folder: str, ending: str) -> pd.DataFrame:
        """Take the lines of one CSV file apart by `pattern`: a row each, by line number."""
        lines = self._read(file)
        self.is_demo |= bool(lines.str.startswith("MURA-demo/").any())
        rows = lines.str.extract(pattern.format(folder=folder)).assign(line=lines)
        wrong = rows["folder"].isna()
        form = f"{folder}/XR_<PART>/patient<NNNNN>/study<N>_<positive or negative>/{ending}"
        remedy = f"The form is {form}, with a <PART> of {', '.join(BODY_PARTS)}. {ORIGINAL}"
        self._note(file, "malformed line", _lines(rows[wrong]), remedy)
        self.unread |= {file} if wrong.any() else set()
        return rows[~wrong].copy()

    def _read(self, file: Path) -> pd.Series:
        """Read the data lines of a CSV file by number from 1: no header, blank lines or macOS's ``._*``."""
        problem = "it is empty"
        try:
            text = disk.read_bytes(file, most=1 << 30).decode("utf-8-sig")  # Excel writes a byte order mark
        except (OSError, UnicodeError) as error:
            text, problem = "", f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        lines = pd.Series(text.replace("\\", "/").replace('"', "").splitlines(), dtype="str").str.strip()
        lines.index += 1
        lines = lines[lines.ne("") & ~lines.str.contains(r"(?:^|/)(?:\._|__MACOSX/)")]
        if len(lines) and not re.search(r"/|\.png", lines.iloc[0], re.IGNORECASE):
            lines = lines.iloc[1:]  # a header: the only line that may hold no path
        if lines.empty:
            self.unread.add(file)
            error = DataError if file.exists() else DataNotFoundError
            remedy = f"It lies beside the folders train and valid. {ORIGINAL}"
            self.problems.append(Problem(file, problem, [], remedy, error))
        return lines


def list_files(root: Path, folders: Iterable[str]) -> dict[str, os.stat_result]:
    """Return size and time of every ordinary file in these `folders` below `root`, by its path there."""

    def listed(folder: str) -> list[tuple[str, os.stat_result]]:
        try:
            with os.scandir(root / folder) as entries:
                return [(f"{folder}/{e.name}".lstrip("/"), e.stat()) for e in entries if e.is_file()]
        except OSError:  # its images are then reported as absent
            return []

    # Eight at a time: on a network drive each listing waits for the network.
    with ThreadPoolExecutor(8) as pool:
        return dict(row for rows in pool.map(listed, folders) for row in rows)


def _lines(rows: pd.DataFrame) -> list[str]:
    return [f"line {number}: {line}" for number, line in rows["line"].items()]


def few(items: Collection, shown: int = 5) -> str:
    """Return the first few of `items`, each on a line of its own, and how many more there are."""
    more = [f"... and {len(items) - shown:,} more"] if len(items) > shown else []
    return "".join(f"\n  {item}" for item in [*list(items)[:shown], *more])


# --- What the index says ------------------------------------------------------------------------------


def image_path(index: pd.DataFrame, path: str) -> Path:
    """Where the image with this ``path`` of `index` lies on disk."""
    return Path(index.attrs["root"], path)


def image_paths(index: pd.DataFrame) -> list[Path]:
    """Where every image of `index` lies on disk, in the order of its rows."""
    return [image_path(index, path) for path in index["path"]]


def fingerprint(index: pd.DataFrame) -> str:
    """Twelve hex digits that name the data: another name, content, path, split or label gives others.

    The order of the rows, the folder that the data lie in and the platform do not matter.

    Notes
    -----
    The content is what fixes the pixels. Demo films: the renderer's recipe, seed, size and text. MURA: path
    and size in bytes of every image. Where text was removed: the detector and its versions, too.

    Raises
    ------
    DataError
        `index` has lost its ``attrs``, as some operations of pandas do.
    """
    if lost := {"name", "content"} - index.attrs.keys():
        raise DataError(
            f"The index has lost its attrs ({', '.join(sorted(lost))}): index.attrs = before.attrs."
        )
    rows = index["path"].astype(str) + "\t" + index["split"].astype(str) + "\t" + index["label"].astype(str)
    text = "\n".join([index.attrs["name"], index.attrs["content"], *sorted(rows)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def pixel_key(index: pd.DataFrame) -> str:
    """Name the files of `index` on this disk, whatever their split: the key of what is cached of them.

    Returns
    -------
    str
        64 hex digits; others where a file has another path, size or time of change.

    Raises
    ------
    DataNotFoundError
        Images of the index are absent.
    """
    root, names = Path(index.attrs["root"]), sorted(set(index["path"]))
    files = list_files(root, {name.rpartition("/")[0] for name in names})
    if absent := [name for name in names if name not in files]:
        raise DataNotFoundError(
            f"{root}: {len(absent):,} images are absent. Put them back, or load the index again.{few(absent)}"
        )
    rows = [f"{name}\t{files[name].st_size}\t{files[name].st_mtime_ns}" for name in names]
    return hashlib.sha256("\n".join([str(root), *rows]).encode(errors="surrogatepass")).hexdigest()


def load_truth(index: pd.DataFrame) -> pd.DataFrame:
    """Read what is in each demo film: finding, severity, boxes (chapter 1).

    Returns
    -------
    DataFrame
        A row for each image of `index`, indexed by ``path``, with the other columns of ``truth.csv``.

    Raises
    ------
    DataError
        The data are MURA, whose findings nobody has drawn, or ``truth.csv`` does not fit the index.
    """
    file = Path(index.attrs["root"], "truth.csv")
    if not index.attrs["is_demo"]:
        raise DataError(f"{index.attrs['name']} has no truth.csv: only demo data know their findings.")
    try:
        truth = pd.read_csv(file, keep_default_na=False).set_index("path", verify_integrity=True)
        return truth.loc[index["path"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be used ({error}). {RENDER}") from error


def distribution_table(index: pd.DataFrame, split: str = "train") -> pd.DataFrame:
    """Images by body part and label, exactly as the KL report's Figure 4 shows them (chapter 1).

    Returns
    -------
    DataFrame
        Columns ``type`` (``XR_ELBOW``), ``path`` (images in all), ``positives`` and ``negatives``.
    """
    images = index[index["split"].eq(split)]
    counts = images.groupby("body_part", observed=True)["label"].agg(path="size", positives="sum")
    counts["negatives"] = counts["path"] - counts["positives"]
    counts.insert(0, "type", "XR_" + counts.index.astype(str))
    return counts.reset_index(drop=True)


def _record(file: Path, keys: tuple[str, ...], remedy: str) -> str:
    """Return these entries of a JSON file as text."""
    record = disk.read_json(file, remedy)
    if absent := [key for key in keys if key not in record]:
        raise DataError(f"{file} does not say: {', '.join(absent)}. {remedy}")
    return json.dumps({key: record[key] for key in keys}, sort_keys=True)
