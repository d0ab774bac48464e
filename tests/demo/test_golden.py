"""The films of the recipe in use, kept as 16 x 16 means: whoever changes how films look raises `RECIPE`.

Written anew, after `RECIPE` was raised, by `python tests/demo/test_golden.py`.
"""

from pathlib import Path

import cv2
import numpy as np

from mura_course.paths import cache_dir
from mura_demo import RECIPE, studies

TILE, TOLERANCE = 16, 1  # grey level: other versions of NumPy and OpenCV round differently, no more
GOLDEN = Path(__file__).with_name(f"golden_recipe{RECIPE}.png")


def tiles(bones):
    """(TILE, 12 x TILE) uint8: a normal film of each body part, then a film with each finding."""
    planned = studies.plan(200, 5)
    normal = [next(s for s in planned if s.part == part and not s.label) for part in studies.MURA]
    found = [next(s for s in planned if s.finding == finding) for finding in studies.FINDING_FRACTIONS]
    films = [next(studies.film_study(s, 5, 128, bones))[1].image for s in [*normal, *found]]
    grey = [image if image.ndim == 2 else image[..., 0] for image in films]
    return np.hstack([cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA) for image in grey])


def test_films_look_as_their_recipe_says():
    """Fault 1: the identity of the films is a number raised by hand, so a changed film must not pass."""
    golden = cv2.imread(str(GOLDEN), cv2.IMREAD_GRAYSCALE)
    assert golden is not None, f"{GOLDEN.name} is missing: see the head of this file"
    difference = np.abs(tiles(cache_dir() / "bones").astype(int) - golden)
    assert difference.max() <= TOLERANCE, "the films look different: raise RECIPE, then see this file's head"


if __name__ == "__main__":
    cv2.imwrite(str(GOLDEN), tiles(cache_dir() / "bones"))
