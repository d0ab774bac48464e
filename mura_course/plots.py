"""The book's figures that two or more chapters draw, in one style. Reads image files, only in `films`.

NORMAL and ABNORMAL have the same two colours everywhere, colour-blind-safe (Okabe and Ito), and are named in
words as well. Every figure with scores bears a line that says which data, level and weights they are about,
so that scores on rendered films are not taken for scores on MURA. Functions return the Figure, which a
notebook shows where it ends a cell (elsewhere: ``display(figure)``); none calls ``plt.show()``. Chapter 1
introduces them.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import metrics, reports
from .data.store import decode
from .errors import PredictionsError, one_of

Tables = pd.DataFrame | Mapping[str, pd.DataFrame]  # one, or several by name

NORMAL, ABNORMAL = "#0072B2", "#D55E00"  # blue, vermilion
COLOURS = (NORMAL, ABNORMAL)
"""Colour by label: COLOURS[0] normal, COLOURS[1] abnormal."""
WORDS = ("normal", "abnormal")
TRAIN, DEV, INK, FAINT = "#7F7F7F", "#000000", "#222222", "#767676"
MODELS = ("#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#999999", "#6A3D9A")
"""Colour by model, none of them a label's."""
WIDTH = 8.0  # inches: the width of the book's text column

STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "savefig.transparent"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white"),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10),
    **{"figure.constrained_layout.use": True, "figure.dpi": 110, "font.size": 11, "axes.titlesize": 12},
    **{"axes.prop_cycle": cycler(color=[*COLOURS, *MODELS[1:5], INK]), "image.cmap": "gray"},
}
styled: Any = plt.rc_context(STYLE)
"""Decorator of a function that draws in the book's style and leaves the caller's settings alone."""

PANELS = {
    "loss": ("Loss", "cross-entropy", 0.0),
    "accuracy": ("Accuracy", "fraction of images", 0.47),
    "auc": ("AUC", "area under the curve", 0.47),
    "kappa": ("Cohen's kappa", "beyond chance", -0.04),
    "f1": ("Macro F1", "mean over body parts", 0.0),
}
"""Panels of `learning_curves`: column of the history -> title, what the axis measures, where it starts."""
CHANCE = {"auroc": 0.5, "auroc_within": 0.5, "auc": 0.5, "kappa": 0.0}
"""What a coin scores, where that does not depend on the data."""
HIGHEST_LOSS = 2.0  # a first epoch's loss may be many times as high, and would flatten all the others


def use_style() -> None:
    """Make the book's style matplotlib's own, for the figures that a chapter draws itself."""
    # The notebook's backend must start before any rc_context, which would undo its interactive mode.
    plt.close(plt.figure())
    plt.rcParams.update(STYLE)


@styled
def learning_curves(histories: Tables, panels: Sequence[str] | None = None) -> Figure:
    """Draw loss, accuracy, AUC, ... by epoch: train dashed, dev solid, one colour a run (chapters 5-9).

    Parameters
    ----------
    histories : DataFrame or mapping
        `Run.history`, or several by name. Where a history has stages, a dotted line parts them.
    panels : sequence of str, optional
        Keys of `PANELS`; by default those that every history has.

    Raises
    ------
    PredictionsError
        A history lacks a panel's column, or there is nothing to show.
    """
    by_name = _by_name(histories)
    panels = panels or [panel for panel in PANELS if all(panel in one for one in by_name.values())]
    lacking = {panel for panel in panels for one in by_name.values() if panel not in one}
    if lacking or not panels:
        raise PredictionsError(f"Not every history has {', '.join(sorted(lacking)) or 'one of PANELS'}.")
    figure, axes = _grid(len(panels), min(2, len(panels)), WIDTH, 2.4, 1.2)
    for axis, panel in zip(axes, panels, strict=True):
        for number, (name, history) in enumerate(by_name.items()):
            colour = MODELS[number % len(MODELS)]
            _curves(axis, history, panel, (TRAIN if len(by_name) == 1 else colour, colour), name)
        _panel(axis, panel)
    lines = "dashed: train, solid: dev" + ", dotted: chance" * bool(CHANCE.keys() & set(panels))
    _legend(figure, axes[0], by_name, lines)
    return _finished(figure, _about(by_name.values(), "image"))


@styled
def confusion_matrices(predictions: Tables, level: str = "image", threshold: float = 0.5) -> Figure:
    """Set truth against call, a panel a model: counts, and each row's percentages, which shade the cells.

    The shades mean the same in every panel. (Chapters 5-10.)

    Parameters
    ----------
    predictions : DataFrame or mapping
        As for `metrics.image_report`, or several by name.
    level : {"image", "study"}
        What is counted; a study's probability is the mean over its views.
    threshold : float
        Called abnormal is what has a probability above it.

    Raises
    ------
    PredictionsError
        As the reports, and for another level.
    """
    one_of("level", level, ("image", "study"), PredictionsError)
    by_name = _by_name(predictions)
    ncols = min(4, len(by_name))
    side = WIDTH / max(2, ncols)
    figure, axes = _grid(len(by_name), ncols, ncols * side + 0.4, side + 0.4, 0.8)
    for axis, (name, table) in zip(axes, by_name.items(), strict=True):
        rows = metrics.check(table) if level == "image" else metrics.study_predictions(table)
        _matrix(axis, rows, threshold, 18 - 2 * ncols)
        split = f", {'+'.join(sorted(set(rows['split'])))} set" if "split" in rows else ""
        count = f"{len(rows):,} {'images' if level == 'image' else 'studies'}{split}"
        axis.set(title="\n".join([*textwrap.wrap(name, int(9 * side)), count]), ylabel="truth")
        axis.set_xlabel(f"called (abnormal: P > {threshold:.3g})", fontsize=13 - ncols)
        axis.label_outer()
    return _finished(figure, _about(by_name.values(), level))


@styled
def films(rows: pd.DataFrame, root: str | Path | None = None, ncols: int = 4, titles: Any = None) -> Figure:
    """Show radiographs side by side, framed in their label's colour (chapters 1-4).

    Parameters
    ----------
    rows : DataFrame
        Rows of the index.
    root : path, optional
        The data's folder; by default ``rows.attrs["root"]``.
    ncols : int
        Films in a row.
    titles : str or sequence of str, optional
        A column of `rows`, or one title a film; by default the body part. The label's word follows.

    Raises
    ------
    DataError
        A film does not exist or cannot be read.
    """
    root = Path(root if root is not None else rows.attrs.get("root", "."))
    headings = rows[titles or "body_part"] if titles is None or isinstance(titles, str) else titles
    images = [decode(root / path, cv2.IMREAD_COLOR) for path in rows["path"]]
    figure, axes = _grid(len(rows), ncols, WIDTH, WIDTH / ncols + 0.42)
    for axis, image, title, label in zip(axes, images, headings, rows["label"], strict=True):
        axis.imshow(image[..., ::-1])
        axis.set(xticks=(), yticks=(), anchor="N")  # titles of a row at one height
        axis.spines[:].set(visible=True, color=COLOURS[label], linewidth=3)
        axis.set_title(f"{title}, {WORDS[label]}", fontsize=10, color=COLOURS[label])
    return _finished(figure, None)


@styled
def interval_bars(report: Tables, metric: str = "auroc") -> Figure:
    """Draw a metric's value and 95 % interval by body part, OVERALL last (chapters 5-12).

    Parameters
    ----------
    report : DataFrame or mapping
        Of `metrics.image_report` or `study_report`; several by name are set side by side.
    metric : str
        A key of `metrics.METRICS`; PredictionsError for any other.
    """
    by_name = _by_name(report)
    parts = dict.fromkeys(part for one in by_name.values() for part in one.index if part != "OVERALL")
    tables = {name: one.reindex([*parts, "OVERALL"]) for name, one in by_name.items()}
    return _finished(_bars(tables, metric, MODELS), _about(by_name.values()))


@styled
def overall_bars(models: Mapping[str, pd.DataFrame], metric: str = "auroc") -> Figure:
    """Draw a line a model: a metric over all body parts with its 95 % interval (chapters 5, 7-9).

    Parameters
    ----------
    models : mapping
        Reports by name, of `metrics.image_report` or `study_report`, all of one level. Black: from ImageNet's
        weights, grey: from others.
    metric : str
        A key of `metrics.METRICS`; PredictionsError for any other.
    """
    table = pd.concat([one.loc[["OVERALL"]].set_axis([name]) for name, one in models.items()])
    table.attrs = next(iter(models.values())).attrs
    colours = [INK if one.attrs.get("weights") == "imagenet" else FAINT for one in models.values()]
    return _finished(_bars({"": table}, metric, [colours]), _about(models.values()))


def _grid(count: int, ncols: int, width: float, height: float, more: float = 0) -> tuple[Figure, list[Axes]]:
    """Make axes in rows of `ncols`: a row is `height` inches high, the figure `more` than all rows."""
    nrows = max(1, -(-count // ncols))
    figure, axes = plt.subplots(nrows, ncols, figsize=(width, nrows * height + more), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _by_name(tables: Tables) -> Mapping[str, pd.DataFrame]:
    return {"": tables} if isinstance(tables, pd.DataFrame) else tables


def _curves(axis: Axes, history: pd.DataFrame, panel: str, colours: tuple[str, str], name: str) -> None:
    """One run's curves in one panel, train and dev, and dotted lines between its stages."""
    for column, line, colour in zip((panel, f"val_{panel}"), ("--", "-o"), colours, strict=True):
        if column in history:
            shown: Any = {"color": colour, "label": name * (line == "-o"), "ms": 4, "lw": 1.4}
            axis.plot(history["epoch"], history[column], line, **shown)
    if "stage" in history:
        for last in history.groupby("stage")["epoch"].max().iloc[:-1]:
            axis.axvline(last + 0.5, color=colours[1], linewidth=0.8, linestyle=":")


def _panel(axis: Axes, panel: str) -> None:
    """Title, units, floor and chance line of one panel of learning curves."""
    title, unit, floor = PANELS[panel]
    low, high = axis.get_ylim()
    low = min(low, floor) if floor else 0.0
    if panel == "loss" and high > HIGHEST_LOSS:
        title, high = f"{title} (cut off at {HIGHEST_LOSS:g})", HIGHEST_LOSS
    axis.set(title=title, xlabel="epoch", ylabel=unit, ylim=(low, max(high, floor + 0.1)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel in CHANCE:
        axis.axhline(CHANCE[panel], color=FAINT, linewidth=0.8, linestyle=":")


def _matrix(axis: Axes, rows: pd.DataFrame, threshold: float, fontsize: int) -> None:
    """One confusion matrix, each row in its own class's colour."""
    counts = np.zeros((2, 2), int)
    np.add.at(counts, (rows["label"], (rows["probability"] > threshold).astype(int)), 1)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # White for 0 %, two thirds of the way to the class's colour for 100 %: dark text stays readable.
    axis.imshow(1 - 0.65 * fractions[..., None] * (1 - np.array([[to_rgb(c)] for c in COLOURS])))
    for truth, call in np.ndindex(2, 2):
        text = f"{counts[truth, call]:,}\n{fractions[truth, call]:.0%}" if counts[truth].sum() else "0"
        axis.text(call, truth, text, ha="center", va="center", fontsize=fontsize)
    axis.set_xticks((0, 1), WORDS)
    axis.set_yticks((0, 1), WORDS, rotation=90, va="center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _bars(tables: Mapping[str, pd.DataFrame], metric: str, colours: Sequence) -> Figure:
    """Points with intervals, in figures beside the axes, too; a colour a table, or a list: a colour a row."""
    one_of("metric", metric, tuple(metrics.METRICS), PredictionsError)
    rows, title = next(iter(tables.values())).index, metrics.METRICS[metric]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.3 + (0.14 + 0.19 * len(tables)) * len(rows)))
    for i, ((name, table), colour) in enumerate(zip(tables.items(), colours, strict=False)):
        y = np.arange(len(rows)) + (i - (len(tables) - 1) / 2) * 0.7 / max(2, len(tables))
        axis.hlines(y, table[metric]["low"], table[metric]["high"], color=colour, linewidth=2.5)
        axis.scatter(table[metric]["value"], y, color=colour, s=45, label=name)
        for height, text in zip(y, reports.format_report(table)[title], strict=True):
            axis.text(1.02, height, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9.5)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=f"{title}, 95 % interval{'; dotted: chance' * (metric in CHANCE)}")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(6))  # the names may leave little room
    if metric in CHANCE:
        axis.axvline(CHANCE[metric], color=FAINT, linewidth=0.8, linestyle=":")
    if len(tables) > 1:
        _legend(figure, axis, tables)
    return figure


def _legend(figure: Figure, axis: Axes, names: Mapping[str, Any], title: str | None = None) -> None:
    """Write the names above the figure, as many in a line as find room."""
    ncols = max(1, 96 // (8 + max(map(len, names))))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=ncols, title=title)


def _about(tables: Iterable[pd.DataFrame], level: str | None = None) -> str:
    """Lines of provenance; weights only where all have the same (elsewhere the names say which)."""
    infos: list[Any] = [table.attrs | metrics.provenance_of(table) for table in tables]
    same = len({one.get("weights") for one in infos}) == 1
    return "\n".join(dict.fromkeys(reports.provenance(one, level, same) for one in infos))


def _finished(figure: Figure, note: str | None) -> Figure:
    """With the note below; closed for pyplot, so that a notebook shows it once, as the value of the cell."""
    if note:
        lines = [textwrap.fill(line, int(14 * figure.get_figwidth())) for line in note.splitlines()]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9, color=FAINT)
    plt.close(figure)
    return figure
