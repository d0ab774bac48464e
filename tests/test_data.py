"""Finding the data and reading their index: every variation in circulation, every error."""

import hashlib
import io
import os
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import STUDIES, write_mura
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mura_course import data
from mura_course.errors import DataError, DataNotFoundError, MuraError

MOUNTS = data.MOUNTS  # the fixture below empties it

# Normal and abnormal train images by body part, as published.
MURA_TRAIN = {
    "ELBOW": (2925, 2006),
    "FINGER": (3138, 1968),
    "FOREARM": (1164, 661),
    "HAND": (4059, 1484),
    "HUMERUS": (673, 599),
    "SHOULDER": (4211, 4168),
    "WRIST": (5765, 3987),
}
FIGURE_4 = """\
	type	path	positives	negatives
0	XR_ELBOW	4931	2006	2925
1	XR_FINGER	5106	1968	3138
2	XR_FOREARM	1825	661	1164
3	XR_HAND	5543	1484	4059
4	XR_HUMERUS	1272	599	673
5	XR_SHOULDER	8379	4168	4211
6	XR_WRIST	9752	3987	5765
"""


@pytest.fixture(autouse=True)
def _no_data_elsewhere(monkeypatch):
    monkeypatch.delenv("MURA_DATA", raising=False)
    monkeypatch.setattr(data, "MOUNTS", ())


def edit(root: Path, name: str, change) -> Path:
    """Replace the lines of one CSV file by what `change` makes of them."""
    file = root / f"{name}.csv"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    return file


def expected_rows() -> list[tuple]:
    """What the index of `STUDIES` holds, written down independently of the parser."""
    sign = {True: "positive", False: "negative"}
    return [
        (
            f"{folder}/XR_{part}/patient000{patient}/study{study}_{sign[positive]}/image{view}.png",
            "test" if folder == "valid" else "train",
            part,
            patient,
            f"{part}/patient000{patient}/study{study}",
            view,
            int(positive),
        )
        for folder, part, patient, study, positive, views in STUDIES
        for view in range(1, views + 1)
    ]


# --- What the index holds ---------------------------------------------------------------------------------


def test_the_index_of_a_small_data_set(mura_folder):
    index = data.load_index(mura_folder())
    assert tuple(index.columns) == data.COLUMNS
    assert list(index.itertuples(index=False, name=None)) == expected_rows()
    assert isinstance(index.index, pd.RangeIndex)
    assert list(index["body_part"].cat.categories) == list(data.BODY_PARTS)
    assert {str(index[name].dtype) for name in ("patient", "view", "label")} == {"int64"}
    assert all(isinstance(value, str) for name in ("path", "split", "study") for value in index[name])


def test_attrs_tell_mura_from_the_demo_data(mura_folder):
    mura, demo = mura_folder("renamed"), mura_folder("MURA-demo", truth=True)
    assert data.load_index(mura).attrs == {"root": str(mura), "name": "MURA-v1.1", "is_demo": False}
    assert data.load_index(demo).attrs == {"root": str(demo), "name": "MURA-demo", "is_demo": True}


@pytest.mark.parametrize("options", [
    {"header": True},
    {"newline": "\r\n"},
    {"newline": "\r\n", "header": True, "bom": True},
    {"bom": True},
    {"macos": True},
    {"prefix": ""},
    {"prefix": "some/other/train/folder/"},
    {"prefix": "MURA-v1.1\\"},
])  # fmt: skip
def test_copies_in_circulation_give_the_same_index(mura_folder, options):
    index = data.load_index(mura_folder(**options))
    assert list(index.itertuples(index=False, name=None)) == expected_rows()


def test_blank_lines_and_quotes_do_no_harm(mura_folder):
    root = mura_folder()
    edit(root, "train_image_paths", lambda lines: ["", *(f'"{line}" ' for line in lines), "", ""])
    edit(root, "train_labeled_studies", lambda lines: [line.replace("/,", ",") + ".0" for line in lines])
    assert list(data.load_index(root).itertuples(index=False, name=None)) == expected_rows()


def test_path_is_spelt_as_on_disk(mura_folder):
    index = data.load_index(mura_folder(extension=".PNG"))
    assert index["path"].str.endswith(".PNG").all()
    assert all(path.is_file() for path in data.image_paths(index))


def test_where_both_spellings_exist_the_csv_file_decides(mura_folder):
    root = mura_folder()
    first = root / "train/XR_WRIST/patient00012/study1_positive"
    (first / "image1.PNG").touch()
    assert f"{first.relative_to(root).as_posix()}/image1.png" in set(data.load_index(root)["path"])


def test_images_beyond_the_csv_files_are_left_out(mura_folder):
    root = mura_folder()
    (root / "train/XR_WRIST/patient00012/study1_positive/image9.png").touch()
    assert len(data.load_index(root)) == len(expected_rows())


def test_image_paths_exist(mura_folder):
    index = data.load_index(mura_folder())
    paths = data.image_paths(index)
    assert len(paths) == len(index) and all(path.is_file() for path in paths)
    assert data.image_path(index, index["path"][3]) == paths[3]


# --- Where the data are -----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "MURA-v1.1", "MURA-v1.1/MURA-v1.1"])
def test_a_nested_root_is_found(tmp_path, below):
    root = write_mura(tmp_path / "outer" / below)
    (tmp_path / "outer" / "__MACOSX").mkdir()
    assert data.find_root(tmp_path / "outer") == root


def test_the_argument_goes_before_the_variable_before_a_mount_before_the_demo(mura_folder, monkeypatch):
    argument, variable, mount, demo = (mura_folder(name) for name in ("a", "v", "m/MURA-v1.1", "d"))
    asked = []
    renderer = types.ModuleType("mura_course.radiographs")
    renderer.ensure_demo = lambda studies: asked.append(studies) or demo
    monkeypatch.setitem(sys.modules, "mura_course.radiographs", renderer)
    monkeypatch.setattr("mura_course.radiographs", renderer, raising=False)
    monkeypatch.setenv("MURA_DATA", str(variable))
    monkeypatch.setenv("MURA_PROFILE", "smoke")
    monkeypatch.setattr(data, "MOUNTS", (str(mount.parent.parent / "m*"),))
    assert data.find_root(argument) == argument
    assert data.find_root() == variable
    monkeypatch.setenv("MURA_DATA", " ")
    assert data.find_root() == mount
    assert asked == []
    monkeypatch.setattr(data, "MOUNTS", ("/nowhere/*",))
    assert data.find_root() == demo
    assert asked == [120]


@pytest.mark.parametrize("place", [
    "kaggle/input/mura-v11/MURA-v1.1",
    "kaggle/input/murav11/mura",
    "kaggle/input/mura-final/finaldata",
    "kaggle/input/datasets/owner/slug",
    "kaggle/input/datasets/owner/slug/MURA-v1.1/MURA-v1.1",
    "content/MURA-v1.1",
    "content/drive/MyDrive/courses/MURA-v1.1",
])  # fmt: skip
def test_mounts_of_kaggle_and_colab_are_found(tmp_path, monkeypatch, place):
    monkeypatch.setattr(data, "MOUNTS", tuple(f"{tmp_path}{pattern}" for pattern in MOUNTS))
    (tmp_path / "kaggle/input/another-competition/train/cats").mkdir(parents=True)
    root = write_mura(tmp_path / place)
    assert data.find_root() == root


def test_one_line_says_which_data(mura_folder, capsys, monkeypatch):
    root = mura_folder()
    data.load_index(root)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "MURA-v1.1" in line and "13 images in 8 studies" in line and str(root) in line
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("USERPROFILE", str(root.parent))
    assert data.short_path(root) == str(Path("~", "MURA-v1.1"))
    data.load_index(root, quiet=True)
    assert capsys.readouterr().out == ""


def test_a_missing_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.*does not exist"):
        data.load_index(tmp_path / "nowhere")
    monkeypatch.setenv("MURA_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataNotFoundError, match="gone.*MURA_DATA"):
        data.load_index()


def test_an_archive_instead_of_a_folder(tmp_path):
    (tmp_path / "MURA-v1.1.zip").write_bytes(b"PK")
    with pytest.raises(DataNotFoundError, match="MURA-v1.1.zip.*is a file. Unpack it"):
        data.load_index(tmp_path / "MURA-v1.1.zip")


def test_a_folder_without_data(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(DataNotFoundError, match="train_image_paths.csv"):
        data.load_index(tmp_path)


def test_a_folder_with_two_data_sets(tmp_path):
    write_mura(tmp_path / "one")
    write_mura(tmp_path / "two")
    with pytest.raises(DataError, match=r"2 data sets(?s:.*)one(?s:.*)two"):
        data.load_index(tmp_path)


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "new" / "cache"))
    assert data.cache_dir() == tmp_path / "new" / "cache"
    assert list(data.cache_dir().iterdir()) == []
    monkeypatch.delenv("MURA_CACHE")
    monkeypatch.setattr(data, "user_cache_dir", lambda app: str(tmp_path / app))
    assert data.cache_dir() == tmp_path / "mura-course"


def test_a_cache_folder_that_cannot_be_made_names_folder_and_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataNotFoundError, match=r"file.cache .*MURA_CACHE"):
        data.cache_dir()


def test_a_cache_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("MURA_CACHE", str(tmp_path))
    monkeypatch.setattr(data.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        DataNotFoundError, match=rf"{re.escape(str(tmp_path))}.*Permission denied.*MURA_CACHE"
    ):
        data.cache_dir()


# --- One clear error each ---------------------------------------------------------------------------------


def swap(old: str, new: str, count: int = 1):
    """A change of lines: replace `old` by `new` in the first `count` lines that hold it."""

    def change(lines):
        hit = [i for i, line in enumerate(lines) if old in line][:count]
        assert hit, f"no line holds {old!r}"
        return [line.replace(old, new) if i in hit else line for i, line in enumerate(lines)]

    return change


@pytest.mark.parametrize("file, change, message", [
    ("train_image_paths", lambda lines: [], "is empty"),
    ("train_image_paths", lambda lines: ["Img_Path"], "is empty"),
    ("valid_labeled_studies", lambda lines: [], "is empty"),
    ("train_image_paths", swap("image2.png", "image2.gif"), "malformed.*line 2: .*image2.gif"),
    ("train_image_paths", swap("image2.png", ""), "malformed.*line 2: "),
    ("train_image_paths", swap("patient00012", "patientX"), "malformed.*patientX"),
    ("train_image_paths", swap("MURA-v1.1/train", "MURA-v1.1/valid"), "malformed.*line 1: .*valid/"),
    ("train_image_paths", lambda lines: [*lines, "the end"], "malformed.*line 11: the end"),
    ("train_labeled_studies", swap(",1", ",2"), "malformed.*line 1: .*,2"),
    ("train_labeled_studies", swap(",1", ","), "malformed.*line 1: "),
    ("train_labeled_studies", swap(",1", ",0"), "contradicts its folder name.*line 1: .*study1_positive/,0"),
    ("train_labeled_studies", lambda lines: lines[1:], "no label in train_labeled_studies.csv.*line 1: "),
    ("train_labeled_studies", lambda lines: [*lines, lines[2]], "listed more than once.*line 3.*line 7"),
    ("train_labeled_studies", lambda lines: [*lines, lines[0].replace("positive/,1", "negative/,0")],
     "a study is listed more than once"),
    ("train_image_paths", lambda lines: [*lines, lines[0]], "listed more than once.*line 1.*line 11"),
    ("train_image_paths", swap("XR_HAND", "XR_FOOT"), "unknown body part.*XR_ELBOW.*XR_WRIST.*XR_FOOT"),
    ("train_labeled_studies", swap("XR_HAND", "XR_Hand"), "unknown body part.*XR_Hand"),
    ("train_image_paths", swap("MURA-v1.1/", "MURA-v1.1/../../"), r"outside the data folder.*\.\./"),
    ("train_image_paths", swap("/patient00011/", "/patient00011/../patient1/"), "outside the data folder"),
    ("train_image_paths", swap("MURA-v1.1/", "/data/MURA-v1.1/"), "outside the data folder"),
    ("train_image_paths", swap("MURA-v1.1/", "C:\\MURA-v1.1\\"), "outside the data folder"),
    ("train_labeled_studies", swap("MURA-v1.1/", "~/"), "outside the data folder"),
])  # fmt: skip
def test_a_wrong_csv_file(mura_folder, file, change, message):
    file = edit(mura_folder(), file, change)
    with pytest.raises(DataError) as error:
        data.load_index(file.parent)
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert str(file.parent) in str(error.value) and file.name in str(error.value)
    assert error.value.__context__ is None


@pytest.mark.parametrize(
    "name", [f"{s}_{k}.csv" for s in ("train", "valid") for k in ("image_paths", "labeled_studies")]
)
def test_a_missing_csv_file(mura_folder, name):
    root = mura_folder()
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*unpack"):
        data.load_index(root)


def test_absent_images_are_counted_and_the_first_five_listed(mura_folder):
    root = mura_folder(studies=[*STUDIES, ("train", "FINGER", 15, 1, True, 8)])
    for view in range(2, 9):
        (root / f"train/XR_FINGER/patient00015/study1_positive/image{view}.png").unlink()
    with pytest.raises(FileNotFoundError, match="7 of 18 lines: images absent") as error:
        data.load_index(root)
    text = str(error.value)
    assert text.count("study1_positive/image") == 5 and "... and 2 more" in text and "Unpack" in text


def test_a_whole_study_absent(mura_folder):
    root = mura_folder()
    folder = root / "valid/XR_HAND/patient00022/study1_negative"
    (folder / "image1.png").unlink()
    folder.rmdir()
    with pytest.raises(DataNotFoundError, match=r"valid_image_paths.csv: 1 of 3 lines(?s:.*)line 3: "):
        data.load_index(root)


def test_a_macos_shadow_does_not_stand_in_for_its_image(mura_folder):
    root = mura_folder(macos=True)
    (root / "train/XR_WRIST/patient00012/study1_positive/image1.png").unlink()
    with pytest.raises(DataNotFoundError, match="patient00012"):
        data.load_index(root)


def test_two_lines_for_one_file_on_disk(mura_folder):
    root = mura_folder(extension=".PNG")
    edit(root, "train_image_paths", lambda lines: [*lines, lines[0].replace(".png", ".PNG")])
    with pytest.raises(DataError, match="an image is listed more than once"):
        data.load_index(root)


def test_a_file_that_is_not_text(mura_folder):
    root = mura_folder()
    (root / "train_image_paths.csv").write_bytes("MURA-v1.1/train".encode("utf-16"))
    with pytest.raises(DataError, match="train_image_paths.csv is not UTF-8 text"):
        data.load_index(root)


def test_one_study_in_train_and_valid(mura_folder):
    root = mura_folder(studies=[*STUDIES, ("valid", "WRIST", 12, 1, True, 1)])
    with pytest.raises(DataError, match="both train and valid(?s:.*)WRIST/patient00012/study1"):
        data.load_index(root)


def test_one_patient_in_train_and_valid_is_a_warning(mura_folder):
    root = mura_folder(studies=[*STUDIES, ("valid", "FINGER", 12, 1, True, 1)])
    with pytest.warns(UserWarning, match="1 patients are in both train and valid, for example 12"):
        data.load_index(root)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60), number=st.integers(0, 3))
def test_any_line_gives_rows_or_one_of_our_errors(tmp_path_factory, text, number):
    name = ("train_image_paths", "train_labeled_studies", "valid_image_paths", "valid_labeled_studies")[
        number
    ]
    root = write_mura(tmp_path_factory.mktemp("any"))
    with open(root / f"{name}.csv", "a", encoding="utf-8") as file:
        file.write(text)
    try:
        index = data.load_index(root, quiet=True)
    except MuraError as error:
        assert f"{name}.csv" in str(error)
    else:
        assert len(index) == len(expected_rows())  # the line held nothing but white space, or a shadow


# --- What the index says ----------------------------------------------------------------------------------


def mura_train_index() -> pd.DataFrame:
    """36,808 rows in memory with MURA's counts by part and label, three views a study."""
    frames = []
    for part, counts in MURA_TRAIN.items():
        for label, count in enumerate(counts):
            number = np.arange(count) // 3
            frames.append(pd.DataFrame({
                "body_part": part,
                "patient": number,
                "view": np.arange(count) % 3 + 1,
                "label": label,
                "split": "train",
                "path": [f"train/XR_{part}/{label}/{n}.png" for n in range(count)],
            }))  # fmt: skip
    index = pd.concat(frames, ignore_index=True)
    index["body_part"] = pd.Categorical(index["body_part"], categories=list(data.BODY_PARTS))
    return index


def test_the_distribution_table_is_figure_4_of_the_kl_report():
    index = mura_train_index()
    assert len(index) == 36_808
    published = pd.read_csv(io.StringIO(FIGURE_4), sep="\t", index_col=0)
    shuffled = index.sample(frac=1, random_state=0)
    for rows in (index, shuffled):
        table = data.distribution_table(rows)
        pd.testing.assert_frame_equal(table, published, check_names=False, check_dtype=False)
        assert table.to_csv(sep="\t") == FIGURE_4


def test_the_distribution_table_counts_one_split(mura_folder):
    index = data.load_index(mura_folder())
    assert data.distribution_table(index)["path"].sum() == 10
    test = data.distribution_table(index, "test")
    assert test.values.tolist() == [["XR_HAND", 1, 0, 1], ["XR_SHOULDER", 2, 2, 0]]


def test_the_fingerprint_changes_with_what_matters_and_with_nothing_else(mura_folder):
    index = data.load_index(mura_folder())
    first = data.fingerprint(index)
    assert re.fullmatch("[0-9a-f]{12}", first)
    # As `(echo MURA-v1.1; <path, split and label of each image, tab between> | sort) | sha256sum` gives it.
    lines = sorted(f"{path}\t{split}\t{label}" for path, split, *_, label in expected_rows())
    assert (
        first == hashlib.sha256("\n".join(["MURA-v1.1", *lines]).encode()).hexdigest()[:12] == "6f9f88d64e96"
    )
    moved = data.load_index(mura_folder("elsewhere", header=True, newline="\r\n"))
    assert data.fingerprint(moved) == first
    assert data.fingerprint(index.sample(frac=1, random_state=1)) == first
    small = index.astype({"label": "int8", "patient": "int32", "body_part": "object"})
    assert data.fingerprint(small) == first
    others = [index.copy() for _ in range(4)]
    others[0].loc[0, "label"] = 0
    others[1].loc[0, "path"] += "x"
    others[2].loc[0, "split"] = "dev"
    others[3].attrs = {**index.attrs, "name": "MURA-demo"}
    others.append(index.iloc[1:])
    assert len({first, *map(data.fingerprint, others)}) == 6


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_fingerprint_ignores_the_order_of_rows(seed):
    paths = [f"train/{n}.png" for n in range(30)]
    index = pd.DataFrame({"path": paths, "split": "train", "label": [n % 2 for n in range(30)]})
    index.attrs["name"] = "MURA-v1.1"
    order = random.Random(seed).sample(range(30), 30)
    assert data.fingerprint(index.iloc[order]) == data.fingerprint(index)


def test_no_column_of_truth_enters_the_index(mura_folder):
    root = mura_folder(truth=True)
    (root / "truth.csv").write_text("path,finding,severity\nx,fracture,0.5\n")
    assert tuple(data.load_index(root).columns) == data.COLUMNS
    assert os.path.isfile(root / "truth.csv")
