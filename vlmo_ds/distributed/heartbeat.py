"""Signs of life from long work outside of training steps, for who watches over the ranks (training/watch.py).

Who reads data or evaluates calls `beat` for each piece of work, and `rest` before it waits for other ranks. Nobody has to
listen: in a command of one process both do nothing.
"""

from __future__ import annotations

from collections.abc import Callable

Listener = Callable[[str], None]


def nobody(doing: str) -> None:
    pass


_on_beat: Listener = nobody
_on_rest: Listener = nobody


def listen(on_beat: Listener = nobody, on_rest: Listener = nobody) -> None:
    global _on_beat, _on_rest
    _on_beat, _on_rest = on_beat, on_rest


def beat(doing: str) -> None:
    """This rank begins a piece of work, which may take as long as a training step may."""
    _on_beat(doing)


def rest(doing: str) -> None:
    """This rank waits for others, for as long as one of them gives signs of life."""
    _on_rest(doing)
