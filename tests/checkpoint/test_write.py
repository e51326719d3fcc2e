"""Checkpoints in other tools' formats, against those tools' own classes or the plain network of tests/dialects.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerForSemanticSegmentation,
    pipeline,
)

from segprune.checkpoint import load, read, save
from segprune.checkpoint.dialects import NUMERICS
from segprune.checkpoint.hf_out import write_folder
from segprune.checkpoint.modeling_segprune import (
    SegpruneConfig,
    SegpruneForSemanticSegmentation,
)
from segprune.checkpoint.numerics import with_numerics
from segprune.checkpoint.rename import from_ours
from segprune.checkpoint.write import write_file
from segprune.data.transforms import normalise
from segprune.fold import fold_decoder
from segprune.formats import register
from segprune.model import SegFormer
from segprune.pruning.coarser import with_factors
from segprune.pruning.pruner import Pruner
from segprune.spec import Numerics, Spec, standard_spec, with_widths
from segprune.stats import count
from tests.dialects import (
    PUBLISHED,
    Block,
    ConvReference,
    Embed,
    Fill,
    Mlp,
    Reference,
    build_filled,
    reference,
)
from tests.exporting import tiny_network

CLASSES = ("sky", "road", "tree", "car", "person")


def network(fill: Fill, numerics: Numerics, spec: Spec | None = None) -> SegFormer:
    spec = replace(spec or standard_spec("b0", 5), numerics=numerics)
    model = build_filled(lambda: SegFormer(spec), fill)
    assert isinstance(model, SegFormer)
    return model


def logits(model: SegFormer, x: Tensor) -> Tensor:
    """Before the last upsampling, which transformers leaves to the user."""
    with torch.inference_mode():
        return model.parts(x)[1]


@pytest.mark.parametrize(
    ("dialect", "folded"),
    list(
        zip([name for name in NUMERICS if name != "mmseg"], cycle([False, True]), strict=False)
    ),
)
def test_a_dense_network_has_the_same_logits_in_stock_transformers(
    dialect: str, folded: bool, trained_like: Fill, tmp_path: Path
) -> None:
    model = network(trained_like, NUMERICS[dialect])
    write_folder(fold_decoder(model) if folded else model, tmp_path / "hf", class_names=CLASSES)
    theirs, info = SegformerForSemanticSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        found = theirs(x).logits
    expected = logits(model, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert theirs.config.id2label == dict(enumerate(CLASSES))


APART = """
import json, sys

class NoSegprune:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "segprune":
            raise ImportError("segprune is not here")

sys.meta_path.insert(0, NoSegprune())
import torch
from transformers import AutoModelForSemanticSegmentation

found = {}
for name, trust in json.loads(sys.argv[1]).items():
    model, info = AutoModelForSemanticSegmentation.from_pretrained(
        name, output_loading_info=True, **({"trust_remote_code": True} if trust else {})
    )
    with torch.inference_mode():
        logits = model.eval()(torch.load("x.pt")).logits
    problems = [str(value) for value in info.values() if value]
    found[name] = {"logits": logits, "class": type(model).__name__, "problems": problems}
torch.save(found, "y.pt")
"""


@dataclass(frozen=True)
class Apart:
    """What was written as a folder, what its notes were, and what a process without segprune made of it."""

    model: SegFormer
    folder: Path
    notes: tuple[str, ...]
    found: dict[str, Any]


X = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def apart(
    small_spec: Spec,
    conv_spec: Spec,
    trained_like: Fill,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Apart]:
    """Three networks by the names of their folders; one process opens all, since it imports for seconds."""
    torch.manual_seed(0)
    dense = network(trained_like, Numerics())
    uniform = Pruner(dense, 0.5, uniform=True, repair=False).prune()
    assert isinstance(uniform, SegFormer)
    before, after = (count(model.spec, (64, 64)).parameters for model in (dense, uniform))
    assert 1 - after / before == pytest.approx(0.5, abs=0.02)

    mlp = fold_decoder(network(trained_like, small_spec.numerics, small_spec))
    conv = network(trained_like, conv_spec.numerics, conv_spec)
    coarser = {"encoder.stages.0.blocks.1.attn": 2}
    models = {
        "uniform": uniform,
        "mlp": with_factors(mlp, coarser),
        "conv": with_factors(conv, coarser),
    }

    work = tmp_path_factory.mktemp("apart")
    written = {
        name: write_folder(model, work / name, class_names=CLASSES)
        for name, model in models.items()
    }
    torch.save(X, work / "x.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    trust = {name: name != "uniform" for name in models}
    result = subprocess.run(
        [sys.executable, "-c", APART, json.dumps(trust)],
        cwd=work,
        env=env | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = torch.load(work / "y.pt")
    return {
        name: Apart(model, work / name, tuple(written[name].notes), found[name])
        for name, model in models.items()
    }


def test_a_uniformly_pruned_b0_is_one_for_stock_transformers_where_segprune_is_not(
    apart: dict[str, Apart],
) -> None:
    pruned, folder = apart["uniform"].model, apart["uniform"].folder
    assert apart["uniform"].notes == ()
    found = apart["uniform"].found
    assert (found["class"], found["problems"]) == ("SegformerForSemanticSegmentation", [])
    expected = logits(pruned, X)
    assert float((found["logits"] - expected).abs().max()) <= 1e-4 * float(expected.abs().max())

    back = read(folder)
    assert (
        back.spec.stages
        == with_numerics(pruned.state_dict(), pruned.spec, NUMERICS["hf"])[1].stages
    )
    torch.testing.assert_close(logits(load(folder), X), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["mlp", "conv"])
def test_any_other_network_goes_with_its_code_where_segprune_is_not(
    head: str, apart: dict[str, Apart]
) -> None:
    model, notes = apart[head].model, apart[head].notes
    assert len(notes) == 1
    if head == "mlp":
        reason = "block 0 of stage 1 has values of width 12 per head where the stage's width 16 asks for 16"
        way = (
            "trust_remote_code=True (prune with `uniform` and `kv_reduction` 1 to do without)."
        )
    else:
        reason = (
            "its decode head has a BatchNorm and a ReLU in each branch, not linear branches"
        )
        way = "trust_remote_code=True."
    assert f"since {reason};" in notes[0]
    assert notes[0].endswith(way)
    found = apart[head].found
    assert (found["class"], found["problems"]) == ("SegpruneForSemanticSegmentation", [])
    assert torch.equal(found["logits"], logits(model, X))

    back = read(apart[head].folder)
    assert (back.spec, back.extra, back.dialect) == (
        model.spec,
        {"class_names": list(CLASSES)},
        "segprune",
    )
    assert torch.equal(logits(load(apart[head].folder), X), logits(model, X))


def test_the_classes_can_be_registered_and_give_a_loss(
    small_model: SegFormer, tmp_path: Path
) -> None:
    register()
    write_folder(small_model.float(), tmp_path / "hf")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__module__ == "segprune.checkpoint.modeling_segprune"
    x, labels = torch.randn(2, 3, 32, 64), torch.full((2, 32, 64), 255)
    labels[:, :8] = 3
    out = model(x, labels=labels)
    expected = nn.functional.cross_entropy(small_model(x)[:, :, :8], labels[:, :8])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(x, return_dict=False)[0], out.logits)
    register()  # a second time does no harm


def test_a_config_without_spec_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="This config has no spec, which says how wide the network is; load one with",
    ):
        SegpruneForSemanticSegmentation(SegpruneConfig())


def test_the_image_processor_and_the_pipeline_take_the_folder(
    trained_like: Fill, tmp_path: Path
) -> None:
    model = network(trained_like, NUMERICS["hf"])
    write_folder(model, tmp_path / "hf", class_names=CLASSES, input_shape=(64, 96))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ready = AutoImageProcessor.from_pretrained(tmp_path / "hf")(
        Image.fromarray(image), return_tensors="pt"
    )
    expected = normalise(image)[None]
    torch.testing.assert_close(ready["pixel_values"], expected, rtol=0, atol=1e-5)
    segments = pipeline("image-segmentation", model=str(tmp_path / "hf"))(
        Image.fromarray(image)
    )
    classes = model(expected)[0].argmax(0)
    assert [segment["label"] for segment in segments] == [CLASSES[k] for k in classes.unique()]
    for segment in segments:
        ours = (classes == CLASSES.index(segment["label"])).numpy()
        assert ((np.asarray(segment["mask"]) > 0) == ours).mean() > 0.999


@pytest.mark.parametrize("source", ["nvlabs", "bubbliiiing", "hf"])
@pytest.mark.parametrize("dialect", ["nvlabs", "bubbliiiing"])
def test_a_dense_network_in_another_codes_names_has_that_codes_logits(
    source: str, dialect: str, trained_like: Fill, tmp_path: Path
) -> None:
    model = network(trained_like, NUMERICS[source])
    path = tmp_path / "theirs.pth"
    if NUMERICS[source].gelu != NUMERICS[dialect].gelu:
        with pytest.raises(
            ValueError,
            match=r"GELU where theirs is the .* one, which no weights make up for; write hf instead, which has both\.$",
        ):
            write_file(model, path, dialect)
        return
    assert write_file(fold_decoder(model), path, dialect).notes == ()
    data = torch.load(path, weights_only=True)
    theirs = Reference("b0", 5, PUBLISHED[dialect]).eval()
    if dialect == "nvlabs":
        theirs.decode_head.conv_seg = nn.Conv2d(
            128, 5, 1
        )  # which their head has and never runs
    theirs.load_state_dict(data["state_dict"] if dialect == "nvlabs" else data)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(
            theirs(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
        back = read(path)
        assert back.dialect == dialect
        torch.testing.assert_close(
            load(path)(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("variant", ["b0", "b1"])
def test_a_dense_network_of_mmsegmentation_comes_back_to_the_bit(
    variant: str, trained_like: Fill, tmp_path: Path
) -> None:
    theirs = reference("mmseg", trained_like, variant)
    torch.save(
        {"meta": {"epoch": 1}, "state_dict": theirs.state_dict(), "optimizer": {}},
        tmp_path / "theirs.pth",
    )
    assert read(tmp_path / "theirs.pth").dialect == "mmseg"
    model = load(tmp_path / "theirs.pth")
    save(model, tmp_path / "ours.pth")
    assert write_file(load(tmp_path / "ours.pth"), tmp_path / "back.pth", "mmseg").notes == ()
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["meta"].keys() == {"dataset_meta", "cfg"}
    expected = theirs.state_dict()
    assert back["state_dict"].keys() == expected.keys()
    assert all(
        torch.equal(back["state_dict"][name], tensor) for name, tensor in expected.items()
    )
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        wanted = theirs(x)
        torch.testing.assert_close(
            model(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
        )


def test_a_narrower_network_of_mmsegmentation_is_written_with_its_arguments(
    trained_like: Fill, tmp_path: Path
) -> None:
    """As its classes can express it, in other numerics and with another scale of attention."""
    spec = replace(standard_spec("b0", 5, numerics=NUMERICS["hf"], decoder_dim=48), head="conv")
    stages = [
        with_widths(stage, 8 * stage.blocks[0].num_heads, stage.blocks[0].num_heads, 16)
        for stage in spec.stages
    ]
    stages = [
        with_widths(stage, stage.width, stage.blocks[0].num_heads, 2 * stage.width)
        for stage in stages
    ]
    blocks = [tuple(replace(block, qk_scale=0.3) for block in stage.blocks) for stage in stages]
    spec = replace(
        spec, stages=tuple(replace(s, blocks=b) for s, b in zip(stages, blocks, strict=True))
    )
    model = network(trained_like, spec.numerics, spec)
    (note,) = write_file(model, tmp_path / "a.pth", "mmseg").notes
    again = [stage.blocks[0].num_heads for stage in read(tmp_path / "a.pth").spec.stages]
    assert again == [1, 2, 5, 8]
    assert note == (
        "Build it with their base classes, not with a variant's: MixVisionTransformer(embed_dims=8, num_heads="
        "[1, 2, 5, 8], num_layers=[2, 2, 2, 2], mlp_ratio=2), SegformerHead(in_channels=[8, 16, 40, 64], channels=48)."
    )
    theirs = ConvReference(
        "b0", 5, PUBLISHED["mmseg"], embed_dims=8, mlp_ratio=2, channels=48
    ).eval()
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"])
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(
            theirs(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def test_a_decode_head_of_the_other_kind_is_refused_with_the_formats_that_have_it(
    trained_like: Fill, conv_model: SegFormer, tmp_path: Path
) -> None:
    dense = network(trained_like, NUMERICS["hf"])
    message = (
        "^mmseg's classes cannot hold this network, since its decode head has linear branches, not a BatchNorm and "
        r"a ReLU in each branch; write nvlabs, bubbliiiing or hf instead\.$"
    )
    with pytest.raises(ValueError, match=message):
        write_file(dense, tmp_path / "a.pth", "mmseg")
    message = (
        "^nvlabs's classes cannot hold this network, since its decode head has a BatchNorm and a ReLU in each branch, "
        r"not linear branches; write mmseg or hf instead\.$"
    )
    with pytest.raises(ValueError, match=message):
        write_file(conv_model.float(), tmp_path / "a.pth", "nvlabs")
    message = r"has values of width 12 per head .* asks for 16; write hf instead, which needs no uniform widths\.$"
    with pytest.raises(ValueError, match=message):
        write_file(conv_model, tmp_path / "a.pth", "mmseg")
    assert not list(tmp_path.iterdir())


def test_what_a_user_has_to_set_in_the_other_code_is_noted(
    trained_like: Fill, tmp_path: Path
) -> None:
    pruned = Pruner(
        network(trained_like, NUMERICS["smp"]), 0.5, uniform=True, repair=False
    ).prune()
    assert isinstance(pruned, SegFormer)
    rims, classes = write_file(pruned, tmp_path / "a.pth", "nvlabs").notes
    assert rims.startswith(
        "The network's last upsampling has align_corners=True and theirs False; set it there"
    )
    widths = [stage.width for stage in pruned.spec.stages]
    assert classes.startswith(
        f"Build it with their base classes, not with a variant's: MixVisionTransformer(embed_dims={widths}"
    )
    (rims,) = write_folder(pruned, tmp_path / "hf").notes
    assert "align_corners=True and that of transformers' image processor False" in rims


@pytest.mark.parametrize("dialect", ["nvlabs", "bubbliiiing"])
def test_a_uniformly_pruned_network_is_read_again_from_its_own_file(
    dialect: str, trained_like: Fill, tmp_path: Path
) -> None:
    # The last upsampling may be another than theirs, which the file then says.
    numerics = replace(NUMERICS[dialect], align_corners=dialect == "nvlabs")
    pruned = Pruner(network(trained_like, numerics), 0.5, uniform=True, repair=False).prune()
    assert isinstance(pruned, SegFormer)
    upsampling, call = write_file(pruned, tmp_path / "b.pth", dialect).notes
    assert "align_corners" in upsampling
    assert call.startswith("Build it with their base classes")

    back, x = read(tmp_path / "b.pth", dialect=dialect), torch.randn(1, 3, 64, 96)
    assert (back.dialect, back.notes) == (dialect, ())
    assert [s.width for s in back.spec.stages] == [s.width for s in pruned.spec.stages]
    assert [s.blocks[0].num_heads for s in back.spec.stages] == [
        s.blocks[0].num_heads for s in pruned.spec.stages
    ]
    again = load(tmp_path / "b.pth", dialect=dialect)
    with torch.inference_mode():
        expected = pruned(x)
        largest = float(expected.abs().max())
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-5 * largest)


def test_what_is_written_is_compared_by_whoever_can_read_it(
    trained_like: Fill, small_model: SegFormer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(trained_like, NUMERICS["nvlabs"])
    written = write_folder(model.train(), tmp_path / "stock")
    assert written.readers == ("segprune", f"transformers {transformers.__version__}")
    assert 0 < written.difference < 1e-5
    assert model.training
    assert write_file(model, tmp_path / "a.pth", "nvlabs").readers == ("segprune",)
    own = write_folder(small_model.float(), tmp_path / "own")
    assert (own.readers, own.difference) == (("segprune",), 0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert write_folder(model, tmp_path / "alone").readers == ("segprune",)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_what_reads_back_with_other_logits_is_refused_and_not_kept(
    factor: float, trained_like: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(trained_like, NUMERICS["nvlabs"])

    def off(state: dict[str, Tensor], spec: Spec, dialect: str) -> dict[str, Tensor]:
        return {
            name: tensor * factor for name, tensor in from_ours(state, spec, dialect).items()
        }

    monkeypatch.setattr("segprune.checkpoint.write.from_ours", off)
    refusal = r"^Read again by segprune, the logits are off by .* is allowed, and nothing was kept; choose another format"
    if factor != factor:  # caught as soon as it is read
        refusal = "has NaN or infinite values"
    with pytest.raises(ValueError, match=refusal):
        write_file(model, tmp_path / "a.pth", "nvlabs")
    monkeypatch.setattr("segprune.checkpoint.hf_out.from_ours", off)
    with pytest.raises(ValueError, match=refusal):
        write_folder(model, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_transformers_logits_are_compared_too(
    trained_like: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SegformerForSemanticSegmentation.forward

    def off(self: SegformerForSemanticSegmentation, *inputs: Any, **named: Any) -> Any:
        out = forward(self, *inputs, **named)
        out.logits = out.logits * 1.001
        return out

    monkeypatch.setattr(SegformerForSemanticSegmentation, "forward", off)
    with pytest.raises(
        ValueError,
        match=r"^Read again by transformers [\d.]+, the logits are off by 1\.0e-03 of the",
    ):
        write_folder(network(trained_like, NUMERICS["hf"]), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_what_their_classes_cannot_hold_is_refused_by_name(
    small_model: SegFormer, tmp_path: Path
) -> None:
    message = (
        r"^bubbliiiing's classes cannot hold this network, since block 0 of stage 1 has values of width 12 .*; prune "
        r"with `uniform` for them, or write hf instead, which needs no uniform widths\.$"
    )
    with pytest.raises(ValueError, match=message):
        write_file(small_model.float(), tmp_path / "a.pth", "bubbliiiing")
    dense = SegFormer(standard_spec("b0", 5))
    coarse = with_factors(dense, {"encoder.stages.0.blocks.1.attn": 2})
    with pytest.raises(ValueError, match=r"block 1 of stage 1 .* prune with `kv_reduction` 1 "):
        write_file(coarse, tmp_path / "a.pth", "nvlabs")
    with pytest.raises(
        ValueError,
        match=r"a\.onnx ends in '\.onnx'; nvlabs's code reads \.pth, \.pt, \.bin: give such",
    ):
        write_file(small_model, tmp_path / "a.onnx", "nvlabs")


def test_a_folder_in_use_and_names_that_do_not_fit_are_refused_and_nothing_is_left(
    small_model: SegFormer, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError,
        match="There are 2 class names where the network has 5 classes; give one for each",
    ):
        write_folder(small_model, tmp_path / "hf", class_names=("a", "b"))
    with pytest.raises(
        ValueError, match="The input is 16×64 pixels; both sides must be at least 32"
    ):
        write_folder(small_model, tmp_path / "hf", input_shape=(16, 64))
    assert not list(tmp_path.iterdir())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("kept")
    with pytest.raises(
        ValueError,
        match="hf is there already, and would be written over; give another place, or remove",
    ):
        write_folder(small_model, tmp_path / "hf")
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"file/hf could not be written \(.*\); give another place"
    ):
        write_folder(small_model, tmp_path / "file" / "hf")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "hf", "mine.txt"]


class Backbone(nn.Module):
    """NVlabs' `MixVisionTransformer`: its arguments, its defaults and its names."""

    def __init__(
        self,
        embed_dims: list[int],
        num_heads: list[int],
        mlp_ratios: list[int],
        depths: list[int],
        sr_ratios: list[int],
        qkv_bias: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        numbers, inputs = PUBLISHED["nvlabs"], 3
        for s, width in enumerate(embed_dims):
            kernel, stride = (7, 4) if s == 0 else (3, 2)
            blocks = nn.Sequential()
            for _ in range(depths[s]):
                block = Block(width, num_heads[s], sr_ratios[s], numbers)
                block.norm1, block.norm2 = norm_layer(width), norm_layer(width)
                block.attn.q = nn.Linear(width, width, bias=qkv_bias)
                block.attn.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
                block.mlp = Mlp(width, numbers.gelu, mlp_ratios[s])
                blocks.append(block)
            self.add_module(f"patch_embed{s + 1}", Embed(inputs, width, kernel, stride, 1e-5))
            self.add_module(f"block{s + 1}", blocks)
            self.add_module(f"norm{s + 1}", norm_layer(width))
            inputs = width


def test_the_hint_how_to_build_a_uniform_network_builds_it(
    trained_like: Fill, tmp_path: Path
) -> None:
    model = Pruner(
        network(trained_like, NUMERICS["nvlabs"]), 0.5, uniform=True, repair=False
    ).prune()
    assert isinstance(model, SegFormer)
    (note,) = write_file(model, tmp_path / "a.pth", "nvlabs").notes
    dim = model.spec.decoder_dim

    # What the note says is run as it stands.
    call = note.partition("MixVisionTransformer")[2].partition(f", decode head width {dim}")[0]
    names = {"Backbone": Backbone, "partial": partial, "nn": nn}
    theirs = Reference("b0", 5, PUBLISHED["nvlabs"])
    theirs.backbone = eval(f"Backbone{call}", names)
    for s, stage in enumerate(model.spec.stages, 1):
        branch = theirs.decode_head.get_submodule(f"linear_c{s}")
        branch.proj = nn.Linear(stage.width, dim)
    theirs.decode_head.linear_fuse = nn.ModuleDict(
        {"conv": nn.Conv2d(4 * dim, dim, 1, bias=False), "bn": nn.BatchNorm2d(dim)}
    )
    theirs.decode_head.linear_pred = nn.Conv2d(dim, 5, 1)
    theirs.decode_head.conv_seg = nn.Conv2d(128, 5, 1)
    theirs.eval().load_state_dict(
        torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    )
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(
            theirs(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its own code, of a tiny folded network."""
    register()
    folder = tmp_path_factory.mktemp("hf") / "it"
    write_folder(tiny_network(), folder, class_names=CLASSES)
    return folder


def test_another_number_of_classes_gives_a_new_classifier_and_nothing_else(
    own_code: Path, tmp_path: Path
) -> None:
    old = AutoModelForSemanticSegmentation.from_pretrained(own_code)
    new = AutoModelForSemanticSegmentation.from_pretrained(
        own_code, num_labels=7, ignore_mismatched_sizes=True
    )
    x = torch.randn(1, 3, 32, 64)
    assert new(x).logits.shape == (1, 7, 8, 16)
    classifier = new.network.decode_head.classifier
    assert 0.001 < classifier.weight.std() < 0.1
    assert not classifier.bias.any()
    for name, tensor in new.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(tensor, old.state_dict()[name]), name

    # What is saved opens again, there and here.
    new.save_pretrained(tmp_path / "new")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "new")
    assert torch.equal(again(x).logits, new.eval()(x).logits)
    assert load(tmp_path / "new").spec.num_classes == 7


def test_the_class_checkpoints_gradients_and_returns_hidden_states(own_code: Path) -> None:
    model = AutoModelForSemanticSegmentation.from_pretrained(own_code)
    assert model.accepts_loss_kwargs is False
    x = torch.randn(1, 3, 32, 64)
    out = model.eval()(x, output_hidden_states=True)
    sizes = [tuple(hidden.shape[2:]) for hidden in out.hidden_states]
    assert sizes == [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert model(x).hidden_states is None
    loss, _, hidden = model(
        x, torch.zeros(1, 32, 64).long(), output_hidden_states=True, return_dict=False
    )
    assert (loss.shape, len(hidden)) == ((), 4)

    # Newer versions call it by another name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")()
    assert getattr(model, f"is_{kind}_checkpointing")
    assert model.network.encoder.checkpointing
    getattr(model, f"{kind}_checkpointing_disable")()
    assert not model.network.encoder.checkpointing
