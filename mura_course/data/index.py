"""Room `data`: find the data and read their index, a row an image. Chapter 1 explains it.

Reads the CSV files and lists the folders of a data set in MURA's layout; opens no image, writes nothing.
Knows the foundation only: no framework, no later stage. A row comes from a path such as
``train/XR_HAND/patient00011/study1_positive/image1.png``.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from .. import disk, paths, profiles
from ..errors import DataError, DataNotFoundError, printable

BODY_PARTS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")
COLUMNS = ("path", "split", "body_part", "patient", "study", "view", "label")
# MURA's folder names against the book's: the public "valid" set is the test set, as in both reports.
SPLITS = {"train": "train", "valid": "test"}

# Where Kaggle and Colab put data sets, below "/", each searched two folders deep, in this order.
MOUNTS = ("kaggle/input/*", "kaggle/input/datasets/*/*", "content", "content/drive/MyDrive")
DEMO_FILES = ("truth.csv", "manifest.json", "manifest.csv")  # rendered data have all three, MURA none
TEXT_REMOVED = "removed_text.json"  # in a folder whose text was removed (chapter 2)
RENDER = "Render the demo data again (mura-course demo)."
CLEAN = "Remove the text again (mura-course remove-text)."
ORIGINAL = "Correct the file, or take it from the original archive."

_STUDY = (
    rf"(?:^|/)(?P<folder>{{folder}}/XR_(?P<body_part>{'|'.join(BODY_PARTS)})"
    r"/(?P<patient_folder>patient(?P<patient>\d{{1,9}}))/(?P<study_name>study\d+)_(?P<sign>positive|negative))"
)
_IMAGE = _STUDY + r"/(?P<image>image(?P<view>\d{{1,9}})\.png)$"
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
        It holds several data sets.
    OSError, ValueError
        The demo data cannot be rendered or written; the message says why.
    """
    if root is not None:
        return _root_below(paths.absolute(root), "the folder asked for")
    if named := os.environ.get("MURA_DATA", "").strip():
        return _root_below(paths.absolute(named), "the environment variable MURA_DATA")
    for mount in (folder for pattern in MOUNTS for folder in sorted(Path("/").glob(pattern))):
        if found := _candidates(mount):
            return found[0]
    import mura_demo  # the renderer, needed only here

    return mura_demo.ensure_demo(paths.cache_dir(), profiles.current().demo_studies)


def _root_below(folder: Path, source: str) -> Path:
    found = _candidates(folder)
    if not found:
        problem = "is a file" if folder.is_file() else "holds no data in MURA's layout"
        problem = problem if folder.exists() else "does not exist"
        raise DataNotFoundError(f"{folder} ({source}) {problem}. Name the folder of train_image_paths.csv.")
    if len(found) > 1:
        raise DataError(f"{folder} ({source}) holds {len(found)} data sets. Name one of them:{few(found)}")
    return found[0]


def _candidates(folder: Path) -> list[Path]:
    """Return the data folders at the shallowest level that has any: unpacking often nests one in another."""
    level = [folder]
    for _ in range(3):
        # A folder with images but no CSV file counts: then the error can name the file that is missing.
        found = [f for f in level if [*f.glob("train_image_paths.csv"), *f.glob("train/XR_*")]]
        if found:
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
        Columns ``path`` (str, relative to the root), ``split`` (``train`` or ``test``),
        ``body_part`` (categorical of `BODY_PARTS`), ``patient`` (int64), ``study`` (str, unique:
        ``HAND/patient00011/study1``), ``view`` (int64), ``label`` (int64: 0 normal, 1 abnormal).
        ``attrs``: ``root`` (str), ``name`` (``MURA-v1.1`` or ``MURA-demo``, and ``-no-text`` where chapter 2
        removed the text), ``is_demo``, and ``content`` (str), which fixes the pixels: see `fingerprint`.

    Raises
    ------
    DataNotFoundError
        The folder or images are missing.
    DataError, DiskError
        A file is wrong. Every message names the file and the remedy.
    """
    root = find_root(root)
    rows = pd.concat([_read_side(root, *side) for side in SPLITS.items()])
    people = rows.drop_duplicates(["patient", "split"])
    remedy = "Scores on the test set come out too good. Take their lines out of one side's CSV files."
    _refuse(root, people, people.duplicated("patient"), "a patient in both train and valid", remedy)
    is_demo = bool(any((root / name).is_file() for name in DEMO_FILES) or rows["from_demo"].any())
    if is_demo and not (root / "truth.csv").is_file():
        remedy = f"{RENDER} If these are MURA's films, remove {', '.join(DEMO_FILES[1:])} there."
        raise DataError(f"{root / 'truth.csv'} is missing, but the other files are of demo data. {remedy}")
    name = "MURA-demo" if is_demo else "MURA-v1.1"
    if is_demo:
        content = _record(root / "manifest.json", ("recipe", "seed", "long_side", "text"), RENDER)
    else:
        content = _hash(f"{path}\t{size}" for path, size in zip(rows["path"], rows["bytes"], strict=True))
    if (root / TEXT_REMOVED).is_file():
        name += "-no-text"
        content += _record(root / TEXT_REMOVED, ("detector", "versions"), CLEAN)
    rows["body_part"] = pd.Categorical(rows["body_part"], list(BODY_PARTS))
    index = rows.loc[:, list(COLUMNS)].reset_index(drop=True)
    index.attrs = {"root": str(root), "name": name, "is_demo": is_demo, "content": content}
    if not quiet:
        print(f"Data: {describe(index)}")
    return index


def describe(index: pd.DataFrame) -> str:
    """One line: name, synthetic or not, counts, folder."""
    kind = "synthetic radiographs" if index.attrs["is_demo"] else "real radiographs"
    counts = f"{len(index):,} images in {index['study'].nunique():,} studies"
    return printable(f"{index.attrs['name']} ({kind}), {counts}, in {paths.short_path(index.attrs['root'])}")


def _read_side(root: Path, folder: str, split: str) -> pd.DataFrame:
    """Read the images of one of MURA's two folders, with their labels and where they lie."""
    image_file, label_file = root / f"{folder}_image_paths.csv", root / f"{folder}_labeled_studies.csv"
    images = _parse(image_file, _IMAGE, folder, "image<N>.png")
    studies = _parse(label_file, _LABEL, folder, ",<0 or 1>")
    contradicts = studies["label"].eq("1") != studies["sign"].eq("positive")
    _refuse(label_file, studies, contradicts, "a label contradicts its folder name")
    # The sign is left out of the key: one study cannot be both positive and negative.
    twice = studies.duplicated(["body_part", "patient_folder", "study_name"], keep=False)
    _refuse(label_file, studies, twice, "a study is listed more than once")
    _refuse(image_file, images, ~images["folder"].isin(studies["folder"]), f"no label in {label_file.name}")
    files = list_files(root, images["folder"].unique())
    images["path"] = images["folder"] + "/" + images["image"]
    remedy = "Unpack the archive again, or take these lines out."
    _refuse(image_file, images, ~images["path"].isin(list(files)), "images absent", remedy, DataNotFoundError)
    _refuse(image_file, images, images.duplicated("path", keep=False), "an image is listed more than once")
    images["bytes"] = [files[path].st_size for path in images["path"]]
    images["study"] = images["body_part"] + "/" + images["patient_folder"] + "/" + images["study_name"]
    images["label"] = images["sign"].eq("positive")
    return images.assign(split=split).astype({"patient": "int64", "view": "int64", "label": "int64"})


def _parse(file: Path, pattern: str, folder: str, ending: str) -> pd.DataFrame:
    """Take the lines of one CSV file apart by `pattern`: a row each, by line number."""
    try:
        text = disk.read_bytes(file, most=1 << 30).decode("utf-8-sig")  # Excel writes a byte order mark
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}, beside train and valid, cannot be read ({reason}). {ORIGINAL}") from error
    lines = pd.Series(text.replace("\\", "/").replace('"', "").splitlines(), dtype="str").str.strip()
    lines.index += 1
    lines = lines[lines.ne("") & ~lines.str.contains(r"(?:^|/)(?:\._|__MACOSX/)")]
    if len(lines) and not re.search(r"/|\.png", lines.iloc[0], re.IGNORECASE):
        lines = lines.iloc[1:]  # a header: the only line that may hold no path
    if lines.empty:
        raise DataError(f"{file} is empty: it names no images or studies. {ORIGINAL}")
    rows = lines.str.extract(pattern.format(folder=folder))
    rows = rows.assign(line=lines, from_demo=lines.str.startswith("MURA-demo/"))
    form = f"{folder}/XR_<PART>/patient<NNNNN>/study<N>_<positive or negative>/{ending}"
    remedy = f"The form is {form}, with a <PART> of {', '.join(BODY_PARTS)}. {ORIGINAL}"
    _refuse(file, rows, rows["folder"].isna(), "malformed", remedy)
    return rows


def _refuse(file: Path, rows: Any, bad: Any, problem: str, remedy=ORIGINAL, error: type = DataError) -> None:
    """Raise `error` if any row is `bad`: the file, the problem with its remedy, the first few lines."""
    if bad.any():
        lines = [f"line {number}: {line}" for number, line in rows.loc[bad, "line"].items()]
        raise error(f"{file}: {len(lines):,} lines: {problem}. {remedy}{few(lines)}")


def list_files(root: Path, folders: Iterable[str]) -> dict[str, os.stat_result]:
    """Return size and time of every ordinary file in these `folders` below `root`, by its path there."""
    files = {}

    def look(folder: str) -> None:
        with contextlib.suppress(OSError), os.scandir(root / folder) as entries:  # else: images absent
            files.update({f"{folder}/{e.name}".lstrip("/"): e.stat() for e in entries if e.is_file()})

    with ThreadPoolExecutor(8) as pool:  # on a network drive each listing waits for the network
        list(pool.map(look, folders))
    return files


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
    if not {"name", "content"} <= index.attrs.keys():
        raise DataError("The index has lost its attrs. Copy them: index.attrs = before.attrs.")
    rows = index["path"].astype(str) + "\t" + index["split"].astype(str) + "\t" + index["label"].astype(str)
    return _hash([index.attrs["name"], index.attrs["content"], *rows])[:12]


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
        raise DataNotFoundError(f"{root}: {len(absent):,} images are absent. Put them back.{few(absent)}")
    rows = (f"{name}\t{files[name].st_size}\t{files[name].st_mtime_ns}" for name in names)
    return _hash([str(root), *rows])


def load_truth(index: pd.DataFrame) -> pd.DataFrame:
    """Read what is in each demo film: finding, severity, boxes (chapter 1).

    Returns
    -------
    DataFrame
        A row for each image of `index`, indexed by ``path``, with the other columns of ``truth.csv``. A film
        without a finding has NaN for its box (float64, pixels).

    Raises
    ------
    DataError
        The data are MURA, whose findings nobody has drawn, or ``truth.csv`` does not fit the index.
    """
    if not index.attrs["is_demo"]:
        raise DataError(f"{index.attrs['name']} has no truth.csv: only demo data know their findings.")
    return demo_table(index, "truth.csv")


def demo_table(index: pd.DataFrame, name: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Read these `columns` (all) of a CSV file of demo data: a row for each image of `index`, by ``path``."""
    file = Path(index.attrs["root"], name)
    try:
        content = io.BytesIO(disk.read_bytes(file))
        table = pd.read_csv(content, usecols=columns, keep_default_na=False, na_values=[""])
        return table.drop_duplicates("path").set_index("path").loc[index["path"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be used ({error}). {RENDER}") from error


def _record(file: Path, keys: tuple[str, ...], remedy: str) -> str:
    """Return these entries of a JSON file as text."""
    record = disk.read_json(file, remedy)
    if absent := [key for key in keys if key not in record]:
        raise DataError(f"{file} does not say: {', '.join(absent)}. {remedy}")
    return json.dumps({key: record[key] for key in keys}, sort_keys=True)


def _hash(lines: Iterable[str]) -> str:
    """Hash `lines` in their alphabetical order, whatever their own."""
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogatepass")).hexdigest()
