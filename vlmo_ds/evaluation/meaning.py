"""Captions of the synthetic world judged by what they mean: are the things that they name there, and is what they say true?

A scene's things are in its .json (data/synthetic.py draws and describes them).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlmo_ds.data.synthetic import COLOURS, SHAPES, SIZE_WORDS, TEXTURES, Thing

SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
RELATIONS = ("above", "below", "to the left of", "to the right of")
PLACES = (
    "in the middle",
    r"on the (?:left|right)",
    r"at the (?:top|bottom)",
    r"in the (?:top|bottom) (?:left|right) corner",
)
PHRASE = re.compile(
    rf"\b(?:(?:(?P<size>{'|'.join(SIZE_OF)}) )?(?:(?P<texture>{'|'.join(TEXTURES)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"|(?P<relation>{'|'.join(RELATIONS)})|(?P<place>{'|'.join(PLACES)}))\b"
)


class Said(NamedTuple):
    """What a caption says: the (colour, shape) of every thing that it names, in order, and whether each statement about
    them (size, texture, place, relation) is true."""

    things: list[tuple[str, str]]
    statements: list[bool]


def read(caption: str, scene: Sequence[Thing]) -> Said:
    """A place is said of the thing before it, a relation of the things before and after; of what is not there, nothing is
    true."""
    there = {(thing.colour, thing.shape): thing for thing in scene}
    said = Said([], [])
    pending: list[str] = []  # relations that wait for their second thing
    for phrase in PHRASE.finditer(" ".join(caption.lower().split())):
        if phrase["shape"]:
            name = (phrase["colour"], phrase["shape"])
            thing = there.get(name)
            if phrase["size"]:
                said.statements.append(thing is not None and thing.size == SIZE_OF[phrase["size"]])
            if phrase["texture"]:
                said.statements.append(thing is not None and thing.texture == phrase["texture"])
            if pending:
                before = there.get(said.things[-1]) if said.things else None
                said.statements.extend(holds(before, relation, thing) for relation in pending)
                pending = []
            said.things.append(name)
        elif phrase["place"]:
            thing = there.get(said.things[-1]) if said.things else None
            said.statements.append(thing is not None and thing.place == phrase["place"])
        else:
            pending.append(phrase["relation"])
    said.statements.extend(False for _ in pending)
    return said


def holds(a: Thing | None, relation: str, b: Thing | None) -> bool:
    if a is None or b is None:
        return False
    return {
        "above": a.row < b.row,
        "below": a.row > b.row,
        "to the left of": a.column < b.column,
        "to the right of": a.column > b.column,
    }[relation]


def judge(captions: Sequence[str], scenes: Sequence[Sequence[Thing]]) -> dict[str, float]:
    """Percent: objects/F1 of the things named, statements true, wholly right (every thing named once, every statement
    true). A caption that names nothing of a scene is in all of them as wrong."""
    hits = named = present = true = statements = right = 0
    for caption, scene in zip(captions, scenes, strict=True):
        said = read(caption, scene)
        wanted = Counter((thing.colour, thing.shape) for thing in scene)
        found = Counter(said.things)
        hits += (wanted & found).total()
        named += found.total()
        present += wanted.total()
        true += sum(said.statements)
        statements += len(said.statements)
        right += found == wanted and all(said.statements)
    return {
        "objects/F1": 200.0 * hits / max(named + present, 1),
        "statements true": 100.0 * true / max(statements, 1),
        "wholly right": 100.0 * right / max(len(captions), 1),
        "statements a caption": statements / max(len(captions), 1),
    }


def scene_of(meta: Mapping[str, Any]) -> tuple[Thing, ...]:
    """The things that a sample's .json lists; nothing where it lists none, or things of another world."""
    fields, things = Thing.__dataclass_fields__, meta.get("things", [])
    if any(name not in thing for thing in things for name in fields):
        return ()
    return tuple(Thing(**{name: thing[name] for name in fields}) for thing in things)
