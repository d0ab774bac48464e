"""One line of progress that is updated where someone watches, and that a built page keeps as it was last."""

from __future__ import annotations

import sys
import time

SECONDS = 0.5  # between two passing notes


class Line:
    """In a notebook a display that is replaced; in a terminal overwritten; elsewhere, in a log, line by line.

    show=False: nothing (a second process of one training).
    """

    def __init__(self, show: bool = True, start: str = "Training"):
        self.show, self.handle, self.shown = show, None, 0.0
        ipython = sys.modules.get("IPython")
        if show and ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None:
            self.handle = ipython.display.display({"text/plain": start}, raw=True, display_id=True)

    def passing(self, text: str) -> None:
        """What only someone who watches wants to see; often called, seldom shown."""
        now = time.perf_counter()
        if now - self.shown > SECONDS and (self.handle or sys.stdout.isatty()):
            self.shown = now
            self._write(text)

    def lasting(self, text: str) -> None:
        """A line of its own in a log."""
        if not self.handle:
            self._write(text, end="\n")

    def end(self, text: str) -> None:
        """What the page keeps."""
        if self.handle:
            self._write(text)

    def _write(self, text: str, end: str = "") -> None:
        if not self.show:
            return
        if self.handle:
            self.handle.update({"text/plain": text}, raw=True)
        else:
            start = "\r\033[K" if sys.stdout.isatty() else ""
            print(f"{start}{text}", end=end, flush=True)
