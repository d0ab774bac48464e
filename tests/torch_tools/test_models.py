"""models.py: backbones, KN's heads; where weights come from; what is saved."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from making import changed, flips
from torch_tools.tiny import classifier

from mura_course import data, disk, profiles, runs
from mura_course import weights as imagenet
from mura_course.data import features
from mura_course.errors import DataError, ModelError, RunError
from mura_course.torch_tools import models, training

SMOKE = profiles.get("smoke")
RESNET18 = models.BACKBONES["ResNet18"]


@pytest.mark.parametrize(("head", "trained"), [("linear", 513), ("two_linear", 512 * 513 + 513)])
def test_resnet18_with_kns_heads(monkeypatch, head, trained):
    monkeypatch.setitem(models.BACKBONES, "ResNet18", RESNET18)  # the real one
    model = models.resnet18(head, weights="random")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.backbone.parameters()) == 11_176_512  # 11,689,512 without its top
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 1) and model.expected_scale == "imagenet"
    model.put_head(head, 7)
    model.freeze(False)
    assert sum(p.requires_grad for p in model.backbone.parameters()) == 60
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("number", range(3))
def test_efficientnet_lite_is_the_packages_network_with_its_weights_and_divides_by_blocks(number):
    from efficientnet_lite_pytorch import EfficientNet

    name = f"EfficientNetLite{number}"
    original = EfficientNet.from_name(f"efficientnet-lite{number}", image_size=224)  # sets the padding
    original.load_state_dict(torch.load(imagenet.file(name), weights_only=True))
    ours, sides = models.classifier(name), {"layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2, "last": 2}
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype("float32"))
    with torch.inference_mode():
        expected = original.eval().extract_features(x).mean(dim=(2, 3))
        np.testing.assert_allclose(ours.backbone.eval()(x), expected, atol=1e-4)
        for block in models.BACKBONES[name].blocks:
            ours.freeze(block)
            trunk, top = ours.eval().parts
            assert trunk(x).shape[2:] == (sides[block],) * 2
            assert models.TorchExtractor(name, trunk, 64).size == 64
            np.testing.assert_allclose(top(trunk(x)), expected, atol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
def test_a_random_network_passes_a_signal_once_it_is_calibrated(films, store):
    module = models.backbone("EfficientNetLite0", "random")
    batches = data.Batches(store, films, batch_size=8, scale="-1..1", layout="nchw")
    with pytest.raises(DataError, match="torchEfficientNetLite0 makes the same of every image.*calibrate"):
        features.extract(models.TorchExtractor("EfficientNetLite0", module), batches)
    models.calibrate(module, batches)
    found = features.extract(models.TorchExtractor("EfficientNetLite0", module), batches).views[0]
    assert 0.1 < found.std(axis=0).mean() < 10

    tiny = models.backbone("ResNet18", "random")
    models.calibrate(tiny, batches, images=16)
    maps = tiny.layer1(torch.cat([torch.from_numpy(batches[i][0]) for i in (0, 1)]))
    torch.testing.assert_close(tiny.layer2.running_mean, maps.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(tiny.layer2.running_var, maps.var(dim=(0, 2, 3)), rtol=0.05, atol=0)
    assert tiny.layer2.momentum == 0.1


def test_a_backbone_is_frozen_up_to_a_block_has_a_digest_and_a_known_name():
    model = classifier(frozen="layer1")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained[:2] == ["backbone.layer2.weight", "backbone.layer2.bias"] and len(trained) == 6
    assert model.train().backbone.layer2.training and not model.backbone.layer1.training
    assert not any(name.startswith("parts") for name in model.state_dict())
    module = models.backbone("ResNet18", "random")
    before = models.TorchExtractor("ResNet18", module).digest
    assert models.TorchExtractor("ResNet18", module).digest == before
    module.layer1.bias.data += 1
    assert models.TorchExtractor("ResNet18", module).digest != before
    for call in (models.backbone, lambda name: models.make_head(name, 6, 1)):
        with pytest.raises(ModelError, match="must be one of '.*, not 'VGG16'"):
            call("VGG16")
    with pytest.raises(ModelError, match="last frozen block must be one of 'layer1', 'layer2', not 'layer5'"):
        model.freeze("layer5")


def test_imagenets_weights_fill_resnet18_without_its_top(tmp_path, monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "ResNet18", RESNET18)
    stored = RESNET18.build().state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(9)}
    torch.save(stored, tmp_path / "stored")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url, digest, _ = imagenet.PUBLISHED["ResNet18"]
    assert url == models.torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url and f"-{digest}." in url
    file, digest = Path(torch.hub.get_dir(), "checkpoints/resnet18.pth"), disk.digest(tmp_path / "stored")
    known = (f"http://127.0.0.1:9/{file.name}", digest[:8], imagenet.TORCH)  # where nobody answers
    monkeypatch.setitem(imagenet.PUBLISHED, "ResNet18", known)
    assert models.find_weights("ResNet18", SMOKE) == "random"
    (tmp_path / "stored").rename(file)
    assert models.find_weights("ResNet18", SMOKE) == "imagenet"
    ours = models.resnet18().backbone.state_dict()
    assert len(ours) == len(stored) - 2 and all(torch.equal(ours[name], stored[name]) for name in ours)


def a_run(model, films, store):
    rows = training.predict(model, data.kn_datasets(films, store)["test"])
    return runs.fit_or_load("one", {}, lambda workdir: (model, None, rows), films, SMOKE)


def test_models_are_saved_as_safetensors_and_loaded_equal_or_with_a_flipped_byte_refused(films, store):
    test, model = data.kn_datasets(films, store)["test"], classifier()
    made = a_run(model, films, store)
    assert made.model_file().name == "model.safetensors"
    again = models.load(runs.load(made.folder))
    probability = training.predict(again, test)["probability"]
    np.testing.assert_allclose(probability, made.predictions["probability"], rtol=1e-6)
    assert again.architecture == model.architecture and again.expected_scale == "imagenet"
    torch.testing.assert_close(models.load(made, into=classifier()).state_dict(), again.state_dict())
    with pytest.raises(RunError, match="of another model than was asked for"):
        models.load(made, into=torch.nn.Linear(2, 2))
    file = made.model_file()
    for content in flips(file.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(RunError, match="model.safetensors"):
            models.load(made)


def test_a_heat_map_is_that_of_finite_differences_an_image_at_a_time():
    layers = [torch.nn.Conv2d(3, 4, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(48, 2)]
    top, h = torch.nn.Sequential(*layers).double().requires_grad_(False), 1e-6
    with torch.inference_mode():  # whose tensors autograd refuses
        maps, steps = torch.randn(2, 3, 4, 5).double(), h * torch.eye(60).double().view(60, 3, 4, 5)
    for image, output in enumerate((1, 0)):
        apart = top(maps[image] + steps) - top(maps[image] - steps)
        slope = apart[:, output].view(3, 4, 5) / 2 / h
        for weight in (slope.mean(dim=(1, 2), keepdim=True), slope):
            found = models.grad_cam(top, maps, torch.tensor([1, 0]), weight is slope)[image]
            torch.testing.assert_close(found, (weight * maps[image]).sum(0).relu(), rtol=1e-6, atol=1e-6)


class Planted:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_fault_4_a_planted_pickle_does_not_run(films, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Planted()}, tmp_path / "planted")
    made = a_run(classifier(), films, store)
    content, digest = (tmp_path / "planted").read_bytes(), disk.digest(tmp_path / "planted")
    made.model_file().write_bytes(content)
    forged = {"model.safetensors": {"bytes": len(content), "sha256": digest}}
    changed(made.folder / "run.json", files=made.info["files"] | forged)
    with pytest.raises(RunError, match="of another model than was asked for"):
        models.load(runs.load(made.folder))
    (tmp_path / "last.ckpt").write_bytes(bytes.fromhex(digest) + content)
    with pytest.raises(training.TrainingError, match="last.ckpt is damaged"):
        training.read(tmp_path / "last.ckpt")
    monkeypatch.setattr(imagenet, "file", lambda name: tmp_path / "planted")
    with pytest.raises(Exception, match="[Ww]eights only"):
        models.backbone("ResNet18")
    assert not (tmp_path / "ran").exists()
