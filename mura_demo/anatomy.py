"""The arm behind a demo radiograph: the seven body parts, the patients, and how they are positioned.

Writes nothing.  A `Scene` is one study in 3-D: bones as point clouds plus whatever a finding changed;
`film.py` looks at it, `findings.py` edits it.  Explained in the appendix `a_demo_radiographs`.  Lengths in
mm, angles in radians.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from .bones import (
    CARPALS,
    DISTAL,
    FLAT,
    METACARPALS,
    MIDDLE,
    PROXIMAL,
    Cloud,
    CloudKey,
    load_clouds,
    mineral,
)
from .skeleton import rotation_about, skeleton

# ---------------------------------------------------------------------------------------------- body parts
ALL = (-1e9, 1e9)
Bone = tuple[str, tuple[float, float], float]  # name, stretch of local y, voxel pitch


@dataclass(frozen=True)
class Part:
    """What a film of a part shows: bones, longest side of the field in mm, height / width of the film."""

    bones: tuple[Bone, ...]
    field_mm: tuple[float, float]
    aspect: tuple[float, float]

    @property
    def pitch(self) -> float:
        """The finest voxel of the part (mm); implants and grain follow it."""
        return min(pitch for _, _, pitch in self.bones)


def _bones(names: list[str], pitch: float, window: tuple[float, float] = ALL) -> tuple[Bone, ...]:
    return tuple((name, window, pitch) for name in names)


PARTS = {
    "SHOULDER": Part(
        _bones(["humerus"], 1.05, (-230, 1e9))
        + _bones(["scapula"], 0.9)
        + _bones(["clavicle"], 1.0)
        + _bones(["thorax"], 1.9, (-200, 1e9)),
        (140, 178),
        (0.85, 1.25),
    ),
    "HUMERUS": Part(
        _bones(["humerus", "scapula", "clavicle"], 1.15)
        + _bones(["radius", "ulna"], 1.15, (-160, 1e9))
        + _bones(["thorax"], 1.9),
        (318, 362),
        (2.0, 2.8),
    ),
    "ELBOW": Part(
        _bones(["humerus"], 0.8, (-1e9, -130)) + _bones(["radius", "ulna"], 0.75, (-160, 1e9)),
        (108, 140),
        (1.0, 1.5),
    ),
    "FOREARM": Part(
        _bones(["humerus"], 0.9, (-1e9, -150))
        + _bones(["radius", "ulna", *CARPALS, *METACARPALS, *PROXIMAL], 0.9),
        (280, 318),
        (2.0, 2.9),
    ),
    "WRIST": Part(
        _bones(["radius", "ulna"], 0.72, (-1e9, -90))
        + _bones([*CARPALS, *METACARPALS], 0.6)
        + _bones(PROXIMAL, 0.75),
        (92, 118),
        (1.1, 1.6),
    ),
    "HAND": Part(
        _bones(["radius", "ulna"], 0.85, (-1e9, -90))
        + _bones([*CARPALS, *METACARPALS, *PROXIMAL, *MIDDLE, *DISTAL], 0.62),
        (178, 205),
        (1.25, 1.65),
    ),
    "FINGER": Part(_bones([*METACARPALS, *PROXIMAL, *MIDDLE, *DISTAL, *CARPALS], 0.55), (72, 95), (1.6, 2.4)),
}


@cache
def clouds(part: str, folder: Path) -> dict[str, Cloud]:
    """Load the clouds of every bone of a body part; they are built on first use.

    Parameters
    ----------
    part : str
        A key of `PARTS`.
    folder : Path
        Where the clouds are kept.

    Returns
    -------
    dict
        `Cloud` by bone.
    """
    keys: list[CloudKey] = [(bone, pitch, window) for bone, window, pitch in PARTS[part].bones]
    return {key[0]: cloud for key, cloud in load_clouds(keys, folder).items()}


# ------------------------------------------------------------------------------------- patients and studies
# Where bones of the young still grow: (distance of the growth plate from the end, fraction of the bone's
# length); positive from the upper end, negative from the lower one.
GROWTH_PLATES = {
    "humerus": (0.10, -0.07),
    "radius": (0.045, -0.045),
    "ulna": (-0.035,),
    "1mc": (0.14,),
    **dict.fromkeys(METACARPALS[1:], (-0.16,)),
    **dict.fromkeys([*PROXIMAL, *MIDDLE, *DISTAL], (0.13,)),
}


@dataclass(frozen=True)
class Patient:
    """What stays the same in all films of a patient; sides differ a little, as in life."""

    number: int
    age: float  # years
    scale: dict[str, float]  # size of the bones, by side "L" / "R"
    density: dict[str, float]  # mineral, by side
    cortex: float  # thickness of the cortex, as a multiple of the usual one
    spongy: float  # amount of spongy bone, likewise
    girth: float  # soft tissue
    slender: np.ndarray  # (3,) width of the bones along local x, y, z
    stout: tuple[float, float]  # width of shafts and of ends, as multiples
    ulna: float  # mm that the ulna is longer or shorter than usual
    bend: np.ndarray  # (4,) amplitudes (mm) and phases of a slow bend

    @classmethod
    def sample(cls, seed: int, number: int) -> Patient:
        """Draw the patient with this number in the data set with this seed; the old lose bone."""
        rng = np.random.default_rng([seed, number, 0])
        age = float(rng.uniform(7, 16) if rng.random() < 0.1 else rng.uniform(17, 90))
        loss = max(0.0, age - 50) / 40 * rng.uniform(0.3, 1.2)  # of bone, with age
        scale = np.clip(rng.normal(0.92 if age < 16 else 1, 0.06), 0.85, 1.12)
        density = np.clip(rng.normal(1, 0.10), 0.75, 1.25)
        return cls(
            number=number,
            age=age,
            scale={side: scale * rng.normal(1, 0.006) for side in "LR"},
            density={side: density * rng.normal(1, 0.015) for side in "LR"},
            cortex=float(np.clip(rng.normal(1, 0.1) - 0.2 * loss, 0.7, 1.25)),
            spongy=float(np.clip(rng.normal(1, 0.12) - 0.35 * loss, 0.45, 1.3)),
            girth=rng.uniform(0.82, 1.25),
            slender=np.array([rng.normal(1, 0.04), 1.0, rng.normal(1, 0.04)]).clip(0.9, 1.1),
            stout=tuple(np.clip(rng.normal(1, 0.05, 2), 0.9, 1.1)),
            ulna=float(np.clip(rng.normal(0, 1), -2, 2)),
            bend=np.concatenate([rng.normal(0, 2.2, 2), rng.uniform(0, 2 * np.pi, 2)]),
        )

    def grow(self, bone: str, cloud: Cloud) -> Cloud:
        """Make a bone this patient's: its width, cortex and spongy bone, and growth plates in the young."""
        if bone == "thorax":
            return cloud
        points, along = cloud.points.copy(), cloud.along
        if bone not in FLAT:
            middle = points.mean(0)
            axis = np.linalg.eigh(np.cov((points - middle)[:: max(1, len(points) // 4000)].T))[1][:, -1]
            across = points - middle
            across -= np.outer(across @ axis, axis).astype(np.float32)
            shaft, end = self.stout
            wide = np.float32(shaft) + np.float32(end - shaft) * np.abs(2 * along - 1) ** 4
            points += (wide - 1)[:, None] * across
        if bone == "ulna":
            points[:, 1] *= np.float32(1 + self.ulna / 240)
        density = mineral(bone, cloud.depth, along, cloud.grain, self.cortex, self.spongy)
        if self.age < 16:
            density *= self._growth_plates(bone, points, along)
        return cloud._replace(points=points, mass=(density * cloud.pitch**3).astype(np.float32))

    def _growth_plates(self, bone: str, points: np.ndarray, along: np.ndarray) -> np.ndarray:
        """Cartilage between the ends and the shaft: how much mineral is left, (N,); the plates are wavy."""
        left, length = np.ones(len(along), np.float32), np.ptp(points[:, 1]) / max(np.ptp(along), 1e-3)
        wave = 0.5 * np.sin(points[:, 0] * 1.1 + self.number) + 0.5 * np.sin(points[:, 2] * 0.9)
        width = 0.15 + 0.06 * (16 - self.age)  # mm; half of it: the plates close with age
        for plate in GROWTH_PLATES.get(bone, ()):
            away = (along - plate % 1) * length + wave
            left *= 1 - 0.9 * np.exp(-((away / (width + 0.45)) ** 4))
        return left


@dataclass
class Scene:
    """One study in 3-D: the bones of a body part in their local frames, plus what a finding adds or moves."""

    part: str
    patient: Patient
    side: str  # "L" or "R"; the bones are right ones, films of the left are mirrored
    digit: int  # which finger a FINGER study is about, 1 (thumb) to 5
    bones: dict[str, Cloud]
    moved: dict[str, tuple] = field(default_factory=dict)  # body -> displacement in its parent's frame
    added: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)  # body, points, mass
    metal: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)
    veils: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)  # mm^3 of soft tissue
    tags: list[tuple[str, np.ndarray]] = field(default_factory=list)  # body, points of the finding

    def __post_init__(self) -> None:
        """Keep the healthy bones: exposure goes by them, so no finding can change it."""
        self.healthy = dict(self.bones)

    def frames(self, angles: dict[str, float]) -> dict[str, tuple]:
        """Place every body of this study in a pose.

        Parameters
        ----------
        angles : dict
            Joint angles in radians; joints that are left out are at rest.

        Returns
        -------
        dict
            By body: rotation (3, 3) and origin (3,) in mm, in the world.
        """
        return skeleton().pose(angles, self.moved)

    def body(self, bone: str) -> str:
        """Name the body of the joint tree that carries a bone."""
        return skeleton().body_of[bone]


# -------------------------------------------------------------------------------------------- positioning
# Rows of a camera: the world direction of the film's right, of its down, and of the beam.
FROM_FRONT = np.array([[0, 0, -1], [0, -1, 0], [-1, 0, 0]], float)
FROM_SIDE = np.array([[1, 0, 0], [0, -1, 0], [0, 0, -1]], float)
PALM_DOWN = np.array([[-1, 0, 0], [0, 1, 0], [0, 0, -1]], float)  # fingers point up on the film
UP = np.array([0, 1.0, 0])


def position(part: str, view: str, rng: np.random.Generator) -> tuple[dict[str, float], np.ndarray]:
    """Position a patient for a view, roughly as a radiographer would.

    Parameters
    ----------
    part : str
        A key of `PARTS`.
    view : str
        "AP" (from the front), "OBL" (oblique) or "LAT" (from the side).
    rng : numpy.random.Generator

    Returns
    -------
    angles : dict
        Joint angles in radians.
    camera : ndarray (3, 3)
        Rows: the world direction of the film's right, of its down, and of the beam.
    """
    if part in ("HAND", "FINGER", "WRIST"):
        angles, camera = _position_hand(view, rng)
    elif part in ("ELBOW", "FOREARM"):
        angles, camera = _position_forearm(part, view, rng)
    else:
        angles, camera = _position_shoulder(part, view, rng)
    tilt = rotation_about([0, 0, 1], np.deg2rad(rng.normal(0, 5))) @ rotation_about(
        [1, 0, 0], rng.normal(0, 0.07)
    )
    return angles, tilt @ camera


def _position_hand(view, rng):
    u, fist = rng.uniform, rng.uniform(0, 0.3)
    angles = dict(deviation_r=u(-0.12, 0.3), flexion_r=u(-0.15, 0.15), pro_sup_r=0.0)
    angles |= dict(
        cmc_flexion=u(-0.3, 0.3),
        cmc_abduction=u(-0.3, 0.3),
        mp_flexion_r=u(-0.4, 0.1),
        ip_flexion_r=u(-0.4, 0.1),
    )
    for i in range(2, 6):
        angles[f"mcp{i}_flexion_r"] = u(0, 0.15) + fist * u(0.3, 1)
        angles[f"mcp{i}_abduction_r"] = u(-0.08, 0.08) + (3.2 - i) * u(-0.02, 0.07)
        angles["pm4_flexion" if i == 4 else f"pm{i}_flexion_r"] = u(0, 0.15) + fist * u(0.3, 1)
        angles["md3_flexion" if i == 3 else f"md{i}_flexion_r"] = u(0, 0.2) + fist / 2
    turn = {"AP": u(-12, 12), "OBL": u(28, 48), "LAT": u(78, 102)}[view]
    return angles, PALM_DOWN @ rotation_about(UP, np.deg2rad(turn))


def _position_forearm(part, view, rng):
    u = rng.uniform
    if view == "LAT":
        flexion = u(70, 100) if part == "ELBOW" else u(60, 95)
        angles = dict(elbow_flexion_r=np.deg2rad(flexion), pro_sup_r=u(-0.2, 0.2))
        return angles, FROM_SIDE @ rotation_about(UP, np.deg2rad(u(-10, 10)))
    angles = dict(elbow_flexion_r=np.deg2rad(u(0, 18)), pro_sup_r=-u(1.2, 1.55))
    turn = u(-12, 12) + (rng.choice([-1, 1]) * u(25, 45) if view == "OBL" else 0)
    return angles, FROM_FRONT @ rotation_about(UP, np.deg2rad(turn))


def _position_shoulder(part, view, rng):
    u = rng.uniform
    if part == "HUMERUS":
        angles = dict(shoulder_elv_r=u(0, 0.45), shoulder_rot_r=u(-0.5, 0.5), pro_sup_r=-u(0.6, 1.5))
        angles["elbow_flexion_r"] = u(0.6, 1.3) if view == "LAT" else u(0.1, 0.5)
        turn = {"AP": u(-12, 12), "OBL": u(15, 35), "LAT": u(-20, 20)}[view]
        camera = FROM_SIDE if view == "LAT" else FROM_FRONT
        return angles, camera @ rotation_about(UP, np.deg2rad(turn))
    angles = dict(shoulder_elv_r=u(0, 0.7), shoulder_rot_r=u(-0.9, 0.6), elv_angle_r=u(-0.2, 0.4))
    turn = {"AP": u(-15, 15), "OBL": u(20, 38), "LAT": u(50, 65)}[view]
    return angles, FROM_FRONT @ rotation_about(UP, np.deg2rad(turn))


def aim(part: str, digit: int, frames: dict[str, tuple]) -> np.ndarray:
    """Find the point on which a film is centred.

    Parameters
    ----------
    part : str
        A key of `PARTS`.
    digit : int
        The finger of a FINGER study, 1 (thumb) to 5.
    frames : dict
        What `Scene.frames` returns.

    Returns
    -------
    ndarray (3,)
        In the world, mm.
    """

    def point(body: str, *local: float) -> np.ndarray:
        rotation, origin = frames[body]
        return rotation @ np.array(local or (0.0, 0.0, 0.0)) + origin

    if part == "SHOULDER":
        return 0.75 * point("humerus_r") + 0.25 * point("scapula_r", -40, -40, -50)
    if part == "HUMERUS":
        return point("humerus_r", 0, -140, 0)
    if part == "ELBOW":
        return point("ulna_r")
    if part == "FOREARM":
        return point("radius_r", 5, -120, 10)
    if part == "WRIST":
        return point("lunate_r", 3, -5, 0)
    if part == "HAND":
        return 0.35 * point("3proxph_r") + 0.65 * point("thirdmc_r", 12, -12, 0)
    if digit == 1:
        return (point("proximal_thumb_r") + point("distal_thumb_r")) / 2
    return (point(f"{digit}proxph_r") + 2 * point(f"midph{digit}_r")) / 3
