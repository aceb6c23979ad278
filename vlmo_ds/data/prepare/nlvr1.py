"""Cornell NLVR v1 (Suhr et al., ACL 2017): rendered pictures of three boxes with sentences that are true or false."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
SIDES = ["left", "middle", "right"]
ANSWERS = ["false", "true", *map(str, range(MOST + 1)), *SIDES, "none"]
ORDERS = list(itertools.permutations(range(3)))  # of an example's boxes in its pictures 0 to 5
COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
BOX, BETWEEN = (211, 211, 211), (128, 128, 128)
WHICH, COUNTS, STATEMENTS = 12, 4, 2  # questions made up for a picture; as many statements again that are false


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
    images = []
    for data in pictures:
        image = usable_image(data, resize)
        if isinstance(image, Rejected):
            yield image
            return
        images.append(image)
    presentation = "-".join(name.split("-")[:2])
    identifier = name if original else "-".join((name, *colours))
    label, sentence = is_true(example["label"]), renamed(example["sentence"], colours)
    meta: dict[str, Any] = {"image_id": f"nlvr1:{identifier}"}
    if kind == "captions":
        meta = {"image_id": stable_id(pictures[0].hex()), "captions": clean_texts([sentence]), "file": name}
    elif kind == "questions":
        meta["questions"] = [question(sentence, [ANSWERS[label]], identifier)]
    elif kind == "pairs":
        entry = {"sentence": sentence, "label": str(label), "identifier": identifier, "sentence_id": presentation}
        meta["sentences"] = [entry]
    else:
        meta["captions"] = [renamed(text, colours) for text in example["captions"]]
        asked = enumerate(example["questions"])
        meta["questions"] = [question(renamed(t, colours), a, f"{identifier}-{n}") for n, (t, a) in asked]
    if len(images) == 1:
        fields = {images[0][0]: images[0][1]}
    else:
        fields = {f"{number}.{extension}": data for number, (extension, data) in enumerate(images)}
    texts = len(meta.get("captions", [])) or 1
    yield Sample(fields | {"json": sample_json(**meta)}, texts)


def question(text: str, answers: Sequence[str], identifier: str) -> dict[str, Any]:
    """Ten annotators, who give the right answers in turn."""
    entry = {"question": text, "question_id": identifier, "answers": [answers[n % len(answers)] for n in range(10)]}
    return entry | {"labels": [ANSWERS.index(answer) for answer in answers], "scores": [1.0] * len(answers)}


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


def made_up(examples: Sequence[dict[str, Any]], number: int) -> dict[str, dict[str, list]]:
    """identifier -> captions of an example's picture of this number, and questions about it as (text, answers).

    Captions go through the boxes from left to right. A question is which of the boxes are of some sort, how many there
    are of something, or a statement. A statement is true of one example and false of another and is given to both: none
    is more often true than false. As with the sentences by people, the other one holds the same items in other places
    where there is such an example, so that to count them does not help.
    """
    rng = generator(20, number)
    scenes = {e["identifier"]: scene(e["structured_rep"]) for e in examples}
    out: dict[str, dict[str, list]] = {name: {"captions": [], "questions": []} for name in scenes}
    for name, (towers, boxes) in scenes.items():
        shown = [boxes[place] for place in ORDERS[number]]
        out[name]["captions"] = [in_order(partial(say, towers=towers), shown) for say in (contents, features)]
        out[name]["questions"] = [which(towers, shown, rng) for _ in range(WHICH)]
        out[name]["questions"] += [how_many(towers, shown, rng) for _ in range(COUNTS)]
    for name, other in counterparts(scenes, rng):
        towers, boxes = scenes[name]
        told: set[str] = set()
        for _ in range(200):
            text, holds = statement(pick(rng, TOWERS if towers else SCATTERED), rng)
            if holds(boxes) and not holds(scenes[other][1]) and text not in told and len(told) < STATEMENTS:
                told.add(text)
                out[name]["questions"].append((text, ["true"]))
                out[other]["questions"].append((text, ["false"]))
    return out


def counterparts(scenes: Mapping[str, tuple[bool, list[Box]]], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Each example with another one: of its sentence and of the same items, else of any sentence and the same sort."""
    alike = defaultdict(list)
    for name, (_, boxes) in scenes.items():
        alike[name.split("-")[0], tuple(sorted((i["type"], i["color"], i["size"]) for b in boxes for i in b))].append(
            name
        )
    alone: dict[bool, list[str]] = {True: [], False: []}
    for names in alike.values():
        if len(names) == 1:
            alone[scenes[names[0]][0]] += names
    for names in [*(n for n in alike.values() if len(n) > 1), *alone.values()]:
        order = [names[place] for place in rng.permutation(len(names))]
        yield from zip(order, order[1:] + order[:1], strict=True)


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


def how_many(towers: bool, boxes: list[Box], rng: np.random.Generator) -> tuple[str, list[str]]:
    for _ in range(20):
        _, words, count = pick(rng, TOWERS if towers else SCATTERED)(rng)
        if (found := count(boxes)) or rng.random() < 0.1:  # of most things there are none
            break
    return f"how many {words('are')} are there", [str(min(found, MOST))]


def which(towers: bool, boxes: list[Box], rng: np.random.Generator) -> tuple[str, list[str]]:
    """Of simple sorts as often as of all: without them training does not get a hold on the others."""
    about = pick(rng, (simple_tower, about_tower) if towers else (simple_box, about_box))
    for _ in range(20):
        text, test = about(rng)
        if (found := [side for side, box in zip(SIDES, boxes, strict=True) if test(box)]) or rng.random() < 0.2:
            break
    return f"which is a {'tower' if towers else 'box'} with {text}", found or ["none"]


def in_order(say: Callable[[Box], str], boxes: Sequence[Box]) -> str:
    """What is said of boxes from left to right, of as many as 40 words hold, one at least."""
    parts = [say(boxes[0])]
    for box in boxes[1:]:
        if len(" ".join((*parts, part := say(box))).split()) > 40:
            break
        parts.append(part)
    return " ; ".join(parts)


def contents(box: Box, towers: bool) -> str:
    """A tower's colours from base to top, or the items from left to right."""
    if towers:
        return " ".join(upwards(box))
    items = sorted(box, key=lambda item: item["x_loc"])
    return " ".join(f"{i['color']} {i['type']}{' touching' if any(touches(i)) else ''}" for i in items)


def features(box: Box, towers: bool) -> str:
    if towers:
        colours = upwards(box)
        return f"{several(len(box), 'block')} {colours[-1]} at the top {colours[0]} at the base"
    of_colour, shapes = (Counter(item[what] for item in box) for what in ("color", "type"))
    parts = [several(len(box), "item"), *(f"{NUMBERS[n]} {colour}" for colour, n in of_colour.items())]
    return " ".join([*parts, *(several(n, shape) for shape, n in shapes.items())])


def several(n: int, noun: str) -> str:
    return f"{NUMBERS[n]} {plural(noun, 'is' if n == 1 else 'are')}"


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


def simple_box(rng: np.random.Generator) -> tuple[str, Test]:
    if rng.random() < 0.3:
        return number_of(rng, 7, "item", len)
    what, where, test = sort_of_item(rng, rng.random() < 0.3)
    return f"a {what} {where}".strip(), lambda box: any(map(test, box))


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


def simple_tower(rng: np.random.Generator) -> tuple[str, Test]:
    colour, end, ends = at_end(rng)
    number = int(rng.integers(1, 5))
    return pick(
        rng,
        [
            (f"a {colour} block at the {end}", ends),
            (several(number, "block"), lambda box: len(box) == number),
            (f"a {colour} block", lambda box: colour in upwards(box)),
        ],
    )


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
