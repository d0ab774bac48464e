"""training.py: one training with Lightning; resumed, stopped early, refused where wrong."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn import functional
from torch_tools.test_models import flips
from torch_tools.tiny import classifier

from mura_course import data
from mura_course.errors import DataError, TrainingError
from mura_course.recipes import Stage
from mura_course.torch_tools import models, training


def model_of(target="label", frozen=False, seed=0):
    torch.manual_seed(seed)
    return classifier(training.OUTPUTS[target], frozen)


def fit(model, sets, workdir, **changes):
    stage = Stage(**{"epochs": 4, "learning_rate": 0.01, "patience": 9} | changes)
    return training.fit(model, sets["train"], sets["validation"], stage, workdir)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_stays_as_it_is_batchnorm_included(sets, tmp_path, frozen):
    model = model_of(frozen=frozen)
    before = weights_of(model)
    fit(model, sets, tmp_path, epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("head") for name in changed)
    assert any(name.startswith("backbone") for name in changed) == (not frozen)


def test_history_and_predictions_agree_with_plain_pytorch(sets, tmp_path):
    model, plain = model_of(), model_of()
    history = fit(model, sets, tmp_path, epochs=2)
    assert history["epoch"].tolist() == [1, 2] and history["learning_rate"].tolist() == [0.01, 0.01]
    assert {"accuracy", "auc", "kappa", "val_loss", "val_auc", "val_kappa", "seconds"} <= set(history)
    optimiser, losses, loader = torch.optim.Adam(plain.parameters(), lr=0.01), [], sets["train"].torch()
    for _ in range(2):
        total = 0.0
        for x, y in loader:
            optimiser.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(plain(x)[:, 0], y)
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(y)
        losses.append(total / len(sets["train"].index))
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    dev = training.predict(model, sets["validation"])
    assert np.mean((dev["probability"] > 0.5) == dev["label"]) == pytest.approx(history["val_accuracy"].max())
    pd.testing.assert_frame_equal(dev, training.predict(model, sets["validation"]))


class Interrupted(Exception):
    pass


def test_interrupted_it_goes_on_with_history_best_epoch_and_early_stopping(
    sets, tmp_path, monkeypatch, capsys
):
    whole, options = model_of(), {"epochs": 30, "patience": 3, "learning_rate": 0.03}
    expected = fit(whole, sets, tmp_path / "whole", **options)
    best = int(expected["val_accuracy"].idxmax())
    assert len(expected) == best + 4 < 30
    real = training.History.on_train_epoch_start

    def stop(self, trainer, module):
        real(self, trainer, module)
        if len(self.rows) == len(expected) - 2:  # early stopping has begun to wait
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training.History, "on_train_epoch_start", stop)
        fit(model_of(), sets, tmp_path / "cut", **options)
    for done in (len(expected) - 2, len(expected)):
        before = training.read(tmp_path / "cut/last.ckpt")["callbacks"]["History"]["rows"]
        assert len(before) == done
        model = model_of(seed=9)  # its weights come from the checkpoint
        history = fit(model, sets, tmp_path / "cut", **options)
        assert history["seconds"].tolist()[:done] == [row["seconds"] for row in before]  # not trained again
        columns = [name for name in expected if name != "seconds"]
        pd.testing.assert_frame_equal(history[columns], expected[columns])
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, whole.state_dict()[name])


def test_fault_4_a_flipped_byte_in_a_resume_file_is_noticed(sets, tmp_path):
    fit(model_of(), sets, tmp_path, epochs=2)
    for name in ("last.ckpt", "best.ckpt"):
        whole = (tmp_path / name).read_bytes()
        for changed in (*flips(whole), whole[: len(whole) // 2], b""):
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(TrainingError, match=f"{name} is damaged.*Delete {tmp_path}"):
                fit(model_of(), sets, tmp_path, epochs=2)
        (tmp_path / name).write_bytes(whole)
    assert len(fit(model_of(), sets, tmp_path, epochs=2)) == 2


def test_a_loss_that_is_not_a_number_a_wrong_scale_and_another_models_folder_are_refused(
    sets, films, tmp_path
):
    with pytest.raises(TrainingError, match="loss became .*Lower the learning rate, now 1e"):
        fit(model_of(), sets, tmp_path / "steep", learning_rate=1e36)
    wrong = {name: data.Batches(sets["train"].store, films, 8) for name in ("train", "validation")}
    with pytest.raises(DataError, match="expects pixels scaled to 'imagenet'"):
        fit(model_of(), wrong, tmp_path)
    with pytest.raises(DataError, match="expects pixels scaled to 'imagenet'"):
        training.predict(model_of(), wrong["train"])
    fit(model_of(), sets, tmp_path / "other", epochs=1)
    with pytest.raises(TrainingError, match="left by another model.*Delete"):
        fit(model_of("both"), sets, tmp_path / "other", epochs=1)


def test_without_patience_the_last_epoch_counts_and_dev_may_be_missing(sets, tmp_path):
    stage = Stage(steps=5, learning_rate=0.01)
    blind, watched = model_of(), model_of()
    history = training.fit(blind, sets["train"], None, stage, tmp_path / "blind")
    assert len(history) == 2 and "val_loss" not in history  # three batches an epoch
    with_dev = training.fit(watched, sets["train"], sets["validation"], stage, tmp_path / "watched")
    np.testing.assert_allclose(history["loss"], with_dev["loss"])
    for name, value in blind.state_dict().items():
        torch.testing.assert_close(value, watched.state_dict()[name])


def test_both_targets_at_once_are_the_sum_of_both_losses(films, store, tmp_path):
    both = data.kn_datasets(films, store, batch_size=8, workers=0, target=("label", "body_part"))
    model = model_of("both")
    x, y = next(iter(both["train"].torch()))
    task = training.Task(model.eval(), Stage(epochs=1, learning_rate=1, target="both"))
    task.log = lambda *_, **__: None
    label = functional.binary_cross_entropy_with_logits(model(x)[:, 0], y["label"])
    part = functional.cross_entropy(model(x)[:, 1:], y["body_part"])
    torch.testing.assert_close(task.training_step((x, y), 0), label + part)
    history = fit(model, both, tmp_path, epochs=2, target="both")
    assert {"accuracy", "auc", "kappa", "f1", "val_auc", "val_f1"} <= set(history)


def test_early_stopping_looks_at_macro_f1_and_columns_follow_the_outputs(films, store, tmp_path):
    parts = data.kn_datasets(films, store, batch_size=8, workers=0, target="body_part")
    model, names = model_of("body_part"), list(data.BODY_PARTS)
    history = fit(model, parts, tmp_path, epochs=3, target="body_part")
    found = training.predict(model, parts["validation"])
    called = found[names].idxmax(axis=1)
    assert f1_score(found["body_part"], called, average="macro") == pytest.approx(history["val_f1"].max())
    np.testing.assert_allclose(found[names].sum(axis=1), 1)
    assert "probability" not in found and "kappa" not in history
    both = training.predict(model_of("both"), parts["test"])
    assert both["probability"].std() > 0 and set(names) < set(both)


def test_of_one_class_there_is_no_area_under_the_curve():
    auc = training.task_metrics("label")["label"]["auc"]
    auc.update(torch.tensor([0.2, 0.7]), torch.tensor([1, 1]))
    assert auc.compute().isnan()
    auc.update(torch.tensor([0.3]), torch.tensor([0]))
    assert auc.compute() == 0.5


def test_lower_blocks_learn_at_lower_rates(sets, tmp_path):
    model = models.classifier("EfficientNetLite0", "linear", False, "random")
    of = {id(p): g["lr"] for g in training.parameter_groups(model, 1.0, 0.5) for p in g["params"]}
    assert len(of) == sum(1 for _ in model.parameters())
    assert of[id(model.head.weight)] == 1.0 and of[id(next(model.backbone.layer4.parameters()))] == 0.25
    assert min(of.values()) == of[id(next(model.backbone.stem.parameters()))]
    model = model_of()
    before = weights_of(model)
    history = fit(model, sets, tmp_path, epochs=1, layer_decay=1e-12)
    assert history["learning_rate"].tolist() == [0.01]  # the head's
    moved = {n: (v - before[n]).abs().max() > 1e-6 for n, v in model.named_parameters()}
    assert all(moved[name] == name.startswith("head") for name in moved)
