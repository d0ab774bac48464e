"""Runs killed at random moments, and whether they end as one that nothing disturbed: for both frameworks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from mura_course import runs


def in_a_process(code: str) -> list[int]:
    """Run `code`, which ends with `kill_at_random`, and return what that printed."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kill_at_random(
    one_run: Callable, epochs_done: Callable[[Path], int], folder: Path, kills: int, seed: int
) -> None:
    """Make one run undisturbed and one that is killed `kills` times; print the epochs done at each kill.

    one_run(root, pause): makes the run below root. epochs_done(root): how many epochs its checkpoints hold.
    Each attempt is a fork of this process, which has imported the framework but not started it.
    """
    rng = random.Random(seed)
    Fork(one_run, folder / "undisturbed").wait()
    killed, happened = folder / "killed", []
    while len(happened) < kills:
        target = epochs_done(killed) + rng.randint(0, 3)  # more than the last time
        process = Fork(one_run, killed, 0.01)
        while process.alive() and epochs_done(killed) < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        if not process.alive():
            break
        process.kill()
        happened.append(epochs_done(killed))
        for file in killed.glob("*/*/*-????????/run.json"):
            runs.load(file.parent)
    Fork(one_run, killed).wait()
    print(json.dumps(happened))


class Fork:
    """A fork of this process that makes the run, without its output."""

    def __init__(self, one_run: Callable, root: Path, pause: float = 0.0):
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                sys.stdout = open(os.devnull, "w")
                one_run(root, pause)
                code = 0
            finally:
                os._exit(code)
        self.code = None

    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = status if pid else None
        return self.code is None

    def wait(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"the run ended with status {status}"

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def assert_killed_equals_undisturbed(folder: Path, weights_of: Callable) -> runs.Run:
    """Bit for bit: history, predictions, and the arrays that weights_of(run) returns."""
    (undisturbed,), (killed,) = (
        [*(folder / name).glob("*/*/*-????????")] for name in ("undisturbed", "killed")
    )
    a, b = runs.load(undisturbed), runs.load(killed)
    pd.testing.assert_frame_equal(
        a.history.drop(columns="seconds"), b.history.drop(columns="seconds"), check_exact=True
    )
    pd.testing.assert_frame_equal(a.predictions, b.predictions, check_exact=True)
    for x, y in zip(weights_of(a), weights_of(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not list((folder / "killed").glob("*/*/*.partial"))
    return a
