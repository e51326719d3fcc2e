"""What the README promises, in both languages, against what is there."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from segprune.cli.prune import PruneConfig

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
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


def test_both_languages_have_the_same_sections_and_blocks() -> None:
    levels = [re.findall(r"^#+", re.sub(r"(?ms)^```.*?^```", "", text), flags=re.M) for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    assert len(levels[0]) > 8
    assert commands(ENGLISH) == commands(CHINESE)
    assert len(commands(ENGLISH)) > 4
    assert [len(table) for table in tables(ENGLISH)] == [len(table) for table in tables(CHINESE)]


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
    config = PruneConfig()
    assert set(listed) == {field.name for field in fields(config)}
    for name in ("pruning_rate", "round_to", "seed"):
        assert float(listed[name]) == getattr(config, name)
    for name in ("pruning_method", "rate_of", "scope", "save_dir"):
        assert listed[name].strip("`") == getattr(config, name)
    assert listed["input_shape"].strip("`") == "{} {}".format(*config.input_shape)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=READMES)
def test_the_tree_names_what_is_there_and_all_modules(text: str) -> None:
    (tree,) = [block for block in blocks(text) if block.startswith(TREE)]
    listed = {name for line in tree.splitlines() for name in re.split(r",?\s+", re.split(r"\s{2,}", line)[0])}
    assert not [name for name in listed if not (ROOT / name).exists()]
    package = ROOT / "segprune"
    there = {f"segprune/{p.name}" for p in package.glob("*.py") if not p.name.startswith("__")}
    there |= {f"segprune/{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert there <= listed


@pytest.mark.parametrize("name", [*READMES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
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
