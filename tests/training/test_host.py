import subprocess
import sys

import pytest

from vlmo_ds.training.host import gnu_c_library

SCRIPT = """
import contextlib, re, sys
from pathlib import Path
import torch
from vlmo_ds.training.host import freed_memory_returned, prepare_cpu

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

prepare_cpu()
before = resident()
with freed_memory_returned() if sys.argv[1] == "returned" else contextlib.nullcontext():
    kept = [torch.ones(1 << 18) for _ in range(200)][::2]
built = resident() - before
torch.ones(1 << 24)
print(built, resident() - before - built)
"""


@pytest.mark.skipif(
    gnu_c_library() is None, reason="how memory is returned is set in the GNU C library, which is not here"
)
@pytest.mark.parametrize(("memory", "megabytes"), [("returned", 100), ("kept", 200)])
def test_memory_freed_while_a_model_is_built_is_returned_and_later_kept(memory, megabytes):
    """A hundred blocks of 1 MB are freed between a hundred others; then 64 MB are taken and freed."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, memory], check=True, capture_output=True, text=True)
    built, later = (float(number) for number in done.stdout.split())
    assert built == pytest.approx(megabytes, abs=20)
    assert later == pytest.approx(64, abs=10)
