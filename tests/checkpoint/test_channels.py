"""Networks of other than three input channels in every dialect, there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.trained_like import fill
from segprune.checkpoint import convert, from_state_dict, load, read
from segprune.checkpoint.dialects import HEADS, NUMERICS
from segprune.checkpoint.numerics import with_rgb
from segprune.checkpoint.preprocessing import read_meta
from segprune.model import SegFormer
from segprune.spec import Preprocessing, Spec, spec_from_dict, spec_to_dict, standard_spec
from tests.dialects import Fill, state_in

FOUR = Preprocessing(mean=(100.0, 110.0, 120.0, 90.0), std=(50.0, 55.0, 60.0, 70.0))


def network_of(spec: Spec, preprocessing: Preprocessing = FOUR) -> SegFormer:
    channels = preprocessing.num_channels
    model = fill(SegFormer(replace(spec, in_channels=channels, preprocessing=preprocessing)))
    assert isinstance(model, SegFormer)
    return model.eval()


@pytest.mark.parametrize("dialect", ["hf", "nvlabs", "bubbliiiing", "mmseg"])
def test_channels_and_their_mean_go_through_every_dialect(dialect: str, tmp_path: Path) -> None:
    spec = standard_spec("b0", 4, numerics=NUMERICS[dialect])
    model = network_of(replace(spec, head=HEADS[dialect]))
    target = tmp_path / ("folder" if dialect == "hf" else "x.pth")
    written = convert(model, target, dialect)

    found = read(target)
    assert (found.spec.in_channels, found.spec.preprocessing) == (4, FOUR)
    if dialect == "hf":
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        assert config["num_channels"] == 4
        (target / "config.json").write_text(json.dumps(config | {"num_channels": 3}))
        with pytest.raises(ValueError, match="num_channels 3"):
            read(target)
    else:
        name = "in_channels=4" if dialect == "mmseg" else "in_chans=4"
        assert any(name in note for note in written.notes)


def test_a_folder_with_our_own_code_keeps_the_channels(
    small_spec: Spec, tmp_path: Path
) -> None:
    model = network_of(small_spec)
    convert(model, tmp_path / "folder", "hf")
    x = torch.randn(1, 4, 32, 32)
    again = load(tmp_path / "folder")
    assert again.spec.preprocessing == FOUR
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("loader", "channels"),
    [
        ("type='LoadImageFromFile', imdecode_backend='tifffile'", "rgb"),
        ("type='LoadImageFromFile', color_type='unchanged'", "bgr"),
        ("type='LoadSingleRSImageFromFile'", "rgb"),
    ],
)
def test_bands_are_in_the_order_in_which_mmsegmentation_loaded_them(
    loader: str, channels: str
) -> None:
    spec = replace(standard_spec("b0", 4), in_channels=4)
    config = f"""
data_preprocessor = dict(mean=[1, 2, 3, 4], std=[5, 6, 7, 8], bgr_to_rgb=True)
train_pipeline = [dict({loader})]
"""
    own = read_meta(spec, {"cfg": config}).preprocessing
    assert (own.mean, own.std, own.channels) == ((1, 2, 3, 4), (5, 6, 7, 8), channels)


def test_only_the_first_three_channels_change_places(small_spec: Spec) -> None:
    bgr = network_of(small_spec, replace(FOUR, channels="bgr"))
    rgb = with_rgb(bgr)
    assert rgb.spec.preprocessing == replace(
        FOUR, mean=(120.0, 110.0, 100.0, 90.0), std=(60.0, 55.0, 50.0, 70.0)
    )
    x = torch.randn(1, 4, 32, 32)
    torch.testing.assert_close(rgb(x), bgr(x[:, [2, 1, 0, 3]]))


def test_a_spec_of_three_channels_is_written_as_before_and_others_say_theirs(
    small_spec: Spec,
) -> None:
    assert "in_channels" not in spec_to_dict(small_spec)
    four = network_of(small_spec).spec
    data = json.loads(json.dumps(spec_to_dict(four)))
    assert data["in_channels"] == 4
    assert spec_from_dict(data) == four
    with pytest.raises(ValueError, match="`mean` has 4 numbers and `std` 3"):
        Preprocessing(mean=FOUR.mean)
    for wrong in (0, 4.0, True, 2000, None):
        with pytest.raises(ValueError, match="in_channels"):
            spec_from_dict(data | {"in_channels": wrong})


def test_one_buffer_of_mean_and_deviation_is_that_of_every_channel(trained_like: Fill) -> None:
    state = state_in("smp", trained_like)
    first = next(key for key, tensor in state.items() if tensor.shape == (32, 3, 7, 7))
    state[first] = state[first].repeat(1, 2, 1, 1)[:, :4]
    state |= {"mean": torch.full((1, 1, 1, 1), 0.5), "std": torch.full((1, 1, 1, 1), 0.2)}
    found = from_state_dict(state).spec.preprocessing
    assert (found.mean, found.std) == ((127.5,) * 4, (51.0,) * 4)
