"""torch_training.py: a training with Lightning that ends the same if interrupted, on one process or two."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

import torch_films  # noqa: E402

from mura_course import data, pixels, torch_models  # noqa: E402
from mura_course import torch_training as training  # noqa: E402
from mura_course.errors import DataError  # noqa: E402


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> pd.DataFrame:
    return torch_films.make(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def store(films) -> pixels.PixelStore:
    return pixels.PixelStore.open_or_build(films, 32, progress=False)


@pytest.fixture
def sets(films, store) -> dict[str, pixels.Batches]:
    return pixels.kn_datasets(films, store, batch_size=8, workers=0)


def task(frozen=False, rate=0.01, target="label", seed=0, kind=torch_films.Tiny):
    torch.manual_seed(seed)
    outputs = training.TARGETS[target]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_models, "BACKBONES", {})
        torch_films.put_in_place_of_resnet18(kind)
        model = torch_models.ImageClassifier("ResNet18", kind(), "two_linear", outputs, frozen)
    return training.Task(model, rate, target)


def fit(one, sets, workdir, epochs=4, **options):
    return training.torch_fit(one, sets["train"], sets["validation"], epochs, workdir, **options)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_stays_as_it_is_batchnorm_included(sets, tmp_path, frozen):
    one = task(frozen)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    fit(one, sets, tmp_path, epochs=1)
    changed = {name for name, value in one.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("head") for name in changed)
    assert any(name.startswith("backbone") for name in changed) == (not frozen)


def test_history_and_predictions_agree_with_plain_pytorch(sets, films, tmp_path):
    one, plain = task(), task()
    history = fit(one, sets, tmp_path, epochs=2)
    assert history["epoch"].tolist() == [1, 2] and {"accuracy", "auc", "kappa", "val_auc"} <= set(history)
    loader = sets["train"].torch()
    optimiser, losses = torch.optim.Adam(plain.model.parameters(), lr=0.01), []
    for _ in range(2):
        total = 0.0
        for x, y in loader:
            optimiser.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(plain.model(x)[:, 0], y)
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(y)
        losses.append(total / 24)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    best = history["val_accuracy"].max()
    dev = training.predict(one.model, sets["validation"])
    assert np.mean((dev["probability"] > 0.5) == dev["label"]) == pytest.approx(best)
    again = training.predict(one.model, sets["validation"])
    pd.testing.assert_frame_equal(dev, again)


def test_the_body_part_is_learned_with_macro_f1(sets, films, tmp_path):
    store = sets["train"].store
    parts = pixels.kn_datasets(films, store, batch_size=8, workers=0, target="body_part")
    one = task(target="body_part")
    history = fit(one, parts, tmp_path, epochs=2, monitor="val_f1")
    assert history["val_f1"].between(0, 1).all()
    shares = training.predict(one.model, parts["test"], "body_part")
    np.testing.assert_allclose(shares[list(data.BODY_PARTS)].sum(axis=1), 1)


class Interrupted(Exception):
    pass


def test_interrupted_and_damaged_it_ends_the_same(sets, tmp_path, monkeypatch, capsys):
    whole = task()
    expected = fit(whole, sets, tmp_path / "whole", epochs=5).drop(columns="seconds")
    real = pixels.Batches.set_epoch

    def stop(self, epoch):
        real(self, epoch)
        if self.shuffle and epoch == 3:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(pixels.Batches, "set_epoch", stop)
        fit(task(), sets, tmp_path / "cut", epochs=5)
    for damage in (False, True):
        if damage:
            (tmp_path / "cut/last.ckpt").write_bytes(b"half a checkp")
        one = task(seed=9)  # its weights come from the checkpoint
        history = fit(one, sets, tmp_path / "cut", epochs=5).drop(columns="seconds")
        pd.testing.assert_frame_equal(history, expected, check_exact=True)
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[name]), name
    assert "last.ckpt is damaged" in capsys.readouterr().out


def test_a_loss_that_is_no_number_and_a_wrong_scale_stop_at_once(sets, films, tmp_path):
    with pytest.raises(
        torch_models.TorchModelError, match="loss became .*[Ll]ower the learning rate, now 1e"
    ):
        fit(task(rate=1e36), sets, tmp_path, epochs=4)
    wrong = pixels.Batches(sets["train"].store, films, 8, scale="0..1")
    with pytest.raises(DataError, match="expects pixels scaled to 'imagenet'"):
        training.predict(task().model, wrong)
    with pytest.raises(DataError, match="expects pixels scaled to 'imagenet'"):
        training.torch_fit(task(), wrong, wrong, 1, tmp_path)


def test_a_workdir_of_another_model_is_refused_and_one_at_its_end_is_not_trained_again(
    sets, tmp_path, capsys
):
    one = task()
    history = fit(one, sets, tmp_path, epochs=2)
    capsys.readouterr()
    other = task(seed=3)
    pd.testing.assert_frame_equal(fit(other, sets, tmp_path, epochs=2), history)
    assert capsys.readouterr().out == "Nothing left to train here: 2 epochs were finished earlier.\n"
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(torch_models.TorchModelError, match="left by another model.*delete"):
        fit(task(target="body_part"), sets, tmp_path, epochs=3)


def test_a_best_epoch_that_is_lost_is_said(sets, tmp_path):
    fit(task(), sets, tmp_path, epochs=2)
    for content in (b"half a file", None):
        (tmp_path / "best.ckpt").write_bytes(content) if content else (tmp_path / "best.ckpt").unlink()
        with pytest.raises(torch_models.TorchModelError, match="best.ckpt.*missing or damaged.*Delete"):
            fit(task(), sets, tmp_path, epochs=2)


def test_early_stopping_keeps_the_best_epoch(sets, tmp_path):
    one = task(rate=0.03)
    history = fit(one, sets, tmp_path, epochs=30, patience=2)
    best = int(history["val_accuracy"].idxmax())
    assert len(history) == best + 3 < 30
    dev = training.predict(one.model, sets["validation"])
    found = np.mean((dev["probability"] > 0.5) == dev["label"])
    assert found == pytest.approx(history["val_accuracy"][best])


def test_both_targets_at_once_are_the_sum_of_both_losses(films, store, tmp_path):
    options = {"batch_size": 8, "workers": 0, "target": ("label", "body_part")}
    both = pixels.kn_datasets(films, store, **options)
    one = task(target="both")
    x, y = next(iter(both["train"].torch()))
    logits = one.model.eval()(x)
    label = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y["label"])
    part = torch.nn.functional.cross_entropy(logits[:, 1:], y["body_part"])
    torch.testing.assert_close(one.loss(logits, y), label + part)
    history = fit(one, both, tmp_path, epochs=2)
    assert {"accuracy", "auc", "kappa", "f1", "val_auc", "val_f1"} <= set(history)
    test = pixels.kn_datasets(films, store, batch_size=8)["test"]
    assert training.predict(one.model, test)["probability"].between(0, 1).all()
    assert training.predict(one.model, test, "body_part")["HAND"].between(0, 1).all()
    both = training.predict(one.model, test, "both")
    assert both.equals(
        training.predict(one.model, test, "body_part").assign(
            probability=training.predict(one.model, test)["probability"]
        )
    )
    with pytest.raises(torch_models.TorchModelError, match="no target 'finding'"):
        training.predict(one.model, test, "finding")


def test_of_one_class_there_is_no_area_under_the_curve():
    metrics = training.task_metrics("label")["label"]
    metrics.update(torch.tensor([0.2, 0.7]), torch.tensor([1, 1]))
    assert metrics.compute()["auc"].isnan()
    metrics.update(torch.tensor([0.3]), torch.tensor([0]))
    assert metrics.compute()["auc"] == 0.5


def test_parts_of_a_model_learn_at_rates_of_their_own(sets, tmp_path):
    one = task()
    one.rate = [(one.model.backbone, 0.0), (one.model.head, 0.01)]
    before = {name: value.clone() for name, value in one.model.named_parameters()}
    history = fit(one, sets, tmp_path, epochs=1)
    for name, value in one.model.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("backbone"), name
    assert history["learning_rate"].tolist() == [0.01]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_of_the_processes_make_up_the_batch_and_its_mean(sets, world):
    batches = sets["train"]
    whole = [(x, y) for x, y in batches.torch()]
    seen = []
    for rank in range(world):
        trainer = type("Trainer", (), {"global_rank": rank, "world_size": world})
        batches.set_epoch(0)
        seen.append(list(training._Shares(batches, trainer).loader()))
    for i, (x, y) in enumerate(whole):
        parts = [share[i] for share in seen]
        mean = sum(float(w) * part[0].mean() for part, w in ((p, p[2]) for p in parts)) / world
        torch.testing.assert_close(mean, x.mean(), atol=1e-5, rtol=1e-5)
        kept = torch.cat([part[1] for part in parts if float(part[2]) > 0])
        assert sorted(kept.tolist()) == sorted(y.tolist())


DDP = """
import sys, json, pandas
sys.path.insert(0, sys.argv[4])
import torch, torch_films
torch.set_num_threads(1)
from pathlib import Path
from mura_course import profiles, torch_transfer as transfer
if __name__ == "__main__":
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    torch_films.put_in_place_of_resnet18(torch_films.TinyWithoutBatchNorm)
    films = pandas.read_pickle(folder / "films.pkl")
    profile = profiles.get("smoke")
    stages = [transfer.stage("body_part", "linear", False, rate=0.01, epochs=2),
              transfer.stage("label", "two_linear", False, rate=0.01, epochs=int(sys.argv[3]), patience=9)]
    config = transfer.config("ResNet18", stages, profile, share=1.0, size=32, batch_size=7)
    run = transfer.staged_run("ddp", config, films, profile, "random", folder / f"runs{devices}",
                              accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    print(run.describe(), torch.distributed.is_initialized() and torch.distributed.get_world_size())
"""


def train_in_processes(folder: Path, devices: int, epochs: int = 3) -> subprocess.CompletedProcess:
    (folder / "ddp.py").write_text(DDP)
    environment = {**os.environ, "MURA_CACHE": str(folder / f"cache{devices}")}
    command = [sys.executable, str(folder / "ddp.py"), str(folder), str(devices), str(epochs)]
    return subprocess.run(
        [*command, str(Path(__file__).parent)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_two_processes_train_as_one(films, tmp_path):
    films.to_pickle(tmp_path / "films.pkl")
    tables = {}
    for devices in (1, 2):
        done = train_in_processes(tmp_path, devices)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("2" if devices == 2 else "False") in done.stdout.splitlines()[-1][-6:]
        (folder,) = (tmp_path / f"runs{devices}").glob("*/smoke/ddp-*[!.k]")
        tables[devices] = [pd.read_csv(folder / name) for name in ("history.csv", "predictions.csv")]
        assert not list(folder.parent.glob("*.partial"))
    (one, said), (two, said_by_two) = tables[1], tables[2]
    assert len(one) == 5 and one["loss"].nunique() == 5
    columns = [name for name in one if name not in ("seconds",)]
    pd.testing.assert_frame_equal(one[columns], two[columns], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(said["probability"], said_by_two["probability"], atol=1e-4)
    assert said["probability"].std() > 1e-3
