"""A generated data set in VOC layout: seven kinds of objects, to learn from scratch within minutes.

Every class has its shape, its texture and its hue. Hues overlap between neighbours, two classes share each texture,
shapes are turned, stretched and occluded, and now and then one of shape or texture is another class's: a network
needs two cues to tell a class. Clutter, light, blur and noise are drawn on top. Lengths are shares of the image's
shorter side unless named `_PX`; the constants below set the difficulty.

With `context`, every object but the ring is of another class if a ring is anywhere in the image: what a pixel
shows no longer tells its class, and a network needs its deep stages.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from segprune.data.pixels import voc_palette
from segprune.data.transforms import Bytes, Floats

Bools = npt.NDArray[np.bool_]
Window = tuple[slice, slice]

NUM_OBJECTS = (2, 5)  # fewest and most in an image
RADIUS = (0.11, 0.2)  # of the disc with the object's area
STRETCH = 1.25  # most of one axis; the other shrinks by as much, which keeps the area
HUE_SIGMA = 0.035  # of a class's hue, on a circle of length 1 where neighbours are 1/7 apart
ODD_SHAPE, ODD_TEXTURE = (
    0.06,
    0.12,
)  # share of objects with any class's shape, or any texture; never both
PERIOD = (0.055, 0.085)  # of textures
TEXTURE_CONTRAST = (0.35, 0.65)  # share of brightness that a texture's dark places lose
OBJECT_SATURATION, OBJECT_VALUE = (0.45, 0.95), (0.55, 1.0)
CLUTTER_SATURATION, CLUTTER_VALUE = (0.05, 0.5), (0.25, 0.85)
MAX_BLOBS, BLOB_RADIUS = 3, (0.06, 0.16)  # unlabelled distractors
MAX_BARS, BAR_WIDTH = 2, (0.012, 0.03)  # unlabelled occluders right across the image
GAIN, LIGHT_GRADIENT = (0.75, 1.2), 0.35
BLUR_SIGMA_PX = (0.0, 0.9)
NOISE_SIGMA = (2.0, 12.0)  # on 0..255
JPEG_QUALITY = 90

SPLITS = ("train", "val")
TEXTURES = ("stripes", "checks", "dots", "noise", "gradient", "plain")


@dataclass(frozen=True)
class _Look:
    name: str
    texture: str
    hue: float


# neighbours in hue differ in texture, the two classes of one texture lie far apart in hue
_LOOKS = (
    _Look("disc", "stripes", 0 / 7),
    _Look("square", "checks", 1 / 7),
    _Look("triangle", "dots", 2 / 7),
    _Look("ring", "stripes", 3 / 7),
    _Look("star", "checks", 4 / 7),
    _Look("cross", "dots", 5 / 7),
    _Look("bar", "noise", 6 / 7),
)
CLASS_NAMES = ("background", *(look.name for look in _LOOKS))
_KEY = CLASS_NAMES.index("ring") - 1
_OTHERS = [k for k in range(len(_LOOKS)) if k != _KEY]
CONTEXT_CLASS_NAMES = (
    *CLASS_NAMES,
    *(f"{_LOOKS[k].name} in an image with a ring" for k in _OTHERS),
)


def write_shapes(
    folder: str | Path,
    num_train: int = 800,
    num_val: int = 200,
    size: tuple[int, int] = (128, 128),
    seed: int = 11,
    progress: Callable[[int, int], None] | None = None,
    *,
    context: bool = False,
) -> Path:
    """Writes `folder/VOCdevkit/VOC2007` and returns its path; `size` is (H, W), at least 32 each.

    Replaces a set that was written here before. The lists are written last, so that no reader takes the set of an
    interrupted run for whole. `progress` is called with (images done, images in all). Raises ValueError for a folder
    that holds anything else, and for numbers out of range.
    """
    if min(num_train, num_val) < 1 or min(size) < 32 or seed < 0:
        raise ValueError(
            f"`num_train` {num_train}, `num_val` {num_val}, `size` {size} and `seed` {seed} came, where at least 1, "
            "1, (32, 32) and 0 are allowed; give larger ones."
        )

    # Removing the old lists first makes the set unreadable until it is whole again.
    root = _prepare_folder(Path(folder), CONTEXT_CLASS_NAMES if context else CLASS_NAMES)
    palette = voc_palette()
    numbers = {"train": num_train, "val": num_val}

    done = 0
    for split, number in numbers.items():
        for index in range(number):
            image, mask = draw_shapes(seed, split, index, size, context=context)
            name = _name_sample(split, index)
            Image.fromarray(image).save(
                root / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY
            )

            # With a palette the mask still holds class numbers, but viewers show colours.
            indexed = Image.fromarray(mask)
            indexed.putpalette(palette)
            indexed.save(root / "SegmentationClass" / f"{name}.png")

            done += 1
            if progress is not None:
                progress(done, num_train + num_val)

    # Under another name until it is whole.
    for split, number in numbers.items():
        names = [_name_sample(split, index) for index in range(number)]
        unfinished = root / "ImageSets" / "Segmentation" / f"{split}.part"
        unfinished.write_bytes(_join_lines(names))
        unfinished.replace(unfinished.with_suffix(".txt"))

    return root


def draw_shapes(
    seed: int, split: str, index: int, size: tuple[int, int], *, context: bool = False
) -> tuple[Bytes, Bytes]:
    """Returns image [H, W, 3] and mask [H, W] of one sample; any seven images in a row show every class."""
    # The generator depends on the sample alone, so images can be drawn in any order.
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = _draw_background(rng, size)
    mask = np.zeros(size, dtype=np.uint8)

    # From back to front: distractors, objects, occluders.
    for _ in range(rng.integers(0, MAX_BLOBS + 1)):
        _paint_blob(rng, canvas)

    # The class whose turn it is changes with the index: any seven images show all.
    centres: list[tuple[float, float]] = []
    for k, label in _choose_objects(rng, index % len(_LOOKS), context):
        centres.append(_choose_centre(rng, centres, size))
        _paint_object(rng, canvas, mask, k, label, centres[-1])

    for _ in range(rng.integers(0, MAX_BARS + 1)):
        _paint_bar(rng, canvas, mask)

    return _photograph(rng, canvas), mask


def _choose_objects(
    rng: np.random.Generator, turn: int, context: bool
) -> list[tuple[int, int]]:
    """Returns the looks and classes of an image's objects.

    The one whose turn it is comes last, so that nothing but a bar covers it.
    """
    # No look occurs twice in an image.
    others = [int(k) for k in rng.permutation(len(_LOOKS)) if k != turn]
    others = others[: int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)) - 1]
    if not context:
        return [(k, k + 1) for k in (*others, turn)]

    # Half of the images have the ring, which changes the classes of all others.
    with_key = turn == _KEY or rng.random() < 0.5
    others = [k for k in others if k != _KEY]
    if with_key and turn != _KEY:
        others.append(_KEY)

    # Changed classes are numbered behind all the plain ones.
    objects = []
    for k in (*others, turn):
        changed = with_key and k != _KEY
        objects.append((k, len(CLASS_NAMES) + _OTHERS.index(k) if changed else k + 1))

    return objects


def _join_lines(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _name_sample(split: str, index: int) -> str:
    return f"{split}_{index:05d}"


def _prepare_folder(folder: Path, class_names: tuple[str, ...]) -> Path:
    """Makes the set's folders, with classes.txt first as the sign that they are ours, and without lists."""
    root = folder / "VOCdevkit" / "VOC2007"
    sign = root / "classes.txt"

    # Never write into anybody else's folder.
    known = [_join_lines(names) for names in (CLASS_NAMES, CONTEXT_CLASS_NAMES)]
    ours = sign.is_file() and sign.read_bytes() in known
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is no generated data set, where a new or empty folder is allowed; "
            "choose another name."
        )

    # Lists are removed first and written last: a set without them is not whole.
    root.mkdir(parents=True, exist_ok=True)
    sign.write_bytes(_join_lines(class_names))
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").unlink(missing_ok=True)

    return root


# shapes: where an object lies, in coordinates turned and scaled so that its area is that of the unit disc


def _lies_in_star(u: Floats, v: Floats, points: int, outer: float, inner: float) -> Bools:
    """Returns which points (u, v) lie in a star; a regular polygon if `inner` is `outer` * cos(pi / points)."""
    # By symmetry half of one point is enough: fold the angle into it.
    half = np.pi / points
    angle = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)

    # Inside is what lies left of the edge from the outer to the inner corner.
    inner_x, inner_y = inner * np.cos(half), inner * np.sin(half)
    inside: Bools = (x - outer) * inner_y - y * (inner_x - outer) < 0
    return inside


def inside_shape(name: str, u: Floats, v: Floats) -> Bools:
    """Returns which of the points (u, v) lie in the shape; all shapes have area pi and reach at most 1.6."""
    # The numbers give each shape the area pi: size must not tell the class.
    match name:
        case "disc":
            return u * u + v * v < 1
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) < 0.886
        case "triangle":
            return _lies_in_star(u, v, 3, 1.555, 1.555 / 2)
        case "ring":
            return np.abs(np.hypot(u, v) - 1) < 0.25
        case "star":
            return _lies_in_star(u, v, 5, 1.492, 0.48 * 1.492)
        case "cross":
            a, b = np.abs(u), np.abs(v)
            return (np.minimum(a, b) < 0.4 * 1.108) & (np.maximum(a, b) < 1.108)
        case _:
            return (np.abs(u) < 1.25) & (np.abs(v) < 0.628)


def _draw_texture(name: str, u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Returns 0 (bright) to 1 (dark) at points given in periods."""
    # Each texture begins at a random point of its period.
    u, v = u + np.float32(rng.random()), v + np.float32(rng.random())

    match name:
        case "stripes":
            dark = u % 1 < 0.5
        case "checks":
            dark = (u % 1 < 0.5) ^ (v % 1 < 0.5)
        case "dots":
            dark = np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32
        case "noise":
            # A repeated tile of 16 x 16 cells is about as wide as the largest objects.
            cells = rng.random((16, 16), dtype=np.float32)
            return cells[(2 * v).astype(np.int64) % 16, (2 * u).astype(np.int64) % 16]
        case "gradient":
            return (0.5 + 0.5 * np.sin(u)).astype(np.float32)
        case _:
            return np.zeros_like(u)

    return dark.astype(np.float32)


# painting: the canvas is float32 [H, W, 3] in 0..255


def _draw_number(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(*bounds))


def _draw_colour(
    rng: np.random.Generator,
    hue: float,
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> Floats:
    rgb = colorsys.hsv_to_rgb(hue % 1, _draw_number(rng, saturation), _draw_number(rng, value))
    return np.array(rgb, dtype=np.float32) * 255


def _draw_clutter_colour(rng: np.random.Generator) -> Floats:
    """Returns a colour of any hue, paler and darker than those of objects."""
    return _draw_colour(rng, rng.random(), CLUTTER_SATURATION, CLUTTER_VALUE)


def _cut_window(
    size: tuple[int, int], centre: tuple[float, float], reach: float, angle: float
) -> tuple[Window, Floats, Floats]:
    """Returns the part of the image within `reach` of the centre (y, x), and its pixels' turned offsets from it."""
    # Computing only near the object makes its cost depend on its own size.
    rows, columns = (
        range(max(0, int(c - reach)), min(n, int(c + reach) + 2))
        for c, n in zip(centre, size, strict=True)
    )
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(centre[0])
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(
        centre[1]
    )

    # Turn the offsets instead of the shape, which then is tested upright.
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    window = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
    return window, x * cos + y * sin, y * cos - x * sin


def _draw_background(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Draws two hues in drifting patches, under a texture of any direction and period."""
    # A few random cells, enlarged smoothly, say how much of either hue there is.
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    patches = np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))[..., None]
    one = _draw_clutter_colour(rng)
    other = _draw_clutter_colour(rng)

    middle, angle = (size[0] / 2, size[1] / 2), _draw_number(rng, (0, np.pi))
    _, u, v = _cut_window(size, middle, max(size), angle)
    period = np.float32(min(size) * _draw_number(rng, PERIOD) * _draw_number(rng, (1, 3)))
    dark = _draw_texture(str(rng.choice(TEXTURES)), u / period, v / period, rng)

    # Textures of the background are weaker than those of objects.
    gain = 1 - np.float32(_draw_number(rng, TEXTURE_CONTRAST) * 0.7) * dark
    return (one * patches + other * (1 - patches)) * gain[..., None]


def _paint_blob(rng: np.random.Generator, canvas: Floats) -> None:
    """Paints a distractor without texture or label: a wavy patch of any hue."""
    size = canvas.shape[:2]
    radius = min(size) * _draw_number(rng, BLOB_RADIUS)
    centre = (rng.random() * size[0], rng.random() * size[1])
    window, u, v = _cut_window(size, centre, 1.5 * radius, _draw_number(rng, (0, 2 * np.pi)))

    # Two waves around a circle give a smooth outline that is none of the shapes.
    angle = np.arctan2(v, u)
    wave = 1 + 0.25 * np.cos(2 * angle) + 0.2 * np.cos(3 * angle + np.float32(rng.random() * 6))
    inside = np.hypot(u, v) < radius * wave
    canvas[window][inside] = _draw_clutter_colour(rng)


def _choose_centre(
    rng: np.random.Generator, centres: list[tuple[float, float]], size: tuple[int, int]
) -> tuple[float, float]:
    """Returns of four random places (y, x) the one farthest from the objects so far, so that few are hidden whole."""
    best, largest = (0.0, 0.0), -1.0
    for _ in range(4):
        y, x = (_draw_number(rng, (0.15, 0.85)) * side for side in size)
        # The first object has no neighbours, so any place is as good.
        nearest = min(
            (np.hypot(y - other_y, x - other_x) for other_y, other_x in centres), default=0.0
        )
        if nearest > largest:
            best, largest = (y, x), nearest

    return best


def _paint_object(
    rng: np.random.Generator,
    canvas: Floats,
    mask: Bytes,
    k: int,
    label: int,
    centre: tuple[float, float],
) -> None:
    """Paints one object that looks like number k, over what was there."""
    look = _LOOKS[k]

    # Now and then the shape or the texture is any class's.
    odd = rng.random()
    any_look, any_texture = (
        _LOOKS[rng.integers(len(_LOOKS))],
        TEXTURES[rng.integers(len(TEXTURES))],
    )
    shape = any_look.name if odd < ODD_SHAPE else look.name
    texture = any_texture if ODD_SHAPE <= odd < ODD_SHAPE + ODD_TEXTURE else look.texture

    side = min(mask.shape)
    radius = side * _draw_number(rng, RADIUS)
    period = np.float32(side * _draw_number(rng, PERIOD))
    stretch = np.float32(STRETCH ** _draw_number(rng, (-0.5, 0.5)))
    # Stretching moves corners outwards, so the window must reach farther than the radius.
    reach = 1.6 * STRETCH**0.5 * radius
    window, u, v = _cut_window(mask.shape, centre, reach, _draw_number(rng, (0, 2 * np.pi)))
    inside = inside_shape(
        shape, u / np.float32(radius) / stretch, v / np.float32(radius) * stretch
    )

    dark = _draw_texture(texture, u / period, v / period, rng)
    # The hue scatters around that of the class, and overlaps with its neighbours'.
    hue = look.hue + HUE_SIGMA * rng.standard_normal()
    colour = _draw_colour(rng, hue, OBJECT_SATURATION, OBJECT_VALUE)
    gain = 1 - np.float32(_draw_number(rng, TEXTURE_CONTRAST)) * dark

    # Image and mask are painted with the same pixels, so labels are exact at edges.
    canvas[window][inside] = (gain[..., None] * colour)[inside]
    mask[window][inside] = label


def _paint_bar(rng: np.random.Generator, canvas: Floats, mask: Bytes) -> None:
    """Paints a thin occluder right across the image, labelled background."""
    centre = (rng.random() * mask.shape[0], rng.random() * mask.shape[1])
    _, _, v = _cut_window(
        mask.shape, centre, 2 * max(mask.shape), _draw_number(rng, (0, np.pi))
    )

    inside = np.abs(v) < min(mask.shape) * _draw_number(rng, BAR_WIDTH)
    canvas[inside] = _draw_clutter_colour(rng)
    # What a bar covers cannot be recognised, so it is background.
    mask[inside] = 0


def _photograph(rng: np.random.Generator, canvas: Floats) -> Bytes:
    """Returns the canvas in light that falls from one side, blurred, with noise."""
    size = canvas.shape[:2]
    _, u, _ = _cut_window(
        size, (size[0] / 2, size[1] / 2), max(size), _draw_number(rng, (0, 2 * np.pi))
    )
    # Light changes linearly across the image, along a random direction.
    light = _draw_number(rng, GAIN) * (
        1 + _draw_number(rng, (0, LIGHT_GRADIENT)) * u / np.hypot(*size) * 2
    )

    lit = Image.fromarray(np.clip(canvas * light[..., None], 0, 255).astype(np.uint8))
    blurred = lit.filter(ImageFilter.GaussianBlur(_draw_number(rng, BLUR_SIGMA_PX)))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(
        _draw_number(rng, NOISE_SIGMA)
    )
    return np.clip(np.asarray(blurred, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
