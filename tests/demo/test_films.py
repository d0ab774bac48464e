"""The renderer of the demo films: anatomy, findings, films, the plan of a data set, the audit."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from mura_demo import anatomy, audit, bones, film, findings, projection, studies


@cache
def coarse_clouds(part):
    return {
        bone: bones.build_cloud(bone, max(3 * pitch, 1.5), window)  # coarse: these tests look at geometry
        for bone, window, pitch in anatomy.PARTS[part].bones
        if bone != "thorax"
    }


def make_scene(part, digit=2, side="R", number=1):
    clouds = dict(coarse_clouds(part))
    return anatomy.Scene(part, anatomy.Patient.sample(0, number), side, digit, clouds)


@pytest.fixture(scope="module")
def wrist():
    return make_scene("WRIST")


def fresh(scene):
    return anatomy.Scene(scene.part, scene.patient, scene.side, scene.digit, dict(scene.bones))


def wrist_settings(seed=0, long_side=96):
    return projection.Settings.sample("WRIST", 2, "AP", long_side, np.random.default_rng(seed))


def test_broken_mesh_file_is_named(tmp_path):
    (tmp_path / "bone.stl").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="bone.stl.*reinstall"):
        bones.read_stl(tmp_path / "bone.stl")


@pytest.mark.parametrize("holes", [0, 40])
def test_a_sphere_with_holes_is_filled_to_its_volume(holes):
    rng = np.random.default_rng(0)
    points = rng.standard_normal((700, 3))
    points *= 20 / np.linalg.norm(points, axis=1, keepdims=True)
    mesh = points[ConvexHull(points).simplices][holes:]
    inside, _ = bones.solidify(mesh, 1.0, "capitate", anatomy.ALL, rng)
    assert inside.sum() == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.16)  # half a voxel proud by design


def test_clouds_are_kept_and_a_damaged_one_is_built_anew(tmp_path):
    key = ("capitate", 1.0, anatomy.ALL)
    first, second = (bones.load_clouds([key], tmp_path)[key] for _ in range(2))
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:1000])
    for a, b, c in zip(first[:4], second[:4], bones.load_clouds([key], tmp_path)[key][:4], strict=True):
        assert a.dtype == np.float32 and np.array_equal(a, b) and np.array_equal(a, c)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", list(findings.FINDINGS))
@pytest.mark.parametrize("part", ["WRIST", "ELBOW", "FINGER", "SHOULDER"])
def test_a_finding_changes_the_film_where_its_box_is(kind, part):
    healthy = make_scene(part)
    untouched = dict(healthy.bones)
    s = projection.Settings.sample(part, 2, "AP", 160, np.random.default_rng(5))
    for attempt in range(10):
        sick = fresh(healthy)
        findings.FINDINGS[kind](sick, 0.9, np.random.default_rng([7, attempt]))
        box = projection.finding_box(sick, projection.Projector(sick, s), film.shutters(s)[0])
        if box:
            break
    x0, y0, x1, y1 = box
    before, after = (
        sum(layer for layer in projection.project(x, projection.Projector(x, s))[:2]) for x in (healthy, sick)
    )
    change = np.abs(after - before)
    assert change[y0:y1, x0:x1].mean() > 0.1  # mm of bone
    assert all(healthy.bones[name] is cloud for name, cloud in untouched.items())


def test_a_fracture_takes_everything_beyond_it_along(wrist):
    broken = fresh(wrist)
    site = findings.shaft(wrist.bones["radius"].points, (1, -215, -205), np.random.default_rng(0))
    findings.fracture(broken, 1.0, np.random.default_rng(1), "radius", site)
    before, after = wrist.frames({}), broken.frames({})
    assert np.linalg.norm(after["thirdmc_r"][1] - before["thirdmc_r"][1]) > 2  # the hand has moved
    assert np.allclose(after["ulna_r"][1], before["ulna_r"][1])


def test_left_is_the_mirror_image_of_right(wrist):
    s = wrist_settings()
    centred = projection.Settings(**{**vars(s), "offset": np.zeros(2)})
    patient = anatomy.Patient(1, {"L": 1.0, "R": 1.0}, {"L": 1.0, "R": 1.0}, 1.0, np.ones(3), np.zeros(4))
    right = anatomy.Scene("WRIST", patient, "R", 2, wrist.bones)
    left = anatomy.Scene("WRIST", patient, "L", 2, wrist.bones)
    a, b = (projection.project(x, projection.Projector(x, centred))[0] for x in (right, left))
    assert np.abs(a - b[:, ::-1]).mean() < 0.02 * a.mean()


def test_metal_is_white_and_leaves_the_grey_of_the_rest_alone(wrist):
    s = wrist_settings(seed=3, long_side=200)
    plated = fresh(wrist)
    findings.hardware(plated, 0.5, np.random.default_rng(3))
    plain, sick = film.take(wrist, s, text=False).image, film.take(plated, s, text=False).image
    far = sick.shape[0] // 6  # the fingers' end of the film
    assert sick.max() >= 250
    assert abs(float(plain[:far].mean()) - float(sick[:far].mean())) < 2


@pytest.fixture
def settings_of(monkeypatch):
    """The settings of a study's films; the study itself is not built."""
    monkeypatch.setattr(studies, "make_scene", lambda *_: (None, ""))
    return lambda study: studies.set_up(study, 0, 320, None)[1]


def test_settings_do_not_depend_on_the_label(settings_of):
    normal = studies.Study("train", 7, "HAND", 1, 0, "R", 2, "none", 0.0, ("AP", "LAT"))
    abnormal = studies.Study("train", 7, "HAND", 1, 1, "R", 2, "fracture", 0.8, ("AP", "LAT"))
    for a, b in zip(settings_of(normal), settings_of(abnormal), strict=True):
        assert a.shape == b.shape and a.exposure == b.exposure and a.noise_seed == b.noise_seed
        assert (a.colour, a.collimated, a.text_seed) == (b.colour, b.collimated, b.text_seed)


def test_the_films_of_a_study_come_from_one_room(settings_of):
    scene, words = make_scene("HAND"), set()
    for number in range(12):
        study = studies.Study("train", 7, "HAND", number, 0, "R", 2, "none", 0.0, ("AP", "OBL", "LAT"))
        shots = [(s.view, film.take(scene, s)) for s in settings_of(study)]
        texts = {tuple(text.replace(view, "") for text, *_ in f.text_boxes) for view, f in shots}
        assert len(texts) == len({(f.image.ndim, max(f.image.shape)) for _, f in shots}) == 1
        assert len({f.image.tobytes() for _, f in shots}) == 3
        words |= texts
    assert len(words) > 3  # and not all studies from the same one


@settings(max_examples=20, deadline=None)
@given(st.integers(60, 3000), st.integers(0, 5))
def test_plan_keeps_muras_proportions(count, seed):
    planned = studies.plan(count, seed)
    assert len(planned) == count
    assert len({(s.folder.rsplit("_", 1)[0]) for s in planned}) == count  # study keys are unique
    sides = pd.DataFrame(planned).groupby("patient").split.nunique()
    assert sides.max() == 1
    train = [s for s in planned if s.split == "train"]
    positives = np.mean([s.label for s in train])
    assert positives == pytest.approx(5177 / 13457, abs=0.02 + 14 / len(train))
    assert {(s.part, s.label) for s in train} == {(p, label) for p in studies.MURA for label in (0, 1)}


def test_some_patients_have_several_parts_several_studies_and_mixed_labels():
    table = pd.DataFrame(studies.plan(2000, 0))
    by_patient = table.groupby("patient")
    assert 0.08 < (by_patient.part.nunique() > 1).mean() < 0.18
    repeats = table.groupby(["patient", "part"]).label.agg(["size", "nunique"])
    assert (repeats["size"] > 1).sum() > 20 and (repeats["nunique"] > 1).sum() > 5
    with pytest.raises(ValueError, match="at least 60"):
        studies.plan(10, 0)


@given(st.lists(st.tuples(*map(st.integers, (0, 0, 0, 0), (1, 4, 1, 2))), min_size=2, max_size=20))
def test_stratified_auroc_equals_counting_pairs_of_films_repeated_by_their_weight(films):
    *once, weight = (np.array(column) for column in zip(*films, strict=True))
    label, score, stratum = (np.repeat(column, weight) for column in once)
    pairs = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in np.flatnonzero(label == 1)
        for j in np.flatnonzero(label == 0)
        if stratum[i] == stratum[j]
    ]
    expected = np.mean(pairs) if pairs else np.nan
    assert audit.stratified_auroc(*once, weight[None])[0] == pytest.approx(expected, nan_ok=True)
