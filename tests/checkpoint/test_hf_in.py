import builtins
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

from segprune.checkpoint import build, load, read, save
from segprune.checkpoint.dialects import NUMERICS
from segprune.checkpoint.hf_in import JSONS
from segprune.spec import standard_spec
from tests.dialects import Fill, hf_model


@pytest.fixture
def theirs(trained_like: Fill) -> nn.Module:
    return hf_model("b0", trained_like)


@pytest.fixture
def folder(theirs: nn.Module, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shard(folder: Path, single: str, *, as_pickle: bool) -> None:
    """Replace the folder's weights by two shards and their index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = single.split(".")
    halves = [f"{stem}-{n}-of-2.{suffix}" for n in (1, 2)]
    where = {key: halves[i % 2] for i, key in enumerate(state)}
    for half in halves:
        part = {key: state[key] for key in state if where[key] == half}
        torch.save(part, folder / half) if as_pickle else save_file(part, folder / half)
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": where}))


def test_a_folder_has_the_logits_of_transformers(folder: Path, theirs: nn.Module) -> None:
    found = read(folder)
    assert found.spec == standard_spec("b0", 5, numerics=NUMERICS["hf"])
    assert (found.dialect, found.notes, found.backbone_only) == ("hf", (), False)
    x = torch.randn(2, 3, 64, 96)
    model = build(found)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.decode_head(model.encoder(x)), theirs(x).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("single", "as_pickle"), [("model.safetensors", False), ("pytorch_model.bin", True)]
)
def test_shards_are_put_together(single: str, as_pickle: bool, folder: Path) -> None:
    whole = read(folder).state_dict
    shard(folder, single, as_pickle=as_pickle)
    found = read(folder).state_dict
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_missing_shard_is_refused_by_name(folder: Path) -> None:
    shard(folder, "model.safetensors", as_pickle=False)
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-2-of-2\.safetensors does not exist; give the path"
    ):
        read(folder)


def test_shards_are_looked_for_in_the_folder_only(folder: Path) -> None:
    shard(folder, "model.safetensors", as_pickle=False)
    secret = folder.parent / "elsewhere.safetensors"
    save_file({"x": torch.ones(1)}, secret)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match=r"hf/elsewhere\.safetensors does not exist"):
        read(folder)


def test_an_index_without_a_map_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"index\.json has no weight_map that names its shards; copy or download it",
    ):
        read(folder)


def test_one_pickled_file_is_read_where_there_are_no_safetensors(
    folder: Path, theirs: nn.Module
) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert read(folder).spec.num_classes == 5


def test_a_folder_that_lacks_a_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"has config\.json but no weights; put model\.safetensors or pytorch_",
    ):
        read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"hf is a folder without config\.json, .* give the checkpoint file in it",
    ):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list instead of names and"),
        ('{"a":' + "[" * 999 + "]" * 999 + "}", "is not valid JSON .nested deeper than 50"),
    ],
)
def test_a_damaged_config_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "drop_path_rate",
            "much",
            "drop_path 'much', which must be a number from 0 to below 1",
        ),
        ("classifier_dropout_prob", [], "head_dropout is a list"),
        ("hidden_act", ["gelu"], r"hidden_act \['gelu'\]"),
        ("id2label", 5, None),
        ("num_attention_heads", "1258", "num_attention_heads 1258"),
    ],
)
def test_a_config_of_wrong_types_is_refused_where_it_is_used(
    name: str, value: object, said: str | None, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    if said is None:
        assert "class_names" not in read(folder).extra
        return
    with pytest.raises(ValueError, match=said):
        read(folder)


@pytest.mark.parametrize("weights", [[1], {1: torch.ones(2)}, torch.ones(3)], ids=type)
def test_weights_without_names_beside_a_config_are_refused(weights: Any, folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds no weights by name"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", [3, 4, 6, 3]),
        ("hidden_sizes", [64, 128, 320, 512]),
        ("decoder_hidden_size", 768),
        ("mlp_ratios", [4, 4, 2, 2]),
        ("sr_ratios", [8, 4, 2, 2]),
        ("model_type", "swin"),
    ],
)
def test_a_config_of_another_network_than_the_weights_is_refused(
    name: str, value: Any, folder: Path
) -> None:
    edit_config(folder, **{name: value})
    message = rf"config\.json says {name} {re.escape(str(value))}, but a b0 as in the weights has .*; give a folder wh"
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_the_number_of_classes_is_that_of_the_classifier_whatever_the_labels_say(
    folder: Path,
) -> None:
    edit_config(folder, id2label={"0": "only"})
    assert read(folder).spec.num_classes == 5


def test_dropout_rates_are_taken_over_and_those_that_are_not_are_noted(folder: Path) -> None:
    edit_config(
        folder, drop_path_rate=0.3, classifier_dropout_prob=0.2, hidden_dropout_prob=0.1
    )
    found = read(folder)
    assert (found.spec.numerics.drop_path, found.spec.numerics.head_dropout) == (0.3, 0.2)
    assert found.notes == (
        "config.json's hidden_dropout_prob 0.1 was not taken over: no dropout inside blocks here.",
    )


def test_an_image_classifiers_folder_is_a_bare_backbone(
    trained_like: Fill, tmp_path: Path
) -> None:
    theirs = hf_model("b0", trained_like, SegformerForImageClassification)
    theirs.config.decoder_hidden_size = 768  # of a head that the file does not have
    theirs.save_pretrained(tmp_path)
    found = read(tmp_path, num_classes=4)
    assert found.backbone_only
    assert found.notes == (
        "Only a backbone was found: the decode head for 4 classes is new and untrained.",
    )
    assert build(found)(torch.randn(1, 3, 32, 32)).shape == (1, 4, 32, 32)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_name_is_downloaded_without_what_is_not_needed(
    weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / weights)
        (folder / "model.safetensors").unlink()
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("nvidia/segformer-b0.v1", num_classes=5).spec.variant == "b0"
    safetensors = ("nvidia/segformer-b0.v1", [*JSONS, "model*.safetensors*"])
    pickled = ("nvidia/segformer-b0.v1", [*JSONS, "pytorch_model*.bin*"])
    assert asked == (
        [safetensors] if weights == "model.safetensors" else [safetensors, pickled]
    )


def test_a_hub_name_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = r"^org/name is neither a file or folder here nor could it be downloaded .*\(LocalEntryNotFoundError\); check"
    with pytest.raises(FileNotFoundError, match=message):
        read("org/name")


def test_without_huggingface_hub_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"org/name is to be downloaded .*; pip install huggingface_hub first"
    ):
        read("org/name")


@pytest.mark.parametrize(
    "path", ["logs/your_model.pth", "logs/a.safetensors", "./org/name", "a/b/c", "name"]
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"^{Path(path)} does not exist; give the path of a checkpoint"
    ):
        read(path)


def test_the_classes_of_a_config_are_kept_in_their_order_if_they_are_names_and_one_each(
    folder: Path,
) -> None:
    names = {"1": "road", "0": "sky", "2": "tree", "4": "person", "3": "bed "}
    edit_config(folder, id2label=names)
    assert read(folder).extra == {"class_names": ["sky", "road", "tree", "bed", "person"]}
    edit_config(folder, id2label={str(k): f"LABEL_{k}" for k in range(5)})
    assert read(folder).extra == {}
    edit_config(folder, id2label={str(k): f"imagenet {k}" for k in range(6)})
    assert read(folder).extra == {}


def test_folders_as_other_settings_write_them_are_read(folder: Path) -> None:
    whole = read(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"drop_path_rate": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert read(folder).spec == whole.spec
    (folder / "model.other.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"variants \(model\.fp16.*, model\.other"):
        read(folder)


def test_of_a_folder_that_is_no_checkpoint_the_one_in_it_is_named(folder: Path) -> None:
    for step in (500, 1000):
        shutil.copytree(folder, folder.parent / "run" / f"checkpoint-{step}")
    with pytest.raises(FileNotFoundError, match=r"such as .*run/checkpoint-1000\.$"):
        read(folder.parent / "run")
    (folder.parent / "logs").mkdir()
    torch.save({}, folder.parent / "logs" / "best.pth")
    with pytest.raises(FileNotFoundError, match=r"such as .*logs/best\.pth\.$"):
        read(folder.parent / "logs")
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match="from_tf=True"):
        read(folder)


SIZES = {
    "narrow": {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [2, 2, 3, 4]},
    "shallow": {"depths": [1, 1, 2, 1]},
    "heads": {"num_attention_heads": [1, 2, 4, 8]},
    "reduction": {"sr_ratios": [4, 2, 1, 1], "mlp_ratios": [4, 2, 4, 4]},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_network_of_other_sizes_is_built_from_its_config_and_its_shapes(
    sizes: dict[str, Any], trained_like: Fill, tmp_path: Path
) -> None:
    config = SegformerConfig(num_labels=3, decoder_hidden_size=32, **sizes)
    theirs = trained_like(SegformerForSemanticSegmentation(config).eval())
    theirs.save_pretrained(tmp_path / "hf")
    found = read(tmp_path / "hf")
    own = sizes.keys() & {"hidden_sizes", "depths"}
    assert found.spec.variant == ("other" if own else "b0")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        ours = build(found).parts(x)[1]
        torch.testing.assert_close(ours, theirs(x).logits, rtol=0, atol=2e-5)

    # Of the weights alone all but the heads can be read.
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    again = read(tmp_path / "a.safetensors", heads=config.num_attention_heads)
    assert again.spec.stages == found.spec.stages
    save(build(again), tmp_path / "ours.pth")
    assert read(tmp_path / "ours.pth").spec == again.spec
    with pytest.raises(ValueError, match="`heads` 7 7 7 7 do not divide the stage widths"):
        read(tmp_path / "a.safetensors", heads=[7, 7, 7, 7])


def test_an_activation_that_is_not_known_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act relu; only networks with gelu or gelu_py"):
        read(folder)
