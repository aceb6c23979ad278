"""One plan per public dataset: reads its on-disk format, lists its items, and makes samples of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmo_ds.data import synthetic
from vlmo_ds.data.order import generator
from vlmo_ds.data.prepare.answers import answer_vocabulary, soft_scores
from vlmo_ds.data.prepare.pictures import ENDINGS, bytes_of
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected, Sample
from vlmo_ds.data.shards import clean_texts, lines, list_shards, stable_id
from vlmo_ds.data.storage import DataError, read_span
from vlmo_ds.data.tokenizer import load_tokenizer
from vlmo_ds.data.transforms import EncodedImage

IMAGE_NAMES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}
JPEG_QUALITY = 95


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar that is not a shard set."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        return read_span(Path(self.tar), self.offset, self.size)


def need(path: Path, what: str) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist: expected {what}")
    return path


def read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(need(path, what).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): expected {what}") from None


def read_json_lines(path: Path, what: str) -> list[dict]:
    try:
        return [json.loads(line) for line in need(path, what).read_bytes().split(b"\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} does not hold one JSON object a line ({error}): expected {what}") from None


def choice(value: str, accepted: Iterable[str], where: str, option: str = "--split") -> str:
    if value not in accepted:
        raise DataError(f"{option}: '{value}' is not in {where}; accepted: {', '.join(accepted)}")
    return value


def held_out(name: str) -> bool:
    """Whether a thing of this name is for testing: one of five, the same ones on every machine."""
    return stable_id(name) % 5 == 0


@contextlib.contextmanager
def shaped(file: Path, what: str) -> Iterator[None]:
    """Names the file whose content is JSON but not of the shape that is read."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{file} is not {what} ({error!r:.200})") from None


def sample_json(**meta) -> bytes:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True).encode(errors="replace")


def first_existing(*paths: Path) -> Path:
    """The first of some paths that exists, else the first."""
    return next((path for path in paths if path.exists()), paths[0])


def usable_image(data: bytes, resize: int) -> tuple[str, bytes] | Rejected:
    """(extension, bytes): as they are if they can be decoded, or with the shorter side reduced to `resize` pixels.

    Formats that shards do not hold (GIF, BMP, TIFF, ...) become PNGs of the pixels that are seen.
    """
    try:
        image = EncodedImage(data)
        shorter = min(image.width, image.height)
        if not resize or shorter <= resize:
            seen = image.decode()
            if data[:2] in IMAGE_NAMES:
                return IMAGE_NAMES[data[:2]], data
            out = io.BytesIO()
            Image.fromarray(seen).save(out, "PNG")
            return "png", out.getvalue()
        width, height = (round(side * resize / shorter) for side in (image.width, image.height))
        out = io.BytesIO()
        image.resized(width, height).save(out, "JPEG", quality=JPEG_QUALITY)
        return "jpg", out.getvalue()
    except (ValueError, OSError) as error:  # the latter where a stripe is too long for a JPEG
        return Rejected(f"image: {error}")


def pair(data: bytes | Path, captions: Iterable[str], resize: int, **meta) -> Made:
    """One image with its captions."""
    captions = clean_texts(text for text in captions if isinstance(text, str))
    content = bytes_of(data) if isinstance(data, Path) else data
    image = content if isinstance(content, Rejected) else usable_image(content, resize)
    if isinstance(image, Rejected):
        yield image
    elif not captions:
        yield Rejected("no caption")
    else:
        yield Sample({image[0]: image[1], "json": sample_json(captions=captions, **meta)}, len(captions))


def karpathy(root: Path, dataset: str, splits: Sequence[str], resize: int) -> Plan:
    """COCO or Flickr30k with Karpathy's split file (`dataset_<name>.json`, in root or root/karpathy).

    One sample per image with all its captions; COCO images lie in root/<filepath>/, Flickr30k's in
    root/flickr30k-images/ or root.
    """
    name = f"dataset_{dataset}.json"
    file = first_existing(root / "karpathy" / name, root / name)
    with shaped(file, "Karpathy's split file"):
        images = read_json(file, "Karpathy's split file")["images"]
        known = sorted({image["split"] for image in images})
        for split in splits:
            choice(split, known, str(file))
        items = [  # COCO's ids are left as they are: VQAv2 is about the same photographs
            (
                i.get("filepath", ""),
                i["filename"],
                int(i["cocoid"]) if "cocoid" in i else f"{dataset}:{i['imgid']}",
                [s["raw"] for s in i["sentences"]],
            )
            for i in images
            if i["split"] in splits
        ]
    return Plan(dataset, items, partial(make_karpathy, root=root, resize=resize))


def make_karpathy(item: tuple, root: Path, resize: int) -> Made:
    folder, filename, image_id, captions = item
    folders = [folder] if folder else ["flickr30k-images", "."]
    path = first_existing(*(root / f / filename for f in folders))
    return pair(path, captions, resize, image_id=image_id, file=filename)


def visual_genome(root: Path, resize: int) -> Plan:
    """Visual Genome region descriptions: root/annotations/region_descriptions.json (or in root), root/images/VG_100K*/."""
    name = "region_descriptions.json"
    file = first_existing(root / "annotations" / name, root / name)
    items = []
    with shaped(file, "Visual Genome's region descriptions"):
        for image in read_json(file, "Visual Genome's region descriptions"):
            regions = image["regions"]
            image_id = image.get("image_id", regions[0]["image_id"] if regions else image.get("id"))
            items.append((int(image_id), [region["phrase"] for region in regions]))
    return Plan("vg", items, partial(make_visual_genome, root=root, resize=resize))


def make_visual_genome(item: tuple, root: Path, resize: int) -> Made:
    image_id, phrases = item
    folders = ("images/VG_100K", "images/VG_100K_2", "VG_100K", "VG_100K_2")
    path = first_existing(*(root / folder / f"{image_id}.jpg" for folder in folders))
    return pair(path, dict.fromkeys(phrases), resize, image_id=f"vg:{image_id}", file=path.name)


def annotated(root: Path, annotations: Path, images: str, prefix: str, resize: int) -> Plan:
    """Conceptual Captions and SBU as ViLT lays them out: a list of [path, caption], and images under images*/*/*.

    Captions are looked up by the whole path, below root or below the images' folder. Of a path from another machine
    the last folder and the name have to fit, and a bare name has to be that of one image alone.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    with shaped(root / annotations, "a list of [path, caption] pairs"):
        for path, text in read_json(root / annotations, "[path, caption] pairs"):
            captions[Path(path).as_posix()].append(text)
    folder = need(root / images, "folders with images")
    endings: dict[str, set[str]] = defaultdict(set)
    for path in captions:
        if not (root / path).exists() and not (folder / path).exists():
            endings["/".join(Path(path).parts[-2:])].add(path)
    files = sorted(folder.glob("*/*"))
    of_name = Counter(file.name for file in files)
    items, used = [], set()
    for file in files:
        short = f"{file.parent.name}/{file.name}"
        found = {path for path in (f"{images}/{short}", short, file.as_posix()) if path in captions}
        alike = [short, file.name] if of_name[file.name] == 1 else [short]
        found = found or next((endings[end] for end in alike if len(endings.get(end, ())) == 1), set())
        if found:
            items.append((f"{images}/{short}", [text for path in sorted(found) for text in captions[path]]))
            used |= found
    items += [(path, texts) for path, texts in captions.items() if path not in used]
    return Plan(prefix, items, partial(make_annotated, root=root, prefix=prefix, resize=resize))


def make_annotated(item: tuple, root: Path, prefix: str, resize: int) -> Made:
    path, captions = item
    texts = dict.fromkeys(text for text in captions if isinstance(text, str))
    return pair(root / path, texts, resize, image_id=f"{prefix}:{path}", file=path)


def coco_captions(annotations: Path, images: Path | None, resize: int) -> Plan:
    """COCO's own captions_*.json with its folder of images: one sample for each image with all its captions.

    images: None for the folder that the file is named after, beside it or beside its folder.
    """
    what = "COCO's captions: 'images' with id and file_name, 'annotations' with image_id and caption"
    captions: dict[int, list[str]] = defaultdict(list)
    items: list[tuple[str | None, Any, list[str]]]
    with shaped(annotations, what):
        content = read_json(annotations, what)
        for entry in content["annotations"]:
            captions[entry["image_id"]].append(entry["caption"])
        items = [(str(i["file_name"]), i["id"], captions.pop(i["id"], [])) for i in content["images"]]
        items += [(None, image_id, texts) for image_id, texts in captions.items()]
    if images is None:
        name = annotations.stem.removeprefix("captions_")
        images = first_existing(annotations.parent.parent / name, annotations.parent / name)
    need(images, "COCO's images, or their folder under --images")
    return Plan(annotations.stem, items, partial(make_coco, images=images, resize=resize))


def make_coco(item: tuple, images: Path, resize: int) -> Made:
    name, image_id, captions = item
    if name is None:
        yield Rejected("captions of an image that is not listed")
        return
    yield from pair(images / name, captions, resize, image_id=image_id, file=name)


def img2dataset(shards: Sequence[str], resize: int, prefix: str, samples: int) -> Plan:
    """img2dataset's WebDataset output, written anew without what cannot be used (LAION, CC3M, CC12M, SBU).

    The shards can also be trained on as they are.
    """
    items = [
        (shard.url, first, min(first + samples, shard.samples))
        for shard in list_shards(shards)
        for first in range(0, shard.samples, samples)
    ]
    return Plan(prefix, items, partial(make_from_shard, resize=resize), items_per_shard=1)


def make_from_shard(item: tuple, resize: int) -> Made:
    url, first, last = item
    (shard,) = list_shards([url])
    for row in range(first, last):
        try:
            raw = shard.read(row)
            data, captions, meta = raw.image, raw.captions, raw.meta
        except DataError as error:
            yield Rejected(str(error).replace(url, "").partition(" ")[2])
            continue
        kept = {k: meta[k] for k in ("url", "image_id", "sha256") if k in meta}
        yield from pair(data, captions, resize, file=raw.key, **kept)


VQA_FILES = {  # split -> images, questions, annotations
    "train": ("train2014", "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
    "val": ("val2014", "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "test": ("test2015", "v2_OpenEnded_mscoco_test2015_questions.json", None),
    "test-dev": ("test2015", "v2_OpenEnded_mscoco_test-dev2015_questions.json", None),
}


Questions = dict[Any, list[dict]]  # by image


def asked(of_image: Questions, wanted: re.Pattern | None) -> Questions:
    """The questions in which the pattern is found, all without one. DataError where it is in none."""
    if wanted is None:
        return of_image
    found = {image: [q for q in entries if wanted.search(str(q["question"]))] for image, entries in of_image.items()}
    found = {image: entries for image, entries in found.items() if entries}
    if not found:
        raise DataError(f"--questions: '{wanted.pattern}' is in none of the questions")
    return found


def vqav2(root: Path, split: str, least: int, resize: int, wanted: re.Pattern | None = None) -> Plan:
    """VQAv2: one sample per image with its questions.

    Answers that the annotators of train and val agreed on at least `least` times form the vocabulary (9: 3,129
    answers), which lies beside the shards as answers.json. Questions none of whose answers is in it are left out.
    """
    choice(split, VQA_FILES, "VQAv2")
    folder, questions, annotations = VQA_FILES[split]
    of_image: dict[int, list[dict]] = defaultdict(list)
    with shaped(root / questions, "VQAv2's questions, or the annotations are not theirs"):
        known = {
            s: read_json(root / file, "VQAv2's annotations")["annotations"]
            for s, (_, _, file) in VQA_FILES.items()
            if file and annotations
        }
        vocabulary = answer_vocabulary((a["multiple_choice_answer"] for s in known for a in known[s]), least)
        labels = {answer: i for i, answer in enumerate(vocabulary)}
        answers = {a["question_id"]: [x["answer"] for x in a["answers"]] for a in known.get(split, [])}
        for q in read_json(root / questions, "VQAv2's questions")["questions"]:
            entry = {"question": q["question"], "question_id": q["question_id"]}
            if annotations:
                entry |= {"answers": answers[q["question_id"]], **soft_scores(answers[q["question_id"]], labels)}
            of_image[int(q["image_id"])].append(entry)
    items = [
        (f"{folder}/COCO_{folder}_{image_id:012d}.jpg", image_id, found)
        for image_id, found in asked(of_image, wanted).items()
    ]
    extra = {"answers.json": json.dumps(vocabulary, ensure_ascii=False).encode()} if annotations else {}
    return Plan(f"vqav2-{split}", items, partial(make_questions, root=root, resize=resize), extra)


def make_questions(item: tuple, root: Path, resize: int) -> Made:
    """One image and its questions; ones without a label in the vocabulary are left out, where labels are known."""
    path, image_id, found = item
    kept = [q for q in found if q.get("labels") != []]
    for _ in range(len(found) - len(kept)):
        yield Rejected("question without an answer in the vocabulary")
    if not kept:
        return
    if path is None:
        yield Rejected("image file missing")
        return
    data = bytes_of(root / path) if isinstance(path, str) else path.read()
    image = data if isinstance(data, Rejected) else usable_image(data, resize)
    if isinstance(image, Rejected):
        yield image
        return
    yield Sample({image[0]: image[1], "json": sample_json(image_id=image_id, questions=kept)}, len(kept))


def easy_vqa(root: Path, split: str, resize: int, wanted: re.Pattern | None = None) -> Plan:
    """easy-VQA: [question, answer, image] triples, <split>_images.tar or <split>/images/, and answers.txt."""
    choice(split, ("train", "test"), "easy-VQA")
    vocabulary = need(root / "answers.txt", "the list of answers").read_text().split()
    labels = {answer: i for i, answer in enumerate(vocabulary)}
    of_image: dict[int, list[dict]] = defaultdict(list)
    file = root / f"{split}_questions.json"
    with shaped(file, "a list of [question, answer, image] triples"):
        for number, (question, answer, image) in enumerate(read_json(file, "[question, answer, image] triples")):
            entry = {"question": question, "question_id": number, "answers": [answer] * 10}
            of_image[image].append(entry | soft_scores([answer] * 10, labels))
    if (root / f"{split}_images.tar").exists():
        stored = tar_members(root / f"{split}_images.tar")
        places: dict[int, Any] = {
            int(Path(name).stem): member for name, member in stored.items() if Path(name).stem.isdecimal()
        }
    else:
        places = {image: f"{split}/images/{image}.png" for image in of_image}
    items = [
        (places.get(image), f"easy_vqa:{split}:{image}", found) for image, found in asked(of_image, wanted).items()
    ]
    extra = {"answers.json": json.dumps(vocabulary).encode()}
    return Plan(f"easy_vqa-{split}", items, partial(make_questions, root=root, resize=resize), extra)


def tar_members(path: Path) -> dict[str, TarMember]:
    """Where the images of a tar lie."""
    with tarfile.open(need(path, "a tar of images")) as tar:
        return {
            info.name: TarMember(str(path), info.offset_data, info.size)
            for info in tar
            if info.isfile() and info.name.lower().endswith((".png", ".jpg", ".jpeg"))
        }


NLVR2_SPLITS = {
    **{split: f"{split}.json" for split in ("train", "dev", "test1")},
    **{
        f"{kind}_{split}": f"{kind}/{kind}_{split}.json"
        for kind in ("balanced", "unbalanced")
        for split in ("dev", "test1")
    },
}


def nlvr2(root: Path, split: str, resize: int) -> Plan:
    """NLVR2: one sample per pair of images with its sentences and labels; members 0.<ext> and 1.<ext> are the images."""
    choice(split, NLVR2_SPLITS, "NLVR2")
    of_pair: dict[str, list[dict]] = defaultdict(list)
    file = root / "nlvr2" / "data" / NLVR2_SPLITS[split]
    items = []
    with shaped(file, "one example of NLVR2 a line"):
        for row in read_json_lines(file, "one example of NLVR2 a line"):
            of_pair[row["identifier"].rpartition("-")[0]].append(row)
        for identifier, rows in of_pair.items():
            base = identifier.split("-")[0]
            folder = f"images/train/{rows[0]['directory']}" if base == "train" else base
            if base != "train" and not (root / base).is_dir() and (root / "images" / base).is_dir():
                folder = f"images/{base}"
            sentences = [{k: r[k] for k in ("sentence", "label", "identifier") if k in r} for r in rows]
            items.append((f"{folder}/{identifier}", identifier, sentences))
    return Plan(f"nlvr2-{split}", items, partial(make_nlvr2, root=root, resize=resize))


def make_nlvr2(item: tuple, root: Path, resize: int) -> Made:
    path, identifier, sentences = item
    fields: dict[str, bytes] = {}
    for number in (0, 1):
        data = bytes_of(root / f"{path}-img{number}.png")
        image = data if isinstance(data, Rejected) else usable_image(data, resize)
        if isinstance(image, Rejected):
            yield image
            return
        fields[f"{number}.{image[0]}"] = image[1]
    yield Sample(fields | {"json": sample_json(image_id=f"nlvr2:{identifier}", sentences=sentences)}, len(sentences))


def image_folder(root: Path, resize: int) -> Plan:
    """ImageNet-style folders: root/<class>/<image>. The class is kept as `label` (its number) and `class`."""
    classes = sorted(p.name for p in need(root, "folders of images, one for each class").iterdir() if p.is_dir())
    if not classes:
        raise DataError(f"{root} holds no folders: expected one for each class, as root/n01440764/*.JPEG")
    items = [
        (str(path.relative_to(root)), label, name)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    # classes lie together on disk: mixed here, so that a shard holds many of them
    mixed = [items[i] for i in generator(0, 15).permutation(len(items))]
    return Plan(root.name or "images", mixed, partial(make_labelled, root=root, resize=resize))


def make_labelled(item: tuple, root: Path, resize: int) -> Made:
    path, label, name = item
    data = bytes_of(root / path)
    image = data if isinstance(data, Rejected) else usable_image(data, resize)
    if isinstance(image, Rejected):
        yield image
        return
    yield Sample({image[0]: image[1], "json": sample_json(label=label, **{"class": name}, file=path)}, 0)


def text(inputs: Sequence[Path], words: int, tokenizer: str | None, max_text_len: int, samples: int) -> Plan:
    """Plain text (Wikipedia, BookCorpus): consecutive sentences of a paragraph, a line, are packed into samples.

    A sample has at most `words` words, or with a tokenizer at most max_text_len word pieces, [CLS] and [SEP] included.
    """
    limit, step = (max_text_len - 2, 5) if tokenizer else (words, 6)
    items = [part for path in inputs for part in text_parts(need(path, "a text file"), samples * limit * step)]
    return Plan("text", items, partial(make_text, limit=limit, tokenizer=tokenizer), items_per_shard=1)


def text_parts(path: Path, size: int) -> list[tuple[str, int, int]]:
    """(path, start, end) of parts of about `size` bytes that end at the ends of lines."""
    parts, start, total = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while start < total:
            file.seek(min(start + size, total))
            file.readline()
            parts.append((str(path), start, file.tell()))
            start = file.tell()
    return parts


def make_text(item: tuple, limit: int, tokenizer: str | None) -> Made:
    path, start, end = item
    pieces = word_counter(tokenizer) if tokenizer else None
    for line in lines(read_span(Path(path), start, end - start).decode("utf-8", "replace")):
        line = "".join(clean_texts([line]))
        if not line or re.fullmatch(r"(= ?)+.*( ?=)+", line):  # a heading of Wikipedia text
            continue
        packed: list[str] = []
        filled = 0
        for sentence in re.split(r"(?<=[.!?]) ", line):
            for words, size in split_words(sentence.split(), limit, pieces):
                if packed and filled + size > limit:
                    yield from write_text([" ".join(packed)])
                    packed, filled = [], 0
                packed += words
                filled += size
        yield from write_text([" ".join(packed)])


_counters: dict[str, PreTrainedTokenizerBase] = {}


def word_counter(name: str):
    """Words -> number of pieces of each; the tokenizer is loaded once in a process."""
    if name not in _counters:
        _counters[name] = load_tokenizer(name)
    tokenizer = _counters[name]

    def count(words: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]]

    return count


def split_words(words: list[str], limit: int, pieces) -> list[tuple[list[str], int]]:
    """A sentence in parts of at most `limit` words or pieces, with their sizes."""
    sizes = pieces(words) if pieces and words else [1] * len(words)
    parts: list[tuple[list[str], int]] = []
    part: list[str] = []
    filled = 0
    for word, size in zip(words, sizes, strict=True):
        if part and filled + size > limit:
            parts.append((part, filled))
            part, filled = [], 0
        part.append(word)
        filled += size
    return [*parts, (part, filled)] if part else parts


def write_text(texts: Iterable[str]) -> Made:
    for words in texts:
        if len(words.split()) < 3:
            yield Rejected("fewer than three words")
        else:
            yield Sample({"txt": words.encode(errors="replace")}, 1)


def synthetic_pairs(split: str, train: int, held_out: int, seed: int, size: int, things: int = 3) -> Plan:
    """Scenes of the synthetic world with at most so many things, with four captions each (one, for held-out scenes)."""
    held, trained = synthetic.scenes(seed, held_out, train)
    scenes = trained if split == "train" else held
    items = [(number, scene) for number, scene in enumerate(scenes) if len(scene) <= things]
    name = split if things > 1 else "one"
    return Plan(name, items, partial(make_scene, split=split, seed=seed, size=size))


def make_scene(item: tuple, split: str, seed: int, size: int) -> Made:
    number, scene = item
    rng = generator(seed, 12 if split == "train" else 13, number)
    image = synthetic.jpeg(synthetic.render(scene, rng, size))
    captions = [synthetic.describe(scene, rng) for _ in range(4 if split == "train" else 1)]
    yield scene_sample(scene, image, captions, f"{seed}:{split}:{number}")


def scene_sample(scene: synthetic.Scene, image: bytes, captions: list[str], name: str, **more: str) -> Sample:
    """name: what the image's id is made of; more: of the .json."""
    things = [dataclasses.asdict(thing) for thing in scene]
    meta = sample_json(captions=captions, image_id=stable_id(name), things=things, **more)
    return Sample({"jpg": image, "json": meta}, len(captions))


def synthetic_web(
    kind: str, human: int, web: int, exchanged: float, held_out: int, seed: int, size: int, things: int = 3
) -> Plan:
    """Scenes of the synthetic world with at most so many things, with one caption each: of people, or of the web, where a share of the
    captions has changed places among its images. No scene is in both, or held out."""
    _, trained = synthetic.scenes(seed, held_out, human + web)
    first, count = (0, human) if kind == "human" else (human, web)
    caption_of = np.arange(first, first + count)
    if kind == "web":
        rng = generator(seed, 15)
        moved = rng.permutation(count)[: round(exchanged * count)]
        caption_of[moved] = caption_of[np.roll(moved, 1)]
    items = [(first + n, trained[first + n], int(of), trained[of]) for n, of in enumerate(caption_of)]
    items = [item for item in items if len(item[1]) <= things]
    return Plan(kind if things > 1 else "one", items, partial(make_web_scene, kind=kind, seed=seed, size=size))


def make_web_scene(item: tuple, kind: str, seed: int, size: int) -> Made:
    number, scene, caption_number, caption_scene = item
    image = synthetic.jpeg(synthetic.render(scene, generator(seed, 12, number), size))
    caption = synthetic.describe(caption_scene, generator(seed, 16, caption_number))
    yield scene_sample(scene, image, [caption], f"{seed}:train:{number}", source=kind)


def synthetic_text(count: int, seed: int) -> Plan:
    rng = generator(seed, 14)
    return Plan("text", [synthetic.sentence(rng) for _ in range(count)], make_sentence)


def make_sentence(item: str) -> Made:
    yield Sample({"txt": item.encode()}, 1)
