"""runs.py: once fitted, ever after loaded; whole or absent whenever it is stopped; refusing what is damaged.

No deep-learning framework here, but for one torch module: the test that kills Keras is in test_keras_models.
"""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mura_course import data, metrics, profiles, runs


def make_index(patients=12, name="MURA-demo", seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        split, part, label = (
            ("test", "train", "dev")[patient % 3],
            ("HAND", "WRIST")[patient % 2],
            patient // 2 % 2,
        )
        study = f"{part}/patient{patient:05d}/study1"
        for view in range(1, 1 + int(rng.integers(1, 4))):
            rows.append((f"{study}/image{view}.png", split, part, patient, study, view, label))
    index = pd.DataFrame(rows, columns=data.COLUMNS)
    index["body_part"] = pd.Categorical(index["body_part"], data.BODY_PARTS)
    index.attrs = {"root": "/nowhere", "name": name, "is_demo": name == "MURA-demo"}
    return index


INDEX = make_index()
SMOKE = profiles.get("smoke")
HISTORY = pd.DataFrame({"epoch": [1, 2], "loss": [0.7, 1 / 3], "val_auc": [0.5, 0.6], "seconds": [40.0, 0.5]})


def predicted(index=INDEX, seed=0, splits=("test",)):
    rows = index[index["split"].isin(splits)]
    return rows.assign(probability=np.random.default_rng(seed).random(len(rows)))


def fit_quickly(workdir):
    return None, HISTORY, predicted()


def never(workdir):
    raise AssertionError("fit was called although the run exists")


def make(root, fit=fit_quickly, name="funnel", config=None, index=INDEX, profile=SMOKE, **options):
    config = {"layers": 4, "dropout": 0.3} if config is None else config
    return runs.fit_or_load(name, config, fit, index=index, profile=profile, root=root, **options)


def test_fits_once_and_loads_ever_after(tmp_path):
    made = make(tmp_path)
    assert made.was_trained_now and "trained now" in made.describe()
    found = make(tmp_path, fit=never)
    assert not found.was_trained_now and "not trained again" in found.describe()
    assert found.folder == made.folder and found.model_path is None
    for text in ("MURA-demo", "not MURA", "smoke", "random weights", "2 epochs in 40.5 s", "CPU"):
        assert text in found.describe()


def test_tables_come_back_exactly(tmp_path):
    expected = predicted(splits=("dev", "test"))
    run = make(tmp_path, lambda workdir: (None, HISTORY, expected))
    pd.testing.assert_frame_equal(run.history, HISTORY, check_exact=True)
    pd.testing.assert_frame_equal(run.predictions, expected.reset_index(drop=True), check_exact=True)
    assert run.predictions.attrs["data"] == "MURA-demo" and run.predictions.attrs["weights"] == "random"
    assert metrics.image_report(run.predictions, samples=5).attrs["profile"] == "smoke"


def test_run_json_says_what_a_reader_must_know(tmp_path):
    run = make(tmp_path, lambda w: (None, HISTORY, predicted(splits=("dev", "test"))), weights="ImageNet")
    info = json.loads((run.folder / "run.json").read_text())
    assert info["config"] == {"layers": 4, "dropout": 0.3} and info["weights"] == "ImageNet"
    assert info["fingerprint"] == data.fingerprint(INDEX) and info["is_demo"] is True
    assert info["profile"] == "smoke" and info["seconds"] == pytest.approx(40.5)
    assert {"python", "mura_course", "numpy", "pandas"} <= info["versions"].keys()
    report = metrics.study_report(run.predictions.query("split == 'dev'"), samples=SMOKE.bootstrap_samples)
    stored = info["metrics"]["dev"]["study"]
    assert stored["n"] == 4 and set(info["metrics"]) == {"dev", "test"}
    for metric in metrics.METRICS:
        for key, value in stored[metric].items():
            expected = report.loc["OVERALL", (metric, key)]
            assert value == pytest.approx(expected) if value is not None else np.isnan(expected)
    place = run.folder.relative_to(tmp_path).parts
    assert place[0] == f"MURA-demo-{data.fingerprint(INDEX)[:8]}" and place[1] == "smoke"


def test_undefined_metrics_are_null_not_zero(tmp_path):
    normal = predicted().query("label == 0")
    info = make(tmp_path, lambda w: (None, None, normal)).info
    assert info["metrics"]["test"]["image"]["auroc"] == {"value": None, "low": None, "high": None}


def test_identity_is_config_weights_profile_and_data(tmp_path):
    other_labels = INDEX.assign(label=1 - INDEX["label"])
    other_labels.attrs = INDEX.attrs
    variants = [
        {},
        {"config": {"layers": 5, "dropout": 0.3}},
        {"weights": "ImageNet"},
        {"profile": profiles.get("demo")},
        {"index": other_labels},
        {"index": make_index(name="MURA-v1.1")},
        {"name": "funnel-out"},
    ]
    assert len({make(tmp_path, **variant).folder for variant in variants}) == len(variants)
    same = {"dropout": np.float64(0.3), "layers": np.int64(4)}  # order and number types do not matter
    assert not make(tmp_path, fit=never, config=same).was_trained_now
    assert not make(tmp_path, fit=never, index=INDEX.sample(frac=1, random_state=0)).was_trained_now


def test_root_is_the_environments_or_the_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    assert make(None).folder.is_relative_to(tmp_path / "cache" / "runs")
    monkeypatch.setenv("MURA_RUNS", str(tmp_path / "elsewhere"))
    assert make(None).folder.is_relative_to(tmp_path / "elsewhere")


def test_an_interrupted_fit_gets_its_working_folder_again(tmp_path, capsys):
    def interrupted(workdir):
        (workdir / "state").write_text("epoch 3")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, interrupted)
    assert runs.list_runs(tmp_path)["state"].tolist() == ["interrupted"]
    assert "interrupted" not in capsys.readouterr().out
    run = make(
        tmp_path, lambda workdir: (None, HISTORY.head(len((workdir / "state").read_text())), predicted())
    )
    assert "interrupted earlier" in capsys.readouterr().out
    assert run.was_trained_now and [f.name for f in run.folder.parent.glob("*.partial")] == []


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the package may catch it."""


def kill_at(monkeypatch, moment):
    """Let the `moment`-th of all disk operations not happen; returns how many were counted."""
    count = [0]

    def guard(owner, name):
        original = getattr(owner, name)

        def guarded(*args, **kwargs):
            count[0] += 1
            if count[0] == moment:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for owner, name in [
        (os, "replace"),
        (os, "mkdir"),
        (shutil, "rmtree"),
        (Path, "write_text"),
        (pd.DataFrame, "to_csv"),
    ]:
        guard(owner, name)
    return count


def test_whole_or_absent_wherever_it_is_stopped(tmp_path, monkeypatch):
    total = kill_at(monkeypatch, 0)
    make(tmp_path / "counted")
    assert total[0] >= 8
    for moment in range(1, total[0] + 1):
        root = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                make(root)
        finished = [file for file in root.glob("*/*/*/run.json") if file.parent.suffix != ".new"]
        assert all(len(runs.load(file.parent).predictions) for file in finished)
        assert (runs.list_runs(root)["state"] == "finished").sum() == len(finished)
        assert len(make(root, fit=never if finished else fit_quickly).history) == 2
        assert runs.list_runs(root)["state"].tolist() == ["finished"]


def test_two_at_once_fit_once(tmp_path, capsys):
    started, calls, made = threading.Event(), [], []

    def slow(workdir):
        calls.append(workdir)
        started.set()
        threading.Event().wait(0.4)
        return fit_quickly(workdir)

    threads = [threading.Thread(target=lambda: made.append(make(tmp_path, slow))) for _ in range(3)]
    threads[0].start()
    started.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and sorted(run.was_trained_now for run in made) == [False, False, True]
    assert capsys.readouterr().out.count("Another process is making the run funnel; waiting") == 2


def test_a_drive_without_locks_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert make(tmp_path).was_trained_now
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_torch_module_is_saved_and_filled_again(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    module.expected_scale = "ImageNet"
    run = make(tmp_path, lambda w: (module, HISTORY, predicted()))
    assert run.model_path.name == "model.pt" and run.info["expected_scale"] == "ImageNet"
    again = run.load_model(into=torch.nn.Linear(3, 1))
    assert torch.equal(again.weight, module.weight)
    with pytest.raises(runs.RunError, match="holds weights only: load_model"):
        run.load_model()
    with pytest.raises(runs.RunError, match="of another model.*the module to fill is Linear"):
        run.load_model(into=torch.nn.Linear(4, 1))
    run.model_path.write_bytes(run.model_path.read_bytes()[:-1] + b"x")
    with pytest.raises(runs.RunError, match="model.pt was changed"):
        run.load_model(into=torch.nn.Linear(3, 1))
    run.model_path.write_bytes(b"half")
    with pytest.raises(runs.RunError, match="model.pt has 4 bytes instead of"):
        make(tmp_path, fit=never)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_a_further_process_of_one_training_takes_part_and_writes_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert runs.is_first_process()
    calls = []

    def first(workdir):
        def along(own):
            calls.append(own)
            thread_may_write.set()
            return fitted(own)

        thread = threading.Thread(target=lambda: later.append(make(tmp_path, along)))
        monkeypatch.setenv(name, "10")
        assert not runs.is_first_process()
        thread.start()
        assert thread_may_write.wait(10)
        monkeypatch.setenv(name, "0")
        threads.append(thread)
        return fitted(workdir)

    def fitted(workdir):
        return None, HISTORY, predicted()

    later, threads, thread_may_write = [], [], threading.Event()
    run = make(tmp_path, first)
    threads[0].join(10)
    assert calls == [run.folder.with_name(run.folder.name + ".partial")]
    assert later[0].folder == run.folder
    monkeypatch.setenv(name, "3")  # a finished run is loaded by all
    assert make(tmp_path, fit=never).folder == run.folder


# Folders that cannot be trusted


def test_a_folder_of_other_data_is_refused(tmp_path):
    mine, other = make(tmp_path), make(tmp_path, index=make_index(15))
    shutil.rmtree(mine.folder)
    shutil.copytree(other.folder, mine.folder)
    with pytest.raises(runs.RunError, match="fingerprint is .* not .*Delete or move"):
        make(tmp_path, fit=never)
    with pytest.raises(runs.RunError, match=r"(?s)another one.*data is 'MURA-demo', not 'MURA-v1.1'"):
        runs.load(mine.folder, index=make_index(name="MURA-v1.1"))
    assert (
        len(runs.load(mine.folder))
        if hasattr(mine, "__len__")
        else runs.load(mine.folder).info["name"] == "funnel"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "run.json").write_text('{"name": "fun'), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_bytes(b"\xff\xfe\x00"), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_text("[1, 2]"), "is not a run's"),
        (lambda f: (f / "run.json").unlink(), "holds no run.json"),
        (lambda f: (f / "predictions.csv").unlink(), "predictions.csv is missing"),
        (lambda f: os.truncate(f / "predictions.csv", 100), "predictions.csv has 100 bytes instead of"),
        (
            lambda f: (f / "history.csv").write_text((f / "history.csv").read_text().replace("0.7", "0.1")),
            "history.csv was changed",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_the_remedy(tmp_path, damage, message):
    folder = make(tmp_path).folder
    damage(folder)
    with pytest.raises(runs.RunError, match=message) as caught:
        make(tmp_path, fit=never)
    assert str(folder) in str(caught.value) and "elete" in str(caught.value)


def test_no_folder_no_run(tmp_path):
    with pytest.raises(runs.RunError, match="There is no run in"):
        runs.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../escape"}, "becomes a folder"),
        ({"name": ""}, "becomes a folder"),
        ({"config": {"layers": {4, 5}}}, "config of run funnel must hold plain values"),
        ({"config": {"rate": float("nan")}}, "config of run funnel must hold plain values"),
        ({"config": {"activation": len}}, "config of run funnel must hold plain values"),
        ({"index": INDEX.iloc[:0]}, "no rows"),
        ({"index": pd.DataFrame({"path": ["a"]})}, "does not say which data"),
        ({"fit": lambda w: HISTORY}, "must return three things"),
        ({"fit": lambda w: ("a model", HISTORY, predicted())}, "fit returned a str"),
        (
            {"fit": lambda w: (None, HISTORY, predicted().drop(columns="split"))},
            "lack the index column.*split",
        ),
        ({"fit": lambda w: (None, HISTORY, predicted().iloc[:0])}, "predictions are empty"),
        ({"fit": lambda w: (None, HISTORY, predicted().assign(probability=np.nan))}, "not between 0 and 1"),
    ],
)
def test_bad_calls_give_one_clear_error_and_no_run(tmp_path, options, message):
    with pytest.raises((runs.RunError, metrics.PredictionsError), match=message):
        make(tmp_path, **options)
    assert list(tmp_path.glob("*/*/*/run.json")) == []


def test_a_root_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match="Cannot write .*MURA_RUNS"):
        make(tmp_path / "file", fit=never)


def test_a_full_disk_leaves_the_working_folder(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(runs.RunError, match="No space left on device.*Make room"):
            make(tmp_path)
    assert make(tmp_path).was_trained_now


# Lists and differences


def test_list_shows_scores_and_states(tmp_path):
    first = make(tmp_path)
    broken = make(tmp_path, name="broken")
    (broken.folder / "run.json").write_text("{")
    shutil.copytree(first.folder, first.folder.with_name("leftover-12345678.new"))
    table = runs.list_runs(tmp_path).set_index("name")
    assert sorted(table["state"]) == ["finished", "unreadable"]
    assert table.loc["funnel", "image_auroc"] == first.info["metrics"]["test"]["image"]["auroc"]["value"]
    assert table.loc["funnel", "split"] == "test" and table.loc["funnel", "epochs"] == 2
    assert runs.list_runs(tmp_path / "none").empty


def test_diff_of_equal_roots_shows_time_at_most(tmp_path):
    make(tmp_path / "a"), make(tmp_path / "b")
    assert set(runs.diff(tmp_path / "a", tmp_path / "b")["item"]) <= {"seconds"}


def test_diff_shows_what_changed_and_whether_it_is_within(tmp_path):
    a = make(tmp_path / "a", lambda w: (None, HISTORY, predicted(seed=0)))
    b = make(
        tmp_path / "b", lambda w: (None, HISTORY, predicted(seed=1)), config={"layers": 5, "dropout": 0.3}
    )
    table = runs.diff(tmp_path / "a", tmp_path / "b").set_index("item")
    assert table.loc["config.layers", ["a", "b", "change"]].tolist() == [4, 5, 1]
    auroc_a, auroc_b = (run.info["metrics"]["test"]["image"]["auroc"] for run in (a, b))
    row = table.loc["metrics.test.image.auroc"]
    assert row["change"] == pytest.approx(auroc_b["value"] - auroc_a["value"])
    assert row["within"] == (auroc_a["low"] <= auroc_b["value"] <= auroc_a["high"])
    assert not table.index.str.contains("low|files|finished").any()
    pd.testing.assert_frame_equal(runs.diff(a.folder, b.folder).set_index("item"), table)


def test_diff_pairs_by_config_and_says_what_has_no_partner(tmp_path):
    for layers in (4, 5):
        make(tmp_path / "a", config={"layers": layers})
    for layers in (5, 6, 7):
        make(tmp_path / "b", config={"layers": layers})
    make(tmp_path / "b", name="other")
    table = runs.diff(tmp_path / "a", tmp_path / "b").query("item == 'run'")
    assert sorted(zip(table["a"], table["b"], strict=True)) == [("absent", "present")] * 3 + [
        ("present", "absent")
    ]


def test_diff_needs_runs(tmp_path):
    with pytest.raises(runs.RunError, match="no folder"):
        runs.diff(tmp_path / "x", tmp_path)
    with pytest.raises(runs.RunError, match="no finished run"):
        runs.diff(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.26, "8.3 s"),
        (59.96, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration_reads_well(seconds, text):
    assert runs.duration(seconds) == text
