"""torch_transfer.py: trainings of one or several stages as runs, killed at random, refused where wrong."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

import killing  # noqa: E402
import torch_films  # noqa: E402

from mura_course import data, feature_store, pixels, profiles, runs, torch_models  # noqa: E402
from mura_course import torch_training as training  # noqa: E402
from mura_course import torch_transfer as transfer  # noqa: E402

SMOKE = profiles.get("smoke")


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> pd.DataFrame:
    return torch_films.make(tmp_path_factory.mktemp("films"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(torch_models, "BACKBONES", dict(torch_models.BACKBONES))
    torch_films.put_in_place_of_resnet18()


def config(*stages, **changes) -> dict:
    return transfer.config("ResNet18", list(stages), SMOKE, **{"share": 1.0, "batch_size": 8} | changes)


def run(films, root, *stages, name="tiny", **changes) -> runs.Run:
    return transfer.staged_run(name, config(*stages, **changes), films, SMOKE, "random", root)


FROZEN = transfer.stage("label", "two_linear", rate=0.01, epochs=3, views=3)
PARTS = transfer.stage("body_part", "two_linear", frozen=False, rate=0.01, epochs=2)


def test_frozen_on_as_many_views_as_epochs_is_training_end_to_end(tiny, films, tmp_path):
    found = run(films, tmp_path, FROZEN)
    torch.manual_seed(0)
    module = torch_models.backbone("ResNet18", "random")
    torch.manual_seed(0)
    model = torch_models.ImageClassifier("ResNet18", module, "two_linear", 1, frozen=True)
    store = pixels.PixelStore.open_or_build(films, SMOKE.image_size_resnet18)
    sets = pixels.kn_datasets(films, store, batch_size=8)
    task = training.Task(model, 0.01)
    history = training.torch_fit(task, sets["train"], sets["validation"], 3, tmp_path / "end")
    same = ["loss", "accuracy", "auc", "val_loss", "val_accuracy", "val_kappa"]
    np.testing.assert_allclose(found.history[same], history[same], atol=1e-4)
    expected = training.predict(model, sets["test"])
    np.testing.assert_allclose(found.predictions["probability"], expected["probability"], atol=1e-4)
    again = training.predict(runs.load(found.folder).load_model(), sets["test"])
    np.testing.assert_allclose(again["probability"], expected["probability"], atol=1e-4)
    assert found.predictions["probability"].std() > 1e-3


def test_stages_follow_one_another_and_what_two_configs_begin_with_is_trained_once(
    tiny, films, tmp_path, monkeypatch
):
    trained, real = [], training.torch_fit

    def count(task, *arguments, **options):
        history = real(task, *arguments, **options)
        trained.append(task.target)
        return history

    monkeypatch.setattr(training, "torch_fit", count)
    frozen = run(films, tmp_path, PARTS, FROZEN)
    assert trained == ["body_part", "label"]
    assert frozen.history["stage"].tolist() == [1, 1, 2, 2, 2]
    assert frozen.history["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert frozen.history["val_f1"].notna().tolist() == [True, True, False, False, False]
    unfrozen = run(films, tmp_path, PARTS, FROZEN | {"frozen": False, "views": 1}, name="unfrozen")
    assert unfrozen.history["seconds"][:2].equals(frozen.history["seconds"][:2])  # not trained again
    one, other = (found.load_model().backbone.state_dict() for found in (frozen, unfrozen))
    assert not torch.equal(
        one["layer1.weight"], other["layer1.weight"]
    )  # the second stage went on from there
    kept = run(films, tmp_path, FROZEN, FROZEN | {"head": None, "rate": 0.001}, name="two_rates")
    assert kept.history["learning_rate"].tolist() == [0.01] * 3 + [0.001] * 3
    first, last = kept.history["loss"].iloc[[2, 3]]
    assert abs(last - first) < 0.2  # not a new head's


def test_both_heads_predict_the_body_part_too(tiny, films, tmp_path):
    found = run(films, tmp_path, transfer.stage("both", frozen=False, rate=0.01, epochs=2))
    np.testing.assert_allclose(found.predictions[list(data.BODY_PARTS)].sum(axis=1), 1)
    assert found.load_model().architecture["outputs"] == 8


def test_a_specialist_learns_and_is_tested_on_its_part_alone(tiny, films, tmp_path):
    found = run(films, tmp_path, FROZEN, parts=["WRIST"])
    assert set(found.predictions["body_part"]) == {"WRIST"}
    some = run(films, tmp_path, PARTS | {"share": 0.5}, FROZEN, name="some")
    assert len(some.predictions) == len(films[films["split"].eq("test")])
    steps = run(films, tmp_path, FROZEN | {"epochs": None, "steps": 5}, parts=["WRIST"], name="steps")
    assert steps.info["epochs"] == 3  # of two batches each
    no_dev = films[films["split"].ne("dev") | films["body_part"].ne("WRIST")]
    no_dev.attrs = films.attrs
    to_the_end = FROZEN | {"patience": None, "epochs": 4}
    blind = run(no_dev, tmp_path, to_the_end, parts=["WRIST"], name="blind")
    watched = run(films, tmp_path, to_the_end, parts=["WRIST"], name="watched")
    assert "val_accuracy" not in blind.history and len(watched.history) == 4
    np.testing.assert_allclose(blind.history["loss"], watched.history["loss"])
    np.testing.assert_allclose(blind.predictions["probability"], watched.predictions["probability"])


@pytest.mark.slow
def test_a_routed_run_is_its_specialists_picked_by_its_router(tiny, tmp_path):
    films = torch_films.make(tmp_path / "films", data.BODY_PARTS, 140)
    profile = dataclasses.replace(SMOKE, image_size_specialists=32, specialist_steps=6, torch_epochs=8)
    found = transfer.routed_run(films, profile, "ResNet18", "random", tmp_path)
    again = transfer.routed_run(films, profile, "ResNet18", "random", tmp_path)
    assert not again.was_trained_now and found.info["config"]["router"]["stages"][0]["target"] == "body_part"
    system = again.load_model()
    assert system.shares
    rows = found.predictions
    picked = rows[list(data.BODY_PARTS)].idxmax(axis=1)
    assert picked.nunique() > 1  # right or wrong
    for part in data.BODY_PARTS:
        own = transfer.specialist_run(films, profile, "ResNet18", part, "random", tmp_path)
        assert not own.was_trained_now  # the routed run has trained it
        said = own.predictions.set_index("path")["probability"]
        here = rows[picked.eq(part) & rows["body_part"].eq(part)]
        np.testing.assert_allclose(here["probability"], said[here["path"]], atol=1e-5)
    assert transfer.specialist_config(profile, "ResNet18")["stages"][0]["steps"] == 7 * 6
    general = transfer.specialist_run(films, profile, "ResNet18", None, "random", tmp_path)
    assert general.info["name"] == "resnet18_all_parts"
    assert set(general.predictions["path"]) == set(rows["path"])


@pytest.mark.parametrize("backbone", ["ResNet18", "EfficientNetLite0"])
def test_lower_layers_learn_at_lower_rates(backbone):
    model = torch_models.classifier(backbone, "linear", False, "random")
    rates = transfer.layer_rates(model, 1.0, 0.5)
    of = {id(p): rate for part, rate in rates for p in part.parameters()}
    assert len(of) == sum(1 for _ in model.parameters())
    assert of[id(model.head.weight)] == 1.0
    assert of[id(next(model.backbone.layer4.parameters()))] == (0.5 if backbone == "ResNet18" else 0.25)
    assert min(of.values()) == of[id(next(model.backbone.parameters()))]
    assert transfer.layer_rates(model, 0.1, 1) == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transfer.stage("patient", rate=1, epochs=1), "no target 'patient'.*label, body_part, both"),
        (lambda: transfer.stage(head="three", rate=1, epochs=1), "no head 'three'"),
        (lambda: transfer.stage(rate=1, epoch=1), "no setting of a stage 'epoch'"),
        (lambda: transfer.stage(rate=1), "needs a rate, and either epochs or steps"),
        (lambda: transfer.stage(rate=1, epochs=1, steps=1), "either epochs or steps"),
        (lambda: config(FROZEN, sizes=3), "no setting of a training 'sizes'"),
        (lambda: transfer.config("VGG", [FROZEN], SMOKE), "no backbone 'VGG'"),
    ],
)
def test_settings_that_there_are_not_are_refused(make, message):
    with pytest.raises(torch_models.TorchModelError, match=message):
        make()


def test_what_cannot_be_learned_is_refused_before_anything_is_trained(tiny, films, tmp_path):
    one_class = films[films["label"].eq(0) | films["body_part"].ne("WRIST")]
    no_dev = films[films["split"].ne("dev") | films["body_part"].ne("WRIST")]
    one_class.attrs = no_dev.attrs = films.attrs
    for some, parts, message in (
        (one_class, ["WRIST"], "In train, WRIST has .* images of 1 class"),
        (films, ["ELBOW"], "In train, ELBOW has 0 images of 0 class"),
        (no_dev, ["WRIST"], "In dev, WRIST has no image to stop by"),
        (films, ["KNEE"], "no body part 'KNEE'"),
    ):
        with pytest.raises(torch_models.TorchModelError, match=message):
            run(some, tmp_path, FROZEN, parts=parts)
    with pytest.raises(torch_models.TorchModelError, match="last stage must learn the label"):
        run(films, tmp_path, PARTS)
    with pytest.raises(torch_models.TorchModelError, match="first stage needs a head"):
        run(films, tmp_path, FROZEN | {"head": None})


# Killed at random ---------------------------------------------------------------------------------


def one_run(root: Path, pause: float) -> None:
    """A run of two stages, unfrozen and frozen, on a folder of features and of first stages of its own."""
    os.environ["MURA_CACHE"] = str(root / "cache")
    torch.set_num_threads(1)
    torch_films.put_in_place_of_resnet18()
    films = torch_films.make(root.parent / "films")
    real = pixels.Batches._batch

    def slowly(self, *arguments):
        time.sleep(pause)
        return real(self, *arguments)

    pixels.Batches._batch = slowly
    stages = [PARTS | {"epochs": 4}, FROZEN | {"frozen": False, "epochs": 6, "patience": 3}]
    run(films, root, *stages)


def epochs_done(root: Path) -> int:
    """One for each checkpoint of the last epoch that appeared, told by its time of change."""
    files = [*root.glob("cache/stages/*/last.ckpt"), *root.glob("*/*/*.partial/last.ckpt")]
    seen = vars(epochs_done).setdefault("seen", {}).setdefault(root, set())
    for file in files:
        try:
            seen.add((file, file.stat().st_mtime_ns))
        except FileNotFoundError:  # renamed away between the two lines
            continue
    return len(seen)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    torch_films.make(tmp_path / "films")
    happened = killing.in_a_process(
        "import killing, test_torch_transfer as t; "
        f"killing.kill_at_random(t.one_run, t.epochs_done, killing.Path({str(tmp_path)!r}), kills=3, seed=0)"
    )
    assert len(happened) >= 1

    def weights(found):
        stored = torch.load(found.model_path, weights_only=True)
        return [value.numpy() for value in stored.values()]

    found = killing.assert_killed_equals_undisturbed(tmp_path, weights)
    assert len(found.history) > 5 and found.history["stage"].nunique() == 2


def test_features_left_half_done_by_a_kill_are_found_again(tiny, films, tmp_path, monkeypatch):
    real, calls = torch_models.TorchExtractor.__call__, []

    def dies(self, x, batch_size):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, x, batch_size)

    monkeypatch.setattr(feature_store, "SECONDS_BETWEEN_NOTES", 0)
    expected = run(films, tmp_path / "whole", FROZEN, seed=2)
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch_models.TorchExtractor, "__call__", dies)
        run(films, tmp_path / "cut", FROZEN, seed=2)
    found = run(films, tmp_path / "cut", FROZEN, seed=2)
    assert found.was_trained_now
    pd.testing.assert_frame_equal(found.predictions, expected.predictions)
