"""What an exported file takes and gives, as plain data that is kept in the file itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from segprune.files import parse_json
from segprune.spec import VARIANTS, Spec, spec_from_dict

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Smallest side of a file for any size: below it a stage's map is one pixel high, and traced as if that never changed.
MIN_DYNAMIC = 64
MAX_SIDE = 1 << 15  # of a batch and of images, far beyond any memory
LISTS = ("class_names", "palette", "float32")
KEY = "segprune"  # under which a file keeps its manifest


@dataclass(frozen=True)
class Manifest:
    """`shape` is the only batch, height and width that the file takes; None: any, with sides from `MIN_DYNAMIC` up.

    With `preprocess` the file takes uint8 B H W C, RGB or whatever `in_channels` of `spec` counts, else normalised
    float32 B C H W. With `argmax` it returns classes uint8 B H W, else logits float32 B K H W. `spec` describes the
    network as it runs, for its MACs. `palette` is 768 numbers, the colours in which masks are drawn; empty: Pascal
    VOC's. With `argmax_quarter` classes were chosen at a quarter of the size, and `argmax` is set, too. `float32` names
    the modules of the network that fp16 or int8 left in float32.
    """

    variant: str
    num_classes: int
    format: str
    precision: Precision
    shape: tuple[int, int, int] | None
    preprocess: bool
    argmax: bool
    class_names: tuple[str, ...] = ()
    spec: Spec | None = None
    palette: tuple[int, ...] = ()
    argmax_quarter: bool = False
    float32: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))


def parse_manifest(text: str) -> Manifest:
    """Returns the manifest of which this is the `text`. Raises ValueError for anything else."""
    try:
        data = parse_json(text)
        # JSON has lists only; tuples make the result equal to what was written.
        shape = None if data["shape"] is None else tuple(data["shape"])
        spec = None if data["spec"] is None else spec_from_dict(data["spec"])
        # A manifest may leave these out.
        lists = {name: tuple(data.get(name, ())) for name in LISTS}
        manifest = Manifest(**data | lists | {"shape": shape, "spec": spec})
        _check(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "it holds no description by segprune of what it takes and returns"
        ) from error


def _check(manifest: Manifest) -> None:
    """Raises ValueError for a value of another type or beyond what a file can be."""
    names, palette = manifest.class_names, manifest.palette
    shape = manifest.shape or (1, MIN_DYNAMIC, MIN_DYNAMIC)
    if (
        manifest.variant not in VARIANTS
        or type(manifest.num_classes) is not int
        or not 1 <= manifest.num_classes <= 2**16
        or not isinstance(manifest.format, str)
        or manifest.precision not in PRECISIONS
        or len(shape) != 3
        or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in shape)
        or type(manifest.preprocess) is not bool
        or type(manifest.argmax) is not bool
        or type(manifest.argmax_quarter) is not bool
        or len(names) > manifest.num_classes  # classes may be left without a name
        or not all(isinstance(name, str) for name in (*names, *manifest.float32))
        or len(palette) not in (0, 768)
        or not all(type(number) is int and 0 <= number <= 255 for number in palette)
    ):
        raise ValueError("a value is of another type or out of its range")
