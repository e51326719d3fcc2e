"""What the README promises, in both languages, against what is there."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from segprune.cli import app
from segprune.cli.flags import InputFlags
from segprune.cli.train.flags import RunFlags, StartFlags
from segprune.spec import Spec
from segprune.training.options import TrainOptions

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
MANUALS = ("docs/training.md", "docs/training.zh-CN.md")
MANUAL, CHINESE_MANUAL = ((ROOT / name).read_text(encoding="utf-8") for name in MANUALS)
PAGES = (
    *READMES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DOORS = {"train.py": "train", "prune_train.py": "prune"}
OTHERS = {
    "cpu",  # of benchmarks.gpu
    "nproc_per_node",
    "nnodes",
    "rdzv_backend",
    "rdzv_endpoint",
    "logdir",
    "cases",
    "extra-index-url",
    "no-deps",
    "out",
    "no_repair",
    "no_tf32",
    "help",
}
TREE = "prune_train.py, train.py "  # how its block begins


def blocks(text: str) -> list[str]:
    return re.findall(r"(?ms)^```\w*\n(.*?)^```", text)


def commands(text: str) -> list[str]:
    """All code blocks but the tree, without comments."""
    return [
        re.sub(r"(?m)[ \t]*#.*$", "", block)
        for block in blocks(text)
        if not block.startswith(TREE)
    ]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, headings included."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    return [[line.strip("|\n").split("|") for line in table.splitlines()] for table in found]


def command_lines(text: str) -> Iterator[list[str]]:
    """Every line that runs segprune, train.py or prune_train.py, as the command's name and its arguments."""
    for block in commands(text):
        for words in map(str.split, block.replace("\\\n", " ").splitlines()):
            doors = [i for i, word in enumerate(words) if word in DOORS]
            if words[:1] == ["segprune"]:
                yield words[1:]
            elif words and words[0] in ("python", "torchrun") and doors:
                yield [DOORS[words[doors[0]]], *words[doors[0] + 1 :]]


def shown_default(field: Field[Any]) -> str | None:
    """A flag's default as tables write it; None where they say in words what is done without the flag."""
    value = field.default
    if value in (None, "") or isinstance(value, bool):
        return None
    return " ".join(
        f"{v:g}" if isinstance(v, float) else str(v)
        for v in (value if type(value) is tuple else (value,))
    )


@pytest.mark.parametrize(
    ("english", "chinese"),
    [(ENGLISH, CHINESE), (MANUAL, CHINESE_MANUAL)],
    ids=["readme", "training"],
)
def test_both_languages_have_the_same_sections_and_blocks(english: str, chinese: str) -> None:
    levels = [
        re.findall(r"^#+", re.sub(r"(?ms)^```.*?^```", "", text), flags=re.M)
        for text in (english, chinese)
    ]
    assert levels[0] == levels[1]
    assert len(levels[0]) > 7
    assert commands(english) == commands(chinese)
    assert len(commands(english)) > 4
    assert [len(table) for table in tables(english)] == [
        len(table) for table in tables(chinese)
    ]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_that_is_shown_is_one_that_its_parser_takes(name: str) -> None:
    for command, *arguments in command_lines((ROOT / name).read_text(encoding="utf-8")):
        COMMANDS[command].make_context(
            command, arguments
        )  # raises for unknown flags and for values of a wrong kind


def test_there_are_commands_to_check() -> None:
    shown = [
        line
        for name in PAGES
        for line in command_lines((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert {line[0] for line in shown} == set(COMMANDS)
    assert sum("--teacher" in line for line in shown) > 4


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_every_flag_that_is_named_exists(name: str) -> None:
    known = set(OTHERS)
    for command in COMMANDS.values():
        known |= {
            option.lstrip("-") for parameter in command.params for option in parameter.opts
        }
    named = set(
        re.findall(r"(?<![\w-])--([a-z][\w-]*)", (ROOT / name).read_text(encoding="utf-8"))
    )
    assert sorted(named - known) == []


@pytest.mark.parametrize("text", [MANUAL, CHINESE_MANUAL], ids=MANUALS)
def test_the_manual_s_table_names_all_flags_of_train_py_with_their_defaults(text: str) -> None:
    listed = {
        row[0].strip().strip("`").split()[0]: row[1].strip() for row in tables(text)[-1][2:]
    }
    data, layout, *start = fields(StartFlags)
    first = [data, layout, *fields(InputFlags), *start]
    flags = [*first, *fields(TrainOptions), *fields(RunFlags)]
    assert list(listed) == [f"--{field.name}" for field in flags]
    for field in flags:
        cell, default = listed[f"--{field.name}"], shown_default(field)
        assert cell.strip("`") == default if default is not None else cell, field.name
        assert (cell in ("off", "关")) == isinstance(field.default, bool)


def test_both_languages_show_the_same_results() -> None:
    numbers = [
        re.findall(
            r"\d+\.\d+",
            text.partition("<!-- results -->")[2].partition("<!-- end of results -->")[0],
        )
        for text in (ENGLISH, CHINESE)
    ]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) > 10


def test_the_page_of_flags_is_what_the_commands_have_now() -> None:
    """Run python docs/make_flags.py where this fails."""
    made = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))["page"]()
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == made
    for command, parts in COMMANDS.items():
        assert f"## segprune {command}\n" in made
        assert all(
            f"| `{p.opts[0]}` |" in made for p in parts.params if p.param_type_name == "option"
        )


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=READMES)
def test_the_tree_names_what_is_there_and_every_folder(text: str) -> None:
    (tree,) = [block for block in blocks(text) if block.startswith(TREE)]
    listed = {
        name
        for line in tree.splitlines()
        for name in re.split(r",?\s+", re.split(r"\s{2,}", line)[0])
    }
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    folders = {
        f"{path.split('/')[0]}/"
        for path in tracked.splitlines()
        if "/" in path and not path.startswith(".")
    }
    assert [name for name in listed if not (ROOT / name).exists()] == []
    assert folders <= listed


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=READMES)
def test_the_first_screen_has_an_image_and_then_a_command(text: str) -> None:
    lines = text.splitlines()
    image = next(i for i, line in enumerate(lines) if line.startswith("!["))
    first = next(i for i, line in enumerate(lines) if line.startswith("pip install"))
    assert image < first < 25
    assert len(lines) <= 140


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [
        t.partition("#")[0]
        for t in re.findall(r"\]\(([^)]+)\)", text)
        if not t.startswith("http")
    ]
    assert not [target for target in targets if not ((ROOT / name).parent / target).exists()]


def test_the_python_example_runs(
    tmp_path: Path, small_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import segprune
    from segprune.pruning import pruner
    from segprune.pruning.synthetic import synthetic_images

    (tmp_path / "logs").mkdir()
    model = segprune.SegFormer(small_spec)
    segprune.save(model, tmp_path / "logs" / "your_model.pth")
    monkeypatch.chdir(tmp_path)

    # Few images: what is tested is that the lines run.
    monkeypatch.setattr(pruner, "synthetic_images", partial(synthetic_images, count=2))
    (code,) = [block for block in blocks(ENGLISH) if block.startswith("import torch")]
    shown: dict[str, object] = {"print": lambda value: None}
    exec(code.replace("512", "64"), shown)
    dense, left = (
        sum(p.numel() for p in network.parameters())
        for network in (model, segprune.load("pruned.pth"))
    )
    assert left / dense == pytest.approx(0.9**5, abs=0.05)


def test_the_readme_s_make_targets_run_the_doors_and_the_tests() -> None:
    targets = set(re.findall(r"`make (\w+)", ENGLISH))
    plans = {
        t: subprocess.run(
            ["make", "-n", t], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for t in targets
    }
    assert set(plans) == {"demo", "test"}
    assert [door in plans["demo"].stdout for door in (" train.py ", " prune_train.py ")] == [
        True,
        True,
    ]
    assert "-m pytest" in plans["test"].stdout

    # Every command of the demo is parsed, up to the check that its files are there.
    lines = plans["demo"].stdout.replace("\\\n", " ").splitlines()
    parsed = 0
    for words in map(shlex.split, lines):
        names = {"train.py": ["train"], "prune_train.py": ["prune"], "segprune": []}
        if len(words) > 1 and (words[1] in names or words[1:3] == ["-m", "segprune"]):
            start = 2 if words[1] in names else 3
            command, *flags = [*names.get(words[1], []), *words[start:]]
            get_command(app).commands[command].make_context(command, flags)
            parsed += 1
    assert parsed == 3
