"""Scores with intervals: from predictions to one row per body part, at image or at study level.

Pure functions on DataFrames: touches no file, imports numpy, pandas and `errors` only; `reports` writes the
scores out. A radiologist reads a *study*, a network reads an *image*; a report says which of the two its
numbers are about. Chapter 1 explains both levels, chapter 6 the bootstrap.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from .errors import PredictionsError, one_of

METRICS = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "auroc_within": "AUROC within body part",
    "kappa": "Cohen's kappa",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
}
"""Column name in a report -> the name that a reader sees."""

Seeds = pd.DataFrame | Sequence[pd.DataFrame]  # predictions, or those of several seeds
FOUND = ("value", "low", "high", "resamples")
COUNTS = ("level", "n", "patients", "positives")
PROVENANCE = ("data", "is_demo", "fingerprint", "profile", "weights", "run")


def image_report(predictions: pd.DataFrame, threshold: float = 0.5, samples: int = 1000) -> pd.DataFrame:
    """Score every image on its own: one row per body part present, and OVERALL.

    Parameters
    ----------
    predictions : DataFrame
        Columns of the index (`body_part`, `patient`, `study`, `label`, ...) and `probability` of abnormal, in
        [0, 1].
    threshold : float
        An image is called abnormal where probability > threshold, as Keras and the MURA paper do.
    samples : int
        Resamples of the bootstrap, whose seed is fixed: the same predictions have the same intervals.

    Returns
    -------
    DataFrame
        Columns `level`, `n`, `patients`, `positives`, and for each metric of `METRICS` four columns:
        (metric, "value"), (metric, "low"), (metric, "high"), the value and its 95 % interval, and
        (metric, "resamples"), how many resamples the interval comes from. So ``report["auroc"]`` is a table
        of value, low, high by body part. A metric that is undefined (AUROC of one class only, ...) is NaN;
        resamples in which it is are left out of the interval and of "resamples". ``report.attrs`` says level,
        and data and weights where ``predictions.attrs`` does.

    Raises
    ------
    PredictionsError
        No rows, a missing column, probabilities or labels that cannot be scored.

    Notes
    -----
    The interval is the percentile interval of a bootstrap over PATIENTS: images of one patient resemble each
    other, and resampling single images would give intervals that are too narrow. Where all predictions are
    right, the interval is the single point 1: too few errors to bootstrap, not certainty.

    `auroc_within` compares an abnormal image only with normal images of its own body part, and pools the
    pairs of all parts: what it has above 0.5 cannot come from telling the parts apart.
    """
    return _report(check(predictions), "image", threshold, samples)


def study_report(predictions: pd.DataFrame, threshold: float = 0.5, samples: int = 1000) -> pd.DataFrame:
    """Score studies, a study's probability being the mean over its views (MURA paper, section 3).

    Parameters and result as in `image_report`; `n` and `positives` count studies.

    Raises
    ------
    PredictionsError
        As `image_report`, and where the images of one study bear two labels.
    """
    return _report(study_predictions(predictions), "study", threshold, samples)


def study_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per study: `study`, `label`, `body_part`, `patient`, `split` if given, `probability`, `views`.

    The probability is the mean over the study's views, of which there are `views`; errors as `study_report`.
    """
    predictions = check(predictions)
    studies = predictions.groupby("study", sort=True, observed=True)
    constant = ["label", "body_part", "patient"] + ["split"] * ("split" in predictions)
    for column in constant:
        if (varying := studies[column].nunique()).gt(1).any():
            raise PredictionsError(f"The study {varying.idxmax()!r} has more than one {column}: correct it.")
    # Rounded: the mean of equal probabilities is that probability, and ties between studies stay ties.
    found = {"probability": studies["probability"].mean().round(12), "views": studies.size()}
    table = studies[constant].first().assign(**found).reset_index()
    table.attrs = dict(predictions.attrs)
    return table


def paired_difference(a: Seeds, b: Seeds, level: str = "image", samples: int = 1000) -> pd.DataFrame:
    """How much better `a` is than `b`, two models' predictions of the same images, in any order.

    Parameters
    ----------
    a, b : DataFrame or sequence of DataFrame
        As for `image_report`, with `path` too. Of several, a model's seeds for example, the scores are
        averaged, not the probabilities.
    level : {"image", "study"}
        What is scored.
    samples : int
        As for `image_report`. What has a probability above 0.5 is called abnormal.

    Returns
    -------
    DataFrame
        A row per metric of `METRICS`: `value` (a's score minus b's), `low` and `high` (its 95 % interval) and
        `resamples`.

    Raises
    ------
    PredictionsError
        Other images or labels in `a` than in `b`, an unknown level, and as `image_report`, `study_report`.

    Notes
    -----
    The interval is that of the difference: each resample draws patients and scores both models on them, so
    that what is easy or hard about the images falls out (chapter 6).
    """
    one_of("level", level, ("image", "study"), PredictionsError)
    key, prepare = ("path", check) if level == "image" else ("study", study_predictions)
    sides = [[side] if isinstance(side, pd.DataFrame) else side for side in (a, b)]
    ours, theirs = ([prepare(t).sort_values(key, ignore_index=True) for t in side] for side in sides)
    first, same = ours[0], [key, "patient", "body_part", "label"]
    for other in (*ours, *theirs):
        if len(first) != len(other) or (first[same].astype(str) != other[same].astype(str)).any(axis=None):
            what = f"the same {len(first)} and {len(other)} {level}s with the same labels"
            raise PredictionsError(f"The predictions are not of {what}: compare models on one test set.")
    scorers = [(Scorer(t, 0.5), sign / len(side)) for side, sign in ((ours, 1), (theirs, -1)) for t in side]

    def differences(weights: np.ndarray) -> dict[str, np.ndarray]:
        scores = [(scorer(weights), part) for scorer, part in scorers]
        return {metric: np.sum([part * one[metric] for one, part in scores], axis=0) for metric in METRICS}

    found = _intervals(differences, scorers[0][0].patients, len(first), samples, _generator("OVERALL"))
    table = pd.DataFrame.from_dict(found, orient="index", columns=list(FOUND))
    table.attrs = {"level": level, "samples": samples}
    return table


def provenance_of(table: pd.DataFrame) -> dict:
    """Collect what a table's attrs say about where it came from; the index calls its data `name`."""
    attrs = {"data": table.attrs["name"]} if "name" in table.attrs else {}
    return attrs | {key: table.attrs[key] for key in PROVENANCE if key in table.attrs}


def check(predictions: pd.DataFrame, more: Sequence[str] = ()) -> pd.DataFrame:
    """Return the predictions with float probabilities and int labels; PredictionsError says what is wrong.

    `more` are columns that have to be there, beside those that every score needs.
    """
    needed = ["body_part", "patient", "study", *more, "label", "probability"]
    if missing := ", ".join(column for column in needed if column not in predictions):
        raise PredictionsError(f"The predictions lack {missing}: give the index's rows with `probability`.")
    if predictions.empty:
        raise PredictionsError("The predictions are empty: no image to score. Is the split's name right?")
    if gaps := [column for column in needed[:-2] if predictions[column].isna().any()]:
        raise PredictionsError(f"The predictions have empty cells in column(s) {', '.join(gaps)}.")
    probability = pd.to_numeric(predictions["probability"], errors="coerce")
    sigmoid = "Give the output after the sigmoid; NaN means that the training diverged."
    _refuse(predictions["probability"], ~probability.between(0, 1), "not between 0 and 1", sigmoid)
    _refuse(predictions["label"], ~predictions["label"].isin([0, 1]), "not 0 (normal) or 1 (abnormal)")
    if "path" in predictions:
        twice = predictions["path"].duplicated()
        _refuse(predictions["path"], twice, "predicted more than once", "Score one model at a time.")
    return predictions.assign(probability=probability.astype(float), label=predictions["label"].astype(int))


def _refuse(column: pd.Series, wrong: pd.Series, why: str, remedy: str = "") -> None:
    """Raise PredictionsError, with the first of the wrong values, if there is one."""
    if wrong.any():
        count = f"{wrong.sum()} of {len(wrong)} values of {column.name} are {why}"
        first = f"first {column[wrong].iloc[0]!r} in row {wrong.idxmax()!r}"
        raise PredictionsError(f"{count}, {first}. {remedy}")


def _report(rows: pd.DataFrame, level: str, threshold: float, samples: int) -> pd.DataFrame:
    """One row per body part and OVERALL; `rows` are images or studies."""
    parts = {str(part): group for part, group in rows.groupby("body_part", observed=True)}
    lines: dict[str, dict[tuple[str, str], object]] = {}
    for part, group in (dict(sorted(parts.items())) | {"OVERALL": rows}).items():
        scorer = Scorer(group, threshold)
        counts = (level, len(group), scorer.patients, int(group["label"].sum()))
        lines[part] = {(name, ""): count for name, count in zip(COUNTS, counts, strict=True)}
        found = _intervals(scorer, scorer.patients, len(group), samples, _generator(part))
        for metric, numbers in found.items():
            lines[part] |= {(metric, name): n for name, n in zip(FOUND, numbers, strict=True)}
    table = pd.DataFrame(lines.values(), index=pd.Index(lines, name="body_part"))
    table.columns = pd.MultiIndex.from_tuples(lines["OVERALL"])
    table.attrs |= provenance_of(rows) | {"level": level, "threshold": threshold, "samples": samples}
    return table


def _generator(part: str) -> np.random.Generator:
    """Make a stream per body part: its interval does not depend on which other parts are in the table."""
    return np.random.default_rng([0, zlib.crc32(part.encode())])


def _intervals(score: Callable, patients: int, rows: int, samples: int, rng) -> dict[str, tuple]:
    """By metric: the value, the ends of its 95 % interval, and from how many resamples they come."""
    value = {metric: v[0] for metric, v in score(np.ones((1, patients))).items()}
    blocks = [score(weights) for weights in resample(patients, rows, samples, rng)]
    found = {}
    for metric in METRICS:
        drawn = np.concatenate([block[metric] for block in blocks]) if blocks else np.empty(0)
        drawn = drawn[~np.isnan(drawn)]
        # Without a value there is nothing for an interval to be around.
        defined = len(drawn) > 0 and not np.isnan(value[metric])
        low, high = np.percentile(drawn, [2.5, 97.5]) if defined else (np.nan, np.nan)
        found[metric] = (value[metric], low, high, len(drawn))
    return found


def resample(patients: int, rows: int, samples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks of weights, float64 (resamples, patients): how often each patient was drawn."""
    block = max(1, 100_000 // max(patients, rows))  # so many weights stay in the processor's cache
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.integers(patients, size=(size, patients)) + patients * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * patients).reshape(size, patients).astype(float)


class Scorer:
    """All metrics under many weightings of the `patients` patients at once; sorts and counts only once.

    Called with weights (resamples, patients), returns {metric: float64 (resamples,)}, NaN where undefined.
    """

    def __init__(self, rows: pd.DataFrame, threshold: float) -> None:
        """Take rows with `label` 0 or 1, `probability` in [0, 1], `patient` and `body_part`."""
        label, probability = rows["label"].to_numpy(), rows["probability"].to_numpy()
        names, patient = np.unique(rows["patient"].to_numpy(), return_inverse=True)
        self.patients = len(names)
        called, abnormal = probability > threshold, label == 1
        cells = [abnormal & called, ~abnormal & called, ~abnormal & ~called, abnormal & ~called]
        # (patients, 4): each patient's true positives, false positives, true negatives, false negatives.
        self.confusion = np.stack([np.bincount(patient, cell) for cell in cells], axis=1)
        part = pd.factorize(rows["body_part"])[0]
        self.auroc = _auroc(np.zeros_like(part), label, probability, patient)
        # Of one part alone, both are the same.
        self.within = _auroc(part, label, probability, patient) if part.any() else None

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Score every row of `weights`."""
        tp, fp, tn, fn = (weights @ self.confusion).T
        n = tp + fp + tn + fn
        auroc = self.auroc(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            agreement = (tp + tn) / n
            chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / n**2
            return {
                "accuracy": agreement,
                "auroc": auroc,
                "auroc_within": self.within(weights) if self.within else auroc,
                "kappa": (agreement - chance) / np.where(chance < 1, 1 - chance, np.nan),
                "sensitivity": tp / (tp + fn),
                "specificity": tn / (tn + fp),
                "f1": 2 * tp / (2 * tp + fp + fn),
            }


def _auroc(part: np.ndarray, label: np.ndarray, probability: np.ndarray, patient: np.ndarray) -> Callable:
    """Make the function weights (resamples, patients) -> AUROC (resamples,), over pairs of one part.

    That is the weighted fraction of such (abnormal, normal) pairs in which the abnormal one is higher; ties
    count half.
    """
    order = np.lexsort((probability, part))
    part, label, probability, patient = (column[order] for column in (part, label, probability, patient))
    new = np.r_[True, np.diff(part) > 0]  # a new part begins
    ties = np.flatnonzero(new | np.r_[True, np.diff(probability) > 0])
    parts = np.flatnonzero(new[ties])

    def auroc(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, patient]
        abnormal = weights * label
        normal = weights - abnormal
        if len(ties) < len(label):
            abnormal, normal = (np.add.reduceat(side, ties, axis=1) for side in (abnormal, normal))
        below = np.cumsum(normal, axis=1) - normal / 2
        won = np.einsum("rg,rg->r", abnormal, below)
        # By part: all abnormal, all normal ones. Normal ones of earlier parts are no partners.
        abnormal, normal = (np.add.reduceat(side, parts, axis=1) for side in (abnormal, normal))
        won -= np.einsum("rp,rp->r", abnormal, np.cumsum(normal, axis=1) - normal)
        with np.errstate(invalid="ignore"):
            return won / np.einsum("rp,rp->r", abnormal, normal)

    return auroc
