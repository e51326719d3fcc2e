"""ONNX: traced by torch.export, translated and simplified by PyTorch's exporter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from segprune.export.job import Job
from segprune.export.manifest import KEY
from segprune.export.runtimes import require

OPSET = 18  # the exporter's own, and old enough for every runtime that is kept up
PURPOSE = "Exporting to ONNX"


def write(job: Job, path: Path) -> None:
    save(translated(job), job, path)


def translated(job: Job) -> Any:
    """The ONNX model; its inputs, outputs and free sizes are named by what they are."""
    require("onnxscript", PURPOSE)
    source = "pixels" if job.manifest.preprocess else "images"
    result = "classes" if job.manifest.argmax else "logits"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter calls functions of PyTorch's that PyTorch deprecates
        program = torch.onnx.export(
            job.traced(),
            (job.example(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[source],
            output_names=[result],
            verbose=False,
            optimize=True,
        )
    assert program is not None
    model = program.model_proto
    if job.manifest.shape is None:
        _name_sizes(model, job)
    return model


def save(model: Any, job: Job, path: Path) -> None:
    onnx = require("onnx", PURPOSE)
    onnx.helper.set_model_props(model, {KEY: job.manifest.text})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _name_sizes(model: Any, job: Job) -> None:
    """The exporter calls free sizes s0, s53, …"""
    sides = (0, 1, 2) if job.manifest.preprocess else (0, 2, 3)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {dims[i].dim_param: name for i, name in zip(sides, ("batch", "height", "width"), strict=True)}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
