"""Room text: finds text burned into films and removes it. Chapter 2 explains it.

Uses `data` for whole data sets, and no framework: keras-ocr's runs in a process of its own.
"""

# ruff: noqa: F401 - the room's public names
from .boxes import Found
from .removal import DETECTORS, clean_dataset, get_detector, inpaint, remove_text
