"""How far long work is: a bar on a terminal, else a line every half minute, without carriage returns."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY = 30.0  # seconds


class Progress:
    """Counts work that is done. done: by an earlier call; silent: says nothing."""

    def __init__(self, what: str, total: int | None = None, unit: str = "", done: int = 0, silent: bool = False):
        self.what, self.total, self.unit, self.silent = what, total, unit, silent
        self.first = self.done = done
        self.began = self.told = time.monotonic()
        on_terminal = sys.stderr.isatty() and not silent
        self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}") if on_terminal else None

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif not self.silent and time.monotonic() - self.told > LINE_EVERY:
            self.told = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        text = f"{self.what}: {self.done:,}"
        if self.total:
            left = (time.monotonic() - self.began) / (self.done - self.first) * (self.total - self.done)
            text += f" of {self.total:,} {self.unit}, {int(left) // 60}:{int(left) % 60:02d} left"
        return text

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif not self.silent and (self.told == self.began or time.monotonic() - self.told > LINE_EVERY):
            seconds = int(time.monotonic() - self.began)
            print(
                f"{self.what}: {self.done:,} {self.unit} in {seconds // 60}:{seconds % 60:02d}",
                file=sys.stderr,
                flush=True,
            )


def progress(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "", silent: bool = False
) -> Iterator[T]:
    """The items, with word of how many have been taken."""
    shown = Progress(
        what, total if total is not None else len(items) if isinstance(items, Sized) else None, unit, silent=silent
    )
    try:
        for item in items:
            yield item
            shown.advance()
    finally:
        shown.close()
