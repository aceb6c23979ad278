"""Answers of VQA as the official evaluation compares them (https://visualqa.org/evaluation.html)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

# Contractions that annotators write without the apostrophe, as in the official tool; each with two apostrophes is also
# found with one of them missing.
CONTRACTED = """
'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""


def contractions() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # an oddity of the official table
    for word in CONTRACTED.split():
        marks = [i for i, c in enumerate(word) if c == "'"]
        if len(marks) == 1:
            found[word.replace("'", "")] = word
        else:
            found |= {word[:i] + word[i + 1 :]: word for i in marks}
    return found


CONTRACTIONS = contractions()
NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
ARTICLES = {"a", "an", "the"}
PUNCTUATION = [*';/[]"{}()=+\\_-><@`,?!']
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")


def normalize_answer(answer: str) -> str:
    """Lower case, no articles, digits for number words, no punctuation but within numbers, contractions written out."""
    text = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or COMMA_IN_NUMBER.search(answer) else " ")
    text = PERIOD.sub("", text, count=32)  # the official tool passes re.UNICODE, which is 32, as the count
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    words = [CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(words).replace(",", "")


def answer_vocabulary(majority_answers: Iterable[str], least: int) -> list[str]:
    """Normalised answers that occur at least so often, in the order in which they are first seen."""
    counts = Counter(normalize_answer(answer) for answer in majority_answers)
    return [answer for answer, count in counts.items() if count >= least]


def soft_score(count: int) -> float:
    """0.3 for each annotator who gave the answer, at most 1 (with three of ten it is 0.9)."""
    return min(1.0, round(0.3 * count, 1))


def soft_scores(answers: Sequence[str], labels: Mapping[str, int]) -> dict[str, list]:
    """Labels and scores of the answers that are in the vocabulary, in the order in which they are first given."""
    counts = Counter(answers)
    known = [answer for answer in counts if answer in labels]
    return {"labels": [labels[a] for a in known], "scores": [soft_score(counts[a]) for a in known]}
