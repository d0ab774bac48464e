"""Demo films rendered anew with what is known about them: the text-free twin, the bone, the lettering.

Chapter 2 measures text removal with it. Writes nothing but the renderer's bones, in the cache folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import read_manifest
from .film import shutters, take
from .studies import plan, set_up

BONE = 0.5  # mm


@dataclass(frozen=True, eq=False)
class KnownFilm:
    """A demo film and its truth.

    Attributes
    ----------
    path, patient : str, int
        As in the index; intervals are over patients.
    image, twin : ndarray
        uint8 (H, W): the film, and the same without text, burned in or of lead. Distractors stand in both.
    bone : ndarray
        bool (H, W): the ray crosses more than `BONE` mm of bone inside the collimated field.
    texts : list of tuple
        (text, x0, y0, x1, y1) of all lettering, in pixels: the part that can be seen.
    """

    path: str
    patient: int
    image: np.ndarray
    twin: np.ndarray
    bone: np.ndarray
    texts: list[tuple]

    @property
    def text(self) -> np.ndarray:
        """Where film and twin differ, bool (H, W)."""
        return self.image != self.twin


def known_films(root: str | Path, paths: list[str], cache: Path) -> Iterator[KnownFilm]:
    """Render demo films anew with their truth, study by study, about 25 a second.

    Parameters
    ----------
    root : path
        A demo data folder, or a cleaned copy of one.
    paths : list of str
        Films, as the index names them.
    cache : Path
        As in `write_demo`.

    Raises
    ------
    ValueError
        The folder holds no demo data of this version of the renderer.
    """
    made = read_manifest(Path(root))
    planned = {study.folder: study for study in plan(made["studies"], made["seed"])}
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
        study, bones = planned[folder], cache / "bones"
        scene, settings, _ = set_up(study, made["seed"], made["long_side"], bones)
        for i, setting in enumerate(settings, start=1):
            if (path := f"{folder}/image{i}.png") in paths:
                film = take(scene, setting, steps=(steps := {}))
                image = film.image if film.image.ndim == 2 else film.image[..., 0]
                bone = (shutters(setting)[0] > 0.5) & (steps["bone"] > BONE)
                yield KnownFilm(path, study.patient, image, steps["plain"], bone, film.text_boxes)
