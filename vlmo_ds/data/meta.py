"""What a sample's .json may hold: checked once, where it is read, so that who uses it need not ask again.

Fields that this project does not know may hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

DEEPEST = 64  # objects and lists within each other; Python's own limit depends on who calls
LARGEST_LABEL = 2**31 - 1


class Rule(NamedTuple):
    """What a field may hold: as a function, and in words."""

    fits: Callable[[Any], bool]
    accepted: str


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def is_id(value: Any) -> bool:
    return -(2**63) <= value < 2**63 if is_whole(value) else is_text(value) and bool(value)


def is_label(value: Any) -> TypeGuard[int]:
    return is_whole(value) and 0 <= value <= LARGEST_LABEL


def is_score(value: Any) -> bool:
    return (is_whole(value) or isinstance(value, float)) and 0 <= value <= 1


def truth(value: Any) -> bool | None:
    """true, false, 1, 0, "True", "false"; None of what is neither true nor false."""
    if is_text(value):
        return {"true": True, "false": False}.get(value.lower())
    return bool(value) if isinstance(value, bool) or (is_whole(value) and value in (0, 1)) else None


TEXT = Rule(is_text, "a text")
TEXTS = Rule(lambda value: is_text(value) or is_list(value, is_text), "a text or a list of texts")
ID = Rule(is_id, "a whole number of 64 bits or a text")
ENTRIES = Rule(lambda value: is_list(value, lambda entry: isinstance(entry, dict)), "a list of objects")
LABELS = Rule(
    lambda value: is_list(value, is_label) and len(set(value)) == len(value),
    "a list of different whole numbers from 0",
)
SAMPLE = {
    "captions": TEXTS,
    "caption": TEXTS,
    "image_id": ID,
    "questions": ENTRIES,
    "sentences": ENTRIES,
    "things": ENTRIES,
    "caption_entries": ENTRIES,
}
QUESTION = {
    "question": TEXT,
    "question_id": ID,
    "labels": LABELS,
    "scores": Rule(lambda value: is_list(value, is_score), "a list of numbers from 0 to 1"),
    "answers": Rule(lambda value: is_list(value, is_text), "a list of texts"),
    "answer_type": TEXT,
}
THING = {
    **dict.fromkeys(("shape", "colour", "size", "texture"), TEXT),
    **dict.fromkeys(("row", "column"), Rule(lambda value: is_whole(value) and 0 <= value < 3, "0, 1 or 2")),
}
CAPTION = {
    "caption": TEXT,
    "source": TEXT,
    "score": Rule(is_score, "a number from 0 to 1"),
    "kept": Rule(lambda value: isinstance(value, bool), "true or false"),
}
SENTENCE = {
    "sentence": TEXT,
    "label": Rule(lambda value: truth(value) is not None, "true or false"),
    "identifier": ID,
    "sentence_id": ID,
}


KINDS = (
    ("questions", QUESTION, "question"),
    ("sentences", SENTENCE, "sentence"),
    ("things", THING, "thing"),
    ("caption_entries", CAPTION, "caption entry"),
)


def parse_json(data: bytes | str) -> Any:
    """What JSON holds. ValueError if it is none, is nested too deeply, or a text in it is no Unicode."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError(f"is nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    level = [found]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                check_unicode(value)
            elif isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
        if not inner:
            return found
        level = inner
    raise ValueError(f"is nested more than {DEEPEST} deep")


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"holds half a surrogate pair, which is no character, in {shown(text)}") from None


def read_meta(data: bytes) -> dict[str, Any]:
    """A sample's .json with what is null left out. ValueError naming the field that cannot be used, and what is accepted."""
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError(f'holds {shown(found)}; accepted: an object such as {{"caption": "a dog"}}')
    found = checked(found, SAMPLE, "")
    for name, rules, what in KINDS:
        if name in found:
            found[name] = [checked(e, rules, f"{what} {n}: ") for n, e in enumerate(found[name], start=1)]
    for number, question in enumerate(found.get("questions", []), start=1):
        labels, scores = question.get("labels"), question.get("scores")
        if labels is not None and scores is not None and len(labels) != len(scores):
            raise ValueError(f"has {len(labels)} labels and {len(scores)} scores in question {number}")
    return found


def checked(found: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> dict[str, Any]:
    known = {name: value for name, value in found.items() if value is not None}
    for name, rule in rules.items():
        if name in known and not rule.fits(known[name]):
            raise ValueError(f"has {where}{name} {shown(known[name])}; accepted: {rule.accepted}")
    return known


def shown(value: Any, most: int = 60) -> str:
    """A value on one line, in ASCII where it would not be printable."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def is_unicode(name: str) -> bool:
    """Whether a name that was read as UTF-8 was: tarfile and the file system put half surrogates for other bytes."""
    return printable(name) == name


def printable(name: str) -> str:
    """A name with what is no UTF-8 in it written out."""
    return name.encode("utf-8", "backslashreplace").decode()
