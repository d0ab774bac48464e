"""The arm's joint tree: which bone hangs on which, and where all of them are in a pose.

Reads the model files of the installed `myo-sim` package; writes nothing.  Lengths in mm, angles in radians.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET  # of files that an installed package brings, so not untrusted
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .bones import models_folder


class Skeleton:
    """Joint tree of the right arm: joints are hinges at their body's origin, no body is rotated at rest."""

    def __init__(self, assets: Path):
        """Read `myoarm_r_chain.xml` and the shoulder's coupled joints from `myoarm_r_assets.xml`."""
        self.parent: dict[str, str | None] = {}
        self.position: dict[str, np.ndarray] = {}
        self.hinges: dict[str, list[tuple[str, np.ndarray]]] = {}
        self.body_of: dict[str, str] = {}
        chain, shoulder = (
            ET.parse(assets / f"myoarm_r_{name}.xml").getroot()  # noqa: S314
            for name in ("chain", "assets")
        )
        self._walk(chain, None)
        self.body_of["thorax"] = "thorax"
        rows = [j.attrib for j in shoulder.iter("joint") if j.get("polycoef")]
        self.coupled = [(j["joint1"], j["joint2"], float(j["polycoef"].split()[1])) for j in rows]
        self.joints = {name for hinges in self.hinges.values() for name, _ in hinges}

    def _walk(self, element: ET.Element, parent: str | None) -> None:
        for body in element.findall("body"):
            name = body.attrib["name"]
            self.parent[name] = parent
            self.position[name] = np.array(body.attrib["pos"].split(), float) * 1000
            joints = [joint.attrib for joint in body.findall("joint")]
            hinges = [(j["name"], np.array(j["axis"].split(), float)) for j in joints]
            self.hinges[name] = [(joint, axis / np.linalg.norm(axis)) for joint, axis in hinges]
            for mesh in (g.get("mesh") for g in body.findall("geom")):
                if mesh:
                    self.body_of[mesh.removesuffix("_r")] = name
            self._walk(body, name)

    def pose(self, angles: dict[str, float], moved: dict | None = None) -> dict[str, tuple]:
        """Place every body in the world.

        Parameters
        ----------
        angles : dict
            Joint angles in radians; joints that are left out are at rest.
        moved : dict, optional
            By body: (rotation, shift) in its parent's frame, a displacement such as a subluxation.

        Returns
        -------
        dict
            By body: rotation (3, 3) and origin (3,) in mm.

        Raises
        ------
        KeyError
            A joint that the model does not have.
        """
        unknown = set(angles) - self.joints
        if unknown:
            raise KeyError(f"no such joints in MyoSim's arm: {', '.join(sorted(unknown))}")
        angles = {a: k * angles.get(b, 0.0) for a, b, k in self.coupled} | angles
        frames: dict = {None: (np.eye(3), np.zeros(3)), "thorax": (np.eye(3), np.array([-37.0, 13.0, -25.0]))}
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


def rotation_about(axis: ArrayLike, angle: float) -> np.ndarray:
    """Make the rotation (3, 3) by `angle` radians about `axis` (3,), by Rodrigues' formula."""
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
    """Read the arm's joint tree, once."""
    return Skeleton(models_folder() / "arm" / "assets")
