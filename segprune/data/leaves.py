"""Synthetic images for planning, repair and calibration where no photograph is at hand: dead leaves.

Shapes of all sizes that cover each other at random have the edges, the spectrum and the scale invariance of
photographs ("Occlusion models for natural images", Lee, Mumford and Huang 2001), and networks learn features from them
that serve for photographs ("Learning to See by Looking at Noise", arXiv 2106.05963). Here every leaf has a colour from
its image's palette, shading from a light, and a texture with a spectrum of its own; blur and noise come on top. Half of
the images are scenes: bright and empty above a horizon, and below it leaves that stand upright and grow towards the
viewer. Lengths are shares of the image's shorter side unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segprune.data.shapes import draw_shapes
from segprune.data.transforms import Bytes
from segprune.spec import RGB

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

NUM_LEAVES = (8, 400)  # fewest and most; every order of magnitude is equally likely
RADIUS = (0.015, 0.4)  # smallest and largest; between them densities fall with the third power
STRETCH = 2.5  # most of one axis over the other
POWERS = (
    0,
    1,
    1,
    2,
    4,
)  # |u|^p + |v|^p < 1 with p = 2^power: diamonds, ellipses, rounded and sharp rectangles
NUM_TEXTURES = 3
SLOPE = (0.6, 2.2)  # of a texture's amplitudes over frequency
CONTRAST = (0.0, 0.2)  # of a texture, as a share of full brightness
SHADING = 0.35  # most that brightness changes from one side of a leaf to the other
SCENES = 0.5  # share of images with a horizon
HORIZON = (0.15, 0.6)  # of the height, from above
BLUR = (0.0, 1.2)  # pixels
NOISE = (0.0, 0.02)  # deviation, as a share of full brightness


def draw_example(index: int, size: tuple[int, int], channels: int = RGB) -> Bytes:
    """Returns an image [H, W, C] to run networks on: one of the generated data set, or leaves where it is not RGB."""
    if channels == RGB:
        return draw_shapes(0, "val", index, size)[0]
    return draw_leaves(0, index, size, channels)


def draw_leaves(seed: int, index: int, size: tuple[int, int], channels: int = RGB) -> Bytes:
    """Returns one image [H, W, C], always the same for the same arguments.

    At another size it is the same scene: the same leaves in the same colours, with other grains of the same textures.
    """
    # Two streams: the grain takes as many numbers as there are pixels, and must not move
    # the scene when the size changes.
    rng, grain = (np.random.default_rng([seed, index, stream]) for stream in (0, 1))
    horizon = float(rng.uniform(*HORIZON)) * size[0] if rng.uniform() < SCENES else None
    leaves = _lay_leaves(rng, size, horizon)
    image = _paint((rng, grain), leaves, horizon, channels)
    image = _blur(image, rng.uniform(*BLUR))

    # Noise comes after the blur, as a sensor adds it behind the lens.
    image += np.float32(rng.uniform(*NOISE)) * grain.standard_normal(
        image.shape, dtype=np.float32
    )
    image *= 255.0
    result: Bytes = np.clip(image, 0.0, 255.0, out=image).astype(np.uint8)
    return result


@dataclass(frozen=True)
class _Leaves:
    """Which leaf each pixel [H, W] shows, and of every leaf centre (2 L) and radius (L), in pixels.

    The first two are the ground, and what is above the horizon.
    """

    owner: Ints
    centres: Floats
    radii: Floats


def _lay_leaves(
    rng: np.random.Generator, size: tuple[int, int], horizon: float | None
) -> _Leaves:
    """Leaves laid over each other, the last on top."""
    height, width = size
    side = min(size)
    # Drawn evenly on a logarithmic scale, from a few leaves to a dense carpet.
    count = int(math.exp(rng.uniform(*np.log(NUM_LEAVES))))

    # Radii by inverse transform: the density falls with the third power, so that all sizes cover alike.
    radii = side * rng.uniform(RADIUS[1] ** -2, RADIUS[0] ** -2, count) ** -0.5
    centres = rng.uniform(0.0, 1.0, (2, count)) * [[height], [width]]
    angles = rng.uniform(0.0, math.pi, count)
    owner = np.zeros(size, dtype=np.int32)
    if horizon is not None:
        # Leaves stand on the ground; those further down are nearer, hence larger and in front.
        owner[: int(horizon)] = 1
        depth = np.sort(rng.beta(1.0, 2.0, count))
        radii *= 0.3 + 1.2 * depth
        centres[0] = (
            horizon + depth * (height - horizon) - radii * rng.uniform(-0.2, 1.5, count)
        )
        angles = rng.normal(0.0, 0.08, count)

    # One axis grows by as much as the other shrinks, so the area stays the same.
    stretch = np.exp(rng.uniform(-0.5, 0.5, count) * math.log(STRETCH))
    powers = rng.choice(POWERS, count)
    for leaf in range(count):
        # What a leaf can reach, corners of rectangles included.
        reach = 1.4 * radii[leaf] * max(stretch[leaf], 1.0 / stretch[leaf])
        y, x = centres[:, leaf]
        top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
        left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
        if top >= bottom or left >= right:
            continue

        # Coordinates along the leaf's axes, which end at 1.
        rows = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
        columns = np.arange(left, right, dtype=np.float32)[None] - np.float32(x)
        sine, cosine = math.sin(angles[leaf]), math.cos(angles[leaf])
        along, across = radii[leaf] * stretch[leaf], radii[leaf] / stretch[leaf]
        u = np.float32(cosine / along) * columns + np.float32(sine / along) * rows
        v = np.float32(cosine / across) * rows - np.float32(sine / across) * columns
        owner[top:bottom, left:right][_is_inside(u, v, int(powers[leaf]))] = leaf + 2

    # The ground and the sky are no leaves; their centre and radius serve the shading.
    behind = np.array([[height, 0.0], [width / 2, width / 2]])
    return _Leaves(
        owner,
        np.concatenate([behind, centres], 1).astype(np.float32),
        np.concatenate([[height, height], radii]).astype(np.float32),
    )


def _is_inside(u: Floats, v: Floats, power: int) -> npt.NDArray[np.bool_]:
    # |u| + |v| < 1 is the diamond; squaring p times gives the exponent 2^p.
    if power == 0:
        return np.abs(u) + np.abs(v) < 1.0
    for _ in range(power):
        u, v = u * u, v * v
    return u + v < 1.0


def _paint(
    rngs: tuple[np.random.Generator, np.random.Generator],
    leaves: _Leaves,
    horizon: float | None,
    channels: int,
) -> Floats:
    """Returns the colour of every pixel, H W C, about 0 to 1."""
    rng, grain = rngs
    owner = leaves.owner
    height, width = owner.shape
    count = len(leaves.radii)

    # A palette of a few colours; leaves stray from them, in brightness most.
    colourful = rng.uniform(0.0, 0.15)
    palette = rng.uniform(0.1, 0.9, (int(rng.integers(3, 8)), 1)) + rng.normal(
        0.0, 0.05, (1, channels)
    )
    palette = palette + rng.normal(0.0, colourful, palette.shape)
    colours = palette[rng.integers(0, len(palette), count)]
    colours = colours + rng.normal(0.0, 0.12, (count, 1))
    colours = colours + rng.normal(0.0, colourful / 3, (count, channels))

    # Shading: linear over a leaf, along a direction that all leaves nearly share.
    light = rng.uniform(0.0, 2.0 * math.pi) + rng.normal(0.0, 0.6, count)
    strength = rng.uniform(0.0, SHADING, count) / leaves.radii / 2
    slopes = (strength * np.stack([np.sin(light), np.cos(light)])).astype(np.float32)
    contrast = rng.uniform(*CONTRAST, count).astype(np.float32)
    # The sky is bright, nearly grey with a touch of blue, and has little texture.
    if horizon is not None:
        blue = np.linspace(-1.0, 1.0, channels)
        colours[1] = rng.uniform(0.65, 1.05) + rng.uniform(0.0, 0.1) * blue
        contrast[1] *= 0.3
    # slope * (position - centre), with the constant part taken out once per leaf.
    offsets = -(slopes * leaves.centres).sum(0)
    rows, columns = (
        np.arange(height, dtype=np.float32)[:, None],
        np.arange(width, dtype=np.float32),
    )
    shade = offsets[owner] + slopes[0][owner] * rows + slopes[1][owner] * columns

    # Textures: every leaf reads one of a few fields of noise, with a contrast of its own.
    fields = np.stack([_draw_field(rng, grain, owner.shape) for _ in range(NUM_TEXTURES)])
    which = rng.integers(0, NUM_TEXTURES, count).astype(np.int32)
    shade += contrast[owner] * np.take_along_axis(fields, which[owner][None], 0)[0]
    result: Floats = colours.astype(np.float32)[owner] + shade[..., None]
    return result


def _draw_field(
    rng: np.random.Generator, grain: np.random.Generator, size: tuple[int, int]
) -> Floats:
    """Noise with amplitudes that fall with a power of the frequency, longer along one direction; deviation 1."""
    height, width = size
    # Half as large as the image and repeated: a fourth of the work.
    half = (-(-height // 2), -(-width // 2))
    rows, columns = np.fft.fftfreq(half[0])[:, None], np.fft.rfftfreq(half[1])[None]
    # Frequencies along a random direction count as higher: the grain is longer along it.
    angle, stretch = rng.uniform(0.0, math.pi), math.exp(rng.uniform(0.0, 1.5))
    along = math.cos(angle) * columns + math.sin(angle) * rows
    across = math.cos(angle) * rows - math.sin(angle) * columns
    frequency = np.sqrt(stretch * along**2 + across**2 / stretch) + 1.0 / max(half)

    # Complex noise, shaped by the spectrum; a mean of 0 leaves the brightness as it is.
    noise = grain.standard_normal((*frequency.shape, 2)).view(np.complex128)[..., 0]
    spectrum = noise * frequency ** -rng.uniform(*SLOPE)
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=half).astype(np.float32)
    result: Floats = np.tile(field / field.std(), (2, 2))[:height, :width]
    return result


def _blur(image: Floats, sigma: float) -> Floats:
    """By a Gaussian of that deviation in pixels; edges are repeated."""
    # Two deviations hold 95 % of the weight.
    radius = math.ceil(2.0 * sigma)
    if radius == 0:
        return image
    # Weights that add up to 1 keep the brightness.
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)

    # A Gaussian is separable: blur from top to bottom, then from left to right.
    height, width = image.shape[:2]
    padded = np.pad(image, [(radius, radius), (0, 0), (0, 0)], mode="edge")
    image = sum(k * padded[i : i + height] for i, k in enumerate(kernel))
    padded = np.pad(image, [(0, 0), (radius, radius), (0, 0)], mode="edge")
    result: Floats = sum(k * padded[:, i : i + width] for i, k in enumerate(kernel))
    return result
