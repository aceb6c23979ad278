"""A rank that dies, hangs, fails or goes astray: the others end within a bounded time, and name it and its host."""

import re
import signal
import socket
import time

import pytest
from conftest import start_ranks
from faults.runs import command, wait_for

from vlmo_ds.training.post_mortem import out_of_step

LIMIT = 8
HOST = socket.gethostname()


def faulty(fault: str, arguments: list[str]) -> None:
    """train_ds.py, in which rank 1 does something wrong in step 3."""
    import itertools
    import os
    import sys

    import psutil

    from vlmo_ds.distributed.collector import Collector
    from vlmo_ds.training import loop
    from vlmo_ds.training.run import main

    make = loop.batches

    def batches(*args):
        for number, batch in enumerate(make(*args)):
            if os.environ["RANK"] == "1" and number == 2:
                if fault == "hang":
                    time.sleep(3600)
                if fault == "lock":  # an endless loop in C that never gives up the interpreter's lock
                    sum(itertools.repeat(0))
                if fault == "other collective":
                    Collector().barrier()
                if fault == "loader stopped":
                    for child in psutil.Process().children():
                        child.suspend()
                if fault == "loader dies":
                    psutil.Process().children()[0].kill()
                if fault == "error":
                    raise KeyError("no such thing")
                if fault == "astray":
                    batch = {k: v[:-1] if k == "image" else v for k, v in batch.items()}
            yield batch

    loop.batches = batches
    sys.exit(main(arguments))


def start(folder, data, fault="", stage=2, *settings):
    arguments = [
        *command(folder, data, stage=stage, retrieval=None)[1:],
        "--output_dir",
        str(folder / "run"),
        *settings,
    ]
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
        state = "is stopped (a signal, or a debugger)" if number == signal.SIGSTOP else "is gone"
        cause = evidence(tmp_path, 0, "train_stage")
        assert re.search(rf"its process {processes[1].pid} {re.escape(state)}", cause), cause


def test_a_rank_that_hangs(tmp_path, synthetic):
    codes, outputs = ends(start(tmp_path, synthetic, "hang"), within=90)
    assert codes == [69, 69], outputs[0][-3000:]
    assert f"rank 1 on {HOST} hangs: " in outputs[0]
    assert f"s in 'reading the data of step 3 of image', the limit is {LIMIT} s" in outputs[0]
    cause = evidence(tmp_path, 0, "train_stage")
    assert cause.startswith(f"rank 1 on {HOST} hangs: ") and cause == evidence(tmp_path, 1, "in batches")


def evidence(folder, rank, function):
    """Why the run ended, by its post-mortem, in which the rank's stacks name a function and what it did."""
    found = (folder / "run" / "post_mortem" / f"rank-{rank:05d}.txt").read_text()
    cause = (folder / "run" / "post_mortem" / "cause.txt").read_text().strip()
    assert f"cause: {cause}" in found and "Current thread 0x" in found and function in found, found
    assert re.search(r"^doing: .+, for \d+ s\nlast collective: (?!wrapper)\w+, the \d+th\nprocesses: ", found, re.M), (
        found
    )
    return cause


def test_a_rank_that_holds_the_interpreters_lock(tmp_path, synthetic):
    """No thread of its own can tell anything; a thread of C writes down where it is."""
    processes = start(tmp_path, synthetic, "lock")
    codes, outputs = ends(processes[:1], within=90)
    processes[1].kill()
    processes[1].communicate()
    assert codes == [69], outputs[0][-3000:]
    assert evidence(tmp_path, 0, "train_stage").startswith(f"rank 1 on {HOST} has not been heard of for ")
    stacks = (tmp_path / "run" / "post_mortem" / "rank-00001.txt").read_text()
    assert stacks.startswith("Timeout (0:00:") and "in batches" in stacks and "train_stage" in stacks


def test_a_rank_in_another_collective(tmp_path, synthetic):
    """It and the others wait for ever, each in its own."""
    codes, outputs = ends(start(tmp_path, synthetic, "other collective"), within=120)
    assert set(codes) <= {69, -6}, outputs[0][-3000:]  # gloo itself may give up
    cause = (tmp_path / "run" / "post_mortem" / "cause.txt").read_text()
    if "no rank goes on" in cause:
        assert re.search(
            rf"rank \d on {HOST} is at another collective than the others: \w+, the \d+th, in place of \w+, the \d+th",
            cause,
        )
        evidence(tmp_path, 0, "train_stage")
        evidence(tmp_path, 1, "barrier")


def test_a_loader_process_that_stands_still(tmp_path, synthetic):
    settings = ["stages.image.data.workers=1", "stages.image.data.prefetch=1"]
    codes, outputs = ends(start(tmp_path, synthetic, "loader stopped", 2, *settings), within=90)
    assert codes == [69, 69], outputs[0][-3000:]
    assert evidence(tmp_path, 1, "next_pass").startswith(f"rank 1 on {HOST} hangs: ")
    assert "is stopped" in (tmp_path / "run" / "post_mortem" / "rank-00001.txt").read_text()


def test_a_loader_process_that_dies(tmp_path, synthetic):
    settings = ["stages.image.data.workers=1", "stages.image.data.prefetch=1"]
    codes, outputs = ends(start(tmp_path, synthetic, "loader dies", 2, *settings), within=90)
    assert codes == [69, 1], outputs[0][-3000:]
    assert f"rank 1 on {HOST} ended with RuntimeError: DataLoader worker (pid" in outputs[0]
    assert "killed by signal: Killed" in evidence(tmp_path, 0, "train_stage")


def test_a_good_end_leaves_no_post_mortem_and_a_new_start_keeps_an_old_one(tmp_path, synthetic):
    old = tmp_path / "run" / "post_mortem"
    old.mkdir(parents=True)
    (old / "cause.txt").write_text("rank 7 hangs")
    processes = start(tmp_path, synthetic)
    codes, outputs = ends(processes, within=120)
    assert codes == [0, 0], outputs[0][-3000:]
    assert not old.exists() and (tmp_path / "run" / "post_mortem.before-1" / "cause.txt").read_text() == "rank 7 hangs"


def test_who_is_out_of_step_is_the_one_that_is_not_where_most_are():
    def entries(*places):
        about = {"doing": "step 3 of image", "for": 9.0}
        return [{"host": f"node{rank}", "collective": list(place), **about} for rank, place in enumerate(places)]

    assert out_of_step(entries((7, "all_reduce"), (7, "all_reduce"))) == ""
    assert out_of_step(entries((7, "all_reduce"), (7, "barrier"), (7, "all_reduce"))) == (
        "rank 1 on node1 is at another collective than the others: barrier, the 7th, in place of all_reduce, the 7th; "
        "rank 1 has been 9 s in 'step 3 of image'"
    )
    found = out_of_step(entries((9, "gather"), (7, "all_reduce"), (9, "gather"), (7, "all_reduce"), (9, "gather")))
    assert found.startswith(
        "rank 1 on node1, rank 3 on node3 are at another collective than the others: all_reduce, the 7th"
    )


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
