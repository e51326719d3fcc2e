"""VOC folders in and out: reading, augmentation, the label check, and a generated data set.

Images are uint8 [H, W, 3] RGB, masks uint8 [H, W] holding class indices, 255 ignored; sizes are (H, W).
"""

from segprune.data.check import LabelReport, check_labels
from segprune.data.shapes import CLASS_NAMES, draw_shapes, write_shapes
from segprune.data.transforms import (
    IGNORE_INDEX,
    MEAN,
    STD,
    EvalTransform,
    TrainTransform,
    Transform,
    letterbox,
    normalise,
)
from segprune.data.voc import (
    Sample,
    VocDataset,
    find_root,
    load_image,
    load_mask,
    load_pair,
    read_split,
    voc_palette,
)

__all__ = [
    "CLASS_NAMES",
    "IGNORE_INDEX",
    "MEAN",
    "STD",
    "EvalTransform",
    "LabelReport",
    "Sample",
    "TrainTransform",
    "Transform",
    "VocDataset",
    "check_labels",
    "draw_shapes",
    "find_root",
    "letterbox",
    "load_image",
    "load_mask",
    "load_pair",
    "normalise",
    "read_split",
    "voc_palette",
    "write_shapes",
]
