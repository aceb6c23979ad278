"""A machine without a GPU as the device: threads and memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h of the GNU C library


def prepare_cpu() -> None:
    """Splits the cores among the ranks of this machine, and keeps freed memory."""
    if "OMP_NUM_THREADS" not in os.environ:  # the deepspeed launcher sets none: every rank would take all cores
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets freed memory be used again.

    The C library maps every block of more than 32 MB anew and gives it back when it is freed, so that each activation
    of a large model costs its page faults in every step (`benchmarks/step.py --memory kept returned` measures how
    much). Elsewhere than on Linux with the GNU C library memory stays as it is.
    """
    if library := gnu_c_library():
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """On a CPU, in the context: blocks that are freed go back to the system at once, and after it are kept. What building a model leaves
    behind, such as the weights in float32 of one in 16 bits, would be holes between which activations fit badly."""
    library = None if torch.cuda.is_available() else gnu_c_library()
    if library:
        library.mallopt(M_MMAP_MAX, 1 << 16)
        library.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    try:
        yield
    finally:
        if library:
            library.malloc_trim(0)
            keep_freed_memory()


def gnu_c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, AttributeError):
        return None
