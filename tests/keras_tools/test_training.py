"""keras_models.py: the report's architectures, kappa against scikit-learn, training killed at random."""

import os
import sys
import time

import numpy as np
import pandas as pd
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
keras = pytest.importorskip("keras")
import killing  # noqa: E402
from sklearn.metrics import cohen_kappa_score  # noqa: E402

from mura_course import keras_models, profiles, runs  # noqa: E402

# The report's figures -------------------------------------------------------------------------

FIGURE_27 = """
Input 224 224 3 0
Conv2D-1 224 224 256 7168
MaxPool2D-1 112 112 256 0
Dropout-1 112 112 256 0
Conv2D-2 112 112 128 295040
MaxPool2D-2 56 56 128 0
Dropout-2 56 56 128 0
Conv2D-3 56 56 64 73792
MaxPool2D-3 28 28 64 0
Dropout-3 28 28 64 0
Conv2D-4 28 28 32 18464
MaxPool2D-4 14 14 32 0
Dropout-4 14 14 32 0
Flatten 6272 0
Output 1 6273
"""
FIGURE_28 = """
Input 224 224 3 0
Conv2D-1 224 224 32 896
MaxPool2D-1 112 112 32 0
Dropout-1 112 112 32 0
Conv2D-2 112 112 64 18496
MaxPool2D-2 56 56 64 0
Dropout-2 56 56 64 0
Conv2D-3 56 56 128 73856
MaxPool2D-3 28 28 128 0
Dropout-3 28 28 128 0
Conv2D-4 28 28 256 295168
MaxPool2D-4 14 14 256 0
Dropout-4 14 14 256 0
Flatten 50176 0
Output 1 50177
"""


@pytest.mark.parametrize(
    ("direction", "figure", "total"), [("in", FIGURE_27, 400_737), ("out", FIGURE_28, 438_593)]
)
def test_funnels_equal_the_reports_figures(direction, figure, total):
    model = keras_models.funnel_cnn(direction)
    found = [" ".join(map(str, [l.name, *l.output.shape[1:], l.count_params()])) for l in model.layers]  # noqa: E741
    assert found == figure.strip().splitlines()
    assert model.count_params() == total
    assert model.expected_scale == "0..1"


def test_funnel_layers_follow_tables_4_and_5():
    model = keras_models.funnel_cnn("in", dropout=0.2)
    for i in range(1, 5):
        conv, pool = model.get_layer(f"Conv2D-{i}"), model.get_layer(f"MaxPool2D-{i}")
        assert (conv.kernel_size, conv.strides, conv.padding) == ((3, 3), (1, 1), "same")
        assert conv.dilation_rate == (1, 1) and conv.activation is keras.activations.relu
        assert (pool.pool_size, pool.strides, pool.padding) == ((2, 2), (2, 2), "same")
        assert model.get_layer(f"Dropout-{i}").rate == 0.2
    assert model.get_layer("Output").activation is keras.activations.sigmoid


@pytest.mark.parametrize(
    ("direction", "options", "filters"),
    [
        ("in", {"conv_layers": 5}, [256, 128, 64, 32, 16]),
        ("out", {"conv_layers": 5}, [32, 64, 128, 256, 512]),
        ("in", {"widest": 64}, [64, 32, 16, 8]),
        ("out", {"narrowest": 8}, [8, 16, 32, 64]),
    ],
)
def test_funnel_filters(direction, options, filters):
    model = keras_models.funnel_cnn(direction, input_shape=(33, 40, 1), **options)
    assert [layer.filters for layer in model.layers if hasattr(layer, "filters")] == filters
    assert model.output_shape == (None, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("up",), "'in' or 'out', not 'up'"), (("in", 6, 0.3, (8, 8, 1), 16), "6 layers from 16 filters")],
)
def test_impossible_funnels(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_models.funnel_cnn(*arguments)


def test_output_is_float32_under_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = keras_models.funnel_cnn("in", input_shape=(16, 16, 1), widest=8)
        assert model.output.dtype == "float32" and model.get_layer("Conv2D-1").compute_dtype == "float16"
    finally:
        keras.mixed_precision.set_global_policy("float32")


# Cohen's kappa --------------------------------------------------------------------------------


def test_kappa_equals_scikit_learn_over_batches_and_weights():
    rng = np.random.default_rng(0)
    for case in range(30):
        n = int(rng.integers(2, 60))
        label, probability, weight = rng.integers(0, 2, n), rng.random(n).round(1), rng.random(n) + 0.1
        label[:2] = 0, 1
        metric = keras_models.BinaryCohenKappa()
        weights = weight if case % 2 else None
        for part in np.array_split(np.arange(n), 3):
            shape = (-1, 1) if case % 3 else (-1,)
            metric.update_state(
                label[part].reshape(shape),
                probability[part].reshape(shape),
                None if weights is None else weights[part],
            )
        expected = cohen_kappa_score(label, probability > 0.5, sample_weight=weights)
        assert float(metric.result()) == pytest.approx(expected, abs=1e-5)
        metric.reset_state()
        metric.update_state([0, 1], [0.1, 0.9])
        assert float(metric.result()) == 1


def test_kappa_of_constants():
    metric = keras_models.BinaryCohenKappa()
    metric.update_state([0, 1, 0, 1], [0.9] * 4)
    assert float(metric.result()) == 0
    metric.reset_state()
    metric.update_state([0, 0], [0.1, 0.2])
    assert np.isnan(float(metric.result()))


def test_kappa_threshold_is_saved():
    metric = keras_models.BinaryCohenKappa(threshold=0.7)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    again.update_state([0, 1], [0.65, 0.75])
    assert float(again.result()) == 1 and again.name == "kappa"


# Training -------------------------------------------------------------------------------------


class Noise(keras.utils.PyDataset):
    """Tiny batches; order and noise depend on epoch and batch alone, as those of `pixels.Batches`."""

    def __init__(self, count=24, batch=8, shuffle=True, pause=0.0, workers=2, seed=0):
        super().__init__(workers=workers)
        rng = np.random.default_rng(seed)
        self.y = rng.integers(0, 2, count)
        self.x = (rng.standard_normal((count, 6, 6, 1)) + 0.5 * self.y[:, None, None, None]).astype("float32")
        self.batch, self.shuffle, self.pause, self.epoch = batch, shuffle, pause, 0

    def __len__(self):
        return len(self.y) // self.batch

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        time.sleep(self.pause)
        rows = np.arange(len(self.y))
        if self.shuffle:
            rows = np.random.default_rng([1, self.epoch]).permutation(rows)
        rows = rows[i * self.batch : (i + 1) * self.batch]
        noise = 0.3 * np.random.default_rng([2, self.epoch, i]).standard_normal((self.batch, 6, 6, 1))
        return self.x[rows] + noise.astype("float32") * self.shuffle, self.y[rows]


def tiny_model(rate=0.005):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Flatten(),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    metrics = [keras_models.BinaryCohenKappa()]
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=metrics, jit_compile=False)
    return model


def stopping_early():
    return [
        keras.callbacks.EarlyStopping("val_loss", patience=5, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1),
    ]


EPOCHS = 10


def one_run(root, pause=0.0):
    """What a chapter does, on noise: a run whose training reduces its rate and stops early."""
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    dev = Noise(24, batch=24, shuffle=False, workers=1, seed=1)
    index = pd.DataFrame({"path": [f"{i}.png" for i in range(24)], "split": "test", "body_part": "HAND"})
    index = index.assign(patient=range(24), study=index["path"], view=1, label=dev.y)
    index.attrs = {"root": "", "name": "MURA-demo", "is_demo": True}

    def fit(workdir):
        keras.utils.set_random_seed(3)
        model = tiny_model()
        train = Noise(pause=pause)
        history = keras_models.keras_fit(model, train, dev, EPOCHS, workdir, stopping_early())
        return model, history, keras_models.predict(model, dev, index)

    return runs.fit_or_load("tiny", {"epochs": EPOCHS}, fit, index, profiles.get("smoke"), root=root)


def epochs_done(root):
    files = root.glob("MURA-demo-*/smoke/*.partial/epoch-*.npz")
    return max((int(file.stem.split("-")[1]) for file in files), default=0)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    happened = killing.in_a_process(
        "import killing, test_keras_models as t; "
        f"killing.kill_at_random(t.one_run, t.epochs_done, killing.Path({str(tmp_path)!r}), kills=1, seed=0)"
    )
    assert len(happened) >= 1
    run = killing.assert_killed_equals_undisturbed(tmp_path, lambda run: run.load_model().get_weights())
    assert run.history["learning_rate"].nunique() > 1 and len(run.history) < EPOCHS  # else nothing was tested


class Stops(Noise):
    """Ctrl-C as epoch 3 begins."""

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        if epoch == 3:
            raise KeyboardInterrupt


class Forbidden(Noise):
    def __getitem__(self, i):
        raise AssertionError("trained although nothing was left to train")


DEV = Noise(24, batch=24, shuffle=False, workers=1, seed=1)


def fit_here(workdir, train=None, epochs=5):
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(3)
    model = tiny_model()
    history = keras_models.keras_fit(model, train or Noise(), DEV, epochs, workdir, stopping_early())
    return model, history.drop(columns="seconds")


def restored(workdir, model):
    keeper = keras_models._Keeper(workdir, stopping_early(), Noise())
    keeper.restore(model)
    return keeper.epoch


@pytest.mark.slow
def test_interrupted_and_damaged_it_still_ends_the_same(tmp_path, capsys):
    expected_model, expected = fit_here(tmp_path / "whole")
    workdir = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fit_here(workdir, Stops())
    older, newest = sorted(workdir.glob("*"))
    assert (older.name, newest.name) == ("epoch-0002.npz", "epoch-0003.npz")
    content, rng = newest.read_bytes(), np.random.default_rng(0)
    other = tiny_model()
    assert restored(workdir, other) == 3
    for cut in [0, 1, 22, *rng.integers(len(content), size=12), len(content) - 1]:
        newest.write_bytes(content[:cut])
        capsys.readouterr()
        assert restored(workdir, other) == 2
        assert "epoch-0003.npz is damaged" in capsys.readouterr().out and not newest.exists()
    for flipped in rng.integers(len(content), size=20):  # a bit of the data, of a name, of the directory
        newest.write_bytes(content[:flipped] + bytes([content[flipped] ^ 4]) + content[flipped + 1 :])
        assert restored(workdir, other) in (2, 3)  # 3: a bit without meaning, as in a date
    newest.write_bytes(b"\0" * len(content))
    model, history = fit_here(workdir)  # from epoch 2
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    for x, y in zip(model.get_weights(), expected_model.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    # Killed after its last epoch: no batch is asked for, and the best weights are put back as before.
    model, history = fit_here(workdir, Forbidden())
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    for x, y in zip(model.get_weights(), expected_model.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    for file in workdir.glob("*"):
        file.write_bytes(b"")
    assert restored(workdir, other) == 0 and not list(workdir.glob("*"))


@pytest.mark.parametrize("other", ["model", "optimiser", "callbacks"])
def test_a_working_folder_of_another_training_is_refused(tmp_path, other):
    model, callbacks = tiny_model(), stopping_early()
    keeper = keras_models._Keeper(tmp_path, callbacks, None)
    keeper.set_model(model), keeper.restore(model)
    keeper.on_epoch_begin(0), keeper.on_epoch_end(0, {"loss": 0.5})
    model = (
        keras_models.funnel_cnn("in", 1, input_shape=(6, 6, 1), widest=8)
        if other == "model"
        else tiny_model()
    )
    if other != "callbacks":
        model.compile("sgd" if other == "optimiser" else "adam", "binary_crossentropy")
    keeper = keras_models._Keeper(tmp_path, callbacks[: 1 if other == "callbacks" else 2], None)
    with pytest.raises(keras_models.TrainingError, match="epoch-0001.npz was left by another"):
        keeper.restore(model)


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_at_once(tmp_path, loss):
    model = tiny_model(rate=0.25)
    model.compile(keras.optimizers.Adam(0.25), lambda y, p: keras.ops.mean(p) * float(loss), run_eagerly=True)
    train = Noise(workers=1)
    with pytest.raises(keras_models.TrainingError, match=f"loss became {loss} in epoch 1.*now 0.25"):
        keras_models.keras_fit(model, train, DEV, 3, tmp_path)
    assert list(tmp_path.glob("*")) == []


def test_empty_and_unbuilt_are_refused():
    with pytest.raises(keras_models.TrainingError, match="training set is empty"):
        keras_models.keras_fit(tiny_model(), Noise(0), DEV, 1)
    with pytest.raises(keras_models.TrainingError, match="development set is empty"):
        keras_models.keras_fit(tiny_model(), DEV, Noise(0), 1)
    with pytest.raises(keras_models.TrainingError, match="known input shape and be compiled"):
        keras_models.keras_fit(keras.Sequential([keras.layers.Dense(1)]), DEV, DEV, 1)


def test_the_wrong_input_scale_is_refused():
    model, batches = keras_models.funnel_cnn("in", 1, input_shape=(6, 6, 1), widest=2), Noise()
    model.compile("adam", "binary_crossentropy")
    batches.scale = "imagenet"
    with pytest.raises(ValueError, match="expects pixels scaled to '0..1'.*'imagenet'"):
        keras_models.keras_fit(model, batches, batches, 1)
    with pytest.raises(ValueError, match="expects pixels scaled to '0..1'.*'imagenet'"):
        keras_models.predict(model, batches, pd.DataFrame())


def test_class_weights_reach_the_loss_and_a_log_gets_a_line_per_epoch(capsys):
    history = keras_models.keras_fit(tiny_model(), Noise(), DEV, 2, class_weight={0: 0.0, 1: 0.0})
    assert history["loss"].tolist() == [0, 0] and history["epoch"].tolist() == [1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", val_loss")[0] for line in lines] == [
        "Epoch 1/2, loss 0.000",
        "Epoch 2/2, loss 0.000",
    ]


def test_a_notebook_gets_one_display_that_ends_as_plain_text(monkeypatch, capsys):
    shown = []

    class Display:
        def get_ipython(self):
            return type("Shell", (), {"kernel": "a kernel"})

        @property
        def display(self):
            return self

        def __call__(self, data=None, **options):
            return self

    ipython = Display()
    handle = type("Handle", (), {"update": lambda self, data, raw: shown.append(data["text/plain"])})()
    monkeypatch.setattr(Display, "display", type("D", (), {"display": staticmethod(lambda *a, **k: handle)}))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    keeper = keras_models._Keeper(None, [], None)
    keeper.history = [{"epoch": 1}]
    progress = keras_models._Progress(keeper, epochs=8)
    progress.set_params({"steps": 30})
    progress.on_train_begin()
    progress.on_epoch_begin(0)
    progress.on_train_batch_end(4, {"loss": 0.5, "accuracy": 0.7})
    progress.on_epoch_end(0, {"loss": 0.5, "val_auc": 0.61234})
    progress.on_train_end({"loss": 0.5, "val_auc": 0.61234})
    assert shown[0] == "Epoch 1/8, batch 5/30, loss 0.500"
    assert shown[-1].startswith("Trained 1 of 8 epochs in ") and shown[-1].endswith(
        "loss 0.500, val_auc 0.612"
    )
    assert capsys.readouterr().out == "" and not any(ord(c) < 32 for text in shown for c in text)


class ShuffledBatches:
    """As `pixels.Batches`: says its rows and their order, and turns itself into a PyDataset."""

    scale = "0..1"

    def __init__(self, n=10):
        self.index = pd.DataFrame({"path": [f"{i}.png" for i in range(n)]})
        self.order = np.random.default_rng(0).permutation(n)

    def __len__(self):
        return 1

    def keras(self):
        dataset = Noise(len(self.order), batch=len(self.order), workers=1)
        dataset.x = self.order.reshape(-1, 1, 1, 1) / np.ones((1, 6, 6, 1), "float32")
        dataset.shuffle = False
        return dataset


def test_predictions_stay_with_their_images_and_models_with_their_scale(tmp_path):
    inputs = keras.Input((6, 6, 1))
    mean = keras.layers.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, keras.layers.Rescaling(0.1)(mean))
    model.expected_scale = "0..1"
    batches = ShuffledBatches()
    predictions = keras_models.predict(model, batches)
    assert predictions["probability"].dtype == float
    expected = predictions["path"].str.removesuffix(".png").astype(float) / 10
    np.testing.assert_allclose(predictions["probability"], expected, atol=1e-6)
    with pytest.raises(keras_models.TrainingError, match="10 predictions for 9 rows"):
        keras_models.predict(model, batches, batches.index.head(9))
    model.save(tmp_path / "model.keras")
    again = keras_models.load(tmp_path / "model.keras", "0..1")
    assert again.expected_scale == "0..1"
