"""Data sets in, whatever their layout: reading, augmentation, the label check, and a generated data set.

Images are uint8 [H, W, 3] RGB, masks uint8 [H, W] holding class indices, 255 ignored; sizes are (H, W).
"""

from segprune.data.check import LabelReport, check_labels
from segprune.data.layouts import LAYOUTS, open_source
from segprune.data.pixels import Location, SampleError, load_image, load_mask, voc_palette
from segprune.data.samples import (
    MissingSplitError,
    Pair,
    Sample,
    SegmentationData,
    Source,
    readable,
    shift_labels,
)
from segprune.data.shapes import CLASS_NAMES, CONTEXT_CLASS_NAMES, draw_shapes, write_shapes
from segprune.data.splits import DataChoices, score_on, score_whole_pool, set_val_aside
from segprune.data.transforms import (
    IGNORE_INDEX,
    IMAGENET,
    MEAN,
    STD,
    EvalTransform,
    TrainTransform,
    Transform,
    letterbox,
    normalise,
)

__all__ = [
    "CLASS_NAMES",
    "CONTEXT_CLASS_NAMES",
    "IGNORE_INDEX",
    "IMAGENET",
    "LAYOUTS",
    "MEAN",
    "STD",
    "DataChoices",
    "EvalTransform",
    "LabelReport",
    "Location",
    "MissingSplitError",
    "Pair",
    "Sample",
    "SampleError",
    "SegmentationData",
    "Source",
    "TrainTransform",
    "Transform",
    "check_labels",
    "draw_shapes",
    "letterbox",
    "load_image",
    "load_mask",
    "normalise",
    "open_source",
    "readable",
    "score_on",
    "score_whole_pool",
    "set_val_aside",
    "shift_labels",
    "voc_palette",
    "write_shapes",
]
