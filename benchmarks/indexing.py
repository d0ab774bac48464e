"""How much processor time the index costs: MURA's size and ten times that, on empty temporary files.

    python benchmarks/indexing.py [--rows 40000 400000]

Times are user and system seconds of this process, the least of three, so that a busy machine matters little.
The listing of every folder, to see that each image is there, is included.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mura_course import data

VIEWS = 4


def write_layout(root: Path, rows: int) -> None:
    """Folders, empty image files and the four CSV files of a data set with so many images."""
    lines = {
        f"{split}_{kind}": [] for split in ("train", "valid") for kind in ("image_paths", "labeled_studies")
    }
    for patient in range(1, rows // VIEWS + 1):
        split, positive = ("valid" if patient % 10 == 0 else "train"), patient % 3 == 0
        sign = "positive" if positive else "negative"
        study = f"{split}/XR_{data.BODY_PARTS[patient % 7]}/patient{patient:06d}/study1_{sign}"
        (root / study).mkdir(parents=True)
        lines[f"{split}_labeled_studies"].append(f"MURA-v1.1/{study}/,{int(positive)}\n")
        for view in range(1, VIEWS + 1):
            (root / study / f"image{view}.png").touch()
            lines[f"{split}_image_paths"].append(f"MURA-v1.1/{study}/image{view}.png\n")
    for name, text in lines.items():
        (root / f"{name}.csv").write_text("".join(text))


def cost(call: Callable) -> float:
    """Processor seconds of `call`, the least of three."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    """Write, then index, name and split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[40_000, 400_000])
    for rows in parser.parse_args().rows:
        with tempfile.TemporaryDirectory() as folder:
            write_layout(Path(folder), rows)
            index = data.load_index(folder, quiet=True)
            assert len(index) == rows
            steps = {
                "load_index": lambda folder=folder: data.load_index(folder, quiet=True),
                "fingerprint": lambda index=index: data.fingerprint(index),
                "pixel_key": lambda index=index: data.pixel_key(index),
            }
            for name, call in steps.items():
                seconds = cost(call)
                print(f"{rows:,} rows: {name} {seconds:.2f} CPU s, {1e6 * seconds / rows:.0f} us a row")
        # As many rows a patient as above; the split's cost grows with patients and folds, not with files.
        if rows <= 40_000:
            print(f"{rows:,} rows: split_dev {cost(lambda index=index: data.split_dev(index)):.2f} CPU s")


if __name__ == "__main__":
    main()
