from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import SegformerForImageClassification, SegformerModel

from segprune.checkpoint import ours, rename
from segprune.checkpoint.dialects import HEADS, NUMERICS, detect
from segprune.checkpoint.ours import expected_state
from segprune.checkpoint.rename import from_ours
from segprune.model import SegFormer
from segprune.spec import DEPTHS, VARIANTS, Numerics, Spec, standard_spec
from tests.dialects import PUBLISHED, Fill, hf_model, reference, state_in


def convert(
    state: dict[str, Tensor], dialect: str, num_classes: int | None = None
) -> tuple[Spec, dict[str, Tensor]]:
    return rename.translate(
        state, detect(state.keys(), dialect=dialect), num_classes=num_classes
    )


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename.to_ours(state, detect(state.keys()))


def told(*arguments: Any, **options: Any) -> tuple[str, str | None]:
    naming = detect(*arguments, **options)
    return naming.dialect, naming.note


def logits(spec: Spec, state: dict[str, Tensor], x: Tensor) -> Tensor:
    model = SegFormer(spec).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model.double()(x)


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_a_hugging_face_network_has_the_logits_of_transformers(
    variant: str, trained_like: Fill
) -> None:
    theirs = hf_model(variant, trained_like)
    spec, state = convert(theirs.state_dict(), "hf")
    assert spec == standard_spec(variant, 5, numerics=NUMERICS["hf"])
    with torch.device("meta"):
        ours = SegFormer(spec).eval()
    ours.load_state_dict(state, assign=True)
    ours, theirs, x = (
        ours.double(),
        theirs.double(),
        torch.randn(1, 3, 64, 96).double(),
    )  # float32 would hide an eps
    with torch.inference_mode():
        assert relative(ours.decode_head(ours.encoder(x)), theirs(x).logits) < 1e-10


@pytest.mark.parametrize("dialect", PUBLISHED)
def test_each_dialect_computes_what_its_own_code_base_computes(
    dialect: str, trained_like: Fill
) -> None:
    theirs = reference(dialect, trained_like)
    state = state_in(dialect, lambda _: theirs)
    x = torch.randn(2, 3, 64, 96).double()
    found = logits(*convert(state, dialect), x)
    with torch.inference_mode():
        assert relative(found, theirs.double()(x)) < 1e-12


@pytest.mark.parametrize(
    ("dialect", "number", "other"),
    [
        ("bubbliiiing", "norm_eps", 1e-5),
        ("bubbliiiing", "embed_norm_eps", 1e-6),
        ("bubbliiiing", "gelu", "none"),
        ("bubbliiiing", "bn_eps", 1e-5),
        ("bubbliiiing", "align_corners", False),
        ("mmseg", "embed_norm_eps", 1e-5),
        ("mmseg", "bn_eps", 1e-3),
    ],
)
def test_the_logits_depend_on_every_number_of_a_dialect(
    dialect: str, number: str, other: Any, trained_like: Fill
) -> None:
    theirs = reference(dialect, trained_like)
    spec, state = convert(theirs.state_dict(), dialect)
    x = torch.randn(1, 3, 64, 64).double()
    wrong = replace(spec, numerics=replace(spec.numerics, **{number: other}))
    with torch.inference_mode():
        assert relative(logits(wrong, state, x), theirs.double()(x)) > 1e-7


def test_the_numbers_that_only_training_sees_are_those_published() -> None:
    assert NUMERICS["bubbliiiing"] == Numerics(
        gelu="tanh", bn_eps=1e-3, bn_momentum=0.03, align_corners=True
    )
    assert {
        name: numbers.head_dropout_kind
        for name, numbers in NUMERICS.items()
        if numbers.head_dropout
    } == {
        "nvlabs": "2d",
        "bubbliiiing": "2d",
        "hf": "plain",
        "mmseg": "2d",
    }
    assert NUMERICS["mmseg"] == Numerics(embed_norm_eps=1e-6)
    assert (
        NUMERICS["nvlabs"].bn_momentum
        == NUMERICS["hf"].bn_momentum
        == NUMERICS["smp"].bn_momentum
        == 0.1
    )


@pytest.mark.parametrize("dialect", [*PUBLISHED, "hf"])
def test_there_and_back_is_the_identity(dialect: str, trained_like: Fill) -> None:
    theirs = state_in(dialect, trained_like)
    spec, ours = convert(theirs, dialect)
    back = from_ours(ours, spec, dialect)
    assert_same_state(to_ours(back), ours)
    if dialect != "hf":  # read as in memory, written as on disk: see the next test
        assert_same_state(back, theirs)


@pytest.mark.parametrize("dialect", NUMERICS)
def test_a_network_with_a_missing_branch_has_no_name_elsewhere(
    dialect: str, small_spec: Spec
) -> None:
    small_spec = replace(small_spec, head=HEADS[dialect])
    stages = list(small_spec.stages)
    stages[2] = replace(
        stages[2], blocks=(stages[2].blocks[0], stages[2].blocks[1].without_ffn())
    )
    spec = replace(small_spec, stages=tuple(stages))
    message = (
        f"^Stage 3 has a block without attention or FFN, which {dialect} cannot name; "
        r"write a network whose blocks are whole\.$"
    )
    with pytest.raises(ValueError, match=message):
        from_ours(expected_state(spec), spec, dialect)


def test_hugging_face_names_are_written_as_save_pretrained_writes_them(
    trained_like: Fill, tmp_path: Path
) -> None:
    theirs = hf_model("b0", trained_like)
    theirs.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    spec, ours = convert(theirs.state_dict(), "hf")
    assert_same_state(from_ours(ours, spec, "hf"), on_disk)
    assert_same_state(to_ours(on_disk), ours)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dialect", NUMERICS)
def test_every_variant_is_recognised_by_its_shapes(variant: str, dialect: str) -> None:
    width = 256 if dialect == "mmseg" else None
    spec = replace(
        standard_spec(variant, 19, numerics=NUMERICS[dialect], decoder_dim=width),
        head=HEADS[dialect],
    )
    assert convert(from_ours(expected_state(spec), spec, dialect), dialect)[0] == spec


def test_a_decode_head_may_have_another_width_than_the_standard_one() -> None:
    spec = standard_spec("b2", 8, decoder_dim=256)
    assert convert(from_ours(expected_state(spec), spec, "nvlabs"), "nvlabs")[0] == spec


def test_nvlabs_is_told_by_its_wrapper_or_its_unused_layer_and_bubbliiiing_assumed_otherwise(
    trained_like: Fill,
) -> None:
    bare = state_in("nvlabs", trained_like).keys()
    assert told(bare, {"meta", "state_dict", "optimizer"}) == ("nvlabs", None)
    assert told(bare, {"state_dict"}) == ("nvlabs", None)
    assert told([*bare, "decode_head.conv_seg.weight"]) == ("nvlabs", None)
    note = (
        "The names fit nvlabs and bubbliiiing; bubbliiiing was assumed (`dialect` overrules)."
    )
    assert told(bare) == told(bare, {"model", "epoch"}) == ("bubbliiiing", note)


def test_a_given_dialect_overrules_what_was_assumed(trained_like: Fill) -> None:
    keys = state_in("nvlabs", trained_like).keys()
    assert told(keys, dialect="nvlabs") == ("nvlabs", None)
    assert told(keys, {"meta"}, dialect="bubbliiiing") == ("bubbliiiing", None)


def test_a_given_dialect_that_the_names_are_not_of_is_refused(trained_like: Fill) -> None:
    keys = state_in("nvlabs", trained_like).keys()
    message = "names are of nvlabs or bubbliiiing, but `dialect` hf was given; leave it out or give nvlabs or bubbl"
    with pytest.raises(ValueError, match=message):
        detect(keys, dialect="hf")
    with pytest.raises(
        ValueError,
        match="Unknown dialect 'openmmlab'; choose one of segprune, nvlabs, bubbliiiing, hf",
    ):
        detect(keys, dialect="openmmlab")


@pytest.mark.parametrize("dialect", ["hf", "smp", "mmseg"])
def test_names_that_only_one_tool_uses_need_no_assumption(
    dialect: str, trained_like: Fill
) -> None:
    assert told(state_in(dialect, trained_like).keys()) == (dialect, None)


@pytest.mark.parametrize("dialect", [None, "hf", "segprune"])
def test_our_own_names_are_not_enough_without_a_spec(
    dialect: str | None, small_spec: Spec
) -> None:
    with pytest.raises(
        ValueError, match=r"segprune's weights without their spec.*segprune\.save"
    ):
        detect(expected_state(small_spec).keys(), dialect=dialect)


def test_a_file_is_detected_and_its_network_laid_out_only_once(
    trained_like: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, built = state_in("mmseg", trained_like), []
    monkeypatch.setattr(ours, "SegFormer", lambda spec: built.append(spec) or SegFormer(spec))
    naming = detect(state.keys())
    monkeypatch.setattr(
        "segprune.checkpoint.dialects._match_naming", None
    )  # whoever asks again fails
    spec, _ = rename.translate(state, naming)
    with pytest.raises(ValueError, match=r"in_proj_bias has the shape 1 where b0 has 96;"):
        rename.translate(
            state | {"backbone.layers.0.1.0.attn.attn.in_proj_bias": torch.ones(1)}, naming
        )
    assert built == [spec, spec]  # one per file, in errors too


@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_a_bare_backbone_of_mmsegmentation_gives_the_encoder_and_will_get_its_kind_of_head(
    variant: str, trained_like: Fill
) -> None:
    whole = reference("mmseg", trained_like, variant).state_dict()
    backbone = {
        k.removeprefix("backbone."): v for k, v in whole.items() if k.startswith("backbone.")
    }
    assert told(backbone.keys()) == ("mmseg", None)
    spec, state = convert(backbone, "mmseg", num_classes=5)
    expected, ours = convert(whole, "mmseg")
    assert (spec, spec.head, spec.decoder_dim) == (expected, "conv", 256)
    assert_same_state(
        state, {key: tensor for key, tensor in ours.items() if key.startswith("encoder.")}
    )


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("decode_head.fusion_conv.conv.weight", (256,)),
        ("decode_head.fusion_conv.conv.weight", (256, 1024, 3, 3)),
        ("decode_head.convs.1.conv.weight", (256, 64)),
        ("backbone.layers.0.1.0.attn.attn.in_proj_weight", (97, 32)),
        ("backbone.layers.0.1.0.attn.attn.in_proj_bias", (1,)),
        ("backbone.layers.2.1.0.ffn.layers.4.weight", (160, 640)),
    ],
)
def test_a_layer_of_mmsegmentation_with_another_shape_is_refused_by_its_own_name(
    key: str, shape: tuple[int, ...], trained_like: Fill
) -> None:
    state = state_in("mmseg", trained_like)
    message = f"{key} has the shape {' '.join(map(str, shape))} where b0 has {' '.join(map(str, state[key].shape))};"
    with pytest.raises(ValueError, match=message):
        convert(state | {key: torch.ones(shape)}, "mmseg")


def test_another_network_is_refused_with_what_was_found() -> None:
    keys = ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight", "fc.weight"]
    found = r"expected keys such as backbone\.patch_embed1\.proj\.weight .*, found conv1\.weight, .* and 2 more"
    with pytest.raises(
        ValueError, match=f"This is not a SegFormer: {found}; give a SegFormer's checkpoint"
    ):
        detect(keys)
    with pytest.raises(ValueError, match="found none"):
        detect([])


def test_the_layer_that_nvlabs_does_not_use_is_left_out(trained_like: Fill) -> None:
    state = state_in("nvlabs", trained_like, conv_seg=True)
    assert "decode_head.conv_seg.weight" in state
    assert not any("conv_seg" in key for key in convert(state, "nvlabs")[1])


@pytest.mark.parametrize("dialect", [*PUBLISHED, "hf"])
def test_every_missing_key_is_refused_by_its_name(dialect: str, trained_like: Fill) -> None:
    state = state_in(dialect, trained_like)
    first = next(iter(state))
    first_bias = next(key for key in state if key.endswith("bias"))
    for key in [*[key for key in state if key.endswith("weight") and key != first], first_bias]:
        with pytest.raises(ValueError, match=rf"The file lacks {key}; give a whole state dict"):
            convert({name: tensor for name, tensor in state.items() if name != key}, dialect)


def test_unknown_keys_are_refused_by_name(trained_like: Fill) -> None:
    state = state_in("nvlabs", trained_like)
    extra = {f"decode_head.extra{i}.weight": torch.ones(1) for i in range(5)}
    names = ", ".join(list(extra)[:3])
    with pytest.raises(
        ValueError,
        match=f"The file has the unknown {names} and 2 more; give a whole state dict",
    ):
        convert(state | extra, "nvlabs")
    with pytest.raises(
        ValueError, match=r"has the unknown head\.weight;"
    ):  # only a bare backbone may have one
        convert(state | {"head.weight": torch.ones(1)}, "nvlabs")
    with pytest.raises(ValueError, match=r"has the unknown backbone\.norm1\.gamma;"):
        convert(state | {"backbone.norm1.gamma": torch.ones(1)}, "nvlabs")


def test_a_network_pruned_by_another_tool_is_refused_with_the_shapes(
    trained_like: Fill,
) -> None:
    state = state_in("bubbliiiing", trained_like)
    block = "backbone.block1.0.mlp"
    cut = {
        f"{block}.fc1.weight": (100, 32),
        f"{block}.fc1.bias": (100,),
        f"{block}.fc2.weight": (32, 100),
    }
    message = rf"{block}.fc1.weight has the shape 100 32 where b0 has 128 32, and 2 more differ; give a checkpoint of"
    with pytest.raises(ValueError, match=message):
        convert(state | {key: torch.ones(shape) for key, shape in cut.items()}, "bubbliiiing")


def test_widths_and_depths_of_no_variant_are_refused_with_those_expected(
    trained_like: Fill,
) -> None:
    state = state_in("nvlabs", trained_like)
    shallow = {
        key: tensor for key, tensor in state.items() if not key.startswith("backbone.block3.1.")
    }
    known = (
        rf"b0: 32 64 160 256, 2 2 2 2; .*b5: 64 128 320 512, {' '.join(map(str, DEPTHS['b5']))}"
    )
    message = rf"widths 32 64 160 256 and depths 2 2 1 2 are those of no variant \({known}\); give `heads`"
    with pytest.raises(ValueError, match=message):
        convert(shallow, "nvlabs")


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_bare_backbone_of_nvlabs_gives_the_encoder_without_its_image_classifier(
    prefix: str, trained_like: Fill
) -> None:
    whole = state_in("nvlabs", trained_like)
    backbone = {
        k.replace("backbone.", prefix): v for k, v in whole.items() if k.startswith("backbone.")
    }
    backbone |= {"head.weight": torch.ones(1000, 256), "head.bias": torch.ones(1000)}
    dialect, note = told(backbone.keys())
    assert (dialect, note is not None and "nvlabs was assumed" in note) == ("nvlabs", True)
    spec, state = convert(backbone, dialect, num_classes=7)
    assert spec == standard_spec("b0", 7)
    whole_ours = convert(whole, "nvlabs")[1]
    assert_same_state(
        state, {key: tensor for key, tensor in whole_ours.items() if key.startswith("encoder.")}
    )


@pytest.mark.parametrize("kind", [SegformerForImageClassification, SegformerModel])
def test_a_bare_backbone_of_hugging_face_has_the_maps_of_transformers(
    kind: Any, trained_like: Fill, tmp_path: Path
) -> None:
    theirs = hf_model("b0", trained_like, kind)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    for state in (theirs.state_dict(), load_file(tmp_path / "model.safetensors")):
        assert told(state.keys()) == ("hf", None)
        spec, ours = convert(state, "hf", num_classes=4)
        encoder = SegFormer(spec).eval().encoder
        encoder.load_state_dict(
            {key.removeprefix("encoder."): tensor for key, tensor in ours.items()}
        )
        with torch.inference_mode():
            last = theirs.base_model(x).last_hidden_state
            assert relative(encoder(x)[-1], last) < 1e-5


def test_a_bare_backbone_without_a_number_of_classes_is_refused(trained_like: Fill) -> None:
    state = hf_model("b0", trained_like, SegformerModel).state_dict()
    with pytest.raises(
        ValueError,
        match="This is a backbone without decode head, so its classes are unknown; give `num_cl",
    ):
        convert(state, "hf")


def test_a_folded_decode_head_has_no_foreign_names() -> None:
    spec = replace(standard_spec("b0", 3), branch_dims=None)
    with pytest.raises(
        ValueError, match=r"folded, which hf cannot name; unfold it with segprune\.fold first"
    ):
        from_ours(expected_state(spec), spec, "hf")


def test_keys_and_values_of_different_widths_fit_no_common_layer(small_spec: Spec) -> None:
    with pytest.raises(
        ValueError,
        match=r"k\.weight has the shape 16 16 and .* 12 16, which one layer for both cannot",
    ):
        from_ours(expected_state(small_spec), small_spec, "nvlabs")
    assert (
        to_ours(from_ours(expected_state(small_spec), small_spec, "hf")).keys()
        == expected_state(small_spec).keys()
    )


def test_names_can_only_be_written_of_a_known_foreign_dialect(small_spec: Spec) -> None:
    with pytest.raises(
        ValueError,
        match="Cannot write the names of 'mmcv'; choose one of nvlabs, bubbliiiing, hf, smp, m",
    ):
        from_ours({}, small_spec, "mmcv")


def test_each_kind_of_decode_head_has_names_only_where_it_is_known(small_spec: Spec) -> None:
    conv = replace(small_spec, head="conv")
    message = "head has a BatchNorm and a ReLU in each branch, which hf cannot name; write the names of mmseg"
    with pytest.raises(ValueError, match=message):
        from_ours(expected_state(conv), conv, "hf")
    message = "head has linear branches, which mmseg cannot name; write the names of nvlabs, bubbliiiing, hf, smp"
    with pytest.raises(ValueError, match=message):
        from_ours(expected_state(small_spec), small_spec, "mmseg")
