"""`segprune train`: from scratch and from any file; and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segprune.checkpoint import read, save
from segprune.convert import NUMERICS
from segprune.model import SegFormer
from segprune.spec import standard_spec
from tests.commands import BEST, LAST, done, refused, results_in, same, training
from tests.dialects import Fill, reference


def test_training_from_scratch_starts_at_the_variant_asked_for(data: Path, tmp_path: Path) -> None:
    done(*training(data, tmp_path, "--phi", "b0", "--num_classes", 8, "--epochs", 1))
    found = read(tmp_path / BEST, variant="b0", num_classes=8)
    assert found.spec == standard_spec("b0", 8)
    assert found.extra["lr"] == results_in(tmp_path)["settings"]["lr"] == 1e-3


def test_a_bubbliiiing_file_is_fine_tuned_with_its_own_numerics(data: Path, trained_like: Fill, tmp_path: Path) -> None:
    torch.save(reference("bubbliiiing", trained_like, num_classes=8).state_dict(), tmp_path / "theirs.pth")
    out = done(*training(data, tmp_path / "out", "--model_path", tmp_path / "theirs.pth", "--epochs", 1))
    assert "bubbliiiing was assumed" in out
    found = read(tmp_path / "out" / LAST)
    assert found.dialect == "segprune"
    assert found.spec.numerics == NUMERICS["bubbliiiing"]
    assert results_in(tmp_path / "out")["settings"]["lr"] == 6e-5
    assert found.extra["lr"] == pytest.approx(6e-4)  # so that fine-tuning once more takes the same rate


def test_a_pruned_file_is_fine_tuned_at_a_tenth_of_its_learning_rate(data: Path, small: Path, tmp_path: Path) -> None:
    done(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 1))
    before, after = read(small), read(tmp_path / "out" / LAST)
    assert after.spec == before.spec
    assert not same(after.state_dict, before.state_dict)
    assert results_in(tmp_path / "out")["settings"]["lr"] == pytest.approx(1e-3)
    assert after.extra["lr"] == 1e-2


def test_flags_overrule_what_is_read_off_the_file(data: Path, small: Path, tmp_path: Path) -> None:
    flags = ("--lr", 5e-4, "--drop_path", 0.3, "--freeze_epochs", 1, "--epochs", 1)
    done(*training(data, tmp_path / "out", "--model_path", small, *flags))
    before, after = read(small), read(tmp_path / "out" / LAST)
    assert results_in(tmp_path / "out")["settings"]["lr"] == 5e-4
    assert after.spec.numerics == replace(before.spec.numerics, drop_path=0.3)
    encoder = {name: before.state_dict[name] for name in before.state_dict if name.startswith("encoder.")}
    assert all(torch.equal(after.state_dict[name], encoder[name]) for name in encoder)  # frozen
    assert not same(after.state_dict, before.state_dict)


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--phi", "b2"), r".*The file is a b0, but --phi b2 was given; leave --phi out or give b0\."),
    (("--num_classes", 5), r".*The file has 8 classes, but --num_classes 5 was given; leave .* out or give 8\."),
    (("--dialect", "hf"), r".*The file is segprune's own, but --dialect hf was given; leave --dialect out\."),
    (("--epochs", 0), r"epochs is 0; it must be above 0\."),
    (("--batch_size", 0), r"batch_size is 0; it must be above 0\."),
    (("--lr", 0), r"lr is 0\.0; it must be above 0\."),
    (("--lr", "nan"), r"lr is nan; it must be above 0\."),
    (("--warmup", 1), r"warmup is 1\.0; it is a share, from 0 to below 1\."),
    (("--decay", "step"), r"Decay 'step' is unknown; choose one of poly, cosine, constant\."),
    (("--freeze_epochs", -1), r"freeze_epochs is -1; it must be 0 or above\."),
    (("--scale", 2, 1), r"scale \(2\.0, 1\.0\) must be \(low, high\) with 0 < low <= high; give both, low first\."),
    (("--amp", "fp8"), r"Mixed precision 'fp8' is unknown; choose no, fp16 or bf16\."),
    (("--seed", -1), r"seed is -1; it must be 0 or above\."),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(map(str, flags)) for flags, _ in REFUSED])
def test_a_wrong_flag_is_refused(
    flags: tuple[object, ...], message: str, data: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(*training(data, tmp_path / "out", "--model_path", small, "--epochs", 1, *flags))
    assert re.match(message, said), said
    assert not any((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--phi", "b9"), "Unknown variant 'b9'; choose one of b0, b1, b2, b3, b4, b5."),
        (("--num_classes", 0), "num_classes is 0; segmentation needs at least 2, background included."),
        (("--dialect", "hf"), "--dialect was given without --model_path; it says who wrote a checkpoint."),
    ],
)
def test_a_wrong_flag_is_refused_from_scratch_too(
    flags: tuple[object, ...], message: str, data: Path, tmp_path: Path
) -> None:
    assert refused(*training(data, tmp_path / "out", *flags)) == message


def test_a_networks_file_without_a_rate_of_its_own_gets_the_papers(data: Path, small: Path, tmp_path: Path) -> None:
    found = read(small)
    model = SegFormer(found.spec)
    model.load_state_dict(found.state_dict)
    save(model, tmp_path / "bare.pth")
    done(*training(data, tmp_path / "out", "--model_path", tmp_path / "bare.pth", "--epochs", 1))
    assert results_in(tmp_path / "out")["settings"]["lr"] == 6e-5


@pytest.mark.parametrize("flag", ["--model_path", "--teacher"])
@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_checkpoint_that_the_run_reads_is_not_written_over(
    flag: str, name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    path = small.rename(tmp_path / "logs" / name)
    before = path.read_bytes()
    said = refused(*training(data, tmp_path / "logs", "--epochs", 1, flag, path))
    assert said == f"{path} would be written over by this run; give another --save_dir than {path.parent}."
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
