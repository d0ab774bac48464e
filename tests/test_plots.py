"""plots.py: what the figures say (texts, colours, axes), drawn without a display."""

import matplotlib

matplotlib.use("Agg")

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from making import make_films
from matplotlib.colors import to_hex

from mura_course import metrics, plots, reports
from mura_course.errors import DataError, PredictionsError

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


def make_history(epochs=5, seed=0, panels=("loss", "accuracy", "auc", "kappa"), **attrs):
    columns = [name for panel in panels for name in (panel, f"val_{panel}")]
    values = 0.6 + 0.3 * np.random.default_rng(seed).random((epochs, len(columns)))
    table = pd.DataFrame(values, columns=columns)
    table.insert(0, "epoch", range(1, epochs + 1))
    table.attrs = DEMO | attrs
    return table


def texts(figure):
    figure.draw_without_rendering()
    found = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    return [text.replace("\n", " ") for text in found if text]


def test_curves_of_one_run_show_train_and_dev_in_a_panel_a_score():
    history = make_history()
    figure = plots.learning_curves(history)
    assert [axis.get_title() for axis in figure.axes] == ["Loss", "Accuracy", "AUC", "Cohen's kappa"]
    for axis, name in zip(figure.axes, plots.PANELS, strict=False):
        train, dev = axis.lines[:2]
        np.testing.assert_array_equal(train.get_ydata(), history[name])
        np.testing.assert_array_equal(dev.get_ydata(), history[f"val_{name}"])
        assert train.get_linestyle() == "--" and dev.get_linestyle() == "-"
        assert train.get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert axis.get_ylabel() == plots.PANELS[name][1] and axis.get_xlabel() == "epoch"
    assert {"dashed: train, solid: dev, dotted: chance", DEMO_LINE.format("image")} <= set(texts(figure))
    # Lines that are not about a class do not wear a class's colour.
    used = {to_hex(line.get_color()).upper() for axis in figure.axes for line in axis.lines}
    assert not used & set(plots.COLOURS)


def test_curves_of_several_runs_have_a_colour_a_run_and_axes_start_at_chance_or_below():
    histories = {"long": make_history(6, 1), "short": make_history(3, 2, weights="imagenet")}
    histories["long"].loc[0, ["accuracy", "auc"]] = np.nan  # a stage with another target
    figure = plots.learning_curves(histories, ["auc", "loss", "accuracy"])
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    auc = figure.axes[0]
    for i, history in enumerate(histories.values()):
        for line, name in zip(auc.lines[2 * i : 2 * i + 2], ("auc", "val_auc"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), history[name])
            assert line.get_color() == plots.MODELS[i]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["long", "short"]
    assert "MURA-demo (synthetic films, not MURA) · image level · profile smoke" in texts(figure)
    history = make_history(f1=None)
    history.loc[2, "val_auc"], history.loc[0, "loss"] = 0.3, 9.0
    loss, accuracy, auc, kappa = plots.learning_curves(history).axes
    assert accuracy.get_ylim()[0] == pytest.approx(0.47) and auc.get_ylim()[0] < 0.3
    assert loss.get_ylim() == (0, plots.HIGHEST_LOSS) and loss.get_title() == "Loss (cut off at 2)"
    for axis, chance in ((auc, 0.5), (kappa, 0)):
        assert chance in [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"]
    assert all(line.get_linestyle() != ":" for line in [*loss.lines, *accuracy.lines])
    # A dotted line parts the stages, and dev may lack.
    history = make_history(5, panels=("loss", "f1")).assign(stage=[1, 1, 2, 2, 2]).drop(columns="val_f1")
    loss, f1 = plots.learning_curves(history).axes
    assert f1.get_title() == "Macro F1" and len(f1.lines) == 2
    assert [line.get_xdata() for line in loss.lines if line.get_linestyle() == ":"] == [[2.5, 2.5]]
    with pytest.raises(PredictionsError, match="Not every history has f1, kappa"):
        plots.learning_curves(make_history(panels=("loss",)), ["loss", "kappa", "f1"])


@pytest.mark.parametrize("level, cells, title", [
    ("image", ["3\n75%", "1\n25%"] * 2, "8 images, test set"),
    ("study", ["2\n100%", "0\n0%"] * 2, "4 studies, test set"),
])  # fmt: skip
def test_a_matrix_counts_and_says_what_about(predictions, level, cells, title):
    figure = plots.confusion_matrices(predictions, level)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == cells
    assert axis.get_title() == title
    assert axis.get_ylabel() == "truth" and axis.get_xlabel() == "called (abnormal: P > 0.5)"
    named = [tick.get_text() for tick in axis.get_xticklabels() + axis.get_yticklabels()]
    assert named == ["normal", "abnormal"] * 2
    assert DEMO_LINE.format(level) in texts(figure)


def test_matrices_share_one_scale_by_the_rows_fraction(predictions):
    perfect = predictions.assign(probability=[0.0] * 4 + [1.0] * 4)
    models = {"as it is": predictions, "perfect": perfect, "few": perfect.iloc[[0, 7]]}
    figure = plots.confusion_matrices(models | {f"model {i}": predictions for i in (4, 5)})
    shades = [axis.images[0].get_array() for axis in figure.axes[:5]]
    np.testing.assert_array_equal(shades[1], shades[2])  # 4 of 4 and 1 of 1
    assert to_hex(shades[1][0, 1]) == to_hex(shades[1][1, 0]) == "#ffffff"  # nothing there
    assert (shades[0][0, 0] > shades[1][0, 0]).any() and (shades[0][0, 0] >= shades[1][0, 0]).all()
    assert figure.axes[2].get_title() == "few\n2 images, test set"
    one_class = plots.confusion_matrices(predictions.query("label == 0"), threshold=0.999)
    assert [text.get_text() for text in one_class.axes[0].texts] == ["4\n100%", "0\n0%", "0", "0"]
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False] * 3


@pytest.fixture
def films(tmp_path):
    return make_films(tmp_path, patients=3, views=1)


def test_films_are_framed_in_their_labels_colour_and_word(films, tmp_path):
    figure = plots.films(films, ncols=2)
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles == ["HAND, normal", "HAND, abnormal", "WRIST, normal"]
    for axis, label, path in zip(figure.axes, films["label"], films["path"], strict=False):
        colours = {to_hex(spine.get_edgecolor()).upper() for spine in axis.spines.values()}
        assert colours == {plots.COLOURS[label]}
        np.testing.assert_array_equal(axis.images[0].get_array(), cv2.imread(str(tmp_path / path)))
    assert not figure.axes[3].get_visible()
    assert [a.get_title() for a in plots.films(films, titles="view").axes][:2] == ["1, normal", "1, abnormal"]
    assert plots.films(films, titles=["a", "b", "c"]).axes[2].get_title() == "c, normal"
    (tmp_path / "1-1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1-1.png: empty, no image"):
        plots.films(films)


def test_intervals_are_those_of_the_report(predictions):
    report = metrics.image_report(predictions, samples=100)
    figure = plots.interval_bars(report, "accuracy")
    (axis,) = figure.axes
    ticks = [label.get_text() for label in axis.get_yticklabels()]
    assert ticks == ["HAND", "WRIST", "OVERALL"] and axis.get_ylim() == (2.5, -0.5)
    lines, points = axis.collections
    np.testing.assert_array_equal(points.get_offsets()[:, 0], report["accuracy"]["value"])
    ends = np.array([segment[:, 0] for segment in lines.get_segments()])
    np.testing.assert_array_equal(ends, report["accuracy"][["low", "high"]])
    assert axis.get_xlabel() == "Accuracy, 95 % interval"
    shown = texts(figure)
    assert reports.format_report(report).loc["OVERALL", "Accuracy"] in shown
    assert DEMO_LINE.format("image") in shown
    # Several reports are told apart.
    models = {"by image": metrics.image_report(predictions, samples=20)}
    models["by study"] = metrics.study_report(predictions, samples=20).drop(index="WRIST")
    figure = plots.interval_bars(models, "auroc")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(models)
    shown = texts(figure)
    assert "AUROC, 95 % interval; dotted: chance" in shown and "undefined" in shown  # WRIST has one class
    assert any(DEMO_LINE.format("image") in s and DEMO_LINE.format("study") in s for s in shown)


def test_one_line_per_model_coloured_by_where_its_weights_come_from(predictions):
    models = {"first": metrics.image_report(predictions, samples=50)}
    predictions.attrs = DEMO | {"weights": "imagenet"}
    models["second"] = metrics.image_report(predictions.assign(probability=0.5), samples=50)
    figure = plots.overall_bars(models, "accuracy")
    (axis,) = figure.axes
    lines, points = axis.collections
    for segment, report in zip(lines.get_segments(), models.values(), strict=True):
        np.testing.assert_array_equal(segment[:, 0], report.loc["OVERALL", "accuracy"][["low", "high"]])
    assert [to_hex(colour).upper() for colour in lines.get_colors()] == [plots.FAINT, plots.INK]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    shown = texts(figure)
    assert reports.format_report(models["first"]).loc["OVERALL", "Accuracy"] in shown
    assert not any("weights" in text for text in shown) and any("synthetic films" in text for text in shown)


def test_figures_are_opaque_white_and_shown_once(predictions, films):
    report = metrics.image_report(predictions, samples=5)
    with plt.rc_context({"figure.facecolor": "none", "font.size": 30}):
        figures = [plots.learning_curves(make_history()), plots.confusion_matrices(predictions)]
        figures += [plots.films(films), plots.interval_bars(report), plots.overall_bars({"one": report})]
        assert plt.rcParams["font.size"] == 30  # the caller's settings stay
    for figure in figures:
        assert to_hex(figure.get_facecolor(), keep_alpha=True) == "#ffffffff"
    assert plt.get_fignums() == []  # else a notebook would draw each a second time
    with plt.rc_context():
        plots.use_style()
        assert plt.rcParams["savefig.transparent"] is False and plt.rcParams["font.size"] == 11
