"""How a film is set up and what it catches: settings, projection of the bones, soft tissue around them.

Everything about a film that is not anatomy - size, field, exposure, collimation, markers - is drawn in
`Settings` without knowledge of the label, so that no classifier can read the label off the frame.  Images are
float32 (H, W) of thickness in mm; `film.py` makes grey levels of them.  Explained step by step in the
appendix `a_demo_radiographs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .anatomy import PARTS, Scene, aim, position
from .flesh import hides_chest, soft_tissue
from .skeleton import rotation_about, skeleton

SUPERSAMPLE = 2  # film pixels are averages of 2 x 2 finer ones
MARGIN = 32  # fine pixels around the film: bones beyond the edge still cast soft tissue into it


@dataclass(frozen=True)
class Room:
    """What the films of one study share: machine, processing, marker style. So a study can be recognised."""

    exposure: dict[str, float]
    longest: float  # longest side of the films, as a fraction of the data set's
    colour: bool  # stored as RGB
    collimated: bool
    seed: int  # of what is burned in

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Room:
        """Draw a room, whatever the label of the study that is made in it."""
        u = rng.uniform
        exposure = dict(
            bone=u(0.058, 0.082),
            soft=u(0.014, 0.021),
            blur=u(0.4, 0.8),
            heel_x=u(-0.06, 0.06),
            heel_y=u(-0.06, 0.06),
            veil=u(0.003, 0.02),
            photons=np.exp(u(np.log(5000), np.log(25000))),
            grain=u(0.4, 0.9),  # pixels over which the detector smears a photon
            automatic=u(0, 0.15),  # how far the automatic exposure makes up for dense objects
            white=u(0.94, 1.05) if rng.random() < 0.2 else u(1.1, 1.4),
            black=u(0, 0.1),
            latitude=u(0.3, 0.6) if rng.random() < 0.3 else 0.0,  # of the film's shoulder; 0 clips hard
            sharpen=u(0, 0.7),
            sharpen_sigma=u(2, 6),
            gamma=u(0.75, 1.25),
        )
        longest = 1.0 if rng.random() < 0.8 else u(0.6, 1)
        return cls(exposure, longest, rng.random() < 0.5, rng.random() < 0.55, int(rng.integers(2**31)))


@dataclass(frozen=True)
class Settings:
    """How one film is taken; drawn from a stream of random numbers of its own."""

    view: str
    angles: dict[str, float]  # joint angles, rad
    camera: np.ndarray  # (3, 3), rows: right, down, beam
    target: np.ndarray  # (3,) world point in the middle of the film, mm (of the healthy arm)
    shape: tuple[int, int]  # height, width in pixels
    field_mm: float  # length that the film's longest side covers at the target
    offset: np.ndarray  # (2,) decentring, as a fraction of the longest side
    distance: float  # from the X-ray source to the target, mm
    noise_seed: int
    exposure: dict[str, float]
    collimated: bool
    colour: bool  # stored as RGB
    text_seed: int  # of the wording and style of what is burned in

    @classmethod
    def sample(
        cls,
        part: str,
        digit: int,
        view: str,
        long_side: int,
        rng: np.random.Generator,
        room: Room | None = None,
    ) -> Settings:
        """Draw the settings of a film.

        Parameters
        ----------
        part : str
            A key of `anatomy.PARTS`.
        digit : int
            The finger of a FINGER study, 1 (thumb) to 5.
        view : str
            "AP", "OBL" or "LAT".
        long_side : int
            Pixels of the longest side, or fewer.
        rng : numpy.random.Generator
        room : Room, optional
            The study's; by default one is drawn for this film alone.

        Returns
        -------
        Settings
        """
        room = room or Room.sample(rng)
        spec, u = PARTS[part], rng.uniform
        angles, camera = position(part, view, rng)
        target = aim(part, digit, skeleton().pose(angles))
        aspect = np.exp(u(*np.log(spec.aspect)))
        if view == "LAT" and part in ("ELBOW", "FOREARM"):  # a bent elbow: the forearm lies across the film
            aspect = 1 / aspect if part == "FOREARM" else u(0.8, 1.2)
        longest = int(long_side * room.longest)
        height, width = (
            (longest, round(longest / aspect)) if aspect > 1 else (round(longest * aspect), longest)
        )
        if rng.random() < 0.08:  # some films are stored sideways
            height, width = width, height
            camera = rotation_about([0, 0, 1], rng.choice([-1, 1]) * np.pi / 2) @ camera
        return cls(
            view,
            angles,
            camera,
            target,
            (height, width),
            u(*spec.field_mm),
            rng.normal(0, 0.02, 2),
            u(900, 1400),
            int(rng.integers(2**31)),
            {name: value * u(0.95, 1.05) for name, value in room.exposure.items()},  # set anew each time
            room.collimated,
            room.colour,
            room.seed,
        )


class Projector:
    """Maps local points of a scene's bodies to fine pixels of one film."""

    def __init__(self, scene: Scene, settings: Settings):
        """Take the scene's pose and the film's geometry."""
        self.frames = scene.frames(settings.angles)
        self.settings, self.patient, self.side = settings, scene.patient, scene.side
        height, width = settings.shape
        self.size = (height * SUPERSAMPLE + 2 * MARGIN, width * SUPERSAMPLE + 2 * MARGIN)
        self.scale = SUPERSAMPLE * max(settings.shape) / settings.field_mm  # fine pixels per mm at the target
        self.magnify = self.scale * scene.patient.scale[scene.side]
        self.mirror = 1 if scene.side == "R" else -1
        self.slender = scene.patient.slender

    def __call__(self, body: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Project points: perspective, then the patient's bend.

        Parameters
        ----------
        body : str
            Of the joint tree.
        points : ndarray (N, 3)
            In the body's frame, mm.

        Returns
        -------
        x, y : ndarray (N,) float32
            In fine pixels.
        """
        s, (rotation, origin) = self.settings, self.frames[body]
        matrix = (s.camera @ rotation * self.slender).astype(np.float32)
        q = matrix @ points.T  # (3, N): rows lie together in memory
        q += (s.camera @ (origin - s.target)).astype(np.float32)[:, None]
        grow = np.float32(self.magnify) / (1 + q[2] * np.float32(1 / s.distance))
        ax, ay, px, py = (np.float32(b) for b in self.patient.bend)
        x, y = q[0] * grow, q[1] * grow
        wave = np.float32(2.2 / (s.field_mm * self.scale))
        x += ax * np.float32(self.scale) * np.sin(y * wave + px)
        y += ay * np.float32(self.scale) * np.sin(x * wave + py)
        dx, dy = s.offset * max(s.shape) * SUPERSAMPLE
        return x * np.float32(self.mirror) + np.float32(self.size[1] / 2 + dx), y + np.float32(
            self.size[0] / 2 + dy
        )

    def splat(self, x: np.ndarray, y: np.ndarray, mass: np.ndarray) -> np.ndarray:
        """Add projected points up to a thickness image.

        Parameters
        ----------
        x, y : ndarray (N,)
            In fine pixels.
        mass : ndarray (N,)
            In mm^3 of cortical bone.

        Returns
        -------
        ndarray (fine H, fine W) float32
            In mm of cortical bone.
        """
        growth = (
            self.patient.slender.prod() * self.patient.scale[self.side] ** 3
        )  # bigger bones hold more mineral
        return add_up(x, y, mass, self.size) * np.float32(growth * self.scale**2)


def add_up(x: np.ndarray, y: np.ndarray, weight: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sum the weights that fall into each pixel; points outside fall on the rim, which is cleared.

    Parameters
    ----------
    x, y, weight : ndarray (N,)
    size : tuple of int
        Height and width.

    Returns
    -------
    ndarray (height, width) float32
    """
    height, width = size
    index = np.clip(y, 0, height - 1).astype(np.intp)
    index *= width
    index += np.clip(x, 0, width - 1).astype(np.intp)
    image = np.bincount(index, weight, height * width).reshape(size).astype(np.float32)
    image[[0, -1]] = 0
    image[:, [0, -1]] = 0
    return image


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur an image with a Gaussian of `sigma` pixels, and mirrored edges."""
    return cv2.GaussianBlur(image, (0, 0), float(sigma), borderType=cv2.BORDER_REFLECT)


def project(scene: Scene, projector: Projector) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project a scene.

    Returns
    -------
    bone, metal, soft : ndarray (H, W) float32
        Thickness in mm, in the film's pixels.
    """
    bone = np.zeros(projector.size, np.float32)
    for pitch in {cloud.pitch for cloud in scene.bones.values()}:  # a point stands for a whole voxel
        shown = [name for name, cloud in scene.bones.items() if cloud.pitch == pitch]
        if hides_chest(scene, projector.settings.view):
            shown = [name for name in shown if name != "thorax"]
        placed = [(*projector(scene.body(b), scene.bones[b].points), scene.bones[b].mass) for b in shown]
        if placed:
            layer = projector.splat(*(np.concatenate(column) for column in zip(*placed, strict=True)))
            bone += blur(layer, min(3.0, 0.6 * pitch * projector.scale))
    bone *= np.float32(scene.patient.density[scene.side])
    soft, layers = soft_tissue(scene, projector), []
    for items in (scene.added, scene.metal, scene.veils):
        layer = np.zeros_like(bone)
        for body, points, mass in items:
            layer += projector.splat(*projector(body, points), mass)
        layers.append(layer)
    return to_film(bone + layers[0]), to_film(layers[1]), to_film(soft + layers[2])


def to_film(fine: np.ndarray) -> np.ndarray:
    """Cut the margin off a fine image and average 2 x 2 of its pixels: float32 (H, W)."""
    inner = fine[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return cv2.resize(inner, None, fx=1 / SUPERSAMPLE, fy=1 / SUPERSAMPLE, interpolation=cv2.INTER_AREA)


def finding_box(scene: Scene, projector: Projector, opening: np.ndarray) -> tuple | None:
    """Find the finding on the film.

    Parameters
    ----------
    scene : Scene
    projector : Projector
    opening : ndarray (H, W)
        What `film.shutters` leave open.

    Returns
    -------
    tuple of int, or None
        x0, y0, x1, y1 in pixels; None where less than half of the finding can be seen.
    """
    if not scene.tags:
        return None
    x, y = (
        np.concatenate(c)
        for c in zip(*(projector(b, p.astype(np.float32)) for b, p in scene.tags), strict=True)
    )
    x, y = (x - MARGIN) / SUPERSAMPLE, (y - MARGIN) / SUPERSAMPLE
    height, width = projector.settings.shape
    seen = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    seen[seen] = opening[y[seen].astype(int), x[seen].astype(int)] > 0.5
    if seen.mean() < 0.5:
        return None
    x0, x1 = np.quantile(x[seen], [0.002, 0.998])
    y0, y1 = np.quantile(y[seen], [0.002, 0.998])
    if x1 - x0 <= 1 or y1 - y0 <= 1:
        return None
    # A pixel more on each side: what is sharp in the scene is blurred on the film.
    return max(0, int(x0) - 1), max(0, int(y0) - 1), min(width, int(x1) + 2), min(height, int(y1) + 2)
