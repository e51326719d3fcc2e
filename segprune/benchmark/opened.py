"""One case open and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from segprune import checkpoint
from segprune.benchmark.cases import LIVE, Case
from segprune.compiler import compile_for_one_shape
from segprune.export import open_exported
from segprune.fold import fold_for_inference
from segprune.spec import RGB, Preprocessing, Spec, preprocessing_of_drawn
from segprune.stats import count
from segprune.timing import DTYPE_OF, set_tf32

WARM_UP = 2  # passes: in the first one runtimes compile and allocate


@dataclass(frozen=True)
class Opened:
    """`predict` takes normalised images B 3 H W and gives logits B K H W; `run` is one pass on noise.

    `macs` are of one image, None where an exported file does not tell.
    """

    case: Case
    name: str  # of the runtime, with its version
    num_classes: int
    preprocessing: Preprocessing
    macs: int | None
    predict: Callable[[Tensor], Tensor]
    run: Callable[[], Tensor]

    def get_ready(self) -> None:
        """Sets PyTorch's threads and the GPU's products for this case."""
        _set_globals(self.case)


def open_case(case: Case) -> Opened:
    """Returns the case after `WARM_UP` passes. PyTorch is left with its threads; exported files keep theirs.

    Raises ValueError where the runtime cannot run it.
    """
    # Runtimes take the number of threads when the file is opened.
    _set_globals(case)
    opened = _open_live(case) if case.runtime in LIVE else _open_exported(case)

    # Warm up here, so that a runtime that cannot run is refused before the rounds.
    try:
        for _ in range(WARM_UP):
            opened.run()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every runtime fails in its own ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{case.text} did not run ({reason}); leave it out.") from error
    return opened


def _set_globals(case: Case) -> None:
    torch.set_num_threads(case.threads)
    set_tf32(case.dtype == "tf32", case.dtype == "tf32")


def _open_live(case: Case) -> Opened:
    model, dtype = checkpoint.load(case.file), DTYPE_OF[case.dtype]
    # Fold in float32 and cast afterwards, so that rounding happens once.
    if case.fold:
        model = fold_for_inference(model)
    model = model.to(case.device, dtype)
    # Compiling begins at the first call, which is part of the warm-up.
    network: Callable[[Tensor], Tensor] = model
    if case.output == "classes":
        # Compilers join upsampling and argmax by themselves.
        eager = case.runtime == "torch"
        network = model.classes if eager else lambda x: model(x).argmax(1)
    if case.runtime == "compile":
        network = compile_for_one_shape(network)
    x = _noise(case, model.spec).to(case.device, dtype)

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        out = network(images.to(dtype))
        if case.output == "logits":
            return out.float()
        return one_hot(out, model.spec.num_classes).permute(0, 3, 1, 2).float()

    @torch.no_grad()
    def run() -> Tensor:
        return network(x)

    name = f"PyTorch {torch.__version__}" + (", compiled" if case.runtime == "compile" else "")
    # Those of the network as it runs, folded or not.
    macs = count(model.spec, case.size).macs
    spec = model.spec
    own = preprocessing_of_drawn(spec)
    return Opened(case, name, spec.num_classes, own, macs, predict, run)


def _open_exported(case: Case) -> Opened:
    # `grid` has refused what is not trusted; others were exported a moment ago.
    runtime = open_exported(case.file, trust=True)
    manifest, x = runtime.manifest, _noise(case, runtime.manifest.spec)
    # Noise with about the spread of pixels, as the file takes uint8.
    if manifest.preprocess:
        x = (
            (x.permute(0, 2, 3, 1) * 64 + 128).clamp(0, 255).to(torch.uint8)
        )  # B 3 H W -> B H W 3
    x = x.contiguous()

    macs = None if manifest.spec is None else count(manifest.spec, case.size).macs
    return Opened(
        case,
        runtime.name,
        manifest.num_classes,
        Preprocessing() if manifest.spec is None else preprocessing_of_drawn(manifest.spec),
        macs,
        runtime,
        lambda: runtime.run(x),
    )


def _noise(case: Case, spec: Spec | None) -> Tensor:
    # Seeded, so that all cases of one size run on the same numbers.
    generator = torch.Generator().manual_seed(0)
    channels = RGB if spec is None else spec.in_channels
    return torch.randn(case.batch, channels, *case.size, generator=generator)
