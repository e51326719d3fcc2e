"""`segprune prune`: the files and numbers it promises, against the networks themselves; and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from segprune import load
from segprune.checkpoint import read, save
from segprune.cli.prune import command
from segprune.data import open_source
from segprune.data.shapes import CLASS_NAMES
from segprune.fold import fold_decoder
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.model import PARTS
from segprune.pruning.options import PruneOptions
from segprune.spec import list_kv_reductions
from segprune.stats import count
from segprune.training.distill import Distillation
from tests.commands import HERE, SIZE, done, interrupted, refused, told, training

SHAPE = (64, 32)


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "l1/b0/pruning_results.json").read_text(encoding="utf-8"))


def num_parameters(path: Path) -> int:
    return sum(p.numel() for p in load(path).parameters())


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run without a checkpoint."""
    folder = tmp_path_factory.mktemp("dry")
    return folder, done("prune", "--phi", "b0", "--input_shape", *SHAPE, "--save_dir", folder)


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, dense: Path, data: Path
) -> tuple[Path, str]:
    """The folder and the output of a run that scores and fine-tunes."""
    folder = tmp_path_factory.mktemp("tuned")
    here = (*SIZE, *HERE, "--data", data, "--save_dir", folder)
    return folder, done("prune", "--model_path", dense, *here, "--epochs", 2, "--batch_size", 4)


def test_without_a_checkpoint_it_is_said_loudly_that_the_weights_are_random(
    dry_run: tuple[Path, str],
) -> None:
    folder, out = dry_run
    assert "Note: NO --model_path: THE WEIGHTS ARE RANDOM. This is a dry run:" in out
    assert record_in(folder)["model_config"]["random_weights"] is True


def test_the_files_lie_where_the_manual_says(dry_run: tuple[Path, str]) -> None:
    folder, out = dry_run
    files = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    names = ("b0_pruned_0.5.pth", "pruning_results.json", "report.html")
    assert files == {f"l1/b0/{name}" for name in names}
    assert record_in(folder)["model_save_path"] == str(folder / "l1/b0/b0_pruned_0.5.pth")
    assert f"Pruned network: {folder}/l1/b0/b0_pruned_0.5.pth" in out


def test_the_json_has_the_promised_keys_with_the_promised_types(
    dry_run: tuple[Path, str],
) -> None:
    record = record_in(dry_run[0])
    config = record["model_config"]
    assert (config["phi"], config["num_classes"], config["input_shape"]) == (
        "b0",
        8,
        list(SHAPE),
    )
    assert (record["pruning_config"]["method"], record["pruning_config"]["pruning_rate"]) == (
        "l1",
        0.5,
    )
    for name in ("original_model", "pruned_model"):
        types = {
            key: type(record[name][key])
            for key in ("parameters", "parameters_M", "flops", "flops_G")
        }
        assert types == {
            "parameters": int,
            "parameters_M": float,
            "flops": int,
            "flops_G": float,
        }
        assert (type(record[name]["macs"]), type(record[name]["latency_ms"])) == (int, float)
    for key in ("parameters_reduction_percent", "flops_reduction_percent"):
        assert type(record["reduction"][key]) is float
    assert type(record["model_save_path"]) is str


def test_the_numbers_are_those_of_the_networks(dry_run: tuple[Path, str]) -> None:
    record = record_in(dry_run[0])
    before, after = record["original_model"], record["pruned_model"]
    pruned = load(record["model_save_path"])
    assert before["parameters"] == 3_716_200  # b0 with 8 classes
    assert after["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert after["flops"] == 2 * after["macs"] == 2 * count(pruned.spec, SHAPE).macs
    assert before["flops_G"] == pytest.approx(before["flops"] / 1e9, abs=1e-6)
    assert after["parameters_M"] == pytest.approx(after["parameters"] / 1e6, abs=1e-6)
    removed = 100 * (1 - after["parameters"] / before["parameters"])
    assert record["reduction"]["parameters_reduction_percent"] == pytest.approx(
        removed, abs=1e-3
    )
    assert removed == pytest.approx(50, abs=1)
    saved = 100 * (1 - after["flops"] / before["flops"])
    assert record["reduction"]["flops_reduction_percent"] == pytest.approx(saved, abs=1e-3)
    speedup = before["latency_ms"] / after["latency_ms"]
    assert record["reduction"]["speedup"] == pytest.approx(speedup)


def test_the_closing_table_shows_what_the_json_holds(tuned: tuple[Path, str]) -> None:
    folder, out = tuned
    record = record_in(folder)
    rows = [
        ("dense", "original_model"),
        ("pruned", "pruned_model"),
        ("fine-tuned", "finetuned_model"),
    ]
    for name, key in rows:
        values = record[key]
        row = rf"{name} │ {values['parameters_M']:.3f} │ {values['macs_G']:.3f} │ \S+ \S+ │ {values['miou']:.4f} │"
        assert re.search(row, out), row
    assert f"Parameters -{record['reduction']['parameters_reduction_percent']:.1f} %" in out


def test_every_part_of_both_networks_is_timed(tuned: tuple[Path, str]) -> None:
    record = record_in(tuned[0])
    for name in ("original_model", "pruned_model"):
        assert list(record[name]["parts_ms"]) == list(PARTS)
        assert all(ms > 0 for ms in record[name]["parts_ms"].values())


def test_the_scores_are_those_of_the_three_files(
    tuned: tuple[Path, str], dense: Path, data: Path
) -> None:
    record = record_in(tuned[0])
    samples = open_source(data).split("val")
    files = {
        "original_model": dense,
        "pruned_model": record["model_save_path"],
        "finetuned_model": record["finetuned_save_path"],
    }
    scores = {
        name: evaluate(load(path), samples, 8, EvalMode(input_shape=(32, 32)), batch_size=4)
        for name, path in files.items()
    }
    # On three images two of them may agree.
    assert len({score.miou for score in scores.values()}) > 1
    for name, score in scores.items():
        assert (record[name]["miou"], record[name]["pixel_accuracy"]) == (
            score.miou,
            score.pixel_accuracy,
        )
        assert record[name]["iou"] == list(score.iou)


def test_fine_tuning_keeps_the_pruned_shape_and_takes_a_tenth_of_the_first_rate(
    tuned: tuple[Path, str],
) -> None:
    folder = tuned[0] / "l1/b0/b0_pruned_0.5_finetuned"
    pruned, finetuned = (
        read(tuned[0] / "l1/b0/b0_pruned_0.5.pth"),
        read(folder / "best_epoch_weights.pth"),
    )
    assert finetuned.spec == pruned.spec
    results = json.loads((folder / "training_results.json").read_text(encoding="utf-8"))
    assert results["settings"]["lr"] == pytest.approx(1e-4)
    assert (
        finetuned.extra["lr"] == pruned.extra["lr"] == 1e-3
    )  # so that pruning again does not divide it again
    assert (
        tuple(finetuned.extra["class_names"])
        == tuple(pruned.extra["class_names"])
        == CLASS_NAMES
    )
    assert record_in(tuned[0])["finetuned_model"]["best_epoch"] in (1, 2)


def test_fine_tuning_learns_from_the_dense_network_unless_told_otherwise(
    tuned: tuple[Path, str], dense: Path, data: Path, tmp_path: Path
) -> None:
    folder = tuned[0] / "l1/b0/b0_pruned_0.5_finetuned"
    settings = json.loads((folder / "training_results.json").read_text(encoding="utf-8"))[
        "settings"
    ]
    assert settings["teacher"] == record_in(tuned[0])["settings"]["model_path"] == str(dense)
    assert record_in(tuned[0])["settings"]["no_distill"] is False
    here = ("prune", "--model_path", dense, *SIZE, *HERE, "--data", data, "--epochs", 1)
    here += ("--no_repair",)
    taught = told(*here, "--save_dir", tmp_path / "taught")
    assert taught.config.distillation() == Distillation()
    assert taught.options["teacher"].spec == fold_decoder(load(dense)).spec
    alone = told(*here, "--save_dir", tmp_path / "alone", "--no_distill")
    assert alone.options["teacher"] is None
    assert record_in(tmp_path / "alone")["settings"]["no_distill"] is True


def test_a_pruned_file_is_pruned_again(tuned: tuple[Path, str], tmp_path: Path) -> None:
    path = tuned[0] / "l1/b0/b0_pruned_0.5.pth"
    out = done(
        "prune", "--model_path", path, "--pruning_rate", 0.3, *SIZE, "--save_dir", tmp_path
    )
    assert "decode head folded" not in out  # it was folded the first time
    again = num_parameters(tmp_path / "l1/b0/b0_pruned_0.3.pth")
    assert 1 - again / num_parameters(path) == pytest.approx(0.3, abs=0.01)
    record = record_in(tmp_path)
    assert record["original_model"]["parameters"] == num_parameters(path)
    assert record["reduction"]["parameters_by_folding_percent"] == 0


def test_hyphens_do_for_underscores(dense: Path, tmp_path: Path) -> None:
    flags = (
        "--model-path",
        dense,
        "--pruning-rate",
        0,
        "--input-shape",
        32,
        32,
        "--num-classes",
        8,
    )
    done("prune", *flags, "--save-dir", tmp_path)
    assert (tmp_path / "l1/b0/b0_pruned_0.pth").is_file()


def test_rate_0_folds_the_head_and_writes_it(dense: Path, tmp_path: Path) -> None:
    done("prune", "--model_path", dense, "--pruning_rate", 0, *SIZE, "--save_dir", tmp_path)
    folded, whole = load(tmp_path / "l1/b0/b0_pruned_0.pth"), load(dense)
    assert folded.spec == fold_decoder(whole).spec != whole.spec
    reduction = record_in(tmp_path)["reduction"]
    assert reduction["parameters_reduction_percent"] > 1
    assert reduction["flops_reduction_percent"] > 10


def test_rate_0_may_only_coarsen_the_map_of_keys_and_values(
    dense: Path, tmp_path: Path
) -> None:
    flags = ("--pruning_rate", 0, "--kv_reduction", "stages.3=2", "--no_repair", *SIZE)
    done("prune", "--model_path", dense, *flags, "--save_dir", tmp_path)
    coarse, folded = load(tmp_path / "l1/b0/b0_pruned_0_kv2-stages.3.pth"), load(dense)
    factors = list_kv_reductions(coarse.spec)
    assert {name for name, factor in factors.items() if factor == 2} == {
        name for name in factors if "stages.3" in name
    }
    state = fold_decoder(folded).state_dict()
    assert all(torch.equal(coarse.state_dict()[name], state[name]) for name in state)
    assert record_in(tmp_path)["pruning_config"]["kv_reduction"] == {"stages.3": 2}


def test_rate_0_writes_a_copy_with_the_head_kept(dense: Path, tmp_path: Path) -> None:
    out = done(
        *("prune", "--model_path", dense, "--pruning_rate", 0, "--keep_decoder", *SIZE),
        *("--save_dir", tmp_path),
    )
    copy = load(tmp_path / "l1/b0/b0_pruned_0.pth").state_dict()
    state = load(dense).state_dict()
    assert copy.keys() == state.keys()
    assert all(torch.equal(copy[name], state[name]) for name in state)
    reduction = record_in(tmp_path)["reduction"]
    assert {reduction[name] for name in reduction if name != "speedup"} == {0.0}
    assert "decode head folded" not in out


def test_macs_are_cut_by_the_rate_with_the_decode_head_kept(
    dense: Path, tmp_path: Path
) -> None:
    flags = (
        "--pruning_rate",
        0.3,
        "--rate_of",
        "macs",
        "--keep_decoder",
        *SIZE,
        "--save_dir",
        tmp_path,
    )
    done("prune", "--model_path", dense, *flags)
    record = record_in(tmp_path)
    assert record["reduction"]["flops_reduction_percent"] == pytest.approx(30, abs=1)
    assert record["reduction"]["flops_by_folding_percent"] == 0
    assert not load(record["model_save_path"]).spec.folded


def test_every_pruning_flag_reaches_the_pruner(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PruneOptions] = []

    def make_pruner(model: object, *, options: PruneOptions, **_: object) -> None:
        seen.append(options)
        raise ValueError("Seen.")

    monkeypatch.setattr(command, "make_pruner", make_pruner)
    flags = (
        "--pruning_rate",
        "0.4,head=0.5",
        "--rate_of",
        "macs",
        "--round_to",
        4,
        "--heads",
        "--max_rate",
        0.8,
    )
    more = (
        "--ignore",
        "a.*, b",
        "--keep_decoder",
        "--no_repair",
        "--seed",
        5,
        *SIZE,
        "--save_dir",
        tmp_path,
    )
    assert refused("prune", "--model_path", dense, *flags, *more) == "Seen."
    refused("prune", "--model_path", dense, "--scope", "local", *SIZE, "--save_dir", tmp_path)
    assert seen[0] == PruneOptions(
        pruning_rate={"macs": 0.4, "head": 0.5},
        rate_of="macs",
        round_to=4,
        heads=True,
        max_rate={"*": 0.8},
        ignore=["a.*", "b"],
        keep_decoder=True,
        repair=False,
        seed=5,
        input_shape=(32, 32),
    )
    assert (seen[0].budgets, seen[0].shares_by_name) == ({"macs": 0.4}, {"head": 0.5})
    # Without images, which these tests do not draw, nothing is repaired.
    assert seen[1] == PruneOptions(scope="local", input_shape=(32, 32), repair=False)


def test_only_settings_that_were_given_or_chosen_are_printed(
    dense: Path, tmp_path: Path
) -> None:
    flags = ("--model_path", dense, "--pruning_rate", 0, *SIZE, "--save_dir", tmp_path)
    brief, whole = done("prune", *flags), done("prune", *flags, "--verbose")
    assert " phi b0 " in brief
    assert " dialect segprune " in brief
    assert " round_to " not in brief
    assert " round_to 8 " in whole


def test_the_seed_decides_the_random_weights(tmp_path: Path) -> None:
    states = []
    for i, seed in enumerate((1, 1, 2)):
        here = ("--phi", "b0", *SIZE, "--save_dir", tmp_path / str(i))
        done("prune", "--pruning_rate", 0, "--seed", seed, *here)
        states.append(load(tmp_path / str(i) / "l1/b0/b0_pruned_0.pth").encoder.state_dict())
    name = "stages.0.patch_embed.proj.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--pruning_rate", 1), r"--pruning_rate is 1; it must be at least 0 and below 1\."),
    (("--pruning_rate", -0.1), r"--pruning_rate is -0\.1; it must be"),
    (("--pruning_rate", "nan"), r"--pruning_rate is nan; it must be"),
    (
        ("--pruning_rate", 0.99),
        r"Rate 0\.99 is out of reach; the most that can be removed here is 0\.9\d+, since .* than 0\.9 \(--max_rate\)",
    ),
    (
        ("--pruning_rate", 0.01),
        r"Rate 0\.01 is less than folding .* removes \(0\.090\); .*, keep the head with --keep_decoder, or remove no",
    ),
    (
        ("--pruning_method", "l3"),
        r"--pruning_method is 'l3', which is unknown; .* l1, l2, fpgm, .*, wanda\.",
    ),
    (
        ("--rate_of", "flops"),
        r"--rate_of is 'flops', which is unknown; .* params, macs, channels, latency\.",
    ),
    (
        ("--scope", "half"),
        r"--scope is 'half', which is unknown; choose one of global, local, isomorphic\.",
    ),
    (
        ("--round_to", 0),
        r"--round_to is 0; widths are kept multiples of a whole number from 1 up\.",
    ),
    (("--phi", "b9"), r".*Unknown variant 'b9'; choose one of b0, b1, b2, b3, b4, b5\."),
    (
        ("--phi", "b2"),
        r".*The file is a b0, but --phi b2 was given; leave --phi out or give b0\.",
    ),
    (
        ("--num_classes", 5),
        r".*The file has 8 classes, but --num_classes 5 was given; leave .* out or give 8\.",
    ),
    (
        ("--dialect", "hf"),
        r".*The file is segprune's own, but --dialect hf was given; leave --dialect out\.",
    ),
    (("--epochs", 1), r"--epochs was given without --data; say what to fine-tune on\."),
    (("--lr", 1e-4), r"--lr has no effect without --epochs"),
    (("--no_distill",), r"--no_distill has no effect without --epochs"),
    (("--batch_size", 4), r"--batch_size has no effect without --data"),
    (("--num_workers", 0), r"--num_workers has no effect without --data"),
    (("--layout", "voc"), r"--layout has no effect without --data"),
    (("--skip_bad",), r"--skip_bad has no effect without --data"),
]


@pytest.mark.parametrize(
    ("flags", "message"), REFUSED, ids=[" ".join(map(str, flags)) for flags, _ in REFUSED]
)
def test_a_wrong_flag_is_refused(
    flags: tuple[object, ...], message: str, dense: Path, tmp_path: Path
) -> None:
    said = refused(
        "prune", "--model_path", dense, *SIZE, "--save_dir", tmp_path / "out", *flags
    )
    assert re.match(message, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--phi", "b9"), "Unknown variant 'b9'; choose one of b0, b1, b2, b3, b4, b5."),
        (
            ("--num_classes", 0),
            "--num_classes is 0; segmentation needs at least 2, background included.",
        ),
        (
            ("--dialect", "hf"),
            "--dialect was given without --model_path; it says who wrote a checkpoint.",
        ),
    ],
)
def test_a_wrong_flag_is_refused_without_a_checkpoint_too(
    flags: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    assert refused("prune", *SIZE, "--save_dir", tmp_path / "out", *flags) == message
    assert not (tmp_path / "out").exists()


def test_an_interrupted_fine_tuning_goes_on_as_the_message_says_and_ends_as_if_it_had_not_been(
    tuned: tuple[Path, str], dense: Path, data: Path, tmp_path: Path
) -> None:
    here = (*SIZE, *HERE, "--data", data, "--save_dir", tmp_path, "--batch_size", 4)
    status, errors = interrupted(3, "prune", "--model_path", dense, *here, "--epochs", 2)
    folder = tmp_path / "l1/b0/b0_pruned_0.5_finetuned"
    command = f"python -m segprune train --resume --save_dir {folder}"
    assert (status, errors) == (
        130,
        f"Training was interrupted in epoch 2 after 1 batches. Go on with: {command}\n",
    )
    before = record_in(tmp_path)
    assert "finetuned_model" not in before
    out = done(*command.split()[3:])
    after = record_in(tmp_path)
    assert {
        name: after[name] for name in before
    } == before  # what was measured before the interrupt is kept
    whole = record_in(tuned[0])["finetuned_model"]
    for name in ("miou", "iou", "best_epoch", "parameters", "spec"):
        assert after["finetuned_model"][name] == whole[name]
    assert after.keys() == record_in(tuned[0]).keys()
    assert after["finetuned_save_path"] == str(folder / "best_epoch_weights.pth")
    assert re.search(rf"fine-tuned │ .* │ {whole['miou']:.4f} │", out)
    assert f"All numbers: {tmp_path}/l1/b0/pruning_results.json" in out
    assert "Results" not in done(*command.split()[3:])  # it was complete


def test_other_training_beside_a_pruned_file_leaves_its_results_alone(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    here = (*SIZE, *HERE, "--data", data, "--save_dir", tmp_path, "--no_repair")
    done("prune", "--model_path", dense, *here)
    path, before = tmp_path / "l1/b0/b0_pruned_0.5.pth", record_in(tmp_path)
    for name in (
        "mine",
        "b0_pruned_0.5_finetuned",
    ):  # the second not asked for when it was pruned
        folder = path.with_name(name)
        interrupted(1, *training(data, folder, "--model_path", path, "--epochs", 1))
        assert "Results" not in done("train", "--resume", "--save_dir", folder)
    assert record_in(tmp_path) == before


def test_the_fine_tuning_of_another_network_never_ends_in_the_results(
    dense: Path, data: Path, tmp_path: Path
) -> None:
    # Another network was fine-tuned here before, under the same names.
    here = (*SIZE, *HERE, "--data", data, "--save_dir", tmp_path, "--batch_size", 4)
    here += ("--no_repair",)
    interrupted(3, "prune", "--model_path", dense, *here, "--epochs", 2)
    folder = tmp_path / "l1/b0/b0_pruned_0.5_finetuned"
    state = (folder / "resume.pth").read_bytes()

    # The second run stops before its own state is saved: the first one's lies there.
    other = load(dense)
    with torch.no_grad():
        other.decode_head.classifier.weight += 0.01
    save(other, tmp_path / "other.pth")
    interrupted(1, "prune", "--model_path", tmp_path / "other.pth", *here, "--epochs", 2)
    (folder / "resume.pth").write_bytes(state)
    before = record_in(tmp_path)

    out = done("train", "--resume", "--save_dir", folder)
    assert "This run did not start from" in out
    assert "Results" not in out
    assert record_in(tmp_path) == before
    assert "finetuned_model" not in before


@pytest.mark.parametrize(
    ("rates", "label"),
    [
        ({}, "0.5"),
        ({"pruning_rate": 0.25}, "0.25"),
        ({"pruning_rate": 0.25, "rate_of": "macs"}, "macs0.25"),
        ({"pruning_rate": {"macs": 0.7, "params": 0.5}}, "0.5_macs0.7"),
        ({"pruning_rate": {"params": 0.5, "stages.3": 0.7}}, "0.5_stages.3-0.7"),
        ({"pruning_rate": {"head": 0.5}}, "head-0.5"),
        ({"pruning_rate": {"stages.*/x": 0.5}}, "rates_[0-9a-f]{8}"),
        ({"plan": "my.json"}, "plan"),
        ({"plan": "my.json", "kv_reduction": 2}, "plan_kv2"),
        ({"pruning_rate": 0.0, "kv_reduction": "stages.0=2"}, "0_kv2-stages.0"),
    ],
)
def test_other_budgets_units_and_groups_have_other_names(
    rates: dict[str, Any], label: str
) -> None:
    assert re.fullmatch(label, command._label(PruneOptions(**rates)))


@pytest.mark.parametrize(("flag", "value"), [("--amp", "fp8"), ("--lr", -1.0)])
def test_a_setting_of_fine_tuning_is_refused_before_anything_long_begins(
    flag: str, value: object, dense: Path, data: Path, tmp_path: Path
) -> None:
    here = (*SIZE, *HERE, "--data", data, "--epochs", 1, "--save_dir", tmp_path / "out")
    said = refused("prune", "--model_path", dense, *here, flag, value)
    assert str(value) in said
    assert not (tmp_path / "out").exists()


def test_pruning_again_does_not_write_over_its_input(dense: Path, tmp_path: Path) -> None:
    flags = ("--pruning_rate", 0.3, *SIZE)
    done("prune", "--model_path", dense, *flags, "--save_dir", tmp_path)
    once = tmp_path / "l1/b0/b0_pruned_0.3.pth"
    before = once.read_bytes()
    said = refused("prune", "--model_path", once, *flags, "--save_dir", tmp_path)
    assert (
        said
        == f"{once} would be overwritten by this run; give another --save_dir than {tmp_path}."
    )
    assert once.read_bytes() == before
    done("prune", "--model_path", once, *flags, "--save_dir", tmp_path / "twice")
