"""Renders the demo data: radiographs of synthetic patients, from bone meshes, in MURA's folder layout.

Knows nothing of `mura_course`: folders are handed in, errors are ValueError and OSError whose message names
the file and the remedy. The appendix `a_demo_radiographs` explains every step.
"""

from .dataset import ensure_demo, read_manifest, text_free_twins, write_demo
from .known import KnownFilm, known_films
from .recipe import RECIPE

__all__ = [
    "RECIPE",
    "KnownFilm",
    "ensure_demo",
    "known_films",
    "read_manifest",
    "text_free_twins",
    "write_demo",
]
