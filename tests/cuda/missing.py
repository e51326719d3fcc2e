"""Prints those wheels of a folder whose distribution is not installed: `python tests/cuda/missing.py FOLDER`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing_wheels(folder: Path) -> list[Path]:
    """Returns the wheels of `folder` to install; what the machine has is taken as it is, whatever its version."""
    wheels = []
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.split("-")[0]
        try:
            version(name)
        except PackageNotFoundError:
            wheels.append(wheel)
    return wheels


if __name__ == "__main__":
    sys.stdout.write("\n".join(map(str, missing_wheels(Path(sys.argv[1])))))
