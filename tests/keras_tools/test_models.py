"""The report's architectures, kappa against scikit-learn, models loaded from runs."""

import numpy as np
import pytest

keras = pytest.importorskip("keras")
from making import make_index, make_predictions  # noqa: E402
from sklearn.metrics import cohen_kappa_score  # noqa: E402

from mura_course import profiles, runs  # noqa: E402
from mura_course.errors import ModelError, RunError  # noqa: E402
from mura_course.keras_tools import models  # noqa: E402

FIGURES = {  # filters and parameters, layer by layer
    "in": ([256, 128, 64, 32], [7168, 295_040, 73_792, 18_464, 6273]),
    "out": ([32, 64, 128, 256], [896, 18_496, 73_856, 295_168, 50_177]),
}


@pytest.mark.parametrize("direction", FIGURES)
def test_funnels_equal_the_reports_figures_and_tables(direction):
    model, (filters, parameters) = models.funnel_cnn(direction), FIGURES[direction]
    assert model.layers[0].output.shape[1:] == (224, 224, 3) and model.expected_scale == "0..1"
    for i, count in enumerate(filters, start=1):  # KL Tables 4 and 5
        side = 224 // 2 ** (i - 1)
        conv, pool, drop = model.layers[3 * i - 2 : 3 * i + 1]
        assert [conv.name, pool.name, drop.name] == [f"Conv2D-{i}", f"MaxPool2D-{i}", f"Dropout-{i}"]
        assert (conv.kernel_size, pool.pool_size, pool.strides, drop.rate) == ((3, 3), (2, 2), (2, 2), 0.3)
        assert conv.activation is keras.activations.relu
        assert conv.output.shape[1:] == (side, side, count)
        assert drop.output.shape[1:] == (side // 2, side // 2, count)
    assert [layer.name for layer in model.layers[13:]] == ["Flatten", "Output"]
    assert [layer.count_params() for layer in model.layers if layer.count_params()] == parameters
    assert model.get_layer("Output").activation is keras.activations.sigmoid


def test_funnel_filters_go_on_impossible_ones_are_refused_and_the_head_is_the_reports():
    for direction, options, filters in (
        ("in", {"conv_layers": 5}, [256, 128, 64, 32, 16]),
        ("out", {"conv_layers": 5}, [32, 64, 128, 256, 512]),
        ("in", {"widest": 64}, [64, 32, 16, 8]),
        ("out", {"narrowest": 8}, [8, 16, 32, 64]),
    ):
        model = models.funnel_cnn(direction, input_shape=(33, 40, 1), **options)
        assert [layer.filters for layer in model.layers if hasattr(layer, "filters")] == filters
        assert model.output_shape == (None, 1)
    for arguments, message in ((("up",), "must be one of 'in', 'out', not 'up'"),):
        with pytest.raises(ModelError, match=message):
            models.funnel_cnn(*arguments)
    plain, head = models.transfer_head(1920), models.transfer_head(2048, (128, 128, 64), 0.1)
    assert [type(layer).__name__ for layer in plain.layers] == ["Dropout", "Dense"]
    assert plain.count_params() == 1921
    assert [x.units for x in head.layers[1::2]] == [128, 128, 64, 1]
    assert [x.rate for x in head.layers[::2]] == [0.1] * 4
    assert head.layers[-1].activation is keras.activations.sigmoid


def test_kappa_equals_scikit_learn_over_batches():
    rng = np.random.default_rng(0)
    metric = models.BinaryCohenKappa()
    for case in range(30):
        n = int(rng.integers(2, 60))
        label, probability = rng.integers(0, 2, n), rng.random(n).round(1)
        label[:2] = 0, 1
        for part in np.array_split(np.arange(n), 3):
            shape = (-1, 1) if case % 3 else (-1,)
            metric.update_state(label[part].reshape(shape), probability[part].reshape(shape))
        assert float(metric.result()) == pytest.approx(cohen_kappa_score(label, probability > 0.5), abs=1e-5)
        metric.reset_state()
    for label, probability, kappa in (([0, 1, 0, 1], [0.9] * 4, 0), ([0, 0], [0.1, 0.2], np.nan)):
        metric.update_state(label, probability)
        np.testing.assert_equal(float(metric.result()), kappa)
        metric.reset_state()


def test_a_runs_model_comes_back_with_its_scale_or_one_error_says_what_to_do(tmp_path, monkeypatch):
    model = models.funnel_cnn("in", 1, input_shape=(8, 8, 3), widest=2)
    model.compile("adam", "binary_crossentropy", metrics=models.abnormality_metrics())
    index = make_index()
    made = (model, None, make_predictions(index[index["split"].eq("test")]))
    run = runs.fit_or_load("one", {}, lambda w: made, index, profiles.get("smoke"), root=tmp_path)
    again, x = models.load(run), np.random.default_rng(0).random((3, 8, 8, 3), dtype=np.float32)
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)
    assert again.expected_scale == "0..1"
    monkeypatch.setattr(keras.saving, "load_model", lambda *a, **o: int("an old file"))
    with pytest.raises(RunError, match="Keras cannot load .*Delete .*train it again"):
        models.load(run)
    run.model_file().write_bytes(b"another file")
    with pytest.raises(RunError, match=r"model\.keras"):
        models.load(run)
