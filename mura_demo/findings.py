"""Findings of the demo films, by name; each edits the `Scene` that it is given, and nothing else.

So every view of the study shows it.  From subtle (severity 0) to plain (1).  Explained in the appendix
`a_demo_radiographs`.
"""

from __future__ import annotations

from .fractures import fracture
from .hardware import hardware
from .joints import degenerative, subluxation
from .lesions import lesion

__all__ = ["FINDINGS", "degenerative", "fracture", "hardware", "lesion", "subluxation"]

FINDINGS = {
    "fracture": fracture,
    "hardware": hardware,
    "lesion": lesion,
    "degenerative": degenerative,
    "subluxation": subluxation,
}
