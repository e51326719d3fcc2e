"""What `segprune train` refuses, each in one sentence and before a file is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from segprune.checkpoint import save
from segprune.model import SegFormer
from tests.commands import BEST, LAST, invoke, refused, training

ALONE = "has no effect without --teacher; give the dense network to learn from"
REFUSED: list[tuple[tuple[object, ...], str]] = [
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
    (("--layout", "coco"), r"The layout 'coco' is unknown; choose one of voc, .*folders, hf\."),
    (
        ("--layout", "ade20k"),
        r".* holds no data set in the layout ade20k \(looked for ade20k: .*\); give such a folder",
    ),
    (("--epochs", 0), r"--epochs is 0; it must be above 0\."),
    (("--batch_size", 0), r"--batch_size is 0; it must be above 0\."),
    (("--accumulate", 0), r"--accumulate is 0; it must be above 0\."),
    (
        ("--accumulate", 3),
        r"--batch_size is 4, which 1 processes and 3 pieces do not share evenly; make",
    ),
    (("--optimizer", "lion"), r"--optimizer is 'lion'; choose one of adamw, sgd\."),
    (("--momentum", 1), r"--momentum is 1\.0; it must be a share from 0 to below 1\."),
    (("--weight_decay", -1), r"--weight_decay is -1\.0; it must be 0 or above\."),
    (("--lr", 0), r"--lr is 0\.0; it must be above 0\."),
    (("--lr", "nan"), r"--lr is nan; it must be above 0\."),
    (("--lr_rule", "coco"), r"--lr_rule is 'coco'; choose one of voc\."),
    (
        ("--lr_rule", "voc", "--decay", "poly"),
        r"--decay has no effect with --lr_rule voc, which sets it; drop one",
    ),
    (
        ("--lr_rule", "voc", "--warmup", 0),
        r"--warmup has no effect with --lr_rule voc, which sets it; drop one\.",
    ),
    (("--head_lr", 0), r"--head_lr is 0\.0; it must be above 0\."),
    (("--warmup", 1), r"--warmup is 1\.0; it must be a share from 0 to below 1\."),
    (("--decay", "step"), r"--decay is 'step'; choose one of poly, cosine, constant\."),
    (("--clip_norm", -1), r"--clip_norm is -1\.0; it must be 0 or above\."),
    (("--ema", 1), r"--ema is 1\.0; it must be a share from 0 to below 1\."),
    (("--freeze_epochs", -1), r"--freeze_epochs is -1; it must be 0 or above\."),
    (
        ("--loss", "mse"),
        r"Loss 'mse' in 'mse' is unknown; add up ce, dice, focal, lovasz, ohem, as in ce\+0\.5\*lovasz",
    ),
    (
        ("--loss", "0*ce"),
        r"Weight '0' in loss '0\*ce' is no number above 0; write it as in ce\+0\.5\*lovasz\.",
    ),
    (
        ("--label_smoothing", 1),
        r"--label_smoothing is 1\.0; it must be a share from 0 to below 1\.",
    ),
    (
        ("--label_smoothing", 0.1, "--loss", "dice"),
        r"--label_smoothing has no effect on dice; set it to 0 or add ce\.",
    ),
    (
        ("--class_weights", "1,2"),
        r"--class_weights has 2 numbers for 8 classes; give one per class\.",
    ),
    (
        ("--class_weights", "rare"),
        r"--class_weights is 'rare'; give enet, median, or one number per class: 1,2,0\.5\.",
    ),
    (
        ("--class_weights", "-1 " * 8),
        r"--class_weights is -1, .*; each must be 0 or above, and not all 0\.",
    ),
    (
        ("--class_weights", "enet", "--loss", "dice"),
        r"--class_weights has no effect on dice; drop them or add ce\.",
    ),
    (
        ("--scale", 2, 1),
        r"scale \(2\.0, 1\.0\) must be \(low, high\) with 0 < low <= high; give both, low first\.",
    ),
    (("--eval_every", 0), r"--eval_every is 0; it must be above 0\."),
    (("--save_steps", -1), r"--save_steps is -1; it must be 0 or above\."),
    (("--amp", "fp8"), r"--amp is 'fp8'; choose one of auto, no, fp16, bf16\."),
    (("--amp", "fp16"), r"--amp fp16 trains on a GPU only; use one \(--cuda\)"),
    (("--tf32",), r"--tf32 has no effect on a CPU; leave it out"),
    (("--num_workers", -1), r"--num_workers is -1; it must be 0 or above\."),
    (("--seed", -1), r"--seed is -1; it must be 0 or above\."),
    (("--distill_pixel", 1), rf"--distill_pixel {ALONE}\."),
    (("--distill_channel", 1), rf"--distill_channel {ALONE}\."),
    (("--distill_feature", 1), rf"--distill_feature {ALONE}\."),
    (
        ("--teacher_dialect", "hf"),
        r"--teacher_dialect has no effect without --teacher; leave it out\.",
    ),
]


@pytest.mark.parametrize(
    ("flags", "message"), REFUSED, ids=[" ".join(map(str, flags)) for flags, _ in REFUSED]
)
def test_a_wrong_flag_is_refused(
    flags: tuple[object, ...], message: str, data: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(
        *training(data, tmp_path / "out", "--model_path", small, "--epochs", 1, *flags)
    )
    assert re.match(message, said), said
    assert not any((tmp_path / "out").rglob("*"))


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
def test_a_wrong_flag_is_refused_from_scratch_too(
    flags: tuple[object, ...], message: str, data: Path, tmp_path: Path
) -> None:
    assert refused(*training(data, tmp_path / "out", *flags)) == message


@pytest.mark.parametrize(
    ("flag", "value"), [("keep", -1), ("drop_path", 1), ("drop_path", -0.1)]
)
def test_a_number_out_of_range_is_a_usage_error_that_names_the_flag(
    flag: str, value: float, tmp_path: Path
) -> None:
    status, _, errors = invoke("train", f"--{flag}", value, "--save_dir", tmp_path / "out")
    assert status == 2
    assert f"Invalid value for '--{flag}'" in errors


@pytest.mark.parametrize("flag", ["--model_path", "--teacher"])
@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_checkpoint_that_the_run_reads_is_not_written_over(
    flag: str, name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    path = small.rename(tmp_path / "logs" / name)
    before = path.read_bytes()
    said = refused(*training(data, tmp_path / "logs", "--epochs", 1, flag, path))
    assert (
        said
        == f"{path} would be overwritten by this run; give another --save_dir than {path.parent}."
    )
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_labels_above_the_classes_are_answered_with_what_can_be_changed(
    data: Path, small_model: SegFormer, tmp_path: Path
) -> None:
    save(small_model.float(), tmp_path / "five.pth")
    said = refused(*training(data, tmp_path / "out", "--model_path", tmp_path / "five.pth"))
    assert (
        "with 5 classes; relabel the masks, or give a network that was trained for these classes ("
        in said
    )
    said = refused(*training(data, tmp_path / "out", "--phi", "b0", "--num_classes", 5))
    assert "with 5 classes; raise --num_classes or relabel the masks (" in said
