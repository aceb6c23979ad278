"""A rank that dies, hangs, fails or goes astray: the others end within a bounded time, and name it and its host."""

import signal
import socket
import time

import pytest
from conftest import start_ranks
from faults.runs import command, wait_for

LIMIT = 8
HOST = socket.gethostname()


def faulty(fault: str, arguments: list[str]) -> None:
    """train_ds.py, in which rank 1 does something wrong in step 3."""
    import os
    import sys

    from vlmo_ds.training import loop
    from vlmo_ds.training.run import main

    make = loop.batches

    def batches(*args):
        for number, batch in enumerate(make(*args)):
            if os.environ["RANK"] == "1" and number == 2:
                if fault == "hang":
                    time.sleep(3600)
                if fault == "error":
                    raise KeyError("no such thing")
                if fault == "astray":
                    batch = {k: v[:-1] if k == "image" else v for k, v in batch.items()}
            yield batch

    loop.batches = batches
    sys.exit(main(arguments))


def start(folder, data, fault="", stage=2):
    arguments = [*command(folder, data, stage=stage, retrieval=None)[1:], "--output_dir", str(folder / "run")]
    arguments += ["--timeout", str(LIMIT)]
    return start_ranks(["-c", f"from faults.test_watch import faulty; faulty({fault!r}, {arguments!r})"], 2)


def ends(processes, within):
    """(statuses, outputs) of processes that have to end in so many seconds."""
    end = time.monotonic() + within
    outputs = [p.communicate(timeout=max(end - time.monotonic(), 0.1))[0] for p in processes]
    return [p.returncode for p in processes], outputs


@pytest.mark.parametrize(
    "number, victim",
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_dies_or_stands_still(tmp_path, synthetic, number, victim):
    processes = start(tmp_path, synthetic)
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, processes)
    processes[victim].send_signal(number)
    codes, outputs = ends([processes[1 - victim]], within=4 * LIMIT)
    processes[victim].kill()
    processes[victim].communicate()
    assert codes == [69], outputs[0][-3000:]
    if victim == 0:
        assert (
            "rank 0 is gone: the job's store at 127.0.0.1:" in outputs[0] or f"rank 0 on {HOST} has not" in outputs[0]
        )
    else:
        assert f"error: rank 0 on {HOST} stops: rank 1 on {HOST} has not been heard of for" in outputs[0]


def test_a_rank_that_hangs(tmp_path, synthetic):
    codes, outputs = ends(start(tmp_path, synthetic, "hang"), within=90)
    assert codes == [69, 69], outputs[0][-3000:]
    assert f"rank 1 on {HOST} hangs: " in outputs[0]
    assert f"s in 'reading the data of step 3 of image', the limit is {LIMIT} s" in outputs[0]


def test_a_rank_that_fails(tmp_path, synthetic):
    codes, outputs = ends(start(tmp_path, synthetic, "error"), within=90)
    assert codes == [69, 1], outputs[0][-3000:]
    assert f"rank 1 on {HOST} ended with KeyError: 'no such thing'" in outputs[0]
    assert "Traceback" in outputs[1]


def test_ranks_that_would_compute_different_things(tmp_path, synthetic):
    """On by default under ZeRO-3, where they would wait for each other for ever; both sides are named."""
    codes, outputs = ends(start(tmp_path, synthetic, "astray", stage=3), within=90)
    assert codes == [1, 1], outputs[0][-3000:]
    for output in outputs:
        assert "RankDivergence: the ranks are about to compute different things:" in output
        assert "rank 0: image, pass 2, tasks mim: image [4, 3, 32, 32] uint8;" in output
        assert "rank 1: image, pass 2, tasks mim: image [3, 3, 32, 32] uint8;" in output
