import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import segprune
from segprune.checkpoint import Checkpoint, build, from_state_dict, load, read, save
from segprune.checkpoint.dialects import NUMERICS
from segprune.fold import fold_decoder, unfold_decoder
from segprune.model import SegFormer
from segprune.spec import spec_to_dict, standard_spec
from tests.dialects import PUBLISHED, Fill, hf_model, reference, state_in

SUFFIXES = [".pth", ".pt", ".safetensors"]


@pytest.fixture
def model(small_model: SegFormer) -> SegFormer:
    """Pruned-like: widths differ from block to block; float32 as all networks that come out of a file."""
    return small_model.float()


@pytest.fixture
def bare(trained_like: Fill) -> dict[str, Tensor]:
    return state_in("nvlabs", trained_like)


def infer(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("change", [lambda m: m, fold_decoder], ids=["as_published", "folded"])
def test_a_saved_network_has_the_same_logits_to_the_bit(
    change: Callable[[SegFormer], SegFormer], suffix: str, model: SegFormer, tmp_path: Path
) -> None:
    model = change(model)
    save(model, tmp_path / f"a{suffix}", extra={"epoch": 3, "names": ["a", None]})
    found = read(tmp_path / f"a{suffix}")
    assert found.spec == model.spec
    assert (found.dialect, found.notes, found.backbone_only) == ("segprune", (), False)
    assert found.extra == {"epoch": 3, "names": ["a", None]}
    loaded = segprune.load(tmp_path / f"a{suffix}")
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(infer(loaded), infer(model))


def test_our_file_is_tensors_and_plain_data(model: SegFormer, tmp_path: Path) -> None:
    save(model, tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content.keys() == {"format", "version", "spec", "state_dict", "extra"}
    assert (content["format"], content["version"], content["extra"]) == ("segprune", 1, {})
    assert content["spec"] == spec_to_dict(model.spec)


@pytest.mark.parametrize(
    ("dialect", "suffix"), list(zip(NUMERICS, cycle(SUFFIXES), strict=False))
)
def test_a_foreign_networks_numerics_stay_with_it(
    dialect: str, suffix: str, trained_like: Fill, tmp_path: Path
) -> None:
    found = from_state_dict(state_in(dialect, trained_like), dialect=dialect)
    assert found.spec.numerics == NUMERICS[dialect]
    model = build(found)
    save(model, tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}").spec.numerics == NUMERICS[dialect]
    assert torch.equal(infer(load(tmp_path / f"a{suffix}")), infer(model))


@pytest.mark.parametrize("dialect", PUBLISHED)
def test_a_file_of_each_dialect_has_the_logits_of_its_own_code_base(
    dialect: str, trained_like: Fill, tmp_path: Path
) -> None:
    theirs = reference(dialect, trained_like)
    state = state_in(dialect, lambda _: theirs)
    torch.save({"state_dict": state} if dialect == "nvlabs" else state, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").dialect == dialect
    torch.testing.assert_close(
        infer(load(tmp_path / "a.pth")), infer(theirs), rtol=0, atol=2e-5
    )


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state},
    "meta": lambda state: {
        "meta": {"mIoU": np.float64(0.5)},
        "state_dict": state,
        "optimizer": {"state": {}},
    },
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "module.": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "_orig_mod.": lambda state: {
        "model": {f"module._orig_mod.{key}": t for key, t in state.items()}
    },
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_and_prefixes_are_taken_off(
    wrap: Callable[[Any], Any], bare: Any, tmp_path: Path
) -> None:
    torch.save(wrap(bare), tmp_path / "a.pth")
    found, expected = read(tmp_path / "a.pth"), from_state_dict(bare).state_dict
    assert found.state_dict.keys() == expected.keys()
    assert all(torch.equal(found.state_dict[key], expected[key]) for key in expected)
    wrapped_by_nvlabs = "state_dict" in wrap(bare)
    assert found.dialect == ("nvlabs" if wrapped_by_nvlabs else "bubbliiiing")
    assert (
        any("bubbliiiing was assumed" in note for note in found.notes) is not wrapped_by_nvlabs
    )


def test_a_foreign_safetensors_file_is_read(bare: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(bare, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert read(tmp_path / "a.safetensors", dialect="nvlabs").spec == standard_spec("b0", 5)


def test_a_given_dialect_decides_how_a_loaded_network_computes(
    bare: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(bare, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth").spec.numerics == NUMERICS["bubbliiiing"]  # assumed
    assert load(tmp_path / "a.pth", dialect="nvlabs").spec.numerics == NUMERICS["nvlabs"]


def test_a_network_in_memory_is_read_as_its_file_would_be(trained_like: Fill) -> None:
    theirs = hf_model("b0", trained_like)
    found = from_state_dict(theirs.state_dict(), variant="b0", num_classes=5)
    assert found.dialect == "hf"
    torch.nn.init.zeros_(theirs.decode_head.classifier.weight)
    model = build(found)
    torch.nn.init.zeros_(
        model.decode_head.classifier.bias
    )  # a built network is a copy of the checkpoint
    assert found.state_dict["decode_head.classifier.bias"].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_precision_become_float32_with_a_note(
    dtype: torch.dtype, bare: Any
) -> None:
    name = str(dtype).removeprefix("torch.")
    found = from_state_dict(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in bare.items()},
        dialect="nvlabs",
    )
    assert found.notes == (f"Weights in {name} were converted to float32.",)
    assert {tensor.dtype for tensor in build(found).parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_network_is_refused_with_the_tensors_name(value: float, bare: Any) -> None:
    bare["backbone.norm2.bias"][3] = value
    message = r"encoder\.stages\.1\.norm\.bias has NaN or infinite values, .*; give an earlier checkpoint"
    with pytest.raises(ValueError, match=message):
        build(from_state_dict(bare))


def test_a_flag_that_contradicts_the_file_is_refused_with_both(
    bare: Any, model: SegFormer, tmp_path: Path
) -> None:
    torch.save(bare, tmp_path / "foreign.pth")
    save(model, tmp_path / "ours.pth")
    for name in ("foreign.pth", "ours.pth"):
        assert read(tmp_path / name, variant="b0", num_classes=5).spec.num_classes == 5
        message = f"{name}: The file is a b0, but `variant` b2 was given; leave `variant` out or give b0"
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, variant="b2")
        message = f"{name}: The file has 5 classes, but `num_classes` 8 was given; leave `num_classes` out or give 5"
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, num_classes=8)
    with pytest.raises(ValueError, match="Unknown variant 'b9'; choose one of b0, b1"):
        read(tmp_path / "ours.pth", variant="b9")
    with pytest.raises(
        ValueError, match=r"segprune's own, but `dialect` hf was given; leave `dialect` out"
    ):
        read(tmp_path / "ours.pth", dialect="hf")


def test_a_bare_backbone_gets_a_new_head_of_the_classes_asked_for(
    bare: Any, tmp_path: Path
) -> None:
    backbone = {
        k.removeprefix("backbone."): v for k, v in bare.items() if k.startswith("backbone.")
    }
    torch.save(
        backbone | {"head.weight": torch.ones(1000, 256), "head.bias": torch.ones(1000)},
        tmp_path / "mit_b0.pth",
    )
    found = read(tmp_path / "mit_b0.pth", num_classes=7)
    assert found.backbone_only
    assert found.notes == (
        "The backbone's names fit nvlabs and bubbliiiing; nvlabs was assumed (`dialect` overrules).",
        "Only a backbone was found: the decode head for 7 classes is new and untrained.",
    )
    x = torch.randn(1, 3, 64, 64)
    for mine, theirs in zip(build(found).encoder(x), load_encoder(bare)(x), strict=True):
        assert torch.equal(mine, theirs)
    assert build(found)(x).shape == (1, 7, 64, 64)
    with pytest.raises(
        ValueError,
        match=r"mit_b0\.pth: This is a backbone without decode head, .*; give `num_classes`",
    ):
        read(tmp_path / "mit_b0.pth")


@pytest.fixture
def ours(model: SegFormer) -> dict[str, Any]:
    """The content of one of our files."""
    content = {"format": "segprune", "version": 1, "extra": {}}
    return content | {"spec": spec_to_dict(model.spec), "state_dict": model.state_dict()}


def load_encoder(state: dict[str, Tensor]) -> nn.Module:
    return build(from_state_dict(state, dialect="nvlabs")).encoder


def test_a_file_of_a_newer_segprune_is_refused(model: SegFormer) -> None:
    content = {"format": "segprune", "version": 2, "layers": []}
    with pytest.raises(
        ValueError,
        match=r"newer segprune \(file version 2, this one reads 1\); upgrade with pip",
    ):
        from_state_dict(content)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_of_ours_is_refused(
    suffix: str, model: SegFormer, tmp_path: Path
) -> None:
    path, state = tmp_path / f"a{suffix}", model.state_dict()
    if suffix == ".pth":
        torch.save({"format": "segprune", "version": 1, "state_dict": state}, path)
    else:
        save_file(state, path, metadata={"format": "segprune", "version": "1", "spec": "{"})
    with pytest.raises(
        ValueError,
        match=f"^{path}: It is not a whole segprune file; write it again with segprune.save",
    ):
        read(path)


@pytest.mark.parametrize(
    "damage",
    [{"version": None}, {"version": 0}, {"spec": 3}, {"state_dict": []}, {"extra": None}],
)
def test_our_file_with_a_wrong_part_is_refused(
    damage: dict[str, Any], ours: dict[str, Any]
) -> None:
    with pytest.raises(
        ValueError, match=r"It is not a whole segprune file; write it again with segprune\.save"
    ):
        from_state_dict(ours | damage)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"class_names": "abcde"}, "class names that are no list"),
        ({"class_names": ["a", 2]}, "class names that are no list"),
        ({"palette": [0, 0, 0]}, r"a palette that is not 768 numbers in 0\.\.255"),
        ({"palette": [256] * 768}, r"a palette that is not 768 numbers in 0\.\.255"),
        ({"palette": [[0, 0, 0]] * 256}, r"a palette that is not 768 numbers in 0\.\.255"),
        ({"palette": "red"}, r"a palette that is not 768 numbers in 0\.\.255"),
        ({"lr": "fast"}, "a learning rate lr that is no number above 0"),
        ({"lr": float("nan")}, "a learning rate lr that is no number above 0"),
        ({"finetuned_lr": 0}, "a learning rate finetuned_lr that is no number above 0"),
        ({"notes": torch.ones(2)}, "`extra` holds a Tensor"),
        ({"notes": {1: 2}}, "`extra` holds a dict"),
    ],
)
def test_an_extra_that_would_mislead_later_is_refused(
    extra: dict[str, Any], message: str, ours: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        from_state_dict(ours | {"extra": extra})


def test_what_is_small_in_a_file_and_endless_in_memory_is_refused(ours: dict[str, Any]) -> None:
    laughs: list[Any] = ["ha"] * 10
    for _ in range(9):
        laughs = [laughs] * 10
    with pytest.raises(ValueError, match="`extra` holds more than 100000 values"):
        from_state_dict(ours | {"extra": {"notes": laughs}})

    # One number behind a whole layer, and one layer behind many names.
    state = ours["state_dict"]
    name = "decode_head.classifier.weight"
    wide = state[name][:1].clone().expand(5, -1, -1, -1)
    with pytest.raises(ValueError, match=rf"{name} has the shape 5 44 1 1 but only \d+ bytes"):
        from_state_dict(ours | {"state_dict": state | {name: wide}})
    copies = dict.fromkeys("abcdefghijkl", torch.ones(9))
    with pytest.raises(ValueError, match=r"tensors take \d+ bytes but were saved with \d+"):
        from_state_dict(ours | {"state_dict": copies})


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(44, device="meta"), torch.ones(44).to_sparse()],
    ids=["meta", "sparse"],
)
def test_tensors_without_a_value_for_each_weight_are_refused(
    tensor: Tensor, ours: dict[str, Any]
) -> None:
    name = "decode_head.norm.weight"
    with pytest.raises(ValueError, match=rf"{name} is a tensor on the meta device or a sparse"):
        from_state_dict(ours | {"state_dict": ours["state_dict"] | {name: tensor}})


def test_weights_that_do_not_fit_their_spec_are_refused(ours: dict[str, Any]) -> None:
    content, state = ours, dict(ours["state_dict"])
    wrong = state | {"decode_head.norm.weight": torch.ones(45)}
    with pytest.raises(
        ValueError,
        match=r"decode_head\.norm\.weight has the shape 45 where its spec has 44; give",
    ):
        from_state_dict(content | {"state_dict": wrong})
    del state["decode_head.norm.weight"]
    with pytest.raises(
        ValueError, match=r"The file lacks decode_head\.norm\.weight; give a whole state dict"
    ):
        from_state_dict(content | {"state_dict": state})
    with pytest.raises(ValueError, match="This is not a segprune spec"):
        from_state_dict(content | {"state_dict": state, "spec": {"stages": 3}})


def test_our_weights_without_their_spec_are_refused(model: SegFormer) -> None:
    with pytest.raises(
        ValueError,
        match=r"segprune's weights without their spec, .*segprune\.save\(model, path\)",
    ):
        from_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [1, 2],
            r"It holds list data, not a state dict; save one: torch\.save\(model\.state_dict\(\), path\)",
        ),
        ({3: 4}, "It holds dict data, not a state dict"),
        (
            {"epoch": 3, "loss": 0.5},
            "This is not a SegFormer: expected keys .*, found epoch, loss; give a SegFormer's",
        ),
        ({}, "This is not a SegFormer: .* found none"),
        (
            {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)},
            r"found conv1\.weight, fc\.bias; give a SegF",
        ),
    ],
)
def test_what_is_no_segformer_is_refused_with_what_it_is(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(tmp_path))}/a\.pth: .*{message.removeprefix('^')}"
    ):
        read(tmp_path / "a.pth")


def test_a_numpy_array_among_the_weights_is_refused_by_name(bare: Any, tmp_path: Path) -> None:
    torch.save(
        bare | {"backbone.norm1.bias": np.zeros(32, dtype=np.float32)}, tmp_path / "a.pth"
    )
    with pytest.raises(
        ValueError, match=r"backbone\.norm1\.bias is a NumpyArray, not a tensor"
    ):
        load(tmp_path / "a.pth")


def test_what_is_no_float_tensor_is_refused_by_name(bare: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"backbone\.norm1\.bias is a list, not a tensor; give a plain state dict",
    ):
        from_state_dict(bare | {"backbone.norm1.bias": [0.0]})
    quantised = bare | {"backbone.norm1.bias": torch.ones(32, dtype=torch.int8)}
    with pytest.raises(
        ValueError,
        match=r"norm1\.bias holds torch\.int8, not floating-point weights; give the network",
    ):
        from_state_dict(quantised)


def test_what_cannot_be_loaded_again_is_not_saved(model: SegFormer, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"ends in '\.onnx'; a checkpoint is saved as \.pth, \.pt or \.safetensors",
    ):
        save(model, tmp_path / "a.onnx")
    with pytest.raises(
        ValueError, match=r"takes a SegFormer, got DataParallel; unwrap it first \(\.module"
    ):
        save(nn.DataParallel(model), tmp_path / "a.pth")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"`extra` is not plain data \(.*PosixPath.*\); give numbers, strings, lists",
    ):
        save(model, tmp_path / "a.pth", extra={"path": tmp_path})
    model.spec = replace(model.spec, num_classes=6)
    with pytest.raises(
        ValueError,
        match=r"classifier\.weight has the shape 5 44 1 1 where its spec has 6 44 1 1",
    ):
        save(model, tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tensor_cut_out_of_a_larger_one_does_not_take_it_along(
    suffix: str, model: SegFormer, tmp_path: Path
) -> None:
    save(model, tmp_path / f"a{suffix}")
    size = (tmp_path / f"a{suffix}").stat().st_size
    weight = model.decode_head.classifier.weight
    large = torch.zeros(1_000_000)
    large[: weight.numel()] = weight.detach().flatten()
    model.decode_head.classifier.weight = nn.Parameter(large[: weight.numel()].view_as(weight))
    save(model, tmp_path / f"a{suffix}")
    assert abs((tmp_path / f"a{suffix}").stat().st_size - size) < 1000


def test_folded_and_unfolded_again_a_file_has_the_spec_it_had(
    trained_like: Fill, tmp_path: Path
) -> None:
    model = build(from_state_dict(state_in("nvlabs", trained_like), dialect="nvlabs"))
    save(fold_decoder(model), tmp_path / "a.pth")
    assert unfold_decoder(load(tmp_path / "a.pth")).spec == model.spec


def test_the_spec_in_safetensors_metadata_is_json(model: SegFormer, tmp_path: Path) -> None:
    save(model, tmp_path / "a.safetensors", extra={"a": 1})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], json.loads(metadata["extra"])) == (
        "segprune",
        "1",
        {"a": 1},
    )
    assert json.loads(metadata["spec"])["numerics"] == asdict(model.spec.numerics)


def test_a_checkpoint_made_by_hand_is_built_as_one_from_a_file(model: SegFormer) -> None:
    made = Checkpoint(
        model.spec, model.state_dict(), "segprune", (), backbone_only=False, extra={}
    )
    assert torch.equal(infer(build(made)), infer(model))


COLOURS = [[10 * k, 20 * k, 255] for k in range(5)]


@pytest.mark.parametrize(
    ("dialect", "meta"),
    [
        ("nvlabs", {"CLASSES": tuple("abcde"), "PALETTE": COLOURS}),
        ("mmseg", {"dataset_meta": {"classes": list("abcde"), "palette": COLOURS}}),
        (
            "mmseg",
            {
                "dataset_meta": {
                    "CLASSES": tuple("abcde"),
                    "PALETTE": tuple(map(tuple, COLOURS)),
                }
            },
        ),
    ],
)
def test_the_classes_that_another_tools_file_states_are_kept(
    dialect: str, meta: dict[str, Any], trained_like: Fill
) -> None:
    extra = from_state_dict({"meta": meta, "state_dict": state_in(dialect, trained_like)}).extra
    assert extra["class_names"] == list("abcde")
    assert extra["palette"] == [
        0,
        0,
        255,
        10,
        20,
        255,
        20,
        40,
        255,
        30,
        60,
        255,
        40,
        80,
        255,
    ] + 753 * [0]


@pytest.mark.parametrize(
    ("meta", "kept"),
    [
        ({"CLASSES": list("abcd"), "PALETTE": COLOURS}, []),  # not one for each
        ({"CLASSES": "abcde"}, []),
        ({"CLASSES": [1, 2, 3, 4, 5]}, []),
        ({"CLASSES": list("abcde"), "PALETTE": COLOURS[:4]}, ["class_names"]),
        ({"CLASSES": list("abcde"), "PALETTE": 5 * [[0, 0, 256]]}, ["class_names"]),
        ({"PALETTE": COLOURS}, []),
    ],
)
def test_classes_that_do_not_fit_the_network_are_not_kept(
    meta: dict[str, Any], kept: list[str], bare: dict[str, Tensor]
) -> None:
    assert list(from_state_dict({"meta": meta, "state_dict": bare}).extra) == kept
    backbone = {name: tensor for name, tensor in bare.items() if name.startswith("backbone.")}
    assert from_state_dict({"meta": meta, "state_dict": backbone}, num_classes=5).extra == {}


def test_weights_are_found_whatever_lies_around_them(
    bare: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = from_state_dict(bare, dialect="nvlabs").state_dict
    named = {f"net.module.{key}": tensor for key, tensor in bare.items()}
    for content in (
        {"epoch": 3, "ema": bare, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"trainer": {"states": [{"network": named}]}},
        [named, 3],
        {key.replace("backbone.", "backbone._orig_mod."): t for key, t in bare.items()},
    ):
        torch.save(content, tmp_path / "a.pth")
        found = read(tmp_path / "a.pth", dialect="nvlabs")
        assert found.notes == ()
        assert found.state_dict.keys() == expected.keys()
        assert all(torch.equal(found.state_dict[key], expected[key]) for key in expected)


def test_of_several_sets_of_weights_a_note_names_all_and_any_can_be_chosen(
    bare: dict[str, Tensor],
) -> None:
    zeros = {key: tensor * 0 for key, tensor in bare.items()}
    teacher = {f"teacher.{key}": tensor for key, tensor in bare.items()}
    student = {f"student.{key}": tensor for key, tensor in zeros.items()}
    for content, first, other in (
        ({"ema": bare, "model": zeros}, "model", "ema"),
        (student | teacher, "student", "teacher"),
        ({"net": student | teacher}, "net.student", "net.teacher"),
    ):
        found = from_state_dict(content, dialect="nvlabs")
        assert f"{first} was taken, not {other}" in found.notes[0]
        assert not found.state_dict["decode_head.classifier.weight"].any()
        found = from_state_dict(content, dialect="nvlabs", weights=other)
        assert found.state_dict["decode_head.classifier.weight"].any()
        assert not any("was taken" in note for note in found.notes)
    with pytest.raises(
        ValueError, match=r"`weights` best was given, .* under ema, model; give"
    ):
        from_state_dict({"ema": bare, "model": zeros}, weights="best")


def test_what_training_leaves_beside_the_network_is_left_out_with_a_note(
    bare: dict[str, Tensor],
) -> None:
    expected = from_state_dict(bare, dialect="nvlabs").state_dict
    modules = {key.rpartition(".")[0] for key in bare} | {"backbone.block1", "backbone"}
    counters = {f"{module}.total_ops": torch.zeros(1) for module in modules}
    for beside, name in (
        (counters | {"total_ops": torch.zeros(1)}, "total_ops"),
        ({"auxiliary_head.conv_seg.weight": torch.ones(4, 4, 1, 1)}, "auxiliary_head"),
        ({"decode_head.loss_decode.class_weight": torch.ones(5)}, "decode_head.loss_decode"),
        ({"classification_head.3.weight": torch.ones(4, 256)}, "classification_head"),
        ({"val_iou.confusion": torch.ones(5, 5, dtype=torch.int64)}, "val_iou"),
        ({"n_averaged": torch.tensor(3), "epochs": [1, 2]}, "n_averaged, epochs"),
    ):
        found = from_state_dict(bare | beside, dialect="nvlabs")
        assert found.state_dict.keys() == expected.keys()
        assert found.notes == (
            f"Left out as no part of the network: {name} ({len(beside)} of the file's tensors).",
        )
        prefixed = {f"model.{key}": tensor for key, tensor in bare.items()} | beside
        assert f"network: {name} (" in from_state_dict(prefixed, dialect="nvlabs").notes[0]


def test_masks_are_multiplied_in_and_sparse_tensors_filled_up(bare: dict[str, Tensor]) -> None:
    key = "backbone.block1.0.mlp.fc1.weight"
    mask = (torch.rand_like(bare[key]) > 0.5).float()
    pruned = bare | {f"{key}_orig": bare[key], f"{key}_mask": mask}
    del pruned[key]
    cut = bare[key] * mask
    sparse = bare | {key: cut.to_sparse()}
    for state, said in ((pruned, "masks of 1 tensors"), (sparse, "1 sparse tensors")):
        found = from_state_dict(state, dialect="nvlabs")
        assert said in found.notes[0]
        assert torch.equal(found.state_dict["encoder.stages.0.blocks.0.mlp.fc1.weight"], cut)
    with pytest.raises(ValueError, match="mask has another shape than"):
        from_state_dict(pruned | {f"{key}_mask": torch.ones(1)})
    huge = torch.sparse_coo_tensor(
        torch.zeros(2, 0), torch.zeros(0), (2**16, 2**16), check_invariants=True
    )
    with pytest.raises(ValueError, match="too large to be filled up"):
        from_state_dict(bare | {key: huge})


def test_a_lora_adapter_is_refused_with_the_remedy(trained_like: Fill, tmp_path: Path) -> None:
    state = {f"base_model.model.{k}": v for k, v in state_in("hf", trained_like).items()}
    extra = {
        f"base_model.model.segformer.x.query.lora_{name}.weight": torch.ones(2, 2)
        for name in "AB"
    }
    adapter = {key: state[key] for key in state if "decode_head" in key}
    for content in (state | extra, adapter | extra):
        with pytest.raises(ValueError, match=r"LoRA adapter, .*merge_and_unload\(\)"):
            from_state_dict(content)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"LoRA adapter, .*merge_and_unload\(\)"):
        read(tmp_path)


@pytest.mark.parametrize("dialect", ["nvlabs", "mmseg"])
def test_one_logit_is_read_as_two_classes_exactly(dialect: str, trained_like: Fill) -> None:
    theirs = reference(dialect, trained_like, num_classes=1)
    found = from_state_dict(theirs.state_dict(), dialect=dialect)
    assert found.spec.num_classes == 2
    assert "threshold 0.5" in found.notes[-1]
    logits, z = infer(build(found)), infer(theirs)
    torch.testing.assert_close(logits[:, 1:], z, rtol=0, atol=2e-5)
    assert not logits[:, 0].any()
    torch.testing.assert_close(logits.softmax(1)[:, 1:], z.sigmoid(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_the_first_convolution_says_how_many_channels_images_have(
    bare: dict[str, Tensor], channels: int
) -> None:
    key = "backbone.patch_embed1.proj.weight"
    found = from_state_dict(bare | {key: torch.ones(32, channels, 7, 7)})
    assert found.spec.in_channels == channels
    assert build(found)(torch.zeros(1, channels, 32, 32)).shape[2:] == (32, 32)
    with pytest.raises(ValueError, match=r"0 channels.* 1 to "):
        from_state_dict(bare | {key: torch.ones(32, 0, 7, 7)})
