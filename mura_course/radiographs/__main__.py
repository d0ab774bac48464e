"""One worker of `dataset.write_demo`.

python -m mura_course.radiographs PARTIAL_FOLDER BONE_CACHE WORKER WORKERS
"""

import sys
from pathlib import Path

from .dataset import work

if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except BrokenPipeError:  # the process that asked for the films is gone
        sys.exit(1)
