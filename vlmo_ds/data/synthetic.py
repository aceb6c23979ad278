"""A synthetic world: scenes of one to three objects, rendered as images and described in English.

Everything is a pure function of (seed, number). It is the embedded default: a model can be pretrained, evaluated and
looked at on a machine without a network.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vlmo_ds.data.order import generator

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 205, 40),
    "purple": (130, 60, 180),
    "orange": (240, 130, 30),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
SIZES = {"small": 0.11, "large": 0.17}  # half the object's extent over the image's
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
TEXTURES = ("plain", "striped", "dotted")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
BACKGROUNDS = ((244, 244, 240), (225, 232, 240), (60, 64, 72))
SUPERSAMPLE = 2


@dataclass(frozen=True, order=True)
class Thing:
    shape: str
    colour: str
    size: str
    texture: str
    row: int
    column: int

    @property
    def place(self) -> str:
        if self.row == 1 and self.column == 1:
            return "in the middle"
        if self.row == 1:
            return f"on the {COLUMNS[self.column]}" if self.column != 1 else "in the middle"
        if self.column == 1:
            return f"at the {ROWS[self.row]}"
        return f"in the {ROWS[self.row]} {COLUMNS[self.column]} corner"


Scene = tuple[Thing, ...]


def make_scene(rng: np.random.Generator) -> Scene:
    """One to three things in different cells of a 3 x 3 grid, no two of the same shape and colour."""
    things: list[Thing] = []
    cells = rng.permutation(9)
    pairs: set[tuple[str, str]] = set()
    for cell in cells[: int(rng.choice([1, 2, 3], p=[0.2, 0.4, 0.4]))]:
        while True:
            pair = (str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))
            if pair not in pairs:
                break
        pairs.add(pair)
        size, texture = str(rng.choice(list(SIZES))), str(rng.choice(TEXTURES, p=[0.5, 0.25, 0.25]))
        things.append(Thing(*pair, size, texture, int(cell) // 3, int(cell) % 3))
    return tuple(sorted(things))


def scenes(seed: int, held_out: int, train: int) -> tuple[list[Scene], list[Scene]]:
    """(held-out, train) scenes, all different: no training scene is held out."""
    rng = generator(seed, 11)
    found: dict[Scene, None] = {}
    while len(found) < held_out + train:
        found[make_scene(rng)] = None
    ordered = list(found)
    return ordered[:held_out], ordered[held_out:]


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The polygon of a shape of half-extent r around (x, y)."""
    if shape in ("circle", "ring"):
        return [(x + r * math.cos(a), y + r * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False)]
    if shape == "square":
        s = 0.88 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape == "diamond":
        return [(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)]
    if shape == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        return [(x + q * math.sin(i * math.pi / 5), y - q * math.cos(i * math.pi / 5)) for i, q in enumerate(radii)]
    if shape == "cross":
        t = 0.34 * r
        corners = [
            (-t, -r),
            (t, -r),
            (t, -t),
            (r, -t),
            (r, t),
            (t, t),
            (t, r),
            (-t, r),
            (-t, t),
            (-r, t),
            (-r, -t),
            (-t, -t),
        ]
        return [(x + a, y + b) for a, b in corners]
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)  # heart
    return [
        (
            x + r * math.sin(a) ** 3,
            y - r * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 17,
        )
        for a in angles
    ]


def render(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """Draws a scene; rng moves things a little within their cells and picks background, shade and tilt of stripes."""
    canvas = size * SUPERSAMPLE
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    image = Image.new("RGB", (canvas, canvas), background)
    for thing in scene:
        jitter = rng.uniform(-0.035, 0.035, 2)
        x = ((thing.column + 0.5) / 3 + jitter[0]) * canvas
        y = ((thing.row + 0.5) / 3 + jitter[1]) * canvas
        r = SIZES[thing.size] * canvas * rng.uniform(0.94, 1.06)
        shade = rng.uniform(0.9, 1.1)
        colour = tuple(min(255, round(c * shade)) for c in COLOURS[thing.colour])
        stencil = Image.new("L", image.size, 0)
        draw = ImageDraw.Draw(stencil)
        draw.polygon(outline(thing.shape, x, y, r), fill=255)
        if thing.shape == "ring":
            draw.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=0)
        image.paste(paint(image.size, colour, thing.texture, r), mask=stencil)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def paint(size: tuple[int, int], colour: tuple[int, ...], texture: str, r: float) -> Image.Image:
    fill = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(fill)
    light = tuple(round(c + 0.75 * (255 - c)) for c in colour)
    step = max(4, round(r * 0.55))
    if texture == "striped":
        for offset in range(-size[1], size[0], step):
            draw.line((offset, size[1], offset + size[1], 0), fill=light, width=max(2, step // 2))
    elif texture == "dotted":
        dot = max(1.0, step * 0.27)
        for i, y in enumerate(range(0, size[1], step)):
            for x in range(step // 2 * (i % 2), size[0], step):
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=light)
    return fill


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def noun(thing: Thing, rng: np.random.Generator, detail: float) -> str:
    words = []
    if rng.random() < detail:
        words.append(SIZE_WORDS[thing.size][int(rng.integers(2))])
    if thing.texture != "plain" and rng.random() < max(detail, 0.7):
        words.append(thing.texture)
    return " ".join([*words, thing.colour, thing.shape])


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def relation(a: Thing, b: Thing, rng: np.random.Generator) -> str:
    options = []
    if a.row != b.row:
        options.append("above" if a.row < b.row else "below")
    if a.column != b.column:
        options.append("to the left of" if a.column < b.column else "to the right of")
    return options[int(rng.integers(len(options)))]


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One caption: names every thing by colour and shape, and some of size, texture, place and relation."""
    things = [scene[i] for i in rng.permutation(len(scene))]
    style = int(rng.integers(3))
    phrases = [article(noun(t, rng, 0.6)) for t in things]
    if len(things) == 1:
        subject = f"{article(noun(things[0], rng, 1.0))} {things[0].place}"
        return (f"{subject}", f"there is {subject}", f"a picture of {subject}")[style]
    if style == 0:
        placed = [f"{phrase} {t.place}" for phrase, t in zip(phrases, things, strict=True)]
        return enumerate_phrases(placed)
    first = f"{phrases[0]} {relation(things[0], things[1], rng)} {phrases[1]}"
    if len(things) == 2:
        return (first, f"the picture shows {first}")[style - 1]
    tail = f"{phrases[2]} {things[2].place}"
    return (f"{first} and {tail}", f"{tail}, with {first}")[style - 1]


def enumerate_phrases(phrases: list[str]) -> str:
    return ", ".join(phrases[:-1]) + (" and " if len(phrases) > 1 else "") + phrases[-1]


def sentence(rng: np.random.Generator) -> str:
    """A sentence about a scene that is never drawn, for the text-only stage."""
    scene = make_scene(rng)
    caption = describe(scene, rng)
    thing = scene[int(rng.integers(len(scene)))]
    phrase = noun(thing, rng, 0.8)
    style = int(rng.integers(4))
    if style == 0:
        return f"{caption}."
    if style == 1:
        return f"we see {caption}. the {phrase} is {thing.place}."
    if style == 2:
        count = ("one object", "two objects", "three objects")[len(scene) - 1]
        return f"the scene has {count}: {caption}."
    return f"the {thing.shape} {thing.place} is {thing.size} and {thing.colour}; {caption}."
