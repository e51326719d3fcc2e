"""`segprune info`: what is in a file, as tables and as JSON."""

import json
from pathlib import Path

import pytest
import torch

from segprune.checkpoint import read, save
from segprune.cli.console import console
from segprune.export.runtimes import OPENERS
from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.depth import remove
from segprune.spec import spec_from_dict
from segprune.stats import count
from tests.commands import done, invoke, refused
from tests.dialects import Fill, state_in


@pytest.mark.parametrize("width", [20, 80])
def test_the_json_can_be_parsed_however_narrow_the_terminal(
    width: int, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", width)
    status, out, errors = invoke("info", small, "--json", "--input_shape", 64, 96)
    assert (status, errors) == (0, "")
    record, found = json.loads(out), read(small)
    assert spec_from_dict(record["spec"]) == found.spec
    assert (record["dialect"], record["notes"], record["input_shape"]) == (
        "segprune",
        [],
        [64, 96],
    )
    counts = count(found.spec, (64, 96))
    assert (record["parameters"], record["macs"], record["flops"]) == (
        counts.parameters,
        counts.macs,
        2 * counts.macs,
    )


def test_the_tables_show_every_blocks_widths(small: Path) -> None:
    out = done("info", small, "--input_shape", 64, 64)
    spec = read(small).spec
    counts = count(spec, (64, 64))
    assert f"parameters {counts.parameters:,} MACs {counts.macs / 1e9:.3f} G at 64×64" in out
    assert "decode head linear branches; branches 32 28 36 30, width 44" in out
    for row in (
        "stages.0.blocks.0 │ 16 │ 1 │ 16 │ 12 │ 16 │ 40",
        "stages.2.blocks.1 │ 40 │ 4 │ 8 │ 10 │ 40 │ 80",
        "stages.3.blocks.0 │ 48 │ 4 │ 12 │ 14 │ – │ 128",
    ):
        assert f"│ {row} │" in out


def test_a_folded_head_is_said_to_be_one(small_model: SegFormer, tmp_path: Path) -> None:
    save(fold_decoder(small_model.float()), tmp_path / "folded.pth")
    assert "decode head linear branches folded into the fuse convolution; width 44" in done(
        "info", tmp_path / "folded.pth"
    )


def test_a_file_of_mmsegmentation_is_shown_with_its_kind_of_head(
    trained_like: Fill, tmp_path: Path
) -> None:
    torch.save(
        {"meta": {}, "state_dict": state_in("mmseg", trained_like)}, tmp_path / "theirs.pth"
    )
    out = done("info", tmp_path / "theirs.pth")
    assert "dialect mmseg" in out
    assert (
        "decode head a BatchNorm and a ReLU in each branch; branches 256 256 256 256, width 256"
        in out
    )


def test_of_a_branch_that_was_removed_no_widths_are_shown(
    small_model: SegFormer, tmp_path: Path
) -> None:
    blocks = "encoder.stages.{}.blocks.{}.{}"
    save(
        remove(small_model.float(), [blocks.format(0, 0, "attn"), blocks.format(2, 1, "mlp")]),
        tmp_path / "a.pth",
    )
    out = done("info", tmp_path / "a.pth")
    assert "│ stages.0.blocks.0 │ 16 │ – │ – │ – │ – │ 40 │" in out
    assert "│ stages.2.blocks.1 │ 40 │ 4 │ 8 │ 10 │ 40 │ – │" in out
    record = json.loads(invoke("info", tmp_path / "a.pth", "--json")[1])
    assert spec_from_dict(record["spec"]) == read(tmp_path / "a.pth").spec


def test_what_was_assumed_of_a_foreign_file_is_noted_and_can_be_overruled(
    trained_like: Fill, tmp_path: Path
) -> None:
    torch.save(state_in("nvlabs", trained_like), tmp_path / "theirs.pth")
    out = done("info", tmp_path / "theirs.pth")
    assert "dialect bubbliiiing" in out
    assert "bubbliiiing was assumed" in out
    out = done("info", tmp_path / "theirs.pth", "--dialect", "nvlabs")
    assert "dialect nvlabs" in out
    assert "was assumed" not in out


def test_a_backbone_is_shown_with_the_classes_it_would_get(
    trained_like: Fill, tmp_path: Path
) -> None:
    path = tmp_path / "mit_b0.pth"
    torch.save(
        {
            k: v
            for k, v in state_in("nvlabs", trained_like).items()
            if k.startswith("backbone.")
        },
        path,
    )
    assert "the decode head for 150 classes is new and untrained" in done("info", path)
    out = done("info", path, "--num_classes", 7)
    assert "num_classes 7" in out
    assert (
        "Only a backbone was found: the decode head for 7 classes is new and untrained." in out
    )


@pytest.mark.parametrize("suffix", sorted(OPENERS))
def test_of_an_exported_file_it_is_said_which_commands_read_it(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"x")
    for flags in (("info", path), ("predict", path, "--input", tmp_path)):
        assert refused(*flags) == (
            f"{path} ends in '{suffix}'; a checkpoint ends in .pth, .pt, .bin or .safetensors, or is a Hugging Face "
            "folder; exported files are read by segprune eval and segprune benchmark."
        )


def test_a_set_of_weights_is_chosen_and_kept_in_a_file_of_ours(
    trained_like: Fill, tmp_path: Path
) -> None:
    ema = state_in("hf", trained_like)
    content = {"model": {key: tensor * 0 for key, tensor in ema.items()}, "ema": ema}
    torch.save(content, tmp_path / "a.ckpt")
    assert "model was taken, not ema (--weights" in done("info", tmp_path / "a.ckpt")
    assert "was taken" not in done("info", tmp_path / "a.ckpt", "--weights", "ema")
    flags = ("--to", "segprune", "--weights", "ema", "--heads", 1, 2, 4, 8)
    done("convert", tmp_path / "a.ckpt", tmp_path / "ours.pth", *flags)
    found = read(tmp_path / "ours.pth")
    assert found.state_dict["decode_head.classifier.weight"].any()
    assert [stage.blocks[0].num_heads for stage in found.spec.stages] == [1, 2, 4, 8]
