"""What chapters say about scores: intervals, differences in words, tables, the data's name, shown source.

Turns the numbers of `metrics` into text and tables; reads and writes no file but the source that it shows.
Chapters 5 to 9 use it for every comparison; chapter 6 explains the intervals.
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from . import metrics
from .errors import PredictionsError, one_of
from .runs import Run

Model = Run | pd.DataFrame  # a run, or predictions as `metrics.image_report` takes them
Models = Mapping[str, Model]  # by name
BIG = 0.05
"""A difference of more than this is big, in `agreement`."""
DOCSTRING = re.compile(r'("""(?:(?!""").)+)\n(?s:.*?)"""')  # one of several lines: the first, then the others


def data_name(source: Model | Mapping[str, Any]) -> str:
    """Name the data for titles and tables: "MURA-demo, synthetic films" or "MURA-v1.1".

    Parameters
    ----------
    source : DataFrame, Run or mapping
        The index, predictions or a report (their ``attrs`` are read), a run, or its info.
    """
    about = metrics.provenance_of(source) if isinstance(source, pd.DataFrame) else source
    about = about if isinstance(about, Mapping) else about.info
    return f"{about.get('data', 'data not stated')}{', synthetic films' * bool(about.get('is_demo'))}"


def provenance(info: Mapping[str, Any], level: str | None = None, weights: bool = True) -> str:
    """Say what scores are about: "MURA-demo (synthetic films, not MURA) · image level · random weights".

    Parameters
    ----------
    info : mapping
        `Run.info`, or the attrs of a report, of predictions or of a history. What is not known is said.
    level : str, optional
        "image" or "study"; by default ``info["level"]``, if any.
    weights : bool
        False where the figure itself says which.
    """
    parts = [info.get("data", "data not stated") + " (synthetic films, not MURA)" * bool(info.get("is_demo"))]
    if level := level or info.get("level"):
        parts.append(f"{level} level")
    if weights:
        parts.append(f"{info['weights']} weights" if "weights" in info else "weights not stated")
    if "profile" in info:
        parts.append(f"profile {info['profile']}")
    return " · ".join(parts)


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """Make a table that a notebook shows: a header, and rows of as many cells (text is Markdown)."""
    lines = [header, ["---"] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def show_source(*things: Callable[..., Any] | type) -> Markdown:
    """Show functions or classes of the package as highlighted code, docstrings cut to their first line."""
    sources = [DOCSTRING.sub(r'\1"""', textwrap.dedent(inspect.getsource(thing))) for thing in things]
    blocks = zip(things, sources, strict=True)
    return Markdown("\n\n".join(f"```python\n# {of.__module__}\n{source}```" for of, source in blocks))


def image_reports(models: Models, samples: int = 1000, level: str = "image") -> dict[str, pd.DataFrame]:
    """Score each model: its report, of `metrics.image_report` or (level "study") `metrics.study_report`.

    Parameters
    ----------
    models : mapping
        Runs or predictions by name.
    samples : int
        Resamples of the bootstrap; chapters pass ``profile.bootstrap_samples``.
    level : {"image", "study"}
        What is scored.

    Raises
    ------
    PredictionsError
        An unknown level, or predictions that cannot be scored.
    """
    one_of("level", level, ("image", "study"), PredictionsError)
    report = metrics.image_report if level == "image" else metrics.study_report
    return {name: report(_predictions(model), samples=samples) for name, model in models.items()}


def interval(value: float, low: float, high: float, digits: int = 2, signed: bool = False) -> str:
    """Write a score with its interval: "0.75 [0.71, 0.79]"; without the one or the other, that is said."""
    if np.isnan(value):
        return "undefined"
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{value:{form}} " + ("[no interval]" if np.isnan(low) else f"[{low:{form}}, {high:{form}}]")


def format_report(report: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """Write a report for a reader's eye: "0.75 [0.71, 0.79]" per metric, under the metric's full name.

    Where an interval rests on fewer resamples than were drawn, the text says on how many.
    """
    drawn = report.attrs.get("samples", 0)

    def cell(value: float, low: float, high: float, resamples: float) -> str:
        few = resamples < drawn and not np.isnan(low)
        return interval(value, low, high, digits) + f" ({resamples:.0f} of {drawn} resamples)" * bool(few)

    shown = pd.DataFrame({column: report[column] for column in metrics.COUNTS}, index=report.index)
    for metric, title in metrics.METRICS.items():
        shown[title] = [cell(*row) for row in report[metric].to_numpy()]
    return shown


def overall(reports: Mapping[str, pd.DataFrame], digits: int = 2) -> pd.DataFrame:
    """Write one row a model: its scores over all body parts as `format_report` writes them."""
    return pd.DataFrame({name: format_report(one, digits).loc["OVERALL"] for name, one in reports.items()}).T


def against_floors(models: Models, floors: Models, samples: int = 1000, level: str = "image") -> pd.DataFrame:
    """Set models beside the floors that they must beat, and say which of them learned anything.

    Parameters
    ----------
    models : mapping
        Runs or predictions by name, all of the same images.
    floors : mapping
        Predictions by name, as `data.floors` makes them. Only the models' images are scored.
    samples, level
        As for `image_reports`.

    Returns
    -------
    DataFrame
        A row a model and a row a floor: "AUROC", "AUROC within body part", "Accuracy", `learned` in words.
        "yes": the AUROC is shown to lie above 0.5 and above every floor, each by the 95 % interval of a
        paired difference. Otherwise "no: interval holds 0.5", "no: interval is below 0.5", "not shown: no
        better than white pixels", or "not tested here" (undefined). A floor's row says "floor".

    Raises
    ------
    PredictionsError
        As `metrics.paired_difference`: models of other images, for example, or floors that lack some.
    """
    bars = _among(floors, next(iter(models.values())))
    shown = overall(image_reports({**models, **bars}, samples, level))
    words = [_learned(model, bars, samples, level) for model in models.values()]
    columns = [metrics.METRICS[metric] for metric in ("auroc", "auroc_within", "accuracy")]
    return shown[columns].assign(learned=words + ["floor"] * len(bars))


def format_difference(table: pd.DataFrame, metric: str = "auroc", digits: int = 3) -> str:
    """Write a row of `metrics.paired_difference` for a reader's eye: "+0.041 [+0.001, +0.080]"."""
    return interval(*table.loc[metric].to_numpy()[:3], digits=digits, signed=True)


def over_seeds(a: Sequence[Model], b: Sequence[Model], metric: str = "auroc", samples: int = 1000) -> str:
    """Say how much better `a` is than `b`, each trained once a seed.

    Parameters
    ----------
    a, b : sequence of Run or DataFrame
        As many of each, the seeds in the same order, all of the same images.
    metric, samples
        As for `difference`; the level is "image".

    Returns
    -------
    str
        "+0.05 [+0.02, +0.08] over 3 seeds (+0.03 to +0.06)": the mean of the seeds' differences, its 95 %
        interval over patients, and the lowest and the highest seed's difference.

    Raises
    ------
    PredictionsError
        No models, or not as many of each; as `difference`.

    Notes
    -----
    The interval says how far other patients could move the mean; the range says how far another seed moves
    one training. Neither contains the other.
    """
    if not len(a) == len(b) > 0:
        raise PredictionsError(f"{len(a)} models against {len(b)}: give as many of each, a pair a seed.")
    one_of("metric", metric, tuple(metrics.METRICS), PredictionsError)
    ours, theirs = ([_predictions(model) for model in side] for side in (a, b))
    table = metrics.paired_difference(ours, theirs, samples=samples)
    pairs = [metrics.paired_difference(*pair, samples=0) for pair in zip(ours, theirs, strict=True)]
    each = sorted(pair["value"].to_dict()[metric] for pair in pairs)
    seeds = f"{len(each)} seed{'s' * (len(each) > 1)} ({each[0]:+.2f} to {each[-1]:+.2f})"
    return f"{format_difference(table, metric, 2)} over {seeds}"


def difference(
    a: Model, b: Model, metric: str = "auroc", samples: int = 1000, level: str = "image", floors: Any = None
) -> str:
    """Say how much better `a` is than `b`, in words: "+0.121 [+0.075, +0.168]: better".

    Parameters
    ----------
    a, b : Run or DataFrame
        Two models' runs or predictions of the same images.
    metric, samples, level
        A key of `metrics.METRICS`; the rest as for `metrics.paired_difference`.
    floors : mapping, optional
        Where the question supposes that both models learned something: as for `against_floors`, ``{}`` for
        chance alone.

    Returns
    -------
    str
        The difference, its 95 % interval over patients, and: "better" (the interval lies above 0), "worse",
        "no difference shown", or "not tested here" where it is undefined, a model says the same to all, or
        (with `floors`) `against_floors` doesn't say of both that they learned.

    Raises
    ------
    PredictionsError
        As `metrics.paired_difference`; an unknown metric.
    """
    row, words = _compared(a, b, metric, samples, level, floors)
    return f"{interval(*row, digits=3, signed=True)}: {words}"


def agreement(claim: str, a: Model, b: Model, about_pretraining: bool = False, **options: Any) -> str:
    """Say whether a report's claim about `a` against `b` is seen here.

    Parameters
    ----------
    claim : {"better", "worse", "no big difference"}
        What the report says of `a` against `b`; big is more than `BIG`.
    a, b
        As for `difference`.
    about_pretraining : bool
        The claim supposes ImageNet's weights: models that did not start from them are not asked.
    **options
        `metric`, `samples`, `level`, `floors`, as for `difference`; without `floors`, both models must beat
        chance.

    Returns
    -------
    str
        "agrees", "disagrees", "cannot tell" (the interval holds both), or "not tested here": a model says the
        same to all, is not shown to have learned, or started from other weights.
    """
    claims = {"better": (0, np.inf), "worse": (-np.inf, 0), "no big difference": (-BIG, BIG)}
    least, most = claims[one_of("claim", claim, claims, PredictionsError)]
    options["floors"] = options.get("floors") or {}
    (_, low, high), words = _compared(a, b, **options)
    pretrained = all(_predictions(model).attrs.get("weights") == "imagenet" for model in (a, b))
    if words == "not tested here" or (about_pretraining and not pretrained):
        return "not tested here"
    if least < low and high < most:
        return "agrees"
    return "disagrees" if high < least or low > most else "cannot tell"


def fraction_right(rows: pd.DataFrame, right: Any, samples: int = 1000, digits: int = 3) -> str:
    """Say on which fraction of `rows` something is right, a router for example: "0.984 [0.972, 0.993]".

    Parameters
    ----------
    rows : DataFrame
        Rows of the index.
    right : array of bool (rows,)
        Whether it is right on each. The 95 % interval is that of `metrics.image_report`, over patients.
    """
    answered = rows.assign(label=1, probability=np.asarray(right, float))
    return str(overall({"": metrics.image_report(answered, samples=samples)}, digits)["Accuracy"].iloc[0])


def _compared(a: Any, b: Any, metric="auroc", samples=1000, level="image", floors: Any = None) -> tuple:
    """Compare a with b: the paired difference and its interval, and what the interval says."""
    one_of("metric", metric, tuple(metrics.METRICS), PredictionsError)
    a, b = _predictions(a), _predictions(b)
    row = metrics.paired_difference(a, b, level, samples).loc[metric].to_numpy()[:3].tolist()
    asked = all(len(one) == 1 or one["probability"].nunique() > 1 for one in (a, b))
    if asked and floors is not None:
        bars = _among(floors, a)
        asked = all(_learned(one, bars, samples, level) == "yes" for one in (a, b))
    if not asked or np.isnan(row[1]):
        return row, "not tested here"
    return row, "better" if row[1] > 0 else "worse" if row[2] < 0 else "no difference shown"


def _learned(model: Model, floors: Mapping[str, pd.DataFrame], samples: int, level: str) -> str:
    """Say in the words of `against_floors` whether a model learned; the floors are of the same images."""
    model = _predictions(model)

    def gain(floor: pd.DataFrame) -> np.ndarray:
        return metrics.paired_difference(model, floor, level, samples).loc["auroc"].to_numpy()

    _, low, high, _ = gain(model.assign(probability=0.5))  # a coin: its AUROC is 0.5 in every resample
    if not low > 0:
        below = f"no: interval {'holds' if high >= 0 else 'is below'} 0.5"
        return "not tested here" if np.isnan(low) else below
    unbeaten = [name for name, floor in floors.items() if not gain(floor)[1] > 0]
    return f"not shown: no better than {' and '.join(unbeaten)}" if unbeaten else "yes"


def _among(floors: Models, model: Model) -> dict[str, pd.DataFrame]:
    """Of each floor's predictions those of the images that the model was scored on."""
    tables = {name: _predictions(floor) for name, floor in floors.items()}
    return {name: floor[floor["path"].isin(_predictions(model)["path"])] for name, floor in tables.items()}


def _predictions(model: Model) -> pd.DataFrame:
    return model if isinstance(model, pd.DataFrame) else model.predictions
