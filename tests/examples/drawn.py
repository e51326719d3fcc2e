"""Exported files drawn by hand, which takes no time: a manifest, and a network of one product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from segprune.data import MEAN, STD
from segprune.export.manifest import Manifest

SIZE = (64, 96)
WEIGHT = np.random.default_rng(0).normal(size=(5, 3, 1, 1)).astype(np.float32)


def drawn(path: Path, weight: np.ndarray = WEIGHT, baked: bool = False, **said: Any) -> str:
    """A file whose logits are a product of each pixel's colours; of any size, or 2 x 64 x 96 with all baked in."""
    helper, types = onnx.helper, onnx.TensorProto
    numbers = {
        "weight": weight,
        "mean": np.array(MEAN, np.float32),
        "std": np.array(STD, np.float32),
    }
    steps = [("Conv", ["images", "weight"], "logits", {})]
    source, result = (
        ("images", types.FLOAT, ["b", 3, "h", "w"]),
        ("logits", types.FLOAT, ["b", len(weight), "h", "w"]),
    )
    if baked:
        source, result = (
            ("pixels", types.UINT8, [2, *SIZE, 3]),
            ("classes", types.UINT8, [2, *SIZE]),
        )
        steps = [
            ("Cast", ["pixels"], "float", {"to": types.FLOAT}),
            ("Sub", ["float", "mean"], "centred", {}),
            ("Div", ["centred", "std"], "scaled", {}),
            ("Transpose", ["scaled"], "images", {"perm": [0, 3, 1, 2]}),
            *steps,
            ("ArgMax", ["logits"], "highest", {"axis": 1, "keepdims": 0}),
            ("Cast", ["highest"], "classes", {"to": types.UINT8}),
        ]
    nodes = [
        helper.make_node(kind, inputs, [output], **how) for kind, inputs, output, how in steps
    ]
    ends = [[helper.make_tensor_value_info(*end)] for end in (source, result)]
    kept = [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "it", *ends, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    shape = (2, *SIZE) if baked else None
    text = Manifest(
        "b0", len(weight), "onnx", "fp32", shape, preprocess=baked, argmax=baked
    ).text
    helper.set_model_props(model, {"segprune": json.dumps(json.loads(text) | said)})
    onnx.save(model, path)
    return str(path)
