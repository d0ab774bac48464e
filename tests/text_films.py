"""Plain films with text drawn by OpenCV, whose truth is known; and work for a process beside the tests'."""

import cv2
import numpy as np

from mura_course.text import craft


def film(height=320, width=240, seed=0):
    """Noise on flesh on black, and a bone with a bright, uneven rim: nothing on it is text."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    across = np.abs(x - width / 2 - 6 * np.sin(y / 40)) / width
    flesh, bone = np.clip(1.25 - 4 * across, 0, 1), across < 0.09
    grey = 12 + 70 * flesh + 90 * bone + 40 * (np.abs(across - 0.085) < 0.012)
    grain = cv2.GaussianBlur(rng.normal(0, 26, (height, width)), (0, 0), 1.2)
    noise = grain * (0.2 + 1.2 * (across < 0.1)) + rng.normal(0, 2, grey.shape)
    return np.clip(grey + noise, 0, 255).astype(np.uint8)


def write_on(image, text="L", at=(20, 40), scale=0.8, level=225, thick=2):
    """A copy with the text, and where it is."""
    written = cv2.putText(image.copy(), text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, level, thick, cv2.LINE_AA)
    return written, written != image


def save_untrained(file):
    """Write weights of CRAFT's shape; returns which Keras made them."""
    model = craft._craft("").model
    model.save_weights(file)
    return type(model).__module__
