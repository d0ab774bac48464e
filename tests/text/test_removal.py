"""Removing text: one image, and whole data sets, whole or absent."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from text_films import film, write_on

from mura_course import data
from mura_course.errors import DataError, DiskError, MuraError, TextError
from mura_course.text import clean_dataset, craft, inpaint, removal, strokes


def test_inpainting_fills_from_around_and_touches_nothing_else():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (80, 1))
    mask = np.zeros(ramp.shape, bool)
    mask[20:25, 30:60] = mask[70:, 95:] = True
    broken = np.where(mask, 255, ramp).astype(np.uint8)
    filled = inpaint(broken, mask)
    assert np.array_equal(filled[~mask], ramp[~mask]) and broken[22, 40] == 255
    assert np.abs(filled.astype(int) - ramp).max() <= 12
    colour = inpaint(np.repeat(broken[..., None], 3, 2), mask)
    assert np.array_equal(colour, np.repeat(filled[..., None], 3, 2))  # grey stored as RGB stays grey


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
def clean(dataset, tmp_path, monkeypatch):
    """``clean(name, out)`` cleans it into tmp_path/out, in this process."""
    monkeypatch.setattr(craft, "processes", ThreadPoolExecutor)
    yield lambda name="strokes", out="out": clean_dataset(dataset, tmp_path / out, name, 1, progress=False)
    removal._one_thread.cache_clear()
    cv2.setNumThreads(-1)


def contents(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def half(dataset, clean):
    """Clean all films but the last, which is broken, as a kill would leave it; returns what mends that one.

    It keeps its size and its time, so that the index sees no change.
    """
    last = dataset / data.load_index(dataset, quiet=True)["path"].iloc[-1]
    content, stamp = last.read_bytes(), last.stat().st_mtime_ns

    def write(what):
        last.write_bytes(what)
        os.utime(last, ns=(stamp, stamp))

    write(content[:30].ljust(len(content), b"\0"))
    with pytest.raises(DataError, match=rf"{last}.*cannot be read.*mura-course check"):
        clean()
    return lambda: write(content)


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
    assert added == {removal.RECORD, removal.BOXES} and {*tmp_path.iterdir()} == {dataset, out}
    stored, boxes = json.loads((out / removal.RECORD).read_text()), pd.read_csv(out / removal.BOXES)
    assert stored == record and record["detector"] == "strokes"
    assert record["versions"] == strokes.Strokes.versions
    assert (record["films"], record["films_with_text"], record["boxes"]) == (13, 7, len(boxes))
    assert record["fingerprint"] == data.fingerprint(original)
    assert boxes["source"].eq("strokes").all() and boxes["text"].isna().all()
    assert boxes[["x0", "y0"]].max().max() < 35 and boxes[["x2", "y2"]].min().min() > 10


def test_outputs_of_two_versions_of_a_detector_are_other_data(dataset, tmp_path, clean, monkeypatch):
    """Fault 1: the same bytes, cleaned by another detector or version, are another identity."""
    clean(out="a")
    monkeypatch.setattr(strokes.Strokes, "versions", {"strokes": "2"})
    removal._one_thread.cache_clear()
    clean(out="b")
    films = [{k: v for k, v in contents(tmp_path / n).items() if k.endswith("png")} for n in ("a", "b")]
    folders = (dataset, tmp_path / "a", tmp_path / "b")
    marks = {data.fingerprint(data.load_index(folder, quiet=True)) for folder in folders}
    assert films[0] == films[1] and len(marks) == 3


def test_films_of_a_changed_source_are_not_kept(dataset, tmp_path, clean):
    """Fault 6: a killed call went on although a film that it had cleaned was replaced since."""
    mend = half(dataset, clean)
    mend()
    first = min(dataset.rglob("*.png"))
    size, other = first.stat().st_size, first.read_bytes()[::-1]
    first.write_bytes(other)
    assert first.stat().st_size == size
    with pytest.raises(TextError, match=r"out\.partial was left by a call on other films.*Delete or move"):
        clean()
    assert not (tmp_path / "out").exists()


def test_films_of_another_source_or_detector_are_not_kept(dataset, tmp_path, clean, mura_folder):
    """Fault 6, and remains that are no remains at all."""
    half(dataset, clean)()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rp", dataset, copy], check=True)
    for source, detector in ((copy, "strokes"), (dataset, "rapidocr")):
        with pytest.raises(TextError, match="on other films, or with another detector"):
            clean_dataset(source, tmp_path / "out", detector, progress=False)
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


def test_a_call_goes_on_with_the_films_not_yet_written(dataset, tmp_path, clean, monkeypatch):
    replace = Path.replace

    def interrupt(path, target):
        if path.name == "out.partial":
            raise KeyboardInterrupt
        return replace(path, target)

    expected = clean(out="expected")
    mend, partial = half(dataset, clean), tmp_path / "out.partial"
    done = {p: p.stat().st_ino for p in partial.rglob("*.png")}
    assert len(done) == 12 and not (tmp_path / "out").exists()
    lost, kept = list(done)[0], list(done)[1:]
    lost.unlink()
    with (partial / removal.BOXES).open("a") as table:
        table.write("train/XR_HAND/patient00011/study1_positive/ima")  # a kill cut it short
    (kept[0].parent / ".image9.png.1234.part").write_bytes(b"half")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # as late as can be
        patch.setattr(Path, "replace", interrupt)
        mend()
        clean()
    record = clean()
    assert all((tmp_path / "out" / p.relative_to(partial)).stat().st_ino == done[p] for p in kept)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert {k for k in ours if ours[k] != theirs[k]} <= {removal.RECORD, removal.BOXES}
    assert sorted(ours[removal.BOXES].splitlines()) == sorted(theirs[removal.BOXES].splitlines())
    assert record | {"finished": ""} == expected | {"finished": ""}


def test_never_in_place(dataset, tmp_path, clean):
    link = tmp_path / "link"
    link.symlink_to(dataset)
    for out in (dataset, dataset / "clean", dataset.parent, link / "clean", Path(dataset / "train/..")):
        with pytest.raises(TextError, match="one in the other"):
            clean(out=out)
    assert not (dataset / "clean").exists()


def test_a_pipe_in_place_of_a_film_is_refused_at_once(dataset, clean):
    """Fault 9: a FIFO named image1.png hung the call for ever."""
    file = min(dataset.rglob("*.png"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(MuraError, match="image1.png"):
        clean()
    with pytest.raises(
        DataError, match=r"image1\.png cannot be read \(no ordinary file\)"
    ):  # put there later
        removal._clean_film("strokes", dataset, str(file.relative_to(dataset)))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_damaged_film_is_named(dataset, content):
    (dataset / "film.png").write_bytes(content)
    with pytest.raises(DataError, match=r"film\.png cannot be read"):
        removal._clean_film("strokes", dataset, "film.png")


def test_a_working_folder_that_is_a_link_is_not_followed(tmp_path, clean):
    """Fault 9: films were written wherever a symbolic link out.partial led."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError, match=r"out\.partial is a symbolic link"):
        clean()
    assert contents(tmp_path / "elsewhere") == {}


def test_a_full_disk_and_a_forbidden_place_are_named(tmp_path, clean, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="(?s)file.*cannot be written.*name another folder"):
        clean(out="file/out")

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DiskError, match=r"image1\.png.*No space left.*Make room"):
            clean()
    assert clean()["films"] == 13  # room was made


def test_a_process_that_dies_is_told_with_a_remedy(clean, monkeypatch):
    def dies(name):
        raise removal.BrokenProcessPool("abruptly")

    monkeypatch.setattr(removal, "_versions", dies)
    with pytest.raises(TextError, match=r"(?s)process has ended.*__main__"):
        clean()


@pytest.mark.slow
def test_killed_half_way_it_continues_and_leaves_no_process(dataset, tmp_path):
    """With real processes, through the command."""
    clean_dataset(dataset, tmp_path / "expected", "strokes", progress=False)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    # Every film waits, so that the kill comes in between; the workers are told by their environment.
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(
        "import pathlib, time\n"
        "read = pathlib.Path.read_bytes\n"
        "def slowly(path):\n"
        "    if path.suffix == '.png': time.sleep(0.3)\n"
        "    return read(path)\n"
        "pathlib.Path.read_bytes = slowly\n"
    )
    start = "import sys; from mura_course import cli; sys.exit(cli.main())"
    command = [sys.executable, "-c", start, "remove-text", dataset, out, "--detector", "strokes"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tmp_path / "slow")})
    limit = time.monotonic() + 120
    while len(list(partial.rglob("image?.png"))) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    workers = [int(pid) for pid in listing.stdout.split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and len(workers) >= 2
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < limit, "a worker lives on"
        time.sleep(0.02)
    assert 3 <= len(list(partial.rglob("image?.png"))) < 13
    clean_dataset(dataset, out, "strokes", progress=False)
    ours, theirs = contents(out), contents(tmp_path / "expected")
    assert ours.keys() == theirs.keys() and {k for k in ours if ours[k] != theirs[k]} == {removal.RECORD}


def _alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
