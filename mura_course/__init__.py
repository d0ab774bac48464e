"""The thin package behind the course book on abnormality detection in bone X-rays.

Importing it loads nothing: no TensorFlow, no torch, not even pandas. Import the room that you need,
for example ``from mura_course import data``.
"""

__version__ = "0.2.0"
