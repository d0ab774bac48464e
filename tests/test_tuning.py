"""tuning.py: the space of KL 1.6; a search that goes on after a kill, and that processes share."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import write_mura

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
pytest.importorskip("keras_tuner")
import keras_tuner  # noqa: E402

from mura_course import data, errors, pixels, profiles, tuning  # noqa: E402

# KerasTuner's own.
pytestmark = pytest.mark.filterwarnings("ignore:(currentThread|getName):DeprecationWarning")

FULL = profiles.get("full")
TINY = dataclasses.replace(profiles.get("smoke"), tuner_image_size=8, tuner_trials=5, tuner_initial_points=3)
RANDOM = dataclasses.replace(TINY, tuner_trials=2, tuner_initial_points=2)  # without the slow model
VALUES = ["funnel_in", "conv_layers", "dropout"]


@pytest.fixture
def split(tmp_path, monkeypatch):
    """The index of some 60 films of noise, the abnormal ones brighter; the runs' root is this test's own."""
    monkeypatch.setenv("MURA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MURA_DATA", str(tmp_path / "MURA-v1.1"))
    for name in tuning.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    studies = [("train", "HAND", i, 1, bool(i % 2), 2) for i in range(24)]
    studies += [("valid", "WRIST", i, 1, bool(i % 2), 1) for i in range(30, 36)]
    index = data.load_index(write_mura(tmp_path / "MURA-v1.1", studies), quiet=True)
    rng = np.random.default_rng(0)
    for file, label in zip(data.image_paths(index), index["label"], strict=True):
        cv2.imwrite(str(file), rng.integers(0, 200, (40, 32), dtype=np.uint8) + np.uint8(50 * label))
    return data.split_dev(index, 0.3)


def made_up(search, trial, train=None, dev=None, epochs=1):
    """A dev loss for each point, and some noise for each trial."""
    funnel_in, layers, dropout = (trial.hyperparameters.values[name] for name in VALUES)
    loss = 0.65 - 0.03 * funnel_in + 0.01 * layers + dropout / 10
    noise = np.random.default_rng(int(trial.trial_id)).normal(0, 0.004)
    return {"val_loss": loss + noise, "val_auc": 0.6, "epochs": epochs, "seconds": 0.0}


def tiny_sets(split):
    store = pixels.PixelStore.open_or_build(split, TINY.tuner_image_size)
    sets = pixels.kl_datasets(split, store, batch_size=TINY.cnn_batch_size)
    return sets["train original"], sets["validation"]


# The space --------------------------------------------------------------------------------------


def test_the_space_holds_the_reports_networks():
    build, hp = tuning.hypermodel(FULL), keras_tuner.HyperParameters()
    build(hp)
    space = {one.name: list(one.values) for one in hp.space}
    assert space == {"funnel_in": [True, False], "conv_layers": [4, 5], "dropout": [0.2, 0.3]}
    expected = {(True, 4): 400_737, (False, 4): 438_593, (True, 5): 399_873, (False, 5): 1_593_665}
    for (funnel_in, layers), parameters in expected.items():
        hp.values = {"funnel_in": funnel_in, "conv_layers": layers, "dropout": 0.2}
        model = build(hp)
        assert model.count_params() == parameters and model.input_shape == (None, 224, 224, 3)
        assert model.get_layer("Dropout-1").rate == 0.2 and model.expected_scale == "0..1"
        assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", profiles.NAMES)
def test_every_profile_searches_by_a_model_and_never_runs_out_of_points(name):
    profile = profiles.get(name)
    assert 1 < profile.tuner_initial_points < profile.tuner_trials
    assert profile.tuner_initial_points < 8 and len(set(profile.tuner_dropouts)) == 2
    assert tuning.SEED  # KerasTuner takes 0 for none


# Searching, going on, and not going on ----------------------------------------------------------


def table_of(split):
    return tuning.trial_table(tuning.open_search(split, TINY))


def test_killed_at_any_trial_a_search_ends_as_an_uninterrupted_one(split, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tuning.Search, "run_trial", made_up)
    tuning.open_search(split, TINY).search(None, None, 1)
    expected = table_of(split)
    assert expected["drawn"].tolist() == ["random"] * 3 + ["Bayesian"] * 2
    assert expected.index.tolist() == [1, 2, 3, 4, 5] and len(expected[:3].drop_duplicates(VALUES)) == 3

    monkeypatch.setenv("MURA_RUNS", str(tmp_path / "interrupted"))
    made = []

    def killed_once_at_every_trial(search, trial, *data, **options):
        made.append(trial.trial_id)
        if made.count(trial.trial_id) == 1:
            raise KeyboardInterrupt
        return made_up(search, trial)

    monkeypatch.setattr(tuning.Search, "run_trial", killed_once_at_every_trial)
    for kills in range(5):
        assert len(table_of(split)) == max(0, kills - 1)
        with pytest.raises(KeyboardInterrupt):
            tuning.open_search(split, TINY).search(None, None, 1)
    tuning.open_search(split, TINY).search(None, None, 1)
    assert made == list("0011223344")
    pd.testing.assert_frame_equal(table_of(split), expected, check_exact=True)

    # Finished: nothing is trained again, nothing is printed into the page.
    capsys.readouterr()
    tuning.open_search(split, TINY).search(None, None, 1)
    assert len(made) == 10 and capsys.readouterr().out == ""


def test_another_configuration_is_another_search(split, monkeypatch):
    monkeypatch.setattr(tuning.Search, "run_trial", made_up)
    tuning.open_search(split, RANDOM).search(None, None, 1)

    def other_space(hp):
        hp.Choice("conv_layers", [3, 4])
        return tuning.hypermodel(TINY)(hp)

    others = [
        tuning.open_search(split, RANDOM, build=other_space),
        tuning.open_search(split, dataclasses.replace(RANDOM, tuner_dropouts=(0.2, 0.4))),
        tuning.open_search(split, dataclasses.replace(RANDOM, tuner_epochs=2)),
        tuning.open_search(split, dataclasses.replace(RANDOM, cnn_batch_size=8)),
        tuning.open_search(split, dataclasses.replace(RANDOM, tuner_trials=3)),
        tuning.open_search(split[1:].set_axis(split.index[1:]), RANDOM),
    ]
    assert len({search.project_dir for search in others}) == len(others)
    assert all(tuning.trial_table(search).empty for search in others)
    assert len(tuning.trial_table(tuning.open_search(split, RANDOM))) == 2


@pytest.mark.parametrize("name", ["oracle.json", "trial_1/trial.json"])
@pytest.mark.parametrize("content", ["", '{"trial_id": "1", "hyperpar', "{}"])
def test_half_a_file_is_one_error_that_names_the_folder(split, monkeypatch, name, content):
    monkeypatch.setattr(tuning.Search, "run_trial", made_up)
    search = tuning.open_search(split, RANDOM)
    search.search(None, None, 1)
    Path(search.project_dir, name).write_text(content)
    with pytest.raises(tuning.SearchError, match=r"funnel_search-\w+ is damaged .*Delete it"):
        tuning.open_search(split, RANDOM)


def test_a_trial_that_fails_stops_the_search_and_says_which(split, monkeypatch):
    def build(hp):
        model = tuning.hypermodel(TINY)(hp)
        model.compile("adam", lambda y, p: p * np.nan, run_eagerly=True)
        return model

    with pytest.raises(errors.MuraError, match="Trial 0, {'funnel_in.*The loss became nan") as error:
        tuning.open_search(split, TINY, build=build).search(*tiny_sets(split), epochs=1)
    assert isinstance(error.value, tuning.SearchError)


# Sharing ----------------------------------------------------------------------------------------


def test_a_role_needs_all_three_variables(split, monkeypatch):
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    with pytest.raises(tuning.SearchError, match="not set: KERASTUNER_ORACLE_IP, KERASTUNER_ORACLE_PORT"):
        tuning.main()


# A process of the search; it begins when all have loaded their libraries, and the chief ends without dozing.
PROCESS = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from keras_tuner.src.distribute import oracle_chief
from mura_course import tuning

oracle_chief.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.1))
meeting = Path(sys.argv[1])
(meeting / os.environ["KERASTUNER_TUNER_ID"]).touch()
while len(list(meeting.iterdir())) < 3:
    time.sleep(0.05)
tuning.main()
"""


@pytest.mark.slow
def test_two_workers_share_a_search(split, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    environment = os.environ | {
        "MURA_PROFILE": "smoke",
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    environment |= {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": port}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(meeting)],
            env=environment | {"KERASTUNER_TUNER_ID": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("chief", "worker-1", "worker-2")
    }
    output = {name: process.communicate(timeout=300)[0] for name, process in processes.items()}
    assert [process.returncode for process in processes.values()] == [0, 0, 0], output
    smoke = profiles.get("smoke")
    trained = {name: text.count("Epoch 1/1, ") for name, text in output.items()}
    assert trained["chief"] == 0 and min(trained["worker-1"], trained["worker-2"]) >= 1
    assert trained["worker-1"] + trained["worker-2"] == smoke.tuner_trials

    # A notebook finds all trials made, and nothing is left to do.
    split = data.split_dev(data.load_index(quiet=True), smoke.dev_fraction)
    search = tuning.open_search(split, smoke)
    table = tuning.trial_table(search)
    assert table.to_string() in output["chief"] and len(table) == smoke.tuner_trials
    assert table["drawn"].iloc[:2].tolist() == ["random"] * 2 and table["drawn"].iloc[-1] == "Bayesian"
    assert table["seconds"].gt(0).all() and table["epochs"].eq(1).all()
    search.search(None, None, 1)

    # A trial's result depends on its number and values, not on who made it.
    store = pixels.PixelStore.open_or_build(split, smoke.tuner_image_size)
    sets = pixels.kl_datasets(split, store, batch_size=smoke.cnn_batch_size)
    again = search.run_trial(search.oracle.trials["0"], sets["train original"], sets["validation"], epochs=1)
    assert again["val_loss"] == pytest.approx(table["val_loss"].iloc[0], abs=1e-4)
    state = json.loads(Path(search.project_dir, "oracle.json").read_text())
    left = [state_of for state_of in search.oracle.trials.values() if state_of.status != "COMPLETED"]
    assert not left and state["seed"] == tuning.SEED
