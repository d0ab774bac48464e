"""Soft tissue of the demo radiographs: muscles around chains of bones, fat and skin around them, the chest.

Works on a coarse grid, because soft tissue is smooth.  Images are float32 (H, W) of thickness in mm of
muscle.  Explained in the appendix `a_demo_radiographs`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from .bones import models_folder, read_stl

if TYPE_CHECKING:
    from .anatomy import Scene
    from .projection import Projector

COARSE = 4  # fine pixels a grid cell
FAT = 0.78  # how much fat stops, as a fraction of muscle
SKIN = 1.6  # mm
PALM = np.array([0, 0, -1.0])  # of a hanging arm, in the frames of its bones

# Radius of arm or finger about a bone's axis, mm, evenly spaced from the bone's upper to its lower end.
RADIUS = {
    "humerus": (40, 45, 44, 42, 40, 38, 35, 31, 25),
    "ulna": (20, 28, 31, 29, 26, 23, 20, 17, 16),
    "radius": (25, 30, 32, 30, 27, 24, 21, 20, 20),
    "clavicle": (13, 15, 20),
    "scapula": (19, 22, 17),
    "1mc": (17, 18, 16, 14),
    **dict.fromkeys(("2mc", "3mc", "4mc", "5mc"), (16, 15, 14, 13)),
    "thumbprox": (13, 11.5, 11),
    "thumbdist": (11, 11, 10.5, 8),
    **{f"{i}proxph": (12, 10.5, 9.8, 9.5) for i in range(2, 6)},
    **{f"{i}midph": (9.3, 8.8, 8.6) for i in range(2, 6)},
    **{f"{i}distph": (8.6, 8.4, 8, 5.5) for i in range(2, 6)},
}
# Bones that lie in one tube of flesh, from above to below. Carpal bones lie within the first two.
CHAINS = [
    ("humerus", "ulna", "4mc", "4proxph", "4midph", "4distph"),
    ("radius", "3mc", "3proxph", "3midph", "3distph"),
    ("1mc", "thumbprox", "thumbdist"),
    ("2mc", "2proxph", "2midph", "2distph"),
    ("5mc", "5proxph", "5midph", "5distph"),
    ("clavicle",),
    ("scapula",),
]
# Muscles lie beside a bone: bone, place along it from 0 to 1, offset in its frame and radius, in mm.
MUSCLES = [
    ("humerus", (0.05, 0.5), (6, 0, 16), 20),  # deltoid
    ("humerus", (0.35, 0.95), (20, 0, 0), 17),  # biceps
    ("humerus", (0.2, 0.95), (-19, 0, 0), 19),  # triceps
    ("ulna", (0.02, 0.55), (10, 0, -10), 15),  # flexors
    ("radius", (0.02, 0.55), (-2, 0, 12), 12),  # extensors
    ("radius", (0.0, 0.45), (12, 0, 2), 11),  # brachioradialis
    ("1mc", (0.1, 0.95), (0, 0, -8), 9),  # thenar
    ("5mc", (0.1, 0.95), (-4, 0, -6), 7),  # hypothenar
]


@cache
def centreline(bone: str, count: int) -> np.ndarray:
    """Find points on a bone's axis, from its upper to its lower end: (count, 3), mm, in its frame."""
    corners = read_stl(models_folder() / "meshes" / f"{bone}.stl").reshape(-1, 3)
    middle = corners.mean(0)
    axis = np.linalg.eigh(np.cov((corners - middle).T))[1][:, -1]
    axis = -axis if axis[1] > 0 else axis
    ends = (corners - middle) @ axis
    return middle + np.linspace(ends.min(), ends.max(), count)[:, None] * axis


class Grid:
    """The coarse grid of one film, on which tubes of flesh are drawn."""

    def __init__(self, projector: Projector) -> None:
        """Take the film's size and scale."""
        self.projector = projector
        self.size = tuple(-(-side // COARSE) for side in projector.size)
        self.scale = projector.scale / COARSE  # cells per mm
        self.rows, self.columns = np.indices(self.size, np.float32)

    def place(self, body: str, points: np.ndarray) -> np.ndarray:
        """Project points (N, 3) of a body: (N, 2), column and row of the grid."""
        return np.stack(self.projector(body, points.astype(np.float32)), axis=1) / COARSE

    def tubes(self, nodes: np.ndarray, *radii: np.ndarray) -> list[np.ndarray]:
        """Draw tubes of round section about the same nodes: thickness in mm, float32 of the grid's size.

        Parameters
        ----------
        nodes : ndarray (N, 2)
            Column and row.
        *radii : ndarray (N,)
            In mm, of each tube; the first is the widest.
        """
        height, width = self.size
        squares = [np.zeros(self.size, np.float32) for _ in radii]
        for i, (a, b) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
            reach = max(radii[0][i : i + 2]) * self.scale + 1
            x0, y0 = np.clip(np.floor(np.minimum(a, b) - reach), 0, (width, height)).astype(int)
            x1, y1 = np.clip(np.ceil(np.maximum(a, b) + reach), 0, (width, height)).astype(int)
            if x0 >= x1 or y0 >= y1:
                continue
            x, y = self.columns[y0:y1, x0:x1] - np.float32(a[0]), self.rows[y0:y1, x0:x1] - np.float32(a[1])
            dx, dy = (np.float32(step) for step in b - a)
            t = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, np.float32(1e-6)), 0, 1)
            away = ((x - t * dx) ** 2 + (y - t * dy) ** 2) / np.float32(self.scale**2)
            for square, radius in zip(squares, radii, strict=True):
                part, r = square[y0:y1, x0:x1], np.float32(radius[i])
                np.maximum(part, (r + np.float32(radius[i + 1] - radius[i]) * t) ** 2 - away, out=part)
        return [2 * np.sqrt(square) for square in squares]


def soft_tissue(scene: Scene, projector: Projector) -> np.ndarray:
    """Clothe a scene's bones in muscle, fat and skin.

    Parameters
    ----------
    scene : Scene
    projector : Projector

    Returns
    -------
    ndarray (fine H, fine W) float32
        Thickness in mm of muscle.
    """
    grid, girth = Grid(projector), scene.patient.girth
    fat = 2.2 + 9 * (girth - 0.8)  # mm under the skin of the arm; a third of it in the hand
    outer, inner, muscle = (np.zeros(grid.size, np.float32) for _ in range(3))
    for chain in CHAINS:
        nodes, radius, under = _tube_of(scene, grid, [b for b in chain if b in scene.bones], girth, fat)
        if len(nodes):
            drawn = grid.tubes(nodes, radius, np.maximum(radius - SKIN, 0), np.maximum(radius - under, 0))
            for layer, tube in zip((outer, inner, muscle), drawn, strict=True):
                layer += tube**2  # tubes merge: the square root of a sum of squares
    outer, inner, muscle = (np.sqrt(layer) for layer in (outer, inner, muscle))
    for bone, ends, offset, radius in MUSCLES:
        if bone in scene.bones:
            line = centreline(bone, 9)
            at = np.linspace(*ends, 7)
            nodes = np.stack([np.interp(at, np.linspace(0, 1, 9), line[:, k]) for k in range(3)], axis=1)
            belly = radius * girth * np.sqrt(np.clip(1 - np.linspace(-1, 1, 7) ** 2, 0.05, 1))
            (drawn,) = grid.tubes(grid.place(scene.body(bone), nodes + np.array(offset) * girth), belly)
            muscle = np.maximum(muscle * 0.97, np.minimum(drawn * 1.25, muscle * 1.1))
    soft = FAT * outer + (1 - FAT) * muscle + 0.35 * (outer - inner)
    if "thorax" in scene.bones and not hides_chest(scene, projector.settings.view):
        soft = np.maximum(soft, _chest(scene, grid))
    soft = cv2.GaussianBlur(soft, (0, 0), 0.9)
    return cv2.resize(soft, projector.size[::-1], interpolation=cv2.INTER_CUBIC).clip(0)


def hides_chest(scene: Scene, view: str) -> bool:
    """Whether the arm is held away from the chest: for a humerus from the side."""
    return scene.part == "HUMERUS" and view == "LAT"


def _tube_of(scene: Scene, grid: Grid, bones: list[str], girth: float, fat: float):
    """Nodes (N, 2), radius and depth of the muscles (N,) of a chain of bones, in mm."""
    nodes, radius, under = [np.empty((0, 2))], [np.empty(0)], [np.empty(0)]
    for bone in bones:
        own = np.array(RADIUS[bone], float)
        line = centreline(bone, len(own))
        finger = own.max() < 20
        if finger:
            line = line + 0.12 * own[:, None] * PALM
            if bone.endswith(("distph", "thumbdist")):
                line[-1] += 2.5 * (line[-1] - line[-2]) / np.linalg.norm(line[-1] - line[-2])
        nodes.append(grid.place(scene.body(bone), line))
        radius.append(own * (0.5 + 0.5 * girth if finger else girth))
        under.append(np.full(len(own), SKIN + fat * (0.15 if finger else 1)))
    return np.concatenate(nodes), np.concatenate(radius), np.concatenate(under)


def _chest(scene: Scene, grid: Grid) -> np.ndarray:
    """Draw the half of the chest beside the arm: its wall, and the lung, which is mostly air."""
    wall = np.array([[-10, 60, 40], [-12, 20, 50], [-15, -60, 55], [-15, -420, 60]], float)
    lung = np.array([[-20, 5, 42], [-18, -40, 62], [-15, -110, 72], [-12, -250, 74]], float)
    girth = scene.patient.girth
    (body,) = grid.tubes(grid.place("thorax", wall), np.array([45, 72, 96, 100]) * (0.5 + 0.5 * girth))
    (air,) = grid.tubes(grid.place("thorax", lung), np.array([18, 38, 54, 60]))
    return 0.52 * body - 0.47 * np.minimum(air, body)
