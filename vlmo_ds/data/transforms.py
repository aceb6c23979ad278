"""Image transforms with Pillow: bytes to uint8 pixels. Randomness comes from the generator that is passed in.

square             resize to a square (evaluation; and scenes whose captions speak of left and right)
square_randaug     the reference's: random crop of 50-100% of the area, flip, RandAugment
crop_flip          random crop and flip alone
crop_flip_randaug  the same as square_randaug with crops down to 20% (image-only pretraining)
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_PIXELS = 100_000_000  # a larger header is an attack or a mistake, and decoding it can exhaust the memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
BICUBIC = Image.Resampling.BICUBIC


def decode(data: bytes) -> Image.Image:
    """Encoded image bytes -> RGB. Raises ValueError with the reason when they cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are accepted")
        image.draft("RGB", None)
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"not a readable image ({str(error)[:200]})") from None


def square(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return image.resize((size, size), BICUBIC)


def random_crop(image: Image.Image, size: int, smallest: float, rng: np.random.Generator) -> Image.Image:
    """RandomResizedCrop (Inception, arXiv:1409.4842): a share of the area in [smallest, 1], aspect 3/4 to 4/3."""
    width, height = image.size
    for _ in range(10):
        area = rng.uniform(smallest, 1.0) * width * height
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return image.resize((size, size), BICUBIC, box=(left, top, left + w, top + h))
    return image.resize((size, size), BICUBIC)


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )


# The operations that keep colours nameable (ALBEF, arXiv:2107.07651), each with a level from 0 to 1 and a sign.
RANDAUGMENT: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, level, sign: image,
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "shear_x": lambda image, level, sign: affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
    "translate_x": lambda image, level, sign: affine(image, (1, 0, sign * 10 * level, 0, 1, 0)),
    "translate_y": lambda image, level, sign: affine(image, (1, 0, 0, 0, 1, sign * 10 * level)),
    "rotate": lambda image, level, sign: image.rotate(
        sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    ),
}


def randaugment(image: Image.Image, rng: np.random.Generator, operations: int = 2, level: float = 0.7) -> Image.Image:
    """RandAugment(2, 7) over ALBEF's operations, each applied with probability one half, as the reference does."""
    for name in rng.choice(list(RANDAUGMENT), size=operations, replace=False):
        if rng.random() < 0.5:
            image = RANDAUGMENT[name](image, level, 1 if rng.random() < 0.5 else -1)
    return image


def square_randaug(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return randaugment(random_flip(random_crop(image, size, 0.5, rng), rng), rng)


def crop_flip(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return random_flip(random_crop(image, size, 0.5, rng), rng)


def crop_flip_randaug(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return randaugment(random_flip(random_crop(image, size, 0.2, rng), rng), rng)


TRANSFORMS = {
    "square": square,
    "square_randaug": square_randaug,
    "crop_flip": crop_flip,
    "crop_flip_randaug": crop_flip_randaug,
}


def pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> [3, H, W] uint8."""
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
