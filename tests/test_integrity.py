"""Whole data give an empty table, each damage its own row; an archive is unpacked whole, inside, or not."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import STUDIES, write_mura
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mura_course import archive, cli, data, image_files, integrity
from mura_course.errors import DataError, DataNotFoundError, MuraError

TRAIN_IMAGE = "train/XR_HAND/patient00011/study1_positive/image1.png"
TEST_IMAGE = "valid/XR_SHOULDER/patient00021/study1_positive/image2.png"


def png(seed: int = 0, shape: tuple = (36, 40), dtype=np.uint8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 60000, shape).astype(dtype)
    return cv2.imencode(".png", pixels)[1].tobytes()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def make_png(width, height, depth, mode, rows: bytes, packed: bool = False, extra: bytes = b"") -> bytes:
    """A PNG written by hand: `rows` are filter byte and samples of each row, or their `packed` form."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    body = chunk(b"IDAT", rows if packed else zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


def palette_png() -> bytes:
    return make_png(40, 36, 8, 3, bytes(36 * 41), extra=chunk(b"PLTE", bytes(range(30))))


def fill(root: Path) -> Path:
    """Put a small grey film, or an RGB one, into each empty image file below `root`."""
    for number, file in enumerate(sorted(root.rglob("*.*"))):
        if file.suffix.lower() == ".png" and not file.name.startswith("._"):
            file.write_bytes(png(number, (36, 40, 3) if number % 3 == 0 else (36, 40)))
    return root


def write_data(root: Path, **options) -> Path:
    return fill(write_mura(root, **options))


def make_demo(root: Path) -> Path:
    """The same as demo data: with their three files."""
    write_data(root, truth=True)
    films = sorted(file for split in ("train", "valid") for file in (root / split).rglob("*.png"))
    digests = [(f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()) for f in films]
    lines = [
        f"{f.relative_to(root).as_posix()},{n},{digest}"
        for f, (n, digest) in zip(films, digests, strict=True)
    ]
    (root / "manifest.csv").write_text("\n".join(["path,bytes,sha256", *lines, ""]))
    (root / "manifest.json").write_text(json.dumps({"images": len(films)}))
    return root


# What `STUDIES` of conftest hold, counted by hand.
HELD = pd.DataFrame(
    [
        ("train", "ELBOW", 3, 1, 1, 1, 2),
        ("train", "HAND", 1, 2, 1, 1, 1),
        ("train", "WRIST", 2, 1, 1, 1, 2),
        ("test", "HAND", 1, 0, 1, 0, 1),
        ("test", "SHOULDER", 0, 2, 0, 1, 1),
    ],
    columns=["split", "body_part", *integrity.COUNTS],
).set_index(["split", "body_part"])


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_data(tmp_path / "MURA-v1.1")


def check(root: Path, **options) -> pd.DataFrame:
    return integrity.check(root, **{"progress": False, "workers": 2, "expected": HELD} | options)


def found(root: Path, **options) -> dict[str, int]:
    table = check(root, **options)
    assert list(table.columns) == ["problem", "count", "examples", "remedy"]
    assert table["problem"].is_unique and all(table["remedy"]) and all(table["examples"])
    assert all(len(line) <= 100 for line in integrity.report(table).splitlines() if "Folder: " not in line)
    return dict(zip(table["problem"], table["count"], strict=True))


def edit(root: Path, name: str, change) -> None:
    """Replace the text of one CSV file by what `change` makes of its lines."""
    file = root / f"{name}.csv"
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))


# --- One image ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(36, 40), (36, 40, 3)])
def test_grey_and_rgb_are_sound(shape):
    assert image_files.judge(png(1, shape)) == ("", "")


def test_every_cut_is_truncated_and_every_flipped_bit_is_damage():
    whole = make_png(32, 32, 8, 0, bytes(32 * 33), extra=chunk(b"tEXt", b"Comment\0x"))
    assert image_files.judge(whole) == ("", "")
    assert image_files.judge(b"") == ("empty file", "")
    assert {image_files.judge(whole[:length])[0] for length in range(1, len(whole))} == {"truncated"}
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert image_files.judge(bytes(flipped))[0] == "damaged", bit


def test_cuts_at_any_offset_of_a_film_of_many_chunks():
    film = png(2, (300, 320))
    assert film.count(b"IDAT") > 5
    for length in random.Random(0).sample(range(8, len(film)), 200):
        assert image_files.judge(film[:length]) == ("truncated", f"ends after {length:,} bytes")


ROWS = bytes(36 * 41)


@pytest.mark.parametrize("content, problem, detail", [
    (cv2.imencode(".jpg", np.zeros((40, 40), np.uint8))[1].tobytes(), "not a PNG", "JPEG"),
    (cv2.imencode(".bmp", np.zeros((40, 40), np.uint8))[1].tobytes(), "not a PNG", "BMP"),
    (b"GIF89a" + bytes(99), "not a PNG", "GIF"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "not a PNG", "Git LFS"),
    (b"<!DOCTYPE html>", "not a PNG", "begins with 3c 21 44 4f"),
    (bytes(5000), "not a PNG", "begins with 00 00 00 00"),
    (b"x", "not a PNG", "begins with 78"),
    (png().replace(b"\r\n", b"\n"), "damaged", "its first 8 bytes"),
    (make_png(40, 36, 16, 0, bytes(36 * 81)), "unusual mode", "grey, 16 bit"),
    (png(0, (36, 40, 3), np.uint16), "unusual mode", "RGB, 16 bit"),
    (make_png(40, 36, 1, 0, bytes(36 * 6)), "unusual mode", "grey, 1 bit"),
    (palette_png(), "unusual mode", "palette, 8 bit"),
    (make_png(40, 36, 8, 4, bytes(36 * 81)), "unusual mode", "grey with transparency, 8 bit"),
    (png(0, (36, 40, 4)), "unusual mode", "RGBA, 8 bit"),
    (png(0, (31, 500)), "unusual size", "500 x 31 px"),
    (png(0, (1, 1)), "unusual size", "1 x 1 px"),
    (make_png(4097, 32, 8, 0, bytes(32 * 4098)), "unusual size", "4,097 x 32 px"),
    (make_png(2**31 - 1, 2**31 - 1, 8, 0, b""), "unusual size", "2,147,483,647 x 2,147,483,647 px"),
    (make_png(0, 0, 8, 0, b""), "unusual size", "0 x 0 px"),
    # Sound chunks around pixels that are none.
    (make_png(40, 36, 8, 0, ROWS[: 20 * 41]), "damaged", "its pixels cannot be decoded"),
    (make_png(40, 36, 8, 0, zlib.compress(ROWS)[:-4] + b"abcd", packed=True), "damaged", "its pixels .*"),
    (make_png(40, 36, 8, 0, zlib.compress(ROWS)[:-6], packed=True), "damaged", "its pixels cannot .*"),
    (make_png(40, 36, 8, 0, b"", packed=True), "damaged", "its pixels cannot be decoded"),
    (make_png(40, 36, 8, 0, b"\x09" + ROWS[1:]), "damaged", "its pixels cannot be decoded"),
    (make_png(40, 36, 8, 5, ROWS), "damaged", "its pixels cannot be decoded"),
    (make_png(40, 36, 7, 0, ROWS), "damaged", "its pixels cannot be decoded"),
    (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "damaged", "it does not begin with its size and mode"),
    (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"") + chunk(b"IEND", b""), "damaged", "it does not begin .*"),
])  # fmt: skip
def test_what_is_wrong_with_an_image(content, problem, detail):
    judged = image_files.judge(content)
    assert judged[0] == problem and re.fullmatch(detail, judged[1]), judged


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_judged(content, with_signature):
    problem, _ = image_files.judge(b"\x89PNG\r\n\x1a\n" * with_signature + content)
    assert problem in ("empty file", "truncated", "damaged", "not a PNG")


def test_what_cannot_be_opened_is_unreadable(folder, monkeypatch):
    def replace(view: int, make) -> None:
        file = folder / f"train/XR_ELBOW/patient00011/study1_negative/image{view}.png"
        file.unlink()
        make(file)

    replace(1, os.mkdir)
    replace(2, os.mkfifo)
    replace(3, lambda file: file.symlink_to("nowhere.png"))
    os.truncate(folder / TEST_IMAGE, 1 << 30)  # a gigabyte of nothing: not read into memory
    table = check(folder).set_index("problem")
    assert table["count"].to_dict() == {"unreadable": 3, "unusual size": 1}
    assert [text.rpartition(": ")[2] for text in table.loc["unreadable", "examples"]] == [
        "no ordinary file",
        "no ordinary file",
        os.strerror(2),
    ]
    assert "1,073,741,824 bytes" in table.loc["unusual size", "examples"][0]


# --- Whole data -----------------------------------------------------------------------------------------


def test_muras_numbers_are_those_published():
    sums = integrity.MURA.groupby("split", sort=False).sum()
    assert sums.loc["train"].tolist()[:4] == [21935, 14873, 8280, 5177]
    assert sums.loc["test"].tolist()[:4] == [1667, 1530, 661, 538]
    assert integrity.MURA.filter(like="images").to_numpy().sum() == 40_005
    assert integrity.MURA.filter(like="studies").to_numpy().sum() == 14_656
    # The KL report's Figure 4: images by body part, positives, negatives.
    figure = {"ELBOW": (4931, 2006, 2925), "HUMERUS": (1272, 599, 673), "WRIST": (9752, 3987, 5765)}
    for part, (images, positives, negatives) in figure.items():
        row = integrity.MURA.loc["train", part]
        assert (row["normal images"], row["abnormal images"]) == (negatives, positives)
        assert images == negatives + positives


def test_counts_of_an_index(folder):
    table = integrity.counts(data.load_index(folder, quiet=True))
    assert table.shape == (14, 5) and set(table.dtypes) == {np.dtype("int64")}
    assert table.index.equals(integrity.MURA.index) and list(table) == list(integrity.MURA)
    assert table.loc[HELD.index].equals(HELD)
    assert table.drop(HELD.index).eq(0).all(axis=None)


@pytest.mark.parametrize("options", [
    {},
    {"header": True, "newline": "\r\n", "bom": True},
    {"macos": True},
    {"prefix": ""},
    {"extension": ".PNG"},
])  # fmt: skip
def test_whole_data_give_an_empty_table(tmp_path, options):
    root = write_data(tmp_path / "outer/MURA-v1.1", **options)
    (root / "train/XR_HAND/.DS_Store").touch()
    (root / "train/Thumbs.db").touch()
    table = check(tmp_path)
    assert table.empty and list(table.columns) == ["problem", "count", "examples", "remedy"]
    text = integrity.report(table)
    assert "real radiographs" in text and "All is well." in text
    assert table.attrs.pop("seconds") >= 0
    assert table.attrs == {
        "root": str(root),
        "name": "MURA-v1.1",
        "is_demo": False,
        "compared_with": "MURA v1.1",
        "images": 13,
        "studies": 8,
        "opened": 13,
        "remembered": 0,
    }


# --- One damage, one row --------------------------------------------------------------------------------


def spoil(content: bytes):
    return lambda root, rng: (root / rng.choice([TRAIN_IMAGE, TEST_IMAGE])).write_bytes(content)


def cut(root: Path, rng: random.Random) -> None:
    file = root / TRAIN_IMAGE
    file.write_bytes(file.read_bytes()[: rng.randrange(1, file.stat().st_size)])


def flip(root: Path, rng: random.Random) -> None:
    file = root / TRAIN_IMAGE
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def change_line(name: str, change):
    """Change one random line of a CSV file."""

    def damage(root: Path, rng: random.Random) -> None:
        def lines(old):
            at = rng.randrange(len(old))
            return [*old[:at], *change(old[at]), *old[at + 1 :]]

        edit(root, name, lines)

    return damage


def to_the_other_side(root: Path, rng: random.Random) -> None:
    place = root / "valid/XR_HAND/patient00022"
    place.rename(place.with_name("patient00012"))
    for name in ("valid_image_paths", "valid_labeled_studies"):
        edit(root, name, lambda lines: [line.replace("patient00022", "patient00012") for line in lines])


def relabel(root: Path, rng: random.Random) -> None:
    place = root / "train/XR_WRIST/patient00012/study1_positive"
    place.rename(place.with_name("study1_negative"))
    swap = ("patient00012/study1_positive", "patient00012/study1_negative")
    edit(root, "train_image_paths", lambda lines: [line.replace(*swap) for line in lines])
    edit(
        root,
        "train_labeled_studies",
        lambda lines: [
            line.replace(*swap).replace(",1", ",0") if swap[0] in line else line for line in lines
        ],
    )


def leave_out(what: str):
    def damage(root: Path, rng: random.Random) -> None:
        for file in root.rglob("*.png"):
            if what in file.as_posix():
                file.unlink()
        for name in ("train_image_paths", "train_labeled_studies"):
            edit(root, name, lambda lines: [line for line in lines if what not in line])

    return damage


CSV = ("train_image_paths", "train_labeled_studies", "valid_image_paths", "valid_labeled_studies")
IMAGES, LABELS = "train_image_paths", "train_labeled_studies"
DAMAGES = {
    "truncated": cut,
    "damaged": flip,
    "empty file": spoil(b""),
    "not a PNG": spoil(cv2.imencode(".jpg", np.zeros((40, 40), np.uint8))[1].tobytes()),
    "unusual mode": spoil(png(0, (36, 40), np.uint16)),
    "unusual mode (palette)": spoil(palette_png()),
    "unusual mode (RGBA)": spoil(png(0, (36, 40, 4))),
    "unusual size": spoil(png(0, (36, 4100))),
    "images absent": lambda root, rng: (root / TRAIN_IMAGE).unlink(),
    "file that no CSV file names": lambda root, rng: (
        (root / TRAIN_IMAGE).with_name("image9.png").write_bytes(png())
    ),
    "file that no CSV file names (Word)": lambda root, rng: (root / "valid/XR_HAND/notes.docx").write_bytes(
        b"x"
    ),
    "a label contradicts its folder name": change_line(
        LABELS, lambda line: [line[:-1] + str(1 - int(line[-1]))]
    ),
    "a study is listed more than once": change_line(LABELS, lambda line: [line, line]),
    "an image is listed more than once": change_line(IMAGES, lambda line: [line, line]),
    "malformed line": change_line(IMAGES, lambda line: [line[:-3]]),
    "malformed line (label)": change_line(LABELS, lambda line: [line[:-1]]),
    "unknown body part": change_line(IMAGES, lambda line: [re.sub("XR_[A-Z]+", "XR_FOOT", line)]),
    "a path points outside the data folder": change_line(IMAGES, lambda line: ["../" + line]),
    "patient in both train and valid": to_the_other_side,
    "counts differ from MURA's": relabel,
    "incomplete": leave_out("train/XR_ELBOW/patient00013"),
    "incomplete (a view)": leave_out("patient00011/study1_negative/image3.png"),
    "CSV file unusable": lambda root, rng: (root / f"{rng.choice(CSV)}.csv").unlink(),
    "CSV file unusable (empty)": lambda root, rng: (root / f"{rng.choice(CSV)}.csv").write_bytes(b""),
    "CSV file unusable (no text)": lambda root, rng: (root / f"{rng.choice(CSV)}.csv").write_bytes(
        b"\xff\xfe\0"
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pristine") / "MURA-v1.1")


def rows_of(pristine: Path, work: Path, names: list[str], seed: int) -> list[str]:
    """The problems reported of a copy with these damages."""
    root = work / "MURA-v1.1"
    shutil.copytree(pristine, root)
    for name in names:
        DAMAGES[name](root, random.Random(seed))
    problems = found(root)
    shutil.rmtree(work)
    return list(problems)


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_each_damage_gives_its_own_row_and_no_other(pristine, tmp_path, name):
    assert rows_of(pristine, tmp_path, [name], 0) == [name.partition(" (")[0]]


@settings(max_examples=8, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(DAMAGES)), max_size=1), seed=st.integers(1, 10**6))
def test_any_damage_gives_its_own_row_and_no_other(pristine, tmp_path_factory, names, seed):
    problems = rows_of(pristine, tmp_path_factory.mktemp("damaged"), names, seed)
    assert problems == [name.partition(" (")[0] for name in names]


@settings(max_examples=8, deadline=None)
@given(
    studies=st.lists(
        st.tuples(
            st.sampled_from(data.BODY_PARTS),
            st.integers(1, 30),
            st.integers(1, 3),
            st.booleans(),
            st.integers(1, 4),
        ),
        min_size=2,
        max_size=8,
        unique_by=lambda study: study[:3],
    ),
    macos=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_any_data_with_sound_films_give_an_empty_table(tmp_path_factory, studies, macos, newline):
    work = tmp_path_factory.mktemp("any")
    # Patients are told apart by their number; each side needs one for its CSV files not to be empty.
    sides = [("valid" if patient % 2 else "train", part, patient, *rest) for part, patient, *rest in studies]
    sides += [("train", "HAND", 40, 1, True, 1), ("valid", "HAND", 41, 1, False, 1)]
    root = write_data(work / "MURA-v1.1", studies=sides, macos=macos, newline=newline)
    expected = pd.DataFrame(0, integrity.MURA.index, integrity.COUNTS)
    for folder, part, *_, positive, views in sides:
        sign, cell = "abnormal" if positive else "normal", ("train" if folder == "train" else "test", part)
        expected.loc[cell, f"{sign} images"] += views
        expected.loc[cell, f"{sign} studies"] += 1
        expected.loc[cell, "patients"] = len({s[2] for s in sides if s[:2] == (folder, part)})
    assert found(root, expected=expected) == {}
    shutil.rmtree(work)


def test_an_unlabelled_study_counts_its_images(folder):
    edit(folder, LABELS, lambda lines: [line for line in lines if "XR_ELBOW/patient00011" not in line])
    assert found(folder) == {"a study has no label in train_labeled_studies.csv": 3}


# --- Many problems --------------------------------------------------------------------------------------


def spoil_much(root: Path) -> dict[str, int]:
    """Many damages at once, and what they must be reported as."""
    (root / "valid_labeled_studies.csv").unlink()
    edit(root, LABELS, lambda lines: [lines[0][:-1] + "0", *lines[1:]])
    edit(root, IMAGES, lambda lines: [*lines, "nonsense/image1.png"])
    elbow = root / "train/XR_ELBOW/patient00011/study1_negative"
    (elbow / "image1.png").write_bytes(b"")
    (elbow / "image2.png").write_bytes(png()[:-1])
    (elbow / "image3.png").unlink()
    (root / TEST_IMAGE).write_bytes(palette_png())
    (root / "valid/XR_HAND/extra.png").write_bytes(b"\xff\xd8\xff\xe0")
    return {
        "CSV file unusable": 1,
        "a label contradicts its folder name": 1,
        "malformed line": 1,
        "empty file": 1,
        "truncated": 1,
        "images absent": 1,
        "unusual mode": 1,
        "file that no CSV file names": 1,
        "not a PNG": 1,
    }


def test_all_problems_are_collected_where_load_index_stops_at_the_first(folder):
    expected = spoil_much(folder)
    with pytest.raises(MuraError):
        data.load_index(folder)
    assert found(folder) == expected


def test_the_command_prints_the_table_and_exits_with_1(folder, capsys, monkeypatch):
    expected = spoil_much(folder)
    monkeypatch.setattr(
        integrity.check, "__kwdefaults__", integrity.check.__kwdefaults__ | {"expected": HELD}
    )
    assert cli.main(["check", str(folder)]) == 1
    text = capsys.readouterr().out
    first_column = " ".join(line[:20].strip() for line in text.splitlines())
    assert all(problem in first_column for problem in expected)
    assert "image2.png: ends after" in text and "What to do: " in text
    assert max(len(line) for line in text.splitlines() if "Folder: " not in line) <= 100
    assert cli.main(["check", str(write_data(folder.parent / "whole"))]) == 0
    assert "All is well." in capsys.readouterr().out


@pytest.mark.parametrize("wrong, message", [
    (["nowhere"], "nowhere.*does not exist"),
    (["."], "holds no data in MURA's layout"),
    ([".", "--out", "elsewhere"], "--out says where to unpack"),
    (["no.zip"], "no.zip .2 bytes. is no zip file"),
])  # fmt: skip
def test_the_command_answers_a_wrong_folder_in_one_line(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.zip").write_bytes(b"PK")
    assert cli.main(["check", *wrong]) == 1
    printed = capsys.readouterr()
    assert re.search(message, printed.err) and printed.err.count("\n") == 1 and not printed.out


def test_examples_are_few_and_what_is_absent_is_told_by_part(tmp_path):
    root = write_data(tmp_path / "MURA-v1.1", studies=[*STUDIES, ("train", "FINGER", 15, 1, True, 9)])
    for file in [*root.glob("train/XR_FINGER/*/*/*.png"), *root.glob("valid/XR_HAND/*/*/*.png")]:
        file.unlink()
    for file in root.glob("train/XR_ELBOW/*/*/*.png"):
        file.write_bytes(b"")
    table = check(root, expected=None).set_index("problem")
    assert table.loc["images absent", "count"] == 10
    *names, by_part = table.loc["images absent", "examples"]
    assert len(names) == 5 and by_part == "by part: train FINGER 9, valid HAND 1"
    assert len(table.loc["empty file", "examples"]) == 4
    (root / TRAIN_IMAGE).write_bytes(b"")
    (root / TEST_IMAGE).write_bytes(b"")
    table = check(root, expected=None)
    assert table.set_index("problem").loc["empty file", "count"] == 6
    assert "... and 1 more" in integrity.report(table)


def test_a_part_of_mura_is_incomplete_and_says_what_lacks(folder):
    table = check(folder, expected=integrity.MURA)
    assert table["problem"].tolist() == ["incomplete"] and table["count"].tolist() == [40_005 - 13]
    assert table["examples"][0][:3] == [
        "train ELBOW: 4 of 4,931 images, 2 of 1,754 studies",
        "train FINGER: 0 of 5,106 images, 0 of 1,935 studies",
        "train FOREARM: 0 of 1,825 images, 0 of 877 studies",
    ]
    assert len(table["examples"][0]) == 14
    assert "\n... " not in integrity.report(table)
    assert cli.main(["check", str(folder)]) == 1


def test_more_than_mura_holds_is_no_part_of_it(folder):
    fewer = HELD.copy()
    fewer.loc[("train", "WRIST"), ["normal images", "patients"]] = [1, 1]
    table = check(folder, expected=fewer)
    assert table["problem"].tolist() == ["counts differ from MURA's"]
    assert table["examples"][0] == ["train WRIST: 2 normal images instead of 1, 2 patients instead of 1"]


def test_one_side_without_files(folder):
    shutil.rmtree(folder / "valid")
    assert found(folder) == {"images absent": 3}
    for name in ("valid_image_paths", "valid_labeled_studies"):
        (folder / f"{name}.csv").unlink()
    assert found(folder) == {"CSV file unusable": 2}


def test_without_any_csv_file_the_images_are_opened(folder):
    (folder / TRAIN_IMAGE).write_bytes(b"")
    for file in folder.glob("*.csv"):
        file.unlink()
    assert found(folder) == {"CSV file unusable": 4, "empty file": 1}


def test_names_that_would_upset_a_terminal(folder):
    (folder / "train/XR_HAND/bell\a\x1b[31m.png").write_bytes(b"")
    (folder / os.fsdecode(b"train/XR_HAND/latin\xe9.txt")).touch()
    table = check(folder).set_index("problem")
    assert table.loc["file that no CSV file names", "examples"] == [
        "train/XR_HAND/bell??[31m.png",
        "train/XR_HAND/latin?.txt",
    ]
    integrity.report(check(folder)).encode("utf-8")


def test_a_link_that_leads_round_in_a_circle_ends(folder):
    (folder / "train/XR_HAND/again").symlink_to(folder, target_is_directory=True)
    assert list(found(folder)) == ["file that no CSV file names"]


# --- Demo data ------------------------------------------------------------------------------------------


def test_demo_data_are_compared_with_their_own_manifest(tmp_path, capsys):
    root = make_demo(tmp_path / "MURA-demo")
    assert cli.main(["check", str(root)]) == 0
    text = capsys.readouterr().out
    assert "MURA-demo (demo data: synthetic radiographs)" in text and "its manifest.csv" in text
    assert check(root).attrs["is_demo"]


def swap_pixels(root: Path) -> None:
    """Another sound film of the same size in bytes."""
    old = (root / TRAIN_IMAGE).read_bytes()
    (root / TRAIN_IMAGE).write_bytes(
        next(new for n in range(99, 999) if len(new := png(n)) == len(old) or n == 998)
    )


@pytest.mark.parametrize("damage, expected", [
    (lambda root: (root / TRAIN_IMAGE).write_bytes(png(99)), {"changed since rendered": 1}),
    (swap_pixels, {"changed since rendered": 1}),
    (lambda root: (root / TRAIN_IMAGE).write_bytes(png()[:-1]), {"truncated": 1}),
    (lambda root: (root / TRAIN_IMAGE).unlink(), {"images absent": 1}),
    (lambda root: edit(root, "manifest", lambda lines: lines[:-1]), {"manifest.csv and CSV files differ": 1}),
    (lambda root: edit(root, IMAGES, lambda lines: lines[1:]), {"manifest.csv and CSV files differ": 1}),
    (lambda root: (root / "manifest.csv").unlink(), {"file of the demo data missing": 1}),
    (lambda root: (root / "truth.csv").unlink(), {"file of the demo data missing": 1}),
    (lambda root: (root / "manifest.json").unlink(), {"file of the demo data missing": 1}),
    (lambda root: (root / "manifest.csv").write_bytes(b""), {"manifest.csv unusable": 1}),
    (lambda root: (root / "manifest.csv").write_bytes(b"\xff\xfe"), {"manifest.csv unusable": 1}),
    (lambda root: (root / "manifest.csv").write_text("path,size\na,1\n"), {"manifest.csv unusable": 1}),
    (lambda root: (root / "manifest.csv").write_text("a\n1,2\n3,4,5\n"), {"manifest.csv unusable": 1}),
])  # fmt: skip
def test_demo_data_that_differ_from_their_manifest(tmp_path, damage, expected):
    root = make_demo(tmp_path / "MURA-demo")
    damage(root)
    table = check(root)
    assert dict(zip(table["problem"], table["count"], strict=True)) == expected
    assert "mura-course demo" in table["remedy"][0]


def test_a_film_as_rendered_is_sound_however_small(tmp_path):
    write_data(root := tmp_path / "MURA-demo")
    (root / TRAIN_IMAGE).write_bytes(png(0, (20, 48)))
    assert found(root) == {"unusual size": 1}
    content = {path: path.read_bytes() for path in root.rglob("*.png")}
    shutil.rmtree(root)
    make_demo(root)
    manifest = pd.read_csv(root / "manifest.csv").set_index("path")
    for path, film in content.items():
        path.write_bytes(film)
        manifest.loc[path.relative_to(root).as_posix()] = (len(film), hashlib.sha256(film).hexdigest())
    manifest.to_csv(root / "manifest.csv")
    assert found(root) == {}


# --- Killed, and again ----------------------------------------------------------------------------------


def opened(table: pd.DataFrame) -> tuple[int, int]:
    return table.attrs["opened"], table.attrs["remembered"]


def test_only_what_changed_is_opened_again(folder):
    assert opened(check(folder)) == (13, 0)
    assert opened(check(folder)) == (0, 13)
    (folder / TRAIN_IMAGE).write_bytes(png(77))
    os.utime(folder / TEST_IMAGE, ns=(1, 1))
    table = check(folder)
    assert opened(table) == (2, 11) and table.empty
    assert opened(check(folder, again=True)) == (13, 0)
    assert opened(check(folder)) == (0, 13)


def test_a_verdict_is_remembered_with_its_problem(folder):
    (folder / TRAIN_IMAGE).write_bytes(palette_png())
    first, second = check(folder), check(folder)
    assert opened(second) == (0, 13)
    pd.testing.assert_frame_equal(first, second)
    assert second["problem"].tolist() == ["unusual mode"]


def test_a_damaged_file_that_was_mended_with_its_old_size_and_time_is_noticed(folder):
    file = folder / TRAIN_IMAGE
    sound, times = file.read_bytes(), (1_500_000_000, 1_500_000_000)
    file.write_bytes(sound[:50] + bytes([sound[50] ^ 1]) + sound[51:])
    os.utime(file, times)
    assert found(folder) == {"damaged": 1}
    file.write_bytes(sound)
    os.utime(file, times)
    assert found(folder) == {}


def test_a_damaged_record_costs_no_more_than_its_lines(folder):
    check(folder)
    record = max((data.cache_dir() / "integrity").glob("*.jsonl"), key=os.path.getmtime)
    lines = record.read_text().splitlines()
    record.write_text("\n".join(["[1, 2]", "nonsense", "\0" * 9, "{}", "3", *lines])[:-7])
    assert opened(check(folder)) == (1, 12)
    assert opened(check(folder)) == (0, 13)


def test_a_record_that_cannot_be_written_names_folder_and_variable(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    (data.cache_dir() / "integrity").touch()
    with pytest.raises(DataNotFoundError, match=r"integrity.* cannot be written \(.*MURA_CACHE"):
        check(folder)


COUNTING = """
import os, sys, time
sys.path.insert(0, {tests!r})
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".png"):
        os.write(log, (str(arguments[0]) + "\\n").encode())
from mura_course import image_files, integrity
judge = image_files.judge
image_files.judge = lambda content: time.sleep({delay}) or judge(content)
sys.addaudithook(hook)
table = integrity.check({root!r}, workers=2, progress=False, expected=None)
print(len(table), table.attrs["opened"], table.attrs["remembered"])
"""


def run_counting(root: Path, log: Path, delay: float) -> subprocess.Popen:
    code = COUNTING.format(tests=str(Path(__file__).parent), log=str(log), root=str(root), delay=delay)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen, ready, seconds: float = 30) -> None:
    """SIGKILL the process as soon as `ready()`; fail where it ends or takes too long before."""
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_check_goes_on_and_opens_no_file_twice(tmp_path):
    root = write_data(tmp_path / "MURA-v1.1", studies=[("train", "HAND", 11, 1, True, 150), *STUDIES[5:]])
    images = {str(file) for file in root.rglob("*.png")}
    logs = [tmp_path / "first", tmp_path / "second"]
    first = run_counting(root, logs[0], delay=0.01)
    kill_when(first, lambda: logs[0].exists() and logs[0].read_text().count("\n") >= 60)
    second = run_counting(root, logs[1], delay=0)
    problems, opened_now, remembered = map(int, second.communicate()[0].split())
    before, after = (log.read_text().split() for log in logs)
    assert len(before) < len(images) and set(before) | set(after) == images
    assert len(before) == len(set(before)) and len(after) == len(set(after)) == opened_now
    # Only the two files that the two threads had open when they were killed.
    assert len(set(before) & set(after)) <= 2
    assert problems == 0 and opened_now + remembered == len(images)


# --- The archive ----------------------------------------------------------------------------------------


def make_zip(file: Path, root: Path, prefix: str = "MURA-v1.1/", extra: dict | None = None, method=8) -> Path:
    """A zip file of the data below `root`, and of `extra` entries: name (or ZipInfo) -> content."""
    with zipfile.ZipFile(file, "w", method) as packed:
        for inner in sorted(root.rglob("*")):
            packed.write(inner, prefix + inner.relative_to(root).as_posix())
        for name, content in (extra or {}).items():
            packed.writestr(name, content)
    return file


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


def unzip(file: Path, out: Path | None = None) -> Path:
    return archive.extract(file, out, progress=False)


@pytest.mark.parametrize("prefix", ["", "MURA-v1.1/", "MURA-v1.1/MURA-v1.1/", "./a/b/c/d/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_unpacked_whole_wherever_the_data_lie_in_it(pristine, tmp_path, prefix, method):
    shadows = {
        f"__MACOSX/{prefix}._train": b"x",
        f"{prefix}train/XR_HAND/._a.png": b"x",
        f"{prefix}.DS_Store": b"",
    }
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine, prefix, shadows, method)
    root = unzip(file)
    assert root == tmp_path / "MURA-v1.1" and tree(root) == tree(pristine)
    assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1", "MURA-v1.1.zip"]
    other = unzip(file, tmp_path / "new" / "folder")
    assert other == tmp_path / "new/folder/MURA-v1.1" and found(other) == {}


def test_the_command_unpacks_and_checks(pristine, tmp_path, capsys, monkeypatch):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine)
    monkeypatch.setattr(
        integrity.check, "__kwdefaults__", integrity.check.__kwdefaults__ | {"expected": HELD}
    )
    assert cli.main(["check", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "All is well." in capsys.readouterr().out
    assert cli.main(["check", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert found(tmp_path / "out") == {}


def test_what_lies_beside_the_data_is_kept_and_half_a_data_set_stays_one(pristine, tmp_path):
    root = unzip(make_zip(tmp_path / "a.zip", pristine, "MURA-v1.1/", {"README.txt": "read"}))
    assert root == tmp_path / "a/MURA-v1.1" and (tmp_path / "a/README.txt").read_text() == "read"
    with zipfile.ZipFile(tmp_path / "half.zip", "w") as packed:
        packed.write(pristine / TRAIN_IMAGE, f"MURA-v1.1/{TRAIN_IMAGE}")
    root = unzip(tmp_path / "half.zip")
    assert (root / TRAIN_IMAGE).is_file()
    assert list(found(root)) == ["CSV file unusable"]


def entry(name: str, kind: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return info


@pytest.mark.parametrize("name, kind, message", [
    ("../evil.png", 0, "leads out"),
    ("MURA-v1.1/../../evil.png", 0, "leads out"),
    ("MURA-v1.1/train/../../../evil.png", 0, "leads out"),
    ("..", 0, "leads out"),
    ("/evil.png", 0, "leads out"),
    ("//evil.png", 0, "leads out"),
    ("..\\evil.png", 0, "leads out"),
    ("\\evil.png", 0, "leads out"),
    ("C:\\evil.png", 0, "leads out"),
    ("C:evil.png", 0, "leads out"),
    ("MURA-v1.1/train/a.png:stream", 0, "leads out"),
    ("MURA-v1.1/\x1b[31mevil.png", 0, "leads out"),
    ("../folder/", 0, "leads out"),
    ("MURA-v1.1/train/link", stat.S_IFLNK, "is a link"),
    ("MURA-v1.1/train/device", stat.S_IFCHR, "is a link or a device"),
    ("MURA-v1.1/train/pipe", stat.S_IFIFO, "is a link or a device"),
    (f"MURA-v1.1/{TRAIN_IMAGE}", 0, "twice"),
    (f"MURA-v1.1/{TRAIN_IMAGE.upper()}", 0, "twice"),
    (f"MURA-v1.1//./{TRAIN_IMAGE}", 0, "twice"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_leads_outside_stops_before_anything_is_written(
    pristine, tmp_path, name, kind, message
):
    (tmp_path / "a/b").mkdir(parents=True)
    file = make_zip(tmp_path / "a/b/MURA-v1.1.zip", pristine, extra={entry(name, kind): "/etc/passwd"})
    before = tree(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        unzip(file)
    assert str(file) in str(error.value) and "Download it again" in str(error.value)
    assert "\x1b" not in str(error.value)
    assert tree(tmp_path) == before


def test_what_is_no_zip_file_or_cut_short(pristine, tmp_path):
    whole = make_zip(tmp_path / "whole.zip", pristine).read_bytes()
    file = tmp_path / "MURA-v1.1.zip"
    for length in (0, 1, 22, 1000, len(whole) // 2, len(whole) - 23, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"MURA-v1.1.zip \({length:,} bytes\) is no zip file, or lacks"):
            unzip(file)
    file.write_bytes(io.BytesIO(b"<html>Sign in</html>").read())
    with pytest.raises(DataError, match="is no zip file"):
        unzip(file)
    with pytest.raises(DataNotFoundError, match="nowhere.zip does not exist"):
        unzip(tmp_path / "nowhere.zip")
    assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1.zip", "whole.zip"]


def test_an_archive_made_on_windows(pristine, tmp_path):
    with zipfile.ZipFile(tmp_path / "MURA-v1.1.zip", "w") as packed:
        packed.writestr("MURA-v1.1\\train\\", "")
        packed.writestr(".", "")
        for file in pristine.rglob("*.*"):
            packed.write(file, str(Path("MURA-v1.1", file.relative_to(pristine))).replace("/", "\\"))
    assert tree(unzip(tmp_path / "MURA-v1.1.zip")) == tree(pristine)


def test_an_archive_of_one_csv_file(tmp_path):
    for prefix in ("", "MURA-v1.1/"):
        with zipfile.ZipFile(tmp_path / "MURA-v1.1.zip", "w") as packed:
            packed.writestr(f"{prefix}train_image_paths.csv", "Img_Path\n")
        root = unzip(tmp_path / "MURA-v1.1.zip")
        assert os.listdir(root) == ["train_image_paths.csv"]
        assert found(root) == {"CSV file unusable": 4}
        shutil.rmtree(root)


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as packed:
        packed.writestr("train/cats/1.png", "x")
    with pytest.raises(DataError, match="holds no data in MURA's layout"):
        unzip(tmp_path / "cats.zip")
    assert os.listdir(tmp_path) == ["cats.zip"]


def test_encrypted_and_oddly_packed_archives(pristine, tmp_path):
    whole = make_zip(tmp_path / "MURA-v1.1.zip", pristine).read_bytes()
    at = whole.rindex(b"PK\x01\x02") + 8  # the flags of the last entry of the directory
    (tmp_path / "MURA-v1.1.zip").write_bytes(whole[:at] + bytes([whole[at] | 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match="is encrypted; nothing was unpacked"):
        unzip(tmp_path / "MURA-v1.1.zip")
    make_zip(tmp_path / "b.zip", pristine, method=zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match="packed in a way other than MURA's"):
        unzip(tmp_path / "b.zip")
    assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1.zip", "b.zip"]


def test_damaged_files_are_named_and_nothing_is_left(pristine, tmp_path):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine, method=zipfile.ZIP_STORED)
    content = file.read_bytes()
    for image in (TRAIN_IMAGE, TEST_IMAGE):
        film = (pristine / image).read_bytes()
        content = content.replace(film, film[:100] + bytes([film[100] ^ 1]) + film[101:])
    file.write_bytes(content)
    with pytest.raises(DataError, match="2 of 17 files are damaged. Download it again") as error:
        unzip(file)
    assert f"\n  {TRAIN_IMAGE}\n  {TEST_IMAGE}" in str(error.value)
    assert os.listdir(tmp_path) == ["MURA-v1.1.zip"]


def test_more_than_there_is_room_for_is_refused(pristine, tmp_path, monkeypatch):
    bomb = make_zip(tmp_path / "MURA-v1.1.zip", pristine, extra={"MURA-v1.1/bomb": bytes(30_000_000)})
    assert bomb.stat().st_size < 200_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda place: usage._replace(free=29_000_000))
    with pytest.raises(DataError, match=r"unpacks to 0.0 GB, and 0.0 GB are free in .*--out FOLDER"):
        unzip(bomb)
    assert os.listdir(tmp_path) == ["MURA-v1.1.zip"]


def test_an_entry_that_declares_less_than_it_holds_writes_no_more(pristine, tmp_path, monkeypatch):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine, extra={"MURA-v1.1/bomb": bytes(30_000_000)})
    content = file.read_bytes()
    assert content.count(struct.pack("<I", 30_000_000)) == 2  # in the entry's own header and in the directory
    file.write_bytes(content.replace(struct.pack("<I", 30_000_000), struct.pack("<I", 10)))
    written, copy = [], shutil.copyfileobj

    def measured(source, sink, length):
        try:
            copy(source, sink, length)
        finally:
            written.append(sink.tell())

    monkeypatch.setattr(archive.shutil, "copyfileobj", measured)
    with pytest.raises(DataError, match="1 of 18 files are damaged(?s:.*)bomb"):
        unzip(file)
    assert len(written) == 18 and written[-1] <= 10 and os.listdir(tmp_path) == ["MURA-v1.1.zip"]


@pytest.mark.parametrize("make", [
    lambda place: place.mkdir(),
    lambda place: (place / "train").mkdir(parents=True),
    lambda place: place.write_text("mine"),
    lambda place: place.symlink_to("nowhere"),
])  # fmt: skip
def test_an_existing_target_is_not_overwritten(pristine, tmp_path, make):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine)
    make(tmp_path / "MURA-v1.1")
    before = tree(tmp_path)
    with pytest.raises(DataError, match="MURA-v1.1 exists already.*--out FOLDER"):
        unzip(file)
    assert tree(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["MURA-v1.1", "MURA-v1.1.zip"]


def test_a_full_or_forbidden_disk_is_named_and_left_clean(pristine, tmp_path, monkeypatch):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine)
    (tmp_path / "file").touch()
    with pytest.raises(DataNotFoundError, match=r"cannot be unpacked into .*file.out .*--out FOLDER"):
        unzip(file, tmp_path / "file" / "out")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.shutil, "copyfileobj", full)
    with pytest.raises(DataNotFoundError, match="No space left on device.*Make room"):
        unzip(file)
    assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1.zip", "file"]


def test_one_process_at_a_time(pristine, tmp_path):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine)
    unzip(file, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    lock = max(data.cache_dir().glob("unpacking-*.lock"), key=os.path.getmtime)
    with FileLock(lock), pytest.raises(DataError, match="Another process unpacks into"):
        unzip(file, tmp_path / "out")
    assert found(unzip(file, tmp_path / "out")) == {}


SLOWLY = """
import shutil, sys, time
from mura_course import archive
copy = shutil.copyfileobj
archive.shutil.copyfileobj = lambda *arguments: time.sleep(0.05) or copy(*arguments)
archive.extract(sys.argv[1], progress=False)
"""


def test_a_killed_extraction_is_not_taken_for_whole_and_starts_over(pristine, tmp_path):
    file = make_zip(tmp_path / "MURA-v1.1.zip", pristine)
    partial = tmp_path / "MURA-v1.1.partial"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(file)])
    kill_when(process, lambda: len([*partial.rglob("*.png")]) >= 4)
    assert not (tmp_path / "MURA-v1.1").exists() and 4 <= len([*partial.rglob("*.png")]) < 13
    with pytest.raises(DataNotFoundError):
        data.find_root(tmp_path)
    (partial / "of another archive.png").touch()
    assert tree(unzip(file)) == tree(pristine)
    assert sorted(os.listdir(tmp_path)) == ["MURA-v1.1", "MURA-v1.1.zip"]


@pytest.fixture(scope="module")
def packed(pristine, tmp_path_factory) -> bytes:
    return make_zip(tmp_path_factory.mktemp("packed") / "a.zip", pristine).read_bytes()


@settings(max_examples=25, deadline=None)
@example(at=0.5543028594765476, byte=7, directory=True)  # hides the entries that follow
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), directory=st.booleans())
def test_any_damage_to_an_archive_is_an_error_or_harmless(
    pristine, packed, tmp_path_factory, at, byte, directory
):
    start = packed.index(b"PK\x01\x02") if directory else 0
    place = start + int(at * (len(packed) - start))
    place_of_work = tmp_path_factory.mktemp("fuzz")
    file = place_of_work / "MURA-v1.1.zip"
    file.write_bytes(packed[:place] + bytes([byte]) + packed[place + 1 :])
    try:
        root = unzip(file)
    except MuraError:
        assert os.listdir(place_of_work) == ["MURA-v1.1.zip"]
    else:
        assert tree(root) == tree(pristine)
    shutil.rmtree(place_of_work)
