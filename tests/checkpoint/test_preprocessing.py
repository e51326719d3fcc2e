"""What stands beside the weights and changes what they mean, against the code that wrote it, and there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SegformerImageProcessor

from segprune.checkpoint import convert, from_state_dict, load, read, save
from segprune.checkpoint.hf_memory import read_huggingface
from segprune.checkpoint.preprocessing import from_huggingface
from segprune.data import IMAGENET, normalise
from segprune.data.transforms import Bytes, restore_pixels
from segprune.model import SegFormer
from segprune.pruning.pruner import Pruner
from segprune.spec import Preprocessing, spec_from_dict, spec_to_dict, standard_spec
from tests.dialects import Fill, hf_model, state_in

OTHER = Preprocessing(
    mean=(120.0, 110.0, 90.0), std=(60.0, 50.0, 40.0), label_offset=-1, ignore_index=3
)
SPEC = standard_spec("b0", 8)


@pytest.fixture
def image() -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def with_preprocessing(model: SegFormer, preprocessing: Preprocessing) -> SegFormer:
    model.spec = replace(model.spec, preprocessing=preprocessing)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]},
    ],
)
def test_images_are_those_of_transformers_own_processor(
    changes: dict[str, Any], image: Bytes
) -> None:
    processor = SegformerImageProcessor(do_resize=False, **changes)
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    own = from_huggingface(processor.to_dict(), {}, SPEC)
    torch.testing.assert_close(normalise(image, own), theirs.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        restore_pixels(theirs[None], own)[0], torch.from_numpy(image).float(), rtol=0, atol=1e-2
    )


def test_labels_of_a_hugging_face_folder_and_what_is_null_or_missing_there() -> None:
    own = from_huggingface(
        {"do_reduce_labels": True, "image_mean": None, "size": {"height": 64, "width": 96}},
        {"semantic_loss_ignore_index": 7},
        SPEC,
    )
    assert own == Preprocessing(label_offset=-1, ignore_index=7)
    assert own.size == (64, 96)

    # Older files have other words.
    older = from_huggingface({"reduce_labels": True, "size": 512}, {}, SPEC)
    assert (older.label_offset, older.size) == (-1, (512, 512))
    assert from_huggingface({}, {}, replace(SPEC, preprocessing=OTHER)) == OTHER
    for wrong in ({"image_std": [0.0, 1.0, 1.0]}, {"image_mean": "x"}, {"rescale_factor": 0}):
        with pytest.raises(ValueError, match=r"std|mean|rescale_factor"):
            from_huggingface(wrong, {}, SPEC)


MMSEG = """
crop_size = (64, 96)
norm_cfg = dict(requires_grad=True, type='SyncBN')
data_preprocessor = dict(
    bgr_to_rgb={rgb}, mean=[120.0, 110.0, 90.0], std=[60.0, 50.0, 40.0], size=crop_size, type='SegDataPreProcessor')
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(align_corners=True, ignore_index=3, norm_cfg=norm_cfg, type='SegformerHead'),
    type='EncoderDecoder')
train_pipeline = [dict(type='LoadImageFromFile'), dict(reduce_zero_label=True, type='LoadAnnotations')]
"""
NVLABS = """
model = dict(type='EncoderDecoder', decode_head=dict(type='SegFormerHead', ignore_index=3, align_corners=True))
data = dict(test=dict(pipeline=[dict(type='MultiScaleFlipAug', transforms=[
    dict(type='Normalize', mean=[120.0, 110.0, 90.0], std=[60.0, 50.0, 40.0], to_rgb={rgb})])]))
train_pipeline = [dict(type='LoadAnnotations', reduce_zero_label=True)]
open('/nowhere/written', 'w').write(data)
"""


@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize(
    ("dialect", "key", "text"), [("mmseg", "cfg", MMSEG), ("nvlabs", "config", NVLABS)]
)
def test_the_config_in_meta_is_read_and_not_run(
    dialect: str, key: str, text: str, rgb: bool, trained_like: Fill
) -> None:
    meta = {key: text.replace("{rgb}", str(rgb))}
    spec = from_state_dict({"meta": meta, "state_dict": state_in(dialect, trained_like)}).spec
    assert spec.preprocessing == replace(OTHER, channels="rgb" if rgb else "bgr")
    assert spec.numerics.align_corners


@pytest.mark.parametrize(
    "text",
    [
        "a = (",
        "a" * (1 << 21),
        "a0 = [1]\n" + "\n".join(f"a{i + 1} = [a{i}, a{i}]" for i in range(64)),
        "a = " + "-" * 4000 + "1",
        "a = " + "[" * 90 + "]" * 90,
    ],
    ids=["broken", "long", "doubling", "signs", "deep"],
)
def test_a_config_that_is_none_is_passed_over(text: str, trained_like: Fill) -> None:
    data = {"meta": {"cfg": text}, "state_dict": state_in("mmseg", trained_like)}
    assert from_state_dict(data).spec.preprocessing == IMAGENET


def test_a_network_in_memory_says_which_label_it_ignores(trained_like: Fill) -> None:
    theirs = hf_model("b0", trained_like)
    theirs.config.semantic_loss_ignore_index = 7
    ours = read_huggingface(theirs)
    assert ours is not None
    assert ours.spec.preprocessing == Preprocessing(ignore_index=7)


def test_buffers_of_mean_and_deviation_are_read(trained_like: Fill) -> None:
    three = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    for scale in (1.0, 255.0):
        state = state_in("smp", trained_like) | {"mean": three * scale, "std": three * scale}
        found = from_state_dict(state)
        assert found.spec.preprocessing == Preprocessing((127.5, 102, 76.5), (127.5, 102, 76.5))
        assert any("own mean and std" in note for note in found.notes)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_our_files_keep_it_and_so_does_what_is_pruned(
    ending: str, small_model: SegFormer, tmp_path: Path
) -> None:
    model = with_preprocessing(small_model.float(), replace(OTHER, channels="bgr"))
    pruned = Pruner(model, 0.2, input_shape=(64, 64), repair=False).prune()
    assert isinstance(pruned, SegFormer)
    save(pruned, tmp_path / f"a.{ending}")
    assert load(tmp_path / f"a.{ending}").spec.preprocessing == model.spec.preprocessing

    # Files from before it was kept are of ImageNet's.
    older = spec_to_dict(pruned.spec)
    del older["preprocessing"]
    assert spec_from_dict(older).preprocessing == IMAGENET


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", ()),
        ("mean", (1.0, 2.0, float("nan"))),
        ("mean", (1, 2, 10**400)),
        ("std", (0.0, 1.0, 1.0)),
        ("channels", "gbr"),
        ("label_offset", 1),
        ("ignore_index", 256),
        ("size", (0, 4)),
    ],
)
def test_what_no_network_was_trained_with_is_refused_by_name(
    name: str, value: Any, small_model: SegFormer
) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is"):
        replace(IMAGENET, **{name: value})

    # In a file too, whatever stands there.
    data = spec_to_dict(small_model.spec)
    data["preprocessing"][name] = value
    with pytest.raises(ValueError, match=name):
        spec_from_dict(data)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("to", ["hf", "nvlabs", "mmseg"])
def test_files_for_others_say_it_and_take_rgb(
    to: str,
    channels: str,
    small_model: SegFormer,
    trained_like: Fill,
    tmp_path: Path,
    image: Bytes,
) -> None:
    # For hf any network will do, which then has its code with it; the others' classes need a whole one.
    if to == "hf":
        network = small_model.float()
    else:
        network = from_state_dict(state_in(to, trained_like), dialect=to).spec
        network = trained_like(SegFormer(network).eval())
    own = replace(OTHER, channels=channels, mean=OTHER.mean, std=OTHER.std)
    model = with_preprocessing(network, own)
    target = tmp_path / ("hf" if to == "hf" else "a.pth")
    convert(model, target, to)

    found = load(target)
    other = found.spec.preprocessing
    assert (other.channels, other.label_offset, other.ignore_index) == ("rgb", -1, 3)
    with torch.inference_mode():
        logits = found(normalise(image, other)[None])
        expected = model(normalise(image, own)[None])
    largest = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * largest)
    if to == "hf":
        said = json.loads((target / "preprocessor_config.json").read_text())
        assert said["do_reduce_labels"]
        assert read(target).spec.preprocessing.size == (512, 512)


@pytest.mark.parametrize("to", ["nvlabs", "mmseg"])
@pytest.mark.parametrize("named", [True, False])
def test_meta_names_the_classes_and_their_colours_as_their_code_asks_for(
    to: str, named: bool, trained_like: Fill, tmp_path: Path
) -> None:
    model = SegFormer(from_state_dict(state_in(to, trained_like), dialect=to).spec).eval()
    names = [f"c{k}" for k in range(5)]
    palette = list(range(15)) + [0] * (768 - 15)
    given = {"class_names": names, "palette": palette} if named else {}
    convert(model, tmp_path / "a.pth", to, **given)

    data = torch.load(tmp_path / "a.pth", weights_only=True)
    meta = data["meta"]
    stated = meta["dataset_meta"] if to == "mmseg" else meta
    classes, colours = (("classes", "palette"), ("CLASSES", "PALETTE"))[to == "nvlabs"]
    assert len(stated[classes]) == len(stated[colours]) == 5
    if named:
        assert list(stated[classes]) == names
        assert stated[colours][1] == [3, 4, 5]
    assert read(tmp_path / "a.pth").extra == given

    # The layer that NVlabs' head has and never runs, so that its own strict loading finds all.
    if to == "nvlabs":
        shape = data["state_dict"]["decode_head.conv_seg.weight"].shape
        assert tuple(shape) == (5, 128, 1, 1)
        assert tuple(data["state_dict"]["decode_head.conv_seg.bias"].shape) == (5,)
