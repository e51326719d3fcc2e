"""`make test-cuda` takes from the wheels that were carried along what the machine lacks, and no more."""

from pathlib import Path

from tests.cuda.missing import missing_wheels


def test_only_wheels_of_distributions_that_are_not_installed_are_named(tmp_path: Path) -> None:
    lacking = tmp_path / "no_such_thing-1.0-py3-none-any.whl"
    for path in (
        lacking,
        tmp_path / "torch_pruning-9.9-py3-none-any.whl",
        tmp_path / "torch-1.0-cp311-none.whl",
    ):
        path.touch()
    assert missing_wheels(tmp_path) == [lacking]
