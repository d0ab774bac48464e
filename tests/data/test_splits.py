"""`split_dev` and `sample_patients`: who lands where, how nearly, and how reproducibly."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_index

from mura_course import data
from mura_course.data.index import COLUMNS


def random_index(patients: int, seed: int = 0) -> pd.DataFrame:
    """Like MURA in what matters here: several parts and studies a patient, mixed labels, 1-8 views."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(1, patients + 1):
        for number in range(1, rng.choice([1, 2, 3], p=[0.8, 0.15, 0.05]) + 1):
            part = data.BODY_PARTS[rng.choice(7, p=[0.13, 0.14, 0.06, 0.15, 0.05, 0.2, 0.27])]
            label, split = int(rng.random() < 0.4), "test" if patient % 10 == 0 else "train"
            study = f"{part}/patient{patient:05d}/study{number}"
            for view in range(1, rng.choice([1, 2, 3, 4, 8], p=[0.1, 0.3, 0.4, 0.15, 0.05]) + 1):
                rows.append((f"{split}/{study}/image{view}.png", split, part, patient, study, view, label))
    index = pd.DataFrame(rows, columns=list(COLUMNS))
    index["body_part"] = pd.Categorical(index["body_part"], categories=list(data.BODY_PARTS))
    index.attrs = {"root": "/nowhere", "name": "MURA-v1.1", "is_demo": False, "content": "random"}
    return index


def dev_paths(index: pd.DataFrame) -> set[str]:
    return set(index["path"][index["split"].eq("dev")])


@pytest.mark.parametrize("by", ["patient", "image"])
@given(seed=st.integers(0, 2**31 - 1), fraction=st.floats(0.02, 0.5))
@settings(max_examples=4)
def test_every_row_in_exactly_one_split_near_the_fraction(by, seed, fraction):
    index = random_index(200, seed % 3)
    train, untouched = index["split"].eq("train"), index.copy()
    result = data.split_dev(index, fraction, by, seed)
    pd.testing.assert_frame_equal(index, untouched)  # a copy is split, never the index itself
    pd.testing.assert_frame_equal(result.drop(columns="split"), index.drop(columns="split"))
    assert result.attrs == index.attrs
    assert result["split"][~train].eq("test").all() and set(result["split"][train]) == {"train", "dev"}
    if by == "patient":
        assert result[train].groupby("patient")["split"].nunique().eq(1).all()
    assert result["split"].eq("dev").sum() / train.sum() == pytest.approx(fraction, abs=0.04)


@pytest.mark.parametrize("by", ["patient", "image"])
@pytest.mark.parametrize("fraction, seed", [(0.1, 0), (0.15, 1), (0.2, 2)])
def test_fractions_of_part_and_label_are_kept(by, fraction, seed):
    index = random_index(1000)
    train = index["split"].eq("train")
    dev = data.split_dev(index, fraction, by, seed)["split"].eq("dev")[train]
    assert dev.mean() == pytest.approx(fraction, abs=0.005)
    found = dev.groupby([index["body_part"][train], index["label"][train]], observed=True).mean()
    assert len(found) == 14 and found.sub(fraction).abs().max() < 0.06  # the smallest holds some 50 images


# The split keys every trained model, so a platform or library version that changes it must be noticed.
@pytest.mark.parametrize("by, fingerprint", [("patient", "b558c308cd5c"), ("image", "fc3b2bf3f977")])
def test_same_seed_same_split_whatever_the_order_the_types_and_the_platform(by, fingerprint):
    index = make_index(parts=data.BODY_PARTS, patients=210).assign(split="train")
    assert data.fingerprint(data.split_dev(index, 0.15, by, seed=0)) == fingerprint
    index = random_index(150)
    expected = dev_paths(data.split_dev(index, 0.15, by, seed=3))
    shuffled = index.sample(frac=1, random_state=5)
    for same in (
        shuffled,
        shuffled.set_axis([f"row {n}" for n in range(len(index))], axis=0),
        index.astype({"patient": "str", "label": "int8", "body_part": "object", "split": "object"}),
        index[index["split"].eq("train")],
    ):
        assert dev_paths(data.split_dev(same, 0.15, by, seed=3)) == expected
    assert dev_paths(data.split_dev(index, 0.15, by, seed=4)) != expected


def test_a_patient_with_most_of_the_images_does_not_become_the_dev_set():
    train = random_index(150).query("split == 'train'")
    giant = train.iloc[[0]].loc[lambda row: row.index.repeat(400)].reset_index(drop=True)
    giant = giant.assign(path=[f"train/giant/{n}.png" for n in range(400)], patient=99_999)
    both = pd.concat([train, giant], ignore_index=True)
    for seed in range(3):
        dev = data.split_dev(both, 0.1, seed=seed).query("split == 'dev'")
        assert 99_999 not in set(dev["patient"]) and 0.05 < len(dev) / len(train) < 0.15


@pytest.mark.parametrize("by", ["patient", "image"])  # by image, a patient stands on both sides
def test_sampled_train_patients_keep_all_their_images_and_dev_and_test_stay_whole(by):
    split = data.split_dev(random_index(300), by=by)
    few = data.sample_patients(split, 0.25)
    before, after = (table[table["split"].eq("train")] for table in (split, few))
    assert after["patient"].nunique() == round(0.25 * before["patient"].nunique())
    pd.testing.assert_frame_equal(after, before[before["patient"].isin(after["patient"])])
    pd.testing.assert_frame_equal(*(table[table["split"].ne("train")] for table in (few, split)))
    pd.testing.assert_frame_equal(data.sample_patients(split, 0.25), few)
    assert set(data.sample_patients(split, 0.25, seed=1)["patient"]) != set(few["patient"])
    assert data.sample_patients(split, 1) is split
    assert data.sample_patients(split, 1e-9).query("split == 'train'")["patient"].nunique() == 2
