"""The book's figures that two or more chapters draw, in one style. Reads image files only in `films`.

NORMAL and ABNORMAL have the same two colours everywhere, colour-blind-safe (Okabe and Ito), and are named in
words as well. Every figure with scores bears a line that says which data, level and weights they are about,
so that scores on rendered films are not taken for scores on MURA. Functions return the Figure, which a
notebook shows where it ends a cell (elsewhere: `display(figure)`); none calls `plt.show()`. Chapter 1
introduces them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import metrics
from .errors import DataNotFoundError

NORMAL, ABNORMAL = "#0072B2", "#D55E00"  # blue, vermilion
COLOURS = (NORMAL, ABNORMAL)
"""Colour by label: COLOURS[0] normal, COLOURS[1] abnormal."""
WORDS = ("normal", "abnormal")
TRAIN, DEV, INK, FAINT = "#7F7F7F", "#000000", "#222222", "#767676"
WIDTH = 8.0  # inches: the width of the book's text column

STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.transparent": False,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.prop_cycle": plt.cycler(color=[NORMAL, ABNORMAL, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK]),
    "image.cmap": "gray",
}
PANELS = {
    "loss": ("Loss", "binary cross-entropy"),
    "accuracy": ("Accuracy", "share of images"),
    "auc": ("AUC", "area under the ROC curve"),
    "kappa": ("Cohen's kappa", "agreement beyond chance"),
}
"""What `curves` shows: column of the history -> title, and what the axis measures."""
CHANCE = {"auroc": 0.5, "auc": 0.5, "kappa": 0.0}
"""What a coin scores, where that does not depend on the data."""


def use_style() -> None:
    """Make the book's style matplotlib's own, for the figures that a chapter draws itself."""
    # The notebook's backend must start before any rc_context, which would undo its interactive mode.
    plt.close(plt.figure())
    plt.rcParams.update(STYLE)


def provenance(info: Mapping, level: str | None = None, weights: bool = True) -> str:
    """What scores are about, e.g. "MURA-demo (synthetic films, not MURA) · image level · random weights".

    info: `Run.info`, or the `attrs` of a report, of predictions or of a history. What is not known is said.
    weights: False where the figure itself says which.
    """
    data = info.get("data") or "data not stated"
    parts = [f"{data} (synthetic films, not MURA)" if info.get("is_demo") else data]
    level = level or info.get("level")
    parts += [f"{level} level"] if level else []
    if weights:
        parts.append(f"{info['weights']} weights" if info.get("weights") else "weights not stated")
    parts += [f"profile {info['profile']}"] if info.get("profile") else []
    return " · ".join(parts)


@plt.rc_context(STYLE)
def curves(history: pd.DataFrame, info: Mapping | None = None) -> Figure:
    """Loss, accuracy, AUC and Cohen's kappa by epoch, training dashed and development solid (chapters 5-9).

    history: `Run.history`. info: what `provenance` takes; by default history.attrs.
    Raises ValueError where a column is missing.
    """
    missing = [c for name in PANELS for c in (name, f"val_{name}") if c not in history]
    if missing:
        raise ValueError(f"The history lacks {', '.join(missing)}: compile with abnormality_metrics().")
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.8), sharex=True)
    epochs = history.get("epoch", pd.Series(range(1, len(history) + 1)))
    for axis, (name, (title, unit)) in zip(axes.flat, PANELS.items(), strict=True):
        axis.plot(epochs, history[name], "--o", color=TRAIN, markersize=4, label="train")
        axis.plot(epochs, history[f"val_{name}"], "-o", color=DEV, markersize=4, label="dev")
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if name in CHANCE:
            axis.axhline(CHANCE[name], color=FAINT, linewidth=0.8, linestyle=":", label="chance")
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    figure.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.get_layout_engine().set(wspace=0.06, hspace=0.05)
    return _finished(figure, provenance(info or history.attrs, "image"))


@plt.rc_context(STYLE)
def confusion(
    predictions: pd.DataFrame, level: str = "image", threshold: float = 0.5, info: Mapping | None = None
) -> Figure:
    """Truth against call: counts, and each row's percentages, which also shade the cells (chapters 5-10).

    predictions: as for `metrics.image_report`; level: "image" or "study" (mean over a study's views).
    Raises metrics.PredictionsError as the reports do, ValueError for another level.
    """
    if level not in ("image", "study"):
        raise ValueError(f"level must be 'image' or 'study', not {level!r}.")
    rows = metrics.check(predictions) if level == "image" else metrics.study_predictions(predictions)
    called = rows["probability"] > threshold
    counts = np.array([[((rows["label"] == t) & (called == c)).sum() for c in (0, 1)] for t in (0, 1)])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(4.8, 4.9))
    for truth in (0, 1):  # each row in its own class's colour
        shade = LinearSegmentedColormap.from_list("", ["white", COLOURS[truth]])
        for call in (0, 1):
            share = shares[truth, call]
            axis.add_patch(
                plt.Rectangle((call, truth), 1, 1, facecolor=shade(0.65 * share), edgecolor="white", lw=2)
            )
            text = f"{counts[truth, call]:,}\n{share:.0%}" if counts[truth].sum() else "0"
            axis.text(call + 0.5, truth + 0.5, text, ha="center", va="center", fontsize=15, color=INK)
    axis.set(xlim=(0, 2), ylim=(2, 0), aspect="equal", xticks=(0.5, 1.5), yticks=(0.5, 1.5))
    axis.set_xticklabels(WORDS)
    axis.set_yticklabels(WORDS, rotation=90, va="center")
    axis.set(xlabel=f"called (abnormal: P > {threshold:g})", ylabel="truth")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    splits = (
        ", ".join(sorted(set(map(str, rows["split"])))) + " set" if "split" in rows else "split not stated"
    )
    noun = "images" if level == "image" else "studies"
    axis.set_title(f"{level.capitalize()} level: {len(rows):,} {noun}, {splits}", pad=10)
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        for label, tick in enumerate(ticks):
            tick.set(color=COLOURS[label], fontweight="bold")
    return _finished(figure, provenance(info or metrics.provenance_of(predictions), level))


@plt.rc_context(STYLE)
def films(
    rows: pd.DataFrame,
    root: str | Path | None = None,
    ncols: int = 4,
    titles: Sequence[str] | str | None = None,
) -> Figure:
    """Radiographs side by side, framed in their label's colour (chapters 1-4, 13).

    rows: rows of the index. root: the data's folder, by default rows.attrs["root"]. titles: one per film,
    or a column of `rows`; by default the body part. The label's word follows.
    Raises DataNotFoundError: a film that is missing or unreadable.
    """
    root = Path(root if root is not None else rows.attrs.get("root", "."))
    titles = rows[titles] if isinstance(titles, str) else rows["body_part"] if titles is None else titles
    images = [_read(root / path, root) for path in rows["path"]]
    nrows = max(1, -(-len(rows) // ncols))
    figure, axes = plt.subplots(nrows, ncols, figsize=(WIDTH, (WIDTH / ncols + 0.42) * nrows), squeeze=False)
    for axis in axes.flat[len(images) :]:
        axis.axis("off")
    for axis, image, title, label in zip(axes.flat, images, titles, rows["label"], strict=False):
        axis.imshow(image)
        axis.set(xticks=(), yticks=())
        axis.spines[:].set(visible=True, color=COLOURS[label], linewidth=3)
        axis.set_title(f"{title}, {WORDS[label]}", fontsize=10, color=COLOURS[label])
        axis.set_anchor("N")  # titles of a row at one height
    return _finished(figure, None)


@plt.rc_context(STYLE)
def by_part_bars(table: pd.DataFrame, unit: str = "images", note: str | None = None) -> Figure:
    """Normal and abnormal side by side for each body part, with counts (chapters 1, 3).

    table: rows body parts, columns `normal` and `abnormal`. note: a line below, e.g. the data's name.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 3.9))
    places = np.arange(len(table))
    for label, word in enumerate(WORDS):
        bars = axis.bar(places + (label - 0.5) * 0.4, table[word], 0.38, color=COLOURS[label], label=word)
        axis.bar_label(bars, [f"{count:,}" for count in table[word]], fontsize=8.5, padding=2)
    axis.set_xticks(places, [str(part) for part in table.index])
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel(unit)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside upper right", ncols=2)
    return _finished(figure, note)


@plt.rc_context(STYLE)
def interval_bars(report: pd.DataFrame | Mapping[str, pd.DataFrame], metric: str = "auroc") -> Figure:
    """A metric's value and 95 % interval by body part, OVERALL last; one report, or several by name.

    report: of `metrics.image_report` or `study_report`. Several are set side by side in the order given.
    Raises ValueError for an unknown metric. (Chapters 5-12.)
    """
    if metric not in metrics.METRICS:
        raise ValueError(f"metric must be one of {', '.join(metrics.METRICS)}, not {metric!r}.")
    reports = report if isinstance(report, Mapping) else {"": report}
    parts = list(dict.fromkeys(part for r in reports.values() for part in r.index if part != "OVERALL"))
    parts.append("OVERALL")
    figure, axis = plt.subplots(figsize=(WIDTH, 1.3 + (0.14 + 0.19 * len(reports)) * len(parts)))
    colours = ["#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    for i, (name, one) in enumerate(reports.items()):
        scores = one[metric].reindex(parts)
        y = np.arange(len(parts)) + (i - (len(reports) - 1) / 2) * 0.7 / max(2, len(reports))
        colour = colours[i % len(colours)]
        axis.hlines(y, scores["low"], scores["high"], color=colour, linewidth=2.5)
        axis.plot(scores["value"], y, "o", color=colour, markersize=7, label=name)
        for height, text in zip(
            y, metrics.format_report(one)[metrics.METRICS[metric]].reindex(parts), strict=True
        ):
            axis.text(1.02, height, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9.5)
    axis.set_yticks(range(len(parts)), parts)
    axis.set_ylim(len(parts) - 0.5, -0.5)
    axis.axhline(len(parts) - 1.5, color=FAINT, linewidth=0.8)
    axis.set_xlabel(f"{metrics.METRICS[metric]}, 95 % interval")
    if metric in CHANCE:
        axis.axvline(CHANCE[metric], color=FAINT, linewidth=0.8, linestyle=":")
        axis.text(CHANCE[metric], -0.55, "chance", ha="center", va="bottom", fontsize=9, color=FAINT)
    if len(reports) > 1:
        figure.legend(loc="outside upper right", ncols=len(reports))
    lines = dict.fromkeys(provenance(one.attrs) for one in reports.values())
    return _finished(figure, "\n".join(lines))


@plt.rc_context(STYLE)
def overall_bars(reports: Mapping[str, pd.DataFrame], metric: str = "auroc") -> Figure:
    """One line per model: a metric over all body parts with its 95 % interval (chapters 5, 7-9).

    reports: by name, of `metrics.image_report` or `study_report`, all of one level. Black: from ImageNet's
    weights, grey: from others. Raises ValueError for an unknown metric.
    """
    if metric not in metrics.METRICS:
        raise ValueError(f"metric must be one of {', '.join(metrics.METRICS)}, not {metric!r}.")
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.42 * len(reports)))
    for y, report in enumerate(reports.values()):
        score = report.loc["OVERALL", metric]
        colour = INK if report.attrs.get("weights") == "imagenet" else FAINT
        axis.hlines(y, score["low"], score["high"], color=colour, linewidth=3)
        axis.plot(score["value"], y, "o", color=colour, markersize=8)
        text = metrics.format_report(report).loc["OVERALL", metrics.METRICS[metric]]
        axis.text(1.02, y, text, transform=axis.get_yaxis_transform(), va="center")
    axis.set_yticks(range(len(reports)), reports)
    axis.set_ylim(len(reports) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(6))  # the names may leave little room
    dotted = ""
    if metric in CHANCE:
        axis.axvline(CHANCE[metric], color=FAINT, linewidth=0.8, linestyle=":")
        dotted = "; dotted: chance"
    levels = {report.attrs["level"] for report in reports.values()}
    axis.set_xlabel(f"{metrics.METRICS[metric]} on test, {', '.join(levels)} level, 95 % interval{dotted}")
    about = dict.fromkeys(provenance(report.attrs, weights=False) for report in reports.values())
    return _finished(figure, "\n".join(about))


def _read(file: Path, root: Path) -> np.ndarray:
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None:
        raise DataNotFoundError(f"{file} is missing or no image. Is {root} the data's folder?")
    return image[..., ::-1]


def _finished(figure: Figure, note: str | None) -> Figure:
    """With the note below; closed for pyplot, so that a notebook shows it once, as the value of the cell."""
    if note:
        # Lines break after a dot between two parts only.
        text = note.replace(" ", "\xa0").replace("·\xa0", "· ")
        lines = [textwrap.fill(line, int(14 * figure.get_figwidth())) for line in text.splitlines()]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9, color=FAINT)
    plt.close(figure)
    return figure
