"""Image transforms with Pillow: bytes to uint8 pixels. Randomness comes from the generator that is passed in.

square_transform          resize to a square (evaluation; and scenes whose captions speak of left and right)
square_transform_randaug  the reference's: random crop of 50-100% of the area, flip, RandAugment
pixelbert                 the whole picture with its aspect ratio, as large as fits, on grey (PixelBERT,
                          arXiv:2004.00849, pads to the batch; the multiway transformer has a fixed grid)
pixelbert_randaug         RandAugment before pixelbert
crop_flip                 random crop and flip alone
crop_flip_randaug         as square_transform_randaug with crops down to 20% (image-only pretraining)
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.nn import functional

MAX_PIXELS = 100_000_000  # a larger header is an attack or a mistake, and decoding it can exhaust the memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
BICUBIC = Image.Resampling.BICUBIC
GREY = (128, 128, 128)  # zero after normalisation
TURNS = {  # of EXIF orientations; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Box = tuple[int, int, int, int]


class EncodedImage:
    """An image whose size is known and whose pixels are decoded when a transform says how many it needs.

    JPEGs are decoded at a half, a quarter or an eighth of their size where the part that is wanted keeps at least the
    target's resolution. Raises ValueError with the reason when the bytes cannot be used.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.jpeg = data[:2] == b"\xff\xd8"
        if self.jpeg:
            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:
                self.jpeg = False  # Pillow reads some that this decoder does not, or says what is wrong
            else:
                self.width, self.height = width, height
                self.jpeg = colours not in ("CMYK", "YCCK")
        if not self.jpeg:
            self.file = opened(data)
            self.width, self.height = self.file.size
        if self.width * self.height > MAX_PIXELS:
            raise ValueError(f"{self.width}x{self.height} pixels, at most {MAX_PIXELS:,} are accepted")

    def decode(self, halvings: int = 0) -> np.ndarray:
        """[H, W, 3] uint8; both sides halved so many times (rounded up) where the format allows it, else whole."""
        if self.jpeg:
            height, width = (-(-side // (1 << halvings)) if halvings else 0 for side in (self.height, self.width))
            try:
                return simplejpeg.decode_jpeg(self.data, "RGB", min_height=height, min_width=width)
            except ValueError:
                self.file = opened(self.data)
        try:
            return np.array(self.file.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise whatever a hostile file makes them raise
            raise ValueError(f"not a readable image ({type(error).__name__}: {str(error)[:200]})") from None

    def resized(self, width: int, height: int, box: Box | None = None) -> Image.Image:
        """The box (left, top, right, bottom; default: all) as an RGB image of width x height.

        Bicubic with antialiasing, as Pillow's; PyTorch's kernel for bytes gives the same values to within one. Of a
        picture that is decoded at reduced size the box moves to whole pixels: at most half a pixel of the result.
        """
        left, top, right, bottom = box or (0, 0, self.width, self.height)
        room = min((right - left) / width, (bottom - top) / height)
        whole = self.decode(min(3, max(0, int(math.log2(max(room, 1.0))))))
        x, y = whole.shape[1] / self.width, whole.shape[0] / self.height
        crop = whole[round(top * y) : round(bottom * y), round(left * x) : round(right * x)]
        return resized(crop, width, height)


def resized(pixels_HW3: np.ndarray, width: int, height: int) -> Image.Image:
    """Bicubic with antialiasing, of uint8 pixels."""
    planes = torch.from_numpy(pixels_HW3).permute(2, 0, 1).unsqueeze(0)
    small = functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return Image.fromarray(small[0].permute(1, 2, 0).numpy())


def opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("not a readable image (no known format)") from None
    except Exception as error:  # as in decode
        raise ValueError(f"not a readable image ({type(error).__name__}: {str(error)[:200]})") from None


def upright(image: Image.Image, photo: Image.Image | bytes) -> Image.Image:
    """The image turned as the EXIF orientation of the photo it was made of says; as it is where none can be read."""
    try:
        turn = TURNS.get(
            (opened(photo) if isinstance(photo, bytes) else photo).getexif().get(ExifTags.Base.Orientation)
        )
    except Exception:  # pixels can be read where what a camera wrote about them is broken
        turn = None
    return image if turn is None else image.transpose(turn)


def square(image: EncodedImage, size: int, rng: np.random.Generator) -> Image.Image:
    return image.resized(size, size)


def random_crop(image: EncodedImage, size: int, smallest: float, rng: np.random.Generator) -> Image.Image:
    """RandomResizedCrop (Inception, arXiv:1409.4842): a share of the area in [smallest, 1], aspect 3/4 to 4/3."""
    width, height = image.width, image.height
    for _ in range(10):
        area = rng.uniform(smallest, 1.0) * width * height
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return image.resized(size, size, (left, top, left + w, top + h))
    return image.resized(size, size)


def fitted(width: int, height: int, size: int, resize: Callable[[int, int], Image.Image]) -> Image.Image:
    """The whole picture in the middle of a grey square. resize: makes the picture of a width and height."""
    scale = size / max(width, height)
    inner = resize(max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.new("RGB", (size, size), GREY)
    canvas.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return canvas


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=GREY)


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
    "rotate": lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=GREY),
}


def randaugment(image: Image.Image, rng: np.random.Generator, operations: int = 2, level: float = 0.7) -> Image.Image:
    """RandAugment(2, 7) over ALBEF's operations, each applied with probability one half, as the reference does."""
    for name in rng.choice(list(RANDAUGMENT), size=operations, replace=False):
        if rng.random() < 0.5:
            image = RANDAUGMENT[name](image, level, 1 if rng.random() < 0.5 else -1)
    return image


def square_randaug(image: EncodedImage, size: int, rng: np.random.Generator) -> Image.Image:
    return randaugment(random_flip(random_crop(image, size, 0.5, rng), rng), rng)


def pixelbert(image: EncodedImage, size: int, rng: np.random.Generator) -> Image.Image:
    return fitted(image.width, image.height, size, image.resized)


def pixelbert_randaug(image: EncodedImage, size: int, rng: np.random.Generator) -> Image.Image:
    whole = randaugment(Image.fromarray(image.decode()), rng, level=0.9)
    return fitted(whole.width, whole.height, size, lambda w, h: whole.resize((w, h), BICUBIC))


def crop_flip(image: EncodedImage, size: int, rng: np.random.Generator) -> Image.Image:
    return random_flip(random_crop(image, size, 0.5, rng), rng)


def crop_flip_randaug(image: EncodedImage, size: int, rng: np.random.Generator) -> Image.Image:
    return randaugment(random_flip(random_crop(image, size, 0.2, rng), rng), rng)


TRANSFORMS: dict[str, Callable[[EncodedImage, int, np.random.Generator], Image.Image]] = {
    "square_transform": square,
    "square_transform_randaug": square_randaug,
    "pixelbert": pixelbert,
    "pixelbert_randaug": pixelbert_randaug,
    "crop_flip": crop_flip,
    "crop_flip_randaug": crop_flip_randaug,
}


def pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> [3, H, W] uint8."""
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
