"""Tux Paint's stamps, as Debian packs them: drawings and photographs of things, with a sentence in up to 66 languages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vlmo_ds.data.prepare.sources import choice, first_existing, held_out, need, pair
from vlmo_ds.data.prepare.writer import Made, Plan
from vlmo_ds.data.shards import lines
from vlmo_ds.data.storage import DataError

PLACE = "usr/share/tuxpaint/stamps"
SPLITS = ("all", "train", "test")
ENGLISH = "en"


def stamps(root: Path, languages: Sequence[str], split: str, resize: int) -> Plan:
    """root/usr/share/tuxpaint/stamps, or root: NAME.png with NAME.txt, whose first line is in English and the others LANGUAGE.utf8=SENTENCE.

    One sample for each PNG with a text in one of the languages, whose captions are its sentences in these languages. split: of five
    English sentences one is for `test`, drawn by its letters, so that no sentence is in both; `test` has the first stamp (by path) of each.
    """
    choice(split, SPLITS, "the splits")
    folder = first_existing(need(root, "the unpacked Debian package tuxpaint-stamps-default") / PLACE, root)
    pictures = [path for path in sorted(folder.rglob("*.png")) if path.with_suffix(".txt").exists()]
    if not pictures:
        raise DataError(f"{folder} has no .png with a .txt beside it: expected tuxpaint-stamps-default, unpacked")
    sentences = {path: sentences_of(path.with_suffix(".txt")) for path in pictures}
    accepted = sorted({language for found in sentences.values() for language in found})
    for language in languages:
        choice(language, accepted, str(folder), "--language")
    items, seen = [], set()
    for path, found in sentences.items():
        english = found[ENGLISH].lower()
        tested = held_out(f"stamps:{english}")
        again = tested and english in seen
        if split == "all" or ((split == "test") == tested and not again):
            captions = [found[language] for language in languages if language in found]
            items.append((path.relative_to(folder).as_posix(), captions))
        seen.add(english)
    return Plan("stamps", items, partial(make, folder=folder, resize=resize))


def sentences_of(file: Path) -> dict[str, str]:
    """Language -> sentence."""
    try:
        first, *others = lines(file.read_bytes().decode())
    except ValueError as error:  # not UTF-8, or empty
        raise DataError(f"{file} is not the text of a stamp ({error})") from None
    told = (line.partition(".utf8=") for line in others)
    return {ENGLISH: first.strip(), **{language: text.strip() for language, _, text in told if text.strip()}}


def make(item: tuple, folder: Path, resize: int) -> Made:
    path, captions = item
    yield from pair(folder / path, captions, resize, image_id=f"stamps:{path}", file=path)
