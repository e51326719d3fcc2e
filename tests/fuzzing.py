"""Inputs that nobody meant to give, by kind, and what reads them.

The tests draw a few of each kind, `benchmarks/fuzz.py` thousands. A reader may take an input, or refuse it by an error
that the command line prints as one sentence; anything else is a defect. Files whose pickles would run code make a
folder named `HARMED` where they succeed.
"""

from __future__ import annotations

import io
import json
import os
import reprlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from segprune import checkpoint
from segprune.checkpoint.hf_in import apply_config
from segprune.checkpoint.ours import expected_state
from segprune.checkpoint.stated import read_classes, read_heads
from segprune.data import check_labels, load_image, open_source
from segprune.export.manifest import Manifest, parse_manifest
from segprune.pruning.plan import read_plan
from segprune.runs.fit import load_resumable
from segprune.runs.folder import RESUME
from segprune.spec import (
    Spec,
    spec_from_dict,
    spec_to_dict,
    standard_spec,
    with_widths,
)
from segprune.stats import count
from tests.dialects import state_in

REFUSALS = (ValueError, OSError)  # FileNotFoundError is one of the latter
HARMED = "harmed"


class Harmful:
    """Pickled, it makes a folder when it is opened by something that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (HARMED,)


def tiny_spec() -> Spec:
    """The smallest network of four stages: a file of it is 30 KB."""
    spec = standard_spec("b0", 5, decoder_dim=4)
    stages = []
    for stage in spec.stages:
        narrow = with_widths(stage, 4, 2, 4)
        stages.append(type(stage)(**(vars(narrow) | {"blocks": narrow.blocks[:1]})))
    return type(spec)(**(vars(spec) | {"stages": tuple(stages)}))


def zeros(spec: Spec) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(t.shape, dtype=t.dtype) for name, t in expected_state(spec).items()
    }


SPEC = tiny_spec()
PLAIN = spec_to_dict(SPEC)
STATE = zeros(SPEC)
CONTENT: dict[str, Any] = {
    "format": "segprune",
    "version": 1,
    "spec": PLAIN,
    "state_dict": STATE,
    "extra": {"class_names": list("abcde"), "palette": [0] * 768, "lr": 1e-3},
}
B0 = standard_spec("b0", 5)
CONFIG = {
    "model_type": "segformer",
    "num_channels": 3,
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 160, 256],
    "num_attention_heads": [1, 2, 5, 8],
    "mlp_ratios": [4, 4, 4, 4],
    "sr_ratios": [8, 4, 2, 1],
    "hidden_act": "gelu",
    "drop_path_rate": 0.1,
    "classifier_dropout_prob": 0.1,
    "decoder_hidden_size": 256,
    "id2label": {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"},
}
PLAN = {
    "groups": [{"name": f"stages.{i}", "width": 8, "slots": 16} for i in range(4)],
    "decided_by": "scores",
}
MANIFEST = asdict(
    Manifest("b0", 5, "onnx", "fp32", (1, 64, 64), False, False, tuple("abcde"), SPEC)
)
RUN: dict[str, Any] = {
    "spec": json.dumps(PLAIN),
    "settings": {"epochs": 2},
    "extra": {"lr": 1e-3},
    "epochs": [{"epoch": 1, "loss": 1.0, "best": True}],
    "state": {
        "epoch": 1,
        "step": 0,
        "steps_done": 3,
        "model": STATE,
        "projections": {},
        "optimizer": {},
        "scaler": None,
        "ema": None,
        "losses": [1.0],
        "best_miou": 0.5,
        "config": {},
    },
}

# Values of every type, and of ranges that no field has.
ODD_JSON = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "8",
        "../../b0",
        "/tmp/x",
        "[/red]",
        "\x1b[2J",
        "\ud800",
    ),
    *("x" * 3000, [], {}, [[]], [1, 2, 3], {"a": 1}, {"0": None}, [None] * 5, ["a"] * 5),
)


def nested(depth: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(depth):
        data = [data]
    return data


def laughs() -> list[Any]:
    """Ten lists of ten lists ...: small in a pickle, 10^9 values when written out."""
    data: list[Any] = ["ha"] * 10
    for _ in range(8):
        data = [data] * 10
    return data


ODD_TENSORS = (
    *(torch.ones(2), torch.zeros(()), torch.zeros(0), torch.ones(3, dtype=torch.int8)),
    *(torch.ones(1).expand(10**9), torch.ones(4, device="meta"), torch.ones(4).to_sparse()),
    *(torch.full((4,), float("nan")), torch.ones(2, dtype=torch.complex64), torch.ones(2) > 0),
)
MOST_PLACES = 2000
ODD = (*ODD_JSON, *ODD_TENSORS, laughs(), nested(200), b"bytes", (1, 2), {1: 2}, 1j)


def _copy(data: Any) -> Any:
    """Returns the same data in new containers; tensors are shared."""
    if isinstance(data, dict):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list | tuple) else data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every container and key in it, from the outside in."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    for key in keys:
        yield data, key
        if isinstance(data[key], dict | list) and data[key]:
            yield from _places(data[key])


@st.composite
def damaged(draw: st.DrawFn, data: Any, odd: tuple[Any, ...] = ODD_JSON) -> Any:
    """The data with one to three values replaced, removed, added or doubled."""
    data = _copy(data)
    for _ in range(draw(st.integers(1, 3))):
        places = list(islice(_places(data), MOST_PLACES))  # `laughs` has a billion
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]

        how = draw(st.sampled_from(("replace", "replace", "remove", "add", "double")))
        value = odd[draw(st.integers(0, len(odd) - 1))]
        if how == "replace":
            container[key] = value
        elif how == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(("", "x", "meta", "state_dict", "model")))] = value
        else:
            container.append(value if how == "add" else container[key])
    return data


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with bits flipped, a part cut out, moved or doubled, or the end missing."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from((1, 4, 64, 4096)))
        how = draw(st.sampled_from(("flip", "flip", "cut", "remove", "double", "zero")))
        piece = data[at : at + length]
        if how == "flip":
            flipped = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in piece[:1])
            data = data[:at] + flipped + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        else:
            middle = {"remove": b"", "double": piece * 2, "zero": bytes(len(piece))}[how]
            data = data[:at] + middle + data[at + length :]
    return data


def _pickled(data: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def _safetensors() -> bytes:
    head = {name: json.dumps(CONTENT[name]) for name in ("version", "spec", "extra")}
    return safetensors_bytes(STATE, metadata=head | {"format": "segprune"})


def _image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("L" if kind == "PNG" else "RGB", (8, 6), 3 if kind == "PNG" else (9, 9, 9)).save(
        buffer, kind
    )
    return buffer.getvalue()


def read_spec(data: Any, _: Path) -> None:
    spec = spec_from_dict(data)
    assert spec_from_dict(spec_to_dict(spec)) == spec
    count(spec, (64, 64))


def read_wrapper(data: Any, _: Path) -> None:
    checkpoint.build(checkpoint.from_state_dict(data, num_classes=5))


def read_config(data: Any, _: Path) -> None:
    if isinstance(data, dict):
        read_heads(data)
        read_classes(data, 5)
        apply_config(B0, data, backbone_only=False)


def read_file(data: tuple[str, bytes], folder: Path) -> None:
    suffix, content = data
    (folder / f"a{suffix}").write_bytes(content)
    checkpoint.build(checkpoint.read(folder / f"a{suffix}"))


def read_pickle(data: Any, folder: Path) -> None:
    read_file((".pth", _pickled(data)), folder)


def read_plans(text: str, folder: Path) -> None:
    (folder / "plan.json").write_bytes(text.encode(errors="surrogatepass"))
    read_plan(folder / "plan.json")


def read_images(data: bytes, folder: Path) -> None:
    (folder / "a.png").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells what it skips in a damaged file
        load_image(str(folder / "a.png"))


def read_manifest(text: str, _: Path) -> None:
    parse_manifest(text)


def read_run(data: Any, folder: Path) -> None:
    (folder / RESUME).write_bytes(_pickled(data))
    load_resumable(folder)


def read_data(tree: list[tuple[str, bytes | str]], folder: Path) -> None:
    """Builds the tree and opens it as a data set, as `segprune train` does."""
    root = folder / f"data{len(os.listdir(folder))}"
    for name, content in tree:
        path = root / name
        if os.path.lexists(path):
            continue  # writing to a pipe would wait for its reader
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "link":
                path.symlink_to(path.name)
            elif content == "pipe":
                os.mkfifo(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
        except OSError:
            continue  # a file where a folder is wanted, or the other way round
    check_labels(open_source(str(root), None), 5, ("train", "val"))


FOLDERS = (
    "",
    "JPEGImages/",
    "SegmentationClass/",
    "ImageSets/Segmentation/",
    "images/",
    "masks/",
)
FOLDERS += (
    "train/",
    "val/",
    "train/images/",
    "train/masks/",
    "images/train/",
    "annotations/train/",
)
FOLDERS += (
    "leftImg8bit/train/a/",
    "gtFine/train/a/",
    ".ipynb_checkpoints/",
    "labels/",
    "img_dir/val/",
)
NAMES = ("a.jpg", "a.png", "b.jpg", "b.png", "A.JPG", "train.txt", "val.txt", "classes.txt")
NAMES += ("labelmap.txt", "class_dict.csv", "id2label.json", "a", "a_mask.png", "._a.jpg")
CONTENTS = (
    _image("JPEG"),
    _image("PNG"),
    _image("PNG")[:40],
    b"",
    b"a\nb\n",
    b"a b\r\n",
    b"\xff\xfe",
)
CONTENTS += (
    b"JPEGImages/a.jpg SegmentationClass/a.png\n",
    b'{"0": "a"}',
    b"name,r,g,b\na,1,2,3\n",
)
CONTENTS += ("link", "pipe")


@dataclass(frozen=True, repr=False)
class Case:
    """An input that can be printed: written out whole, `laughs` would take hours."""

    data: Any

    def __repr__(self) -> str:
        return reprlib.repr(self.data)


@dataclass(frozen=True)
class Target:
    """A kind of input and its reader; `read` gets the input and a folder that it may write into.

    `weight` is the share of cases that it gets: more where a case takes a few milliseconds.
    """

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]
    weight: int = 1

    @property
    def cases(self) -> st.SearchStrategy[Case]:
        return self.inputs.map(Case)


def list_targets() -> dict[str, Target]:
    theirs = {name: state_in(name, zero_fill) for name in ("nvlabs", "hf", "mmseg")}
    wrapped = [
        {"state_dict": state, "meta": {"CLASSES": list("abcde")}, "epoch": 3}
        for state in theirs.values()
    ]
    folders = st.builds("".join, st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)))
    tree = st.lists(st.tuples(folders, st.sampled_from(CONTENTS)), max_size=12)
    odd_objects = (*ODD, Harmful(), Harmful)
    own_files = {".pth": _pickled(CONTENT), ".safetensors": _safetensors()}

    def texts(data: Any) -> st.SearchStrategy[str]:
        dumped = damaged(data).map(json.dumps)
        return dumped | damaged_bytes(json.dumps(data).encode()).map(
            lambda text: text.decode(errors="replace")
        )

    return {
        "specs": Target(damaged(PLAIN, ODD), read_spec, 6),
        "our records": Target(damaged(CONTENT, ODD), read_wrapper),
        "wrappers": Target(st.one_of([damaged(one, ODD) for one in wrapped]), read_wrapper),
        "configs": Target(damaged(CONFIG), read_config, 6),
        "plans": Target(texts(PLAN), read_plans, 6),
        "images": Target(
            st.one_of([damaged_bytes(_image(kind)) for kind in ("PNG", "JPEG", "TIFF", "GIF")]),
            read_images,
        ),
        "manifests": Target(texts(MANIFEST), read_manifest, 6),
        "pickles": Target(damaged(CONTENT, odd_objects), read_pickle),
        "damaged files": Target(
            st.one_of([st.tuples(st.just(s), damaged_bytes(d)) for s, d in own_files.items()]),
            read_file,
        ),
        "runs": Target(damaged(RUN, ODD), read_run),
        "data folders": Target(tree, read_data),
    }


def zero_fill(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of zeros: only their names and shapes matter here."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    return module
