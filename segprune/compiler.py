"""One network compiled for the shapes it is called with: torch.compile, and on a GPU the result replayed as a CUDA graph.

Compiled, small element-wise kernels become one; replayed, a GPU does not wait for Python. With `classes` the
upsampling of the logits and the choice among them become one kernel as well, so that logits of full size never lie in
memory. What cannot be compiled runs as it is, and `notes` says why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from segprune.fold import fold_for_inference
from segprune.model import SegFormer, check_input
from segprune.timing import GraphRecorder

MAX_SHAPES = 8  # that are kept ready; each holds its own program, and on a GPU its own memory

Function = Callable[[Tensor], Tensor]
Answer = Literal["logits", "classes", "quarter"]


class Compiled:
    """Takes normalised images B C H W of any type, gives logits B K H W or classes B H W (int64).

    The first call with a larger batch or another (H, W) compiles, which takes from seconds to minutes; smaller batches
    are filled up. At most `MAX_SHAPES` sizes are kept, the least recently used one goes. `notes` says what fell back.
    With `answer` "quarter" it gives logits B K H/4 W/4, before their last upsampling.
    """

    def __init__(self, model: SegFormer, dtype: torch.dtype, answer: Answer) -> None:
        self.notes: list[str] = []
        self.spec = model.spec  # whoever feeds images asks it how they are normalised
        self._dtype, self._kind = dtype, answer

        # Folded in the precision that the weights have, then cast: rounded once.
        self._network = fold_for_inference(model).to(dtype)
        self._device = next(self._network.parameters()).device
        self._programs: OrderedDict[tuple[int, int], tuple[int, Function]] = OrderedDict()
        self._recorder = GraphRecorder(self._device) if self._device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_input(tuple(images.shape), self.spec.in_channels)
        images = images.to(self._device, self._dtype)
        batch, size = len(images), (images.shape[2], images.shape[3])

        # A program for at least as many images is used as it is.
        known = self._programs.get(size)
        if known is None or known[0] < batch:
            known = batch, self._prepare(images)
            self._programs[size] = known
        self._programs.move_to_end(size)
        if len(self._programs) > MAX_SHAPES:
            self._programs.popitem(last=False)

        # Fill the batch up with black images, whose answers are cut off.
        length, program = known
        return program(F.pad(images, (0, 0, 0, 0, 0, 0, 0, length - batch)))[:batch]

    def _answer(self, images: Tensor) -> Tensor:
        if self._kind == "quarter":
            return self._network.parts(images)[1]
        logits = self._network(images)
        return logits.argmax(1) if self._kind == "classes" else logits

    def _prepare(self, images: Tensor) -> Function:
        """Returns the program for images of this very shape, after its first call."""
        program = compile_for_one_shape(self._answer)
        try:
            program(images)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # compilers fail in many ways of their own
            self.notes.append(
                f"Not compiled for {tuple(images.shape)}, runs eagerly: {_reason_of(error)}"
            )
            program = self._answer
        return program if self._recorder is None else self._record(program, images)

    def _record(self, program: Function, images: Tensor) -> Function:
        """Returns the program as a CUDA graph. It reads one tensor and overwrites another, so both are copied."""
        assert self._recorder is not None
        inputs, answers = images.clone(), {}

        def run() -> None:
            answers["last"] = program(inputs)

        try:
            replay = self._recorder.record(run)
        except RuntimeError as error:  # something in it waits for the CPU
            self.notes.append(f"Not recorded as a CUDA graph: {_reason_of(error)}")
            return program

        def play(images: Tensor) -> Tensor:
            inputs.copy_(images)
            replay()
            return answers["last"].clone()

        return play


def _reason_of(error: Exception) -> str:
    # Dynamo begins with a line "backend='inductor' raised:", and ends with advice to its developers.
    lines = [line for line in str(error).splitlines() if line and not line.endswith("raised:")]
    return lines[0] if lines else type(error).__name__


def compiled(
    model: SegFormer,
    input_shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    classes: bool = False,
    batch: int = 1,
) -> Compiled:
    """Returns the network as a fast callable on its device; `model` is left as it is.

    With `input_shape` (H, W) it is compiled for so many images of that size at once rather than in its first call.
    `classes`: the likeliest class of every pixel in place of logits.

    >>> from segprune.spec import standard_spec
    >>> compiled(SegFormer(standard_spec("b0", 8)), classes=True).notes
    []
    """
    program = Compiled(model, dtype, "classes" if classes else "logits")
    if input_shape is not None:
        program(torch.zeros(batch, model.spec.in_channels, *input_shape))
    return program


class CompiledParts:
    """A compiled network as scoring and prediction take it: they upsample its logits themselves, where they read them."""

    upsamples_last = True

    def __init__(self, model: SegFormer, dtype: torch.dtype = torch.float32) -> None:
        self.spec, self._program = model.spec, Compiled(model, dtype, "quarter")
        self.resize, self.resize_rows = model.resize, model.resize_rows
        self.can_resize_rows = model.can_resize_rows

    @property
    def notes(self) -> list[str]:
        return self._program.notes

    def parts(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns no maps, and the logits B K H/4 W/4."""
        return [], self._program(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.resize(self._program(x).float(), x.shape[2:])


def compile_for_one_shape(function: Function) -> Function:
    """Returns the function compiled for the first shape that it is called with.

    PyTorch keeps compiled code by code object, a few for each: every caller gets one of its own.
    """

    def call(x: Tensor) -> Tensor:
        return function(x)

    # A copy of the code object, so that the limit per object is not reached.
    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    compiled_call: Function = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled_call
