"""ONNX: traced by torch.export, translated and simplified by PyTorch's exporter, quantised by ONNX Runtime.

int8 is static, with quantise and dequantise nodes around every convolution and every product with weights: these
symmetric per channel in 7 bits, since processors without VNNI add up products of 8 bits in 16 and overflow;
activations in 8 bits by the smallest and largest value seen with the calibration images. The two products inside
attention are left in float32: a softmax's values lie so unevenly in [0, 1] that 256 levels hold them badly, and
quantising them saved no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from segprune.export.int8 import find_kept
from segprune.export.job import Job
from segprune.export.manifest import KEY
from segprune.export.runtimes import require

OPSET = 18  # the exporter's own, and old enough for every runtime that is kept up
OPSETS = range(
    13, OPSET + 1
)  # older ones are for compilers of NPUs; below 17 LayerNorm is several nodes
ATTENTION = "aten::scaled_dot_product_attention"
PURPOSE = "Exporting to ONNX"
QUANTISED = ["Conv", "Gemm", "MatMul"]


def write(job: Job, path: Path) -> None:
    # Ask for the package before the trace, which takes a while.
    onnx = require("onnx", PURPOSE)
    model = _translate(job) if job.opset == OPSET else _translate_traced(job, onnx)
    if job.manifest.precision == "int8":
        model = _quantise(model, job)

    # Last, into the model that is saved, since quantising makes a new one.
    onnx.helper.set_model_props(model, {KEY: job.manifest.text})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _translate(job: Job) -> Any:
    """Returns the ONNX model; its input, output and free sizes are named by what they are."""
    require("onnxscript", PURPOSE)
    source = "pixels" if job.manifest.preprocess else "images"
    result = "classes" if job.manifest.argmax else "logits"

    # The dynamo exporter is the one that takes graphs of torch.export.
    program = torch.onnx.export(
        job.trace(),
        (job.make_example(),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[source],
        output_names=[result],
        verbose=False,
        optimize=True,
    )
    assert program is not None

    # Free sizes get names that say what they are.
    model = program.model_proto
    if job.manifest.shape is None:
        _name_sizes(model, job)

    return model


def _translate_traced(job: Job, onnx: Any) -> Any:
    """Returns the ONNX model in an older opset, written by PyTorch's exporter of TorchScript; for one size only."""
    optimizer = require("onnxscript.optimizer", PURPOSE)
    source = "pixels" if job.manifest.preprocess else "images"
    result = "classes" if job.manifest.argmax else "logits"

    # That exporter knows attention from opset 14 on, so it is told for all.
    buffer = BytesIO()
    exporter: Any = torch.onnx  # its stubs know neither these functions nor files in memory
    exporter.register_custom_op_symbolic(ATTENTION, _write_attention, job.opset)
    try:
        with torch.no_grad():
            exporter.export(
                job.network,
                (job.make_example(),),
                buffer,
                dynamo=False,
                opset_version=job.opset,
                input_names=[source],
                output_names=[result],
            )
    finally:
        exporter.unregister_custom_op_symbolic(ATTENTION, job.opset)

    # All sizes are known, so the arithmetic on them that it writes becomes constants.
    model = onnx.load_from_string(buffer.getvalue())
    return optimizer.optimize(onnx.shape_inference.infer_shapes(model, data_prop=True))


def _write_attention(
    g: Any, q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, gqa: Any
) -> Any:
    """Writes softmax(q kᵀ · scale) v, B h N d; our attention has no mask and drops nothing."""
    products = g.op("MatMul", q, g.op("Transpose", k, perm_i=[0, 1, 3, 2]))
    weights = g.op("Softmax", g.op("Mul", products, scale), axis_i=-1)
    return g.op("MatMul", weights, v)


def _name_sizes(model: Any, job: Job) -> None:
    """Renames the free sizes, which the exporter calls s0, s53, …"""
    # The channel is the one dimension that is fixed.
    sides = (0, 1, 2) if job.manifest.preprocess else (0, 2, 3)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {
        dims[i].dim_param: name
        for i, name in zip(sides, ("batch", "height", "width"), strict=True)
    }

    # A size occurs in many places, and all of them must get the same name.
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _quantise(model: Any, job: Job) -> Any:
    """Returns the model in int8; ONNX Runtime reads and writes files, so it happens in a temporary folder."""
    onnx = require("onnx", PURPOSE)
    quantization = require("onnxruntime.quantization", "Quantising ONNX to int8")
    inference = require("onnxruntime.quantization.shape_inference", "Quantising ONNX to int8")

    with TemporaryDirectory() as folder:
        plain, joined, quantised = (
            str(Path(folder) / name) for name in ("plain.onnx", "joined.onnx", "int8.onnx")
        )
        onnx.save(model, plain)
        inference.quant_pre_process(
            plain, joined, skip_symbolic_shape=True
        )  # joins products and biases

        # The products inside attention are those that read no weights.
        graph = onnx.load(joined).graph
        arrays = {}
        for tensor in graph.initializer:
            arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
        weights = set(arrays)
        attention = []
        products = {}
        for node in graph.node:
            if node.op_type == "MatMul" and not weights & set(node.input):
                attention.append(node.name)
            elif node.op_type in QUANTISED:
                products[node.name] = arrays[(set(node.input[:2]) & weights).pop()]
        kept = find_kept(job, products)

        # Why these settings: see the top of the module.
        quantization.quantize_static(
            joined,
            quantised,
            _Reader(graph.input[0].name, iter(job.make_batches())),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            nodes_to_exclude=[*attention, *kept],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(quantised)


class _Reader:
    """Hands out batches one by one, as ONNX Runtime's calibration calls for them."""

    def __init__(self, name: str, batches: Iterator[Tensor]) -> None:
        self.name, self.batches = name, batches

    def get_next(self) -> dict[str, Any] | None:
        # None tells ONNX Runtime that calibration is over.
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}
