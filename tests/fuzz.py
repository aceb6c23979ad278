"""A seeded mutator of bytes and of JSON-like values, and a loop that holds a reader to its errors, its time and its memory.

    fuzz(2000, seed, lambda rng: mutated(data, rng), read, DataError)

calls read(input) for so many inputs; anything but a result or the given errors, more than the SECONDS for one of them, or
a process that grows by more than BYTES is a failure, whose message has the number of the mutation and the input.
"""

from __future__ import annotations

import copy
import random
import resource
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest

# Of one input, by the clock of each kind: the machine may be shared, and a picture of 50 million pixels takes 7 s.
SECONDS = {signal.ITIMER_PROF: 60.0, signal.ITIMER_REAL: 600.0}
BYTES = 2 << 30  # a picture of 100 million pixels, the most that is decoded, takes up to 1.6 GB

# Where readers break: bounds of integers, what is no number, text that is none, and what other formats mean something by.
ODD_TOKENS = [
    b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\r", b"\n", b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\xbd", b"\xef\xbb\xbf",
    b"\\ud83d", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"-1", b"18446744073709551615", b"9" * 400,
    b"[" * 300, b"{\"a\":" * 300, b"{}", b"[]", b'""', b'"', b",", b":", b"../", b"&a [*a,*a]", b"!!python/name:os.system", b"%s{0}",
]  # fmt: skip
NESTED: Any = 1
for _ in range(200):
    NESTED = [NESTED]
ODD_VALUES = [
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e300, 1e-320, float("nan"), float("inf"), 2**31, 2**63, 2**64 - 5, -(2**63) - 1, 10**400,
    "", " ", "a", "\0", "a dog \ud83d", "\u2028", "9" * 400, "x" * 5000, "nan", "1e999", "*", "..", "true",
    [], {}, [None], [[]], [True], [1, 1], [-1], ["a", None], {"a": None}, {"": {}}, NESTED,
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four changes: of a bit, a byte or a stretch of them."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64, 512)))
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(end - at) + data[end:]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:at] + data[at:end] * rng.choice((2, 2, 3, 50)) + data[end:]
        elif kind == 4:
            data = data[:at] + rng.choice(ODD_TOKENS) + data[at:]
        elif kind == 5:
            token = rng.choice(ODD_TOKENS)
            data = data[:at] + token + data[at + len(token) :]
        elif kind == 6:
            data = data[:at]
        else:
            other = rng.randrange(len(data) + 1)
            data = data[:at] + data[other : other + end - at] + data[end:]
    return data


def mutated_value(value: Any, rng: random.Random) -> Any:
    """Nested lists and dicts with one to three changes of a value, a key or an entry."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(places_in(value))
        if not places:
            return rng.choice(ODD_VALUES)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice([str(key) + "x", "", "\ud83d", "caption", "shards"])] = holder.pop(key)
        elif kind == 2:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at])
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def places_in(value: Any) -> Any:
    """(dict or list, key or number) of everything in it."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from places_in(inner)


class TooLong(BaseException):
    """Not an Exception: readers that catch those have to be found as well."""


def fuzz(
    count: int, seed: int, make: Callable[[random.Random], Any], read: Callable[[Any], Any], *accepted: type[Exception]
) -> None:
    """Each input is a function of the seed and its number alone."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    peak = peak_bytes()
    try:
        for number in range(count):
            given = make(random.Random(f"{seed}:{number}"))
            for clock, seconds in SECONDS.items():
                signal.setitimer(clock, seconds)
            try:
                try:
                    read(given)
                except accepted as error:
                    str(error).encode()  # it can be printed
            except (Exception, TooLong):
                pytest.fail(f"mutation {number} of seed {seed}: {repr(given)[:2000]}\n{traceback.format_exc()[-3000:]}")
            finally:
                for clock in SECONDS:
                    signal.setitimer(clock, 0)
            if peak_bytes() - peak > BYTES:
                pytest.fail(
                    f"mutation {number} of seed {seed} took {peak_bytes() - peak:,} bytes: {repr(given)[:2000]}"
                )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
