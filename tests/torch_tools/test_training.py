"""training.py: one training with Lightning; resumed, stopped early, refused where wrong."""

import numpy as np
import pandas as pd
import pytest
import torch
from making import flips
from sklearn.metrics import f1_score
from torch.nn import functional
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


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_stays_as_it_is_batchnorm_included(sets, tmp_path, frozen):
    model = model_of(frozen=frozen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, sets, tmp_path, epochs=1)
    changed = {name[:4] for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert changed == ({"head"} if frozen else {"head", "back"})


CYCLE = {"optimizer": "adamw", "weight_decay": 0.3, "schedule": "one_cycle"}


@pytest.mark.parametrize("changes", [{}, CYCLE])
def test_history_and_predictions_agree_with_plain_pytorch(sets, tmp_path, changes):
    model, plain = model_of(), model_of()
    history = fit(model, sets, tmp_path, epochs=2, **changes)
    optimiser, losses, loader = torch.optim.Adam(plain.parameters(), lr=0.01), [], sets["train"].torch()
    cycle = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)
    if changes:
        optimiser = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.3)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.01, total_steps=2 * len(loader))
    for _ in range(2):
        total = 0.0
        for x, y in loader:
            optimiser.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(plain(x)[:, 0], y)
            loss.backward()
            optimiser.step()
            cycle.step()
            total += float(loss.detach()) * len(y)
        losses.append(total / len(sets["train"].index))
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    assert history["epoch"].tolist() == [1, 2]
    assert history["learning_rate"].iloc[-1] == pytest.approx(cycle.get_last_lr()[0])
    dev = training.predict(model, sets["validation"])
    assert np.mean((dev["probability"] > 0.5) == dev["label"]) == pytest.approx(history["val_accuracy"].max())


@pytest.mark.parametrize("changes", [{}, CYCLE])
def test_interrupted_it_goes_on_with_history_best_and_stopping(sets, tmp_path, monkeypatch, changes):
    whole, options = model_of(), {"epochs": 30, "patience": 3, "learning_rate": 0.03} | changes
    expected = fit(whole, sets, tmp_path / "whole", **options)
    best = int(expected["val_accuracy"].idxmax())
    assert len(expected) == best + 4 < 30
    real = training.Task.on_train_epoch_start

    def stop(self):
        real(self)
        if len(self.rows) == len(expected) - 2:  # early stopping has begun to wait
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(training.Task, "on_train_epoch_start", stop)
        fit(model_of(), sets, tmp_path / "cut", **options)
    for done in (len(expected) - 2, len(expected)):
        before = training.read(tmp_path / "cut/last.ckpt")["rows"]
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


def test_a_steep_learning_rate_a_wrong_scale_and_another_models_folder_are_refused(sets, films, tmp_path):
    with pytest.raises(TrainingError, match="loss became .*Lower the learning rate, now 1e"):
        fit(model_of(), sets, tmp_path / "steep", learning_rate=1e36)
    wrong = {name: data.Batches(sets["train"].store, films, 8) for name in ("train", "validation")}
    with pytest.raises(DataError, match="expects 'imagenet', not '0..1'"):
        fit(model_of(), wrong, tmp_path)
    with pytest.raises(DataError, match="expects 'imagenet', not '0..1'"):
        training.predict(model_of(), wrong["train"])
    fit(model_of(), sets, tmp_path / "other", epochs=1)
    with pytest.raises(TrainingError, match="of another model.*Delete"):
        fit(model_of("both"), sets, tmp_path / "other", epochs=1)


def test_both_targets_at_once_are_the_sum_of_both_losses(films, store, tmp_path):
    both = data.kn_datasets(films, store, batch_size=8, workers=0, target=("label", "body_part"))
    model = model_of("both")
    history = fit(model, both, tmp_path, epochs=1, target="both")
    x, y = next(iter(both["validation"].torch()))  # all of dev
    with torch.inference_mode():
        said = model.eval()(x)
        label = functional.binary_cross_entropy_with_logits(said[:, 0], y["label"])
        loss = label + functional.cross_entropy(said[:, 1:], y["body_part"])
    assert len(x) == len(both["validation"].index) and history["val_loss"][0] == pytest.approx(float(loss))
    assert {"accuracy", "auc", "kappa", "f1", "val_auc", "val_f1"} <= set(history)
    assert {"probability", *data.BODY_PARTS} <= set(training.predict(model, both["test"]))
    # Early stopping looks at macro F1, and columns follow the outputs.
    parts = data.kn_datasets(films, store, batch_size=8, workers=0, target="body_part")
    model = model_of("body_part")
    history = fit(model, parts, tmp_path / "parts", epochs=3, target="body_part")
    found = training.predict(model, parts["validation"])
    said = found[list(data.BODY_PARTS)]
    f1 = f1_score(found["body_part"], said.idxmax(axis=1), average="macro")
    assert f1 == pytest.approx(history["val_f1"].max()) and np.allclose(said.sum(axis=1), 1)
    assert "probability" not in found and "kappa" not in history


def test_lower_blocks_learn_at_lower_rates():
    model = models.classifier("EfficientNetLite0", "linear", False, "random")
    of = {id(p): g["lr"] for g in training.parameter_groups(model, 1.0, 0.5) for p in g["params"]}
    assert len(of) == sum(1 for _ in model.parameters())
    assert of[id(model.head.weight)] == 1.0 and of[id(next(model.backbone.layer4.parameters()))] == 0.25
    assert min(of.values()) == of[id(next(model.backbone.stem.parameters()))]
    stage = Stage(epochs=1, learning_rate=1, layer_decay=0.5, frozen=False)
    groups = training.Task(model, stage).configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [0.5**i for i in range(7)]


@pytest.mark.filterwarnings("ignore:No (negative|positive) samples")
def test_the_auc_of_one_class_is_undefined_not_zero():
    auc = training.task_metrics()["label"]["auc"]
    for truth in ([0, 0], [1, 1], [0, 1]):
        found = auc(torch.tensor([0.1, 0.9]), torch.tensor(truth))  # of this batch
        assert torch.isnan(found) == (len(set(truth)) == 1)
