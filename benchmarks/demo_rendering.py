"""How long the demo data take: the one-off build of the bone clouds, then films per second at 256 px.

    python benchmarks/demo_rendering.py [--studies 200] [--workers 2]

Works in a temporary folder. Start-up of the worker processes counts, as it does for a user.
"""

import argparse
import tempfile
import time
from pathlib import Path

from mura_demo import anatomy, read_manifest, write_demo


def main() -> None:
    """Build, render, print seconds and films per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        began = time.perf_counter()
        for part in anatomy.PARTS:
            anatomy.clouds(part, cache / "bones")
        print(f"bone clouds: {time.perf_counter() - began:.1f} s, once")
        for side in (256, 320):
            began = time.perf_counter()
            order = {"long_side": side, "workers": options.workers, "cache": cache}
            data = write_demo(cache / str(side), options.studies, **order)
            seconds = time.perf_counter() - began
            films = read_manifest(data)["images"]
            print(f"{side} px: {films} films in {seconds:.1f} s, {films / seconds:.0f} films/s")


if __name__ == "__main__":
    main()
