"""plots.py: what the figures say (texts, colours, axes), drawn without a display."""

import matplotlib

matplotlib.use("Agg")

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

from mura_course import errors, metrics, plots

DEMO = {"data": "MURA-demo", "is_demo": True, "weights": "random", "profile": "smoke"}
DEMO_LINE = "MURA-demo (synthetic films, not MURA) · {} level · random weights · profile smoke"


@pytest.fixture
def predictions():
    """Two views a study; by image 3 of 4 normal and 1 of 4 abnormal right, by study 2 of 2 and 0 of 2."""
    table = pd.DataFrame({"label": [0, 0, 0, 0, 1, 1, 1, 1], "patient": [1, 1, 2, 2, 3, 3, 4, 4]})
    table["probability"] = [0.1, 0.2, 0.3, 0.6, 0.9, 0.05, 0.5, 0.4]
    table["study"] = "HAND/patient" + table["patient"].astype(str) + "/study1"
    table["body_part"], table["split"] = ["HAND"] * 6 + ["WRIST"] * 2, "test"
    table["path"] = [f"{i}.png" for i in range(8)]
    table.attrs = DEMO
    return table


@pytest.fixture
def history():
    columns = [name for panel in plots.PANELS for name in (panel, f"val_{panel}")]
    table = pd.DataFrame(np.random.default_rng(0).random((5, 8)), columns=columns)
    table.insert(0, "epoch", range(1, 6))
    table.attrs = DEMO
    return table


def texts(figure):
    figure.draw_without_rendering()
    found = [text.get_text().replace("\xa0", " ") for text in figure.findobj(matplotlib.text.Text)]
    return [text.replace("\n", " ") for text in found if text]


def test_provenance_says_what_is_known_and_what_is_not():
    assert plots.provenance(DEMO, "study") == DEMO_LINE.format("study")
    mura = {"data": "MURA-v1.1", "is_demo": False, "weights": "ImageNet", "level": "image"}
    assert plots.provenance(mura) == "MURA-v1.1 · image level · ImageNet weights"
    assert plots.provenance({}) == "data not stated · weights not stated"


def test_curves_show_train_and_dev_in_four_panels(history):
    figure = plots.curves(history)
    assert [axis.get_title() for axis in figure.axes] == ["Loss", "Accuracy", "AUC", "Cohen's kappa"]
    for axis, name in zip(figure.axes, plots.PANELS, strict=True):
        train, dev = axis.lines[:2]
        np.testing.assert_array_equal(train.get_ydata(), history[name])
        np.testing.assert_array_equal(dev.get_ydata(), history[f"val_{name}"])
        assert train.get_linestyle() == "--" and dev.get_linestyle() == "-"
        assert train.get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert axis.get_ylabel()
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "epoch", "epoch"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "dev", "chance"]
    assert DEMO_LINE.format("image") in texts(figure)
    # Lines that are not about a class do not wear a class's colour.
    assert not {to_hex(line.get_color()).upper() for a in figure.axes for line in a.lines} & set(
        plots.COLOURS
    )


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_epochs_are_whole_numbers(history, epochs):
    long = pd.concat([history] * 6, ignore_index=True).head(epochs).assign(epoch=range(1, epochs + 1))
    figure = plots.curves(long)
    figure.draw_without_rendering()
    low, high = figure.axes[2].get_xlim()
    ticks = [tick for tick in figure.axes[2].get_xticks() if low <= tick <= high]
    assert ticks and all(float(tick).is_integer() for tick in ticks)


def test_curves_name_the_missing_columns(history):
    with pytest.raises(ValueError, match="lacks kappa, val_kappa"):
        plots.curves(history.drop(columns=["kappa", "val_kappa"]))


@pytest.mark.parametrize(
    ("level", "cells", "title"),
    [
        ("image", ["3\n75%", "1\n25%", "3\n75%", "1\n25%"], "Image level: 8 images, test set"),
        ("study", ["2\n100%", "0\n0%", "2\n100%", "0\n0%"], "Study level: 4 studies, test set"),
    ],
)
def test_confusion_counts_and_says_what_about(predictions, level, cells, title):
    figure = plots.confusion(predictions, level)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == cells
    assert axis.get_title() == title
    assert axis.get_ylabel() == "truth" and "P > 0.5" in axis.get_xlabel()
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [(label.get_text(), label.get_color()) for label in labels] == [
            ("normal", plots.NORMAL),
            ("abnormal", plots.ABNORMAL),
        ]
    assert DEMO_LINE.format(level) in texts(figure)


def test_confusion_shades_by_row_and_stays_readable(predictions):
    figure = plots.confusion(predictions.assign(probability=[0.0] * 4 + [1.0] * 4))
    faces = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert to_hex(faces[1]) == to_hex(faces[2]) == "#ffffff"  # nothing there

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for face in (faces[0], faces[3]):
        assert (luminance(face) + 0.05) / (luminance(plots.INK) + 0.05) > 4.5


def test_confusion_of_one_class_has_an_empty_row(predictions):
    figure = plots.confusion(predictions.query("label == 0"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["3\n75%", "1\n25%", "0", "0"]


def test_scores_of_unknown_origin_say_so(predictions):
    predictions.attrs = {}
    assert any("data not stated" in text for text in texts(plots.confusion(predictions)))
    with pytest.raises(ValueError, match="'image' or 'study', not 'patient'"):
        plots.confusion(predictions, "patient")


@pytest.fixture
def films(tmp_path):
    rows = pd.DataFrame({"body_part": ["HAND", "WRIST", "ELBOW"], "label": [0, 1, 0], "view": [1, 2, 1]})
    rows["path"] = [f"{i}.png" for i in range(3)]
    for i, path in enumerate(rows["path"]):
        cv2.imwrite(str(tmp_path / path), np.full((20 + i, 30), 40 * i, np.uint8))
    rows.attrs = {"root": str(tmp_path)}
    return rows


def test_films_are_framed_in_their_labels_colour_and_word(films):
    figure = plots.films(films, ncols=2)
    assert [axis.get_title() for axis in figure.axes] == [
        "HAND, normal",
        "WRIST, abnormal",
        "ELBOW, normal",
        "",
    ]
    for axis, label, height in zip(figure.axes, films["label"], (20, 21, 22), strict=False):
        assert {spine.get_edgecolor() for spine in axis.spines.values()} == {
            (*to_rgb(plots.COLOURS[label]), 1.0)
        }
        assert axis.images[0].get_array().shape == (height, 30, 3)
    assert not figure.axes[3].axison
    assert [a.get_title() for a in plots.films(films, titles="view").axes][:2] == ["1, normal", "2, abnormal"]
    assert plots.films(films, titles=["a", "b", "c"]).axes[2].get_title() == "c, normal"


def test_a_missing_film_is_named(films, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(errors.DataNotFoundError, match="1.png is missing or no image"):
        plots.films(films)
    with pytest.raises(errors.DataNotFoundError, match="elsewhere.0.png"):
        plots.films(films, root="elsewhere")


def test_bars_bear_counts_and_the_two_colours():
    table = pd.DataFrame({"normal": [2925, 3], "abnormal": [2006, 0]}, index=["ELBOW", "HAND"])
    figure = plots.by_part_bars(table, unit="studies", note="MURA-v1.1, training set")
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == [2925, 3, 2006, 0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axis.patches[::2]] == [
        plots.NORMAL,
        plots.ABNORMAL,
    ]
    assert axis.get_ylabel() == "studies"
    assert {"2,925", "2,006", "ELBOW", "HAND", "normal", "abnormal", "MURA-v1.1, training set"} <= set(
        texts(figure)
    )


def test_intervals_are_those_of_the_report(predictions):
    report = metrics.image_report(predictions, samples=100)
    figure = plots.interval_bars(report, "accuracy")
    (axis,) = figure.axes
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert ticks == ["HAND", "WRIST", "OVERALL"] and axis.get_ylim() == (2.5, -0.5)
    (points,) = [line for line in axis.lines if len(line.get_xdata()) == 3]
    np.testing.assert_array_equal(points.get_xdata(), report["accuracy"]["value"])
    ends = np.array([segment[:, 0] for segment in axis.collections[0].get_segments()])
    np.testing.assert_array_equal(ends, report["accuracy"][["low", "high"]])
    assert axis.get_xlabel() == "Accuracy, 95 % interval"
    shown = texts(figure)
    assert metrics.format_report(report).loc["OVERALL", "Accuracy"] in shown
    assert DEMO_LINE.format("image") in shown and "chance" not in shown
    with pytest.raises(ValueError, match="metric must be one of accuracy.*not 'auc'"):
        plots.interval_bars(report, "auc")


def test_several_reports_are_told_apart(predictions):
    reports = {
        "by image": metrics.image_report(predictions, samples=20),
        "by study": metrics.study_report(predictions, samples=20).drop(index="WRIST"),
    }
    figure = plots.interval_bars(reports, "auroc")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(reports)
    shown = texts(figure)
    assert "chance" in shown and "undefined" in shown  # WRIST has one class only
    assert any(DEMO_LINE.format("image") in s and DEMO_LINE.format("study") in s for s in shown)


def test_one_line_per_model_coloured_by_where_its_weights_come_from(predictions):
    reports = {"first": metrics.image_report(predictions, samples=50)}
    predictions.attrs = DEMO | {"weights": "imagenet"}
    reports["second"] = metrics.image_report(predictions.assign(probability=0.5), samples=50)
    figure = plots.overall_bars(reports, "accuracy")
    (axis,) = figure.axes
    ends = [collection.get_segments()[0][:, 0] for collection in axis.collections]
    for found, report in zip(ends, reports.values(), strict=True):
        np.testing.assert_array_equal(found, report.loc["OVERALL", "accuracy"][["low", "high"]])
    assert [to_hex(c.get_color()[0]) for c in axis.collections] == [plots.FAINT.lower(), plots.INK.lower()]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    shown = texts(figure)
    assert metrics.format_report(reports["first"]).loc["OVERALL", "Accuracy"] in shown
    assert not any("weights" in text for text in shown) and any("synthetic films" in text for text in shown)
    assert "chance" in plots.overall_bars(reports).axes[0].get_xlabel()
    with pytest.raises(ValueError, match="not 'auc'"):
        plots.overall_bars(reports, "auc")


def test_figures_are_opaque_white_and_shown_once(history, predictions, films):
    report = metrics.image_report(predictions, samples=5)
    with plt.rc_context({"figure.facecolor": "none", "font.size": 30}):
        figures = [
            plots.curves(history),
            plots.confusion(predictions),
            plots.films(films),
            plots.interval_bars(report),
            plots.overall_bars({"one": report}),
        ]
        assert plt.rcParams["font.size"] == 30  # the caller's settings stay
    for figure in figures:
        assert to_hex(figure.get_facecolor(), keep_alpha=True) == "#ffffffff"
    assert plt.get_fignums() == []  # else a notebook would draw each a second time


def test_use_style_sets_matplotlibs_own():
    with plt.rc_context():
        plots.use_style()
        assert plt.rcParams["savefig.transparent"] is False and plt.rcParams["font.size"] == 11
