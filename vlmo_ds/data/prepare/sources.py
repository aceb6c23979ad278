"""One function per public dataset: reads its on-disk format and yields it into a ShardSetWriter."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

from tqdm import tqdm

from vlmo_ds.data import synthetic
from vlmo_ds.data.order import generator
from vlmo_ds.data.prepare.writer import ShardSetWriter
from vlmo_ds.data.shards import DataError, stable_id
from vlmo_ds.data.transforms import decode


def need(path: Path, what: str) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist: expected {what}")
    return path


def image_problem(data: bytes) -> str | None:
    """Why image bytes cannot be used, or None."""
    try:
        decode(data).load()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def sample_json(**meta) -> bytes:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()


def karpathy(writer: ShardSetWriter, root: Path, dataset: str, splits: list[str]) -> None:
    """COCO or Flickr30k with Karpathy's split file (`dataset_<name>.json`, in root or root/karpathy).

    One sample per image with all its captions; COCO images lie in root/<filepath>/, Flickr30k's in
    root/flickr30k-images/ or root.
    """
    name = f"dataset_{dataset}.json"
    file = next((p for p in (root / "karpathy" / name, root / name) if p.exists()), root / "karpathy" / name)
    images = json.loads(need(file, "Karpathy's split file").read_bytes())["images"]
    known = sorted({image["split"] for image in images})
    for split in splits:
        if split not in known:
            raise DataError(f"--split: '{split}' is not in {file}; accepted: {', '.join(known)}")
    chosen = [image for image in images if image["split"] in splits]
    for image in tqdm(chosen, unit="image", desc=f"{dataset} {'+'.join(splits)}"):
        folders = [image["filepath"]] if "filepath" in image else ["flickr30k-images", "."]
        path = next((p for p in (root / f / image["filename"] for f in folders) if p.exists()), None)
        captions = [" ".join(s["raw"].split()) for s in image["sentences"] if s["raw"].strip()]
        if path is None:
            writer.reject("image file missing")
            continue
        data = path.read_bytes()
        if problem := image_problem(data):
            writer.reject(f"image: {problem}")
        elif not captions:
            writer.reject("no caption")
        else:
            image_id = int(image.get("cocoid", image["imgid"]))
            meta = sample_json(captions=captions, image_id=image_id, file=image["filename"])
            writer.write({path.suffix[1:].lower().replace("jpeg", "jpg"): data, "json": meta}, len(captions))


def nlvr1(writer: ShardSetWriter, root: Path, splits: list[str]) -> None:
    """Cornell NLVR v1 (`<split>.json` and `<split>_images.tar`): sentences labelled true become captions.

    One sample per example: its first image with the sentence. Sentences of one identifier group are about the same
    image only if the images are equal, so image_id is a hash of the picture.
    """
    for split in splits:
        lines = need(root / f"{split}.json", "one JSON object a line").read_text().splitlines()
        sentences = {e["identifier"]: e for e in map(json.loads, lines) if e["label"] == "true"}
        with tarfile.open(need(root / f"{split}_images.tar", "the split's images")) as tar:
            for info in tqdm(tar, unit="image", desc=f"nlvr1 {split}"):
                match = re.fullmatch(rf"(?:.*/)?{split}-(\d+-\d+)-(\d+)\.png", info.name)
                if not match or match[2] != "0" or match[1] not in sentences:
                    continue
                data = tar.extractfile(info).read()
                if problem := image_problem(data):
                    writer.reject(f"image: {problem}")
                    continue
                meta = sample_json(
                    captions=[sentences[match[1]]["sentence"]], image_id=stable_id(data.hex()), file=info.name
                )
                writer.write({"png": data, "json": meta}, 1)


def text(writer: ShardSetWriter, inputs: list[Path], words: int) -> None:
    """Plain text: consecutive sentences of a paragraph are packed into samples of about `words` words."""
    for path in inputs:
        need(path, "a text file")
        for line in tqdm(path.read_text("utf-8", "replace").splitlines(), unit="line", desc=path.name):
            line = " ".join(line.replace("\0", " ").split())
            if not line or re.fullmatch(r"(= ?)+.*( ?=)+", line):  # a heading of Wikipedia text
                continue
            packed: list[str] = []
            for sentence in re.split(r"(?<=[.!?]) ", line):
                for piece in split_words(sentence, words):
                    if packed and len(packed) + len(piece) > words:
                        write_text(writer, packed)
                        packed = []
                    packed += piece
            write_text(writer, packed)


def split_words(sentence: str, words: int) -> list[list[str]]:
    found = sentence.split()
    return [found[i : i + words] for i in range(0, len(found), words)]


def write_text(writer: ShardSetWriter, words: list[str]) -> None:
    if len(words) < 3:
        writer.reject("fewer than three words")
    else:
        writer.write({"txt": " ".join(words).encode()}, 1)


def synthetic_pairs(writer: ShardSetWriter, split: str, train: int, held_out: int, seed: int, size: int) -> None:
    """Scenes of the synthetic world with four captions each (one, for held-out scenes)."""
    held, trained = synthetic.scenes(seed, held_out, train)
    chosen, stream = (trained, 12) if split == "train" else (held, 13)
    for number, scene in enumerate(tqdm(chosen, unit="scene", desc=f"synthetic {split}")):
        rng = generator(seed, stream, number)
        image = synthetic.jpeg(synthetic.render(scene, rng, size))
        captions = [synthetic.describe(scene, rng) for _ in range(4 if split == "train" else 1)]
        meta = sample_json(captions=captions, image_id=stable_id(f"{seed}:{split}:{number}"))
        writer.write({"jpg": image, "json": meta}, len(captions))


def synthetic_text(writer: ShardSetWriter, count: int, seed: int) -> None:
    rng = generator(seed, 14)
    for _ in tqdm(range(count), unit="sentence", desc="synthetic text"):
        writer.write({"txt": synthetic.sentence(rng).encode()}, 1)
