"""Fail, saying what to do, where TensorFlow or PyTorch sees no GPU: else tests "on a GPU" prove nothing."""

from __future__ import annotations

import sys

REMEDY = {
    "TensorFlow": '.venv/bin/pip install "tensorflow[and-cuda]" -c constraints.txt',
    "PyTorch": ".venv/bin/pip install --force-reinstall torch torchvision -c constraints.txt",
}


def gpus() -> dict[str, list[str]]:
    """Names of the GPUs that each framework sees."""
    import tensorflow
    import torch

    devices = tensorflow.config.list_physical_devices("GPU")
    names = [tensorflow.config.experimental.get_device_details(d).get("device_name", d.name) for d in devices]
    return {
        "TensorFlow": names,
        "PyTorch": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def main() -> int:
    """Print what each framework sees; the exit code."""
    found = gpus()
    for framework, names in found.items():
        print(
            f"{framework}: {', '.join(names)}" if names else f"{framework} sees no GPU: {REMEDY[framework]}"
        )
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
