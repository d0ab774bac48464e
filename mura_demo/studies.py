"""Who is examined, and what for: the plan of a demo data set, and the films of one planned study.

Proportions of body parts and labels, patients with several studies and views per study follow MURA v1.1
(Rajpurkar et al. 2018, arXiv 1712.06957).  Every random draw comes from (seed, patient, study, purpose), so
a study's films don't depend on the order or the number of workers.  Writes nothing; `dataset.py` does.
Explained in the appendix `a_demo_radiographs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .anatomy import CARPALS, PARTS, Patient, Scene, clouds
from .distractors import wear
from .film import Film, shutters, take
from .findings import FINDINGS
from .projection import Projector, Room, Settings, finding_box
from .variants import add_variants

# Studies of MURA v1.1: train normal, train abnormal, valid normal, valid abnormal; mean views of a study.
MURA = {
    "ELBOW": (1094, 660, 92, 66, 2.81),
    "FINGER": (1280, 655, 92, 83, 2.64),
    "FOREARM": (590, 287, 69, 64, 2.08),
    "HAND": (1497, 521, 101, 66, 2.75),
    "HUMERUS": (321, 271, 68, 67, 2.15),
    "SHOULDER": (1364, 1457, 99, 95, 2.97),
    "WRIST": (2134, 1326, 140, 97, 2.82),
}
# Our choice. About half of MURA's positives show plates, marks or plaster (Pure-MURA's count); with so many,
# a network would need to learn little else.
FINDING_FRACTIONS = {
    "fracture": 0.36,
    "hardware": 0.28,
    "lesion": 0.12,
    "degenerative": 0.15,
    "subluxation": 0.09,
}
TEST_FRACTION = 0.35  # of the studies: more than in MURA, for narrower intervals
SECOND_PART = 0.13  # fraction of patients with studies of two body parts (1,467 of 11,184 in MURA)
FOLLOW_UP = 0.045  # fraction of (patient, part) with a second study of that part
MAX_TRIES = 20  # draws of a finding until a view shows it


@dataclass(frozen=True)
class Study:
    """One planned study; `number` counts the patient's studies of this part, from 1."""

    split: str  # "train" or "valid", as MURA's folders are named
    patient: int
    part: str
    number: int
    label: int
    side: str
    digit: int
    finding: str  # "none" or a key of FINDING_FRACTIONS
    severity: float
    views: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of the study below the data's root, as in MURA."""
        word = "positive" if self.label else "negative"
        return f"{self.split}/XR_{self.part}/patient{self.patient:05d}/study{self.number}_{word}"

    def rng(self, seed: int, *purpose: int) -> np.random.Generator:
        """Make the stream of random numbers of this study for one purpose.

        Parameters
        ----------
        seed : int
            The data set's.
        *purpose : int
            Any numbers: other ones, another stream. 0 patient, 1 films, 3 finding, 4 room, 5 variants,
            6 what is worn.

        Returns
        -------
        numpy.random.Generator
        """
        return np.random.default_rng(
            [seed, self.patient, list(PARTS).index(self.part), self.number, *purpose]
        )


def plan(studies: int, seed: int) -> list[Study]:
    """Plan a data set.

    Parameters
    ----------
    studies : int
        How many, train and test together; at least 60, so that every part and label appears.
    seed : int
        Another seed, other patients.

    Returns
    -------
    list of Study
        Patients of train come first; none is in both splits.

    Raises
    ------
    ValueError
        Too few studies.
    """
    if studies < 60:
        raise ValueError(
            f"Demo data need at least 60 studies to hold every body part and label, not {studies}."
        )
    rng = np.random.default_rng([seed, studies])
    tests = round(studies * TEST_FRACTION)
    planned, patient = [], 0
    for split, count, columns in (("train", studies - tests, (0, 1)), ("valid", tests, (2, 3))):
        for visits in _patients(_quotas(count, columns), rng):
            patient += 1
            numbers: dict[str, int] = {}
            for part, label in visits:
                numbers[part] = numbers.get(part, 0) + 1
                planned.append(_study(split, patient, part, numbers[part], label, rng))
    return planned


def _quotas(count: int, columns: tuple[int, int]) -> list[tuple[str, int]]:
    """(part, label) of every study, in MURA's proportions by largest remainder, at least one of each."""
    cells = [(part, label) for part in MURA for label in (0, 1)]
    share = np.array([MURA[part][columns[label]] for part, label in cells], float)
    exact = share / share.sum() * (count - len(cells))
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: count - len(cells) - whole.sum()]] += 1
    return [cell for cell, n in zip(cells, whole + 1, strict=True) for _ in range(n)]


def _patients(visits: list[tuple[str, int]], rng: np.random.Generator) -> Iterator[list[tuple[str, int]]]:
    """Deal studies to patients: most have one, some a second part or a follow-up of the same part."""
    by_part = {part: [v for v in visits if v[0] == part] for part in MURA}
    for pile in by_part.values():
        rng.shuffle(pile)
    order = [v[0] for v in visits]
    rng.shuffle(order)
    for part in order:
        if not by_part[part]:  # already dealt to another patient
            continue
        mine = [by_part[part].pop()]
        if by_part[part] and rng.random() < FOLLOW_UP:
            mine.append(by_part[part].pop())
        others = [p for p in by_part if p != part and by_part[p]]
        if others and rng.random() < SECOND_PART:
            weights = np.array([len(by_part[p]) for p in others], float)
            mine.append(by_part[str(rng.choice(others, p=weights / weights.sum()))].pop())
        yield [(p, int(label)) for p, label in mine]


def _study(split: str, patient: int, part: str, number: int, label: int, rng: np.random.Generator) -> Study:
    count = 1 + rng.binomial(3, (MURA[part][4] - 1) / 3)
    first = str(rng.choice(["AP", "OBL", "LAT"], p=[0.5, 0.2, 0.3]))
    views = {1: (first,), 2: ("AP", "LAT"), 3: ("AP", "OBL", "LAT"), 4: ("AP", "OBL", "LAT", first)}[count]
    finding, severity = _draw_finding(rng)
    side, digit = "LR"[rng.integers(2)], int(rng.integers(1, 6))
    return Study(
        split,
        patient,
        part,
        number,
        label,
        side,
        digit,
        finding if label else "none",
        severity if label else 0.0,
        tuple(str(v) for v in views),
    )


def _draw_finding(rng: np.random.Generator) -> tuple[str, float]:
    finding = str(rng.choice(list(FINDING_FRACTIONS), p=list(FINDING_FRACTIONS.values())))
    return finding, round(float(rng.beta(4, 0.8)), 3)


def with_finding(study: Study, rng: np.random.Generator) -> Study:
    """Plan a study once more, with a finding and a severity that are drawn as in an abnormal one."""
    finding, severity = _draw_finding(rng)
    return replace(study, finding=finding, severity=severity)


def make_scene(study: Study, seed: int, settings: list[Settings], cache: Path) -> tuple[Scene, str]:
    """Build a study in 3-D.

    Parameters
    ----------
    study : Study
    seed : int
        The data set's.
    settings : list of Settings
        Of the study's films.
    cache : Path
        Folder of the bones' clouds.

    Returns
    -------
    scene : Scene
    detail : str
        What the finding is in detail, such as "plate:radius+fracture"; "" where there is none.

    Raises
    ------
    ValueError
        No view shows the finding, which very small films can bring about.

    Notes
    -----
    The films are set up before the finding is drawn, and the finding is drawn again until at least one of
    them shows it: never the other way round, or abnormal films would be framed differently from normal ones.
    """
    bones = dict(clouds(study.part, cache))
    if study.part == "FINGER" and study.digit != 1:
        bones = {name: cloud for name, cloud in bones.items() if name not in CARPALS}  # out of the field
    patient = Patient.sample(seed, study.patient)
    bones = {name: patient.grow(name, cloud) for name, cloud in bones.items()}
    for attempt in range(MAX_TRIES):
        scene = Scene(study.part, patient, study.side, study.digit, dict(bones))
        add_variants(scene, study.rng(seed, 5))
        scene.healthy = dict(scene.bones)  # variants are normal
        wear(scene, study.rng(seed, 6))
        if study.finding == "none":
            return scene, ""
        detail = FINDINGS[study.finding](scene, study.severity, study.rng(seed, 3, attempt))
        if any(finding_box(scene, Projector(scene, s), shutters(s)[0]) for s in settings):
            return scene, detail
    raise ValueError(
        f"{study.folder}: no view shows its {study.finding} after {MAX_TRIES} draws. "
        "Choose another seed, or larger films (--long-side)."
    )


def set_up(study: Study, seed: int, long_side: int, cache: Path) -> tuple[Scene, list[Settings], str]:
    """Set up the films of a study, then build it in 3-D.

    Parameters
    ----------
    study : Study
    seed, long_side : int
        The data set's.
    cache : Path
        Folder of the bones' clouds.

    Returns
    -------
    scene : Scene
    settings : list of Settings
        One a view; `film.take` takes the film.
    detail : str
        As `make_scene` returns it.
    """
    room = Room.sample(study.rng(seed, 4))
    settings = [
        Settings.sample(study.part, study.digit, view, long_side, study.rng(seed, 1, i), room)
        for i, view in enumerate(study.views)
    ]
    scene, detail = make_scene(study, seed, settings, cache)
    return scene, settings, detail


def film_study(
    study: Study, seed: int, long_side: int, cache: Path, text: bool = True
) -> Iterator[tuple[str, Film, dict[str, Any]]]:
    """Take the films of a study.

    Parameters
    ----------
    study : Study
    seed, long_side : int
        The data set's.
    cache : Path
        Folder of the bones' clouds.
    text : bool
        False leaves the burned-in text out and changes nothing else.

    Yields
    ------
    path : str
        Below the data's root.
    film : Film
    truth : dict
        The film's row of ``truth.csv``.
    """
    scene, settings, detail = set_up(study, seed, long_side, cache)
    for i, setting in enumerate(settings, 1):
        film = take(scene, setting, text)
        path = f"{study.folder}/image{i}.png"
        box = film.finding_box or ("",) * 4
        yield (
            path,
            film,
            {
                "path": path,
                "finding": study.finding,
                "detail": detail,
                "severity": study.severity,
                "view": setting.view,
                "side": study.side,
                "visible": int(film.finding_box is not None),
                **dict(zip(("box_x0", "box_y0", "box_x1", "box_y1"), box, strict=True)),
                "text_boxes": json.dumps([list(b) for b in film.text_boxes]),
            },
        )
