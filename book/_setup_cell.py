# Setup, the same in every chapter: installs the course package where it is missing (Colab, Kaggle).
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("mura_course") is None:
    package = "mura-course @ git+https://github.com/mura-course/mura-course"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

from mura_course.chapter import start

profile, index = start()
