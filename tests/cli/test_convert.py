"""`segprune convert`: what is written, what is said about it, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import SegformerForSemanticSegmentation

from segprune.checkpoint import load, read, save
from segprune.model import SegFormer
from tests.commands import done, refused
from tests.dialects import Fill, state_in


@pytest.fixture
def named(dense: Path, tmp_path: Path) -> Path:
    """The dense network in a file that knows its classes' names."""
    save(
        load(dense),
        tmp_path / "named.pth",
        extra={"class_names": [f"class {k}" for k in range(8)]},
    )
    return tmp_path / "named.pth"


def test_a_pruned_network_goes_from_prune_to_stock_transformers(
    named: Path, tmp_path: Path
) -> None:
    done(
        "prune",
        "--model_path",
        named,
        "--uniform",
        "--input_shape",
        64,
        64,
        "--save_dir",
        tmp_path / "out",
    )
    pruned = tmp_path / "out/l1/b0/b0_pruned_0.5.pth"
    record = json.loads((pruned.parent / "pruning_results.json").read_text(encoding="utf-8"))
    assert record["pruning_config"]["uniform"] is True
    assert record["reduction"]["parameters_reduction_percent"] == pytest.approx(50, abs=2)
    out = done("convert", pruned, tmp_path / "hf", "--to", "hf", "--input_shape", 64, 96)
    assert "Note:" not in out
    compared = re.search(
        r"Read again by segprune and transformers [\d.]+: logits differ by (\S+) of the largest at most",
        out,
    )
    assert compared
    assert 0 < float(compared[1]) < 1e-5
    assert f"Written for hf, b0, {record['pruned_model']['parameters']:,} parameters:" in out
    theirs, info = SegformerForSemanticSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.config.id2label[7] == "class 7"
    processor = json.loads(
        (tmp_path / "hf/preprocessor_config.json").read_text(encoding="utf-8")
    )
    assert processor["size"] == {"height": 64, "width": 96}
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = load(pruned).parts(x)[1]
        torch.testing.assert_close(
            theirs(x).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )


def test_what_was_assumed_and_what_the_folder_needs_are_noted(
    small: Path, trained_like: Fill, tmp_path: Path
) -> None:
    torch.save(state_in("nvlabs", trained_like), tmp_path / "theirs.pth")
    out = done("convert", tmp_path / "theirs.pth", tmp_path / "a.pth", "--to", "bubbliiiing")
    assert "Note: The names fit nvlabs and bubbliiiing; bubbliiiing was assumed" in out
    out = done("convert", small, tmp_path / "hf", "--to", "hf")
    assert (
        "Note: Transformers' own classes cannot hold this network, since block 0 of stage 1 has values"
        in out
    )
    assert "Read again by segprune: logits differ by 0.0e+00 of the largest at most." in out
    assert read(tmp_path / "hf").spec == read(small).spec


def test_the_names_of_another_tools_file_go_from_format_to_format(
    trained_like: Fill, tmp_path: Path
) -> None:
    names = ["sky", "road", "tree", "car", "person"]
    torch.save(
        {"meta": {"CLASSES": names}, "state_dict": state_in("nvlabs", trained_like)},
        tmp_path / "theirs.pth",
    )
    done("convert", tmp_path / "theirs.pth", tmp_path / "hf", "--to", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {str(k): name for k, name in enumerate(names)}
    assert read(tmp_path / "hf").extra["class_names"] == names


def test_mistakes_end_in_one_sentence(
    small: Path, dense: Path, trained_like: Fill, tmp_path: Path
) -> None:
    out = tmp_path / "out.pth"
    assert refused("convert", small, out, "--to", "smp") == (
        "Unknown format 'smp'; --to knows hf, nvlabs, bubbliiiing, mmseg, segprune."
    )
    assert refused("convert", dense, out, "--to", "nvlabs", "--input_shape", 64, 64) == (
        "--input_shape has no effect with --to nvlabs, which keeps no size; leave it out."
    )
    assert refused("convert", dense, dense, "--to", "nvlabs").endswith(
        "is the checkpoint itself; give another place to write to."
    )
    assert "nvlabs's classes cannot hold this network, since block 0 of" in refused(
        "convert", small, out, "--to", "nvlabs"
    )
    backbone = {
        k: v for k, v in state_in("nvlabs", trained_like).items() if k.startswith("backbone.")
    }
    torch.save(backbone, tmp_path / "mit_b0.pth")
    assert "its classes are unknown" in refused(
        "convert", tmp_path / "mit_b0.pth", out, "--to", "nvlabs"
    )
    assert not out.exists()


def test_names_of_classes_in_the_file_that_do_not_fit_are_refused(
    small_model: SegFormer, tmp_path: Path
) -> None:
    save(small_model.float(), tmp_path / "a.pth", extra={"class_names": ["one"]})
    assert refused("convert", tmp_path / "a.pth", tmp_path / "hf", "--to", "hf") == (
        "There are 1 class names where the network has 5 classes; give one for each."
    )


def test_a_link_to_itself_is_refused_like_any_file_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    assert refused("convert", tmp_path / "loop.pth", tmp_path / "out", "--to", "hf")
