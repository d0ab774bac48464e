"""What does a network see of a demo film outside the finding's box?  It should be nothing: AUROC 0.5.

    python benchmarks/demo_boxes.py [--run FOLDER] [--data DIR]

The best recorded network is asked about the test films as they are, with the finding's box painted over, and
about the box alone. Normal films get the boxes of findings that they might have had, drawn as those of
abnormal films are, and each finding is compared with the normal films that have its boxes. The body part says
something about the label, so the scores are within the body part. What is left in painted films is a
shortcut, or the box is too small. Writes `benchmarks/results/demo_boxes.csv`.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from mura_course import data, metrics, paths, reports, runs
from mura_course.torch_tools import models
from mura_demo import audit

RESULTS = Path(__file__).parent / "results" / "demo_boxes.csv"
WAYS = {
    "whole film": lambda image, box: image,
    "box painted over": audit.fill_box,
    "box alone": audit.box_only,
}


def ask(model: torch.nn.Module, images: list[np.ndarray]) -> np.ndarray:
    """Probability of abnormal for grey uint8 images (side, side); the model's scale is -1..1."""
    said = []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            x = torch.from_numpy(np.stack(images[start : start + 64]).astype(np.float32) / 127.5 - 1)
            said.append(model(x[:, None].repeat(1, 3, 1, 1))[:, 0].sigmoid())
    return torch.cat(said).double().numpy()


def main() -> None:
    """Ask, score, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run of EfficientNet-Lite0 in PyTorch")
    parser.add_argument("--data", help="a folder MURA-demo; by default the course's own demo data")
    asked = parser.parse_args()
    recorded = sorted(paths.recorded_runs().glob("MURA-demo-*/demo/lite0_whole-*/run.json"))
    run, index = runs.load(asked.run or recorded[-1].parent), data.load_index(asked.data)
    model, side = models.load(run).eval(), run.info["config"]["size"]
    films = audit.matched_boxes(index[index["split"].eq("test")], paths.cache_dir())
    grey = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in data.image_paths(films)]
    boxes = films[audit.BOX].to_numpy()
    table = {}
    for way, change in WAYS.items():
        images = [data.resize(change(*pair), side) for pair in zip(grey, boxes, strict=True)]
        rows = films.assign(probability=ask(model, images))
        for finding in ("all", *sorted(films["finding"].unique())):
            own = rows if finding == "all" else rows[rows["finding"].eq(finding)]
            score = metrics.image_report(own).loc["OVERALL", "auroc_within"]
            table[finding, way] = reports.interval(*map(float, score[:3]), digits=3)
    shown = pd.Series(table).unstack()[list(WAYS)]
    RESULTS.parent.mkdir(exist_ok=True)
    shown.to_csv(RESULTS)
    print(f"{index.attrs['name']}, test, image level, AUROC within body part")
    print(f"{run.info['name']}, {run.info['weights']} weights")
    print(shown.to_string())


if __name__ == "__main__":
    main()
