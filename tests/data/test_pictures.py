"""What a picture is: training, evaluation, search, inspect and the exported processor see the same, and what a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch.nn import functional

from vlmo_ds.data import transforms
from vlmo_ds.data.inspect import difference_hash
from vlmo_ds.data.order import generator
from vlmo_ds.data.prepare.sources import usable_image
from vlmo_ds.data.transforms import TRANSFORMS, EncodedImage, pixels
from vlmo_ds.evaluation.runs import square_pixels
from vlmo_ds.evaluation.search import thumbnail
from vlmo_ds.families.vlmo.config import PIXELS
from vlmo_ds.families.vlmo.huggingface import VLMoImageProcessor

RAMP = (np.arange(256)[None].repeat(64, 0) * 257).astype(np.uint16)  # black to white, [64, 256]
NOISE = np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8)
TURNED = {  # what a viewer makes of stored pixels, by EXIF orientation
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.fliplr(np.rot90(a, -1)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.fliplr(np.rot90(a)),
    8: np.rot90,
}


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **how) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **how)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


def decoded(data: bytes) -> np.ndarray:
    return EncodedImage(data).decode()


def png(depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples [H, W x colours] that Pillow does not write. chunks: (name, content) before the pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width = rows.shape[1] // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    body = b"".join(b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    parts = [*(chunk(*part) for part in chunks), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(parts)


# ---- unchanged ----


def photograph(size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: size[1], : size[0]] / 40
    waves = np.stack([np.sin(x + c) * np.cos(y - c) for c in range(3)], -1) * 100 + 128
    return (waves + np.random.default_rng(1).normal(0, 4, waves.shape)).clip(0, 255).astype(np.uint8)


def earlier(data: bytes, size: int, box: tuple | None = None) -> np.ndarray:
    """The pixels of versions that knew no orientation, transparency or 16 bits, of the whole picture or a box in it."""
    width, height = Image.open(io.BytesIO(data)).size
    left, top, right, bottom = box or (0, 0, width, height)
    halvings = min(3, max(0, int(np.log2(max(min(right - left, bottom - top) / size, 1.0)))))
    if data[:2] == b"\xff\xd8":
        least = (-(-side // (1 << halvings)) if halvings else 0 for side in (height, width))
        whole = simplejpeg.decode_jpeg(data, "RGB", **dict(zip(("min_height", "min_width"), least, strict=True)))
    else:
        whole = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    x, y = whole.shape[1] / width, whole.shape[0] / height
    crop = whole[round(top * y) : round(bottom * y), round(left * x) : round(right * x)]
    planes = torch.from_numpy(crop).permute(2, 0, 1).unsqueeze(0)
    return functional.interpolate(planes, size=(size, size), mode="bicubic", antialias=True)[0].numpy()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_plain_pictures_have_the_pixels_they_always_had(kind):
    for size in ((640, 480), (97, 331)):
        data = encoded(photograph(size), kind)
        for box in (None, (5, 9, 96, 90)):
            assert np.array_equal(pixels(EncodedImage(data).resized(32, 32, box)), earlier(data, 32, box))
    for how in ({"mode": "L"}, {"mode": "P"}, {"mode": "1"}, {"mode": "RGBA"}):
        if kind == "PNG":
            data = encoded(Image.fromarray(NOISE).convert(**how))
            assert np.array_equal(decoded(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_photographs_of_coco_have_the_pixels_they_always_had(shared_data):
    for file in sorted((shared_data / "coco_photos" / "val2014").glob("*.jpg"))[:12]:
        data = file.read_bytes()
        if Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) == 1:
            assert np.array_equal(square_pixels(data, 224, file.name).numpy(), earlier(data, 224))


# ---- more than 8 bits ----


@pytest.mark.parametrize(
    "data",
    [
        encoded(RAMP),
        encoded(RAMP, "TIFF"),
        encoded(RAMP, "TIFF", compression="tiff_lzw"),
        encoded(Image.frombytes("I;16B", (256, 64), RAMP.astype(">u2").tobytes()), "TIFF"),
        encoded(RAMP, "PPM"),
        encoded(RAMP.astype(np.int32), "TIFF"),
        encoded((RAMP // 257).astype(np.int32), "TIFF"),
        encoded(RAMP.astype(np.float32), "TIFF"),
        encoded((RAMP / 65535).astype(np.float32), "TIFF"),
        encoded((RAMP // 257).astype(np.float32), "TIFF"),
        png(16, 2, RAMP.repeat(3, 1)),
        png(16, 4, np.stack([RAMP, np.full_like(RAMP, 65535)], -1).reshape(64, -1)),
    ],
    ids=[
        "png",
        "tiff",
        "lzw",
        "big-endian",
        "pgm",
        "int32",
        "int32_of_8",
        "float_of_16",
        "float",
        "float_of_8",
        "rgb",
        "alpha",
    ],
)
def test_sixteen_bits_are_scaled(data):
    seen = decoded(data)
    assert seen.shape == (64, 256, 3) and np.abs(seen.astype(int) - np.arange(256)[None, :, None]).max() <= 1
    name, kept = usable_image(data, 32)
    assert name == "jpg" and abs(decoded(kept).mean() - 127.5) < 1
    in_memory = VLMoImageProcessor(size=32)(Image.open(io.BytesIO(data)))["pixel_values"]
    assert torch.equal(in_memory, VLMoImageProcessor(size=32)(data)["pixel_values"])


def test_twelve_bits_are_scaled():
    """A TIFF of four samples, packed: 0, a third, two thirds, white."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes.fromhex("000555aaafff")
    assert decoded(data)[0, :, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("values", [-1, 70000, np.nan, np.inf])
def test_grey_without_a_known_white_is_refused(values):
    for kind in (np.int32, np.float32) if np.isfinite(values) else (np.float32,):
        picture = np.full((8, 8), 3, dtype=kind)
        picture[2, 2] = values
        with pytest.raises(ValueError, match="grey values from .* accepted: 0 to 1, 255 or 65,535"):
            decoded(encoded(picture, "TIFF"))


# ---- orientation ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_upright_everywhere(kind, orientation, tmp_path):
    stored = photograph((96, 64))
    data = encoded(stored, kind, exif=exif(orientation), **({} if kind == "TIFF" else {"quality": 100}))
    plain = encoded(stored, kind, **({} if kind == "TIFF" else {"quality": 100}))
    upright = TURNED[orientation](decoded(plain))
    image = EncodedImage(data)
    assert (image.height, image.width) == upright.shape[:2] and np.array_equal(image.decode(), upright)
    evaluated = square_pixels(data, 24, "x").float().numpy()
    assert np.abs(evaluated - TURNED[orientation](earlier(plain, 24).transpose(1, 2, 0)).transpose(2, 0, 1)).max() <= 2
    (tmp_path / "photo").write_bytes(data)
    for given in (data, tmp_path / "photo", str(tmp_path / "photo")):
        served = VLMoImageProcessor(size=24)(given)["pixel_values"][0].numpy()
        assert np.array_equal(served, (evaluated / 255 - PIXELS.mean) / PIXELS.std)
    shown = np.asarray(thumbnail(tmp_path / "photo"))
    assert (
        shown[80, 2].min() == 255 if orientation >= 5 else shown[2, 80].min() == 255
    )  # upright ones have white beside them
    name, kept = usable_image(data, 32)
    small = Image.open(io.BytesIO(kept))
    assert name == "jpg" and small.getexif().get(ExifTags.Base.Orientation) is None
    assert small.size == ((32, 48) if orientation >= 5 else (48, 32))
    name, kept = usable_image(data, 0)
    if kind in ("JPEG", "PNG", "WEBP"):
        assert kept == data  # as it is, with what it says of its orientation
    else:
        assert name == "png" and np.array_equal(decoded(kept), upright)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_draw_on_the_upright_picture(name):
    stored = photograph((120, 80))
    turned = encoded(np.ascontiguousarray(np.rot90(stored)), "PNG", exif=exif(6))
    upright = encoded(stored, "PNG")
    seen, wanted = (np.asarray(TRANSFORMS[name](EncodedImage(d), 32, generator(5))) for d in (turned, upright))
    assert np.array_equal(seen, wanted)


def test_a_turned_jpeg_is_decoded_at_reduced_size():
    image = EncodedImage(encoded(photograph((1203, 901)), "JPEG", exif=exif(6)))
    assert (image.width, image.height) == (901, 1203)
    assert image.decode(2).shape == (301, 226, 3)
    assert difference_hash(image) != difference_hash(EncodedImage(encoded(photograph((1203, 901)), "JPEG")))


@pytest.mark.parametrize("damaged", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM" + b"\xff" * 40, b""])
def test_broken_exif_means_upright(damaged):
    plain = encoded(NOISE, "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(damaged) + 2) + damaged + plain[2:]
    assert np.array_equal(decoded(data), decoded(plain))
    for orientation in (0, 9, 77):
        assert np.array_equal(decoded(encoded(NOISE, "JPEG", exif=exif(orientation))), decoded(plain))


def test_orientation_in_xmp_alone_counts_as_for_pillow():
    plain = encoded(NOISE, "JPEG")
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'
    segment = b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp
    comment = b"\xff\xfe\0\x06abcd"
    assert np.array_equal(decoded(plain[:2] + comment + segment + plain[2:]), np.rot90(decoded(plain), -1))


def test_orientation_of_a_cmyk_jpeg_and_of_a_pillow_image():
    stored = Image.fromarray(photograph((40, 20))).convert("CMYK")
    assert decoded(encoded(stored, "JPEG", exif=exif(6))).shape == (40, 20, 3)
    image = Image.open(io.BytesIO(encoded(photograph((40, 20)), "PNG", exif=exif(6))))
    made = VLMoImageProcessor(size=16)(image)["pixel_values"]
    assert torch.equal(made, VLMoImageProcessor(size=16)(encoded(np.rot90(photograph((40, 20)), -1)))["pixel_values"])


# ---- transparency, palettes, animations ----


def test_transparency_is_on_white():
    colour, alpha = np.full((8, 8, 3), (200, 0, 40), dtype=np.uint8), np.zeros((8, 8), dtype=np.uint8)
    alpha[:4], alpha[4:6] = 255, 128
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    grey = Image.merge("LA", [Image.fromarray(colour[..., 0]), Image.fromarray(alpha)])
    for image, kinds, full in ((rgba, ("PNG", "TIFF"), (200, 0, 40)), (grey, ("PNG",), (200,) * 3)):
        for kind in kinds:
            seen = decoded(encoded(image, kind)).astype(int)
            half = [(c * 128 + 255 * 127) // 255 for c in full]
            assert (seen[:4] == full).all() and abs(seen[4:6] - half).max() <= 1 and (seen[6:] == 255).all()
    seen = decoded(encoded(rgba, "WEBP", lossless=True)).astype(int)
    assert (seen[:4] == (200, 0, 40)).all() and (seen[6:] == 255).all()


def test_transparent_colours_are_white():
    picture = np.array([[10, 20], [10, 30]], dtype=np.uint8)
    wanted = np.array([[255, 20], [255, 30]])
    assert (decoded(encoded(picture, transparency=10)) == wanted[..., None]).all()
    rgb = picture[..., None].repeat(3, 2)
    assert (decoded(encoded(rgb, transparency=(10, 10, 10))) == wanted[..., None]).all()
    palette = Image.fromarray(rgb).quantize(4)
    index = palette.getpixel((0, 0))
    for kind in ("PNG", "GIF"):
        assert (decoded(encoded(palette, kind, transparency=index)) == wanted[..., None]).all()
    several = bytes(128 if i == index else 255 for i in range(4))
    assert (decoded(encoded(palette, transparency=several))[:, 0] == (10 * 128 + 255 * 127) // 255).all()
    wide = picture.astype(np.uint16) * 257
    assert (decoded(png(16, 0, wide, (b"tRNS", struct.pack(">H", 2570)))) == wanted[..., None]).all()
    triple = png(16, 2, wide.repeat(3, 1), (b"tRNS", struct.pack(">HHH", 2570, 2570, 2570)))
    assert (decoded(triple) == wanted[..., None]).all()


def test_of_an_animation_the_first_frame_is_seen():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        seen = decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert abs(seen.astype(int) - (250, 0, 0)).max() <= 6, kind


def test_profiles_are_left_aside():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for kind in ("PNG", "JPEG"):
        assert np.array_equal(decoded(encoded(NOISE, kind, icc_profile=profile)), decoded(encoded(NOISE, kind)))


def test_formats_that_start_programs_are_not_opened():
    with pytest.raises(ValueError, match="no known format"):
        EncodedImage(encoded(NOISE, "EPS"))


# ---- bounds on what a picture may cost ----


def with_scans(data: bytes, more: int, trailing: bytes = b"") -> bytes:
    """A JPEG whose last scan is repeated."""
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * more + data[end:] + trailing


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(mode):
    picture = Image.fromarray(photograph((64, 48))).convert(mode)
    progressive = encoded(picture, "JPEG", progressive=True)
    scans = progressive.count(b"\xff\xda")
    assert 3 < scans <= 20 and np.array_equal(
        decoded(progressive), decoded(with_scans(progressive, 0, b"\xff\xda" * 999))
    )
    thumbnail = b"Exif\0\0" + b"\xff\xda\0\2" * 200
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert np.array_equal(decoded(progressive[:2] + segment + progressive[2:]), decoded(progressive))
    assert decoded(with_scans(progressive, 100 - scans)).shape == (48, 64, 3)
    with pytest.raises(ValueError, match="a JPEG of more than 100 scans, the most that are accepted of 64x48 pixels"):
        EncodedImage(with_scans(progressive, 101 - scans))
    assert usable_image(with_scans(progressive, 200), 0).reason.startswith("image: a JPEG of more than 100 scans")


def test_large_jpegs_may_have_fewer_scans(monkeypatch):
    progressive = encoded(photograph((64, 48)), "JPEG", progressive=True)
    monkeypatch.setattr(transforms, "MAX_SCANNED_PIXELS", 64 * 48 * 12)
    assert decoded(progressive).shape == (48, 64, 3)
    with pytest.raises(ValueError, match="more than 12 scans"):
        EncodedImage(with_scans(progressive, 12))


def test_the_pixels_of_a_plain_jpeg_are_not_looked_through():
    plain = encoded(NOISE, "JPEG", exif=exif(6))
    assert transforms.jpeg_scans(plain, 100) == transforms.jpeg_scans(with_scans(plain, 500), 100) == 1
    with pytest.raises(ValueError, match="not a readable image"):  # the decoders end at the second scan
        decoded(with_scans(plain, 500))


@pytest.mark.parametrize("kind, most", [("JPEG", 100), ("PNG", 50), ("WEBP", 50), ("TIFF", 50), ("JPEG2000", 16)])
def test_formats_that_decode_slowly_may_have_fewer_pixels(monkeypatch, kind, most):
    for name in ("MAX_PIXELS", "OTHER_PIXELS"):
        monkeypatch.setattr(transforms, name, getattr(transforms, name) // 10_000)
    monkeypatch.setitem(transforms.FEWER_PIXELS, "JPEG2000", transforms.FEWER_PIXELS["JPEG2000"] // 10_000)
    side = int((most * 100) ** 0.5)
    assert decoded(encoded(Image.new("RGB", (side, side)), kind)).shape == (side, side, 3)
    with pytest.raises(ValueError, match=f"pixels, at most {most * 100:,} are accepted of {kind}"):
        EncodedImage(encoded(Image.new("RGB", (side + 1, side + 1)), kind))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PPM", "JPEG2000"])
def test_formats_that_shards_do_not_hold_become_png(kind):
    data = encoded(NOISE, kind)
    name, kept = usable_image(data, 0)
    assert name == "png" and kept.startswith(b"\x89PNG") and np.array_equal(decoded(kept), decoded(data))


def test_the_processor_takes_arrays():
    processor = VLMoImageProcessor(size=24)
    wanted = processor(encoded(NOISE))["pixel_values"]
    assert torch.equal(processor(NOISE)["pixel_values"], wanted)
    assert torch.equal(processor([Image.fromarray(NOISE)])["pixel_values"], wanted)
    with pytest.raises(ValueError, match=r"an array of shape \[41, 53, 3\] and type float64; accepted: .* uint8"):
        processor(NOISE / 255)
