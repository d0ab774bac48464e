"""training.py's recipes as runs: stage by stage, killed, on two devices, beside TensorFlow."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from making import make_films
from torch_tools.tiny import TINY

from mura_course import data, profiles, runs
from mura_course.errors import TrainingError
from mura_course.recipes import Recipe, Stage
from mura_course.torch_tools import models, training

SMOKE = profiles.get("smoke")
HEAD = {"learning_rate": 0.01, "head": (512,), "patience": 4}


def recipe(*stages, **changes):
    fixed = {"backbone": "ResNet18", "size": 32, "batch_size": 8, "augment": "KN"}
    return Recipe(stages=stages, **fixed | changes)


def run(films, *stages, **changes):
    return training.train("tiny", recipe(*stages, **changes), films, SMOKE, "random")


LABEL = Stage(epochs=3, views=3, **HEAD)
PARTS = Stage(epochs=2, target="body_part", frozen=False, **HEAD)


@pytest.mark.parametrize(("frozen", "within"), [(True, 1e-4), ("layer1", 5e-3)])  # maps are kept in float16
def test_a_cached_trunk_is_training_end_to_end(films, sets, tmp_path, frozen, within):
    stage = replace(LABEL, frozen=frozen)
    found = run(films, stage)
    torch.manual_seed(0)
    model = models.resnet18(weights="random", frozen=frozen)
    models.calibrate(model.backbone, sets["train"])
    torch.manual_seed(0)
    model.put_head("two_linear", 1)
    model.freeze(frozen)
    before = model.backbone.layer2.running_mean.clone()
    history = training.fit(model, sets["train"], sets["validation"], stage, tmp_path / "end")
    assert torch.equal(model.backbone.layer2.running_mean, before) == (frozen is True)
    same = ["loss", "auc", "val_loss"]
    np.testing.assert_allclose(found.history[same], history[same], atol=within)
    for name, rows in (("test", found.predictions), ("validation", found.dev_predictions)):
        expected = training.predict(model, sets[name])
        np.testing.assert_allclose(rows["probability"], expected["probability"], atol=within)
        assert rows["path"].tolist() == expected["path"].tolist() and expected["probability"].std() > 1e-3


def test_stages_follow_one_another_and_what_two_recipes_begin_with_is_trained_once(films):
    frozen = run(films, PARTS, LABEL)
    assert frozen.history[["stage", "epoch"]].values.tolist() == [[1, 1], [1, 2], [2, 3], [2, 4], [2, 5]]
    assert frozen.history["val_f1"].notna().tolist() == [True, True, False, False, False]
    further = Stage(epochs=3, frozen=False, **HEAD)
    unfrozen = run(films, PARTS, further)
    assert unfrozen.history["seconds"][:2].equals(frozen.history["seconds"][:2])  # not trained again
    one, other = (models.load(found).backbone.layer1.weight for found in (frozen, unfrozen))
    assert not torch.equal(one, other)  # the second stage went on from there
    kept = run(films, LABEL, Stage(epochs=1, learning_rate=1e-9, head=None)).history
    assert kept["learning_rate"].tolist() == [0.01] * 3 + [1e-9]
    best = kept["val_loss"][kept["val_accuracy"][:3].idxmax()]
    assert kept["val_loss"][3] == pytest.approx(best, rel=1e-4)  # not a new head's


def test_a_specialist_learns_and_is_tested_on_its_part_alone_also_without_dev(films):
    to_the_end = Stage(steps=5, learning_rate=0.01)
    found, whole = run(films, to_the_end, parts=("WRIST",)), run(films, to_the_end)
    assert set(found.predictions["body_part"]) == {"WRIST"} and found.info["epochs"] == 3  # of two batches
    norms = [models.load(one).backbone.layer2.running_var for one in (found, whole)]
    assert torch.equal(*norms)  # calibrated on all parts: specialists share a random backbone
    assert "val_loss" not in run(films[films["split"].ne("dev")], to_the_end).history
    few = Stage(steps=5, learning_rate=0.01, fraction=0.5)  # 12 train images: two batches instead of three
    counted = [run(films, stage) for stage in (few, to_the_end)]
    assert [found.info["epochs"] for found in counted] == [3, 2]
    with pytest.raises(TrainingError, match="no dev image to stop by.*patience=None"):
        run(films[films["split"].ne("dev")], LABEL)
    with pytest.raises(TrainingError, match="neither dropout nor a plateau"):
        run(films, LABEL, dropout=0.1)


def in_a_process(code: str, cache: Path) -> subprocess.Popen:
    """Run `code` with this folder's modules, a cache of its own, and one thread."""
    here = Path(__file__).parent.parent
    own = {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "MURA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True)


def one_run(folder: str, pause: float = 0.0, **trainer_options):
    """A run of two stages on `folder`/films, slowed down by `pause` seconds a batch; not yet patched."""
    models.BACKBONES["ResNet18"] = TINY
    films, real = make_films(Path(folder) / "films"), data.Batches._batch

    def slowly(self, *arguments):
        time.sleep(pause)
        return real(self, *arguments)

    data.Batches._batch = slowly
    stages = recipe(PARTS, Stage(epochs=8, frozen=False, **HEAD | {"patience": 3}))
    return training.train("one", stages, films, SMOKE, "random", **trainer_options)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_but_the_epoch_at_hand(tmp_path):
    code = f"from torch_tools import test_stages; test_stages.one_run({str(tmp_path)!r}, "
    undisturbed = in_a_process(f"{code} 0)", tmp_path / "a")
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    rng, seen = np.random.default_rng(0), set()
    for _ in range(3):
        process, before = in_a_process(f"{code} 0.03)", tmp_path / "b"), len(seen)
        while process.poll() is None and len(seen) < before + 2:
            for file in (tmp_path / "b").rglob("last.ckpt"):  # each state that a checkpoint had
                seen.add(file.stat().st_mtime_ns)
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(seen) >= 5 and not list((tmp_path / "b").rglob("run.json"))
    resumed = in_a_process(f"{code} 0)", tmp_path / "b")
    assert resumed.wait() == 0, resumed.stderr.read()
    a, b = (runs.load(next((tmp_path / cache / "runs").rglob("run.json")).parent) for cache in "ab")
    pd.testing.assert_frame_equal(a.history.drop(columns="seconds"), b.history.drop(columns="seconds"))
    np.testing.assert_allclose(a.predictions["probability"], b.predictions["probability"], atol=1e-5)
    assert set(a.history["stage"]) == {1, 2} and not list((tmp_path / "b").rglob("*.part*"))


@pytest.mark.slow
def test_two_devices_train_one_run_by_lightnings_own_strategy(tmp_path):
    code = f"""from torch_tools import test_stages
run = test_stages.one_run({str(tmp_path)!r}, accelerator="cpu", devices=2, strategy="ddp_notebook")
assert run.was_trained_now and run.history["loss"].nunique() > 4
assert run.history["loss"].iloc[-1] < run.history.query("stage == 2")["loss"].iloc[0]"""
    process = in_a_process(code, tmp_path)
    assert process.wait() == 0, process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["tensorflow", "mura_course.torch_tools.training"])
def test_fault_10_torch_trains_beside_tensorflow_and_triton_is_not_blocked(tmp_path, first):
    code = f"""import importlib, sys
for name in ({first!r}, "tensorflow", "mura_course.torch_tools.training"):
    importlib.import_module(name)
assert "triton" not in sys.modules or sys.modules["triton"] is not None
from torch_tools import test_stages
assert test_stages.one_run({str(tmp_path)!r}).was_trained_now
assert "triton" not in sys.modules or sys.modules["triton"] is not None"""
    process = in_a_process(code, tmp_path)
    assert process.wait() == 0, process.stderr.read()
