"""What chapters say about scores: intervals, differences in words, tables, the data's name, shown source.

Turns the numbers of `metrics` into text and tables; reads and writes no file but the source that it shows.
Chapters 5 to 9 use it for every comparison; chapter 6 explains the intervals.
"""

from __future__ import annotations

import ast
import inspect
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
BIG = 0.05
"""A difference of more than this is big, in `agreement`."""


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
    blocks = []
    for thing in things:
        lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
        documented = (ast.FunctionDef, ast.ClassDef)
        nodes = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, documented)]
        for node in sorted(nodes, key=lambda node: -node.lineno):  # from the last, so that numbers hold
            first = node.body[0]
            if ast.get_docstring(node) and first.end_lineno != first.lineno:
                lines[first.lineno - 1 : first.end_lineno] = [lines[first.lineno - 1] + '"""']
        blocks.append("\n".join(["```python", f"# {thing.__module__}", *lines, "```"]))
    return Markdown("\n\n".join(blocks))


def image_reports(
    models: Mapping[str, Model], samples: int = 1000, level: str = "image"
) -> dict[str, pd.DataFrame]:
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


def format_difference(table: pd.DataFrame, metric: str = "auroc", digits: int = 3) -> str:
    """Write a row of `metrics.paired_difference` for a reader's eye: "+0.041 [+0.001, +0.080]"."""
    return interval(*table.loc[metric].to_numpy()[:3], digits=digits, signed=True)


def difference(a: Model, b: Model, metric: str = "auroc", samples: int = 1000, level: str = "image") -> str:
    """Say how much better `a` is than `b`, in words: "+0.121 [+0.075, +0.168]: better".

    Parameters
    ----------
    a, b : Run or DataFrame
        Two models' runs or predictions of the same images.
    metric, samples, level
        A key of `metrics.METRICS`; the rest as for `metrics.paired_difference`.

    Returns
    -------
    str
        The difference, its 95 % interval over patients, and: "better" (the interval lies above 0), "worse",
        "no difference shown", or "not tested here" where it is undefined or a model says the same to all.

    Raises
    ------
    PredictionsError
        As `metrics.paired_difference`; an unknown metric.
    """
    table, words = _compared(a, b, metric, samples, level)
    return f"{format_difference(table, metric)}: {words}"


def agreement(claim: str, a: Model, b: Model, metric: str = "auroc", samples: int = 1000) -> str:
    """Say whether a report's claim about `a` against `b` is seen here.

    Parameters
    ----------
    claim : {"better", "worse", "no big difference"}
        What the report says of `a` against `b`; big is more than `BIG`.
    a, b, metric, samples
        As for `difference`.

    Returns
    -------
    str
        "agrees", "disagrees", "cannot tell" (the interval holds both), or "not tested here".
    """
    claims = {"better": (0, np.inf), "worse": (-np.inf, 0), "no big difference": (-BIG, BIG)}
    least, most = claims[one_of("claim", claim, claims, PredictionsError)]
    table, words = _compared(a, b, metric, samples, "image")
    _, low, high, _ = table.loc[metric].to_numpy()
    if words == "not tested here":
        return words
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


def _compared(a: Any, b: Any, metric: str, samples: int, level: str) -> tuple[pd.DataFrame, str]:
    """Compare a with b: the paired difference, and what its interval says."""
    one_of("metric", metric, tuple(metrics.METRICS), PredictionsError)
    a, b = _predictions(a), _predictions(b)
    table = metrics.paired_difference(a, b, level=level, samples=samples)
    _, low, high, _ = table.loc[metric].to_numpy()
    constant = any(len(p) > 1 and p["probability"].nunique() == 1 for p in (a, b))
    if constant or np.isnan(low):
        return table, "not tested here"
    return table, "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _predictions(model: Model) -> pd.DataFrame:
    return model if isinstance(model, pd.DataFrame) else model.predictions
