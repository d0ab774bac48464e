"""Room `data`: take a development set out of the training images, or fewer patients. Chapter 3 explains it.

Reads an index and returns another; touches no file. Knows `index` and scikit-learn.
"""

import contextlib
import warnings
from fractions import Fraction

import numpy as np
import pandas as pd

from ..errors import DataError, one_of


def split_dev(index: pd.DataFrame, fraction: float = 0.1, by: str = "patient", seed: int = 0) -> pd.DataFrame:
    """Move about `fraction` of the train images to ``dev`` (KL 1.3, KN 4), stratified by body part and label.

    Parameters
    ----------
    index : DataFrame
        What `load_index` returns.
    fraction : float
        Above 0, at most 0.5.
    by : {"patient", "image"}
        "patient" keeps all images of a patient on one side; "image" is the reports' split, which lets a
        patient stand on both.
    seed : int
        The same seed gives the same split, whatever the order of the rows.

    Returns
    -------
    DataFrame
        A copy of `index` with another ``split``.

    Raises
    ------
    DataError
        A value outside its range, an index with a dev set or without train images, or too few of them.

    Notes
    -----
    The images are dealt into folds. For 0.15, three of twenty become dev, the nearest in size. A body part
    with fewer patients than folds may be missing from dev.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # slow to import

    one_of("by", by, ("patient", "image"))
    if not 0 < fraction <= 0.5:
        raise DataError(f"fraction={fraction!r}: it must lie above 0 and be at most 0.5, for example 0.1.")
    if "dev" in set(index["split"]):
        raise DataError("This index has a dev set already. Split the index that load_index returns, once.")
    train = index.loc[index["split"].eq("train")].sort_values("path")
    strata = (train["body_part"].astype(str) + train["label"].astype(str)).to_numpy()
    part = Fraction(fraction).limit_denominator(20) or Fraction(1, round(1 / fraction))
    splitter = StratifiedGroupKFold if by == "patient" else StratifiedKFold
    folds = splitter(part.denominator, shuffle=True, random_state=seed)
    dev: list[int] = []
    with warnings.catch_warnings(), contextlib.suppress(ValueError):  # scikit-learn's, on too few images
        warnings.simplefilter("ignore", UserWarning)  # fewer of a class than folds: see the notes
        sides = [rows for _, rows in folds.split(strata, strata, train["patient"].astype("int64"))]
        # By size, nearest first: a patient with very many images does not become the dev set.
        sides.sort(key=lambda rows: abs(len(rows) * part.denominator - len(train)))
        dev = [row for rows in sides[: part.numerator] for row in rows]
    if not 0 < len(dev) < len(train):
        held = f"{len(train):,} train images of {train['patient'].nunique():,} patients"
        raise DataError(f"{held} are too few for {part.denominator} folds. Take more, or another fraction.")
    in_dev = index["path"].isin(train["path"].iloc[dev])
    return index.assign(split=index["split"].mask(in_dev, "dev"))


def sample_patients(split: pd.DataFrame, fraction: float, seed: int = 0) -> pd.DataFrame:
    """Keep a random `fraction` of the train patients, at least two, and all dev and test images.

    A fraction of 1 or more keeps everything. The same seed gives the same patients. The dev set stays whole,
    because a choice made on a few films (an epoch, a threshold) is a draw of chance.
    """
    if fraction >= 1:
        return split
    train = split["split"].eq("train")
    patients = np.sort(split.loc[train, "patient"].unique())
    # Sorting draws: a choice that no NumPy version may change.
    order = np.argsort(np.random.default_rng((seed, 0)).random(len(patients)), kind="stable")
    chosen = patients[order[: max(2, round(fraction * len(patients)))]]
    return split.loc[~train | split["patient"].isin(list(chosen))]
