"""Room `data`: from a folder in MURA's layout to batches of images. Chapters 1, 3 and 4 explain it.

Knows the foundation; no framework, no later stage. The module `check` compares a folder with
what it must hold.
"""

# ruff: noqa: F401 - the room's public names
from .batches import (
    AUGMENTS,
    KL_AUGMENT,
    SCALES,
    Augment,
    Batches,
    autocontrast,
    check_scale,
    kl_datasets,
    kn_datasets,
    rotate,
)
from .floors import floors, white_fraction
from .index import BODY_PARTS, fingerprint, image_path, image_paths, load_index, load_truth, pixel_key
from .splits import sample_patients, split_dev
from .store import PixelStore, read_image, resize
