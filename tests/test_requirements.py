"""The exact versions a clone runs on and the ranges of pyproject.toml say the same."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements_in(name: str) -> list[Requirement]:
    lines = (
        line.partition("#")[0].strip()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    )
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def by_name(requirements: list[Requirement]) -> dict[str, Requirement]:
    named = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    assert len(named) == len(requirements), "a name stands there twice"
    return named


def pin(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    return specifier.version


RANGES = by_name([Requirement(line) for line in PROJECT["dependencies"]])
PINS = by_name(requirements_in("requirements_pruning.txt"))
DEV = by_name(requirements_in("requirements_dev.txt"))
SERVING = requirements_in("examples/serve/requirements.txt")


@pytest.mark.parametrize("requirement", [*PINS.values(), *DEV.values()], ids=str)
def test_a_requirement_of_a_clone_is_one_exact_version(requirement: Requirement) -> None:
    assert [specifier.operator for specifier in requirement.specifier] == ["=="]
    assert re.fullmatch(r"\d+(\.\d+)*", pin(requirement))
    assert requirement.url is None
    assert not requirement.extras


def test_a_clone_installs_what_the_package_needs_and_nothing_else() -> None:
    assert PINS.keys() == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_the_exact_version_lies_in_the_range(name: str) -> None:
    assert pin(PINS[name]) in RANGES[name].specifier


@pytest.mark.parametrize("name", RANGES)
def test_a_range_starts_at_a_version_and_not_above_the_exact_one(name: str) -> None:
    floors = [
        specifier.version for specifier in RANGES[name].specifier if specifier.operator == ">="
    ]
    assert len(floors) == 1
    assert pin(PINS[name]) in Requirement(f"x>={floors[0]}").specifier


def test_what_an_extra_needs_is_tested_in_its_range() -> None:
    for extra in PROJECT["optional-dependencies"].values():
        for requirement in map(Requirement, extra):
            assert pin(DEV[canonicalize_name(requirement.name)]) in requirement.specifier


def test_the_serving_example_is_tested_in_its_ranges_and_needs_nothing_heavy() -> None:
    for requirement in SERVING:
        assert pin((PINS | DEV)[canonicalize_name(requirement.name)]) in requirement.specifier
    assert not {"torch", "segprune"} & {requirement.name for requirement in SERVING}


def test_the_tests_run_on_what_a_clone_runs_on() -> None:
    assert (
        "-r requirements_pruning.txt"
        in (ROOT / "requirements_dev.txt").read_text(encoding="utf-8").splitlines()
    )
    assert not DEV.keys() & PINS.keys()


def test_torchvision_is_named_nowhere() -> None:
    assert (
        "torchvision" not in RANGES.keys() | PINS.keys() | DEV.keys()
    )  # beside a CPU torch it breaks transformers


def test_the_manuals_floors_are_kept() -> None:
    assert "1.9" not in RANGES["torch"].specifier
    assert "1.2" not in RANGES["torch-pruning"].specifier


def test_an_uninstalled_clone_has_the_projects_version() -> None:
    tree = ast.parse((ROOT / "segprune/__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
        if isinstance(node.value, ast.Constant)
    ]
    assert values == [PROJECT["version"]]


def test_the_pip_command_for_torch_pruning_names_the_exact_version() -> None:
    source = (ROOT / "segprune/pruning/groups.py").read_text(encoding="utf-8")
    assert re.findall(r"pip install torch-pruning==([\d.]+\d)", source) == [
        pin(PINS["torch-pruning"])
    ]


def test_the_pip_command_for_opencv_names_the_version_that_is_tested() -> None:
    source = (ROOT / "segprune/inference/video.py").read_text(encoding="utf-8")
    assert re.findall(r"pip install opencv-python-headless==([\d.]+\d)", source) == [
        pin(DEV["opencv-python-headless"])
    ]
