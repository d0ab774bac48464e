"""Could a classifier cheat?  Scores what everything but the anatomy says about the label of demo films.

A film's frame - size, mode, bytes, order, border, lettering, grey of the background - is drawn without
knowledge of the label, so a classifier on it must not beat a coin; nor must the number of white pixels.
`fill_box`, `box_only` and `matched_boxes` make the films for a third question: does a network look at the
finding?  Reads films and truth.csv; writes nothing.  Used by the appendix `a_demo_radiographs` and by
`benchmarks/demo_shortcuts.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from .anatomy import Scene
from .dataset import read_manifest
from .film import shutters
from .projection import Projector, finding_box
from .studies import Study, plan, set_up, with_finding

KEYS = ["body_part", "patient", "label", "finding"]
BOX = ["box_x0", "box_y0", "box_x1", "box_y1"]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 lie outside


def frame_features(index: pd.DataFrame) -> pd.DataFrame:
    """Measure what the frame of every film says.

    Parameters
    ----------
    index : DataFrame
        A row a demo film, columns path, split, body_part, patient and label; ``attrs["root"]`` is the folder.

    Returns
    -------
    DataFrame
        A row a film: the columns `KEYS`, and what its size, mode, bytes, order, lettering and background are,
        as numbers.

    Raises
    ------
    OSError
        A film cannot be read.
    """
    truth, root = _truth(index), Path(index.attrs["root"])
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(_frame, [root / p for p in index.path], truth.text_boxes))
    rows_of = index.groupby("split", observed=True).path  # MURA's splits differ in labels: count within each
    place = rows_of.cumcount() / rows_of.transform("size")
    frames = pd.DataFrame(rows).assign(order=place.to_numpy())
    return pd.concat([_keys(index, truth), frames], axis=1)


def _truth(index: pd.DataFrame) -> pd.DataFrame:
    """Read the rows of truth.csv that belong to the rows of an index, in its order."""
    truth = pd.read_csv(Path(index.attrs["root"]) / "truth.csv", keep_default_na=False)
    return truth.set_index("path").loc[list(index.path)]


def _keys(index: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    return index[KEYS[:-1]].reset_index(drop=True).assign(finding=truth.finding.to_numpy())


def _grey(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise OSError(f"{path} cannot be read. Render the data again: mura-course demo.")
    return image


def _frame(path: Path, text_boxes: str) -> dict[str, float]:
    image = _grey(path)
    grey = image if image.ndim == 2 else image[..., 0]
    height, width = grey.shape
    edges = {"top": grey[:3], "bottom": grey[-3:], "left": grey[:, :3], "right": grey[:, -3:]}
    k = max(4, min(height, width) // 20)
    corners = {"nw": grey[:k, :k], "ne": grey[:k, -k:], "sw": grey[-k:, :k], "se": grey[-k:, -k:]}
    boxes = json.loads(text_boxes)
    _, x0, y0, x1, y1 = boxes[0] if boxes else ("", np.nan, np.nan, np.nan, np.nan)
    return {
        "height": height,
        "width": width,
        "aspect": height / width,
        "channels": 1 if image.ndim == 2 else image.shape[2],
        "bytes_per_pixel": path.stat().st_size / grey.size,
        "texts": len(boxes),
        "text_x": x0 / width,
        "text_y": y0 / height,
        "text_width": x1 - x0,
        "text_height": y1 - y0,
        "letters": sum(len(box[0]) for box in boxes),
        "darkest": np.quantile(grey, 0.01),
        **{f"edge_{name}": np.median(strip) for name, strip in edges.items()},
        **{f"corner_{name}": np.median(patch) for name, patch in corners.items()},
        "corner_noise": min(patch.std() for patch in corners.values()),
    }


def stratified_auroc(
    label: np.ndarray, score: np.ndarray, stratum: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Compute the AUROC over pairs of films of the same stratum; ties count half.

    Parameters
    ----------
    label, score, stratum : ndarray (N,)
    weight : ndarray (B, N), optional
        How often each film counts in each of B resamples.

    Returns
    -------
    ndarray (B,), or (1,) without weights
        NaN where no stratum has both labels.
    """
    weight = np.ones((1, len(label))) if weight is None else weight
    won, pairs = np.zeros(len(weight)), np.zeros(len(weight))
    for s in np.unique(stratum):
        order = np.flatnonzero(stratum == s)
        order = order[np.argsort(score[order], kind="stable")]
        tied = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
        positive = np.add.reduceat(weight[:, order] * label[order], tied, axis=1)
        negative = np.add.reduceat(weight[:, order] * (1 - label[order]), tied, axis=1)
        won += (positive * (negative.cumsum(1) - negative / 2)).sum(1)
        pairs += positive.sum(1) * negative.sum(1)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def shortcut_table(
    features: pd.DataFrame, samples: int = 1000, seeds: tuple[int, ...] = (0, 1, 2)
) -> pd.DataFrame:
    """Score gradient boosting on the frame, for all findings and for each.

    Parameters
    ----------
    features : DataFrame
        What `frame_features` returns.
    samples : int
        Resamplings of the patients behind the intervals.
    seeds : tuple of int
        Of folds and model. The AUROC is the mean over them; so is that of every resample.

    Returns
    -------
    DataFrame
        A row a finding: auroc, its 95 % interval low to high, films, patients.

    Notes
    -----
    Cross-validated in five folds with no patient on two sides; the interval is a bootstrap over patients.
    Pairs are compared within a body part, since parts differ in shape and, in MURA too, in their fraction of
    abnormal films: that much any classifier may know.  And within a fold: a fold with more abnormal films
    leaves fewer to learn from, so across folds a blind model ranks worse than a coin.
    """
    rows: dict[str, dict[str, float]] = {}
    for finding, films in _by_finding(features):
        tries = [_out_of_fold(films, seed) for seed in seeds]
        rows[finding] = _interval(films, [(score, _stratum(films, fold)) for score, fold in tries], samples)
    return _table(rows)


def white_pixels(index: pd.DataFrame, samples: int = 1000) -> pd.DataFrame:
    """Score the number of pixels that equal 255: white must not mean metal.

    Parameters
    ----------
    index : DataFrame
        As `frame_features` takes it.
    samples : int
        Resamplings of the patients behind the intervals.

    Returns
    -------
    DataFrame
        A row a finding, as `shortcut_table` returns it. Pairs are compared within a body part.

    Raises
    ------
    OSError
        A film cannot be read.
    """
    root = Path(index.attrs["root"])
    with ThreadPoolExecutor() as pool:
        white = list(pool.map(lambda path: float((_grey(root / path) == 255).mean()), index.path))
    films = _keys(index, _truth(index)).assign(white=white)
    rows = {
        finding: _interval(chosen, [(chosen.white.to_numpy(), chosen.body_part.astype(str))], samples)
        for finding, chosen in _by_finding(films)
    }
    return _table(rows)


def _by_finding(films: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """All films, then those of each finding beside the normal ones."""
    kinds = sorted(set(films.finding) - {"none"})
    return [("all", films), *((kind, films[films.finding.isin(["none", kind])]) for kind in kinds)]


def _stratum(films: pd.DataFrame, fold: np.ndarray) -> np.ndarray:
    return (films.body_part.astype(str) + fold.astype(str)).to_numpy()


def _interval(films: pd.DataFrame, tries: list[tuple[np.ndarray, Any]], samples: int) -> dict[str, float]:
    """AUROC of scores within strata, mean over the tries, with its interval over patients."""
    patients, patient = np.unique(films.patient, return_inverse=True)
    even = np.full(len(patients), 1 / len(patients))
    draws = np.random.default_rng(0).multinomial(len(patients), even, samples)[:, patient]
    weight, label = np.concatenate([np.ones((1, len(films)), int), draws]), films.label.to_numpy()
    auroc = np.mean([stratified_auroc(label, score, np.asarray(s), weight) for score, s in tries], axis=0)
    low, high = np.nanquantile(auroc[1:], [0.025, 0.975])
    return {"auroc": auroc[0], "low": low, "high": high, "films": len(films), "patients": len(patients)}


def _table(rows: dict[str, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows).T.rename_axis("finding").astype({"films": int, "patients": int})


def _out_of_fold(films: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Score of every film by a model that has seen no film of its patient, and its fold: (N,) each."""
    x, label = films.drop(columns=KEYS).astype(float), films.label.to_numpy()
    balance = 1 / films.groupby(["body_part", "label"], observed=True).label.transform("size").to_numpy()
    score, fold = np.zeros(len(films)), np.zeros(len(films), int)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(x, label, films.patient)
    with threadpool_limits(1):  # the trees are small: threads cost more than they bring
        for number, (fit, held_out) in enumerate(folds):
            model = HistGradientBoostingClassifier(
                max_iter=60, learning_rate=0.05, max_leaf_nodes=8, random_state=seed
            )
            model.fit(x.iloc[fit], label[fit], sample_weight=balance[fit] / balance[fit].mean())
            score[held_out], fold[held_out] = model.predict_proba(x.iloc[held_out])[:, 1], number
    return score, fold


# ------------------------------------------------------------------------------------- films without findings
def matched_boxes(index: pd.DataFrame, cache: Path) -> pd.DataFrame:
    """Give every film a box: abnormal ones the finding's, normal ones one of a finding they might have.

    Parameters
    ----------
    index : DataFrame
        Columns path and label, of whole studies; ``attrs["root"]`` is the data folder.
    cache : Path
        As in `write_demo`.

    Returns
    -------
    DataFrame
        `index` without the films that do not show their finding, plus `BOX` in pixels and `finding`, whose
        box it is.

    Raises
    ------
    ValueError
        The folder holds no demo data of this version of the renderer.

    Notes
    -----
    A normal study is built once more with a finding that is drawn as an abnormal study's is. So the boxes of
    both labels lie on the anatomy alike, and each finding is compared with normal films that have such boxes.
    """
    root = Path(index.attrs["root"])
    made, shown, rows = read_manifest(root), set(index["path"]), []
    how = (made["seed"], made["long_side"], cache / "bones")
    for study in plan(made["studies"], made["seed"]):
        if any(f"{study.folder}/image{i}.png" in shown for i in range(1, len(study.views) + 1)):
            for finding, scene, settings in _abnormal(study, *how):
                for i, setting in enumerate(settings, start=1):
                    if box := finding_box(scene, Projector(scene, setting), shutters(setting)[0]):
                        rows.append((f"{study.folder}/image{i}.png", finding, *box))
    films = index.merge(pd.DataFrame(rows, columns=["path", "finding", *BOX]), on="path", validate="1:1")
    films.attrs = dict(index.attrs)
    return films


def _abnormal(study: Study, seed: int, long_side: int, bones: Path) -> Iterator[tuple[str, Scene, list]]:
    """Build a study with its finding, or one that it might have had: once at most."""
    for attempt in range(20):
        drawn = study if study.label else with_finding(study, study.rng(seed, 9, attempt))
        try:
            scene, settings, _ = set_up(drawn, seed, long_side, bones)
        except ValueError:  # no view of this study can show that finding: another one is drawn
            continue
        yield drawn.finding, scene, settings
        return


def _inside(image: np.ndarray, box: Box) -> Box:
    """Cut a box to the film; ValueError where nothing, or nothing else, is left."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (
        max(0, int(box[0])),
        max(0, int(box[1])),
        min(width, int(box[2])),
        min(height, int(box[3])),
    )
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"The box {tuple(box)} lies outside the film of {width} x {height} pixels.")
    return x0, y0, x1, y1


def fill_box(image: np.ndarray, box: Box, seed: int = 0) -> np.ndarray:
    """Paint a box over with what surrounds it: inpainted, with noise as strong as around it.

    Parameters
    ----------
    image : ndarray (H, W) uint8
    box : tuple of int
        x0, y0, x1, y1 in pixels.
    seed : int
        Of the noise.

    Returns
    -------
    ndarray (H, W) uint8
        A copy; outside the box nothing changes.

    Raises
    ------
    ValueError
        The box lies outside the film, or covers it.
    """
    x0, y0, x1, y1 = _inside(image, box)
    mask = np.zeros(image.shape, np.uint8)
    mask[y0:y1, x0:x1] = 1
    if mask.all():
        raise ValueError("The box covers the film: nothing is left to paint it with.")
    shrink = min(1.0, 24 / max(x1 - x0, y1 - y0))  # inpainting is slow, and smooth anyway
    height, width = image.shape
    small = (max(2, round(width * shrink)), max(2, round(height * shrink)))
    hole = (cv2.resize(mask.astype(np.float32), small, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8)
    if hole.all():
        raise ValueError("The box covers the film: nothing is left to paint it with.")
    around = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    smooth = cv2.resize(cv2.inpaint(around, hole, 3, cv2.INPAINT_TELEA), (width, height))[y0:y1, x0:x1]
    filled = image.astype(np.float32)
    filled[y0:y1, x0:x1] = smooth
    frame = cv2.dilate(mask, np.ones((9, 9), np.uint8)) - mask
    grain = (filled - cv2.GaussianBlur(filled, (0, 0), 1.5))[frame == 1].std()
    filled[y0:y1, x0:x1] += grain * np.random.default_rng(seed).standard_normal(smooth.shape)
    return np.clip(np.rint(filled), 0, 255).astype(np.uint8)


def box_only(image: np.ndarray, box: Box, margin: float = 0.25) -> np.ndarray:
    """Cut a box out of a film, with a margin that is a fraction of its longer side.

    Parameters
    ----------
    image : ndarray (H, W) uint8
    box : tuple of int
        x0, y0, x1, y1 in pixels.
    margin : float

    Returns
    -------
    ndarray (h, w) uint8
        Square where the film's edge allows it, so that resizing distorts nothing.

    Raises
    ------
    ValueError
        The box lies outside the film.
    """
    x0, y0, x1, y1 = _inside(image, box)
    half = (0.5 + margin) * max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    square = (np.floor(x - half), np.floor(y - half), np.ceil(x + half), np.ceil(y + half))
    x0, y0, x1, y1 = _inside(image, square)
    return image[y0:y1, x0:x1].copy()
