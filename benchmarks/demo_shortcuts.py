"""Can the label of a demo film be read off its frame?  It must not: AUROC 0.5 within its interval.

    python benchmarks/demo_shortcuts.py [--data DIR]

Gradient boosting on image size, mode, bytes, order, border, lettering and the grey of the background, cross-
validated by patient, overall and for each finding, mean over three seeds; and the number of white pixels. The
appendix on the demo radiographs does the same in the page. Writes `benchmarks/results/demo_shortcuts.csv`.
"""

import argparse
from pathlib import Path

import pandas as pd

from mura_course.data import load_index
from mura_demo import audit

RESULTS = Path(__file__).parent / "results" / "demo_shortcuts.csv"


def main() -> None:
    """Score, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder MURA-demo; by default the course's own demo data")
    index = load_index(parser.parse_args().data)
    asked = {"frame": audit.shortcut_table(audit.frame_features(index)), "white": audit.white_pixels(index)}
    table = pd.concat(asked, names=["shortcut"]).round(3)
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS)
    print(table.to_string())


if __name__ == "__main__":
    main()
