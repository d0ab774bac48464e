"""The renderer of the demo films: anatomy, findings, films, and the data set as it is written."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mura_course import cli
from mura_course.radiographs import (
    anatomy,
    audit,
    bones,
    dataset,
    film,
    findings,
    projection,
    skeleton,
    studies,
)


@pytest.fixture(scope="session")
def bone_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("bones")


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


def wrist_settings(view="AP", seed=0, long_side=96):
    return projection.Settings.sample("WRIST", 2, view, long_side, np.random.default_rng(seed))


# ------------------------------------------------------------------------------------------ joints
@given(st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda a: np.linalg.norm(a) > 0.1), st.floats(-3, 3))
def test_rotation_is_right_handed_and_agrees_with_scipy(axis, angle):
    from scipy.spatial.transform import Rotation

    expected = Rotation.from_rotvec(np.array(axis) / np.linalg.norm(axis) * angle).as_matrix()
    assert np.allclose(skeleton.rotation_about(axis, angle), expected, atol=1e-9)


def test_bending_the_elbow_brings_the_wrist_forward():
    arm = skeleton.skeleton()
    hanging, bent = arm.pose({})["lunate_r"][1], arm.pose({"elbow_flexion_r": 1.2})["lunate_r"][1]
    assert bent[0] > hanging[0] + 100  # x is anterior
    assert bent[1] > hanging[1] + 50


def test_bones_stay_rigid_in_every_pose():
    arm = skeleton.skeleton()
    angles, _ = anatomy.position("HAND", "OBL", np.random.default_rng(3))
    frames = arm.pose(angles)
    for body, parent in arm.parent.items():
        rotation, origin = frames[body]
        assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        if parent:
            assert np.linalg.norm(origin - frames[parent][1]) == pytest.approx(
                np.linalg.norm(arm.position[body]), abs=1e-9
            )


def test_unknown_joint_is_named():
    with pytest.raises(KeyError, match="knee"):
        skeleton.skeleton().pose({"knee": 1.0})


def test_broken_mesh_file_is_named(tmp_path):
    (tmp_path / "bone.stl").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="bone.stl.*reinstall"):
        bones.read_stl(tmp_path / "bone.stl")


# ------------------------------------------------------------------------------------------- bones
@pytest.mark.parametrize("holes", [0, 40])
def test_a_sphere_with_holes_is_filled_to_its_volume(holes):
    rng = np.random.default_rng(0)
    t, p = np.meshgrid(np.linspace(0, np.pi, 25), np.linspace(0, 2 * np.pi, 49), indexing="ij")
    grid = 20 * np.stack([np.sin(t) * np.cos(p), np.cos(t), np.sin(t) * np.sin(p)], -1)
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    mesh = np.concatenate(
        [np.stack([a, b, c], 2).reshape(-1, 3, 3), np.stack([a, c, d], 2).reshape(-1, 3, 3)]
    )
    mesh = mesh[rng.permutation(len(mesh))[holes:]]
    inside, _ = bones.solidify(mesh, 1.0, "capitate", anatomy.ALL, rng)
    assert inside.sum() == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.16)  # half a voxel proud by design


def test_humerus_has_a_thick_cortex_and_an_empty_canal():
    cloud = bones.build_cloud("humerus", 1.5, anatomy.ALL)
    density = cloud.mass / cloud.pitch**3
    middle = np.abs(cloud.points[:, 1] + 150) < 30
    assert density[middle & (cloud.depth < 1.5)].mean() > 0.8
    assert density[middle & (cloud.depth > 7)].mean() < 0.25
    assert 100e3 < len(cloud.points) * cloud.pitch**3 < 200e3  # mm^3; a leaking fill gives a third


def test_clouds_are_cached_and_identical(bone_cache):
    key = [("capitate", 1.0, anatomy.ALL)]
    first, second = bones.load_clouds(key, bone_cache), bones.load_clouds(key, bone_cache)
    for a, b in zip(first[key[0]][:4], second[key[0]][:4], strict=True):
        assert a.dtype == np.float32 and np.array_equal(a, b)
    assert not list(bone_cache.rglob("*.tmp"))


# ---------------------------------------------------------------------------------------- findings
@pytest.mark.parametrize("kind", list(findings.FINDINGS))
@pytest.mark.parametrize("part", ["WRIST", "ELBOW", "FINGER", "SHOULDER"])
def test_a_finding_changes_the_film_where_its_box_is(kind, part):
    healthy = make_scene(part)
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
    assert all(a is b for a, b in zip(healthy.bones.values(), fresh(healthy).bones.values(), strict=True))


def test_a_fracture_takes_everything_beyond_it_along(wrist):
    broken = fresh(wrist)
    site = findings.shaft(wrist.bones["radius"].points, (1, -215, -205), np.random.default_rng(0))
    findings.fracture(broken, 1.0, np.random.default_rng(1), "radius", site)
    before, after = wrist.frames({}), broken.frames({})
    hand_moved = np.linalg.norm(after["thirdmc_r"][1] - before["thirdmc_r"][1])
    assert hand_moved > 2
    assert np.allclose(after["ulna_r"][1], before["ulna_r"][1])


def test_a_subluxation_is_the_same_slip_in_every_pose(wrist):
    slipped = fresh(wrist)
    findings.FINDINGS["subluxation"](slipped, 0.5, np.random.default_rng(2))
    shifts = []
    for angles in ({}, {"elbow_flexion_r": 1.4, "pro_sup_r": 0.5}):
        healthy, sick = wrist.frames(angles), slipped.frames(angles)
        rotation, _ = healthy["radius_r"]
        shifts.append(rotation.T @ (sick["lunate_r"][1] - healthy["lunate_r"][1]))
    assert np.linalg.norm(shifts[0]) > 3
    assert np.allclose(*shifts, atol=1e-9)


# ------------------------------------------------------------------------------------------- films
@given(
    st.lists(st.tuples(st.floats(-50, 150), st.floats(-50, 150), st.floats(0, 5)), min_size=1, max_size=40)
)
def test_points_add_up_like_a_loop_and_never_pile_up_on_the_rim(points):
    x, y, weight = (np.array(column, np.float32) for column in zip(*points, strict=True))
    size = (60, 80)
    expected = np.zeros(size)
    for a, b, w in zip(x, y, weight, strict=True):
        if 1 <= int(a) < 79 and 1 <= int(b) < 59 and a >= 1 and b >= 1:
            expected[int(b), int(a)] += w
    assert np.allclose(projection.add_up(x, y, weight, size), expected, atol=1e-4)


def test_left_is_the_mirror_image_of_right(wrist):
    s = wrist_settings()
    centred = projection.Settings(**{**vars(s), "offset": np.zeros(2)})
    patient = anatomy.Patient(1, {"L": 1.0, "R": 1.0}, {"L": 1.0, "R": 1.0}, 1.0, np.ones(3), np.zeros(4))
    right = anatomy.Scene("WRIST", patient, "R", 2, wrist.bones)
    left = anatomy.Scene("WRIST", patient, "L", 2, wrist.bones)
    a, b = (projection.project(x, projection.Projector(x, centred))[0] for x in (right, left))
    assert np.abs(a - b[:, ::-1]).mean() < 0.02 * a.mean()


def test_text_free_film_differs_only_in_the_text_boxes(wrist):
    for seed in range(20):
        s = wrist_settings(seed=seed, long_side=200)
        with_text, without = film.take(wrist, s), film.take(wrist, s, text=False)
        if with_text.text_boxes and not s.colour:
            break
    differs = with_text.image != without.image
    for _, x0, y0, x1, y1 in with_text.text_boxes:
        differs[y0 : y1 + 1, x0 : x1 + 1] = False
    assert with_text.text_boxes and not without.text_boxes
    assert not differs.any()


def test_metal_is_white_and_leaves_the_grey_of_the_rest_alone(wrist):
    s = wrist_settings(seed=3, long_side=200)
    plated = fresh(wrist)
    findings.hardware(plated, 0.5, np.random.default_rng(3))
    plain, sick = film.take(wrist, s, text=False).image, film.take(plated, s, text=False).image
    far = sick.shape[0] // 6  # the fingers' end of the film
    assert sick.max() >= 250
    assert abs(float(plain[:far].mean()) - float(sick[:far].mean())) < 2


def settings_of(study):
    room = projection.Room.sample(study.rng(0, 4))
    return [
        projection.Settings.sample("HAND", 2, v, 320, study.rng(0, 1, i), room)
        for i, v in enumerate(study.views)
    ]


def test_settings_do_not_depend_on_the_label():
    normal = studies.Study("train", 7, "HAND", 1, 0, "R", 2, "none", 0.0, ("AP", "LAT"))
    abnormal = studies.Study("train", 7, "HAND", 1, 1, "R", 2, "fracture", 0.8, ("AP", "LAT"))
    for a, b in zip(settings_of(normal), settings_of(abnormal), strict=True):
        assert a.shape == b.shape and a.exposure == b.exposure and a.noise_seed == b.noise_seed
        assert (a.colour, a.collimated, a.text_seed) == (b.colour, b.collimated, b.text_seed)


def test_the_films_of_a_study_come_from_one_room():
    scene, words = make_scene("HAND"), set()
    for number in range(12):
        study = studies.Study("train", 7, "HAND", number, 0, "R", 2, "none", 0.0, ("AP", "OBL", "LAT"))
        films = [film.take(scene, s) for s in settings_of(study)]
        texts = [
            [text.replace(s.view, "") for text, *_ in f.text_boxes]
            for f, s in zip(films, settings_of(study), strict=True)
        ]
        assert len({f.image.ndim for f in films}) == len({max(f.image.shape) for f in films}) == 1
        assert texts[0] == texts[1] == texts[2]
        assert len({f.image.tobytes() for f in films}) == 3
        words |= set(map(tuple, texts))
    assert len(words) > 3  # and not all studies from the same one


# -------------------------------------------------------------------------------------------- plan
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


def test_too_few_studies_are_refused():
    with pytest.raises(ValueError, match="at least 60"):
        studies.plan(10, 0)


# ---------------------------------------------------------------------------------------- data set
STUDIES, SIDE = 60, 64


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return dataset.write_demo(tmp_path_factory.mktemp("demo"), STUDIES, seed=1, long_side=SIDE, workers=2)


def digests(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def test_layout_is_muras_and_the_index_reads_it(small):
    from mura_course.data import load_index

    index = load_index(small, quiet=True)
    truth = pd.read_csv(small / "truth.csv", keep_default_na=False)
    assert set(truth.path) == set(index.path)
    assert index.attrs["is_demo"] and index.attrs["name"] == "MURA-demo"
    label = index.set_index("path").label
    assert ((truth.finding != "none").astype(int) == truth.path.map(label)).all()
    seen = truth.assign(study=truth.path.str.rsplit("/", n=1).str[0]).groupby("study")
    assert (seen.visible.max() == (seen.finding.first() != "none")).all()  # some view shows every finding
    for row in truth.sample(25, random_state=0).itertuples():
        image = cv2.imread(str(small / row.path), cv2.IMREAD_UNCHANGED)
        height, width = image.shape[:2]
        assert max(height, width) <= SIDE and image.dtype == np.uint8
        if row.visible:
            assert 0 <= float(row.box_x0) < float(row.box_x1) <= width
        for _, x0, y0, x1, y1 in json.loads(row.text_boxes):
            assert x0 < x1 and y0 < y1


def test_readme_says_synthetic_and_credits_the_bones(small):
    text = (small / "README.txt").read_text()
    assert all(
        word in text for word in ("NOT radiographs", "MyoSim", "Holzbaur", "McFarland", "non-commercial")
    )


def test_manifest_has_the_checksum_of_every_film(small):
    manifest = pd.read_csv(small / "manifest.csv").set_index("path")
    found = {p: h for p, h in digests(small).items() if p.endswith(".png")}
    assert manifest.sha256.to_dict() == found


def test_text_free_twin_differs_only_in_the_text(small):
    truth = pd.read_csv(small / "truth.csv", keep_default_na=False)
    path = truth.path[truth.text_boxes != "[]"].iloc[0]
    twin = dataset.text_free_twins(small, [path])[path]
    image = cv2.imread(str(small / path), cv2.IMREAD_UNCHANGED)
    differs = (image != twin).reshape(*image.shape[:2], -1).any(-1)
    assert differs.any()
    for _, x0, y0, x1, y1 in json.loads(truth.set_index("path").text_boxes[path]):
        differs[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = False
    assert not differs.any()


@pytest.mark.slow
def test_killed_and_continued_with_other_workers_it_writes_the_same_bytes(small, tmp_path):
    code = (
        "from mura_course.radiographs.dataset import write_demo; from pathlib import Path; import sys;"
        f"write_demo(Path(sys.argv[1]), {STUDIES}, seed=1, long_side={SIDE}, workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(tmp_path.glob("*.partial/done/*.json")):
        time.sleep(0.05)
    time.sleep(np.random.default_rng().uniform(0, 1))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = dataset.write_demo(tmp_path, STUDIES, seed=1, long_side=SIDE, workers=1)
    assert digests(result) == digests(small)
    assert not (tmp_path / "MURA-demo.partial").exists()


def test_a_folder_with_other_data_is_left_alone(small):
    with pytest.raises(FileExistsError, match="other data"):
        dataset.write_demo(small.parent, STUDIES, seed=2, long_side=SIDE)
    assert (small / "truth.csv").exists()


def test_a_full_disk_is_named_with_the_remedy(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="MURA_CACHE") as error:
        dataset.write_demo(tmp_path / "here", STUDIES, long_side=SIDE)
    assert str(tmp_path / "here") in str(error.value)


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as error:
        dataset.write_demo(tmp_path / "file" / "out", STUDIES, long_side=SIDE)
    assert "file" in str(error.value) and "MURA_CACHE" in str(error.value)


def test_command_finds_what_is_there_and_answers_bad_orders_in_one_line(small, tmp_path, capsys):
    code = cli.main(["demo", "--out", str(tmp_path), "--studies", "5"])
    assert code == 1 and "at least 60" in capsys.readouterr().err
    order = ["--studies", str(STUDIES), "--long-side", str(SIDE), "--seed", "1"]
    assert cli.main(["demo", "--out", str(small.parent), *order]) == 0
    assert str(small) in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- audit
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=40))
def test_stratified_auroc_equals_counting_pairs(films):
    label, score, stratum = (np.array(column) for column in zip(*films, strict=True))
    pairs = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in np.flatnonzero(label == 1)
        for j in np.flatnonzero(label == 0)
        if stratum[i] == stratum[j]
    ]
    expected = np.mean(pairs) if pairs else np.nan
    assert audit.stratified_auroc(label, score.astype(float), stratum)[0] == pytest.approx(
        expected, nan_ok=True
    )


@given(st.integers(0, 99))
def test_weights_count_like_repeated_films(seed):
    rng = np.random.default_rng(seed)
    label, score, stratum = rng.integers(0, 2, 20), rng.integers(0, 5, 20) / 5, rng.integers(0, 2, 20)
    times = rng.integers(0, 3, 20)
    repeated = audit.stratified_auroc(*(np.repeat(column, times) for column in (label, score, stratum)))
    weighted = audit.stratified_auroc(label, score, stratum, times[None])
    assert weighted == pytest.approx(repeated, nan_ok=True)


def test_audit_finds_a_planted_shortcut_and_none_without(small):
    from mura_course.data import load_index

    features = audit.frame_features(load_index(small, quiet=True))
    honest = audit.shortcut_table(features, samples=200).loc["all"]
    assert honest.low < 0.5 < honest.high
    planted = features.assign(height=features.height + 20 * features.label)
    assert audit.shortcut_table(planted, samples=200).loc["all", "low"] > 0.6
