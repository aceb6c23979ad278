"""Pictures: encoded bytes to uint8 pixels, by one decoder for every reader, and the transforms of training.

What people see in a viewer is what is decoded: upright as the EXIF orientation says, transparency on white, more than 8
bits scaled to 8, of an animation the first frame. Randomness comes from the generator that is passed in.

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
import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE
from torch.nn import functional

# A larger header is an attack or a mistake, and decoding it can exhaust the memory. What decodes more slowly than JPEG, or
# not at reduced size, may have fewer: a picture takes a few seconds and 1 GB at most.
MAX_PIXELS = 100_000_000
FEWER_PIXELS = {"JPEG2000": 16_000_000}
OTHER_PIXELS = 50_000_000
# Scans of a JPEG: encoders write about 10 of a progressive one, and each costs a pass over all of its pixels.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 16 * MAX_PIXELS
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # of a JPEG; the others belong to the pixels
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
BICUBIC = Image.Resampling.BICUBIC
GREY = (128, 128, 128)  # zero after normalisation
# What Pillow may open: no format whose decoder starts a program (EPS) or is not meant for pictures.
FORMATS = {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"}
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # [H, W, 3] made upright, by EXIF orientation; 1 is upright
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}
Box = tuple[int, int, int, int]


class EncodedImage:
    """A picture whose upright size is known and whose pixels are decoded when a transform says how many it needs.

    JPEGs are decoded at a half, a quarter or an eighth of their size where the part that is wanted keeps at least the
    target's resolution; other formats are decoded whole at once. Raises ValueError with the reason when the bytes cannot
    be used.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.whole: np.ndarray | None = None  # [H, W, 3] uint8, upright, of what is not decoded on demand
        self.orientation = 1
        if stored := jpeg_size(data):
            self.orientation = jpeg_orientation(data)
            self.width, self.height = stored if self.orientation < 5 else stored[::-1]
            check_cost(data, "JPEG", *stored)
        else:
            self.whole = decoded(data)
            self.height, self.width = self.whole.shape[:2]

    def decode(self, halvings: int = 0) -> np.ndarray:
        """[H, W, 3] uint8; both sides halved so many times (rounded up) where the format allows it, else whole."""
        if self.whole is not None:
            return self.whole
        height, width = (-(-side // (1 << halvings)) if halvings else 0 for side in (self.height, self.width))
        if self.orientation >= 5:
            height, width = width, height
        try:
            stored = simplejpeg.decode_jpeg(self.data, "RGB", min_height=height, min_width=width)
        except ValueError:  # Pillow reads some that this decoder does not, or says what is wrong
            self.whole = decoded(self.data)
            return self.whole
        return turned(stored, self.orientation)

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


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as stored of a JPEG that the fast decoder reads; None of anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colours in ("CMYK", "YCCK") else (width, height)


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation, 1 to 8. Most JPEGs have no segment that could hold one, which takes microseconds to see."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (b"\xda", b"\xd9", b""):
        end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
        if data[place + 1] == 0xE1 and (  # EXIF, or XMP, which repeats it
            data.startswith(b"Exif\0\0", place + 4) or data.find(b"tiff:Orientation", place, end) >= 0
        ):
            return orientation(opened(data))
        place = end
    return 1


def opened(data: bytes) -> Image.Image:
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(FORMATS & Image.OPEN.keys()))
    except UnidentifiedImageError:
        raise ValueError("not a readable image (no known format)") from None
    except Exception as error:  # Pillow raises whatever a hostile file makes it raise
        raise ValueError(f"not a readable image ({type(error).__name__}: {str(error)[:200]})") from None
    check_cost(data, image.format or "this format", *image.size)
    return image


def check_cost(data: bytes, kind: str, width: int, height: int) -> None:
    """ValueError for a picture that takes too long or too much memory to decode, as far as its headers tell."""
    jpeg = data[:2] == b"\xff\xd8"
    most = MAX_PIXELS if jpeg else FEWER_PIXELS.get(kind, OTHER_PIXELS)
    if width * height > most:
        raise ValueError(f"{width}x{height} pixels, at most {most:,} are accepted of {'JPEG' if jpeg else kind}")
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(width * height, 1))
    if jpeg and jpeg_scans(data, most) > most:
        raise ValueError(f"a JPEG of more than {most} scans, the most that are accepted of {width}x{height} pixels")


def jpeg_scans(data: bytes, most: int) -> int:
    """Scans up to the end of the picture, counted to most + 1. A plain JPEG's are not looked for: its first has everything."""
    scans, place, progressive, components = 0, 2, False, b""
    while scans <= most and (found := MARKER.search(data, place)):
        marker, place = found[1][0], found.end()
        if marker == 0xD9:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame
            progressive, components = marker & 3 == 2, data[place + 7 : place + 8]
        elif marker == 0xDA:
            scans += 1
            if scans == 1 and not progressive and data[place + 2 : place + 3] == components:
                break
        if marker >= 0xC0 and marker != 0xD8:
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def decoded(data: bytes) -> np.ndarray:
    return upright_pixels(opened(data))


def upright_pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8 of an image that Pillow has opened or made. ValueError where it cannot be decoded."""
    try:
        image.load()  # before the orientation is asked for: Pillow turns TIFFs itself, and then says so
        return turned(np.array(as_rgb(image)), orientation(image))
    except Exception as error:  # as in opened
        raise ValueError(f"not a readable image ({type(error).__name__}: {str(error)[:200]})") from None


def orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # pixels can be read where what a camera wrote about them is broken
        return 1
    return found if found in TURNS else 1


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, 3] made upright."""
    return np.ascontiguousarray(TURNS[orientation](stored)) if orientation in TURNS else stored


def as_rgb(image: Image.Image) -> Image.Image:
    """8 bits a colour, with transparency on white. Colour profiles are left aside."""
    if image.mode.startswith(("I", "F")):
        return scaled_grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    white = Image.new("RGBA", seen.size, "white")
    return Image.alpha_composite(white, seen).convert("RGB")


def scaled_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled to 8.

    Of 16-bit samples black and white are 0 and 65,535. Of 32-bit integers and floats the file does not say what white is:
    1, 255 or 65,535, the least of them that no sample is above (1 of floats alone).
    """
    values = np.asarray(image)
    if image.mode.startswith("I;"):
        bits = getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (16,))[0]  # TIFFs may have 12
        white = 2 ** min(bits, 16) - 1
        grey = to_8_bits(np.arange(1 << 16), white)[values]  # a table: one float for every pixel would be slow
    else:
        low, high = float(values.min()), float(values.max())
        white = next((top for top in ((1, 255, 65535) if image.mode == "F" else (255, 65535)) if high <= top), None)
        if white is None or not low >= 0:
            raise ValueError(f"grey values from {low:g} to {high:g}; accepted: 0 to 1, 255 or 65,535")
        grey = to_8_bits(values, white)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def to_8_bits(values: np.ndarray, white: int) -> np.ndarray:
    return np.rint(values.astype(np.float32) * np.float32(255 / white)).clip(0, 255).astype(np.uint8)


class Crops(NamedTuple):
    """smallest: share of a picture's area that a random crop has at least, None: the transform's own; flip: whether a crop is
    mirrored by chance."""

    smallest: float | None = None
    flip: bool = True


USUAL = Crops()


def square(image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL) -> Image.Image:
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


def crop_flip(
    image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL, smallest: float = 0.5
) -> Image.Image:
    """smallest: as of Crops, where it has none."""
    crop = random_crop(image, size, smallest if crops.smallest is None else crops.smallest, rng)
    return random_flip(crop, rng) if crops.flip else crop


def square_randaug(image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL) -> Image.Image:
    return randaugment(crop_flip(image, size, rng, crops), rng)


def crop_flip_randaug(image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL) -> Image.Image:
    return randaugment(crop_flip(image, size, rng, crops, smallest=0.2), rng)


def pixelbert(image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL) -> Image.Image:
    return fitted(image.width, image.height, size, image.resized)


def pixelbert_randaug(image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL) -> Image.Image:
    whole = randaugment(Image.fromarray(image.decode()), rng, level=0.9)
    return fitted(whole.width, whole.height, size, lambda w, h: whole.resize((w, h), BICUBIC))


class Transformed(Protocol):
    """An augmentation: a picture of size x size, RGB. What is random comes from rng; those without random crops ignore `crops`."""

    def __call__(
        self, image: EncodedImage, size: int, rng: np.random.Generator, crops: Crops = USUAL
    ) -> Image.Image: ...


TRANSFORMS: dict[str, Transformed] = {
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
