"""Emoji as packages of the npm registry hold them: one picture of each in every style of drawing, names in about 150 languages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlmo_ds.data.prepare.sources import choice, held_out, need, pair, read_json, shaped
from vlmo_ds.data.prepare.writer import Made, Plan
from vlmo_ds.data.storage import DataError

STYLES = ("google", "twitter", "apple", "facebook")
KINDS = ("names", "keywords", "both")
NAMES = "cldr-annotations-full"
SPLITS = ("all", "train", "test")
SELECTOR = "\ufe0f"  # "draw it as an emoji", which the annotations leave out


def emoji(root: Path, style: str, languages: Sequence[str], kind: str, split: str, resize: int) -> Plan:
    """root/emoji-datasource-<style>/{emoji.json,img/<style>/64/*.png} with root/cldr-annotations-full/annotations/<language>/annotations.json.

    One sample for each emoji that has a name of its own in the first language: flags, keycaps and tones of the skin are composed and
    have none. Captions: names, keywords (those of an emoji joined by commas), or both, of each language. The image_id is made of the
    code points: an emoji has the same in every style. split: of five emoji one is for `test`, drawn by its image_id.
    """
    choice(style, STYLES, "the styles", "--style")
    choice(split, SPLITS, "the splits")
    package = f"emoji-datasource-{style}"
    pictures = need(root / package / "img" / style / "64", f"pictures of the npm package {package}, version 16")
    known = [named_in(root, language) for language in languages]
    file = root / package / "emoji.json"
    items: dict[str, tuple] = {}
    with shaped(file, f"the list of emoji of {package}"):
        for entry in read_json(file, f"the list of emoji of {package}"):
            text = "".join(chr(int(code, 16)) for code in entry["unified"].split("-")).replace(SELECTOR, "")
            image_id = f"emoji:{entry['unified'].lower()}"
            captions = [caption for found in known if text in found for caption in described(found[text], kind)]
            if text in known[0] and (split == "all" or (split == "test") == held_out(image_id)):
                items.setdefault(known[0][text]["tts"][0], (entry["image"], image_id, captions))
    return Plan(f"emoji-{style}", list(items.values()), partial(make, pictures=pictures, resize=resize))


def named_in(root: Path, language: str) -> dict[str, Any]:
    """Emoji -> {tts: [name], default: keywords} of a language."""
    folder = need(root / NAMES / "annotations", f"the unpacked npm package {NAMES}")
    accepted = sorted(path.name for path in folder.iterdir() if (path / "annotations.json").exists())
    choice(language, accepted, NAMES, "--language")
    file = folder / language / "annotations.json"
    with shaped(file, "CLDR's annotations"):
        found = read_json(file, "CLDR's annotations")["annotations"]["annotations"]
        named = {text.replace(SELECTOR, ""): entry for text, entry in found.items() if entry.get("tts")}
    if not named:
        raise DataError(f"{file} has no names: it only says where '{language}' differs from another language")
    return named


def described(entry: dict[str, Any], kind: str) -> list[str]:
    keywords = [", ".join(entry.get("default", ()))] if kind != "names" else []
    return [*(entry["tts"][:1] if kind != "keywords" else ()), *filter(None, keywords)]


def make(item: tuple, pictures: Path, resize: int) -> Made:
    name, image_id, captions = item
    yield from pair(pictures / name, captions, resize, image_id=image_id, file=name)
