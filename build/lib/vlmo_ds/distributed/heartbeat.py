"""Signs of life, for who watches over the ranks (training/watch.py).

Who reads data, trains or evaluates calls `beat` for each piece of work; what waits for other ranks is `waiting`. Nobody has to
listen: in a command of one process both do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[str, bool], None]


def nobody(doing: str, waits: bool) -> None:
    pass


_listener: Listener = nobody
_doing = "starting"


def listen(listener: Listener = nobody) -> None:
    """listener: called with what this rank does, and whether it only waits for others."""
    global _listener
    _listener = listener


def beat(doing: str) -> None:
    """This rank begins a piece of work, which may take as long as a training step may."""
    global _doing
    _doing = doing
    _listener(doing, False)


@contextlib.contextmanager
def waiting(for_what: str = "waiting for the other ranks") -> Iterator[None]:
    """This rank waits, for as long as another one gives signs of life; then it goes on with what it did."""
    _listener(for_what, True)
    yield
    _listener(_doing, False)
