"""The demo data set as it is written: layout, truth, kills, and everything that must not happen to a disk."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

import mura_demo
from mura_course import cli, data
from mura_course.paths import cache_dir
from mura_demo import audit, dataset

STUDIES, SIDE = 60, 64
ORDER = {"studies": STUDIES, "seed": 1, "long_side": SIDE}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return mura_demo.write_demo(tmp_path_factory.mktemp("demo"), **ORDER, workers=2, cache=cache_dir())


def digests(folder):
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_normal_films_get_boxes_of_findings_that_they_might_have_had(small):
    """Abnormal films get their own, as truth.csv has it, or leave where no finding is seen."""
    index, truth = data.load_index(small, quiet=True), pd.read_csv(small / "truth.csv", index_col="path")
    films = audit.matched_boxes(index, cache_dir()).set_index("path")
    own = films[films["label"].eq(1)]
    assert set(own.index) == set(truth.index[truth["visible"].eq(1)])
    assert (own[audit.BOX] == truth.loc[own.index, audit.BOX]).all(axis=None)
    normal = films[films["label"].eq(0)]
    assert len(normal) > 0.8 * index["label"].eq(0).sum()
    assert len(set(normal["finding"])) > 3 and "none" not in set(normal["finding"])
    x0, y0, x1, y1 = normal[audit.BOX].to_numpy().T
    assert ((x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & (x1 <= ORDER["long_side"])).all()


def test_layout_is_muras_and_the_index_reads_it(small):
    index, truth = data.load_index(small, quiet=True), pd.read_csv(small / "truth.csv", keep_default_na=False)
    assert set(truth.path) == set(index.path)
    assert index.attrs["is_demo"] and index.attrs["name"] == "MURA-demo"
    assert ((truth.finding != "none") == truth.path.map(index.set_index("path").label)).all()
    seen = truth.assign(study=truth.path.str.rsplit("/", n=1).str[0]).groupby("study")
    assert (seen.visible.max() == (seen.finding.first() != "none")).all()  # some view shows every finding
    for row in truth.sample(25, random_state=0).itertuples():
        image = cv2.imread(str(small / row.path), cv2.IMREAD_UNCHANGED)
        height, width = image.shape[:2]
        assert max(height, width) <= SIDE and image.dtype == np.uint8
        if row.visible:
            assert 0 <= float(row.box_x0) < float(row.box_x1) <= width
        for _, x0, y0, x1, y1 in json.loads(row.text_boxes):
            assert x0 < x1 and y0 < y1


def test_manifests_hold_order_recipe_and_checksums_and_the_readme_credits_the_bones(small):
    manifest = pd.read_csv(small / "manifest.csv").set_index("path")
    assert manifest.sha256.to_dict() == {p: h for p, h in digests(small).items() if p.endswith(".png")}
    made, readme = mura_demo.read_manifest(small), (small / "README.txt").read_text()
    assert all(word in readme for word in ("NOT radiographs", "MyoSim", "Holzbaur", "McFarland"))
    assert {name: made[name] for name in dataset.ORDER} == ORDER | {"text": True, "recipe": mura_demo.RECIPE}


def test_known_films_are_the_data_sets_own_and_differ_from_their_twins_in_the_text_alone(small):
    truth = pd.read_csv(small / "truth.csv", keep_default_na=False)
    rows = truth[truth.text_boxes != "[]"].head(3)
    twins = mura_demo.text_free_twins(small, list(rows.path), cache_dir())
    films = mura_demo.known_films(small, list(rows.path), cache_dir())
    for film, row in zip(films, rows.itertuples(), strict=True):
        stored = cv2.imread(str(small / row.path), cv2.IMREAD_UNCHANGED)
        image, twin = (a if a.ndim == 2 else a[..., 0] for a in (stored, twins[row.path]))
        assert film.path == row.path and np.array_equal(film.image, image) and np.array_equal(film.twin, twin)
        assert json.loads(row.text_boxes) == [list(text) for text in film.texts]
        outside = image != twin
        for _, x0, y0, x1, y1 in film.texts:
            assert film.text[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1].any()
            outside[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = False
        assert not outside.any()
        assert 0.03 < film.bone.mean() < 0.7 and twin[film.bone].mean() > twin[~film.bone].mean()


def test_audit_finds_a_planted_shortcut_and_none_without(small):
    features = audit.frame_features(data.load_index(small, quiet=True))
    assert audit.shortcut_table(features, samples=200).loc["all", "low"] < 0.5
    more, label = features.sample(600, replace=True, random_state=0), np.arange(600) % 2
    blind = more.assign(patient=np.arange(600) // 3, label=label, finding=np.where(label, "lesion", "none"))
    planted = blind.assign(height=blind.height + 20 * label)
    honest, seen = (audit.shortcut_table(films, samples=200).loc["all"] for films in (blind, planted))
    assert honest.low < 0.5 < honest.high and seen.low > 0.9


def script(folder, before):
    """Run a plain script, without `if __name__ == "__main__"`, that renders; what it wrote to stderr."""
    order = ORDER | {"workers": 2, "cache": str(cache_dir())}
    call = f"mura_demo.write_demo({str(folder / 'out')!r}, **{order})"
    (folder / "script.py").write_text(f"import mura_demo\n{before}\n{call}\n")
    # Without coverage, whose own files would meet the limit on files, or the kill.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    environment["PYTHONPATH"] = str(Path(mura_demo.__file__).parents[1])
    command = [sys.executable, str(folder / "script.py")]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300).stderr


@pytest.mark.slow
def test_killed_and_continued_with_other_workers_it_writes_the_same_bytes(small, tmp_path):
    """The parent alone is killed. The script's stderr ends when its workers, who share it, have ended too."""
    kill = "import os, mura_demo.dataset as d\nreal = d.as_completed\n"
    script(tmp_path, kill + "d.as_completed = lambda tasks: next(real(tasks)) and os.kill(os.getpid(), 9)")
    partial = tmp_path / "out" / "MURA-demo.partial"
    damaged, *done = partial.glob("done/*.json")
    films = [row["path"] for note in done for row in json.loads(note.read_text())["films"]]
    made = {path: (partial / "MURA-demo" / path).stat().st_mtime_ns for path in films}
    damaged.write_text("{")  # a study whose note is damaged is not done
    result = mura_demo.write_demo(tmp_path / "out", **ORDER, workers=1, cache=cache_dir())
    assert {path: (result / path).stat().st_mtime_ns for path in films} == made
    assert digests(result) == digests(small)
    assert {f.name for f in result.parent.iterdir()} == {"MURA-demo", "MURA-demo.lock"}


@pytest.mark.slow
def test_a_disk_that_is_full_while_workers_write_is_named(tmp_path):
    """Fault 8: "a worker said: nothing". A limit on the size of files stands for the full disk."""
    errors = script(tmp_path, "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (1500, 1500))")
    assert f"OSError: {tmp_path / 'out'} cannot be written (File too large" in errors.splitlines()[-1]


WRONG = [("studies", 59), ("long_side", 2049), ("workers", 0), ("seed", 1.5), ("seed", "1")]


@pytest.mark.parametrize("option, value", WRONG)
def test_a_number_out_of_range_is_refused_at_once_with_the_range(tmp_path, option, value):
    low, high = dataset.LIMITS[option]
    with pytest.raises(ValueError, match=f"whole number from {low:,} to {high:,}, not {value!r}") as error:
        mura_demo.write_demo(tmp_path / "out", **(ORDER | {option: value}))
    assert str(error.value).startswith(f"{option} (--{option.replace('_', '-')})")
    assert not (tmp_path / "out").exists()


def test_more_studies_than_find_room_are_refused_with_the_number_that_does(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000_000}))
    monkeypatch.setattr(dataset, "plan", lambda *_: pytest.fail("planned before the room was known"))
    with pytest.raises(OSError, match=r"enough for some 2,863 studies \(--studies\).*MURA_CACHE") as error:
        mura_demo.write_demo(tmp_path, 100_000, cache=cache_dir())
    assert str(error.value).startswith(str(tmp_path))
    assert not (tmp_path / "MURA-demo.partial").exists()


THEIRS = {"no order": None, "another": '{"pizza": 2}', "a damaged one": '{"studies": ', "a list": "[1]"}


@pytest.mark.parametrize("order", [*THEIRS, "a link"])
def test_a_foreign_partial_folder_is_never_deleted(tmp_path, order):
    partial = tmp_path / "MURA-demo.partial"
    folder = tmp_path / "elsewhere" if order == "a link" else partial
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    if content := THEIRS.get(order, json.dumps(dict.fromkeys(dataset.ORDER, 1))):
        (folder / "order.json").write_text(content)
    if order == "a link":
        partial.symlink_to(folder)
    with pytest.raises(FileExistsError, match="not the renderer's. Move it away") as error:
        mura_demo.write_demo(tmp_path, **ORDER, cache=cache_dir())
    assert str(partial) in str(error.value) and (folder / "thesis.txt").read_text() == "mine"
    own = ORDER | {"text": True, "recipe": mura_demo.RECIPE}
    dataset._prepare(tmp_path / "own", own | {"seed": 7})  # the renderer's own, of another order, gives way
    (tmp_path / "own" / "done" / "0.json").write_text('{"films": []}')
    dataset._prepare(tmp_path / "own", own)
    assert dataset._read(tmp_path / "own/order.json") == own and not any((tmp_path / "own/done").iterdir())


def test_other_data_and_damaged_manifests_are_left_alone_and_named(small, tmp_path):
    with pytest.raises(FileExistsError, match=r"other data \(seed 1 instead of 2\). Choose another"):
        mura_demo.write_demo(small.parent, STUDIES, seed=2, long_side=SIDE)
    (tmp_path / "MURA-demo").mkdir()
    for content in ("{", "[1]", json.dumps(ORDER | {"text": True, "recipe": 1}), ""):
        (tmp_path / "MURA-demo" / "manifest.json").write_text(content)
        with pytest.raises(FileExistsError, match="holds other data"):
            mura_demo.write_demo(tmp_path, **ORDER)
        with pytest.raises(ValueError, match="mura-course demo") as error:
            mura_demo.text_free_twins(tmp_path / "MURA-demo", ["a.png"], cache_dir())
        assert str(tmp_path / "MURA-demo") in str(error.value)
    with pytest.raises(ValueError, match="holds no film train/none.png"):
        mura_demo.text_free_twins(small, ["train/none.png"], cache_dir())


def test_command_finds_what_is_there(small, capsys):
    order = ["--studies", str(STUDIES), "--long-side", str(SIDE), "--seed", "1"]
    assert cli.main(["demo", "--out", str(small.parent), *order]) == 0
    assert str(small) in capsys.readouterr().out
