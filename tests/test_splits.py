"""`split_dev`: who lands where, how nearly, and how reproducibly."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from conftest import STUDIES
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mura_course import data
from mura_course.errors import DataError


@cache
def _random_index(patients: int, seed: int, parts: int) -> pd.DataFrame:
    """Like MURA in what matters here: several parts and studies a patient, mixed labels, 1-8 views."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(1, patients + 1):
        for number in range(1, rng.choice([1, 2, 3], p=[0.8, 0.15, 0.05]) + 1):
            part = data.BODY_PARTS[rng.choice(7, p=[0.13, 0.14, 0.06, 0.15, 0.05, 0.2, 0.27]) % parts]
            label = int(rng.random() < 0.4)
            study = f"{part}/patient{patient:05d}/study{number}"
            sign = ("negative", "positive")[label]
            for view in range(1, rng.choice([1, 2, 3, 4, 8], p=[0.1, 0.3, 0.4, 0.15, 0.05]) + 1):
                split = "test" if patient % 10 == 0 else "train"
                path = f"{split}/XR_{study}_{sign}/image{view}.png"
                rows.append((path, split, part, patient, study, view, label))
    index = pd.DataFrame(rows, columns=list(data.COLUMNS))
    index["body_part"] = pd.Categorical(index["body_part"], categories=list(data.BODY_PARTS))
    index.attrs = {"root": "/nowhere", "name": "MURA-v1.1", "is_demo": False}
    return index


def random_index(patients: int, seed: int = 0, parts: int = 7) -> pd.DataFrame:
    return _random_index(patients, seed, parts).copy()


def shares(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """Share of the train images of each body part and label that became dev."""
    train = before["split"].eq("train")
    dev = after["split"].eq("dev")[train]
    return dev.groupby([before["body_part"][train], before["label"][train]], observed=True).mean()


def dev_paths(index: pd.DataFrame) -> set[str]:
    return set(index["path"][index["split"].eq("dev")])


@pytest.mark.parametrize("by", ["patient", "image"])
@given(seed=st.integers(0, 2**31 - 1), fraction=st.floats(0.02, 0.98), patients=st.integers(40, 60))
@settings(max_examples=8, deadline=None)
def test_every_row_in_exactly_one_split_near_the_fraction(by, seed, fraction, patients):
    index = random_index(patients, seed % 5, parts=3)
    train = index["split"].eq("train")
    unit = index["patient"] if by == "patient" else index["path"]
    strata = [index["body_part"].astype(str), index["label"]]
    assume(unit[train].groupby([s[train] for s in strata]).nunique().ge(2).all())
    untouched = index.copy()
    result = data.split_dev(index, fraction, by, seed)
    pd.testing.assert_frame_equal(index, untouched)  # a copy is split, never the index itself
    pd.testing.assert_frame_equal(result.drop(columns="split"), index.drop(columns="split"))
    assert result.attrs == index.attrs
    assert result["split"][~train].eq("test").all()
    assert set(result["split"][train]) == {"train", "dev"}
    if by == "patient":
        assert result[train].groupby("patient")["split"].nunique().eq(1).all()
    # No patient could be moved over as a whole to come nearer by more than its own images.
    biggest = unit[train].value_counts().max()
    assert abs(result["split"].eq("dev").sum() - fraction * train.sum()) <= max(1, biggest / 2)


@pytest.mark.parametrize("by", ["patient", "image"])
@pytest.mark.parametrize("fraction, seed", [(0.1, 0), (0.15, 1), (0.2, 2), (0.37, 3)])
def test_shares_of_part_and_label_are_kept(by, fraction, seed):
    index = random_index(500)
    result = data.split_dev(index, fraction, by, seed)
    train = index["split"].eq("train")
    assert result["split"].eq("dev").sum() == pytest.approx(fraction * train.sum(), abs=3)
    share = shares(index, result)
    assert len(share) == 14
    assert share.sub(fraction).abs().max() < 0.06  # the smallest stratum holds some 25 images
    for column in ("body_part", "label"):
        in_dev = result.loc[result["split"].eq("dev"), column].value_counts(normalize=True)
        in_train = index.loc[train, column].value_counts(normalize=True)
        assert in_dev.sub(in_train).abs().max() < 0.02


@pytest.mark.parametrize("by", ["patient", "image"])
def test_same_seed_same_split_whatever_the_order_and_the_types(by):
    index = random_index(80, parts=3)
    expected = dev_paths(data.split_dev(index, 0.15, by, seed=3))
    shuffled = index.sample(frac=1, random_state=5)
    assert dev_paths(data.split_dev(shuffled, 0.15, by, seed=3)) == expected
    renamed = shuffled.set_axis([f"row {n}" for n in range(len(index))], axis=0)
    assert dev_paths(data.split_dev(renamed, 0.15, by, seed=3)) == expected
    retyped = index.astype({"patient": "str", "label": "int8", "body_part": "object", "split": "object"})
    assert dev_paths(data.split_dev(retyped, 0.15, by, seed=3)) == expected
    fewer = index.astype({"body_part": "str"}).astype({"body_part": "category"})  # other categories' order
    assert dev_paths(data.split_dev(fewer, 0.15, by, seed=3)) == expected
    without_test = index[index["split"].eq("train")]
    assert dev_paths(data.split_dev(without_test, 0.15, by, seed=3)) == expected
    assert dev_paths(data.split_dev(index, 0.15, by, seed=4)) != expected


# The split keys every trained model, so a platform or library version that changes it must be noticed.
@pytest.mark.parametrize("by, fingerprint", [("patient", "89fcf002b265"), ("image", "82700a1a9842")])
def test_the_split_is_the_same_on_every_platform(by, fingerprint):
    assert data.fingerprint(data.split_dev(lattice(), 0.15, by, seed=0)) == fingerprint


def lattice() -> pd.DataFrame:
    """An index without any random number: 210 patients, every third with a second study of another part."""
    rows = []
    for patient in range(210):
        for number in range(1 + (patient % 3 == 0)):
            part, label = data.BODY_PARTS[(patient + 3 * number) % 7], (patient // 7 + number) % 2
            for view in range(1, 2 + (patient * 5 + number) % 4):
                study = f"{part}/patient{patient:05d}/study{number}"
                rows.append((f"train/{study}/image{view}.png", "train", part, patient, study, view, label))
    index = pd.DataFrame(rows, columns=list(data.COLUMNS))
    index.attrs = {"root": "/nowhere", "name": "MURA-v1.1", "is_demo": False}
    return index


def test_by_image_lets_patients_leak_and_by_patient_does_not():
    index = random_index(300)

    def leaking(result):
        return set(result["patient"][result["split"].eq("dev")]) & set(
            result["patient"][result["split"].eq("train")]
        )

    assert leaking(data.split_dev(index, by="patient")) == set()
    assert len(leaking(data.split_dev(index, by="image"))) > 30


def test_a_patient_with_most_of_the_images_does_not_become_the_dev_set():
    index = random_index(150)
    train = index[index["split"].eq("train")]
    giant = train.iloc[[0]].loc[lambda row: row.index.repeat(400)].reset_index(drop=True)
    giant["path"] = [f"train/giant/{n}.png" for n in range(400)]
    giant["patient"] = 99_999
    both = pd.concat([train, giant], ignore_index=True)
    for seed in range(3):
        result = data.split_dev(both, 0.1, seed=seed)
        assert not result.loc[result["patient"].eq(99_999), "split"].eq("dev").any()
        assert result["split"].eq("dev").sum() == pytest.approx(0.1 * len(both), abs=5)


def test_the_smallest_index_that_can_be_split():
    index = pd.DataFrame({
        "path": ["a", "b"], "split": "train", "body_part": "HAND", "patient": [1, 2], "label": 1,
    })  # fmt: skip
    for by in ("patient", "image"):
        assert sorted(data.split_dev(index, 0.5, by)["split"]) == ["dev", "train"]


def test_a_loaded_index_splits_and_keeps_its_attrs(mura_folder):
    more = [
        ("train", part, 100 + n, 1, n % 2 == 0, 2) for part in ("HAND", "ELBOW", "WRIST") for n in range(8)
    ]
    more = [(s, part, 100 * i + n, *rest) for i, (s, part, n, *rest) in enumerate(more, start=1)]
    index = data.load_index(mura_folder(studies=[*STUDIES, *more]))
    result = data.split_dev(index, 0.2)
    assert result.attrs == index.attrs
    assert result["split"].eq("dev").sum() == pytest.approx(0.2 * index["split"].eq("train").sum(), abs=1)
    assert data.distribution_table(result, "dev")["path"].sum() == result["split"].eq("dev").sum()
    assert data.fingerprint(result) != data.fingerprint(index)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, 10, float("nan")])
def test_a_fraction_outside_its_range(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        data.split_dev(random_index(100), fraction)


def test_an_unknown_way_to_split():
    with pytest.raises(DataError, match="'study'.*'patient' or 'image'"):
        data.split_dev(random_index(100), by="study")


def test_a_second_split():
    with pytest.raises(DataError, match="dev set already"):
        data.split_dev(data.split_dev(random_index(200)))


def test_nothing_to_split():
    index = random_index(100)
    with pytest.raises(DataError, match="no train images"):
        data.split_dev(index[index["split"].eq("test")])
    with pytest.raises(DataError, match="no train images"):
        data.split_dev(index.iloc[:0])


def test_a_part_and_label_of_one_patient_is_named():
    index = random_index(300)
    humerus = index["body_part"].eq("HUMERUS") & index["label"].eq(1) & index["split"].eq("train")
    one = index.loc[humerus, "patient"].iloc[0]
    rare = index[~humerus | index["patient"].eq(one)]
    with pytest.raises(DataError, match="Too few patients.*only one of: HUMERUS abnormal"):
        data.split_dev(rare)
    first = index.index[humerus][0]
    with pytest.raises(DataError, match="Too few images.*HUMERUS abnormal"):
        data.split_dev(index[~humerus | (index.index == first)], by="image")


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_fraction_that_leaves_a_side_empty(fraction):
    index = pd.DataFrame({
        "path": list("abcd"), "split": "train", "body_part": "HAND", "patient": [1, 2, 3, 4], "label": 1,
    })  # fmt: skip
    with pytest.raises(DataError, match="leaves train or dev empty"):
        data.split_dev(index, fraction)
