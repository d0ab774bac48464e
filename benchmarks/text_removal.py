"""How well, and how fast, is text removed from test films of the demo data? Chapter 2's table, on more.

    python benchmarks/text_removal.py [--films 300] [--data DIR] [--threads 1]

Test films with their truth, counted by the chapter's own cells; the detectors of `mura_course.text`, and
beside them what a user would do without this package: RapidOCR with its defaults, its boxes filled as KL
1.2's recipe does. keras-ocr runs where it is installed and has or gets its weights. Seconds
include finding and inpainting, in one process, with so many threads; other load makes them worthless. Writes
`benchmarks/results/text_removal.csv`.
"""

import argparse
import time
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pandas as pd

import mura_demo
from mura_course import data, text
from mura_course.errors import MuraError
from mura_course.paths import cache_dir
from mura_course.text import boxes

RESULTS = Path(__file__).parent / "results" / "text_removal.csv"
CHAPTER = Path(__file__).parents[1] / "book" / "02_removing_text.ipynb"


def measures() -> dict:
    """What chapter 2's cells with the tag "measures" define: `score` and `summary`."""
    names = {"np": np, "pd": pd}
    for cell in nbformat.read(CHAPTER, 4).cells:
        if "measures" in cell.metadata.get("tags", ()):
            exec(cell.source, names)
    return names


class PlainRapidOCR:
    """RapidOCR as it comes: every box that it finds, filled with the recipe's line."""

    def __init__(self, threads: int) -> None:
        from rapidocr import RapidOCR

        threading = {"EngineConfig.onnxruntime.intra_op_num_threads": threads}
        self._engine = RapidOCR(params={"Global.log_level": "critical", **threading})

    def __call__(self, image: np.ndarray) -> text.Found:
        result = self._engine(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), use_cls=False, use_rec=False)
        corners = [] if result.boxes is None else result.boxes
        found = [np.float32(four) for four in corners]
        return text.Found(found, boxes.line_mask(found, image.shape))


def detectors(threads: int) -> dict:
    """Those that can run here, by the name that the table gives them."""
    found = {name: text.get_detector(name, threads) for name in ("strokes", "rapidocr")}
    found["rapidocr, all boxes filled"] = PlainRapidOCR(threads)
    try:
        found["keras-ocr, all boxes filled"] = text.get_detector("keras-ocr")
    except MuraError as error:
        print(f"Without keras-ocr: {error}")
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--films", type=int, default=300)
    parser.add_argument("--data", help="a folder MURA-demo; by default the course's own demo data")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    cv2.setNumThreads(options.threads)
    index = data.load_index(options.data)
    test = index[index["split"].eq("test")]
    studies = test["study"].drop_duplicates().sample(frac=1, random_state=0)
    rows = test.set_index("study").loc[studies].head(options.films)  # whole studies, as they are rendered
    films = list(mura_demo.known_films(index.attrs["root"], rows["path"].tolist(), cache_dir()))
    table, measure = {}, measures()
    for name, detector in detectors(options.threads).items():
        text.remove_text(films[0].image, detector)  # what is loaded late is loaded now
        seconds, counted = 0.0, []
        for film in films:
            began = time.perf_counter()
            clean, found = text.remove_text(film.image, detector)
            seconds += time.perf_counter() - began
            counted.append(measure["score"](film, found, clean))
        summary = measure["summary"](pd.DataFrame(counted))
        table[name] = summary.apply(lambda r: f"{r.value:.4g} [{r.low:.4g}, {r.high:.4g}]", axis=1).to_dict()
        table[name] |= {"films": str(len(films)), "seconds a film": f"{seconds / len(films):.4f}"}
        print(f"{name}: {seconds / len(films):.3f} s a film")
    table = pd.DataFrame(table).rename_axis(
        f"{index.attrs['name']}, test films, 95 % intervals over patients"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS)
    print(table.to_string())


if __name__ == "__main__":
    main()
