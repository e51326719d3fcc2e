"""Exported files opened and run, each by its own runtime, behind one callable.

All run on the CPU with as many threads as PyTorch has when the file is opened. OpenVINO is told to compute in float32:
on processors that have bfloat16 it would otherwise compute in that.
"""

from __future__ import annotations

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

from segprune.data.transforms import restore_pixels
from segprune.export.manifest import KEY, MIN_DYNAMIC, Manifest, parse_manifest
from segprune.files import parse_json, require_file
from segprune.spec import preprocessing_of


@dataclass(frozen=True)
class Runtime:
    """An open file. `run` takes and returns what the manifest says, in the batch that the file takes."""

    name: str
    manifest: Manifest
    run: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Returns logits B K H W of normalised images B 3 H W, for any batch.

        A file that preprocesses gets the pixels as uint8 again, which is exact for what was uint8. A file that returns
        classes gives the class the logit 1 and the others 0. Raises ValueError for a size that the file does not take.
        """
        self._check_size(images.shape)

        # Undo the normalisation: the file does its own.
        x = images.float()
        if self.manifest.preprocess:
            pixels = restore_pixels(x, preprocessing_of(self))
            x = pixels.round().clamp(0, 255).to(torch.uint8)

        out = self.run_any(x)
        num_classes = self.manifest.num_classes
        size = images.shape[2:]
        if self.manifest.argmax:
            right = (
                out.shape == (len(x), *size)
                and 0 <= int(out.min()) <= int(out.max()) < num_classes
            )
        else:
            right = out.shape == (len(x), num_classes, *size)
        if not right:
            raise ValueError(
                f"The file returned {tuple(out.shape)} for {tuple(images.shape)}, where it says that it has "
                f"{num_classes} classes; export it again."
            )
        if not self.manifest.argmax:
            return out

        # One-hot logits let callers treat such a file like any network.
        classes = torch.nn.functional.one_hot(out.long(), num_classes)
        return classes.permute(0, 3, 1, 2).float()  # B H W K -> B K H W

    def run_any(self, x: Tensor) -> Tensor:
        """Runs any number of images in the file's own batches, the last one filled up with its first image."""
        try:
            return self._run_batches(x)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # every runtime fails in its own ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ValueError(f"The file did not run ({reason}); export it again.") from error

    def _run_batches(self, x: Tensor) -> Tensor:
        if self.manifest.shape is None:
            return self.run(x.contiguous())

        # A fixed batch cannot be smaller, so the last one is filled up and cut again.
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
                f"The file takes images of {MIN_DYNAMIC} pixels a side and more, got {size[0]}×{size[1]}; "
                "give a larger `input_shape`."
            )

        if self.manifest.shape is not None and size != self.manifest.shape[1:]:
            height, width = self.manifest.shape[1:]
            raise ValueError(
                f"The file takes images of {height}×{width} alone, got {size[0]}×{size[1]}; "
                f"give `input_shape` {height} {width}, or export it again with `dynamic`."
            )


def require(package: str, purpose: str) -> Any:
    """Returns a package of the `export` extra. Raises ImportError in one sentence where it is missing."""
    # "a.b" is a module of the package "a", which is what users install.
    root = package.partition(".")[0]
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != root:
            raise  # it is installed, and something that it imports is not
        raise ImportError(
            f'{purpose} needs {root}, which is not installed; run in the clone: pip install ".[export]".'
        ) from error


# What torch.export, AOTInductor and TorchScript write: pickles and formulas that PyTorch evaluates, machine code, and
# functions that may write files. PyTorch has no safe way to open any of the three.
PROGRAMS = (".pt2", ".torchscript")


def is_exported(path: str) -> bool:
    """Returns whether the name is that of an exported file."""
    return Path(path).suffix in OPENERS


def open_exported(path: str | Path, *, trust: bool = False) -> Runtime:
    """Opens an .onnx, .xml, .pt2, .torchscript or .ncnn.param file that segprune wrote. ValueError for any other.

    Files of `PROGRAMS` are refused without `trust`, since opening them runs what is in them.
    """
    path = require_file(path)
    if path.suffix in PROGRAMS and not trust:
        raise ValueError(
            f"{path} is a program, which could do anything once it is opened; give `trust` if you know who made it, "
            "or take an .onnx file, which runs nothing."
        )

    # The suffix chooses the runtime; the manifest inside tells whether we wrote it.
    try:
        return OPENERS[path.suffix](path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # every runtime fails in its own ways
        # Runtimes' messages run to pages; the first line says the most.
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise ValueError(
            f"{path} is no file that segprune export wrote ({reason}); export it again."
        ) from error


def _open_onnx(path: Path) -> Runtime:
    ort = require("onnxruntime", "Running an .onnx file")
    # One thread setting for all runtimes makes their times comparable.
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Files by others have no such key, and parsing "" refuses them.
    manifest = parse_manifest(session.get_modelmeta().custom_metadata_map.get(KEY, ""))
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return Runtime(f"ONNX Runtime {ort.__version__}", manifest, run)


def _open_openvino(path: Path) -> Runtime:
    ov = require("openvino", "Running an OpenVINO file")
    core = ov.Core()
    model = core.read_model(path)
    manifest = parse_manifest(
        model.get_rt_info([KEY]).value if model.has_rt_info([KEY]) else ""
    )
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(model, "CPU", settings)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])  # a copy already

    return Runtime(f"OpenVINO {ov.__version__.partition('-')[0]}", manifest, run)


def _open_pt2(path: Path) -> Runtime:
    # Both kinds end in .pt2, and each needs its own loader.
    if is_compiled(path):
        return _open_aotinductor(path)

    # torch fills in the value of every key that it finds in the archive.
    extra_files = {f"{KEY}.json": ""}
    module = torch.export.load(path, extra_files=extra_files).module()
    manifest = parse_manifest(extra_files[f"{KEY}.json"])
    return Runtime(f"torch.export {torch.__version__}", manifest, _run_without_grad(module))


def is_compiled(path: str | Path) -> bool:
    """Returns whether a .pt2 file is an AOTInductor package, which holds machine code, and not a graph."""
    if Path(path).suffix != ".pt2" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/aotinductor/" in name for name in archive.namelist())


def _open_aotinductor(path: Path) -> Runtime:
    # The manifest is read before the package is loaded, which runs its code.
    with zipfile.ZipFile(path) as archive:
        texts = [
            archive.read(name) for name in archive.namelist() if name.endswith("_metadata.json")
        ]
    manifest = parse_manifest(parse_json(texts[0]).get(KEY, "") if texts else "")

    from torch._inductor import aoti_load_package

    return Runtime(
        f"AOTInductor {torch.__version__}",
        manifest,
        _run_without_grad(aoti_load_package(str(path))),
    )


def _open_torchscript(path: Path) -> Runtime:
    extra_files = {f"{KEY}.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates TorchScript
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra_files)

    # torch.jit may give the text back as bytes.
    text = extra_files[f"{KEY}.json"]
    manifest = parse_manifest(text.decode() if isinstance(text, bytes) else text)
    return Runtime(f"TorchScript {torch.__version__}", manifest, _run_without_grad(module))


def _open_ncnn(path: Path) -> Runtime:
    ncnn = require("ncnn", "Running an ncnn file")
    stem = path.with_suffix("")  # name.ncnn of name.ncnn.param
    description = stem.with_suffix(".ncnn.json")
    manifest = parse_manifest(
        description.read_text(encoding="utf-8") if description.is_file() else ""
    )

    # ncnn computes in half by default wherever the processor can; say what is wanted.
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = (
        manifest.precision == "fp16"
    )
    # ncnn returns a status and raises nothing.
    if net.load_param(str(path)) or net.load_model(str(stem.with_suffix(".ncnn.bin"))):
        raise ValueError("ncnn cannot load it")

    def run(x: Tensor) -> Tensor:
        # An extractor keeps the results of its run, so every run needs a new one.
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(x[0].numpy()))  # 3 H W: ncnn knows no batch

        status, out = extractor.extract("out0")
        if status:
            raise ValueError("ncnn cannot run it")
        return torch.from_numpy(np.array(out))[None]

    return Runtime(f"ncnn {ncnn.__version__}", manifest, run)


def _run_without_grad(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
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
