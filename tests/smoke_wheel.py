"""The wheel, used as a stranger would: `python smoke_wheel.py FOLDER`, where FOLDER is what it was installed into."""

import subprocess
import sys
import tempfile
from pathlib import Path

import segprune


def main(installed: Path) -> None:
    assert Path(segprune.__file__).is_relative_to(installed), (
        f"{segprune.__file__} is not the wheel's"
    )
    assert (Path(segprune.__file__).parent / "py.typed").is_file()
    with tempfile.TemporaryDirectory() as folder:
        command = [installed / "bin" / "segprune"]

        def call(*flags: str) -> None:
            subprocess.run(
                [sys.executable, *command, *flags],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        call("--help")
        call("shapes", "data", "--num_train", "8", "--num_val", "2", "--size", "32", "32")
        size = ("--input_shape", "32", "32")
        call(
            "prune",
            "--phi",
            "b0",
            *size,
            "--data",
            "data",
            "--epochs",
            "1",
            "--num_workers",
            "0",
        )
        pruned = "logs_pruning/l1/b0/b0_pruned_0.5.pth"
        call("info", pruned)
        call("eval", pruned, "--data", "data", *size, "--num_workers", "0")
        segprune.load(Path(folder, pruned))
    print("wheel: installed, pruned, scored and loaded outside the clone")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
