"""Floors: the scores that a model must beat before it has learned anything from the films (room: data).

No network here: one number counted in each file, and the body part alone. The chapters set these scores
beside those of their models (`reports.against_floors`). Reads image files, and writes only below
``<cache folder>/floors``. Imports scikit-learn, no framework.
"""

import numpy as np
import pandas as pd

from .. import paths
from ..errors import DataError
from .index import image_path, pixel_key
from .store import ahead, cached_array, decode


def floors(split: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Predict the dev and test images of a split without a network.

    Parameters
    ----------
    split : DataFrame
        What `split_dev` returns.

    Returns
    -------
    dict
        Two tables, each with the index's columns and `probability`. "white pixels": a logistic regression,
        fitted on train, whose one input is `white_fraction`. "body part alone": the fraction of abnormal
        images among the train images of that body part (among all, where train has none of it).

    Raises
    ------
    DataError
        The train images hold one label only; and as `white_fraction`.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    train = split["split"].eq("train").to_numpy()
    part, label = split["body_part"].astype(str), split.loc[train, "label"]
    if label.nunique() < 2:
        raise DataError("The train images hold one label only: no floor can be fitted. Take more images.")
    white = white_fraction(split)[:, None]
    white = white / (white[train].std() or 1)  # on any scale, the fit is penalised alike
    model = LogisticRegression().fit(white[train], label)
    prevalence = part.map(label.groupby(part[train]).mean()).fillna(label.mean())
    rows = split[~train]
    rows.attrs = split.attrs | {"weights": "no"}
    return {
        "white pixels": rows.assign(probability=model.predict_proba(white[~train])[:, 1]),
        "body part alone": rows.assign(probability=prevalence[~train]),
    }


def white_fraction(index: pd.DataFrame) -> np.ndarray:
    """Count which fraction of each image's pixels is white (255): float64 (len(index),), cached.

    The files are counted, not the resized images of a `PixelStore`: averaging over neighbours turns the
    thin strokes of a marker grey.

    Raises
    ------
    DataError
        A file is no image, or cannot be read.
    DataNotFoundError, DiskError
        A file is absent; no room, no permission, or a damaged cache.
    """
    names, rows = np.unique(index["path"].to_numpy(str), return_inverse=True)

    def count(row: int) -> np.ndarray:
        return np.array([np.mean(decode(image_path(index, names[row])) == 255)])

    file = paths.cache_dir() / "floors" / f"{index.attrs['name']}-{pixel_key(index)[:12]}" / "white.npy"
    return cached_array(file, names.shape, np.float64, ahead(count, len(names), paths.cores()))[rows]
