"""Seconds that this rank spends in collectives, waiting for the other ranks included.

On a CPU every one is timed. On a GPU, where collectives are queued and the host goes on, events are put around them in those steps
alone that are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

# Of DeepSpeed's back end, through which all of its collectives go.
OPERATIONS = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all_single",
    "barrier",
)

_seconds = 0.0
_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
_inside = False  # a collective that is made of others counts once
last = (0, "none")  # number and name of the collective that this rank is in, or was in last
measured = True  # whether this step's are timed on a GPU


@contextmanager
def timed(name: str, another: bool = True) -> Iterator[None]:
    """Around a collective. another: not one that has begun already."""
    global _seconds, _inside, last
    if _inside:
        yield
        return
    _inside = True
    last = last[0] + another, name
    on_gpu = torch.cuda.is_available()
    started, event = time.perf_counter(), mark() if on_gpu and measured else None
    try:
        yield
    finally:
        _inside = False
        if event is not None:
            _events.append((event, mark()))
        elif not on_gpu:
            _seconds += time.perf_counter() - started


def mark() -> torch.cuda.Event:
    """In the GPU's queue."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Handle:
    """What an asynchronous collective gives, with `wait` on the clock."""

    def __init__(self, handle: Any, name: str):
        self.handle, self.name = handle, name

    def wait(self, *args: Any) -> Any:
        with timed(self.name, another=False):
            return self.handle.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


def on_the_clock(operation: Callable, name: str) -> Callable:
    @wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        with timed(name):
            found = operation(*args, **kwargs)
        return found if found is None else Handle(found, name)

    return call


def watch(backend: Any) -> None:
    """Times the collectives of DeepSpeed's back end (deepspeed.comm.comm.cdb), once."""
    if getattr(backend, "on_the_clock", False):
        return
    backend.on_the_clock = True
    for name in OPERATIONS:
        if callable(operation := getattr(backend, name, None)):
            setattr(backend, name, on_the_clock(operation, name))


def so_far() -> float:
    """Seconds since the last time that `taken` was called, on a CPU."""
    return _seconds


def forget(seconds: float) -> None:
    """Takes them off again."""
    global _seconds
    _seconds -= seconds
    _events.clear()


def taken() -> float:
    """Seconds since the last time that this was asked. On a GPU it waits for what was timed."""
    global _seconds
    found, _seconds = _seconds, 0.0
    if _events:
        _events[-1][1].synchronize()
        found += sum(begin.elapsed_time(end) for begin, end in _events) / 1000
        _events.clear()
    return found
