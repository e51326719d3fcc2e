"""OpenVINO's IR, an .xml with a .bin beside it, converted from the graph of torch.export."""

from __future__ import annotations

from pathlib import Path

from segprune.export.job import Job
from segprune.export.manifest import KEY
from segprune.export.runtimes import require

PURPOSE = "Exporting to OpenVINO"


def write(job: Job, path: Path) -> None:
    """fp16 halves the weights in the file; what is computed in is the device's choice. int8 is quantised by nncf."""
    ov = require("openvino", PURPOSE)
    model = ov.convert_model(job.traced())
    if job.manifest.precision == "int8":
        nncf = require("nncf", "int8 in OpenVINO")
        data = nncf.Dataset(job.batches(), lambda x: x.numpy())
        model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(job.batches()))
    model.set_rt_info(job.manifest.text, [KEY])
    ov.save_model(model, path, compress_to_fp16=job.manifest.precision == "fp16")
