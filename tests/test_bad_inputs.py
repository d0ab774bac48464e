"""Bad inputs, one a row: each gives one clear error that names the file and the remedy, and leaves nothing.

No row may hang, end in an error that the package does not raise on purpose, or be answered with a result.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from making import STUDIES, make_films, make_index, make_predictions, write_mura

from mura_course import cli, data, metrics, profiles, reports, runs
from mura_course.data import check
from mura_course.errors import MuraError
from mura_course.recipes import Recipe, Stage

# --- A data folder, spoilt -----------------------------------------------------------------------------


def edit(name: str, old: str, new: str):
    """Spoil a CSV file: replace text in it."""

    def spoil(root: Path) -> None:
        file = root / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return spoil


def add(name: str, line: str):
    return lambda root: (root / name).write_text((root / name).read_text() + line + "\n")


def instead_of(name: str, make):
    """Spoil a file: remove it, and `make` something in its place."""

    def spoil(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return spoil


IMAGES, LABELS = "train_image_paths.csv", "train_labeled_studies.csv"
HAND = "train/XR_HAND/patient00011"
FOLDERS = {
    "no csv file of images": (instead_of(IMAGES, lambda f: None), f"{IMAGES}.*unpack|{IMAGES}.*archive"),
    "an empty csv file": (instead_of(IMAGES, Path.touch), f"{IMAGES}.*empty"),
    "a header alone": (instead_of(IMAGES, lambda f: f.write_text("Img_Path\n")), f"{IMAGES}.*empty"),
    "a line beyond the end": (add(IMAGES, "the end"), f"{IMAGES}.*malformed.*line 11: the end"),
    "the other side's images": (edit(IMAGES, "/train/", "/valid/"), "malformed.*line 1: .*valid/"),
    "a study of both signs": (add(LABELS, f"MURA-v1.1/{HAND}/study1_negative/,0"), "a study is listed"),
    "a csv file that is a folder": (instead_of(IMAGES, Path.mkdir), f"{IMAGES}.*archive"),
    "a csv file that is a pipe": (instead_of(IMAGES, os.mkfifo), f"{IMAGES}.*ordinary"),
    "a binary csv file": (instead_of(IMAGES, lambda f: f.write_bytes(bytes(range(256)))), IMAGES),
    "a label of 2": (edit(LABELS, "positive/,1", "positive/,2"), f"{LABELS}.*malformed"),
    "no label": (edit(LABELS, "positive/,1", "positive/,"), f"{LABELS}.*malformed"),
    "a label against its folder": (edit(LABELS, "positive/,1", "positive/,0"), "contradicts its folder"),
    "an image listed twice": (add(IMAGES, f"MURA-v1.1/{HAND}/study1_positive/image1.png"), "more than once"),
    "an image that does not exist": (add(IMAGES, f"MURA-v1.1/{HAND}/study1_positive/image9.png"), "absent"),
    "a study without a label": (edit(LABELS, f"MURA-v1.1/{HAND}/study1_positive/,1", ""), "no label"),
    "a path that leads out": (add(IMAGES, "MURA-v1.1/../../etc/image1.png"), "malformed"),
    "an absolute path": (add(IMAGES, "/etc/image1.png"), "malformed"),
    "an unknown body part": (edit(IMAGES, "XR_ELBOW", "XR_FOOT"), "malformed.*SHOULDER"),
    "a line with an escape": (add(IMAGES, "MURA-v1.1/train/\x1b[2Jx.png"), "malformed"),
    "an image that is a pipe": (instead_of(f"{HAND}/study1_positive/image1.png", os.mkfifo), "absent"),
    "an image that is a folder": (instead_of(f"{HAND}/study1_positive/image1.png", Path.mkdir), "absent"),
    "no images at all": (lambda root: shutil.rmtree(root / "train"), "absent"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_spoilt_data_folder_is_refused_in_one_message(tmp_path, name):
    spoil, message = FOLDERS[name]
    root = write_mura(tmp_path / "MURA-v1.1")
    spoil(root)
    refused(lambda: data.load_index(root, quiet=True), message)
    table = check.check(root, progress=False)  # tells it, too, and does not stop
    assert not table.empty and "\x1b" not in check.report(table)


# --- Calls ---------------------------------------------------------------------------------------------


def refused(call, message: str) -> None:
    """`call` raises one of the package's own errors, of a few printable lines, that says `message`."""
    with pytest.raises(MuraError, match=rf"(?s){message}") as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) <= 8 and len(text) < 1500
    assert all(c.isprintable() or c == "\n" for c in text)
    assert text.rstrip()[-1] not in ":("


INDEX = make_index()
ROWS = make_predictions(INDEX[INDEX["split"].eq("test")])
BOTH = [*STUDIES, ("valid", "HAND", 11, 1, True, 1)]


changed, compare = ROWS.assign, metrics.paired_difference

CALLS = {
    "no such folder": (lambda t: data.load_index(t / "absent"), "absent.*does not exist"),
    "a file instead of a folder": (lambda t: (t / "x").touch() or data.load_index(t / "x"), "is a file"),
    "a folder without data": (lambda t: data.load_index(t), "no data in MURA's layout"),
    "two data sets": (lambda t: [write_mura(t / n) for n in "ab"] and data.load_index(t), "2 data sets"),
    "a study on both sides": (lambda t: data.load_index(write_mura(t / "x", BOTH)), "both train and valid"),
    "a fraction of 0": (lambda t: data.split_dev(INDEX, 0), "fraction=0"),
    "too few to split": (lambda t: data.split_dev(make_index(patients=2), 0.1), "of 2 patients are too few"),
    "a fraction of 1": (lambda t: data.split_dev(INDEX, 1.0), "fraction=1"),
    "a split by study": (lambda t: data.split_dev(INDEX, by="study"), "'patient', 'image'"),
    "a second dev set": (lambda t: data.split_dev(INDEX), "dev set already"),
    "an index without attrs": (lambda t: run(t, index=pd.DataFrame(INDEX.to_dict("list"))), "attrs"),
    "truth of MURA": (lambda t: data.load_truth(make_index(name="MURA-v1.1")), "no truth.csv"),
    "truth that is missing": (lambda t: data.load_truth(make_index(t)), "truth.csv"),
    "a store of absent films": (lambda t: store(make_index(t)), "absent"),
    "a store of size 0": (lambda t: store(make_films(t / "f"), 0), "size"),
    "a store of no images": (lambda t: store(INDEX[:0]), "index"),
    "a scale that does not exist": (lambda t: batches(t, scale="0..2"), "'0..1'.*not '0..2'"),
    "a layout that does not exist": (lambda t: batches(t, layout="chw"), "'nhwc'"),
    "batches of 0": (lambda t: batches(t, batch_size=0), "batch"),
    "a target that does not exist": (lambda t: batches(t, target="bone"), "'label'.*not 'bone'"),
    "batches of other images": (lambda t: data.Batches(store(make_films(t / "f")), INDEX), "store"),
    "rotation by 200 degrees": (lambda t: data.Augment(rotation=200), "180"),
    "a probability of 2": (lambda t: data.Augment(flip=2), "between 0 and 1"),
    "the wrong scale": (lambda t: data.check_scale("-1..1", batches(t)), "'-1..1'"),
    "no predictions": (lambda t: metrics.image_report(ROWS[:0]), "empty"),
    "no probability": (lambda t: metrics.image_report(ROWS.drop(columns="probability")), "probability"),
    "a probability that is no number": (lambda t: metrics.image_report(changed(probability=np.nan)), "NaN"),
    "logits": (lambda t: metrics.image_report(changed(probability=7.0)), "sigmoid"),
    "a label of 3": (lambda t: metrics.image_report(changed(label=3)), "0 .normal. or 1"),
    "labels in words": (lambda t: metrics.image_report(changed(label="positive")), "8 of 8 values of label"),
    "a probability in words": (lambda t: metrics.image_report(changed(probability="x")), "8 of 8.*first 'x'"),
    "a study without a name": (lambda t: metrics.image_report(changed(study=None)), "empty cells.*study"),
    "images twice": (lambda t: metrics.image_report(pd.concat([ROWS, ROWS])), "more than once"),
    "a study with two labels": (lambda t: metrics.study_report(changed(label=[0, 1] * 4)), "one label"),
    "a study of two patients": (lambda t: metrics.study_report(changed(patient=range(8))), "one patient"),
    "other images to compare": (lambda t: compare(ROWS, ROWS[1:]), "not of the same"),
    "other labels to compare": (lambda t: compare(ROWS, changed(label=0)), "same labels"),
    "another part to compare": (lambda t: compare(ROWS, [ROWS, changed(body_part="HAND")]), "not of the"),
    "an unknown claim": (lambda t: reports.agreement("slightly better", ROWS, ROWS), "claim must.*'better'"),
    "a level of reports": (lambda t: reports.image_reports({"x": ROWS}, level="film"), "'study', not 'film'"),
    "a batch of too many": (lambda t: batches(t, batch_size=9, drop_last=True), "images make no batch of 9"),
    "an unknown level": (lambda t: compare(ROWS, ROWS, level="view"), "'study'"),
    "an unknown metric": (lambda t: reports.difference(ROWS, ROWS, "auc"), "auroc"),
    "a run named like a path": (lambda t: run(t, name="../x"), "name"),
    "a config that is no JSON": (lambda t: run(t, config={"a": {1, 2}}), "numbers, text, lists, dicts"),
    "a config with NaN": (lambda t: run(t, config={"a": float("nan")}), "numbers, text, lists, dicts"),
    "a fit without paths": (lambda t: run(t, fit=lambda w: (None, None, ROWS.drop(columns="path"))), "path"),
    "a fit without rows": (lambda t: run(t, fit=lambda w: (None, None, ROWS[:0])), "are empty"),
    "a model that cannot be saved": (lambda t: run(t, fit=lambda w: ("model", None, ROWS)), "str"),
    "a run on no data": (lambda t: run(t, index=INDEX[:0]), "no rows"),
    "a folder without a run": (lambda t: runs.load(t), "run.json"),
    "a stage without an end": (lambda t: Stage(learning_rate=1), "epochs or some steps"),
    "a recipe without stages": (lambda t: Recipe(backbone="x", size=8, stages=()), "stage"),
}


def store(index: pd.DataFrame, size: int = 16) -> data.PixelStore:
    return data.PixelStore.open_or_build(index, size, progress=False)


def batches(folder: Path, **options) -> data.Batches:
    index = make_films(folder / "films", patients=4)
    return data.Batches(store(index), index, **options)


def run(root: Path, name="x", config=None, fit=lambda workdir: (None, None, ROWS), index=INDEX) -> runs.Run:
    return runs.fit_or_load(name, config or {}, fit, index, profiles.get("smoke"), root=root)


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_refused_in_one_message(tmp_path, name, monkeypatch):
    call, message = CALLS[name]
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    refused(lambda: call(tmp_path), message)
    left = [p.name for p in tmp_path.rglob("*") if p.name.endswith((".part", ".new", ".writing"))]
    assert left == []


# --- The command ---------------------------------------------------------------------------------------

COMMANDS = {
    "demo --out {t}/x --studies 0": "--studies",
    "demo --out {t}/x --seed -1 --studies 100": "seed",
    "demo --out {t}/file --studies 100": "file",
    "demo --out {t}/x --studies 10": "60",
    "check {t}/absent": "absent",
    "check {t}/file": "file",
    "check {t} --out {t}/y": "--out",
    "remove-text {t}/empty {t}/clean": "MURA's layout",
    "remove-text {t}/absent {t}/clean": "absent",
    "remove-text {t}/data {t}/data/MURA-v1.1": "MURA-v1.1",
    "remove-text {t}/data {t}/link/clean": "one in the other",  # by way of a link
    "remove-text {t}/data {t}/data": "one in the other",
    "remove-text {t}/data {t}/data/MURA-v1.1/train/..": "one in the other",
    "remove-text {t}/data {t}/file": "file",
    "remove-text {t}/data {t}/clean --detector tesseract": "tesseract",
    "remove-text {t}/data {t}/clean --detector strokes": "image1.png",
    "unknown": "unknown",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_command_is_refused_in_one_line(tmp_path, command, capsys):
    write_mura(tmp_path / "data" / "MURA-v1.1")  # its films are empty files
    (tmp_path / "file").write_text("no data")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data/MURA-v1.1")
    try:
        code = cli.main(command.replace("{t}", str(tmp_path)).split())
    except SystemExit as usage:  # argparse's own way out
        code = usage.code
    error = capsys.readouterr().err
    assert code not in (0, None)
    assert "Traceback" not in error and COMMANDS[command].replace("{t}", str(tmp_path)) in error
    assert not (tmp_path / "x").exists() and not list(tmp_path.rglob("clean"))
