"""Find the data, read its index, split it. Chapters 1 (the index) and 3 (splits) explain it.

Reads the four CSV files and lists the folders of a data set in MURA's layout; never opens an image and
never writes, but for creating the cache folder. One index row is one image, as in
``train/XR_HAND/patient00011/study1_positive/image1.png``.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
from platformdirs import user_cache_dir

from . import profiles
from .errors import DataError, DataNotFoundError

BODY_PARTS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")
_STRATA = 2 * len(BODY_PARTS)  # body part and label
COLUMNS = ("path", "split", "body_part", "patient", "study", "view", "label")

# Where Kaggle and Colab put data sets, each searched two folders deep, in this order.
MOUNTS = ("/kaggle/input/*", "/kaggle/input/datasets/*/*", "/content", "/content/drive/MyDrive")

TEXT_REMOVED = "removed_text.json"  # in a folder that text_removal made
# MURA's folder names against the book's: the public "valid" set is the test set, as in both reports.
SPLITS = {"train": "train", "valid": "test"}

_STUDY = (
    r"(?:^|/)(?P<folder>{folder}/XR_(?P<body_part>[^/]+)/(?P<patient_folder>patient(?P<patient>\d{{1,9}}))"
    r"/(?P<study_name>study\d+)_(?P<sign>positive|negative))"
)
_IMAGE_LINE = _STUDY + r"/(?P<image>image(?P<view>\d{{1,9}})\.(?i:png))$"
_LABEL_LINE = _STUDY + r"/?\s*,\s*(?P<label>[01])(?:\.0*)?$"
_ORIGINAL = "Correct the file, or take it from the original archive."


# --- Where the data are -------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder for everything that can be made again: ``MURA_CACHE``, else the user's cache folder.

    Created if need be. Raises `DataNotFoundError` where it cannot be created or written to.
    """
    chosen = os.environ.get("MURA_CACHE", "").strip()
    folder = Path(os.path.abspath(os.path.expanduser(chosen or user_cache_dir("mura-course"))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataNotFoundError(
            f"The cache folder {folder} cannot be written to ({error.strerror}). Set the environment "
            "variable MURA_CACHE to a folder that can."
        ) from error
    return folder


def find_root(root: str | os.PathLike | None = None) -> Path:
    """The folder that holds ``train/``, ``valid/`` and the CSV files, as an absolute path.

    Looks at `root`, else at the environment variable ``MURA_DATA``, else at the places where Kaggle and
    Colab mount data, and else renders the demo data (or finds them rendered). A folder that is given may
    hold the data one or two levels down. Raises `DataNotFoundError` where a folder that was named holds
    no data, `DataError` where it holds several data sets.
    """
    if root is not None:
        return _root_below(Path(root), "the folder asked for")
    if named := os.environ.get("MURA_DATA", "").strip():
        return _root_below(Path(named), "the environment variable MURA_DATA")
    for mount in (folder for pattern in MOUNTS for folder in sorted(glob(pattern))):
        if found := _candidates(Path(mount)):
            return found[0]
    from . import radiographs  # the renderer, needed only here

    return Path(radiographs.ensure_demo(studies=profiles.current().demo_studies))


def short_path(path: str | os.PathLike) -> str:
    """`path` with the home folder written ``~``, for printing."""
    path, home = Path(path), Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def _root_below(folder: Path, source: str) -> Path:
    folder = Path(os.path.abspath(folder.expanduser()))
    if not folder.exists():
        raise DataNotFoundError(f"The data folder {folder} ({source}) does not exist. Correct its path.")
    if not folder.is_dir():
        raise DataNotFoundError(f"{folder} ({source}) is a file. Unpack it, and name the folder instead.")
    found = _candidates(folder)
    if not found:
        raise DataNotFoundError(
            f"{folder} ({source}) holds no data in MURA's layout: train_image_paths.csv is neither there nor "
            "one or two folders down. Name the folder that the archive was unpacked into."
        )
    if len(found) > 1:
        raise DataError(f"{folder} ({source}) holds {len(found)} data sets. Name one of them:{_few(found)}")
    return found[0]


def _candidates(folder: Path, depth: int = 2) -> list[Path]:
    """Data folders at the shallowest level where there are any: unpacking often nests one in another."""
    level = [folder]
    for _ in range(depth + 1):
        if found := [place for place in level if _is_root(place)]:
            return found
        level = [inner for place in level for inner in _subfolders(place)]
    return []


def _is_root(folder: Path) -> bool:
    # A folder with images but no CSV file counts: then the error can name the file that is missing.
    return os.path.isfile(folder / "train_image_paths.csv") or any((folder / "train").glob("XR_*"))


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir()]
    except OSError:  # a folder that cannot be listed holds no data for us
        return []
    # .partial: being unpacked or rendered, or left by a run that was killed.
    names = [name for name in names if not (name.startswith((".", "__MACOSX")) or name.endswith(".partial"))]
    return [folder / name for name in sorted(names)]


# --- The index ----------------------------------------------------------------------------------------


def load_index(root: str | os.PathLike | None = None, *, quiet: bool = False) -> pd.DataFrame:
    """The index of the data set at `root` (default: see `find_root`): one row per image, as in the CSV files.

    Columns: ``path`` (str, relative to the root, forward slashes, as on disk), ``split`` (``train`` or
    ``test``), ``body_part`` (categorical of `BODY_PARTS`), ``patient`` (int), ``study`` (str, unique:
    ``HAND/patient00011/study1``), ``view`` (int), ``label`` (int, 0 normal, 1 abnormal).
    ``attrs``: ``root`` (str), ``name`` (``MURA-v1.1`` or ``MURA-demo``, followed by ``-no-text`` where
    `text_removal` made the folder, so that no run on it is taken for one on the original) and ``is_demo``.

    Prints one line on which data these are, unless `quiet`. Raises `DataNotFoundError` where a folder, a
    CSV file or images are missing and `DataError` where a CSV file is wrong, naming file and remedy.
    """
    root = find_root(root)
    parts = [_read_split(root, folder, split) for folder, split in SPLITS.items()]
    index = pd.concat(parts, ignore_index=True)
    index["body_part"] = pd.Categorical(index["body_part"], categories=list(BODY_PARTS))
    index = index.astype({"patient": "int64", "view": "int64", "label": "int64"})[list(COLUMNS)]
    _check_sides(root, index)
    is_demo = (root / "truth.csv").is_file()  # MURA has no such file; rendered films always do
    name = "MURA-demo" if is_demo else "MURA-v1.1"
    if (root / TEXT_REMOVED).is_file():
        name += "-no-text"
    index.attrs = {"root": str(root), "name": name, "is_demo": is_demo}
    if not quiet:
        print(f"Data: {describe(index)}")
    return index


def describe(index: pd.DataFrame) -> str:
    """One line: name, synthetic or not, counts, folder."""
    kind = "synthetic radiographs" if index.attrs["is_demo"] else "real radiographs"
    counts = f"{len(index):,} images in {index['study'].nunique():,} studies"
    return f"{index.attrs['name']} ({kind}), {counts}, in {short_path(index.attrs['root'])}"


def _read_split(root: Path, folder: str, split: str) -> pd.DataFrame:
    """Rows of one of MURA's two folders, checked."""
    image_file, label_file = csv_files(root, folder)
    images = parse_images(image_file, folder, _refuse)
    studies = parse_labels(label_file, folder, _refuse)
    return label_images(root, image_file, images, label_file, studies, _refuse).assign(split=split)


# Lines with these problems are left out; all others are kept.
UNUSABLE_LINES = ("a path points outside the data folder", "malformed line", "unknown body part")


# Each of the next four hands what is wrong to `refuse` and goes on with the rest, if `refuse` returns:
# load_index stops at the first problem, integrity.check collects them all.


def csv_files(root: Path, folder: str) -> tuple[Path, Path]:
    """The files that list the images and the labels of one of MURA's two folders."""
    return root / f"{folder}_image_paths.csv", root / f"{folder}_labeled_studies.csv"


def parse_images(file: Path, folder: str, refuse: Callable) -> pd.DataFrame:
    """The lines of a file of image paths taken apart: one row per image, by line number."""
    return _parse(file, folder, _IMAGE_LINE, "image<N>.png", refuse)


def parse_labels(file: Path, folder: str, refuse: Callable) -> pd.DataFrame:
    """The lines of a file of labelled studies taken apart: one row per study, by line number."""
    studies = _parse(file, folder, _LABEL_LINE, ",<0 or 1>", refuse)
    studies["label"] = studies["label"].astype("int64")
    wrong = studies["label"].eq(1) != studies["sign"].eq("positive")
    refuse(file, studies, wrong, "a label contradicts its folder name", f"1 is positive. {_ORIGINAL}")
    # The sign is left out of the key: one study cannot be both positive and negative.
    twice = studies.duplicated(["body_part", "patient_folder", "study_name"], keep=False)
    refuse(file, studies, twice, "a study is listed more than once", "Keep one line for each.")
    return studies.drop_duplicates("folder")


def label_images(
    root: Path,
    image_file: Path,
    images: pd.DataFrame,
    label_file: Path,
    studies: pd.DataFrame,
    refuse: Callable,
) -> pd.DataFrame:
    """`images` with ``label``, ``study`` and ``path``, as the disk spells it (missing where absent)."""
    images = images.assign(label=images["folder"].map(studies.set_index("folder")["label"]))
    problem = f"a study has no label in {label_file.name}"
    refuse(image_file, images, images["label"].isna(), problem, _ORIGINAL)
    images["path"] = _on_disk(root, images)
    remedy = "Unpack the archive again, or take these lines out."
    refuse(image_file, images, images["path"].isna(), "images absent", remedy, DataNotFoundError)
    twice = images["path"].duplicated(keep=False) & images["path"].notna()
    refuse(image_file, images, twice, "an image is listed more than once", "Keep one line for each.")
    images["study"] = images["body_part"] + "/" + images["patient_folder"] + "/" + images["study_name"]
    return images


def _parse(file: Path, folder: str, pattern: str, ending: str, refuse: Callable) -> pd.DataFrame:
    """The lines of one CSV file taken apart by `pattern`, by line number, with the ``line`` itself."""
    lines = _read_lines(file)
    rows = lines.str.extract(pattern.format(folder=folder)).assign(line=lines)
    outside = lines.str.startswith(("/", "~", "../")) | lines.str.contains(r"/\.\./|^[A-Za-z]:")
    remedy = "Write it as MURA does: MURA-v1.1/train/..."
    refuse(file, rows, outside, "a path points outside the data folder", remedy)
    rows = rows[~outside]
    form = f"{folder}/XR_<PART>/patient<NNNNN>/study<N>_<positive or negative>/{ending}"
    refuse(file, rows, rows["folder"].isna(), "malformed line", f"The form is {form}. {_ORIGINAL}")
    rows = rows[rows["folder"].notna()]
    unknown = ~rows["body_part"].isin(BODY_PARTS)
    refuse(file, rows, unknown, "unknown body part", f"MURA's are XR_{', XR_'.join(BODY_PARTS)}.")
    return rows[~unknown].copy()


def _read_lines(file: Path) -> pd.Series:
    """The data lines of a CSV file by line number from 1: without header, blank lines and macOS's ``._*``."""
    if not file.is_file():
        raise DataNotFoundError(
            f"{file} is missing. It lies beside the folders train and valid: unpack the archive again."
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")  # tolerates the byte order mark that Excel writes
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text. {_ORIGINAL}") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\\", "/").replace('"', "")
    lines = pd.Series([line.strip() for line in text.split("\n")], dtype="str")
    lines.index += 1
    shadow = lines.str.contains("/._", regex=False) | lines.str.startswith(("._", "__MACOSX/"))
    lines = lines[lines.ne("") & ~shadow]
    if len(lines) and not re.search(r"/|\.png", lines.iloc[0], re.IGNORECASE):
        lines = lines.iloc[1:]  # a header: the only line that may hold no path
    if lines.empty:
        raise DataError(f"{file} is empty: it names no images or studies. Unpack the archive again.")
    return lines


def _on_disk(root: Path, images: pd.DataFrame) -> pd.Series:
    """Each image's path as the disk spells it (``.png`` may be ``.PNG`` there); missing where absent."""
    folders = images["folder"].unique().tolist()
    # One listing per study, eight at a time: on a network drive each one waits for the network.
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda part: _list_folders(root, part), [folders[n::8] for n in range(8)])
        found = [path for part in parts for path in part]
    path = images["folder"] + "/" + images["image"]
    any_case = {name.lower(): name for name in found}
    return path.where(path.isin(found), path.str.lower().map(any_case))


def _list_folders(root: Path, folders: list[str]) -> list[str]:
    found = []
    for folder in folders:
        try:
            found += [f"{folder}/{name}" for name in os.listdir(f"{root}/{folder}")]
        except (FileNotFoundError, NotADirectoryError):
            continue  # its images are then reported as absent
    return found


def _check_sides(root: Path, index: pd.DataFrame) -> None:
    """No study in both train and test (an error: it is the index's key), and no patient (a warning)."""
    studies = index.drop_duplicates(["study", "split"])
    both = studies["study"][studies["study"].duplicated()]
    if len(both):
        raise DataError(f"{root}: studies stand in both train and valid:{_few(both)}\nRename or remove one.")
    sides = index.groupby("patient")["split"].nunique()
    if shared := sides[sides.gt(1)].index.tolist():
        warnings.warn(
            f"{root}: {len(shared)} patients are in both train and valid, for example {shared[0]}. "
            "Scores on the test set will be too good.",
            stacklevel=3,
        )


def _refuse(
    file: Path, rows: pd.DataFrame, bad: pd.Series, problem: str, remedy: str, error=DataError
) -> None:
    """Raise `error` if any row is `bad`: the file, the problem with its remedy, the first few lines."""
    if bad.any():
        lines = (f"line {number}: {line}" for number, line in rows.loc[bad, "line"].items())
        raise error(f"{file}: {bad.sum():,} of {len(rows):,} lines: {problem}. {remedy}{_few(lines)}")


def _few(items: Iterable, shown: int = 5) -> str:
    """The first few of `items`, each on a line of its own, and how many more there are."""
    items = list(items)
    more = [f"... and {len(items) - shown:,} more"] if len(items) > shown else []
    return "".join(f"\n  {item}" for item in [*items[:shown], *more])


# --- Splitting off a development set ------------------------------------------------------------------


def split_dev(index: pd.DataFrame, fraction: float = 0.1, by: str = "patient", seed: int = 0) -> pd.DataFrame:
    """A copy of `index` in which about `fraction` of the train images are dev (KL 1.3, KN 4; chapter 3).

    Stratified by body part and label. ``by="patient"`` keeps all train images of a patient on one side;
    ``by="image"`` reproduces the reports' split, which lets a patient stand on both. The same seed gives
    the same split, whatever the order, row labels and integer types of `index`. Where a body part and label
    has few patients (fewer than about ``1 / fraction``), dev may hold none of them.

    Raises `DataError` for a fraction outside (0, 1), another `by`, an index that has a dev set already or no
    train images, and where a body part and label has fewer than two patients (images) to share out.
    """
    if by not in ("patient", "image"):
        raise DataError(f"by={by!r}: choose 'patient' or 'image'.")
    if not 0 < fraction < 1:
        raise DataError(f"fraction={fraction!r}: it must lie between 0 and 1, for example 0.1.")
    if index["split"].eq("dev").any():
        raise DataError("This index has a dev set already. Split the index that load_index returns, once.")
    train = index["split"].eq("train")
    if not train.any():
        raise DataError("This index has no train images to split.")
    unit = index["patient"].astype("int64") if by == "patient" else index["path"]
    stratum = index["body_part"].astype(str).map(BODY_PARTS.index) * 2 + index["label"].astype("int64")
    images = pd.DataFrame({"path": index["path"], "unit": unit, "stratum": stratum})[train]
    if rare := [s for s, units in images.groupby("stratum")["unit"] if units.nunique() < 2]:
        names = ", ".join(f"{BODY_PARTS[s // 2]} {('normal', 'abnormal')[s % 2]}" for s in rare)
        raise DataError(f"Too few {by}s to share between train and dev; there is only one of: {names}.")
    # In the order of paths, so that the result depends on nothing but the set of images.
    chosen = _pick(images.sort_values("path"), fraction * len(images), by, seed)
    if not 0 < len(chosen) < images["unit"].nunique():
        raise DataError(f"fraction={fraction!r}: with so few {by}s, that leaves train or dev empty.")
    return index.assign(split=index["split"].mask(train & unit.isin(chosen), "dev"))


def learning_images(split: pd.DataFrame, share: float, seed: int = 0) -> pd.DataFrame:
    """`split` with a share of its train and dev patients, drawn at random, and all of its test images."""
    if share >= 1:
        return split
    keep = split["split"].eq("test")
    for number, part in enumerate(("train", "dev")):
        patients = np.sort(split.loc[split["split"].eq(part), "patient"].unique())
        # Sorting draws: a choice that no NumPy version may change.
        order = np.argsort(np.random.default_rng((seed, number)).random(len(patients)), kind="stable")
        chosen = patients[order[: max(2, round(share * len(patients)))]]
        keep |= split["split"].eq(part) & split["patient"].isin(chosen)
    return split[keep]


def _pick(images: pd.DataFrame, target: float, by: str, seed: int) -> list:
    """Units (patients or images) that hold as nearly as possible `target` of `images`, stratified.

    Deals the units into like folds and takes, always the one that brings the strata nearest to their share,
    whole folds while they fit, then part of the next: 0.15 is three folds of twenty, 0.17 one of six and a
    little of another.
    """
    sizes = images.groupby("unit").size()
    if target <= sizes.min() / 2:
        return []
    if len(sizes) == 1:
        return sizes.index.tolist()
    share = target / len(images)
    fold = _deal(images, Fraction(share).limit_denominator(20).denominator, by, seed)
    counts = {
        number: np.bincount(rows, minlength=_STRATA) for number, rows in images["stratum"].groupby(fold)
    }
    total = sum(counts.values())
    missing, chosen = share * total, []
    while counts:
        # Rounded, so that a tie is a tie on every processor.
        best = min(counts, key=lambda n: round(((missing - counts[n]) ** 2 / total.clip(1)).sum(), 9))
        part = images[fold == best]
        if counts.pop(best).sum() >= missing.sum() + 0.5:
            part = part[part["unit"].isin(_pick(part, missing.sum(), by, seed))]
        chosen += part["unit"].unique().tolist()
        missing = missing - np.bincount(part["stratum"], minlength=_STRATA)
    return chosen


def _deal(images: pd.DataFrame, folds: int, by: str, seed: int) -> np.ndarray:
    """For each image the number of its fold, of `folds` (20 for 1), or fewer where there are few units."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # slow to import

    stratum, unit = images["stratum"].to_numpy(), images["unit"].to_numpy()
    if np.bincount(stratum).max() < 2:
        stratum = np.zeros_like(stratum)  # all different: nothing to stratify by
    folds = min(folds if folds > 1 else 20, len(np.unique(unit)), int(np.bincount(stratum).max()))
    if by == "patient":
        # Shuffled here, not there: before 1.7, StratifiedGroupKFold(shuffle=True) loses the stratification.
        values, unit = np.unique(unit, return_inverse=True)
        unit = np.random.RandomState(seed).permutation(len(values))[unit]
        splitter = StratifiedGroupKFold(folds)
    else:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    fold = np.zeros(len(images), dtype=int)
    with warnings.catch_warnings():
        # scikit-learn warns that a class has fewer members than there are folds; split_dev documents it.
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, members) in enumerate(splitter.split(stratum, stratum, unit)):
            fold[members] = number
    return fold


# --- What the index says ------------------------------------------------------------------------------


def image_path(index: pd.DataFrame, path: str) -> Path:
    """Where the image with this ``path`` of `index` lies on disk."""
    return Path(index.attrs["root"], path)


def image_paths(index: pd.DataFrame) -> list[Path]:
    """Where every image of `index` lies on disk, in the order of its rows."""
    return [image_path(index, path) for path in index["path"]]


def fingerprint(index: pd.DataFrame) -> str:
    """Twelve hex digits that change with the data's name, any path, split or label, and with nothing else.

    The order of the rows, the folder that the data lie in and the platform do not matter.
    """
    rows = index["path"].astype(str) + "\t" + index["split"].astype(str) + "\t" + index["label"].astype(str)
    text = "\n".join([index.attrs["name"], *sorted(rows)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def distribution_table(index: pd.DataFrame, split: str = "train") -> pd.DataFrame:
    """Images by body part and label, exactly as the KL report's Figure 4 shows them (chapter 1).

    Columns ``type`` (``XR_ELBOW``), ``path`` (images in all), ``positives`` and ``negatives``.
    """
    images = index[index["split"].eq(split)]
    counts = images.groupby("body_part", observed=True)["label"].agg(path="size", positives="sum")
    counts["negatives"] = counts["path"] - counts["positives"]
    counts.insert(0, "type", "XR_" + counts.index.astype(str))
    return counts.reset_index(drop=True)
