"""Cornell NLVR v1 (Suhr et al., ACL 2017): rendered pictures of three boxes with sentences that are true or false."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmo_ds.data.order import generator
from vlmo_ds.data.prepare.sources import TarMember, read_json_lines, sample_json, tar_members, usable_image
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected, Sample
from vlmo_ds.data.shards import clean_texts, is_true, stable_id
from vlmo_ds.data.storage import DataError
from vlmo_ds.data.transforms import EncodedImage

KINDS = ("captions", "questions", "pairs", "annotations")
MOST = 9
ANSWERS = ["false", "true", *map(str, range(MOST + 1))]
COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
BOX, BETWEEN = (211, 211, 211), (128, 128, 128)
DESCRIPTIONS, COUNTS, STATEMENTS, EASIER = 4, 4, 4, 2  # captions and questions made up for a picture


def nlvr1(root: Path, splits: Sequence[str], kind: str, augment: bool, resize: int) -> Plan:
    """`<split>.json` and `<split>_images.tar`, six pictures of each example's boxes in all orders.

    kind captions: sentences labelled true with the first picture; questions: every picture with its sentence and the
    answers false and true (as VQA); pairs: every picture and the next one of its example, with the sentence (as NLVR2);
    annotations: every picture with captions that describe it and questions about it, both made of its annotation.
    augment: all pictures for captions too, and each sample in all six exchanges of the three colours. image_id of
    captions is a hash of the picture, as several examples may be about one.
    """
    exchanges = list(itertools.permutations(COLOURS)) if augment else [tuple(COLOURS)]
    items: list[tuple] = []
    for split in splits:
        lines = read_json_lines(root / f"{split}.json", "one example of NLVR v1 a line")
        examples = {e["identifier"]: e for e in lines}
        pictures: dict[str, dict[int, TarMember]] = defaultdict(dict)
        for name, member in tar_members(root / f"{split}_images.tar").items():
            match = re.fullmatch(rf"(?:.*/)?{split}-(\d+-\d+)-(\d)\.png", name)
            if match and match[1] in examples:
                pictures[match[1]][int(match[2])] = member
        if kind == "annotations" and any("structured_rep" not in e for e in lines):
            raise DataError(f"{root / f'{split}.json'}: examples without structured_rep, which --kind {kind} needs")
        made = [made_up(lines, number) for number in range(6)] if kind == "annotations" else []
        for identifier, found in pictures.items():
            example = {k: examples[identifier][k] for k in ("sentence", "label")}
            for number in found:
                if kind == "captions" and not (is_true(example["label"]) and (augment or number == 0)):
                    continue
                members = [found[number]] + ([found[(number + 1) % len(found)]] if kind == "pairs" else [])
                name = f"{split}-{identifier}-{number}"
                if made:
                    example = {**example, **made[number][identifier]}
                items += [(name, members, example, colours) for colours in exchanges]
    extra = {} if kind in ("captions", "pairs") else {"answers.json": json.dumps(ANSWERS).encode()}
    prefix = "nlvr1" if kind == "captions" else f"nlvr1-{kind}"
    return Plan(prefix, items, partial(make, kind=kind, resize=resize), extra)


def make(item: tuple, kind: str, resize: int) -> Made:
    name, members, example, colours = item
    original = colours == tuple(COLOURS)
    pictures = [member.read() if original else recoloured(member.read(), colours) for member in members]
    images = [usable_image(data, resize) for data in pictures]
    if broken := next((image for image in images if isinstance(image, Rejected)), None):
        yield broken
        return
    presentation = "-".join(name.split("-")[:2])
    identifier = name if original else "-".join((name, *colours))
    label, sentence = is_true(example["label"]), renamed(example["sentence"], colours)
    meta: dict[str, Any] = {"image_id": f"nlvr1:{identifier}"}
    if kind == "captions":
        meta = {"image_id": stable_id(pictures[0].hex()), "captions": clean_texts([sentence]), "file": name}
    elif kind == "questions":
        meta["questions"] = [question(sentence, ANSWERS[label], identifier)]
    elif kind == "pairs":
        entry = {"sentence": sentence, "label": str(label), "identifier": identifier, "sentence_id": presentation}
        meta["sentences"] = [entry]
    else:
        meta["captions"] = [renamed(text, colours) for text in example["captions"]]
        asked = enumerate(example["questions"])
        meta["questions"] = [question(renamed(t, colours), answer, f"{identifier}-{n}") for n, (t, answer) in asked]
    if len(images) == 1:
        fields = {images[0][0]: images[0][1]}
    else:
        fields = {f"{number}.{extension}": data for number, (extension, data) in enumerate(images)}
    texts = len(meta.get("captions", [])) or 1
    yield Sample(fields | {"json": sample_json(**meta)}, texts)


def question(text: str, answer: str, identifier: str) -> dict[str, Any]:
    entry = {"question": text, "question_id": identifier, "answers": [answer] * 10}
    return entry | {"labels": [ANSWERS.index(answer)], "scores": [1.0]}


def recoloured(data: bytes, colours: Sequence[str]) -> bytes:
    """The picture with yellow, black and blue exchanged for `colours`; what cannot be decoded stays as it is."""
    try:
        pixels_HW3 = np.array(EncodedImage(data).decode())
    except ValueError:
        return data
    old, new = (np.array([COLOURS[name] for name in names]) - BOX for names in (COLOURS, colours))
    mixed = (pixels_HW3 - np.array(BOX)) @ np.linalg.solve(old, new) + BOX  # linear: edges mix the new colours
    kept = (pixels_HW3 == BETWEEN).all(-1, keepdims=True)
    out = io.BytesIO()
    Image.fromarray(np.where(kept, pixels_HW3, mixed.round().clip(0, 255)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def renamed(sentence: str, colours: Sequence[str]) -> str:
    """The sentence with the words yellow, black and blue exchanged for `colours`."""
    changed = {old: new for old, new in zip(COLOURS, colours, strict=True) if old != new}
    if not changed:
        return sentence
    return re.sub("|".join(changed), lambda m: changed[m[0].lower()], sentence, flags=re.IGNORECASE)


# ---- what an annotation says of a picture, in words ----

Item = dict[str, Any]  # type, color, x_loc and y_loc of the upper left corner, size, in pixels of a box of 100 x 100
Box = list[Item]
Test = Callable[[Any], bool]
# Something that can be counted in boxes: the largest number to ask for, its words for "is" or "are", and the count.
Countable = tuple[int, Callable[[str], str], Callable[[list[Box]], int]]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]
SHAPES = ["square", "triangle", "circle"]


def scene(annotation: Sequence[Sequence[Item]]) -> tuple[bool, list[Box]]:
    """(whether the boxes hold towers or scattered items, the boxes with the names of colours as in sentences)."""
    names = {"#0099ff": "blue"}
    boxes = [[{**i, "color": names.get(i["color"].lower(), i["color"].lower())} for i in box] for box in annotation]
    return all(item["x_loc"] == 40 and item["size"] == 20 for box in boxes for item in box), boxes


def made_up(examples: Sequence[dict[str, Any]], seed: int) -> dict[str, dict[str, list]]:
    """identifier -> captions that describe its boxes, and questions about them as (text, answer).

    A question is how many there are of something, or a statement. Each statement is true of one example and false of
    another of the same sort and is given to both: no statement is more often true than false. The easier ones are what
    training gets a hold on: with the others alone it stays where it is for a long time.
    """
    sorts: dict[bool, list[tuple[str, list[Box]]]] = {True: [], False: []}
    for example in examples:
        towers, boxes = scene(example["structured_rep"])
        sorts[towers].append((example["identifier"], boxes))
    out: dict[str, dict[str, list]] = {e["identifier"]: {"captions": [], "questions": []} for e in examples}
    for towers, found in sorts.items():
        rng, easy = generator(20, seed, int(towers)), generator(21, seed, int(towers))
        templates = TOWERS if towers else SCATTERED
        order = rng.permutation(len(found))
        for this, other in zip(order, np.roll(order, 1), strict=True):
            (name, boxes), (other_name, others) = found[this], found[other]
            out[name]["captions"] += [description(boxes, towers, rng) for _ in range(DESCRIPTIONS)]
            counts: dict[str, str] = {}
            while len(counts) < COUNTS:
                text, answer = how_many(pick(rng, templates), boxes, rng)
                if answer != "0" or rng.random() < 0.1:  # of most things there are none
                    counts[text] = answer
            out[name]["questions"] += counts.items()
            told: dict[str, None] = {}  # a set that keeps its order
            for _ in range(200):
                text, holds = statement(pick(rng, templates), rng)
                if holds(boxes) and not holds(others):
                    told[text] = None
                if len(told) == STATEMENTS:
                    break
            for text in told | dict.fromkeys(easier(boxes, others, towers, easy)):
                out[name]["questions"].append((text, "true"))
                out[other_name]["questions"].append((text, "false"))
    return out


def statement(template: Callable[..., Countable], rng: np.random.Generator) -> tuple[str, Callable[[list[Box]], bool]]:
    most, words, count = template(rng)
    if rng.random() < 0.1:
        what = words("is")
        return f"there is no {what}", lambda boxes: count(boxes) == 0
    n = int(rng.integers(1, most + 1))
    be, number = "is" if n == 1 else "are", pick(rng, [NUMBERS[n], str(n)])
    hows = [(f"exactly {number}", int.__eq__), (f"only {number}", int.__eq__), (f"at least {number}", int.__ge__)]
    how, compare = pick(rng, hows + ([("a", int.__ge__)] * 3 if n == 1 else []))
    return f"there {be} {how} {words(be)}", lambda boxes: compare(count(boxes), n)


def easier(boxes: list[Box], others: list[Box], towers: bool, rng: np.random.Generator) -> list[str]:
    """Statements true of `boxes` and false of `others`: of all boxes, of a box, of something that is there."""
    out: list[str] = []
    described, templates = (described_tower, TOWERS) if towers else (described_items, SCATTERED)
    there = [contents(box, towers) for box in others]
    unlike = [described(box) for box in boxes if contents(box, towers) not in there]
    for _ in range(EASIER):
        everything = description(boxes, towers, rng)
        if set(unlike) & set(everything.split(" ; ")):
            out += [everything, f"there is {pick(rng, unlike)}"]
        for _ in range(50):
            _, words, count = pick(rng, templates)(rng)
            if count(boxes) and not count(others):
                out.append(f"there is a {words('is')}")
                break
    return out


def contents(box: Box, towers: bool) -> tuple:
    """What a description of a box says, in one order."""
    return tuple(upwards(box) if towers else sorted(Counter(map(group, box)).items()))


def how_many(template: Callable[..., Countable], boxes: list[Box], rng: np.random.Generator) -> tuple[str, str]:
    _, words, count = template(rng)
    return f"how many {words('are')} are there", str(min(count(boxes), MOST))


def description(boxes: list[Box], towers: bool, rng: np.random.Generator) -> str:
    """Boxes one after the other in any order, as many as 40 words hold, one at least."""
    parts: list[str] = []
    for number in rng.permutation(len(boxes)):
        part = (described_tower if towers else described_items)(boxes[number])
        if parts and sum(len(p.split()) for p in (*parts, part)) > 40:
            break
        parts.append(part)
    return " ; ".join(parts)


def described_tower(box: Box) -> str:
    colours = upwards(box)
    if len(colours) == 1:
        return f"a tower with one {colours[0]} block"
    first, *middle, last = colours
    return " ".join(["a tower with", first, "at the base", *(f"then {c}" for c in middle), "and", last, "at the top"])


def described_items(box: Box) -> str:
    parts = []
    for (colour, shape, touching), n in Counter(map(group, box)).items():
        what = f"{NUMBERS[n]} {colour} {plural(shape, 'is' if n == 1 else 'are')}"
        parts.append(f"{what} touching the wall" if touching else what)
    return f"a box with {' , '.join(parts)}"


def group(item: Item) -> tuple[str, str, bool]:
    return item["color"], item["type"], any(touches(item))


def pick(rng: np.random.Generator, choices: Sequence) -> Any:
    return choices[int(rng.integers(len(choices)))]


def plural(noun: str, be: str) -> str:
    return noun if be == "is" else f"{noun}es" if noun.endswith("x") else f"{noun}s"


def touches(item: Item) -> tuple[bool, bool, bool]:
    """Whether an item touches a side, the upper or the lower edge."""
    side = item["x_loc"] <= 1 or item["x_loc"] + item["size"] >= 99
    return side, item["y_loc"] <= 1, item["y_loc"] + item["size"] >= 99


def upwards(box: Box) -> list[str]:
    return [item["color"] for item in sorted(box, key=lambda item: -item["y_loc"])]


def sort_of_item(rng: np.random.Generator, place: bool) -> tuple[str, str, Test]:
    """("yellow circle", "touching the wall", test of an item)."""
    colour, shape = pick(rng, [None, *COLOURS, *COLOURS]), pick(rng, [None, *SHAPES])
    noun, where, there = shape or pick(rng, ["item", "object"]), "", lambda item: True
    if place:
        where, there = pick(
            rng,
            [
                (f"touching the {pick(rng, ['wall', 'edge', 'side'])}", lambda item: any(touches(item))),
                ("not touching any edge", lambda item: not any(touches(item))),
                (f"touching the {pick(rng, ['base', 'bottom'])}", lambda item: touches(item)[2]),
                ("touching a corner", lambda item: touches(item)[0] and any(touches(item)[1:])),
            ],
        )

    def test(item: Item) -> bool:
        return colour in (None, item["color"]) and shape in (None, item["type"]) and there(item)

    return f"{colour} {noun}" if colour else noun, where, test


def loose_items(rng: np.random.Generator, place: bool) -> Countable:
    what, where, test = sort_of_item(rng, place)
    return (
        4,
        lambda be: f"{plural(what, be)} {where}".strip(),
        lambda boxes: sum(test(item) for box in boxes for item in box),
    )


def boxes_with(rng: np.random.Generator, about: Callable[..., tuple[str, Test]], noun: str) -> Countable:
    text, test = about(rng)
    return pick(rng, [1, 1, 3]), lambda be: f"{plural(noun, be)} with {text}", lambda boxes: sum(map(test, boxes))


def number_of(rng: np.random.Generator, most: int, what: str, size: Callable[[Box], int]) -> tuple[str, Test]:
    n = int(rng.integers(1, most + 1))
    number, noun = pick(rng, [NUMBERS[n], str(n)]), plural(what, "is" if n == 1 else "are")
    return pick(
        rng,
        [
            (f"exactly {number} {noun}", lambda box: size(box) == n),
            (f"only {number} {noun}", lambda box: size(box) == n),
            (f"at least {number} {noun}", lambda box: size(box) >= n),
        ],
    )


def of_colours(rng: np.random.Generator, noun: str) -> tuple[str, Test]:
    colour, other = (str(name) for name in rng.permutation(list(COLOURS))[:2])
    return pick(
        rng,
        [
            (f"{noun} of only one color", lambda box: len(set(upwards(box))) == 1),
            (f"only {colour} {noun}", lambda box: set(upwards(box)) == {colour}),
            (f"{noun} of all 3 different colors", lambda box: len(set(upwards(box))) == 3),
            (f"{noun} of only {colour} and {other} color", lambda box: set(upwards(box)) == {colour, other}),
        ],
    )


def about_box(rng: np.random.Generator) -> tuple[str, Test]:
    which = int(rng.integers(4))
    if which == 0:
        return of_colours(rng, "items")
    if which == 1:
        return number_of(rng, 7, "item", len)
    (what, where, test), (second, _, also) = sort_of_item(rng, True), sort_of_item(rng, False)
    if which == 2:
        return f"a {second} and a {what} {where}", lambda box: any(map(test, box)) and any(map(also, box))
    return number_of(rng, 4, second, lambda box: sum(map(also, box)))


def at_end(rng: np.random.Generator) -> tuple[str, str, Test]:
    colour, end = pick(rng, list(COLOURS)), pick(rng, ["base", "top"])
    return colour, end, lambda box: upwards(box)[0 if end == "base" else -1] == colour


def about_tower(rng: np.random.Generator) -> tuple[str, Test]:
    which = int(rng.integers(6))
    colour, end, ends = at_end(rng)
    if which == 0:
        return f"a {colour} block at the {end}", ends
    if which == 1:
        return number_of(rng, 4, "block", len)
    if which == 2:
        upper, lower = pick(rng, list(COLOURS)), colour
        text = f"a {upper} block {pick(rng, ['over', 'above', 'on'])} a {lower} block"
        return text, lambda box: (lower, upper) in itertools.pairwise(upwards(box))
    if which == 3:
        return of_colours(rng, "blocks")
    if which == 4:
        height, high = number_of(rng, 4, "block", len)
        text = f"{height} {pick(rng, ['and', 'with', 'having'])} a {colour} block at the {end}"
        return text, lambda box: high(box) and ends(box)
    return number_of(rng, 3, f"{colour} block", lambda box: upwards(box).count(colour))


def ends_of_towers(rng: np.random.Generator) -> Countable:
    colour, end, ends = at_end(rng)
    return 3, lambda be: f"{colour} {plural('block', be)} as the {end} of a tower", lambda boxes: sum(map(ends, boxes))


def blocks(rng: np.random.Generator) -> Countable:
    colour = pick(rng, list(COLOURS))
    return (
        6,
        lambda be: f"{colour} {plural('block', be)}",
        lambda boxes: sum(upwards(box).count(colour) for box in boxes),
    )


TOWERS: list[Callable[..., Countable]] = [
    *[partial(boxes_with, about=about_tower, noun="tower")] * 3,
    ends_of_towers,
    blocks,
]
SCATTERED: list[Callable[..., Countable]] = [
    *[partial(boxes_with, about=about_box, noun="box")] * 2,
    partial(loose_items, place=False),
    *[partial(loose_items, place=True)] * 2,
]
