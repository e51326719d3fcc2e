"""What every command does alike: refuses bad files and bad data in one sentence, leaves no half-written file."""

from __future__ import annotations

import errno
import io
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from segprune.checkpoint import load, save
from segprune.cli import console as module
from segprune.cli.console import (
    accept_any_text,
    console,
    eager_beside,
    latency_text,
    measured_on,
    number_of,
    one_sentence,
    progress_bar,
    show_notes,
    show_score,
    show_settings,
    show_table,
)
from segprune.inference.evaluate import Score
from segprune.timing import Latency, summarise
from tests.commands import HERE, SIZE, done, invoke, refused
from tests.dialects import state_in


def command_on(name: str, path: Path, data: Path, out: Path) -> tuple[object, ...]:
    """A call of each command that reads a checkpoint; `out` is where it would write."""
    here = ("--data", data, *SIZE, *HERE)
    pictures = data / "VOCdevkit/VOC2007/JPEGImages"
    return {
        "predict": ("predict", path, "--input", pictures, *SIZE, "--save_dir", out),
        "info": ("info", path),
        "eval": ("eval", path, *here, "--json", out / "score.json"),
        "prune": (
            "prune",
            "--model_path",
            path,
            *here,
            "--pruning_rate",
            "0",
            "--save_dir",
            out,
        ),
        "train": ("train", "--model_path", path, *here, "--epochs", "1", "--save_dir", out),
    }[name]


ROOT = Path(__file__).parents[2]
READERS = ("info", "eval", "predict", "prune", "train")
SCORERS = ("eval", "prune", "train")
RUNNERS = (*SCORERS, "predict")


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def resnet() -> dict[str, Tensor]:
    return {
        "conv1.weight": torch.ones(64, 3, 7, 7),
        "layer1.0.bn1.bias": torch.ones(64),
        "fc.bias": torch.ones(10),
    }


BAD_FILES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda path, whole: path, "does not exist; give the path of a checkpoint"),
    "empty": (lambda path, whole: path.touch(), "is empty; copy or download it again"),
    "truncated": (
        lambda path, whole: path.write_bytes(whole.read_bytes()[:50_000]),
        "is not a PyTorch checkpoint, or only a part of one; copy or download it again, or give another file",
    ),
    "a text": (
        lambda path, whole: path.write_text("no checkpoint"),
        "is not a PyTorch checkpoint, or only a part",
    ),
    "a resnet": (
        lambda path, whole: torch.save(resnet(), path),
        "This is not a SegFormer: expected keys such as .*, found conv1.weight, layer1.0.bn1.bias, fc.bias; give a",
    ),
    "a number": (
        lambda path, whole: torch.save(3, path),
        "It holds int data, not a state dict; save one",
    ),
    "code": (
        lambda path, whole: torch.save({"model": RunsCode(path.parent / "ran")}, path),
        r"asks for \w+\.mkdir, and building that could run any code, so the file was not opened; save the weights",
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("bad", BAD_FILES)
def test_every_command_refuses_a_bad_file_and_writes_nothing(
    bad: str, name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    write, message = BAD_FILES[bad]
    path = tmp_path / "bad.pth"
    write(path, small)
    said = refused(*command_on(name, path, data, tmp_path / "out"))
    assert re.match(rf"{re.escape(str(path))}:? {message}", said), said
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_the_code_in_the_bad_file_would_have_run(tmp_path: Path) -> None:
    torch.save({"model": RunsCode(tmp_path / "ran")}, tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("name", RUNNERS)
def test_weights_with_nan_are_refused_by_name(
    name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    model = load(small)
    with torch.no_grad():
        model.decode_head.norm.bias[3] = float("nan")
    save(model, tmp_path / "nan.pth")
    message = "decode_head.norm.bias has NaN or infinite values, so the training diverged; give an earlier checkpoint."
    assert refused(*command_on(name, tmp_path / "nan.pth", data, tmp_path / "out")) == message


@pytest.mark.parametrize("name", ["eval", "predict", "prune"])
def test_a_bare_backbone_has_nothing_to_score_or_prune(
    name: str, data: Path, trained_like: Callable[[nn.Module], nn.Module], tmp_path: Path
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
    call = command_on(name, path, data, tmp_path / "out")
    if name in ("eval", "predict"):
        assert refused(*call).endswith(
            "so its classes are unknown; give --num_classes to train it, or a whole network."
        )
    else:
        advice = f"segprune train --model_path {path} --num_classes 8."
        assert (
            refused(*call, "--num_classes", 8)
            == f"{path} holds only a backbone; train it first: {advice}"
        )


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("shape", [(31, 32), (0, 0), (-64, 64)])
def test_an_input_shape_that_is_too_small_is_refused(
    shape: tuple[int, int], name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(*command_on(name, small, data, tmp_path / "out"), "--input_shape", *shape)
    assert said.startswith(
        f"The input is {shape[0]}×{shape[1]} pixels; both sides must be at least 32, since"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", RUNNERS)
def test_cuda_without_a_gpu_is_refused(
    name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    message = (
        "--cuda was given but PyTorch sees no GPU here; leave out --cuda to run on the CPU, or"
    )
    assert refused(*command_on(name, small, data, tmp_path / "out"), "--cuda").startswith(
        message
    )
    assert not (tmp_path / "out").exists()


PARTS = {
    "predict": "segprune.cli.predict.predict_images",
    "eval": "segprune.api.score_samples",
    "prune": "segprune.cli.prune.measure_latency",
    "train": "segprune.runs.fit.train",
}


@pytest.mark.parametrize("name", RUNNERS)
def test_a_full_gpu_is_explained(
    name: str, data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PARTS[name], too_much)
    assert refused(*command_on(name, small, data, tmp_path / "out")) == (
        "The GPU is out of memory; use a smaller --input_shape or --batch_size, a smaller variant (--phi), "
        "or leave out --cuda to run on the CPU."
    )


@pytest.mark.parametrize("name", RUNNERS)
def test_a_file_in_the_place_of_the_folder_is_refused(
    name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    said = refused(*command_on(name, small, data, tmp_path / "out"))
    assert re.fullmatch(
        rf"{tmp_path}/out/\S+ could not be written \(.*\); give another place, or see to it that {tmp_path}/out\S* is "
        r"a folder with free space in which you may write\.",
        said,
    )
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", SCORERS)
def test_a_full_disk_leaves_the_old_files_whole(
    name: str, data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, content: Any) -> int:
        with path.open("wb") as file:
            file.write(bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    done(*command_on(name, small, data, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert before
    monkeypatch.setattr(Path, "write_bytes", half)
    said = refused(*command_on(name, small, data, out))
    assert (
        "could not be written (No space left on device); give another place, or see to it that"
        in said
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def damaged(data: Path, folder: Path, kind: str) -> Path:
    """A copy of the data with one mistake, which the val list holds too."""
    shutil.copytree(data, folder)
    masks = sorted((folder / "VOCdevkit/VOC2007/SegmentationClass").iterdir())
    lists = folder / "VOCdevkit/VOC2007/ImageSets/Segmentation"
    mask = (
        folder
        / f"VOCdevkit/VOC2007/SegmentationClass/{(lists / 'val.txt').read_text().split()[0]}.png"
    )
    labels = np.zeros((32, 32), dtype=np.uint8)
    if kind == "no list":
        (lists / "val.txt").unlink()
    elif kind == "no mask":
        mask.unlink()
    elif kind == "0 and 255":
        labels[4:20] = 255
        for path in masks:
            Image.fromarray(labels).save(path)
    elif kind == "out of range":
        labels[4:20] = 200
        Image.fromarray(labels).save(mask)
    else:
        Image.new("RGB", (32, 32), (128, 64, 0)).save(mask)
    return folder


BAD_DATA = {
    "no list": r"val\.txt is missing, the list of the split's images",
    "no mask": r"Mask \S+\.png is missing \(1 of 3 masks of val\.txt are\); add it or take its name off val\.txt\.",
    "0 and 255": r"hold only 0 and 255, where the pixel value must be the class .*; paint the object 1 instead of 255",
    "out of range": r"holds the label 200, where 0\.\.7 and 255 \(ignored\) are allowed with 8 classes; relabel",
    "RGB": r"Mask \S+\.png has mode RGB .*, where the pixel value must be the class; ",
}


# Without lists a data set is scored whole; only training needs to know its parts.
BAD_CASES = [
    (kind, name)
    for kind in BAD_DATA
    for name in SCORERS
    if kind != "no lists" or name == "train"
]


@pytest.mark.parametrize(("kind", "name"), BAD_CASES)
def test_bad_data_is_refused_before_anything_is_written(
    kind: str, name: str, data: Path, small: Path, tmp_path: Path
) -> None:
    folder = damaged(data, tmp_path / "bad", kind)
    said = refused(*command_on(name, small, folder, tmp_path / "out"))
    assert re.search(BAD_DATA[kind], said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SCORERS)
def test_a_data_folder_that_is_not_there_is_refused(
    name: str, small: Path, tmp_path: Path
) -> None:
    said = refused(*command_on(name, small, tmp_path / "nothing", tmp_path / "out"))
    assert said.startswith(
        f"{tmp_path}/nothing does not exist; give a folder in one of the layouts voc, "
    )


def test_an_interrupt_ends_with_status_130_and_says_that_all_files_are_whole(
    data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("segprune.cli.prune.measure_latency", stop)
    status, _, errors = invoke(*command_on("prune", small, data, tmp_path / "out"))
    assert (status, errors) == (130, "Interrupted; no file was left half-written.\n")


def test_a_mistake_of_ours_keeps_its_trace() -> None:
    with pytest.raises(RuntimeError, match="ours"), one_sentence():
        raise RuntimeError("ours")


def test_an_argument_that_the_library_names_is_printed_as_the_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (
        pytest.raises(SystemExit, match="1"),
        one_sentence({"head_lr": "--head_lr", "model_path": "FILE"}),
    ):
        raise ValueError("`head_lr` is 0 in `model_path`, and `other` is no argument.")
    assert (
        capsys.readouterr().err
        == "Error: --head_lr is 0 in FILE, and `other` is no argument.\n"
    )


def test_notes_and_arguments_under_another_name_are_printed_as_flags_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_notes(("nvlabs was assumed (`dialect` overrules).",))
    assert "Note: nvlabs was assumed (--dialect overrules)." in capsys.readouterr().out
    with pytest.raises(SystemExit), one_sentence({"phi": "--phi"}):
        raise ValueError("The file is a b2, but `variant` b0 was given.")
    assert "but --phi b0 was given." in capsys.readouterr().err


def test_a_message_is_printed_as_it_is_and_not_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="1"), one_sentence():
        raise ValueError("stages [bold] and [/x] stay.")
    assert capsys.readouterr().err == "Error: stages [bold] and [/x] stay.\n"


@pytest.mark.parametrize("name", ["prune", "train", "eval", "predict", "info", "shapes"])
def test_an_unknown_flag_is_a_usage_error_that_names_it(name: str) -> None:
    status, _, errors = invoke(name, "--learning_rat", "1")
    assert status == 2
    assert "No such option: --learning_rat" in errors


WIDE = (["name", "first", "second"], [["a" * 20, "1" * 20, "2" * 20]])


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(80, ()), (50, ("second",)), (30, ("second", "first")), (20, ("second", "first"))],
)
def test_a_narrow_terminal_loses_whole_columns_and_says_which(
    width: int, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        module,
        "console",
        Console(file=out, width=width, force_terminal=True, color_system=None),
    )
    assert module.show_table("Table", *WIDE, spare=("second", "first")) == left_out
    shown = {
        name
        for name, text in (("first", "1" * 20), ("second", "2" * 20))
        if text in out.getvalue()
    }
    assert shown == {"first", "second"} - set(left_out)


def test_a_log_has_the_whole_table_whatever_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=out, width=40))
    assert module.show_table("Table", *WIDE, spare=("second",)) == ()
    assert all(text in out.getvalue() for text in WIDE[1][0])
    assert module.console.width == 40


def test_one_of_a_thing_has_no_plural() -> None:
    assert [number_of(count, "picture") for count in (0, 1, 2)] == [
        "0 pictures",
        "1 picture",
        "2 pictures",
    ]


def test_settings_are_shown_with_pairs_dashes_and_short_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_settings(
        "What", {"shape": (32, 64), "none": None, "empty": "", "lr": 6e-5, "flag": False}
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["What"],
        ["shape", "32", "64"],
        ["none", "–"],
        ["empty", "–"],
        ["lr", "6e-05"],
        ["flag", "False"],
    ]


@pytest.mark.parametrize("boundary", [False, True])
def test_a_score_is_shown_by_class_as_far_as_the_names_go(
    boundary: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    score = Score(0.25, 0.6, 0.75, (0.5, None, 0.0), (0.6, None, None), (0.7, None, 0.0), 3)
    if boundary:
        score = replace(score, boundary_miou=0.2, boundary_iou=(0.4, None, 0.0))
    show_score("Score", score, ("sky", "sea"))
    title, *_, means = capsys.readouterr().out.strip().splitlines()
    assert title == "Score (3 images)"
    assert (
        means
        == "mIoU 0.2500, mPA 0.6000, pixel accuracy 0.7500"
        + ", boundary mIoU 0.2000" * boundary
    )


def test_a_scores_table_has_a_dash_where_there_is_no_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ratios = ((0.5, None, 0.0), (0.6, None, None), (0.7, None, 0.0))
    show_score(
        "Score", Score(0.25, 0.6, 0.75, *ratios, 3, 0.2, (0.4, None, 0.0)), ("sky", "sea")
    )
    lines = capsys.readouterr().out.splitlines()
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in lines
        if re.match("[│┃]", line)
    ]
    assert rows == [
        ["class", "IoU", "recall", "precision", "boundary IoU"],
        ["0 sky", "0.5000", "0.6000", "0.7000", "0.4000"],
        ["1 sea", "–", "–", "–", "–"],
        ["2", "0.0000", "–", "0.0000", "0.0000"],
    ]


def test_a_progress_bar_stays_out_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert not console.is_terminal
    with progress_bar("working") as advance:
        advance(1, 2, "half")
        advance(2, 2)
    assert capsys.readouterr() == ("", "")


def test_a_latency_says_what_it_was_measured_on() -> None:
    latency = summarise([5.0] * 30, batch=4, precision="fp32", threads=2)
    said = measured_on(latency, (512, 1024))
    for fact in ("30 runs", "batch 4", "512×1024", "fp32", "cpu", "2 threads"):
        assert fact in said
    assert "graph" not in said


def on_gpu(graph_ms: float, eager_ms: float) -> Latency:
    spread = (graph_ms,) * 5
    return Latency(
        *spread, 30, 1, "bf16", "cuda graph", "NVIDIA H100", threads=None, eager_ms=eager_ms
    )


def test_a_gpu_s_latency_names_the_card_the_graph_and_the_precision_and_no_threads() -> None:
    said = measured_on(on_gpu(1.2, 4.1), (512, 512))
    for fact in ("CUDA graph", "NVIDIA H100", "bf16", "30 runs"):
        assert fact in said
    assert "thread" not in said
    assert latency_text(on_gpu(1.234, 4.1)) == "1.23 (1.23–1.23)"


def test_eager_is_told_beside_the_graph_where_it_takes_longer() -> None:
    said = eager_beside(on_gpu(1.36, 4.11), on_gpu(1.2, 4.13))
    assert "4.11 ms dense" in said
    assert "4.13 ms pruned" in said
    assert "launch" in said
    assert eager_beside(on_gpu(41.4, 41.9), on_gpu(18.9, 19.0)) == ""
    on_cpu = summarise([5.0] * 3, batch=1, precision="fp32", threads=1)
    assert eager_beside(on_cpu, on_cpu) == ""


FAULTS = """
import resource, sys, torch
from segprune.cli.console import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_blocks_are_paid_for_once_when_freed_memory_is_kept() -> None:
    bare = {
        name: value
        for name, value in os.environ.items()
        if "MALLOC" not in name and name != "GLIBC_TUNABLES"
    }

    def faults(mode: str, **environment: str) -> int:
        command = [sys.executable, "-c", FAULTS, mode]
        return int(
            subprocess.run(
                command, check=True, capture_output=True, env=bare | environment, cwd=ROOT
            ).stdout
        )

    as_it_is = faults("as it is")
    assert faults("kept") < as_it_is / 5
    assert (
        faults("kept", MALLOC_TRIM_THRESHOLD_="131072") > as_it_is / 2
    )  # the environment's word counts


@pytest.mark.parametrize(
    "name", ["runs[new]", "runs[/x]", "[/red]", ":smile:", "a\x1b[2J\x07b"]
)
def test_text_of_strangers_is_printed_as_it_is(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_settings(name, {"save_dir": name})
    show_notes((name,))
    show_table(name, [name, "n"], [[name, "1"]])
    console.print(f"Saved: {name}")
    with pytest.raises(SystemExit), one_sentence():
        raise ValueError(name)

    out, err = capsys.readouterr()
    shown = name.replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    assert out.count(shown) >= 6
    assert shown in err
    assert "\x1b" not in out + err


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii", "utf-8"])
def test_output_in_any_encoding_never_ends_a_run(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding))
    accept_any_text()
    show_settings("b0 → b0 ½", {"file": os.fsdecode(b"a\xff.pth"), "classes": "背景 ěščř"})
    show_table("512×512", ["−1 %", "…"], [["½", "·"]])
    sys.stdout.flush()

    text = stream.getvalue().decode(encoding)
    assert "a?.pth" in text
    assert "512×512" in text or "512x512" in text
    assert ("背景" in text) == (encoding in ("gbk", "utf-8"))


def test_a_note_is_shown_once_in_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with module.one_sentence():
            module.show_notes(("The names fit two.", "Another."))
            module.show_notes(("The names fit two.",))
        assert capsys.readouterr().out.count("The names fit two.") == 1
