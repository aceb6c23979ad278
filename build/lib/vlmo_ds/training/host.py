"""A machine without a GPU as the device: threads and memory."""

from __future__ import annotations

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library


def prepare_cpu() -> None:
    """Splits the cores among the ranks of this machine, and lets freed memory be used again.

    The C library maps every block of more than 32 MB anew and gives it back when it is freed, so that each activation
    of a large model costs its page faults in every step (`benchmarks/step.py --memory kept returned` measures how
    much). Elsewhere than on Linux with the GNU C library memory stays as it is.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # the deepspeed launcher sets none: every rank would take all cores
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
