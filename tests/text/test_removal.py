"""Removing text: one image, and whole data sets, whole or absent."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from text_films import film, write_on

from mura_course import data
from mura_course.errors import DataError, DiskError, MuraError, TextError
from mura_course.text import clean_dataset, inpaint, removal, strokes


def test_inpainting_fills_from_around_and_touches_nothing_else():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (80, 1))
    mask = np.zeros(ramp.shape, bool)
    mask[20:25, 30:60] = mask[70:, 95:] = True
    filled = inpaint(np.where(mask, 255, ramp).astype(np.uint8), mask)
    assert np.array_equal(filled[~mask], ramp[~mask]) and np.abs(filled.astype(int) - ramp).max() <= 12


@pytest.fixture
def dataset(mura_folder):
    """A tiny data set whose films are films: every second one with an L, some RGB, one 16-bit."""
    root = mura_folder()
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        image = film(130, 110, number)
        if number % 2 == 0:
            image = write_on(image, at=(12, 30))[0]
        image = np.repeat(image[..., None], 3, 2) if number % 3 == 0 else image
        image = image.astype(np.uint16) * 257 if number == 4 else image
        cv2.imwrite(str(file), image)
    return root


@pytest.fixture
def clean(dataset, tmp_path):
    """``clean(name, out)`` cleans it into tmp_path/out."""
    return lambda name="strokes", out="out": clean_dataset(dataset, tmp_path / out, name)


def contents(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def stopped(clean, tmp_path, monkeypatch):
    """What a call leaves that was stopped after it had written all films."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(removal.shutil, "copyfile", Mock(side_effect=KeyboardInterrupt))
        clean()
    return tmp_path / "out.partial"


def test_a_data_set_is_cleaned_into_a_new_folder(dataset, tmp_path, clean):
    before, out = contents(dataset), tmp_path / "out"
    record = clean()
    assert contents(dataset) == before
    index, original = data.load_index(out, quiet=True), data.load_index(dataset, quiet=True)
    assert index.drop(columns="path").equals(original.drop(columns="path"))
    for number, path in enumerate(sorted(original["path"])):
        old, new = (cv2.imread(str(root / path), cv2.IMREAD_ANYCOLOR) for root in (dataset, out))
        assert old.shape == new.shape and new[10:32, 10:28].max() < 128
        assert ((out / path).read_bytes() == before[path]) == (number % 2 == 1), path
    added = {p.name for p in out.iterdir()} - {p.name for p in dataset.iterdir()}
    assert added == {removal.RECORD} and {*tmp_path.iterdir()} == {dataset, out}
    assert json.loads((out / removal.RECORD).read_text()) == record
    assert (record["detector"], record["versions"]) == ("strokes", strokes.Strokes.versions)
    assert (record["films"], record["films_with_text"]) == (13, 7)


def test_films_of_another_source_or_detector_are_not_kept(dataset, tmp_path, stopped, clean):
    """Fault 6: a killed call went on although a film that it had cleaned was replaced since."""
    copy, first = shutil.copytree(dataset, tmp_path / "copy"), min(dataset.rglob("*.png"))
    first.write_bytes(first.read_bytes()[::-1])  # of the same size
    with pytest.raises(TextError, match=r"out\.partial was left by a call on other films.*Delete or move"):
        clean()
    assert not stopped.with_name("out").exists()
    for source, detector in ((copy, "strokes"), (dataset, "rapidocr")):
        with pytest.raises(TextError, match="on other films, or with another detector"):
            clean_dataset(source, tmp_path / "out", detector)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/thesis.txt").write_text("mine")
    with pytest.raises(DiskError, match=r"new\.partial.*cannot be read.*Delete or move"):
        clean(out="new")
    assert contents(tmp_path / "new.partial") == {"thesis.txt": b"mine"}


def test_a_folder_that_lost_films_is_not_called_finished(tmp_path, clean):
    """Fault 6: a second call said that all was done, whatever was left in the folder."""
    clean()
    next((tmp_path / "out").rglob("*.png")).unlink()
    with pytest.raises(TextError, match="out exists already. Name another folder, or delete it"):
        clean()


def test_a_call_goes_on_with_the_films_not_yet_written(stopped, clean, tmp_path):
    lost, *kept = [path.relative_to(stopped) for path in sorted(stopped.rglob("*.png"))]
    for path in (lost, *kept):
        os.utime(stopped / path, (1, 1))
    (stopped / lost).unlink()
    (stopped / lost).with_name(".image9.png.1234.part").write_bytes(b"half")
    clean()
    clean(out="expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert [path for path in (lost, *kept) if (tmp_path / "out" / path).stat().st_mtime == 1] == kept


def test_a_pipe_in_place_of_a_film_is_refused_at_once(dataset, tmp_path, clean):
    """Fault 9: a FIFO named image1.png hung the call for ever."""
    file = min(dataset.rglob("*.png"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(MuraError, match="image1.png"):
        clean()
    with pytest.raises(DataError, match=r"image1\.png: no ordinary file"):  # put there later
        removal._clean_film(strokes.Strokes(), file.parent, tmp_path, file.name)


def test_a_working_folder_that_is_a_link_is_not_followed(tmp_path, clean):
    """Fault 9: films were written wherever a symbolic link out.partial led."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match=r"out\.partial is a symbolic link"):
        clean()
    assert contents(tmp_path / "elsewhere") == {}


def test_a_full_disk_is_named_and_the_call_goes_on_when_room_was_made(clean, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskError, match=r"image1\.png.*No space left.*Make room"):
            clean()
    assert clean()["films"] == 13


KILLED = """
import os, sys
from mura_course import cli
from mura_course.text import removal
inpaint, films = removal.inpaint, []
def killed(image, mask):
    films.append(image)
    if len(films) == 5:
        os.kill(os.getpid(), 9)
    return inpaint(image, mask)
removal.inpaint = killed
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_killed_half_way_it_continues(tmp_path, dataset, clean):
    """Through the command, in a process of its own, which is killed at the fifth film with text."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", KILLED, "remove-text", dataset, out, "--detector", "strokes"]
    assert subprocess.run(command).returncode == -9
    assert not out.exists() and 4 <= len(list(partial.rglob("image?.png"))) < 13
    clean()
    clean(out="expected")
    assert contents(out) == contents(tmp_path / "expected")
