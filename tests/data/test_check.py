"""Whole data give an empty table, each damage its row; an archive is unpacked whole or not at all."""

import os
import re
import shutil
import stat
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from making import changed, write_mura

from mura_course import cli, data, disk
from mura_course.data import check
from mura_course.errors import DataError

IMAGE = "train/XR_HAND/patient00011/study1_positive/image1.png"
UNUSABLE, EXTRA, NUMBER, BROKEN = check.REMEDIES


def png(seed: int = 0, shape: tuple = (36, 40), dtype=np.uint8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    return cv2.imencode(".png", pixels)[1].tobytes()


def fill(root: Path) -> Path:
    """Put a small grey or RGB film into each image file below `root`."""
    for number, file in enumerate(sorted(root.rglob("image*.*"))):
        file.write_bytes(png(number, (36, 40, 3) if number % 3 == 0 else (36, 40)))
    return root


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return fill(write_mura(tmp_path_factory.mktemp("pristine") / "MURA-v1.1"))


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "MURA-v1.1")


@pytest.fixture(autouse=True)
def _numbers_of_the_small_data(pristine, monkeypatch):
    held = check.counts(data.load_index(pristine, quiet=True))
    monkeypatch.setattr(check, "MURA", held)


def found(root: Path) -> dict[str, int]:
    table = check.check(root, progress=False)
    assert list(table.columns) == ["problem", "count", "examples", "remedy"]
    assert table["examples"].map(len).tolist() == table["count"].clip(upper=5).tolist()
    return dict(zip(table["problem"], table["count"], strict=True))


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path):
    whole, file = png(shape=(4, 5)), tmp_path / "image1.png"
    bits = range(8 * (len(whole) - 12))  # the last chunk, of 12 bytes, says nothing of the film
    flips = [whole[: b // 8] + bytes([whole[b // 8] ^ 1 << b % 8]) + whole[b // 8 + 1 :] for b in bits]
    for content in [*flips, *(whole[:length] for length in range(len(whole) - 4))]:
        file.write_bytes(content)
        assert check.judge(file), content
    file.write_bytes(whole)
    assert check.judge(file) == ""


@pytest.mark.parametrize("content, verdict", [
    (b"", "no PNG"),
    (cv2.imencode(".jpg", np.zeros((40, 40), np.uint8))[1].tobytes(), "no PNG"),
    (png(0, (36, 40), np.uint16), ""),
    (png(0, (36, 40, 4)), ""),
    (os.mkfifo, "no ordinary file"),
    (lambda file: file.symlink_to("nowhere.png"), "No such file or directory"),
])  # fmt: skip
def test_what_is_wrong_with_an_image(tmp_path, content, verdict):
    file = tmp_path / "image1.png"
    file.write_bytes(content) if isinstance(content, bytes) else content(file)
    assert check.judge(file) == verdict


def test_muras_numbers_are_those_published_and_an_index_is_counted(pristine, monkeypatch):
    monkeypatch.undo()
    sums = check.MURA.groupby("split", sort=False).sum()
    assert sums.loc["train"].tolist()[:4] == [21935, 14873, 8280, 5177]
    assert sums.loc["test"].tolist()[:4] == [1667, 1530, 661, 538]
    # The KL report's Figure 4: images by body part, positives, negatives.
    for part, figure in {"ELBOW": (2006, 2925), "HUMERUS": (599, 673), "WRIST": (3987, 5765)}.items():
        assert tuple(check.MURA.loc[("train", part), ["abnormal images", "normal images"]]) == figure
    table = check.counts(data.load_index(pristine, quiet=True))
    assert table.shape == (14, 5) and set(table.dtypes) == {np.dtype("int64")}
    held = {cell: tuple(row) for cell, row in table.iterrows() if row.any()}
    assert held == {  # what `making.STUDIES` holds, counted by hand
        ("train", "ELBOW"): (3, 1, 1, 1, 2),
        ("train", "HAND"): (1, 2, 1, 1, 1),
        ("train", "WRIST"): (2, 1, 1, 1, 2),
        ("test", "HAND"): (1, 0, 1, 0, 1),
        ("test", "SHOULDER"): (0, 2, 0, 1, 1),
    }


def test_whole_data_give_an_empty_table(folder, capsys):
    (folder / "train/XR_HAND/._image1.png").touch()
    (folder / "train/Thumbs.db").touch()
    assert found(folder.parent) == {}
    assert cli.main(["check", str(folder)]) == 0
    assert re.search(r"Opened 13 images in .*\n\nAll is well\.\n$", capsys.readouterr().out)


def leave_out(root: Path) -> None:
    for file in root.glob("train_*.csv"):
        file.write_text(re.sub(".*XR_ELBOW/patient00013.*\n", "", file.read_text()))
    shutil.rmtree(root / "train/XR_ELBOW/patient00013")


DAMAGES = [
    (lambda root: (root / IMAGE).write_bytes(png()[:-30]), {BROKEN: 1}, f"{IMAGE}: .*"),
    (lambda root: (root / IMAGE).unlink(), {UNUSABLE: 1}, f".*1 lines: images absent.*{IMAGE}"),
    (lambda root: (root / "train/image9.png").touch(), {EXTRA: 1, BROKEN: 1}, "train/image9.png"),
    (lambda root: (root / "train/\x1b[31m.png").write_bytes(png()), {EXTRA: 1}, "train/\x1b.31m.png"),
    (lambda root: (root / os.fsdecode(b"train/\xe9.png")).write_bytes(png()), {EXTRA: 1}, "train/.*png"),
    (lambda root: (root / "train/again").symlink_to(root, target_is_directory=True), {}, ""),
    (leave_out, {NUMBER: 3}, "train ELBOW abnormal images: 0 instead of 1"),
    (lambda root: [file.write_bytes(b"") for file in root.rglob("image1.png")], {BROKEN: 8}, ".*: no PNG"),
]  # fmt: skip


@pytest.mark.parametrize("damage, expected, example", DAMAGES)
def test_each_damage_gives_its_own_row_and_no_other(folder, capsys, damage, expected, example):
    damage(folder)
    assert found(folder) == expected
    table = check.check(folder, progress=False)
    assert re.fullmatch(example, table["examples"][0][0] if expected else "", re.DOTALL)
    assert cli.main(["check", str(folder)]) == (1 if expected else 0)
    text = capsys.readouterr().out
    for problem, number in expected.items():
        assert f"{problem}: {number}" in text and check.REMEDIES[problem] in text
    assert "\x1b" not in text and text.encode()


def test_demo_films_are_compared_with_what_was_rendered(tmp_path):
    root = fill(write_mura(tmp_path / "MURA-demo", prefix="MURA-demo/", truth=True))
    films = {file.relative_to(root).as_posix(): disk.digest(file) for file in root.rglob("*.png")}
    lines = [f"{path},1,{sha256}\n" for path, sha256 in films.items()]
    (root / "manifest.csv").write_text("".join(["path,bytes,sha256\n", *lines]))
    assert found(root) == {}
    (root / IMAGE).write_bytes(png(99))  # a whole film, but another
    assert check.check(root, progress=False)["examples"][0] == [f"{IMAGE}: not the film that was rendered"]
    (root / "manifest.csv").write_text("path,bytes\n")
    assert found(root) == {UNUSABLE: 1}
    changed(root / "removed_text.json", detector="strokes", versions={})
    assert found(root) == {}


def make_zip(file: Path, root: Path, prefix: str = "MURA-v1.1/", extra: dict | None = None, method=8) -> Path:
    """A zip file of the data below `root`, and of `extra` entries: name (or ZipInfo) -> content."""
    with zipfile.ZipFile(file, "w", method) as packed:
        for inner in sorted(root.rglob("*")):
            packed.write(inner, prefix + inner.relative_to(root).as_posix())
        for name, content in (extra or {}).items():
            packed.writestr(name, content)
    return file


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.mark.parametrize("prefix", ["", "MURA-v1.1/", "MURA-v1.1/MURA-v1.1/", "./a/b/"])
def test_an_archive_is_unpacked_whole_wherever_the_data_lie_in_it(pristine, tmp_path, prefix):
    shadows = {f"__MACOSX/{prefix}._train": b"x", f"{prefix}train/XR_HAND/._a.png": b"x", ".DS_Store": b""}
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine, prefix, shadows)
    assert tree(check.extract(file)).items() >= tree(pristine).items()
    assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1", "MURA-v1.1.zip"]
    assert cli.main(["check", str(file), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert (tmp_path / "new/folder/MURA-v1.1").is_dir()


def test_fault_9_a_link_that_stands_where_it_works_is_not_followed(pristine, tmp_path):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    for name in ("MURA-v1.1.partial", f".MURA-v1.1.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(victim, target_is_directory=True)
    assert tree(check.extract(file)) == tree(pristine)
    assert tree(victim) == {"precious": b"mine"} and not (tmp_path / "MURA-v1.1").is_symlink()


def special(kind: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("MURA-v1.1/train/entry")
    entry.external_attr = (kind | 0o777) << 16
    return entry


UNSAFE = ("../evil.png", "a/../../evil.png", "..", "/evil.png", "..\\evil.png", "C:evil.png", "a.png:stream")
SPECIAL = [special(kind) for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)]


@pytest.mark.parametrize("entry, problem", [
    *((name, "leads out") for name in UNSAFE),
    *((entry, "entry' is a link or a device") for entry in SPECIAL),
    (f"MURA-v1.1/{IMAGE}".upper(), "twice"),  # also in other case
])  # fmt: skip
def test_an_entry_that_is_not_safe_stops_before_anything_is_written(pristine, tmp_path, entry, problem):
    (tmp_path / "a/b").mkdir(parents=True)
    file = make_zip(tmp_path / "a/b/MURA-v1.1.zip", pristine, extra={entry: "/etc/passwd"})
    before = tree(tmp_path)
    with pytest.raises(DataError, match=rf"{file}.*{problem}.*Download"):
        check.extract(file)
    assert tree(tmp_path) == before


def test_what_is_no_whole_zip_file_of_mura(pristine, tmp_path):
    whole = make_zip(tmp_path / "whole.zip", pristine, method=zipfile.ZIP_STORED).read_bytes()
    flags = whole.rindex(b"PK\x01\x02") + 8  # of the last entry of the directory
    encrypted = whole[:flags] + bytes([whole[flags] | 1]) + whole[flags + 1 :]
    film = (pristine / IMAGE).read_bytes()
    cats = make_zip(tmp_path / "cats.zip", tmp_path / "none", extra={"train/cats/1.png": "x"}).read_bytes()
    file = tmp_path / "MURA-v1.1.zip"
    for content, message in [
        *[(whole[:n], "cannot be unpacked.*Download it again") for n in (0, 1, 22, 1000, len(whole) // 2)],
        (b"<html>Sign in</html>", "cannot be unpacked .File is not a zip file"),
        (encrypted, "cannot be unpacked .*encrypted"),
        (whole.replace(film, film[:-1] + b"x"), "cannot be unpacked .Bad CRC-32.*image1.png"),
        (cats, "holds no data in MURA's layout"),
    ]:
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"MURA-v1.1.zip.*{message}"):
            check.extract(file)
        assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1.zip", "cats.zip", "whole.zip"]
    (tmp_path / "MURA-v1.1").symlink_to("nowhere")
    with pytest.raises(DataError, match="MURA-v1.1 exists already.*--out FOLDER"):
        check.extract(file)
