"""Races the input pipelines of chapter 4: its peers, whose cells are taken from the chapter, and `Batches`.

    python benchmarks/input_pipelines.py [--films 512] [--rounds 5] [--seconds 3]

All deliver KL's "train augmented" (224 px, RGB float32 in 0..1, batches of 64, rotation up to 30 degrees,
flip) from the same PNG films, written to a temporary folder, which is all that this writes. Each pipeline
lives in a process of its own; the rounds take turns, so that whatever else the machine does falls on all
alike, and those that wait for their turn are halted (not on Windows).

Prints images/s (median over the rounds), the ratios, the processor time that an image costs (Linux; other
load changes it least), each process's peak memory, and the fraction of its time that a consumer of 2,000
images/s (a small GPU in mixed precision) waits for data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

SIZE, BATCH, ROTATION, CONSUMER = 224, 64, 30.0, 2000
CHAPTER = Path(__file__).resolve().parents[1] / "book" / "04_input_pipelines.ipynb"
PEERS = (
    "ImageDataGenerator (KL)",
    "tf.data",
    "tf.data, cached",
    "torchvision",
    "torchvision, decoded",
)
OURS = ("Batches", "Batches.keras()", "Batches.torch()")
# Ours, the peer that it is compared with, and how many times faster it should be.
TARGETS = (
    ("Batches", "ImageDataGenerator (KL)", 25),
    ("Batches.keras()", "tf.data, cached", 3),
    ("Batches.torch()", "torchvision, decoded", 6),
)


def write_films(folder: Path, count: int) -> None:
    """Grey PNG files of 320 px, as smooth and as noisy as films, in two folders named for their label."""
    rng = np.random.default_rng(0)
    for number in range(count):
        shape = (320, int(rng.integers(200, 320)))
        blobs = cv2.resize(rng.random((10, 8), np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
        film = np.clip(200 * blobs + rng.normal(0, 3, shape), 0, 255).astype(np.uint8)
        place = folder / "train" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number:05d}.png"), film)


def film_index(folder: Path) -> pd.DataFrame:
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob("train/*/*.png"))
    index = pd.DataFrame({"path": paths, "split": "train", "body_part": "HAND"})
    index["label"] = [int(path[6]) for path in paths]
    index["file"] = [str(folder / path) for path in paths]
    index.attrs = {"root": str(folder), "name": "synthetic", "is_demo": True}
    return index


# --- The pipelines: each an endless iterator over (x, y) ----------------------------------------------


def peer(name: str, films: pd.DataFrame) -> Iterator:
    """One of the chapter's, made by its cells with the tag "pipelines"."""
    known: dict = {"SIZE": SIZE, "BATCH": BATCH, "DEGREES": ROTATION}
    for cell in json.loads(CHAPTER.read_text("utf-8"))["cells"]:
        if "pipelines" in cell["metadata"].get("tags", ()):
            exec("".join(cell["source"]), known)
    return endless(known["PEERS"][name](films))


def ours(name: str, films: pd.DataFrame) -> Iterator:
    from mura_course import data

    index = pd.concat([films] * 8)  # so that an epoch, which ends with idle threads, is as long as real ones
    store = data.PixelStore.open_or_build(index, SIZE, progress=False)
    made = data.Batches(store, index, BATCH, shuffle=True, augment=data.KL_AUGMENT, drop_last=True)
    return endless(
        {"Batches": lambda: made, "Batches.keras()": made.keras, "Batches.torch()": made.torch}[name]()
    )


def endless(batches) -> Iterator:
    while True:
        yield from batches


# --- Measuring ----------------------------------------------------------------------------------------


def drain(stream: Iterator, seconds: float, pause: float = 0.0) -> tuple[float, float, float]:
    """Take batches for so long, pausing after each: images/s, fraction of time waited, CPU ms an image."""
    for _ in range(6):  # what was fetched ahead while other pipelines had their turn
        next(stream)
    images = waited = 0.0
    start, worked = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - start < seconds:
        asked = time.perf_counter()
        x, _ = next(stream)
        waited += time.perf_counter() - asked
        images += len(x)
        time.sleep(pause)
    total = time.perf_counter() - start
    return images / total, waited / total, 1000 * (cpu_seconds() - worked) / images


def family() -> list[Path]:
    """Folders in /proc of this process and its living children; empty where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if os.getpid() in (int(stat.parent.name), parent):
                found.append(stat.parent)
    return found


def cpu_seconds() -> float:
    """Processor time of this process and its children so far; NaN where /proc does not tell."""
    stats = [(folder / "stat").read_text().rpartition(")")[2].split() for folder in family()]
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in stats)
    return ticks / os.sysconf("SC_CLK_TCK") if stats else float("nan")


def peak_memory() -> float:
    """Peak resident memory of this process plus its largest living child's, in MB; NaN without /proc."""
    peaks = {folder.name: (folder / "status").read_text() for folder in family()}
    peaks = {pid: int(text.partition("VmHWM:")[2].split()[0]) / 1e3 for pid, text in peaks.items()}
    own = peaks.pop(str(os.getpid()), float("nan"))
    return own + max(peaks.values(), default=0.0)


def serve(name: str, folder: Path) -> None:
    """Answer each line on standard input, "SECONDS PAUSE", with a line "RATE WAIT CPU MEGABYTES"."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print to standard output, too
    films = film_index(folder)
    stream = (peer if name in PEERS else ours)(name, films)
    for _ in range(len(films) // BATCH + 4):  # one epoch first: caches are full
        x, _ = next(stream)
    shape = tuple(x.shape)
    assert shape in {(BATCH, SIZE, SIZE, 3), (BATCH, 3, SIZE, SIZE)} and "float32" in str(x.dtype), shape
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        seconds, pause = map(float, line.split())
        print(*drain(stream, seconds, pause), peak_memory(), file=answers, flush=True)


def start(name: str, folder: Path) -> subprocess.Popen:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    environment["MURA_CACHE"] = str(folder / "cache")
    command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / f"{name}.log").open("w"),  # noqa: SIM115 - the process writes on
        start_new_session=True,  # so that `awake` reaches its workers, too
    )
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{name} did not start:\n{(folder / f'{name}.log').read_text()[-2000:]}")
    awake(process, False)
    return process


def ask(process: subprocess.Popen, seconds: float, pause: float = 0.0) -> tuple[float, ...]:
    awake(process, True)
    print(seconds, pause, file=process.stdin, flush=True)
    answer = tuple(map(float, process.stdout.readline().split()))
    awake(process, False)
    return answer


def awake(process: subprocess.Popen, wanted: bool) -> None:
    """Halt a pipeline, or let it go on: what it fetches ahead would take the others' time."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGCONT if wanted else signal.SIGSTOP)


def race(folder: Path, rounds: int, seconds: float) -> pd.DataFrame:
    """One row per pipeline: images/s (median, lowest, highest), CPU ms, a consumer's wait, MB."""
    processes = {name: start(name, folder) for name in PEERS + OURS}
    rates: dict[str, list] = {name: [] for name in PEERS + OURS}
    waits: dict[str, list] = {name: [] for name in PEERS + OURS}
    costs: dict[str, list] = {name: [] for name in PEERS + OURS}
    memory = {}
    for _ in range(rounds):
        for name, process in processes.items():
            rate, _, cost, _ = ask(process, seconds)
            rates[name].append(rate)
            costs[name].append(cost)
    for _ in range(rounds):
        for name, process in processes.items():
            _, wait, _, memory[name] = ask(process, seconds, BATCH / CONSUMER)
            waits[name].append(wait)
    for process in processes.values():
        awake(process, True)
        process.stdin.close()
        process.terminate()
    return pd.DataFrame(
        {
            "images/s": {name: statistics.median(values) for name, values in rates.items()},
            "lowest": {name: min(values) for name, values in rates.items()},
            "highest": {name: max(values) for name, values in rates.items()},
            "CPU ms": {name: statistics.median(values) for name, values in costs.items()},
            "wait %": {name: 100 * statistics.median(values) for name, values in waits.items()},
            "peak MB": memory,
        }
    )


def report(table: pd.DataFrame) -> str:
    rate = table["images/s"]
    shown = table.assign(**{"x ImageDataGenerator": rate / rate[PEERS[0]]})
    shown = shown.round({"images/s": 0, "lowest": 0, "highest": 0, "peak MB": 0, "CPU ms": 2}).round(2)
    waits = f"\nwait %: of the time of a consumer of {CONSUMER:,} images/s; medians over interleaved rounds"
    return "\n".join([shown.to_string(), waits, *(compare(table, *target) for target in TARGETS)])


def compare(table: pd.DataFrame, ours: str, theirs: str, target: int) -> str:
    medians, best = (
        table.loc[ours, column] / table.loc[theirs, column] for column in ("images/s", "highest")
    )
    return f"{ours}: {medians:.1f} x {theirs} (best rounds {best:.1f}; target {target})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--films", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--serve", choices=PEERS + OURS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.folder)
    with tempfile.TemporaryDirectory() as folder:
        write_films(Path(folder), options.films)
        print(f"{options.films} films of 320 px, {SIZE} px, batches of {BATCH}, {os.cpu_count()} cores")
        print(report(race(Path(folder), options.rounds, options.seconds)))


if __name__ == "__main__":
    main()
