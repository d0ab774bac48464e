"""Training that is killed, interrupted or damaged goes on; recipes become runs; several devices."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
from making import flips, make_films, make_index  # noqa: E402, F401

from mura_course import data, metrics, profiles  # noqa: E402
from mura_course.errors import DataError, TrainingError  # noqa: E402
from mura_course.keras_tools import backbones, models, training  # noqa: E402
from mura_course.recipes import Recipe, Stage  # noqa: E402

SMOKE, STAGE = profiles.get("smoke"), Stage(learning_rate=0.01, epochs=1)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return make_films(tmp_path_factory.mktemp("films"))


def sets_of(films, size=16, **options):
    store = data.PixelStore.open_or_build(films, size, progress=False)
    return data.kl_datasets(films, store, batch_size=8, workers=0, **options)


def tiny_model(learning_rate=0.005, widest=4):
    model = models.funnel_cnn("in", 1, 0.3, (16, 16, 3), widest)
    watched = [models.BinaryCohenKappa()]
    model.compile(keras.optimizers.Adam(learning_rate), "binary_crossentropy", metrics=watched)
    return model


def tiny_fit(films, workdir, *others):
    """Stops after 8 epochs, the first of which is called best; halves the learning rate in every second."""
    keras.utils.set_random_seed(3)
    model, sets = tiny_model(), sets_of(films)
    stop = keras.callbacks.EarlyStopping("val_loss", min_delta=9, patience=7, restore_best_weights=True)
    halve = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=2, min_delta=9)
    callbacks = [stop, halve, *others]
    history = training.fit(model, sets["train augmented"], sets["validation"], 12, workdir, callbacks)
    return model, history.drop(columns="seconds")


@pytest.fixture(scope="module")
def undisturbed(films, tmp_path_factory):
    """A model and its history, and the working folder as it was after the fourth epoch."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def keep(epoch, logs):
        if epoch == 4:
            shutil.copytree(folder, folder.with_name("stopped"))

    whole = tiny_fit(films, folder, keras.callbacks.LambdaCallback(on_epoch_begin=keep))
    return *whole, folder.with_name("stopped")


def assert_ends_alike(ended, undisturbed):
    (model, history), (expected_model, expected, _) = ended, undisturbed
    assert history["epoch"].tolist() == list(range(1, 9))
    assert history["learning_rate"].nunique() == 4
    np.testing.assert_allclose(history, expected, rtol=1e-4, atol=1e-5)
    for x, y in zip(model.get_weights(), expected_model.get_weights(), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_it_goes_on_after_the_last_epoch_with_all_that_was_known(films, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed[2], tmp_path, dirs_exist_ok=True)
    assert_ends_alike(tiny_fit(films, tmp_path), undisturbed)
    assert capsys.readouterr().out == "Going on after epoch 4.\n"
    forbidden = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda *a: pytest.fail("trained again"))
    assert_ends_alike(tiny_fit(films, tmp_path, forbidden), undisturbed)  # puts the best weights back


def test_fault_9_a_damaged_checkpoint_is_one_line_and_it_starts_anew(films, undisturbed, tmp_path, capsys):
    whole, file = (undisturbed[2] / "checkpoint.npz").read_bytes(), tmp_path / "checkpoint.npz"
    flipped = list(flips(whole))
    for content in (b"", b"{}", whole[:99], whole[: len(whole) // 2], whole[:-1], *flipped):
        file.write_bytes(content)
        done = training.Checkpoint(tiny_model(), tmp_path, [], None).restore(12)
        said = capsys.readouterr().out
        if done == 0:
            assert said.count("\n") == 1 and f"{file} cannot be used" in said and "starts anew" in said
        else:  # a bit that means nothing, e.g. of a date
            assert done == 4 and content in flipped
    file.write_bytes(whole)
    assert training.Checkpoint(tiny_model(widest=5), tmp_path, [], None).restore(12) == 0
    assert "another model or optimiser" in capsys.readouterr().out
    file.write_bytes(whole[:-500])
    assert_ends_alike(tiny_fit(films, tmp_path), undisturbed)


def started(code, films, folder):
    """A process of its own that runs `code` on the films."""
    command = [sys.executable, "-c", code, __file__, films.attrs["root"], str(folder)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})


def test_a_loss_that_is_no_number_stops_and_the_wrong_scale_is_refused(films, tmp_path, capsys):
    model, sets = tiny_model(), sets_of(films)
    model.compile("adam", lambda y, p: keras.ops.mean(p) * float("inf"), run_eagerly=True)
    with pytest.raises(TrainingError, match="Loss (nan|inf) in epoch 1: lower the learning rate"):
        training.fit(model, sets["train original"], sets["validation"], 3, tmp_path)
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    wrong = sets_of(films, scale="imagenet")
    model, message = tiny_model(), "expects '0..1', not 'imagenet'"
    with pytest.raises(DataError, match=message):
        training.fit(model, wrong["train original"], sets["validation"], 1)
    with pytest.raises(DataError, match=message):
        training.predict(model, wrong["test"])
    history = training.fit(model, sets["train original"], sets["validation"], 2)
    assert history["epoch"].tolist() == [1, 2]
    out, err = capsys.readouterr()
    assert out == "" and err.rpartition("\r")[2].strip() == ""


def test_predictions_stay_with_their_images(films):
    inputs = keras.Input((16, 16, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs[..., :1]))
    batches = sets_of(films)["train original"]  # shuffled; 24 images, so the last of these is smaller
    batches.batch_size = 7
    predictions, store = training.predict(model, batches), batches.store
    expected = store.pixels[store.rows(predictions)].mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(predictions["probability"], expected, atol=1e-6)
    assert predictions["path"].tolist() != batches.index["path"].tolist() and len(predictions) == 24


def tiny_recipe(frozen, **options):
    stage = {"learning_rate": 0.01, "epochs": 3, "head": (24,), "patience": 5, "frozen": frozen}
    recipe = {"size": 32, "batch_size": 8, "dropout": 0.2, "stages": (Stage(**stage),)}
    return Recipe(backbone="ResNet50", **recipe | options)


@pytest.mark.parametrize("frozen", [True, False, "conv"])
def test_a_recipe_is_trained_once_and_its_model_is_the_whole_network(tiny, films, tmp_path, frozen):
    recipe = tiny_recipe(frozen)
    first, again = (training.train("tiny", recipe, films, SMOKE, "random", tmp_path) for _ in range(2))
    assert first.was_trained_now and not again.was_trained_now and first.info["weights"] == "random"
    for name, rows in (("test", first.predictions), ("dev", first.dev_predictions)):
        assert set(rows["path"]) == set(films.loc[films["split"].eq(name), "path"])
    assert {"loss", "accuracy", "auc", "kappa", "val_kappa", "learning_rate"} <= set(first.history)
    model = models.load(again)
    assert [layer.name for layer in model.layers] == ["Input", "Scale", "ResNet50", "Head"]
    found = training.predict(model, sets_of(films, 32, scale="0..255")["test"]).set_index("path")
    expected = first.predictions.set_index("path")["probability"]
    far = 1e-3 if frozen == "conv" else 1e-4  # cached maps are float16
    np.testing.assert_allclose(found.loc[expected.index, "probability"], expected, atol=far)
    report = metrics.image_report(first.predictions, samples=20)
    assert report.loc["OVERALL", ("n", "")] == 8 and report.attrs["weights"] == "random"


@pytest.mark.slow
def test_training_on_features_is_training_the_frozen_network(tiny, films, tmp_path):
    recipe = tiny_recipe(True)
    run = training.train("tiny", recipe, films, SMOKE, "random", tmp_path)
    keras.utils.set_random_seed(recipe.seed)
    extractor, sets = backbones.extractor("ResNet50", 32, "random"), sets_of(films, 32, scale="0..255")
    backbones.calibrate(extractor, sets["train original"])
    keras.utils.set_random_seed(recipe.seed)
    whole = models.with_head(extractor, models.transfer_head(6, (24,), 0.2))
    training.compiled(whole, recipe.stages[0])
    history = training.fit(whole, sets["train original"], sets["validation"], 3)
    columns = ["loss", "accuracy", "kappa", "val_loss", "val_auc"]
    np.testing.assert_allclose(run.history[columns], history[columns], atol=1e-3)


def test_what_the_keras_half_does_not_train_is_refused(films, tmp_path):
    stages = [replace(STAGE, **options) for options in ({"target": "both"}, {"epochs": None, "steps": 5})]
    cases = [{"stages": (stage,)} for stage in (*stages, replace(STAGE, fraction=0.5))]
    cases += [{"stages": (STAGE, STAGE)}, {"parts": ("HAND",)}]
    for options in (*cases, {"stages": (replace(STAGE, schedule="one_cycle"),)}):
        with pytest.raises(TrainingError, match="one stage, in epochs, on the label"):
            training.train("tiny", tiny_recipe(True, **options), films, SMOKE, "random", tmp_path)


def test_a_model_of_two_outputs_learns_label_and_body_part(films, tmp_path):
    def fit(epochs):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((16, 16, 3))
        x = keras.layers.Flatten()(inputs)
        label = keras.layers.Dense(1, activation="sigmoid", name="label")(x)
        part = keras.layers.Dense(7, activation="softmax", name="body_part")(x)
        model = keras.Model(inputs, {"label": label, "body_part": part})
        loss = {"label": "binary_crossentropy", "body_part": "sparse_categorical_crossentropy"}
        model.compile(keras.optimizers.Adam(0.001), loss, metrics={"label": models.abnormality_metrics()})
        history = training.fit(model, sets["train original"], sets["validation"], epochs, tmp_path)
        return model, history

    sets = sets_of(films, target=("label", "body_part"))
    fit(2)
    model, history = fit(8)  # goes on
    assert len(history) == 8 and history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    assert {"label_auc", "val_label_kappa", "body_part_loss"} <= set(history)
    found = training.predict(model, sets["test"])
    parts = found[list(data.BODY_PARTS)]
    np.testing.assert_allclose(parts.sum(axis=1), 1, atol=1e-5)
    assert (parts.idxmax(axis=1) == found["body_part"]).all() and found["probability"].between(0, 1).all()


def test_adamw_decays_the_weights_and_stopping_is_the_reports(films):
    sizes = []
    for decay in (0.0, 20.0):
        stage = replace(STAGE, optimizer="adamw", weight_decay=decay)
        keras.utils.set_random_seed(0)
        model, sets = training.compiled(tiny_model(), stage), sets_of(films)
        training.fit(model, sets["train original"], sets["validation"], 1)
        sizes.append(float(np.abs(model.get_layer("Output").get_weights()[0]).mean()))
    assert sizes[1] < 0.7 * sizes[0]
    assert training.stopping(STAGE) == []
    stop, halve = training.stopping(replace(STAGE, patience=5, plateau=3))
    assert (stop.monitor, stop.mode, stop.patience) == ("val_kappa", "max", 5) and stop.restore_best_weights
    assert (halve.monitor, halve.factor, halve.patience) == ("val_loss", 0.5, 3)


def test_a_gpu_gets_mixed_precision_where_the_profile_says_so(monkeypatch):
    gpu = type("Device", (), {"name": "/physical_device:GPU:0"})
    cases = [([], "full", "float32"), ([gpu], "full", "mixed_float16"), ([gpu], "demo", "float32")]
    for gpus, profile, policy in cases:
        with monkeypatch.context() as patch:
            patch.setattr(training.tf.config, "list_physical_devices", lambda kind, gpus=gpus: gpus)
            with training.on_devices(profiles.get(profile)):
                assert keras.config.dtype_policy().name == policy
                model = models.funnel_cnn("in", input_shape=(16, 16, 1), widest=8)
                assert model.output.dtype == models.transfer_head(6).outputs[0].dtype == "float32"
        assert keras.config.dtype_policy().name == "float32"


DEVICES = """
import json, runpy, sys
from pathlib import Path
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
test = runpy.run_path(sys.argv[1])
keras, models, training = (test[name] for name in ("keras", "models", "training"))
sets, found = test["sets_of"](test["make_index"](sys.argv[2])), {}
for name, devices, parts in (("one", (), (4,)), ("two", ("CPU:0", "CPU:1"), (2, 4))):
    for until in parts:  # on two devices it is resumed
        keras.utils.set_random_seed(0)
        with training.on_devices(test["SMOKE"], devices):
            model = training.compiled(models.funnel_cnn("in", 1, 0.0, (16, 16, 3), 4), test["STAGE"])
        halve = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=9)
        train, dev = sets["train original"], sets["validation"]
        history = training.fit(model, train, dev, until, Path(sys.argv[3], name), [halve])
    history = history.drop(columns="seconds").to_dict("list")
    probability = training.predict(model, sets["test"])["probability"].tolist()
    found[name] = [model.distribute_strategy.num_replicas_in_sync, history, probability]
Path(sys.argv[3], "found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_devices_give_what_one_gives_also_when_resumed(films, tmp_path):
    assert started(DEVICES, films, tmp_path).wait(300) == 0
    one, two = json.loads((tmp_path / "found.json").read_text()).values()
    assert (one[0], two[0]) == (1, 2) and len(set(one[1]["loss"])) == 4
    for column, values in one[1].items():
        np.testing.assert_allclose(two[1][column], values, atol=2e-3, err_msg=column)
    np.testing.assert_allclose(two[2], one[2], atol=2e-3)


CHILD = """
import runpy, sys, time
from pathlib import Path
test = runpy.run_path(sys.argv[1])
films = test["make_index"](sys.argv[2])
slow = test["keras"].callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.1))
test["tiny_fit"](films, Path(sys.argv[3]), slow)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(films, undisturbed, tmp_path):
    rng, file, written = random.Random(0), tmp_path / "checkpoint.npz", 0
    for _ in range(2):
        child = started(CHILD, films, tmp_path)
        while child.poll() is None and (not file.exists() or file.stat().st_mtime_ns == written):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        assert child.poll() is None, "the child ended before it could be killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
        written = file.stat().st_mtime_ns
    assert_ends_alike(tiny_fit(films, tmp_path), undisturbed)
