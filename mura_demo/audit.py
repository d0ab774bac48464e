"""Could a classifier cheat?  Scores what everything but the anatomy says about the label of demo films.

A film's frame - size, mode, border, burned-in text, grey of the background - is drawn without knowledge of
the label, so a classifier on it must not beat a coin.  Reads films and truth.csv; writes nothing.  Used by
the appendix `a_demo_radiographs` and by `benchmarks/demo_shortcuts.py`.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

KEYS = ["body_part", "patient", "label", "finding"]


def frame_features(index: pd.DataFrame) -> pd.DataFrame:
    """Measure what the frame of every film says.

    Parameters
    ----------
    index : DataFrame
        A row a demo film, columns path, body_part, patient and label; ``attrs["root"]`` is the data folder.

    Returns
    -------
    DataFrame
        A row a film: the columns `KEYS`, and what its size, mode, text and background are, as numbers.
    """
    root = Path(index.attrs["root"])
    truth = pd.read_csv(root / "truth.csv", keep_default_na=False).set_index("path").loc[index.path]
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(_frame, [root / p for p in index.path], truth.text_boxes))
    keys = (
        index[["body_part", "patient", "label"]]
        .reset_index(drop=True)
        .assign(finding=truth.finding.to_numpy())
    )
    return pd.concat([keys, pd.DataFrame(rows)], axis=1)


def _frame(path: Path, text_boxes: str) -> dict[str, float]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise OSError(f"{path} cannot be read. Render the data again: mura-course demo.")
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
        "colour": image.ndim == 3,
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


def shortcut_table(features: pd.DataFrame, samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Score gradient boosting on the frame, for all findings and for each.

    Parameters
    ----------
    features : DataFrame
        What `frame_features` returns.
    samples : int
        Resamplings of the patients behind the intervals.
    seed : int
        Of folds, model and resampling.

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
    for finding in ["all", *sorted(set(features.finding) - {"none"})]:
        films = features if finding == "all" else features.query("finding in ['none', @finding]")
        score, fold = _out_of_fold(films, seed)
        label, stratum = films.label.to_numpy(), films.body_part.astype(str) + fold.astype(str)
        patients, patient = np.unique(films.patient, return_inverse=True)
        draws = np.random.default_rng(seed).multinomial(
            len(patients), np.full(len(patients), 1 / len(patients)), samples
        )
        low, high = np.nanquantile(stratified_auroc(label, score, stratum, draws[:, patient]), [0.025, 0.975])
        auroc = stratified_auroc(label, score, stratum)[0]
        rows[finding] = {
            "auroc": auroc,
            "low": low,
            "high": high,
            "films": len(films),
            "patients": len(patients),
        }
    return pd.DataFrame(rows).T.rename_axis("finding").astype({"films": int, "patients": int})


def _out_of_fold(films: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Score of every film by a model that has seen no film of its patient, and its fold: (N,) each."""
    x, label = films.drop(columns=KEYS).astype(float), films.label.to_numpy()
    balance = 1 / films.groupby(["body_part", "label"], observed=True).label.transform("size").to_numpy()
    score, fold = np.zeros(len(films)), np.zeros(len(films), int)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(x, label, films.patient)
    with threadpool_limits(1):  # the trees are small: threads cost more than they bring
        for number, (fit, held_out) in enumerate(folds):
            model = HistGradientBoostingClassifier(max_iter=60, learning_rate=0.05, random_state=seed)
            model.fit(x.iloc[fit], label[fit], sample_weight=balance[fit] / balance[fit].mean())
            score[held_out], fold[held_out] = model.predict_proba(x.iloc[held_out])[:, 1], number
    return score, fold
