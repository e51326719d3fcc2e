"""A generated data set in VOC layout: seven kinds of objects, to learn from scratch within minutes.

Every class has its shape, its texture and its hue. Hues overlap between neighbours, textures are shared by
pairs, shapes are turned, stretched and occluded, and now and then one of shape or texture is another class's: two
cues are needed to tell. Clutter, light, blur and noise come on top. Lengths are shares of the picture's shorter
side unless named `_PX`; the difficulty lies in the constants below.

With `context`, every object but the ring is of another class if a ring is anywhere in the picture: what a pixel
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

NUM_OBJECTS = (2, 5)  # a picture's fewest and most
RADIUS = (0.11, 0.2)  # of the disc with the object's area
STRETCH = 1.25  # most of one axis; the other shrinks alike, so that areas stay
HUE_SIGMA = 0.035  # of a class's hue, on a circle of length 1 where neighbours are 1/7 apart
ODD_SHAPE, ODD_TEXTURE = 0.06, 0.12  # share of objects with any class's shape, or any texture; never both
PERIOD = (0.055, 0.085)  # of textures
TEXTURE_CONTRAST = (0.35, 0.65)  # share of brightness that a texture's dark places lose
OBJECT_SATURATION, OBJECT_VALUE = (0.45, 0.95), (0.55, 1.0)
CLUTTER_SATURATION, CLUTTER_VALUE = (0.05, 0.5), (0.25, 0.85)
MAX_BLOBS, BLOB_RADIUS = 3, (0.06, 0.16)  # unlabelled distractors
MAX_BARS, BAR_WIDTH = 2, (0.012, 0.03)  # unlabelled occluders right across the picture
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
CONTEXT_CLASS_NAMES = (*CLASS_NAMES, *(f"{_LOOKS[k].name} in a picture with a ring" for k in _OTHERS))


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

    A set written here before is replaced. The lists come last: an interrupted run leaves a set that no
    reader takes for whole. `progress` is called with (images done, images in all). Raises ValueError for a
    folder that holds anything else, and for numbers out of range.
    """
    if min(num_train, num_val) < 1 or min(size) < 32 or seed < 0:
        raise ValueError(
            f"num_train {num_train}, num_val {num_val}, size {size} and seed {seed} came, where at least 1, "
            "1, (32, 32) and 0 are allowed; give larger ones."
        )
    root = _prepare(Path(folder), CONTEXT_CLASS_NAMES if context else CLASS_NAMES)
    lists = root / "ImageSets" / "Segmentation"
    palette = voc_palette()
    numbers = dict(zip(SPLITS, (num_train, num_val), strict=True))
    done = 0
    for split, number in numbers.items():
        for index in range(number):
            image, mask = draw_shapes(seed, split, index, size, context=context)
            name = _name(split, index)
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY)
            indexed = Image.fromarray(mask)
            indexed.putpalette(palette)
            indexed.save(root / "SegmentationClass" / f"{name}.png")
            done += 1
            if progress is not None:
                progress(done, sum(numbers.values()))
    for split, number in numbers.items():
        unfinished = lists / f"{split}.part"
        unfinished.write_bytes(_lines(_name(split, index) for index in range(number)))
        unfinished.replace(lists / f"{split}.txt")
    return root


def draw_shapes(
    seed: int, split: str, index: int, size: tuple[int, int], *, context: bool = False
) -> tuple[Bytes, Bytes]:
    """Image [H, W, 3] and mask [H, W] of one sample; any seven pictures in a row show every class."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = _background(rng, size)
    mask = np.zeros(size, dtype=np.uint8)
    for _ in range(rng.integers(0, MAX_BLOBS + 1)):
        _paint_blob(rng, canvas)
    centres: list[tuple[float, float]] = []
    for k, label in _choose(rng, index % len(_LOOKS), context):
        centres.append(_place(rng, centres, size))
        _paint_object(rng, canvas, mask, k, label, centres[-1])
    for _ in range(rng.integers(0, MAX_BARS + 1)):
        _paint_bar(rng, canvas, mask)
    return _photograph(rng, canvas), mask


def _choose(rng: np.random.Generator, turn: int, context: bool) -> list[tuple[int, int]]:
    """The looks and classes of a picture's objects; the one whose turn it is comes last and so lies on top."""
    others = [int(k) for k in rng.permutation(len(_LOOKS)) if k != turn]
    others = others[: int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)) - 1]
    if not context:
        return [(k, k + 1) for k in (*others, turn)]
    with_key = turn == _KEY or rng.random() < 0.5
    others = [k for k in others if k != _KEY] + [_KEY] * (with_key and turn != _KEY)
    shift = len(_LOOKS) + 1
    return [(k, shift + _OTHERS.index(k) if with_key and k != _KEY else k + 1) for k in (*others, turn)]


def _lines(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _name(split: str, index: int) -> str:
    return f"{split}_{index:05d}"


def _prepare(folder: Path, class_names: tuple[str, ...]) -> Path:
    """The set's folders, with classes.txt first as the sign that they are ours and without lists."""
    root = folder / "VOCdevkit" / "VOC2007"
    sign = root / "classes.txt"
    known = [_lines(names) for names in (CLASS_NAMES, CONTEXT_CLASS_NAMES)]
    ours = sign.is_file() and sign.read_bytes() in known
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is no generated data set, where a new or empty folder is allowed; "
            "choose another name."
        )
    root.mkdir(parents=True, exist_ok=True)
    sign.write_bytes(_lines(class_names))
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").unlink(missing_ok=True)
    return root


# shapes: where an object lies, in coordinates turned and scaled so that its area is that of the unit disc


def _polygon(u: Floats, v: Floats, points: int, outer: float, inner: float) -> Bools:
    """A star of so many points; a regular polygon where `inner` is `outer` times cos(pi / points)."""
    half = np.pi / points
    angle = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)  # folded to one half of one point
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    inner_x, inner_y = inner * np.cos(half), inner * np.sin(half)
    inside: Bools = (x - outer) * inner_y - y * (inner_x - outer) < 0  # left of the edge from outer to inner
    return inside


def inside_shape(name: str, u: Floats, v: Floats) -> Bools:
    """Which of the points (u, v) lie in the shape; all shapes have area pi and reach at most 1.6."""
    match name:
        case "disc":
            return u * u + v * v < 1
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) < 0.886
        case "triangle":
            return _polygon(u, v, 3, 1.555, 1.555 / 2)
        case "ring":
            return np.abs(np.hypot(u, v) - 1) < 0.25
        case "star":
            return _polygon(u, v, 5, 1.492, 0.48 * 1.492)
        case "cross":
            a, b = np.abs(u), np.abs(v)
            return (np.minimum(a, b) < 0.4 * 1.108) & (np.maximum(a, b) < 1.108)
        case _:
            return (np.abs(u) < 1.25) & (np.abs(v) < 0.628)


def _texture(name: str, u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """0 (bright) to 1 (dark) at points given in periods."""
    u, v = u + np.float32(rng.random()), v + np.float32(rng.random())
    match name:
        case "stripes":
            dark = u % 1 < 0.5
        case "checks":
            dark = (u % 1 < 0.5) ^ (v % 1 < 0.5)
        case "dots":
            dark = np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32
        case "noise":
            cells = rng.random((16, 16), dtype=np.float32)
            return cells[(2 * v).astype(np.int64) % 16, (2 * u).astype(np.int64) % 16]
        case "gradient":
            return (0.5 + 0.5 * np.sin(u)).astype(np.float32)
        case _:
            return np.zeros_like(u)
    return dark.astype(np.float32)


# painting: the canvas is float32 [H, W, 3] in 0..255


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(*bounds))


def _colour(
    rng: np.random.Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]
) -> Floats:
    rgb = colorsys.hsv_to_rgb(hue % 1, _between(rng, saturation), _between(rng, value))
    return np.array(rgb, dtype=np.float32) * 255


def _shaded(rng: np.random.Generator, colour: Floats, dark: Floats) -> Floats:
    """A colour [3] where `dark` [h, w] is 0, darkened by the texture's contrast where it is 1."""
    gain = 1 - np.float32(_between(rng, TEXTURE_CONTRAST)) * dark
    return gain[..., None] * colour


def _window(
    size: tuple[int, int], centre: tuple[float, float], reach: float, angle: float
) -> tuple[Window, Floats, Floats]:
    """The part of the picture within `reach` of the centre (y, x), and its pixels' turned offsets from it."""
    spans = [range(max(0, int(c - reach)), min(n, int(c + reach) + 2)) for c, n in zip(centre, size, strict=True)]
    y = np.arange(spans[0].start, spans[0].stop, dtype=np.float32)[:, None] - np.float32(centre[0])
    x = np.arange(spans[1].start, spans[1].stop, dtype=np.float32)[None, :] - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    window = (slice(spans[0].start, spans[0].stop), slice(spans[1].start, spans[1].stop))
    return window, x * cos + y * sin, y * cos - x * sin


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> Floats:
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Two hues in drifting patches, under a texture of any direction and period."""
    patches = _smooth_noise(rng, size, int(rng.integers(3, 9)))[..., None]
    one, two = (_colour(rng, rng.random(), CLUTTER_SATURATION, CLUTTER_VALUE) for _ in range(2))
    middle, angle = (size[0] / 2, size[1] / 2), _between(rng, (0, np.pi))
    _, u, v = _window(size, middle, max(size), angle)
    period = np.float32(min(size) * _between(rng, PERIOD) * _between(rng, (1, 3)))
    dark = _texture(str(rng.choice(TEXTURES)), u / period, v / period, rng)
    gain = 1 - np.float32(_between(rng, TEXTURE_CONTRAST) * 0.7) * dark
    return (one * patches + two * (1 - patches)) * gain[..., None]


def _paint_blob(rng: np.random.Generator, canvas: Floats) -> None:
    """A distractor without texture or label: a wavy patch of any hue."""
    radius = min(canvas.shape[:2]) * _between(rng, BLOB_RADIUS)
    centre = (rng.random() * canvas.shape[0], rng.random() * canvas.shape[1])
    window, u, v = _window(canvas.shape[:2], centre, 1.5 * radius, _between(rng, (0, 2 * np.pi)))
    angle = np.arctan2(v, u)
    wave = 1 + 0.25 * np.cos(2 * angle) + 0.2 * np.cos(3 * angle + np.float32(rng.random() * 6))
    inside = np.hypot(u, v) < radius * wave
    canvas[window][inside] = _colour(rng, rng.random(), CLUTTER_SATURATION, CLUTTER_VALUE)


def _place(rng: np.random.Generator, centres: list[tuple[float, float]], size: tuple[int, int]) -> tuple[float, float]:
    """Of four random places (y, x) the one farthest from the objects there, so that few are hidden whole."""
    places = [(_between(rng, (0.15, 0.85)) * size[0], _between(rng, (0.15, 0.85)) * size[1]) for _ in range(4)]
    return max(places, key=lambda p: min((np.hypot(p[0] - y, p[1] - x) for y, x in centres), default=0.0))


def _paint_object(
    rng: np.random.Generator, canvas: Floats, mask: Bytes, k: int, label: int, centre: tuple[float, float]
) -> None:
    """One object that looks like number k, over what was there."""
    look = _LOOKS[k]
    odd = rng.random()
    any_look, any_texture = _LOOKS[rng.integers(len(_LOOKS))], TEXTURES[rng.integers(len(TEXTURES))]
    shape = any_look.name if odd < ODD_SHAPE else look.name
    texture = any_texture if ODD_SHAPE <= odd < ODD_SHAPE + ODD_TEXTURE else look.texture
    side = min(mask.shape)
    radius, period = side * _between(rng, RADIUS), np.float32(side * _between(rng, PERIOD))
    stretch = np.float32(STRETCH ** _between(rng, (-0.5, 0.5)))
    window, u, v = _window(mask.shape, centre, 1.6 * STRETCH**0.5 * radius, _between(rng, (0, 2 * np.pi)))
    inside = inside_shape(shape, u / np.float32(radius) / stretch, v / np.float32(radius) * stretch)
    dark = _texture(texture, u / period, v / period, rng)
    colour = _colour(rng, look.hue + HUE_SIGMA * rng.standard_normal(), OBJECT_SATURATION, OBJECT_VALUE)
    canvas[window][inside] = _shaded(rng, colour, dark)[inside]
    mask[window][inside] = label


def _paint_bar(rng: np.random.Generator, canvas: Floats, mask: Bytes) -> None:
    """A thin occluder right across the picture, labelled background."""
    centre = (rng.random() * mask.shape[0], rng.random() * mask.shape[1])
    _, _, v = _window(mask.shape, centre, 2 * max(mask.shape), _between(rng, (0, np.pi)))
    inside = np.abs(v) < min(mask.shape) * _between(rng, BAR_WIDTH)
    canvas[inside] = _colour(rng, rng.random(), CLUTTER_SATURATION, CLUTTER_VALUE)
    mask[inside] = 0


def _photograph(rng: np.random.Generator, canvas: Floats) -> Bytes:
    """Light that falls from one side, then blur, then noise."""
    height, width = canvas.shape[:2]
    _, u, _ = _window((height, width), (height / 2, width / 2), max(height, width), _between(rng, (0, 2 * np.pi)))
    light = _between(rng, GAIN) * (1 + _between(rng, (0, LIGHT_GRADIENT)) * u / np.hypot(height, width) * 2)
    lit = Image.fromarray(np.clip(canvas * light[..., None], 0, 255).astype(np.uint8))
    blurred = lit.filter(ImageFilter.GaussianBlur(_between(rng, BLUR_SIGMA_PX)))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(_between(rng, NOISE_SIGMA))
    return np.clip(np.asarray(blurred, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
