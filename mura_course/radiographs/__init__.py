"""Renders the demo data: radiographs of synthetic patients, from bone meshes, in MURA's folder layout."""

from .dataset import ensure_demo, text_free_twins, write_demo

__all__ = ["ensure_demo", "text_free_twins", "write_demo"]
