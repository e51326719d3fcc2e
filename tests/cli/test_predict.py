"""`segprune predict` on images: labels that score like `segprune eval`, files, records, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from segprune.checkpoint import load, save
from segprune.cli.console import number_of
from segprune.data import load_image, load_mask, open_source, voc_palette
from segprune.inference.draw import overlay, paint, side_by_side
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.inference.metrics import Tally, score
from segprune.model import SegFormer
from segprune.spec import Spec, standard_spec
from tests.commands import SIZE, done, invoke, refused

PALETTE = voc_palette()


@pytest.fixture
def photos(data: Path, tmp_path: Path) -> Path:
    """The three images to score, in folders and of unequal sizes."""
    folder = tmp_path / "photos"
    for sample, name, size in zip(
        open_source(data).split("val"),
        ("a", "sub/b", "sub/猫"),
        ((32, 32), (50, 40), (33, 70)),
        strict=True,
    ):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(load_image(sample.image)).resize(size[::-1]).save(path)
    return folder


def predicting_on(source: object, model: Path, out: Path, *flags: object) -> tuple[object, ...]:
    return ("predict", model, "--input", source, *SIZE, "--save_dir", out, *flags)


def record_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "predictions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("mode", ["letterbox", "whole", "slide"])
def test_the_masks_score_as_eval_does_in_every_mode(
    mode: str, data: Path, dense: Path, tmp_path: Path
) -> None:
    samples = open_source(data).split("val")
    size = () if mode == "whole" else SIZE
    images = Path(str(samples[0].image)).parent
    done(
        "predict",
        dense,
        "--input",
        images,
        "--mode",
        mode,
        *size,
        "--kind",
        "mask",
        "--save_dir",
        tmp_path,
    )
    tally = Tally(8)
    for sample in samples:
        tally.update(
            *(
                torch.tensor(load_mask(p))
                for p in (tmp_path / f"mask/{sample.name}.png", sample.mask)
            )
        )
    assert score(tally.counts, 8, 3) == evaluate(
        load(dense), samples, 8, EvalMode(mode, (32, 32))
    )


def test_all_kinds_are_drawn_from_the_mask_and_folders_are_kept(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = done(
        *predicting_on(photos, small, out, "--kind", "all", "--alpha", "0.3", "--batch_size", 2)
    )
    for name in ("a", "sub/b", "sub/猫"):
        image, mask = load_image(photos / f"{name}.png"), load_mask(out / f"mask/{name}.png")
        assert mask.shape == image.shape[:2]
        assert np.array_equal(
            load_image(out / f"overlay/{name}.png"), overlay(image, mask, PALETTE, 0.3)
        )
        painted = paint(mask, PALETTE)
        assert np.array_equal(
            load_image(out / f"side_by_side/{name}.png"), side_by_side(image, painted)
        )
    assert len([path for path in out.rglob("*") if path.is_file()]) == 3 * 3 + 2
    assert (
        f"Saved: {out}/overlay {out}/mask {out}/side_by_side {out}/legend.png {out}/predictions.json"
        in said
    )
    assert "3 images in " in said
    assert " images per second." in said
    assert "class shares" not in said


@pytest.mark.parametrize("kind", ["overlay", "mask", "side_by_side"])
def test_one_kind_is_written_alone(
    kind: str, photos: Path, small: Path, tmp_path: Path
) -> None:
    done(*predicting_on(photos / "a.png", small, tmp_path / "out", "--kind", kind))
    files = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert files == {f"{kind}/a.png", "legend.png", "predictions.json"}


def test_the_record_has_every_images_shares(photos: Path, small: Path, tmp_path: Path) -> None:
    done(*predicting_on(photos, small, tmp_path / "out", "--kind", "mask"))
    record = record_in(tmp_path / "out")
    assert [one["name"] for one in record["results"]] == ["a.png", "sub/b.png", "sub/猫.png"]
    for one in record["results"]:
        mask = load_mask(tmp_path / "out/mask" / one["file"])
        shares = 100 * np.bincount(mask.ravel(), minlength=8) / mask.size
        assert one["percent"] == {
            str(k): pytest.approx(share, abs=1e-4) for k, share in enumerate(shares) if share
        }
        assert one["size"] == list(mask.shape)
    assert (record["num_classes"], record["class_names"]) == (8, list("01234567"))
    assert record["settings"]["input"] == str(photos)
    assert record["images_per_second"] == pytest.approx(3 / record["seconds"])
    assert record["skipped"] == []


def test_a_single_image_gets_a_table_of_its_classes(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text(
        "\n".join(["sky", "", *("abcdef")]) + "\n\n", encoding="utf-8"
    )
    out = done(
        *predicting_on(
            photos / "sub/猫.png", small, tmp_path / "out", "--classes", tmp_path / "names.txt"
        )
    )
    assert "猫.png: class shares" in out
    (one,) = record_in(tmp_path / "out")["results"]
    names = dict(zip("01234567", ["sky", "", *("abcdef")], strict=True))
    for k, percent in one["percent"].items():
        assert " ".join(f"│ {k} {names[k]} │ {percent:.2f} │".split()) in out
    assert f"Saved: {tmp_path}/out/overlay/猫.png {tmp_path}/out/legend.png" in out


def test_names_and_colours_are_the_checkpoints(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    names, palette = [f"thing {k}" for k in range(8)], [255 - x for x in PALETTE]
    save(load(small), tmp_path / "named.pth", extra={"class_names": names, "palette": palette})
    out = tmp_path / "out"
    said = done(*predicting_on(photos / "a.png", tmp_path / "named.pth", out, "--kind", "all"))
    assert record_in(out)["class_names"] == names
    assert " thing " in said
    with Image.open(out / "mask/a.png") as mask:
        assert np.array_equal(np.asarray(mask.convert("RGB")), paint(np.asarray(mask), palette))
    with Image.open(out / "legend.png") as legend:
        colours = {colour for _, colour in legend.getcolors(legend.width * legend.height)}  # type: ignore[misc]
    present = map(int, record_in(out)["results"][0]["percent"])
    assert {tuple(palette[3 * k : 3 * k + 3]) for k in present} <= colours
    (tmp_path / "mine.txt").write_text("\n".join("stuvwxyz"), encoding="utf-8-sig")
    done(
        *predicting_on(
            photos / "a.png", tmp_path / "named.pth", out, "--classes", tmp_path / "mine.txt"
        )
    )
    assert record_in(out)["class_names"] == list("stuvwxyz")


def test_names_that_do_not_fit_are_refused(photos: Path, small: Path, tmp_path: Path) -> None:
    save(load(small), tmp_path / "odd.pth", extra={"class_names": ["a", "b"]})
    said = refused(*predicting_on(photos, tmp_path / "odd.pth", tmp_path / "out"))
    assert said.startswith(
        f"{tmp_path}/odd.pth has 2 class names, where the network has 8; give a file with one name per line"
    )
    assert not (tmp_path / "out").exists()


def test_a_list_of_classes_that_does_not_fit_is_refused(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    call = predicting_on(photos, small, tmp_path / "out", "--classes", names)
    assert (
        refused(*call)
        == f"{names} does not exist; give a text file with one class name per line."
    )
    names.write_text("a\nb\n")
    remedy = "give one name per line, in the order of the classes."
    assert refused(*call) == f"{names} has 2 class names, where the network has 8; {remedy}"
    names.write_bytes("背景\n".encode("gbk") * 8)
    assert (
        refused(*call)
        == f"{names} is not UTF-8 text, the only encoding read; save it as UTF-8."
    )


def test_more_classes_than_a_mask_can_hold_are_refused(
    photos: Path, small_spec: Spec, tmp_path: Path
) -> None:
    save(SegFormer(replace(small_spec, num_classes=257)), tmp_path / "many.pth")
    said = refused(*predicting_on(photos, tmp_path / "many.pth", tmp_path / "out"))
    assert (
        said == "The network has 257 classes, where masks can hold 256; give another network."
    )


@pytest.mark.parametrize("size", [(1, 1), (8, 90)])
@pytest.mark.parametrize("mode", ["letterbox", "whole", "slide"])
def test_a_tiny_image_gets_a_mask_of_its_size(
    mode: str, size: tuple[int, int], small: Path, tmp_path: Path
) -> None:
    Image.new("RGB", size[::-1], (200, 30, 30)).save(tmp_path / "x.png")
    done(
        "predict",
        small,
        "--input",
        tmp_path / "x.png",
        "--mode",
        mode,
        "--kind",
        "mask",
        "--save_dir",
        tmp_path,
    )
    assert load_mask(tmp_path / "mask/x.png").shape == size


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_changes_few_pixels(
    amp: str, photos: Path, small: Path, tmp_path: Path
) -> None:
    masks = []
    for name in ("no", amp):
        done(
            *predicting_on(
                photos / "sub/b.png", small, tmp_path / name, "--kind", "mask", "--amp", name
            )
        )
        masks.append(load_mask(tmp_path / name / "mask/b.png"))
    assert np.mean(masks[0] == masks[1]) > 0.9


def test_compiled_it_gives_the_same_masks_and_names_what_fell_back(
    photos: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", fail_to_compile)
    done(*predicting_on(photos, small, tmp_path / "plain", "--kind", "mask"))
    out = done(*predicting_on(photos, small, tmp_path / "fast", "--kind", "mask", "--compile"))
    assert "Not compiled for (3, 3, 32, 32), runs eagerly: no compiler" in out
    for name in ("a", "sub/b", "sub/猫"):
        masks = [load_mask(tmp_path / way / f"mask/{name}.png") for way in ("plain", "fast")]
        assert (masks[0] == masks[1]).mean() > 0.99  # rounded otherwise, as all is folded


def fail_to_compile(function: object, **_: object) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    return call


def test_the_number_of_threads_and_the_batch_change_nothing(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    masks = []
    for workers, batch in ((1, 1), (3, 2)):
        out = tmp_path / str(workers)
        done(
            *predicting_on(
                photos,
                small,
                out,
                "--kind",
                "mask",
                "--num_workers",
                workers,
                "--batch_size",
                batch,
            )
        )
        masks.append([load_mask(out / f"mask/{name}.png") for name in ("a", "sub/b", "sub/猫")])
    assert all(np.array_equal(one, other) for one, other in zip(*masks, strict=True))


def test_a_checkpoints_notes_and_settings_are_shown(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    save(load(small).half(), tmp_path / "half.pth")
    out = done(*predicting_on(photos, tmp_path / "half.pth", tmp_path / "out"))
    assert "Note: Weights in float16 were converted to float32." in out
    assert "input_shape 32 32" in out
    assert "alpha" not in out  # a default
    assert "variant b0 num_classes 8" in out


def test_other_files_in_the_folder_are_counted(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    (photos / "list.txt").touch()
    out = done(*predicting_on(photos, small, tmp_path / "out"))
    assert f"Note: 1 other file in {photos} left out: no images." in out


@pytest.fixture
def with_bad(photos: Path) -> Path:
    (photos / "aa.jpg").write_bytes(b"no image")
    return photos


def test_a_bad_image_is_named_and_refused(with_bad: Path, small: Path, tmp_path: Path) -> None:
    said = refused(*predicting_on(with_bad, small, tmp_path / "out"))
    assert said.startswith(f"{with_bad}/aa.jpg cannot be read as an image (")
    assert said.endswith("); replace it, or leave it out with --skip_bad.")


def test_a_bad_image_alone_has_nothing_to_go_on_with(
    with_bad: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(*predicting_on(with_bad / "aa.jpg", small, tmp_path / "out"))
    assert said.endswith("); replace it.")


@pytest.mark.parametrize("batch", [1, 8])
def test_bad_images_are_skipped_on_demand_named_and_counted(
    batch: int, with_bad: Path, small: Path, tmp_path: Path
) -> None:
    flags = ("--skip_bad", "--batch_size", batch)
    out = done(*predicting_on(with_bad, small, tmp_path / "out", *flags))
    assert "Note: Skipped 1 image that could not be read: aa.jpg 3 images in" in out
    record = record_in(tmp_path / "out")
    assert [one["name"] for one in record["results"]] == ["a.png", "sub/b.png", "sub/猫.png"]
    assert [bad["name"] for bad in record["skipped"]] == ["aa.jpg"]
    assert record["skipped"][0]["reason"].endswith("); replace it.")
    for name in ("ab", "ac", "ad"):
        (with_bad / f"{name}.jpg").touch()
    assert "Skipped 4 images that could not be read: aa.jpg, ab.jpg, ac.jpg, …" in done(
        *predicting_on(with_bad, small, tmp_path / "out", *flags)
    )


def test_a_folder_of_bad_images_alone_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"no image")
    said = refused(*predicting_on(tmp_path / "in", small, tmp_path / "out", "--skip_bad"))
    assert said.startswith(
        f"None of the images could be read, the first because: {tmp_path}/in/a.jpg cannot be read"
    )
    assert not (tmp_path / "out/predictions.json").exists()


def test_a_folder_without_images_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    said = refused(*predicting_on(tmp_path / "in", small, tmp_path / "out"))
    assert said.startswith(f"{tmp_path}/in holds no image; give a folder with ")
    assert ".jpg, " in said


def test_images_are_never_written_over(photos: Path, small: Path, tmp_path: Path) -> None:
    said = refused(*predicting_on(photos, small, photos))
    assert said == f"--save_dir {photos} is the folder of the images itself; give another one."
    photos.rename(tmp_path / "overlay")
    said = refused(*predicting_on(tmp_path / "overlay", small, tmp_path))
    assert said == f"{tmp_path}/overlay/a.png would be overwritten; give another --save_dir."


def test_an_input_that_is_not_there_is_refused(small: Path, tmp_path: Path) -> None:
    said = refused(*predicting_on(tmp_path / "no.jpg", small, tmp_path / "out"))
    expected = (
        "does not exist; give an image, a folder of images, a video or the number of a camera."
    )
    assert said == f"{tmp_path}/no.jpg {expected}"


def test_without_an_input_the_flag_is_named(small: Path) -> None:
    status, _, errors = invoke("predict", small)
    assert status == 2
    assert "Missing option '--input'" in errors


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("kind", "overlay, mask, side_by_side, all"),
        ("mode", "letterbox, whole, slide"),
        ("amp", "no, fp16, bf16"),
    ],
)
def test_a_word_that_is_unknown_is_refused(
    flag: str, allowed: str, photos: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(*predicting_on(photos, small, tmp_path / "out", f"--{flag}", "odd"))
    assert said == f"--{flag} odd is unknown; choose one of {allowed}."


@pytest.mark.parametrize(("flags", "where"), [
    (("--alpha", 0.2, "--kind", "mask"), "with --kind mask"),
    (("--alpha", 0.2, "--kind", "side_by_side"), "with --kind side_by_side"),
    (("--input_shape", 32, 32, "--mode", "whole"), "with --mode whole"),
    (("--max_frames", 3), "on images"),
    (("--skip_bad",), "without a folder of images"),
])  # fmt: skip
def test_a_flag_without_effect_is_refused(
    flags: tuple[object, ...], where: str, photos: Path, small: Path, tmp_path: Path
) -> None:
    said = refused(
        "predict", small, "--input", photos / "a.png", "--save_dir", tmp_path / "out", *flags
    )
    assert said == f"{flags[0]} has no effect {where}; leave it out."


def test_logits_that_are_no_numbers_are_refused(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    model = load(small)
    with torch.no_grad():
        model.decode_head.classifier.weight.fill_(3e38)
    save(model, tmp_path / "huge.pth")
    said = refused(*predicting_on(photos, tmp_path / "huge.pth", tmp_path / "out"))
    expected = "The network gives logits that are NaN or infinite; leave out --amp, or give another checkpoint."
    assert said == expected


def test_a_full_disk_is_told_and_leaves_no_half_image(
    photos: Path, small: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file may grow beyond it
    try:
        said = refused(*predicting_on(photos / "a.png", small, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.startswith(
        f"{tmp_path}/out/overlay/a.png could not be written (File too large); give another place"
    )
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while the network runs for the `call`-th time."""
    calls = iter(range(1, 1000))
    parts = SegFormer.parts

    def stop(self: SegFormer, x: Tensor) -> tuple[list[Tensor], Tensor]:
        if next(calls) == call:
            raise KeyboardInterrupt
        return parts(self, x)

    monkeypatch.setattr(SegFormer, "parts", stop)


def test_ctrl_c_leaves_what_was_written_and_says_so(
    photos: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted_at(3, monkeypatch)
    status, said, errors = invoke(
        *predicting_on(photos, small, out, "--kind", "mask", "--batch_size", 1)
    )
    number = len(record_in(out)["results"])
    assert status == 130
    assert (
        errors
        == f"Interrupted after {number_of(number, 'image')}; what was written until then is whole.\n"
    )
    assert 1 <= number <= 2
    assert f"{number_of(number, 'image')} in" in said
    masks = sorted((out / "mask").rglob("*"))
    assert [path.relative_to(out / "mask").as_posix() for path in masks if path.is_file()] == [
        one["file"] for one in record_in(out)["results"]
    ]


def test_ctrl_c_before_the_first_image_says_so(
    photos: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at(1, monkeypatch)
    status, _, errors = invoke(*predicting_on(photos, small, tmp_path / "out"))
    assert (status, errors) == (130, "Interrupted before any of the images was written.\n")
    assert not (tmp_path / "out").exists()


def test_a_random_stock_network_predicts_at_the_default_settings(
    photos: Path, tmp_path: Path
) -> None:
    save(SegFormer(standard_spec("b0", 3)), tmp_path / "b0.pth")
    done(
        "predict",
        tmp_path / "b0.pth",
        "--input",
        photos / "a.png",
        "--save_dir",
        tmp_path / "out",
    )
    assert load_image(tmp_path / "out/overlay/a.png").shape == (32, 32, 3)
