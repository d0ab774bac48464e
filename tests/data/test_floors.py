"""`floors` and `white_fraction`: counted in the files, fitted on train only, cached."""

import cv2
import numpy as np
import pandas as pd
import pytest
from making import make_films

from mura_course import data
from mura_course.errors import DataError, DiskError


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Films of 8 x 10 pixels: film i has i white ones, and 254 elsewhere. Abnormal ones come later."""
    monkeypatch.setenv("MURA_CACHE", str(tmp_path / "cache"))
    index = make_films(tmp_path / "films", patients=20, views=1)
    for i, path in enumerate(index["path"]):
        image = np.full(80, 254, np.uint8)
        image[:i] = 255
        cv2.imwrite(str(tmp_path / "films" / path), image.reshape(8, 10))
    return index


def test_white_pixels_are_counted_in_the_files_once(films, tmp_path, monkeypatch):
    expected = np.arange(20) / 80
    np.testing.assert_array_equal(data.white_fraction(films), expected)
    shuffled = films.sample(frac=1, random_state=1)
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imdecode", None)  # it is all in the cache
        np.testing.assert_array_equal(data.white_fraction(shuffled), expected[shuffled.index])
    (cached,) = (tmp_path / "cache").rglob("white.npy")
    cached.write_bytes(cached.read_bytes()[:-8])
    with pytest.raises(DiskError, match="damaged"):
        data.white_fraction(films)
    for content in (b"", b"no image"):
        (tmp_path / "films" / "3-1.png").write_bytes(content)
        with pytest.raises(DataError, match="3-1.png: empty, no image"):
            data.white_fraction(films)
    assert list((tmp_path / "cache").rglob("*.npy")) == [cached]


def test_floors_are_fitted_on_train_and_predict_dev_and_test(films):
    split = films.assign(label=[0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    split["body_part"] = ["HAND", "WRIST"] * 6 + ["HAND", "WRIST", "ELBOW", "HAND"] * 2
    found = data.floors(split)
    assert list(found) == ["white pixels", "body part alone"]
    for table in found.values():
        pd.testing.assert_frame_equal(table.drop(columns="probability"), split[12:])
        assert table.attrs == films.attrs | {"weights": "no"}
    assert found["body part alone"]["probability"].tolist() == [2 / 6, 5 / 6, 7 / 12, 2 / 6] * 2
    flipped = split.assign(label=split["label"].where(split["split"].eq("train"), 1 - split["label"]))
    for name, table in data.floors(flipped).items():
        np.testing.assert_array_equal(table["probability"], found[name]["probability"])


@pytest.mark.parametrize("sign", [1, -1])
def test_white_pixels_may_speak_for_either_label(films, sign):
    split = films.assign(label=(np.arange(20) * sign > 5.5 * sign).astype(int))
    white = data.floors(split)["white pixels"]["probability"].to_numpy()
    assert (np.diff(white) * sign > 0).all() and (white > 0.5).all() == (sign > 0)
    with pytest.raises(DataError, match="hold one label only"):
        data.floors(films.assign(label=1))
