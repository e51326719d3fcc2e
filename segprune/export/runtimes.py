"""Exported files opened and run, each by its own runtime, behind one callable.

All run on the CPU with as many threads as PyTorch has when the file is opened. OpenVINO is told to compute in float32;
on processors that have bfloat16 it would otherwise take that.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segprune.data import MEAN, STD
from segprune.export.manifest import KEY, MIN_DYNAMIC, Manifest, from_text
from segprune.files import require_file


@dataclass(frozen=True)
class Runtime:
    """An open file. `run` takes and gives what the manifest says, in the batch that the file takes."""

    name: str
    manifest: Manifest
    run: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images B 3 H W -> logits B K H W, of any batch.

        Where preprocessing is baked in, the pixels are taken back to uint8, which is exact for what was uint8. Where
        argmax is, the class has the logit 1 and the others 0. ValueError for a size that the file does not take.
        """
        self._check_size(images.shape)
        x = images.float()
        if self.manifest.preprocess:
            mean, std = torch.tensor(MEAN), torch.tensor(STD)
            x = (x.permute(0, 2, 3, 1) * std + mean).round().clamp(0, 255).to(torch.uint8)
        out = self.run_any(x)
        if not self.manifest.argmax:
            return out
        classes = torch.nn.functional.one_hot(out.long(), self.manifest.num_classes)
        return classes.permute(0, 3, 1, 2).float()  # B H W K -> B K H W

    def run_any(self, x: Tensor) -> Tensor:
        """`run` in pieces of the file's own batch, the last one filled up with its first picture."""
        if self.manifest.shape is None:
            return self.run(x.contiguous())
        size = self.manifest.shape[0]
        pieces = []
        for piece in x.split(size):
            full = torch.cat([piece, piece[:1].expand(size - len(piece), *piece.shape[1:])])
            pieces.append(self.run(full.contiguous())[: len(piece)])
        return torch.cat(pieces)

    def _check_size(self, shape: torch.Size) -> None:
        size = tuple(shape[2:])
        if self.manifest.shape is None and min(size) < MIN_DYNAMIC:
            raise ValueError(
                f"The file takes pictures of {MIN_DYNAMIC} pixels a side and more, got {size[0]}×{size[1]}; "
                "give a larger --input_shape."
            )
        if self.manifest.shape is not None and size != self.manifest.shape[1:]:
            height, width = self.manifest.shape[1:]
            raise ValueError(
                f"The file takes pictures of {height}×{width} alone, got {size[0]}×{size[1]}; "
                f"give --input_shape {height} {width}, or export it again with --dynamic."
            )


def require(package: str, purpose: str) -> Any:
    """A package of the `export` extra; ImportError in one sentence where it is missing."""
    root = package.partition(".")[0]
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != root:
            raise  # it is there, and one of its own needs is not
        raise ImportError(
            f'{purpose} needs {root}, which is not installed; run in the clone: pip install ".[export]".'
        ) from error


def is_exported(path: str) -> bool:
    """Whether the name is that of an exported file."""
    return Path(path).suffix in OPENERS


def open_exported(path: str | Path) -> Runtime:
    """An .onnx, .xml, .pt2, .torchscript or .ncnn.param file that `segprune export` wrote; ValueError for any other.

    An AOTInductor package is machine code, which opening runs.
    """
    path = require_file(path)
    try:
        return OPENERS[path.suffix](path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # every runtime fails in its own ways
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is no file that segprune export wrote ({reason}); export it again.") from error


def _open_onnx(path: Path) -> Runtime:
    ort = require("onnxruntime", "Running an .onnx file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    manifest = from_text(session.get_modelmeta().custom_metadata_map.get(KEY, ""))
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return Runtime(f"ONNX Runtime {ort.__version__}", manifest, run)


def _open_openvino(path: Path) -> Runtime:
    ov = require("openvino", "Running an OpenVINO file")
    core = ov.Core()
    model = core.read_model(path)
    manifest = from_text(model.get_rt_info([KEY]).value if model.has_rt_info([KEY]) else "")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", settings)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])  # a copy already

    return Runtime(f"OpenVINO {ov.__version__.partition('-')[0]}", manifest, run)


def _open_pt2(path: Path) -> Runtime:
    if is_compiled(path):
        return _open_aotinductor(path)
    kept = {f"{KEY}.json": ""}
    module = torch.export.load(path, extra_files=kept).module()
    return Runtime(f"torch.export {torch.__version__}", from_text(kept[f"{KEY}.json"]), _without_grad(module))


def is_compiled(path: str | Path) -> bool:
    """Whether a .pt2 file is an AOTInductor package, which holds machine code, and no graph of torch.export's."""
    if Path(path).suffix != ".pt2" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/aotinductor/" in name for name in archive.namelist())


def _open_aotinductor(path: Path) -> Runtime:
    with zipfile.ZipFile(path) as archive:  # read before the package is loaded, which runs its code
        texts = [archive.read(name) for name in archive.namelist() if name.endswith("_metadata.json")]
    manifest = from_text(json.loads(texts[0]).get(KEY, "") if texts else "")
    from torch._inductor import aoti_load_package

    return Runtime(f"AOTInductor {torch.__version__}", manifest, _without_grad(aoti_load_package(str(path))))


def _open_torchscript(path: Path) -> Runtime:
    kept = {f"{KEY}.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates TorchScript
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=kept)
    text = kept[f"{KEY}.json"]
    manifest = from_text(text.decode() if isinstance(text, bytes) else text)
    return Runtime(f"TorchScript {torch.__version__}", manifest, _without_grad(module))


def _open_ncnn(path: Path) -> Runtime:
    ncnn = require("ncnn", "Running an ncnn file")
    stem = path.with_suffix("")  # name.ncnn of name.ncnn.param
    words = stem.with_suffix(".ncnn.json")
    manifest = from_text(words.read_text(encoding="utf-8") if words.is_file() else "")
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = manifest.precision == "fp16"
    if net.load_param(str(path)) or net.load_model(str(stem.with_suffix(".ncnn.bin"))):
        raise ValueError("ncnn cannot load it")

    def run(x: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(x[0].numpy()))  # 3 H W: ncnn knows no batch
        status, out = extractor.extract("out0")
        if status:
            raise ValueError("ncnn cannot run it")
        return torch.from_numpy(np.array(out))[None]

    return Runtime(f"ncnn {ncnn.__version__}", manifest, run)


def _without_grad(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x)

    return run


OPENERS: dict[str, Callable[[Path], Runtime]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
    ".pt2": _open_pt2,
    ".torchscript": _open_torchscript,
    ".param": _open_ncnn,
}
