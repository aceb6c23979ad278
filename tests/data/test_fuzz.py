"""Whatever samples, pictures, tars, indexes and recipes hold: a result, a DataError or a RecipeError, soon."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import reads, tiny_recipe
from data.files import jpeg, png, write_tar
from data.test_pictures import NOISE, RAMP, encoded, exif
from data.test_stream import TOKENIZER
from fuzz import fuzz, mutated, mutated_value
from PIL import Image

from vlmo_ds.config import DataConfig, RecipeError
from vlmo_ds.data.index import INDEX, dump_index
from vlmo_ds.data.inspect import Findings
from vlmo_ds.data.loader import BatchDataset, collate, spec_for
from vlmo_ds.data.order import Place, generator
from vlmo_ds.data.prepare.sources import usable_image
from vlmo_ds.data.shards import RawSample, Shard, list_shards, read_index, scanned
from vlmo_ds.data.storage import DataError, Storage
from vlmo_ds.data.transforms import TRANSFORMS, EncodedImage
from vlmo_ds.evaluation import nlvr2, vqa, zero_shot
from vlmo_ds.evaluation.runs import square_pixels
from vlmo_ds.recipe_file import parse_recipe

COUNTS = [2000, pytest.param(50_000, marks=pytest.mark.long)]
QUESTION = {"question": "is it red?", "question_id": 7, "labels": [0, 3], "scores": [1, 0.3], "answers": ["yes"] * 10}
SENTENCE = {"sentence": "both are red", "label": "True", "identifier": "dev-0-0-1"}
META = {
    "caption": "a dog", "captions": ["a dog on grass", "a cat"], "image_id": 42, "label": 1, "class": "dog", "url": "http://a/b",
    "questions": [QUESTION, {**QUESTION, "answer_type": "other"}], "sentences": [SENTENCE, {**SENTENCE, "sentence_id": "a"}],
    "exif": {"a": [1, {"b": None}]}, "similarity": 0.25,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged pictures; of truncated shards
        yield


def dataset(where: Path, *tasks: str, **changes) -> BatchDataset:
    data = DataConfig(**{"shards": [str(where)], "lanes": 4, "transform": "square_transform", **changes})
    spec = spec_for(reads(*tasks), 32, 8, 20, 3, answers=4)
    return BatchDataset(data, spec, TOKENIZER, rank=0, world_size=1, batch_size=4)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Shard:
    folder = tmp_path_factory.mktemp("fuzz")
    members = {}
    for i in range(4):
        members |= {f"{i}.jpg": jpeg(colour=(i, 2, 3)), f"{i}.0.png": png(), f"{i}.1.png": png(), f"{i}.txt": b"a dog"}
        members[f"{i}.json"] = json.dumps({**META, "image_id": i}).encode()
    write_tar(folder / "a.tar", members)
    return list_shards([str(folder)])[0]


@pytest.mark.parametrize("count", COUNTS)
def test_members_of_a_sample(shard, count):
    sets = [dataset(Path(shard.url).parent, *tasks) for tasks in (("itc", "mlm"), ("vqa",), ("nlvr2",), ("textmlm",))]
    fields = shard.read(0).fields

    def make(rng: random.Random) -> dict[str, bytes]:
        changed = dict(fields)
        if rng.random() < 0.8:
            del changed["txt"]
        else:
            changed["txt"] = mutated(b"a dog\non grass\r\n", rng)
        if rng.random() < 0.5:
            changed["json"] = mutated(fields["json"], rng)
        else:
            changed["json"] = json.dumps(mutated_value(META, rng), ensure_ascii=rng.random() < 0.5).encode(
                errors="surrogatepass"
            )
        if rng.random() < 0.2:
            changed["cls"] = mutated(b"12\n", rng)
        return changed

    def read(changed: dict[str, bytes]) -> None:
        raw = RawSample(shard, "key", changed)
        attempt(lambda: raw.meta)
        for texts in (lambda: raw.captions, lambda: raw.texts, lambda: raw.asked):
            attempt(lambda texts=texts: [text.encode() for text in texts()])
        data = sets[len(changed["json"]) % len(sets)]
        attempt(lambda: collate([data.make(raw, Place(0, 1, 0, 0))], 20))
        attempt(lambda: zero_shot.label_of(raw, ["cat", "dog"]))
        attempt(lambda: raw.label_below(3))
        attempt(lambda: [vqa.accuracy("yes", e["answers"]) for e in vqa.read(raw)[1] if e.get("answers")])
        attempt(
            lambda: nlvr2.scores(
                [{**e, "identifier": str(e["identifier"]), "predicted": True} for e in nlvr2.read(raw)[1]]
            )
        )
        attempt(lambda: Findings().look_at(raw, "a.tar", 0))

    fuzz(count, 1, make, read, DataError)


def attempt(action) -> None:
    try:
        action()
    except DataError as error:
        str(error).encode()  # it can be printed


ICON = Image.fromarray(NOISE).resize((20, 13))
PICTURES = [
    encoded(ICON, "JPEG", exif=exif(6)),
    encoded(ICON, "JPEG", progressive=True),
    encoded(ICON.convert("CMYK"), "JPEG"),
    encoded(ICON),
    encoded(ICON.quantize(8), transparency=3, exif=exif(5)),
    encoded(RAMP[:8, :20]),
    encoded(ICON.convert("RGBA"), "WEBP"),
    encoded(ICON, "WEBP", save_all=True, append_images=[ICON.rotate(90)], exif=exif(3)),
    encoded(ICON.quantize(8), "GIF", save_all=True, append_images=[ICON.rotate(180).quantize(8)]),
    encoded(RAMP[:8, :20], "TIFF", exif=exif(8)),
    encoded((RAMP[:8, :20] / 65535).astype(np.float32), "TIFF", compression="tiff_lzw"),
    encoded(ICON, "BMP"),
    encoded(ICON, "JPEG2000"),
    encoded(ICON, "AVIF"),
]


@pytest.mark.parametrize("count", COUNTS)
def test_pictures(count):
    names = sorted(TRANSFORMS)

    def read(data: bytes) -> None:
        usable_image(data, 0)
        usable_image(data, 8)
        seen = square_pixels(data, 16, "a.tar:1")
        assert seen.shape == (3, 16, 16)
        image = EncodedImage(data)
        assert image.decode().shape == (image.height, image.width, 3)
        name = names[len(data) % len(names)]
        assert TRANSFORMS[name](EncodedImage(data), 16, generator(1)).size == (16, 16)

    fuzz(count, 2, lambda rng: mutated(rng.choice(PICTURES), rng), read, DataError)


@pytest.mark.parametrize("count", COUNTS)
def test_whole_tars(shard, count, tmp_path):
    original = Path(shard.url).read_bytes()
    write_tar(tmp_path / "pax.tar", {"d\u00e9" * 90 + ".txt": b"a dog", "b.txt": b"a cat", "c.json": b"{}"})
    pax = (tmp_path / "pax.tar").read_bytes().rstrip(b"\0") + bytes(1024)
    file = tmp_path / "a.tar"

    def make(rng: random.Random) -> bytes:
        data = rng.choice((original, pax))
        if rng.random() < 0.7:  # headers, whose sums have to be right to get anywhere
            block = 512 * rng.randrange(len(data) // 512)
            header = bytearray(data[block : block + 512])
            start, end = rng.choice(((0, 100), (124, 136), (124, 136), (156, 157), (156, 157), (345, 500), (386, 512)))
            field = rng.choice(
                (rng.randbytes(end - start), b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7" * 12, b"-1 ", b"LKxgSVDN12")
            )
            at = rng.randrange(len(field)) if end - start == 1 else 0
            header[start:end] = field[at : at + end - start].ljust(end - start, b"\0")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            data = data[:block] + bytes(header) + data[block + 512 :]
        return mutated(data, rng) if rng.random() < 0.5 else data

    def read(data: bytes) -> None:
        file.write_bytes(data)
        old_index = len(data) % 2
        found = Shard(str(file), shard.index, Storage()) if old_index else list_shards([str(file)])[0]
        for row in range(min(found.samples, 4)):
            attempt(lambda row=row: found.read(row).texts)

    fuzz(count, 3, make, read, DataError)


@pytest.mark.parametrize("count", COUNTS)
def test_indexes(shard, count, tmp_path):
    folder = Path(shard.url).parent
    (tmp_path / "a.tar").write_bytes((folder / "a.tar").read_bytes())
    original = json.loads(dump_index({"a.tar": shard.index}))

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutated(json.dumps(original).encode(), rng)
        return json.dumps(mutated_value(original, rng), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")

    def read(data: bytes) -> None:
        (tmp_path / INDEX).write_bytes(data)
        read_index.cache_clear()
        scanned.cache_clear()
        found = dataset(tmp_path, "itc", "mlm", length_bucketing=2, max_bad_fraction=1)
        attempt(lambda: found[0])
        (one,) = found.shards[0]
        for row in range(min(one.samples, 6)):
            attempt(lambda row=row: one.read(row).texts)

    fuzz(count, 4, make, read, DataError)


@pytest.mark.parametrize("count", COUNTS)
def test_recipes(count):
    recipe = tiny_recipe(Path("data"), loss_spike={"factor": 2.0})
    recipe["stages"][0]["data"] = {
        "sources": {"a": {"shards": ["x"], "weight": 2}, "b": {"shards": ["y"]}},
        "mixing": "exact",
    }
    fuzz(count, 5, lambda rng: mutated_value(recipe, rng), lambda value: parse_recipe(value, "r.yaml"), RecipeError)
