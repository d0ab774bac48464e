"""The arm's joint tree: which bone hangs on which, and where all of them are in a pose.

Reads the model files of the installed `myo-sim` package; writes nothing.  Lengths in mm, angles in radians.
"""

import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import numpy as np

from .bones import models_folder


class Skeleton:
    """Joint tree of the right arm: joints are hinges at their body's origin, no body is rotated at rest."""

    def __init__(self, assets: Path):
        """Read `myoarm_r_chain.xml` and the shoulder's coupled joints from `myoarm_r_assets.xml`."""
        self.parent, self.position, self.hinges, self.body_of = {}, {}, {}, {}
        self._walk(ET.parse(assets / "myoarm_r_chain.xml").getroot(), None)
        self.body_of["thorax"] = "thorax"
        rows = (
            j for j in ET.parse(assets / "myoarm_r_assets.xml").getroot().iter("joint") if j.get("polycoef")
        )
        self.coupled = [(j.get("joint1"), j.get("joint2"), float(j.get("polycoef").split()[1])) for j in rows]
        self.joints = {name for hinges in self.hinges.values() for name, _ in hinges}

    def _walk(self, element: ET.Element, parent: str | None) -> None:
        for body in element.findall("body"):
            name = body.get("name")
            self.parent[name] = parent
            self.position[name] = np.array(body.get("pos").split(), float) * 1000
            hinges = [(j.get("name"), np.array(j.get("axis").split(), float)) for j in body.findall("joint")]
            self.hinges[name] = [(joint, axis / np.linalg.norm(axis)) for joint, axis in hinges]
            for mesh in (g.get("mesh") for g in body.findall("geom")):
                if mesh:
                    self.body_of[mesh.removesuffix("_r")] = name
            self._walk(body, name)

    def pose(self, angles: dict[str, float], moved: dict | None = None) -> dict[str, tuple]:
        """World frame (3x3 rotation, origin in mm) of every body for joint angles in radians.

        moved: body -> (rotation, shift) in its parent's frame, a displacement such as a subluxation.
        Raises KeyError for a joint that the model does not have.
        """
        unknown = set(angles) - self.joints
        if unknown:
            raise KeyError(f"no such joints in MyoSim's arm: {', '.join(sorted(unknown))}")
        angles = {a: k * angles.get(b, 0.0) for a, b, k in self.coupled} | angles
        frames = {None: (np.eye(3), np.zeros(3)), "thorax": (np.eye(3), np.array([-37.0, 13.0, -25.0]))}
        for body, parent in self.parent.items():
            rotation, origin = frames[parent]
            step = self.position[body]
            if moved and body in moved:
                turn, shift = moved[body]
                step, rotation_of_parent = turn @ step + shift, rotation
                origin, rotation = origin + rotation_of_parent @ step, rotation @ turn
            else:
                origin = origin + rotation @ step
            for joint, axis in self.hinges[body]:
                if angles.get(joint):
                    rotation = rotation @ rotation_about(axis, angles[joint])
            frames[body] = (rotation, origin)
        return frames


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """3x3 rotation by `angle` radians about `axis` (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.sqrt(np.dot(axis, axis))
    c, s = np.cos(angle), np.sin(angle)
    k = 1 - c
    return np.array(
        [
            [c + x * x * k, x * y * k - z * s, x * z * k + y * s],
            [y * x * k + z * s, c + y * y * k, y * z * k - x * s],
            [z * x * k - y * s, z * y * k + x * s, c + z * z * k],
        ]
    )


@cache
def skeleton() -> Skeleton:
    """The arm's joint tree, read once."""
    return Skeleton(models_folder() / "arm" / "assets")
