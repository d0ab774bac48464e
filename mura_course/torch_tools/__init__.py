"""The PyTorch half (KN; chapters 7 to 9): `models`, `training`. The only place that imports torch.

Importing this room imports torch, torchvision, TorchMetrics and Lightning. Where TensorFlow came first, torch
is told for the length of these imports that Triton, its compiler for GPUs, does not exist: loaded after
TensorFlow it crashes the process, and nothing here uses it.
"""

import sys

tensorflow_came_first = "tensorflow" in sys.modules and "triton" not in sys.modules
if tensorflow_came_first:
    sys.modules["triton"] = None  # type: ignore[assignment]  # Python's way to say that it does not exist
try:
    import lightning  # noqa: F401 - and with it TorchMetrics
    import torchvision  # noqa: F401
finally:
    if tensorflow_came_first:
        del sys.modules["triton"]
