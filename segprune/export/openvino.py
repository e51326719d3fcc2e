"""OpenVINO's IR, an .xml with a .bin beside it, converted from the graph of torch.export."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from segprune.export.int8 import find_kept
from segprune.export.job import Job
from segprune.export.manifest import KEY
from segprune.export.runtimes import require

PURPOSE = "Exporting to OpenVINO"
PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
MARK = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}


def write(job: Job, path: Path) -> None:
    """Writes both files. In fp16 the graph says what is half; the device chooses how to compute. nncf makes int8."""
    int8, shape = job.manifest.precision == "int8", job.manifest.shape
    if (
        int8 and shape is not None and shape[0] > 1
    ):  # with more, its scales were seen to be far off
        raise ValueError(
            "nncf calibrates on one image at a time; for int8 give `batch_size` 1, or `dynamic`."
        )

    # OpenVINO converts the graph of torch.export itself, without ONNX in between.
    ov = require("openvino", PURPOSE)
    example = job.make_example()
    model = ov.convert_model(job.trace())

    # The conversion leaves sizes open that the traced graph cannot have.
    if shape is not None:
        model.reshape(list(example.shape))

    # The same names as in ONNX files.
    source = "pixels" if job.manifest.preprocess else "images"
    result = "classes" if job.manifest.argmax else "logits"
    model.inputs[0].set_names({source})
    model.outputs[0].set_names({result})
    if int8:
        nncf = require("nncf", "int8 in OpenVINO")
        # nncf has a scheme of its own that keeps the accuracy of transformers.
        batches = job.make_batches()
        data = nncf.Dataset(batches, lambda x: x.numpy())
        # Without VNNI, processors add up products of eight bits in 16 and overflow; depth-wise ones keep eight.
        seven_bits = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
        with redirect_stdout(StringIO()):  # its progress bars
            model = nncf.quantize(
                model,
                data,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(batches),
                advanced_parameters=seven_bits,
                ignored_scope=nncf.IgnoredScope(names=find_kept(job, find_products(model))),
            )

    # Set after quantising, which returns another model.
    model.set_rt_info(job.manifest.text, [KEY])
    ov.save_model(model, path, compress_to_fp16=False)
    if job.manifest.precision == "fp16":
        _mark_float32(path)


def find_products(model: Any) -> dict[str, Any]:
    """Returns the weights of all convolutions and products by the name of the operation that reads them."""
    products = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in PRODUCTS:
            weight = operation.input_value(1).get_node()
            if weight.get_type_name() == "Constant":
                products[operation.get_friendly_name()] = weight.data
    return products


def _mark_float32(path: Path) -> None:
    """Marks every layer that computes in float32, so that devices which compute in half leave it there.

    The mark is what OpenVINO calls DisablePrecisionConversion; from Python it can be set in the file alone.
    """
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        ports = layer.findall("output/port[@precision='FP32']")
        if not ports or layer.get("type") in ("Parameter", "Const"):
            continue
        marks = layer.find("rt_info")
        if marks is None:
            # Behind the attributes in <data> and before the ports, as OpenVINO writes it.
            marks = ElementTree.Element("rt_info")
            layer.insert(int(layer.find("data") is not None), marks)
        marks.append(ElementTree.Element("attribute", MARK))
    tree.write(path, encoding="utf-8", xml_declaration=True)
