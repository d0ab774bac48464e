"""runs.py: once fitted, ever after loaded; whole or absent wherever it is stopped; damage is refused."""

import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from making import changed, make_index, make_predictions

from mura_course import cli, data, disk, metrics, profiles, runs
from mura_course.errors import DiskError, MuraError, RunError, TrainingError

INDEX = make_index()
SMOKE = profiles.get("smoke")
HISTORY = pd.DataFrame({"epoch": [1, 2], "loss": [0.7, 1 / 3], "val_auc": [0.5, 0.6], "seconds": [40.0, 0.5]})


def predicted(index=INDEX, seed=0, splits=("test",)):
    return make_predictions(index[index["split"].isin(splits)], seed=seed)


def fit_quickly(workdir):
    return None, HISTORY, predicted()


def never(workdir):
    raise AssertionError("fit was called although the run exists")


def make(root, fit=fit_quickly, name="funnel", config=None, index=INDEX, profile=SMOKE, **options):
    config = {"layers": 4, "dropout": 0.3} if config is None else config
    return runs.fit_or_load(name, config, fit, index=index, profile=profile, root=root, **options)


def with_attrs(index, **changes):
    other = index.copy()
    other.attrs = index.attrs | changes
    return other


def test_fits_once_and_loads_ever_after_exactly(tmp_path):
    expected = predicted(splits=("dev", "test"))
    made = make(tmp_path, lambda workdir: (None, HISTORY, expected))
    assert made.was_trained_now and "trained now" in made.describe()
    found = make(tmp_path, fit=never)
    assert not found.was_trained_now and found.folder == made.folder
    said = re.compile(
        r"loaded \(made 20.*in 40 s; data MURA-demo \(synthetic films, not MURA\), .*random w.*2 ep"
    )
    assert said.search(found.describe())
    with pytest.raises(RunError, match="has no saved model"):
        found.model_file()
    pd.testing.assert_frame_equal(found.history, HISTORY, check_exact=True)
    for rows, split in ((found.predictions, "test"), (found.dev_predictions, "dev")):
        same = expected[expected["split"].eq(split)].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, same, rtol=5e-7, atol=0)
        assert rows["probability"].map(repr).str.len().max() <= 12  # seven digits, and 0.000
    assert found.predictions.attrs["data"] == "MURA-demo" and found.predictions.attrs["weights"] == "random"
    assert metrics.image_report(found.predictions, samples=5).attrs["profile"] == "smoke"


def test_run_json_says_what_a_reader_must_know(tmp_path):
    rows = predicted(splits=("dev", "test"))
    rows = rows[rows["split"].eq("dev") | rows["label"].eq(0)]  # on test, one class: no AUROC
    run = make(tmp_path, lambda w: (None, HISTORY, rows), weights="imagenet")
    info = json.loads((run.folder / "run.json").read_text())
    assert info["config"] == {"layers": 4, "dropout": 0.3} and info["weights"] == "imagenet"
    assert info["fingerprint"] == data.fingerprint(INDEX) and info["is_demo"] is True
    assert info["profile"] == "smoke" and info["seconds"] == pytest.approx(40.5)
    assert {"python", "mura_course", "numpy", "pandas"} <= info["versions"].keys()
    report = metrics.study_report(run.dev_predictions, samples=SMOKE.bootstrap_samples).loc["OVERALL"]
    stored = info["metrics"]["dev"]["study"]
    assert set(info["metrics"]) == {"dev", "test"} and stored["n"] == 4
    for metric in metrics.METRICS:
        np.testing.assert_array_equal([*stored[metric].values()], report[metric].to_numpy())
    undefined = info["metrics"]["test"]["image"]["auroc"]
    assert undefined == dict(value=None, low=None, high=None, resamples=0)  # null, not zero
    place = run.folder.relative_to(tmp_path).parts
    assert place[0] == f"MURA-demo-{data.fingerprint(INDEX)[:8]}" and place[1] == "smoke"


def test_identity_is_config_weights_profile_and_data(tmp_path):
    other_labels = INDEX.assign(label=1 - INDEX["label"])
    other_labels.attrs = INDEX.attrs
    variants = [{}, {"config": {"layers": 5, "dropout": 0.3}}, {"weights": "imagenet"}]
    variants += [{"name": "funnel-out"}, {"profile": profiles.get("demo")}, {"index": other_labels}]
    contents = ['{"recipe": 2, "text": false}', '{"recipe": 3, "text": false}']  # of the same paths
    variants += [{"index": with_attrs(INDEX, content=content)} for content in contents]
    assert len({make(tmp_path, **variant).folder for variant in variants}) == len(variants)
    same = {"dropout": np.float64(0.3), "layers": np.int64(4)}  # order and number types do not matter
    assert not make(tmp_path, fit=never, config=same).was_trained_now
    assert not make(tmp_path, fit=never, index=INDEX.sample(frac=1, random_state=0)).was_trained_now
    assert not make(tmp_path, fit=never, index=with_attrs(INDEX, root="/elsewhere")).was_trained_now


def test_an_interrupted_fit_gets_its_working_folder_again(tmp_path, capsys):
    def interrupted(workdir):
        (workdir / "state").write_text("epoch 3")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, interrupted)
    assert runs.list_runs(tmp_path)["state"].tolist() == ["interrupted"]
    assert "interrupted" not in capsys.readouterr().out
    run = make(tmp_path, lambda w: (None, HISTORY.head(len((w / "state").read_text())), predicted()))
    assert "interrupted earlier" in capsys.readouterr().out
    assert run.was_trained_now and list(run.folder.parent.glob("*.partial")) == []
    with pytest.raises(TrainingError, match="constant.*dead.*learning rate"):  # no run
        make(tmp_path, lambda w: (None, HISTORY, predicted().assign(probability=0.5)), "constant")
    one = predicted().head(1)
    assert make(tmp_path, lambda w: (None, HISTORY, one), "one-film").dev_predictions.empty


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the package may catch it."""


def kill_at(patch, moment):
    """Let the `moment`-th disk operation and all after it not happen; returns how many were begun."""
    begun = []

    def guarded(original):
        def call(*args, **kwargs):
            begun.append(original)
            if 0 < moment <= len(begun):
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, names in ((Path, ("replace", "mkdir", "write_text", "unlink")), (shutil, ["rmtree"])):
        for name in names:
            patch.setattr(owner, name, guarded(getattr(owner, name)))
    patch.setattr(pd.DataFrame, "to_csv", guarded(pd.DataFrame.to_csv))
    return begun


def test_whole_or_absent_wherever_it_is_stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        total = kill_at(patch, 0)
        make(tmp_path / "counted")
    assert len(total) >= 10
    for moment in range(1, len(total) + 1):
        root = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                make(root)
        finished = list(root.glob("*/*/funnel-????????/run.json"))
        assert all(len(runs.load(file.parent).predictions) for file in finished)
        assert (runs.list_runs(root)["state"] == "finished").sum() == len(finished)
        assert len(make(root, fit=never if finished else fit_quickly).history) == 2
        assert runs.list_runs(root)["state"].tolist() == ["finished"]


def test_two_at_once_fit_once(tmp_path, capsys):
    calls = []

    def slow(workdir):
        calls.append(workdir)
        time.sleep(0.8)
        return fit_quickly(workdir)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: make(tmp_path, slow), range(2)))
    assert len(calls) == 1 and sorted(run.was_trained_now for run in made) == [False, True]
    assert capsys.readouterr().out.count("Another process is making funnel-") == 1


class Model:
    expected_scale, architecture = "0..1", {"layers": [4, 2]}


@runs.save_model.register
def _(model: Model, folder: Path) -> str:
    (folder / "model.bin").write_bytes(b"0123456789")
    return "model.bin"


def test_a_registered_class_is_saved_and_its_file_verified(tmp_path):
    run = make(tmp_path, lambda w: (Model(), HISTORY, predicted()))
    assert run.model_file().read_bytes() == b"0123456789" and run.model_file().parent == run.folder
    assert run.info["expected_scale"] == "0..1" and run.info["architecture"] == {"layers": [4, 2]}
    (run.folder / "model.bin").write_bytes(b"0123456780")
    with pytest.raises(RunError, match="model.bin is missing or was changed.*Delete"):
        make(tmp_path, fit=never).model_file()


# Folders that cannot be trusted


def change_json(folder, **changes):
    changed(folder / "run.json", **changes)


def forge(folder):
    """Other predictions, with their own hash in run.json."""
    file = folder / "predictions.csv"
    file.write_text("path,label\n1.png,0\n")
    files = json.loads((folder / "run.json").read_text())["files"]
    change_json(folder, files=files | {file.name: {"bytes": 20, "sha256": disk.digest(file)}})


DAMAGES = {
    "half a file": lambda f: (f / "run.json").write_text('{"name": "fun'),
    "no text": lambda f: (f / "run.json").write_bytes(b"\xff\xfe\x00"),
    "no object": lambda f: (f / "run.json").write_text("[1, 2]"),
    "no run.json": lambda f: (f / "run.json").unlink(),
    **{f"no {key}": partial(change_json, **{key: ...}) for key in runs.KEYS},
    "files no object": lambda f: change_json(f, files=3),
    "seconds no number": lambda f: change_json(f, seconds="long"),
    "finished no text": lambda f: change_json(f, finished=None),
    "no predictions": lambda f: (f / "predictions.csv").unlink(),
    "half the predictions": lambda f: os.truncate(f / "predictions.csv", 100),
    "predictions a pipe": lambda f: ((f / "predictions.csv").unlink(), os.mkfifo(f / "predictions.csv")),
    "another history": lambda f: (f / "history.csv").write_text("epoch,loss\n1,0.1\n"),
    "predictions forged with their hash": forge,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line_with_the_remedy(tmp_path, damage):
    folder = make(tmp_path).folder
    DAMAGES[damage](folder)
    with pytest.raises(MuraError) as caught:
        make(tmp_path, fit=never)
    message = str(caught.value)
    assert str(folder) in message and "elete" in message and "\n" not in message


def test_one_bad_run_json_does_not_end_the_list_for_all(tmp_path, capsys, monkeypatch):
    good = make(tmp_path)
    for number, damage in enumerate(list(DAMAGES)[:6]):
        DAMAGES[damage](make(tmp_path, name=f"bad{number}").folder)
    change_json(make(tmp_path, name="red").folder, device="\x1b[31mred", weights="\x1b[31mred")
    table = runs.list_runs(tmp_path).set_index("run")
    assert table["state"].value_counts().to_dict() == {"unreadable": 6, "finished": 2}
    row = table.loc[str(good.folder.relative_to(tmp_path))]
    assert row["auroc"] == good.info["metrics"]["test"]["image"]["auroc"]["value"] and row["epochs"] == 2
    assert runs.list_runs(tmp_path / "none").empty
    monkeypatch.setenv("MURA_RUNS", str(tmp_path))
    assert cli.main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert "?[31mred" in shown and "\x1b" not in shown


def test_a_folder_of_other_data_or_one_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    assert make(None).folder.is_relative_to(tmp_path / "cache" / "runs")
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written.*MURA_RUNS"):
        make(tmp_path / "file", fit=never)
    mine, other = make(tmp_path), make(tmp_path, index=make_index(patients=15))
    shutil.rmtree(mine.folder)
    shutil.copytree(other.folder, mine.folder)
    with pytest.raises(RunError, match="another run: fingerprint.*Delete or move"):
        make(tmp_path, fit=never)
    assert runs.load(mine.folder).info["fingerprint"] == other.info["fingerprint"]


def test_diff_shows_what_changed(tmp_path):
    config = {"layers": 5, "dropout": 0.3, "stages": [{"epochs": 2}]}
    a = make(tmp_path, lambda w: (None, HISTORY, predicted(seed=0)))
    b = make(tmp_path, lambda w: (None, HISTORY, predicted(seed=1)), config=config)
    table = runs.diff(a.folder, b.folder)
    assert table.loc["config.layers"].tolist() == [4, 5]
    scores = [run.info["metrics"]["test"]["image"]["auroc"]["value"] for run in (a, b)]
    assert table.loc["metrics.test.image.auroc.value"].tolist() == scores
    assert not table.index.str.contains("low|high|files|finished").any()
    assert not {"config.dropout", "name", "profile"} & set(table.index)
    assert runs.diff(a.folder, a.folder).empty
