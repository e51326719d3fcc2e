"""What the README promises, in both languages, against what is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest
import typer

from segprune.cli import app
from segprune.cli.train.flags import RunFlags, StartFlags
from segprune.pruning.options import DEFAULT_RATE, PruneOptions
from segprune.training.options import TrainOptions

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
MANUALS = ("docs/training.md", "docs/training.zh-CN.md")
MANUAL, CHINESE_MANUAL = ((ROOT / name).read_text(encoding="utf-8") for name in MANUALS)
PAGES = (*READMES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DOORS = {"train.py": "train", "prune_train.py": "prune"}
OTHERS = {
    "nproc_per_node",
    "nnodes",
    "rdzv_backend",
    "rdzv_endpoint",
    "logdir",
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
    return [re.sub(r"(?m)[ \t]*#.*$", "", block) for block in blocks(text) if not block.startswith(TREE)]


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
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in (value if type(value) is tuple else (value,)))


@pytest.mark.parametrize(
    ("english", "chinese"), [(ENGLISH, CHINESE), (MANUAL, CHINESE_MANUAL)], ids=["readme", "training"]
)
def test_both_languages_have_the_same_sections_and_blocks(english: str, chinese: str) -> None:
    levels = [re.findall(r"^#+", re.sub(r"(?ms)^```.*?^```", "", text), flags=re.M) for text in (english, chinese)]
    assert levels[0] == levels[1]
    assert len(levels[0]) > 8
    assert commands(english) == commands(chinese)
    assert len(commands(english)) > 4
    assert [len(table) for table in tables(english)] == [len(table) for table in tables(chinese)]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_that_is_shown_is_one_that_its_parser_takes(name: str) -> None:
    for command, *arguments in command_lines((ROOT / name).read_text(encoding="utf-8")):
        COMMANDS[command].make_context(command, arguments)  # raises for unknown flags and for values of a wrong kind


def test_there_are_commands_to_check() -> None:
    shown = [line for name in PAGES for line in command_lines((ROOT / name).read_text(encoding="utf-8"))]
    assert {line[0] for line in shown} == set(COMMANDS)
    assert sum("--teacher" in line for line in shown) > 4


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_that_is_named_exists(name: str) -> None:
    known = {parameter.name for command in COMMANDS.values() for parameter in command.params} | OTHERS
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", (ROOT / name).read_text(encoding="utf-8")))
    assert sorted(named - known) == []


@pytest.mark.parametrize("text", [MANUAL, CHINESE_MANUAL], ids=MANUALS)
def test_the_manual_s_table_names_all_flags_of_train_py_with_their_defaults(text: str) -> None:
    listed = {row[0].strip().strip("`").split()[0]: row[1].strip() for row in tables(text)[-1][2:]}
    flags = [*fields(StartFlags), *fields(TrainOptions), *fields(RunFlags)]
    assert list(listed) == [f"--{field.name}" for field in flags]
    for field in flags:
        cell, default = listed[f"--{field.name}"], shown_default(field)
        assert cell.strip("`") == default if default is not None else cell, field.name
        assert (cell in ("off", "关")) == isinstance(field.default, bool)


def test_both_languages_show_the_same_results() -> None:
    numbers = [
        re.findall(r"\d+\.\d+", text.partition("<!-- results -->")[2].partition("<!-- end of results -->")[0])
        for text in (ENGLISH, CHINESE)
    ]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) > 10


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=READMES)
def test_the_table_of_flags_names_all_of_them_with_their_defaults(text: str) -> None:
    table = next(table for table in tables(text) if "--model_path" in table[2][0])
    listed = {flag: row[2].strip() for row in table[2:] for flag in re.findall(r"--(\w+)", row[0])}
    options = PruneOptions()
    assert set(listed) == {parameter.name for parameter in COMMANDS["prune"].params}
    assert float(listed["pruning_rate"]) == DEFAULT_RATE
    assert listed["rate_of"].strip("`") == next(iter(options.budgets))
    for name in ("round_to", "seed"):
        assert float(listed[name]) == getattr(options, name)
    for name in ("pruning_method", "scope"):
        assert listed[name].strip("`") == getattr(options, name)
    assert listed["input_shape"].strip("`") == "{} {}".format(*options.input_shape)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=READMES)
def test_the_tree_names_what_is_there_and_all_modules(text: str) -> None:
    (tree,) = [block for block in blocks(text) if block.startswith(TREE)]
    listed = {name for line in tree.splitlines() for name in re.split(r",?\s+", re.split(r"\s{2,}", line)[0])}
    assert not [name for name in listed if not (ROOT / name).exists()]
    package = ROOT / "segprune"
    there = {f"segprune/{p.name}" for p in package.glob("*.py") if not p.name.startswith("__")}
    there |= {f"segprune/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert there <= listed


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("http")]
    assert not [target for target in targets if not ((ROOT / name).parent / target).exists()]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import segprune
    from segprune.spec import standard_spec

    (tmp_path / "logs").mkdir()
    segprune.save(segprune.SegFormer(standard_spec("b0", 3)), tmp_path / "logs" / "your_model.pth")
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks(ENGLISH) if block.startswith("import torch")]
    shown: dict[str, object] = {"print": lambda value: None}
    exec(code.replace("512", "64"), shown)
    left = sum(p.numel() for p in segprune.load("pruned.pth").parameters())
    assert left / 3714915 == pytest.approx(0.9**5, abs=0.05)


def test_the_readme_s_make_targets_run_the_doors_and_the_tests() -> None:
    targets = re.findall(r"^make (\w+)", ENGLISH, flags=re.M)
    plans = {
        t: subprocess.run(["make", "-n", t], cwd=ROOT, check=True, capture_output=True, text=True) for t in targets
    }
    assert set(plans) == {"demo", "test"}
    assert [door in plans["demo"].stdout for door in (" train.py ", " prune_train.py ")] == [True, True]
    assert "-m pytest" in plans["test"].stdout
