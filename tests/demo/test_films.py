"""The renderer of the demo films: anatomy, findings, films, the plan of a data set, the audit."""

import dataclasses
import itertools
from functools import cache

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_films, pair_by_pair
from scipy.spatial import ConvexHull, KDTree

from mura_demo import (
    anatomy,
    audit,
    bones,
    distractors,
    film,
    findings,
    fractures,
    projection,
    sites,
    studies,
    variants,
)


@cache
def coarse_clouds(part):
    return {
        bone: bones.build_cloud(bone, max(2 * pitch, 1.0), window)  # coarse: these tests look at geometry
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
    (tmp_path / "bone.stl").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="bone.stl.*reinstall"):
        bones.read_stl(tmp_path / "bone.stl")


@pytest.mark.parametrize("severity", [0, 0.25, 1])
@pytest.mark.parametrize("kind", list(findings.FINDINGS))
@pytest.mark.parametrize("part", list(anatomy.PARTS))
def test_a_finding_is_whole_tagged_repeatable_and_metal_lies_on_its_bone(part, kind, severity):
    healthy = make_scene(part, digit=1 + int(4 * severity))
    untouched, seeds = dict(healthy.bones), range(3)
    for seed in seeds:
        sick, again = fresh(healthy), fresh(healthy)
        find = findings.FINDINGS[kind]
        details = [find(scene, severity, np.random.default_rng([seed, 7])) for scene in (sick, again)]
        assert details[0] == details[1] and sum(len(p) for _, p in sick.tags) > 3
        for name, cloud in sick.bones.items():
            assert cloud.points.shape == untouched[name].points.shape and cloud.mass.min() >= 0
            assert np.array_equal(cloud.points, again.bones[name].points)
        for body, points, mass in [*sick.added, *sick.metal, *((b, p, np.ones(1)) for b, p in sick.tags)]:
            assert body in sick.frames({}) and np.isfinite(points).all() and np.isfinite(mass).all()
        bone = details[0].removesuffix("+fracture").split(":")[-1]
        limit = (6 if "plate" in details[0] else 3.5) + (cloud := sick.bones.get(bone, cloud)).pitch
        assert all(KDTree(cloud.points).query(p)[0].max() < limit for _, p, _ in sick.metal)
        assert bool(sick.metal) == (kind == "hardware")
    assert all(healthy.bones[name] is cloud for name, cloud in untouched.items())


@pytest.mark.parametrize("kind", list(findings.FINDINGS))
def test_a_finding_grows_with_severity_and_changes_little_beyond_its_box(kind):
    """Fault 3: fragments that swung by 30 degrees told the label far from the box."""
    inside, outside = np.zeros((2, 3))
    for part, seed in itertools.product(["WRIST", "ELBOW", "FINGER", "SHOULDER", "HUMERUS"], range(5)):
        healthy = make_scene(part, number=seed)
        s = projection.Settings.sample(part, 2, ["AP", "LAT"][seed % 2], 160, np.random.default_rng(seed))
        before = sum(projection.project(healthy, projection.Projector(healthy, s))[:2])
        for i, severity in enumerate([0, 0.4, 1]):
            sick = fresh(healthy)
            findings.FINDINGS[kind](sick, severity, np.random.default_rng([7, seed]))
            projector = projection.Projector(sick, s)
            if box := projection.finding_box(sick, projector, np.ones(s.shape)):
                x0, y0, x1, y1 = box
                change = np.abs(sum(projection.project(sick, projector)[:2]) - before)  # mm of bone
                inside[i] += change[y0:y1, x0:x1].mean()
                change[y0:y1, x0:x1] = 0
                outside[i] += change.mean()
    assert inside[0] > 0.5 and (kind == "hardware" or (np.diff(inside) > 0.1 * inside[0]).all())
    assert (outside < 0.35 * inside).all()


def test_what_breaks_depends_on_bone_and_age():
    for part in anatomy.PARTS:
        scene, found = make_scene(part), {}
        for age in (8, 40):
            scene.patient = dataclasses.replace(scene.patient, age=age)
            rows = fractures.kinds(scene)
            found[age] = {row.name for row, *_ in rows}
            assert rows and all(bone in scene.bones and 0 <= a <= b <= 1 for _, bone, (a, b) in rows)
        assert "Colles" not in found[8] and not {"torus", "supracondylar"} & found[40]
        assert ("torus" in found[8]) == (part in ("WRIST", "FOREARM"))


def test_joints_follow_a_fragment_but_do_not_turn_with_it(wrist):
    broken, before = fresh(wrist), wrist.frames({})
    site, row = sites.locate(wrist, "radius", 0.9), fractures.FRACTURES[0]
    fractures.break_bone(broken, site, row, 0.55, np.random.default_rng(1))
    after = broken.frames({})
    assert 2 < np.linalg.norm(after["thirdmc_r"][1] - before["thirdmc_r"][1]) < 15  # mm: the hand has moved
    assert np.allclose(after["thirdmc_r"][0], before["thirdmc_r"][0])
    assert np.allclose(after["ulna_r"][1], before["ulna_r"][1])


@pytest.mark.parametrize("part", list(anatomy.PARTS))
def test_normal_variants_change_the_bones_but_carry_no_tag(part):
    healthy, varied = make_scene(part), make_scene(part)
    for seed in range(4):
        variants.add_variants(varied, np.random.default_rng(seed))
    assert not varied.tags and not varied.metal and not varied.moved
    assert all(np.isfinite(c.points).all() and c.mass.min() >= 0 for c in varied.bones.values())
    assert varied.added or any(varied.bones[name] is not cloud for name, cloud in healthy.bones.items())


def test_left_is_the_mirror_image_of_right(wrist):
    s = wrist_settings()
    centred = projection.Settings(**{**vars(s), "offset": np.zeros(2)})
    alike = dict.fromkeys(("scale", "density"), {"L": 1.0, "R": 1.0})
    patient = dataclasses.replace(wrist.patient, **alike, slender=np.ones(3), bend=np.zeros(4))
    right, left = (dataclasses.replace(wrist, patient=patient, side=side) for side in "RL")
    a, b = (projection.project(x, projection.Projector(x, centred))[0] for x in (right, left))
    assert np.abs(a - b[:, ::-1]).mean() < 0.02 * a.mean()


@pytest.mark.parametrize("latitude", [0.0, 0.45])
def test_metal_leaves_the_white_point_alone_and_darkens_the_rest_a_little(wrist, latitude):
    """Fault 2: white meant metal. A film with a shoulder shows more metal brighter, and none of it white."""
    s = wrist_settings(seed=3, long_side=200)
    s.exposure.update(latitude=latitude, automatic=0.3, photons=1e6, gamma=1.0)
    plated = fresh(wrist)
    x, y, z = np.indices((60, 200, 60)).reshape(3, -1) * 0.25
    place = np.stack([x - 7, y - 240, z - 7], axis=1).astype(np.float32)
    for height in (50, 20):  # as much metal again over its lower end
        part = place[place[:, 1] < height - 240]
        plated.metal.append((wrist.body("radius"), part, np.full(len(part), 2 * 0.25**3, np.float32)))
    steps = {"plain": {}, "sick": {}}
    plain, sick = (film.take(a, s, False, steps[k]).image for a, k in ((wrist, "plain"), (plated, "sick")))
    bare, metal = steps["sick"]["metal"] == 0, steps["sick"]["metal"]
    assert -12 < (sick[bare].astype(float) - plain[bare]).mean() < -0.1
    thick = (np.median(metal[metal > 5]), metal.max())
    once, twice = (sick[(metal > 0.8 * m) & (metal < 1.2 * m)].mean() for m in thick)
    assert (sick == 255).any() == (latitude == 0) and (twice > once + 1) == (latitude > 0)


@pytest.mark.parametrize("kind", list(findings.FINDINGS))
def test_no_finding_moves_the_white_point(wrist, kind):
    sick, s = fresh(wrist), wrist_settings()
    findings.FINDINGS[kind](sick, 1.0, np.random.default_rng(2))
    sick.veils.append((wrist.body("radius"), np.array([[0, -200, 0]], np.float32), np.ones(1, np.float32)))
    soft = [film.project(a, projection.Projector(a, s))[2] for a in (wrist, sick)]
    healthy, altered = (film.white_point(a, s, b) for a, b in zip((wrist, sick), soft, strict=True))
    assert healthy == pytest.approx(altered, rel=1e-6) and healthy > 0.3


def test_noise_is_smeared_over_a_pixel_or_two_and_stronger_behind_dense_tissue():
    s = wrist_settings()
    s.exposure.update(blur=0.4, heel_x=0, heel_y=0, veil=0, photons=5000, grain=0.8)
    s = dataclasses.replace(s, shape=(200, 200))
    thin, dense = (film.expose(np.full(s.shape, a, np.float32), s) for a in (0.2, 2.0))
    assert thin.std() == pytest.approx(np.exp(0.1) / np.sqrt(5000), rel=0.03) and dense.std() > 2 * thin.std()
    near, far = (np.corrcoef(thin[:, :-k].ravel(), thin[:, k:].ravel())[0, 1] for k in (1, 4))
    assert 0.3 < near < 0.9 and abs(far) < 0.03


@pytest.mark.parametrize("part", ["HAND", "SHOULDER"])
def test_lettering_stands_in_its_boxes_alone_and_may_be_cut_by_the_edge(part):
    scene, cut, lead, askew = make_scene(part), 0, 0, 0
    for seed in range(60):
        s = projection.Settings.sample(part, 2, "AP", 160, np.random.default_rng(seed))
        bare, steps = film.take(scene, s, text=False).image, {}
        shot = film.take(scene, s, steps=steps)
        image, bare = (a if a.ndim == 2 else a[..., 0] for a in (shot.image, bare))
        assert np.array_equal(bare, steps["plain"])
        outside = image != bare
        for _, x0, y0, x1, y1 in shot.text_boxes:
            assert 0 <= x0 < x1 <= s.shape[1] and 0 <= y0 < y1 <= s.shape[0]
            rows = image[y0:y1, x0:x1] != bare[y0:y1, x0:x1]  # no wider than seen
            assert all(edge.any() for edge in (rows[0], rows[-1], rows[:, 0], rows[:, -1]))
            outside[y0:y1, x0:x1] = False
            cut += 0 in (x0, y0) or x1 == s.shape[1] or y1 == s.shape[0]
        assert not outside.any()
        lead += any(w.lead for w in film.writings(s, "R")) and bool(shot.text_boxes)
        askew += s.collimated
    assert cut > 2 and lead > 5 and askew > 10


@pytest.mark.parametrize("kind", list(distractors.WORN))
def test_what_is_worn_is_metal_without_a_tag_whatever_the_finding(kind, monkeypatch):
    odds = {k: {p: float(k == kind) for p in studies.MURA} for k in distractors.WORN_ODDS}
    monkeypatch.setattr(distractors, "WORN_ODDS", odds)
    part = {"snaps": "SHOULDER", "electrode": "HUMERUS"}.get(kind, "WRIST")
    healthy = make_scene(part)
    sick = fresh(healthy)
    findings.FINDINGS["lesion"](sick, 1.0, np.random.default_rng(0))
    tags, bones_before = len(sick.tags), dict(sick.bones)
    assert [distractors.wear(a, np.random.default_rng(1)) for a in (healthy, sick)] == [[kind]] * 2
    assert len(sick.tags) == tags and all(sick.bones[b] is c for b, c in bones_before.items())
    for (body, points, mass), (other, same, _) in zip(healthy.metal, sick.metal, strict=True):
        assert body == other and np.array_equal(points, same)
        assert np.isfinite(points).all() and mass.min() >= 0
    assert 20 < sum(mass.sum() for *_, mass in healthy.metal) < 60000  # mm^3 of cortical bone


@pytest.mark.parametrize("kind", ["cast", *distractors.IN_BEAM, *distractors.ON_FILM])
def test_what_lies_on_a_film_changes_it_and_stays_in_the_twin(wrist, kind, monkeypatch):
    odds = {name: getattr(distractors, name) for name in ("BEAM_ODDS", "FILM_ODDS")}
    only = {n: {k: dict.fromkeys(v, float(k == kind)) for k, v in o.items()} for n, o in odds.items()}
    none = {n: {k: dict.fromkeys(v, 0.0) for k, v in o.items()} for n, o in odds.items()}
    images = []
    for chosen in (none, only):
        for name, table in chosen.items():
            monkeypatch.setattr(distractors, name, table)
        plastered = float(kind == "cast" and chosen is only)
        monkeypatch.setattr(distractors, "CAST_ODDS", dict.fromkeys(studies.MURA, plastered))
        images.append(film.take(wrist, wrist_settings(4, 160), text=False).image)
    changed, large = (images[0] != images[1]).mean(), ("cast", "grid_lines", "seam", *distractors.IN_BEAM)
    assert changed > 0.0002 and (changed < 0.2 or kind in large)


def test_the_films_of_a_study_come_from_one_room_whatever_the_label(monkeypatch):
    monkeypatch.setattr(studies, "make_scene", lambda *_: (None, ""))  # the settings alone
    scene, words, views = make_scene("HAND"), set(), ("AP", "OBL", "LAT")
    for number in range(12):
        sick = studies.Study("train", 7, "HAND", number, 1, "R", 2, "fracture", 0.8, views)
        study = studies.Study("train", 7, "HAND", number, 0, "R", 2, "none", 0.0, views)
        of_study, of_sick = (studies.set_up(one, 0, 320, None)[1] for one in (study, sick))
        for a, b in zip(of_study, of_sick, strict=True):
            assert a.shape == b.shape and a.exposure == b.exposure and a.noise_seed == b.noise_seed
            assert (a.colour, a.collimated, a.text_seed) == (b.colour, b.collimated, b.text_seed)
        shots = [(s.view, film.take(scene, s)) for s in of_study]
        texts = {text.replace(view, "").strip() for view, f in shots for text, *_ in f.text_boxes}
        assert len({(f.image.ndim, max(f.image.shape)) for _, f in shots}) == 1
        assert len(texts) <= 3  # marker, date and note; what cannot be seen on a film is not named there
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
    if count > 1000:  # some patients have several parts, several studies and mixed labels
        table = pd.DataFrame(planned)
        assert 0.08 < (table.groupby("patient").part.nunique() > 1).mean() < 0.18
        repeats = table.groupby(["patient", "part"]).label.agg(["size", "nunique"])
        assert (repeats["size"] > 1).sum() > 10 and (repeats["nunique"] > 1).sum() > 2


@given(st.lists(st.tuples(*map(st.integers, (0, 0, 0, 0), (1, 4, 1, 2))), min_size=2, max_size=20))
def test_stratified_auroc_equals_counting_pairs_of_films_repeated_by_their_weight(films):
    *once, weight = (np.array(column) for column in zip(*films, strict=True))
    label, score, stratum = (np.repeat(column, weight) for column in once)
    expected = pair_by_pair(label, score, stratum)
    assert audit.stratified_auroc(*once, weight[None])[0] == pytest.approx(expected, nan_ok=True)


def test_a_box_is_painted_over_with_its_surroundings_or_cut_out():
    rng = np.random.default_rng(0)
    ramp = np.tile(np.linspace(40, 200, 120, dtype=np.float32), (100, 1)) + rng.normal(0, 4, (100, 120))
    image, box = ramp.astype(np.uint8), (50, 30, 80, 60)
    image[30:60, 50:80] = 255
    filled, inside = audit.fill_box(image, box), np.zeros(image.shape, bool)
    inside[30:60, 50:80] = True
    assert np.array_equal(filled[~inside], image[~inside]) and image[40, 60] == 255
    assert np.abs(filled[inside] - ramp[inside]).mean() < 10
    rough = filled[30:60, 50:80].astype(float) - cv2.GaussianBlur(filled, (0, 0), 2)[30:60, 50:80]
    assert 2 < rough.std() < 6  # as grainy as the rest
    shapes = [audit.box_only(image, b).shape for b in (box, (-5, -5, 9, 9))]
    assert shapes == [(46, 46), (12, 12)]
    for wrong in ((130, 0, 140, 9), (5, 5, 5, 9), (0, 0, 120, 100)):
        with pytest.raises(ValueError, match="box"):
            audit.fill_box(image, wrong)


def test_white_pixels_tell_a_white_film_from_others(tmp_path):
    index = make_films(tmp_path, sides=(40, 80), patients=24)
    index.assign(finding="lesion")[["path", "finding"]].to_csv(tmp_path / "truth.csv", index=False)
    white = audit.white_pixels(index, samples=50)  # the squares of `make_films` are not quite white: all tied
    assert (white.auroc == 0.5).all()
    for path in index.path[index.label == 1]:
        cv2.imwrite(str(tmp_path / path), np.full((40, 80), 255, np.uint8))
    assert (audit.white_pixels(index, samples=50).auroc == 1).all()
