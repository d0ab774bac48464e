"""Finding the data and reading their index: every variation in circulation, every error."""

import os
import re
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import STUDIES, changed, make_films, make_index, write_mura

from mura_course import data
from mura_course.data import index as index_module
from mura_course.errors import DataError, DiskError, MuraError

MOUNTS = index_module.MOUNTS  # the fixture below empties it
FIRST = "train/XR_HAND/patient00011/study1_positive/image1.png"


@pytest.fixture(autouse=True)
def _no_data_elsewhere(monkeypatch):
    monkeypatch.delenv("MURA_DATA", raising=False)
    monkeypatch.setattr(index_module, "MOUNTS", ())


def edit(root: Path, name: str, change) -> Path:
    file = root / f"{name}.csv"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    return file


def rows(index: pd.DataFrame) -> list[tuple]:
    return list(index.itertuples(index=False, name=None))


EXPECTED = [  # what the index of `STUDIES` holds, written down independently of the parser
    (
        f"{folder}/XR_{part}/patient000{patient}/study{study}_{sign}/image{view}.png",
        *("test" if folder == "valid" else "train", part, patient),
        *(f"{part}/patient000{patient}/study{study}", view, int(sign == "positive")),
    )
    for folder, part, patient, study, positive, views in STUDIES
    for view, sign in enumerate(["positive" if positive else "negative"] * views, 1)
]


def test_the_index_of_a_small_data_set(mura_folder):
    root = mura_folder()
    index = data.load_index(root)
    assert data.image_paths(index) == [data.image_path(index, row[0]) for row in EXPECTED]
    assert data.image_path(index, FIRST) == root / FIRST
    assert tuple(index.columns) == index_module.COLUMNS and rows(index) == EXPECTED
    assert isinstance(index.index, pd.RangeIndex)
    assert list(index["body_part"].cat.categories) == list(data.BODY_PARTS)
    assert {str(index[name].dtype) for name in ("patient", "view", "label")} == {"int64"}
    assert all(isinstance(value, str) for name in ("path", "split", "study") for value in index[name])


@pytest.mark.parametrize("options", [
    *({option: True} for option in ("header", "bom", "macos")),
    {"newline": "\r\n", "header": True, "bom": True},
    *({"prefix": p} for p in ("", "some/other/train/folder/", "/data/MURA-v1.1/", "MURA-v1.1\\")),
])  # fmt: skip
def test_copies_in_circulation_give_the_same_index(mura_folder, options):
    assert rows(data.load_index(mura_folder(**options))) == EXPECTED


def test_blank_lines_quotes_and_files_beyond_the_csv_do_no_harm(mura_folder):
    root = mura_folder()
    (root / FIRST).with_name("image9.png").touch()
    edit(root, "train_image_paths", lambda lines: ["", *(f'"{line}" ' for line in lines), "", ""])
    edit(root, "train_labeled_studies", lambda lines: [line.replace("/,", ",") + ".0" for line in lines])
    assert rows(data.load_index(root)) == EXPECTED


@pytest.mark.parametrize("below", ["", "MURA-v1.1", "MURA-v1.1/MURA-v1.1"])
def test_a_nested_root_is_found(tmp_path, below):
    root = write_mura(tmp_path / "outer" / below)
    for other in ("__MACOSX", ".hidden", "MURA-demo.partial") if below else ():
        write_mura(tmp_path / "outer" / other)
    assert index_module.find_root(tmp_path / "outer") == root


def test_the_argument_goes_before_the_variable_before_a_mount_before_the_demo(mura_folder, monkeypatch):
    argument, variable, mount, demo = (mura_folder(name) for name in ("a", "v", "m/MURA-v1.1", "d"))
    renderer = Mock(return_value=demo)
    monkeypatch.setattr("mura_demo.ensure_demo", renderer)
    monkeypatch.setenv("MURA_DATA", str(variable))
    monkeypatch.setenv("MURA_PROFILE", "smoke")
    monkeypatch.setattr(index_module, "MOUNTS", (f"{str(mount.parent.parent)[1:]}/m*",))
    assert index_module.find_root(argument) == argument
    assert index_module.find_root() == variable
    monkeypatch.setenv("MURA_DATA", " ")
    assert index_module.find_root() == mount and not renderer.called
    monkeypatch.setattr(index_module, "MOUNTS", ("nowhere/*",))
    assert index_module.find_root() == demo
    monkeypatch.setenv("MURA_DATA", "/gone")
    with pytest.raises(FileNotFoundError, match="gone .the environment variable MURA_DATA. does not exist"):
        index_module.find_root()
    renderer.assert_called_once_with(Path(os.environ["MURA_CACHE"]), 120)


@pytest.mark.parametrize("place", [
    "kaggle/input/mura-v11/MURA-v1.1",
    "kaggle/input/mura-final/finaldata",
    "kaggle/input/datasets/owner/slug/MURA-v1.1/MURA-v1.1",
    "content/MURA-v1.1",
    "content/drive/MyDrive/courses/MURA-v1.1",
])  # fmt: skip
def test_mounts_of_kaggle_and_colab_are_found(tmp_path, monkeypatch, place):
    monkeypatch.setattr(index_module, "MOUNTS", tuple(f"{tmp_path}/{p}"[1:] for p in MOUNTS))
    (tmp_path / "kaggle/input/another-competition/train/cats").mkdir(parents=True)
    root = write_mura(tmp_path / place)
    assert index_module.find_root() == root


PATHS, LABELS = "train_image_paths", "train_labeled_studies"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60), number=st.integers(0, 3))
def test_any_line_gives_rows_or_one_of_our_errors(tmp_path_factory, text, number):
    name = (PATHS, LABELS, "valid_image_paths", "valid_labeled_studies")[number]
    root = write_mura(tmp_path_factory.mktemp("any"))
    with open(root / f"{name}.csv", "a", encoding="utf-8") as file:
        file.write(text)
    try:
        index = data.load_index(root, quiet=True)
    except MuraError as error:
        assert f"{name}.csv" in str(error)
    else:
        assert len(index) == len(EXPECTED)  # the line held nothing but white space, or a shadow


def test_fault_5_demo_data_without_truth_are_not_taken_for_mura(mura_folder):
    root = mura_folder("MURA-demo", truth=True)
    (root / "truth.csv").unlink()
    with pytest.raises(DataError, match=r"truth.csv is missing.*mura-course demo.*remove manifest.json"):
        data.load_index(root)
    with pytest.raises(DataError, match="truth.csv is missing"):  # known by their CSV files alone
        data.load_index(mura_folder("renamed", prefix="MURA-demo/"))


@pytest.mark.parametrize("file, content", [
    *[("manifest.json", content) for content in ("", "{", "[]", '{"recipe": 2}', "\0")],
    *[("truth.csv", content) for content in ("", "path,finding\n", "finding\nx\n", "\0")],
])  # fmt: skip
def test_damaged_files_of_demo_data_are_named_with_the_remedy(mura_folder, file, content):
    root = mura_folder("MURA-demo", truth=True)
    (root / file).write_text(content)
    with pytest.raises((DataError, DiskError), match=rf"{file} .*Render the demo data again"):
        data.load_truth(data.load_index(root))


def test_the_truth_of_demo_films_is_read_apart_from_the_index(mura_folder):
    root = mura_folder("MURA-demo", truth=True)
    paths = [row[0] for row in EXPECTED]
    lines = [f"{path},{'fracture,12' if n else 'NA,'}" for n, path in enumerate(reversed(paths))]
    lines = ["path,finding,box_x0", "beyond.png,none,", *lines, "beyond.png,none,"]
    (root / "truth.csv").write_text("\n".join(lines))
    truth = data.load_truth(data.load_index(root))
    assert truth.index.tolist() == paths and truth["finding"].tolist() == ["fracture"] * 12 + ["NA"]
    assert truth["box_x0"].sum() == 12 * 12 and truth["box_x0"].isna().sum() == 1


REMOVED = {"detector": "strokes", "versions": {"opencv": "4.8"}}
PIXELS = (
    *[("manifest.json", {name: other}) for name, other in {"recipe": 99, "seed": 1, "text": False}.items()],
    *[("manifest.json", {"long_side": 64}), ("removed_text.json", REMOVED)],
    *[("removed_text.json", REMOVED | {"detector": "rapidocr"}), ("removed_text.json", {"versions": {}})],
)


def test_fault_1_films_with_other_pixels_have_another_fingerprint(mura_folder):
    root = mura_folder("MURA-demo", truth=True)
    seen = [data.fingerprint(data.load_index(root))]
    for file, entries in PIXELS:
        changed(root / file, **entries)
        seen.append(data.fingerprint(data.load_index(root)))
    assert len(set(seen)) == 1 + len(PIXELS) and seen[-1] == data.fingerprint(data.load_index(root))
    mura = mura_folder()
    before = data.fingerprint(data.load_index(mura))
    (mura / FIRST).write_bytes(b"other pixels")
    assert data.fingerprint(data.load_index(mura)) != before


@pytest.mark.parametrize("name", ["MURA-v1.1", "MURA-demo", "MURA-demo-no-text"])
def test_name_and_attrs_tell_which_data_these_are(mura_folder, capsys, name):
    demo = name != "MURA-v1.1"
    root = mura_folder("renamed", truth=demo)
    if name.endswith("no-text"):
        changed(root / "removed_text.json", **REMOVED)
    attrs, printed = data.load_index(root).attrs, capsys.readouterr().out
    assert attrs.pop("content") and attrs == {"root": str(root), "name": name, "is_demo": demo}
    kind = "synthetic" if demo else "real"
    assert printed == f"Data: {name} ({kind} radiographs), 13 images in 8 studies, in {root}\n"
    assert len(data.load_index(root, quiet=True)) == 13 and capsys.readouterr().out == ""


def test_the_fingerprint_changes_with_what_matters_and_with_nothing_else(mura_folder):
    index = data.load_index(mura_folder())
    first = data.fingerprint(index)
    assert re.fullmatch("[0-9a-f]{12}", first)
    moved = data.load_index(mura_folder("elsewhere", header=True, newline="\r\n"))
    assert data.fingerprint(moved) == first == data.fingerprint(index.sample(frac=1, random_state=1))
    small = index.astype({"label": "int8", "patient": "int32", "body_part": "object"})
    assert data.fingerprint(small) == first
    others = [index.copy() for _ in range(5)]
    others[0].loc[0, "label"] = 0
    others[1].loc[0, "path"] += "x"
    others[2].loc[0, "split"] = "dev"
    others[3].attrs = {**index.attrs, "name": "MURA-demo"}
    others[4].attrs = {**index.attrs, "content": "other"}
    assert len({first, *map(data.fingerprint, [*others, index.iloc[1:]])}) == 7
    # As `printf '%s\n' MURA-demo 'made for a test' <path, split and label, tab between> | sort | sha256sum`:
    # it keys every trained model, so a platform or library version that changes it must be noticed.
    assert data.fingerprint(make_index()) == "e24cc3b5e5f4"


def test_fault_7_the_key_of_pixels_changes_with_any_file_and_not_with_the_split(tmp_path):
    index = make_films(tmp_path / "films", patients=5)
    first = data.pixel_key(index)
    assert data.pixel_key(index.sample(frac=1, random_state=0).assign(split="train", label=1)) == first
    file, keys = data.image_path(index, index["path"][3]), [first]
    content, info = file.read_bytes(), file.stat()
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    keys.append(data.pixel_key(index))
    file.write_bytes(content + b"x")
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))  # another size at the same time
    keys += [data.pixel_key(index), data.pixel_key(index.iloc[1:])]
    file.write_bytes(content)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert data.pixel_key(index) == first and len(set(keys)) == 4
    (tmp_path / "films").rename(tmp_path / "moved")
    index.attrs["root"] = str(tmp_path / "moved")
    assert data.pixel_key(index) not in keys
