"""Files that were trained on other pixels and labels: masks are what the network itself says, so every score is 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segprune import evaluate, load_images
from segprune.checkpoint import load, read, save
from segprune.data import open_source
from segprune.export.network import Deployed
from segprune.model import SegFormer
from segprune.pruning.pruner import Pruner
from segprune.spec import Preprocessing
from tests.commands import BEST, HERE, done, refused, told, training

HALF = Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3)
CASES = {
    "plain": Preprocessing(),
    "half": HALF,
    "pixels": Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3),
    "bgr": Preprocessing(channels="bgr"),
    "reduced": Preprocessing(label_offset=-1),
    "ignored": replace(HALF, ignore_index=1),
}
SCORED = ("--mode", "whole", *HERE, "--no_boundary")


def by_hand(image: Any, own: Preprocessing) -> torch.Tensor:
    """The network's input B 3 H W, as the definition has it."""
    pixels = image.astype(np.float64)[..., :: 1 if own.channels == "rgb" else -1]
    x = (pixels - np.array(own.mean)) / np.array(own.std)
    return torch.from_numpy(x.transpose(2, 0, 1)[None].copy()).float()


def write_case(folder: Path, model: SegFormer, own: Preprocessing) -> Path:
    """Writes a checkpoint, and beside it a data set that it is right about; returns the checkpoint."""
    folder.mkdir(exist_ok=True)
    model.spec = replace(model.spec, preprocessing=own)
    save(model, folder / "a.pth")
    rng = np.random.default_rng(1)

    for split, number in (("train", 4), ("val", 2)):
        for index in range(number):
            coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            image = np.asarray(
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
            )
            with torch.inference_mode():
                labels = model(by_hand(image, own))[0].argmax(0).numpy()
            # Ignored labels stand where the network says something else.
            if own.ignore_index != 255:
                labels[:8] = own.ignore_index
            labels = labels - own.label_offset
            for kind, array in (("images", image), ("masks", labels.astype(np.uint8))):
                path = folder / "data" / kind / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return folder / "a.pth"


@pytest.fixture
def varied(small_model: SegFormer) -> SegFormer:
    """A network that sees several classes in such images, whatever its preprocessing."""
    model = small_model.float()
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    return model


@pytest.mark.parametrize("case", CASES)
def test_what_the_network_says_is_right_by_its_own_preprocessing(
    case: str, varied: SegFormer, tmp_path: Path
) -> None:
    path = write_case(tmp_path, varied, CASES[case])
    out = done("eval", path, "--data", tmp_path / "data", *SCORED)
    assert "mIoU 1.0000" in out
    score = evaluate(load(path), tmp_path / "data", mode="whole", num_workers=0)
    assert score.miou == 1.0
    assert (
        evaluate(load(path), open_source(tmp_path / "data"), mode="whole", num_workers=0)
        == score
    )

    # The same masks come out of predict.
    image = tmp_path / "data/images/val/0.png"
    done(
        "predict",
        path,
        "--input",
        image,
        "--kind",
        "mask",
        "--mode",
        "whole",
        "--save_dir",
        tmp_path / "p",
    )
    mask = np.asarray(Image.open(tmp_path / "p/mask/0.png"))
    with torch.inference_mode():
        expected = load(path)(by_hand(np.asarray(Image.open(image)), CASES[case]))[0].argmax(0)
    assert (mask == expected.numpy()).all()


def test_flags_overrule_the_checkpoint_and_what_is_trained_keeps_them(
    varied: SegFormer, tmp_path: Path
) -> None:
    own = replace(HALF, channels="bgr", label_offset=-1, ignore_index=1)
    path = write_case(tmp_path, varied, own)
    varied.spec = replace(varied.spec, preprocessing=Preprocessing())
    save(varied, tmp_path / "silent.pth")
    flags: tuple[object, ...] = ("--mean", *own.mean, "--std", *own.std, "--channels", "bgr")
    labels = ("--label_offset", -1, "--ignore_index", 1)

    scored = ("eval", tmp_path / "silent.pth", "--data", tmp_path / "data", *SCORED)
    assert "mIoU 1.0000" in done(*scored, *flags, *labels)
    assert "mIoU 1.0000" not in done(*scored, *labels)
    assert "--std is (0.0" in refused(*scored, "--std", 0, 1, 1)
    assert "--channels is 'gbr'; choose rgb or bgr" in refused(*scored, "--channels", "gbr")

    data, out = tmp_path / "data", tmp_path / "out"
    done(*training(data, out, "--model_path", tmp_path / "silent.pth", *flags, *labels))
    assert read(out / BEST).spec.preprocessing == own
    teacher = ("--teacher", path)
    seen = told(*training(data, tmp_path / "t", "--model_path", out / BEST, *teacher))
    assert seen.model.spec.preprocessing == seen.options["teacher"].spec.preprocessing == own
    assert "teacher was trained with" not in seen.out

    # Each network gets pixels as it was trained; labels that differ are told.
    plain = write_case(tmp_path / "plain", varied, Preprocessing())
    data = tmp_path / "plain/data"
    seen = told(*training(data, tmp_path / "t", "--model_path", plain, "--teacher", path))
    assert seen.model.spec.preprocessing == Preprocessing()
    assert seen.options["teacher"].spec.preprocessing == own
    assert (
        "The teacher was trained with --label_offset -1 and the network is with 0" in seen.out
    )


def test_info_shows_it(varied: SegFormer, tmp_path: Path) -> None:
    varied.spec = replace(varied.spec, preprocessing=replace(CASES["reduced"], size=(64, 96)))
    save(varied, tmp_path / "a.pth")
    out = done("info", tmp_path / "a.pth")
    assert "mean 123.675 116.28 103.53" in out
    assert "RGB; trained at 64×96" in out
    assert "labels -1; 255 is ignored" in out


@pytest.mark.parametrize("case", ["half", "bgr"])
def test_images_for_the_repair_and_the_exported_network_are_normalised_alike(
    case: str, varied: SegFormer, tmp_path: Path
) -> None:
    own = CASES[case]
    write_case(tmp_path, varied, own)
    (images,) = load_images(tmp_path / "data/images/val", 1, (32, 32))
    assert images.dtype == torch.uint8
    pixels = images.permute(0, 2, 3, 1)
    expected = by_hand(pixels[0].numpy(), own)
    (given,) = Pruner(varied, 0.1, images=[images]).images
    torch.testing.assert_close(given, expected)

    with torch.inference_mode():
        baked = Deployed(varied, preprocess=True)(pixels)
        torch.testing.assert_close(baked, varied(expected), rtol=0, atol=1e-4)


def test_flags_of_labels_have_no_effect_on_predict(varied: SegFormer, tmp_path: Path) -> None:
    path = write_case(tmp_path, varied, HALF)
    image = tmp_path / "data/images/val/0.png"
    said = refused("predict", path, "--input", image, "--ignore_index", 3)
    assert "--ignore_index has no effect on images without labels" in said
