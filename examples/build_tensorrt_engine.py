"""A TensorRT engine from an .onnx file of `segprune export`: `python build_tensorrt_engine.py model.onnx`.

Needs `tensorrt` 10 or 11, `onnx`, and an NVIDIA GPU; neither segprune nor, but for comparing, PyTorch. What the file
takes and gives is read off the file: one of a fixed size needs no more, for one of any size the engine gets a range.
The network is strongly typed, so half precision is used where the file has it, and float32 elsewhere (as TF32, unless
told not to). With onnxruntime and a PyTorch that sees the GPU, the engine is run and compared with the file, and not
kept if they are far apart.

The names of TensorRT's API were checked against its documentation of 10.0 to 11.4. It was never run with TensorRT,
which the machine that this was written on cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KEY = "segprune"  # the file's metadata under this name say what it takes and gives
MIN_SIDE = 64  # of a file of any size
SMALLEST, USUAL, LARGEST = (1, MIN_SIDE, MIN_SIDE), (1, 512, 512), (8, 2048, 2048)  # B H W of its engine
FAR, AGREEMENT = 2e-2, 0.98  # logits that differ by more of the largest one, and pixels of equal class: not kept

Size = tuple[int, int, int]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Model:
    """What an .onnx file takes and gives; `shape` is its only B H W, None if it takes any."""

    path: Path
    precision: str
    shape: Size | None
    preprocess: bool
    argmax: bool

    @property
    def source(self) -> str:
        return "pixels" if self.preprocess else "images"

    @property
    def result(self) -> str:
        return "classes" if self.argmax else "logits"

    def full(self, size: Size) -> tuple[int, ...]:
        """B H W as the shape of the input: with channels last if it is pixels."""
        batch, height, width = size
        return (batch, height, width, 3) if self.preprocess else (batch, 3, height, width)


def require(package: str, purpose: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}, which cannot be imported here; pip install {package}."
        ) from error


def read(path: Path) -> Model:
    """FileNotFoundError and ValueError say in one sentence what is wrong with the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an .onnx file that segprune export wrote.")
    onnx = require("onnx", "Reading the file")
    try:
        kept = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        said = json.loads(kept[KEY])
    except Exception as error:  # damaged files fail in several ways
        raise ValueError(f"{path} is no .onnx file that segprune export wrote; export it again.") from error
    if said["precision"] == "int8":
        raise ValueError(f"{path} has int8's scales of ONNX Runtime, which TensorRT does not take; export it as fp16.")
    shape = said["shape"] and (said["shape"][0], said["shape"][1], said["shape"][2])
    return Model(path, said["precision"], shape, said["preprocess"], said["argmax"])


def ranges(model: Model, asked: tuple[Size | None, Size | None, Size | None]) -> tuple[Size, Size, Size]:
    """Smallest, usual and largest B H W that the engine is built for; ValueError for what the file does not take."""
    if model.shape is not None:
        if any(asked):
            size = "×".join(map(str, model.shape))
            raise ValueError(f"{model.path} takes {size} alone; leave out --smallest, --usual and --largest.")
        return model.shape, model.shape, model.shape
    usual = asked[1] or USUAL
    smallest = asked[0] or _each(min, SMALLEST, usual)
    largest = asked[2] or _each(max, LARGEST, usual)
    if min(smallest[1:]) < MIN_SIDE or smallest[0] < 1:
        raise ValueError(f"--smallest is {_text(smallest)}; a batch of 1 and sides of {MIN_SIDE} are the least.")
    if not all(a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True)):
        raise ValueError(
            f"The sizes {_text(smallest)}, {_text(usual)} and {_text(largest)} do not grow; give batch, height and "
            "width from --smallest over --usual to --largest."
        )
    return smallest, usual, largest


def _each(choose: Any, a: Size, b: Size) -> Size:
    return choose(a[0], b[0]), choose(a[1], b[1]), choose(a[2], b[2])


def _text(size: Size) -> str:
    return " ".join(map(str, size))


def build(trt: Any, model: Model, sizes: tuple[Size, Size, Size], timings: Path | None, tf32: bool = True) -> bytes:
    """The serialized engine. What was timed is kept in `timings`, so that the next build is faster."""
    logger = trt.Logger(trt.Logger.WARNING)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise ValueError(
            "TensorRT found no GPU that it can use; build on the machine that the engine is for."
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model.path)):
        reason = parser.get_error(0).desc() if parser.num_errors else "it says nothing more"
        raise ValueError(f"TensorRT cannot read {model.path} ({reason}); try a newer TensorRT, or leave out --bake.")
    config = builder.create_builder_config()
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if model.shape is None:
        profile = builder.create_optimization_profile()
        profile.set_shape(model.source, *map(model.full, sizes))
        config.add_optimization_profile(profile)
    if timings is not None:
        _take_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError("TensorRT built no engine, its messages above say why; give smaller sizes or free the GPU.")
    if timings is not None:
        write(bytes(config.get_timing_cache().serialize()), timings)
    return bytes(plan)


def _take_timings(config: Any, timings: Path) -> None:
    """Those of another GPU or TensorRT are not taken, and written over."""
    old = timings.read_bytes() if timings.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(old), False):
        print(f"{timings} is of another GPU or TensorRT and was begun anew.")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def write(data: bytes, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def difference(model: Model, theirs: Array, ours: Array) -> tuple[float, float]:
    """Largest difference of logits over the largest logit, 0 where there are only classes; share of equal classes."""
    if model.argmax:
        return 0.0, float((theirs == ours).mean())
    off = np.abs(theirs - ours).max() / max(float(np.abs(theirs).max()), 1e-30)
    return float(off) if np.isfinite(off) else float("inf"), float((theirs.argmax(1) == ours.argmax(1)).mean())


def verdict(model: Model, off: float, equal: float) -> str:
    """How far engine and file are apart, in words; ValueError if it is too far."""
    logits = "" if model.argmax else f"logits differ by {off:.1e} of the largest, "
    text = f"{logits}equal class on {100 * equal:.3f} % of pixels"
    if off <= FAR and equal >= AGREEMENT:
        return text
    raise ValueError(
        f"The engine is too far from the file ({text}) and was not kept; give --no_tf32, or export the file as fp32."
    )


def example(model: Model, size: Size) -> Array:
    """Soft coloured noise, as the file takes it."""
    coarse = np.random.default_rng(0).integers(0, 256, (size[0], -(-size[1] // 16), -(-size[2] // 16), 3))
    pixels = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, : size[1], : size[2]].astype(np.uint8)
    if model.preprocess:
        return pixels
    return ((pixels.astype(np.float32) - 118) / 58).transpose(0, 3, 1, 2).copy()  # B 3 H W, as bright as photographs


def run_file(ort: Any, model: Model, x: Array) -> Array:
    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    out: Array = session.run([model.result], {model.source: x})[0]
    return out


def run_engine(trt: Any, torch: Any, model: Model, plan: bytes, x: Array) -> Array:
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ValueError("TensorRT does not take back the engine that it built; its messages above say why.")
    context = engine.create_execution_context()
    given = torch.from_numpy(x).cuda()
    context.set_input_shape(model.source, tuple(x.shape))
    kind = torch.uint8 if model.argmax else torch.float32
    out = torch.empty(tuple(context.get_tensor_shape(model.result)), dtype=kind, device="cuda")
    context.set_tensor_address(model.source, given.data_ptr())
    context.set_tensor_address(model.result, out.data_ptr())
    torch.cuda.synchronize()  # the input is there
    stream = torch.cuda.Stream()
    context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    found: Array = out.cpu().numpy()
    return found


def compared(trt: Any, model: Model, plan: bytes, size: Size) -> str:
    """What came of running both, as a sentence; ValueError if they are far apart."""
    try:
        ort, torch = import_module("onnxruntime"), import_module("torch")
    except ImportError as error:
        return f"Not compared with the file: {error.name} is not installed."
    if not torch.cuda.is_available():
        return "Not compared with the file: PyTorch sees no GPU."
    x = example(model, size)
    apart = difference(model, run_file(ort, model, x), run_engine(trt, torch, model, plan, x))
    return f"Compared with the file in ONNX Runtime: {verdict(model, *apart)}."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build a TensorRT engine from an .onnx file of segprune export.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, help="the engine; else beside the file, ending in .engine")
    sizes: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("B", "H", "W")}
    parser.add_argument("--smallest", **sizes, help=f"of a file of any size; {_text(SMALLEST)}")
    parser.add_argument("--usual", **sizes, help=f"what it is made fastest for; {_text(USUAL)}")
    parser.add_argument("--largest", **sizes, help=f"more needs more memory; {_text(LARGEST)}")
    parser.add_argument("--timings", type=Path, help="a file that keeps timings from one build to the next")
    parser.add_argument("--no_tf32", action="store_true", help="float32 in full precision, slower")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    output = given.output or given.model.with_suffix(".engine")
    try:
        model = read(given.model)
        asked = (given.smallest, given.usual, given.largest)
        sizes = ranges(model, tuple(size and tuple(size) for size in asked))  # type: ignore[arg-type]
        if not output.parent.is_dir():
            raise FileNotFoundError(f"{output.parent} is no folder; give a path in one as --output.")
        trt = require("tensorrt", "Building an engine")
        plan = build(trt, model, sizes, given.timings, not given.no_tf32)
        print(compared(trt, model, plan, sizes[1]))
        write(plan, output)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"Error: {error}")
    print(f"Saved: {output}, {len(plan) / 1e6:.1f} MB, for this kind of GPU and TensorRT {trt.__version__}.")


if __name__ == "__main__":
    main()
