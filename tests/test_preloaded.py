"""Forked processes compute with the threads that their environment names, as new interpreters do."""

import pytest
from conftest import start_ranks


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads):
    code = "import torch; print(torch.get_num_threads())"
    (process,) = start_ranks(["-c", code], 1, OMP_NUM_THREADS=str(threads))
    assert process.communicate(timeout=60)[0].strip() == str(threads)
