"""How long indexing takes: MURA's size and ten times that, on empty files in a temporary folder.

    python benchmarks/indexing.py [--rows 40000 400000]

The listing of every folder, to see that each image is there, is included.
"""

import argparse
import tempfile
import time
from pathlib import Path

from mura_course.data import BODY_PARTS, load_index

VIEWS = 4


def write_layout(root: Path, rows: int) -> None:
    """Folders, empty image files and the four CSV files of a data set with so many images."""
    lines = {
        f"{split}_{kind}": [] for split in ("train", "valid") for kind in ("image_paths", "labeled_studies")
    }
    for patient in range(1, rows // VIEWS + 1):
        split, positive = ("valid" if patient % 10 == 0 else "train"), patient % 3 == 0
        sign = "positive" if positive else "negative"
        study = f"{split}/XR_{BODY_PARTS[patient % 7]}/patient{patient:06d}/study1_{sign}"
        (root / study).mkdir(parents=True)
        lines[f"{split}_labeled_studies"].append(f"MURA-v1.1/{study}/,{int(positive)}\n")
        for view in range(1, VIEWS + 1):
            (root / study / f"image{view}.png").touch()
            lines[f"{split}_image_paths"].append(f"MURA-v1.1/{study}/image{view}.png\n")
    for name, text in lines.items():
        (root / f"{name}.csv").write_text("".join(text))


def main() -> None:
    """Write, index three times, print the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[40_000, 400_000])
    for rows in parser.parse_args().rows:
        with tempfile.TemporaryDirectory() as folder:
            write_layout(Path(folder), rows)
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                assert len(load_index(folder, quiet=True)) == rows
                seconds.append(time.perf_counter() - began)
        print(f"{rows:,} rows: {sorted(seconds)[1]:.2f} s, {1e6 * sorted(seconds)[1] / rows:.0f} us a row")


if __name__ == "__main__":
    main()
