"""`segprune prune` beyond one rate: plans as files, rates by name, budgets, criteria with pictures, repair."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from segprune import load
from segprune.data import open_source
from segprune.data.unlabelled import batch_images, list_images, load_images
from segprune.stats import count
from tests.commands import HERE, SIZE, done, refused

SHAPE = (32, 32)
FINELY = ("--round_to", 1)  # for the small network, whose groups have few channels


@pytest.fixture(scope="module")
def pictures(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and nothing else."""
    folder = tmp_path_factory.mktemp("pictures")
    for pair in open_source(data).split("train"):
        shutil.copy(str(pair.image), folder)
    return folder


@pytest.fixture(scope="module")
def planned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """plan.json and what was printed."""
    folder = tmp_path_factory.mktemp("planned")
    out = done(
        "prune",
        "--model_path",
        dense,
        *SIZE,
        "--no_repair",
        "--plan_only",
        "--save_dir",
        folder,
    )
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["plan.json"]
    return folder / "l1/b0/plan.json", out


def widths(path: Path) -> dict[str, int]:
    return {
        row["name"]: row["width"]
        for row in json.loads(path.read_text(encoding="utf-8"))["groups"]
    }


def test_a_plan_is_shown_and_saved_and_nothing_is_cut(planned: tuple[Path, str]) -> None:
    path, out = planned
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["removed"]["params"] == pytest.approx(0.5, abs=0.01)
    assert f"Removes {record['removed']['params']:.1%} of the params" in out
    assert f"Nothing was cut; --plan carries this file out: {path}" in out
    for row in record["groups"]:
        assert row["name"].removeprefix("encoder.") in out
        assert 1 <= row["width"] <= row["slots"]


def test_a_plan_carried_out_is_the_network_that_the_rate_gives(
    planned: tuple[Path, str], dense: Path, tmp_path: Path
) -> None:
    done("prune", "--model_path", dense, *SIZE, "--plan", planned[0], "--save_dir", tmp_path)
    done("prune", "--model_path", dense, *SIZE, "--save_dir", tmp_path)
    first, second = (load(tmp_path / f"l1/b0/b0_pruned_{name}.pth") for name in ("plan", "0.5"))
    assert first.spec == second.spec
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_the_command_that_made_a_plan_carries_it_out_with_plan(
    dense: Path, tmp_path: Path
) -> None:
    command = ("prune", "--model_path", dense, *SIZE, "--no_repair", "--save_dir", tmp_path)
    command += ("--pruning_rate", 0.8, "--rate_of", "macs", "--round_to", 4, "--plan_only")
    done(*command)
    plan = tmp_path / "l1/b0/plan.json"
    done(*command, "--plan", plan)
    pruned = load(tmp_path / "l1/b0/b0_pruned_plan.pth")
    kept = widths(plan)["encoder.stages.1.blocks.0.mlp.ffn"]
    assert pruned.spec.stages[1].blocks[0].ffn_dim == kept

    # Another rate than the plan's would have no effect.
    assert "--pruning_rate has no effect with --plan" in refused(
        *command, "--plan", plan, "--pruning_rate", 0.6
    )


def test_an_edited_width_is_carried_out(
    planned: tuple[Path, str], dense: Path, tmp_path: Path
) -> None:
    record = json.loads(planned[0].read_text(encoding="utf-8"))
    row = next(
        row for row in record["groups"] if row["name"] == "encoder.stages.1.blocks.0.mlp.ffn"
    )
    row["width"] = 56
    (tmp_path / "edited.json").write_text(json.dumps(record), encoding="utf-8")
    done(
        "prune",
        "--model_path",
        dense,
        *SIZE,
        "--plan",
        tmp_path / "edited.json",
        "--save_dir",
        tmp_path,
    )
    assert load(tmp_path / "l1/b0/b0_pruned_plan.pth").spec.stages[1].blocks[0].ffn_dim == 56


def test_rates_by_name_alone_leave_the_rest_whole(dense: Path, tmp_path: Path) -> None:
    flags = ("--pruning_rate", "stages.3=0.75,head=0.5", "--plan_only")
    done("prune", "--model_path", dense, *SIZE, *flags, "--save_dir", tmp_path)
    for row in json.loads((tmp_path / "l1/b0/plan.json").read_text(encoding="utf-8"))["groups"]:
        share = 0.25 if ".stages.3." in row["name"] else 0.5 if "head." in row["name"] else 1.0
        assert row["width"] == share * row["slots"], row["name"]


def test_beside_rates_by_name_the_others_make_up_for_the_rate(
    dense: Path, tmp_path: Path
) -> None:
    flags = ("--pruning_rate", "0.5,stages.3=0.25")
    done("prune", "--model_path", dense, *SIZE, *flags, "--save_dir", tmp_path)
    pruned = load(tmp_path / "l1/b0/b0_pruned_0.5_stages.3-0.25.pth").spec
    assert pruned.stages[3].width == 192
    assert count(pruned, SHAPE).parameters == pytest.approx(
        0.5 * count(load(dense).spec, SHAPE).parameters, rel=0.02
    )


def test_of_several_budgets_each_is_met_and_one_exactly(dense: Path, tmp_path: Path) -> None:
    out = done(
        "prune",
        "--model_path",
        dense,
        *SIZE,
        "--pruning_rate",
        "params=0.3,macs=0.85",
        "--save_dir",
        tmp_path,
    )
    assert " rate_of " not in out  # no rate that nothing asked for
    before, after = (
        count(load(path).spec, SHAPE)
        for path in (dense, tmp_path / "l1/b0/b0_pruned_0.3_macs0.85.pth")
    )
    assert 1 - after.parameters / before.parameters > 0.29
    assert 1 - after.macs / before.macs == pytest.approx(0.85, abs=0.01)


def test_what_is_ignored_keeps_its_width(dense: Path, tmp_path: Path) -> None:
    done(
        "prune",
        "--model_path",
        dense,
        *SIZE,
        "--ignore",
        "stages.3.blocks.0.*",
        "--save_dir",
        tmp_path,
    )
    last = load(tmp_path / "l1/b0/b0_pruned_0.5.pth").spec.stages[3]
    assert (last.width, last.blocks[0].ffn_dim) == (256, 512)
    assert last.blocks[1].ffn_dim < 512


def test_groups_can_be_ignored_by_the_names_of_the_plan_which_says_so(
    dense: Path, tmp_path: Path
) -> None:
    names = [
        "decode_head.width",
        "stages.3.blocks.0.attn.qk",
        "stages.3.blocks.0.mlp.ffn",
        "stages.3.width",
    ]
    flags = ("--ignore", ",".join(names), "--save_dir", tmp_path)
    out = done("prune", "--model_path", dense, *SIZE, *flags, "--plan_only")
    assert f"Left alone by --ignore: {', '.join(names)}. " in out
    table = out[: out.index("Left alone")]
    assert not any(f"│ {name} │" in table for name in names)
    done("prune", "--model_path", dense, *SIZE, *flags)
    spec = load(tmp_path / "l1/b0/b0_pruned_0.5.pth").spec
    blocks = spec.stages[3].blocks
    assert (spec.folded, spec.decoder_dim, spec.stages[3].width) == (True, 256, 256)
    assert (blocks[0].qk_dim, blocks[0].ffn_dim) == (32, 512)
    assert blocks[0].v_dim < 32
    assert blocks[1].ffn_dim < 512


def test_of_a_plan_in_which_nothing_is_ignored_nothing_is_said_of_it(
    planned: tuple[Path, str],
) -> None:
    assert "Left alone" not in planned[1]


def test_a_criterion_that_needs_pictures_takes_them_without_labels(
    dense: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = (
        "--pruning_method",
        "taylor",
        "--images",
        pictures,
        "--num_images",
        4,
        "--no_repair",
    )
    done("prune", "--model_path", dense, *SIZE, *flags, "--save_dir", tmp_path)
    record = json.loads(
        (tmp_path / "taylor/b0/pruning_results.json").read_text(encoding="utf-8")
    )
    config = record["pruning_config"]
    assert (config["method"], config["num_images"], config["repaired"]) == ("taylor", 4, False)
    assert "miou" not in record["pruned_model"]


def test_with_pictures_the_network_is_repaired_by_default(
    small: Path, data: Path, tmp_path: Path
) -> None:
    outputs: dict[str, Any] = {}
    for name, flags in (("repaired", ()), ("not", ("--no_repair",))):
        here = (*FINELY, "--data", data, *HERE, "--save_dir", tmp_path / name)
        out = done("prune", "--model_path", small, *SIZE, *flags, *here)
        assert (
            re.search(r"Repaired with \d+ images, before any training\.", out) is not None
        ) == (name == "repaired")
        outputs[name] = load(tmp_path / name / "l1/b0/b0_pruned_0.5.pth")
        record = json.loads(
            (tmp_path / name / "l1/b0/pruning_results.json").read_text(encoding="utf-8")
        )
        assert record["pruning_config"]["repaired"] is (name == "repaired")
    x = torch.cat(batch_images(load_images(list_images(open_source(data)), 8, SHAPE)))
    with torch.inference_mode():
        aim = load(small)(x)
        off = {name: float((model(x) - aim).square().mean()) for name, model in outputs.items()}
    assert off["repaired"] < off["not"]


def test_a_data_set_without_a_train_part_is_scored_but_not_repaired(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "val")
    next((tmp_path / "val").rglob("train.txt")).unlink()
    out = done(
        "prune",
        "--model_path",
        dense,
        *SIZE,
        "--data",
        tmp_path / "val",
        *HERE,
        "--save_dir",
        tmp_path,
    )
    assert "Note: No repair, since there are no images for it:" in out


def test_without_images_synthetic_ones_stand_in_unless_the_repair_is_switched_off(
    small: Path, tmp_path: Path, draws_images: None
) -> None:
    here = ("--model_path", small, *SIZE, *FINELY, "--save_dir", tmp_path)
    out = done("prune", *here, "--num_images", 8)
    assert re.search(r"8 synthetic ones .* --images DIR, .* --no_repair", out)
    assert "Repaired with 8 images" in out
    record = json.loads((tmp_path / "l1/b0/pruning_results.json").read_text(encoding="utf-8"))
    config = record["pruning_config"]
    assert (config["synthetic_images"], config["num_images"], config["repaired"]) == (
        True,
        8,
        True,
    )
    assert record["reduction"]["parameters_reduction_percent"] == pytest.approx(50, abs=1)

    done("prune", *here, "--num_images", 8, "--plan_only")
    plan = json.loads((tmp_path / "l1/b0/plan.json").read_text(encoding="utf-8"))
    assert plan["decided_by"] == "curves"
    for row in plan["groups"]:
        assert row["expected_loss"] >= 0
        for unit in ("params", "macs", "time"):
            assert 0 < row[f"share_of_{unit}"] < 1

    # The results say the same of the plan that was carried out, whose widths are the network's.
    assert record["plan"] == {name: plan[name] for name in record["plan"]}
    rows = {row["name"]: row["width"] for row in record["plan"]["groups"]}
    stages = record["pruned_model"]["spec"]["stages"]
    for i, stage in enumerate(stages[1:], 1):  # the first stage's width is protected
        assert stage["width"] == rows[f"encoder.stages.{i}.width"]

    out = done("prune", *here, "--no_repair", "--plan_only")
    plan = json.loads((tmp_path / "l1/b0/plan.json").read_text(encoding="utf-8"))
    assert plan["decided_by"] == "scores"
    assert "synthetic ones" not in out


@pytest.mark.parametrize("flags", [("--repair",), ("--plan_by", "curves")])
def test_random_weights_are_not_repaired_without_images(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    said = refused("prune", "--phi", "b0", *SIZE, *flags, "--save_dir", tmp_path)
    assert re.match(
        rf"{flags[0]} has no effect on random weights without images; give --model_path", said
    )


def test_the_results_name_no_rate_that_was_not_asked(dense: Path, tmp_path: Path) -> None:
    done(
        "prune",
        "--model_path",
        dense,
        *SIZE,
        "--pruning_rate",
        "head=0.5",
        "--save_dir",
        tmp_path,
    )
    record = json.loads((tmp_path / "l1/b0/pruning_results.json").read_text(encoding="utf-8"))
    assert record["pruning_config"]["pruning_rate"] is None
    assert record["pruning_config"]["rates"] == {"head": 0.5}


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (
        ("--plan", "missing.json"),
        r"missing\.json does not exist; give the path of the JSON file of a plan\.",
    ),
    (
        ("--plan", "broken.json"),
        r"broken\.json is not valid JSON \(.*\); give the JSON file of a plan, or write it again\.",
    ),
    (
        ("--plan", "other.json"),
        r"other\.json is no plan; write one with --plan_only, and in it change only the widths\.",
    ),
    (
        ("--plan", "foreign.json"),
        r"The plan is not one for this network and these options: group a, which this .* cut\.",
    ),
    (
        ("--plan", "misspelt.json"),
        r"The plan .*: group decode_head\.wdth, which this network cannot cut, and group decode_head\.width, which the "
        r"plan does not name\.",
    ),
    (
        ("--plan", "twice.json"),
        r"twice\.json names group decode_head\.width twice; leave one of them\.",
    ),
    (
        ("--plan", "text.json"),
        r'text\.json gives group decode_head\.width the width "200"; it must be a whole number\.',
    ),
    (
        ("--plan", "half.json"),
        r"half\.json gives group decode_head\.width the width 200\.5; it must be a whole",
    ),
    (
        ("--plan", "wide.json"),
        r"The plan keeps 999999 channels of decode_head\.width; it must be 1 to 256\.",
    ),
    (
        ("--plan", "wide.json", "--pruning_rate", 0.5),
        r"--pruning_rate has no effect with --plan, which says what is kept;",
    ),
    (
        ("--plan", "wide.json", "--plan_only"),
        r"--plan_only has no effect with --plan, which is decided already;",
    ),
    (
        ("--pruning_rate", "stages.3"),
        r"--pruning_rate is 'stages\.3'; write it as 0\.5, or .*stages\.3=0\.7\.",
    ),
    (
        ("--pruning_rate", "stages.3=1"),
        r"--pruning_rate is 1 for stages\.3; it must be at least 0 and below 1\.",
    ),
    (
        ("--pruning_rate", "stage.3=0.5"),
        r"--pruning_rate 'stage\.3' matches nothing in this network; its names look",
    ),
    (
        ("--ignore", "stage3"),
        r"--ignore 'stage3' matches nothing in this network; its names look like .*\.",
    ),
    (
        ("--max_rate", "half"),
        r"--max_rate is 'half'; write it as 0\.8, or stages\.3=0\.6,head=0\.5\.",
    ),
    (
        ("--max_rate", 0.2),
        r"Rate 0\.5 is out of reach; the most that can be removed here is 0\.\d+, .* than 0\.2 \(--max_rate\), and",
    ),
    (
        ("--max_rate", "stages=0.1,head=0.5"),
        r"Rate 0\.5 is out of reach; .* more .* than what --max_rate allows, and",
    ),
    (
        ("--pruning_rate", "params=0.5", "--rate_of", "macs"),
        r"--rate_of has no effect beside a --pruning_rate that",
    ),
    (
        ("--pruning_rate", "flops=0.5"),
        r"--pruning_rate 'flops' matches nothing in this network; .*params, macs",
    ),
    (("--pruning_rate", "0.5,0.6"), r"--pruning_rate is '0\.5,0\.6', which gives two shares"),
    (
        ("--pruning_rate", "params=half"),
        r"--pruning_rate is 'params=half'; write it as .*params=0\.5,macs=0\.7",
    ),
    (
        ("--num_images", 3, "--no_repair"),
        r"--num_images has no effect where nothing is repaired or ranked by images",
    ),
    (
        ("--plan_by", "curves", "--no_repair"),
        r"--plan_by curves counts on the repair; leave out --repair False, or",
    ),
    (("--images", "nowhere"), r"nowhere .*"),
    (
        ("--pruning_rate", "head=0.5", "--scope", "local"),
        r"--scope has no effect where --pruning_rate gives the share",
    ),
    (
        ("--images", ".", "--no_repair"),
        r"--images has no effect where nothing is repaired or ranked by images;",
    ),
    (("--repair", "--plan_only"), r"--repair has no effect with --plan_only, which cuts"),
    (
        ("--plan_only", "--epochs", 1, "--data", "."),
        r"--epochs has no effect with --plan_only, which cuts nothing;",
    ),
]


@pytest.mark.parametrize(
    ("flags", "message"), REFUSED, ids=[" ".join(map(str, flags)) for flags, _ in REFUSED]
)
def test_a_wrong_flag_is_refused_and_nothing_is_written(
    flags: tuple[object, ...],
    message: str,
    planned: tuple[Path, str],
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads(planned[0].read_text(encoding="utf-8"))
    Path("broken.json").write_text("{")
    Path("other.json").write_text('{"groups": [1]}')
    Path("foreign.json").write_text(
        json.dumps({"groups": [*record["groups"], {"name": "a", "width": 1}]})
    )
    (head,) = (row for row in record["groups"] if row["name"] == "decode_head.width")
    others = [row for row in record["groups"] if row != head]
    Path("twice.json").write_text(json.dumps({"groups": [*others, head, head]}))
    for name, edit in {
        "wide": {"width": 999999},
        "text": {"width": "200"},
        "half": {"width": 200.5},
        "misspelt": {"name": "decode_head.wdth"},
    }.items():
        Path(f"{name}.json").write_text(json.dumps({"groups": [*others, head | edit]}))
    said = refused("prune", "--model_path", dense, *SIZE, "--save_dir", "out", *flags)
    assert re.match(message, said), said
    assert not Path("out").exists()
