"""Networks of 1 and of 4 input channels through every command, on images with as many bands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from segprune.checkpoint import load, read, save
from segprune.data import normalise
from segprune.data.transforms import Bytes
from segprune.export import open_exported
from segprune.export.network import Deployed
from segprune.model import SegFormer
from segprune.spec import Preprocessing, list_kv_reductions, with_kv_reductions
from tests.commands import HERE, SIZE, done, refused
from tests.exporting import tiny_network

FOUR = Preprocessing(mean=(100.0, 110.0, 120.0, 90.0), std=(50.0, 55.0, 60.0, 70.0))


def narrow_to_last_band(model: SegFormer) -> SegFormer:
    """Returns it with an answer that depends on its last input channel alone."""
    weight = model.encoder.stages[0].patch_embed.proj.weight
    weight.data[:, :-1] = 0.0
    return model


def network_of(channels: int, preprocessing: Preprocessing) -> SegFormer:
    # OpenVINO averages no keys and values of maps as small as those of 32 pixels.
    spec = tiny_network().spec
    spec = with_kv_reductions(spec, dict.fromkeys(list_kv_reductions(spec), 1))
    spec = replace(spec, in_channels=channels, preprocessing=preprocessing)
    torch.manual_seed(2)
    model = SegFormer(spec).eval()
    # As drawn, its logits would hardly differ between pixels.
    nn.init.normal_(model.decode_head.classifier.weight)
    for stage in model.encoder.stages:
        nn.init.normal_(stage.patch_embed.proj.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("four") / "four.pth"
    save(narrow_to_last_band(network_of(4, FOUR)), path)
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "one.pth"
    save(network_of(1, Preprocessing(mean=(110.0,), std=(55.0,))), path)
    return path


def draw_bands(seed: int, channels: int = 4) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (32, 48, channels), dtype=np.uint8)


def write_tiff(path: Path, bands: npt.NDArray[Any]) -> None:
    tifffile.imwrite(
        path, bands, photometric="minisblack", planarconfig="contig", compression="zlib"
    )


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four bands in each kind of file, beside masks of five classes."""
    root = tmp_path_factory.mktemp("bands")
    for split, number in (("train", 4), ("val", 3)):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for i in range(number):
            image = draw_bands(10 * number + i)
            path = root / "images" / split / f"{i}"
            if i == 0:
                Image.fromarray(image).save(f"{path}.png")
            elif i == 1:
                write_tiff(Path(f"{path}.tif"), image)
            else:
                np.save(f"{path}.npy", image)
            mask = Image.fromarray(image[..., 3] // 52)
            mask.save(root / "masks" / split / f"{i}.png")
    return root


def masks_of(model: Path, source: Path, folder: Path) -> dict[str, Bytes]:
    done(
        "predict",
        model,
        "--input",
        source,
        "--save_dir",
        folder,
        "--kind",
        "all",
        *SIZE,
    )
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "mask").iterdir()}


def test_prediction_sees_the_last_band_of_every_kind_of_file_in_its_place(
    four: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    bands = draw_bands(0)
    Image.fromarray(bands).save(images / "a.png")
    write_tiff(images / "b.tif", bands)
    tifffile.imwrite(
        images / "c.tif",
        np.moveaxis(bands, 2, 0),
        photometric="minisblack",
        planarconfig="separate",
    )
    write_tiff(images / "d.tif", bands.astype(np.uint16) * 257)
    other = draw_bands(1)
    other[..., 3] = bands[..., 3]
    Image.fromarray(other).save(images / "e.png")
    Image.fromarray(bands[..., [3, 1, 2, 0]]).save(images / "f.png")
    masks = masks_of(four, images, tmp_path / "out")

    # The network by itself, on pixels normalised by hand.
    np.save(tmp_path / "g.npy", bands)
    masks |= masks_of(four, tmp_path / "g.npy", tmp_path / "out")
    assert len(np.unique(masks["a.png"])) > 1
    for name in "bcdeg":
        np.testing.assert_array_equal(masks[f"{name}.png"], masks["a.png"], err_msg=name)
    assert (masks["f.png"] != masks["a.png"]).any()

    with torch.inference_mode():
        logits = load(four)(normalise(bands, FOUR)[None, :, :, :32])
    assert logits.shape == (1, 5, 32, 32)


def tuning(model: Path, data: Path) -> tuple[object, ...]:
    """What prune and train are given alike."""
    flags = ("--model_path", model, "--data", data, "--epochs", 1, "--batch_size", 2)
    return (*flags, *SIZE, *HERE)


def test_four_channels_are_pruned_repaired_fine_tuned_and_scored(
    four: Path, bands: Path, tmp_path: Path
) -> None:
    rest = ("--save_dir", tmp_path, "--num_images", 3, "--round_to", 1)
    out = done("prune", *tuning(four, bands), *rest)
    pruned = tmp_path / "l1" / "b0" / "b0_pruned_0.5.pth"
    assert "epaired" in out
    dense, cut = read(four).spec, read(pruned).spec
    assert (cut.in_channels, cut.preprocessing) == (4, FOUR)
    assert cut.decoder_dim < dense.decoder_dim or cut.stages != dense.stages
    weight = load(pruned).encoder.stages[0].patch_embed.proj.weight
    assert weight[:, :3].abs().max() < 1e-3 * weight[:, 3].abs().max()
    assert "mIoU" in done("eval", pruned, "--data", bands, *SIZE, *HERE)
    assert "(3 images)" in done("eval", pruned, "--data", bands, "--mode", "whole", *HERE)


def test_training_takes_all_bands_and_refuses_a_teacher_of_other_channels(
    four: Path, one: Path, bands: Path, tmp_path: Path
) -> None:
    flags = tuning(four, bands)
    assert "1 channels and the student of 4" in refused("train", *flags, "--teacher", one)
    done("train", *flags, "--teacher", four, "--amp", "no", "--save_dir", tmp_path)
    assert read(tmp_path / "best_epoch_weights.pth").spec.preprocessing == FOUR


def test_exported_files_take_all_bands_in_their_order(four: Path, tmp_path: Path) -> None:
    x = normalise(draw_bands(3)[:, :32], FOUR)[None]
    for name, baked in (("x.onnx", "preprocess"), ("x.xml", "")):
        output = tmp_path / name
        format = {"x.onnx": "onnx", "x.xml": "openvino"}[name]
        done("export", four, "--format", format, "--output", output, "--bake", baked, *SIZE)
        runtime = open_exported(output)
        assert runtime.manifest.spec is not None
        assert runtime.manifest.spec.in_channels == 4
        with torch.inference_mode():
            torch.testing.assert_close(runtime(x), load(four)(x), rtol=1e-3, atol=1e-3)


def test_one_channel_is_pruned_without_data_and_predicts_on_grey_and_coloured_images(
    one: Path, tmp_path: Path, draws_images: None
) -> None:
    rate = ("--pruning_rate", 0.3, "--num_images", 2)
    done("prune", "--model_path", one, *rate, "--save_dir", tmp_path, *SIZE)
    pruned = tmp_path / "l1" / "b0" / "b0_pruned_0.3.pth"
    assert read(pruned).spec.in_channels == 1

    images = tmp_path / "images"
    images.mkdir()
    grey = draw_bands(0, 1)[..., 0]
    Image.fromarray(grey).save(images / "a.png")
    Image.fromarray(np.dstack([grey] * 3)).save(images / "b.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(images / "c.png")
    masks = masks_of(pruned, images, tmp_path / "out")
    np.testing.assert_array_equal(masks["b.png"], masks["a.png"])
    np.testing.assert_array_equal(masks["c.png"], masks["a.png"])


def test_images_with_other_bands_are_refused_by_name(
    four: Path, one: Path, tmp_path: Path
) -> None:
    Image.fromarray(draw_bands(0, 3)).save(tmp_path / "rgb.png")
    np.save(tmp_path / "six.npy", draw_bands(0, 6))
    write_tiff(tmp_path / "five.tif", draw_bands(0, 5))
    np.save(tmp_path / "real.npy", np.zeros((32, 32, 4), dtype=np.float32))
    out = ("--save_dir", tmp_path / "out", *SIZE)
    for model, name, facts in (
        (four, "rgb.png", "3 channels, where the network takes 4"),
        (four, "six.npy", "6 channels, where the network takes 4"),
        (one, "six.npy", "6 channels, where the network takes 1"),
        (four, "five.tif", "5 channels, where the network takes 4"),
        (four, "real.npy", "float32, where uint8 or uint16"),
    ):
        sentence = refused("predict", model, "--input", tmp_path / name, *out)
        assert name in sentence
        assert facts in sentence


def test_mean_and_deviation_that_a_file_does_not_say_are_asked_for(
    bands: Path, tmp_path: Path
) -> None:
    # The default is that of RGB.
    path = tmp_path / "unknown.pth"
    save(network_of(4, Preprocessing()), path)
    score = ("eval", path, "--data", bands, *SIZE, *HERE)
    for flags in (score, ("predict", path, "--input", bands, *SIZE)):
        sentence = refused(*flags)
        assert "--mean and --std, 4 numbers each" in sentence
    assert "not stated for 4 channels" in done("info", path)
    assert "3 numbers each" not in refused(*score, "--mean", 1, 2, 3, "--std", 1, 1, 1)
    assert "`std`" not in refused(*score, "--mean", 1, 2, 3, 4)
    assert "mIoU" in done(*score, "--mean", 1, 2, 3, 4, "--std", "50,50,50,50")

    # What looks at no images does not ask.
    Deployed(load(path))
    with pytest.raises(ValueError, match=r"`mean` and `std`, 4 numbers each"):
        Deployed(load(path), preprocess=True)
