"""A watch over all ranks: when one dies or hangs, the others stop within a bounded time and say which, and where.

Without it the ranks that are left wait in a collective for as long as its timeout, and then name themselves. Each rank
has a thread that reports to the job's key-value store and looks after its right-hand neighbour alone, so that the store
sees a few requests a second per rank at any number of ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vlmo_ds.distributed import clock, heartbeat
from vlmo_ds.training import post_mortem
from vlmo_ds.training.exit_status import ASKED_TO_STOP, LOST_A_RANK
from vlmo_ds.training.signals import Stopped, StopRequest

MOST_SILENCE = 60.0  # seconds without a report after which a process counts as dead; less with a short limit
MOST_INTERVAL = 1.0  # seconds between two reports
AT_FAULT = 5  # missing reports after which a process counts as dead once a collective has failed
FAILURE, STOP = "failure", "stop"  # keys of the store
# What ranks do together: who takes long over it may be held up by another, which is the one to be named.
BUILDING, GATHERING = "building the model of", "gathering the weights of"
TOGETHER = ("step", "starting", BUILDING, GATHERING)


class Watch:
    """Used as a context around training. limit: seconds that a rank may take between two signs of life; folder: of the run, for what is
    left of one that ends badly."""

    def __init__(self, limit: float, stop: StopRequest, folder: Path):
        self.limit, self.stop, self.folder = limit, stop, folder / post_mortem.FOLDER
        self.silence = min(MOST_SILENCE, limit)
        self.interval = min(self.silence / 10, MOST_INTERVAL)
        self.active = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.active else 0
        self.ranks = dist.get_world_size() if self.active else 1
        self.host = socket.gethostname()
        self.state = (
            "starting",
            time.monotonic(),
            False,
        )  # what the rank does, since when, whether it waits for others
        self.ended = threading.Event()
        self.failed = False  # a collective has failed on this rank
        self.failed_in: tuple[tuple[str, float, bool], str] | None = None  # what it did, and the traceback
        self.round_began = time.monotonic()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        heartbeat.listen(self.note)
        if self.active:
            name = [uuid.uuid4().hex]  # torchrun's store outlives the ranks
            if self.rank == 0:
                post_mortem.prepare(self.folder)
            dist.broadcast_object_list(name)
            self.evidence = post_mortem.PostMortem(self.folder, self.rank)
            self.store = dist.PrefixStore(name[0], self.connect())
            self.report()
            dist.barrier()  # every rank has reported before any looks
            self.round_began = time.monotonic()
            self.thread = threading.Thread(target=self.run, daemon=True)
            self.thread.start()
            threading.Thread(target=self.look_after_store, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        heartbeat.listen()
        if not self.active or self.thread is None:
            return
        if kind is None or kind is Stopped:
            self.state = ("done", time.monotonic(), True)
            with contextlib.suppress(RuntimeError):
                self.report()
        elif is_of_communication(error) and not self.stop.received:  # a launcher stops the ranks that are left itself
            print(
                f"rank {self.rank} on {self.host}: {error}; looking for the rank at fault", file=sys.stderr, flush=True
            )
            self.failed_in = self.state, "".join(traceback.format_exception(error))
            self.state = ("waiting for the rank at fault", time.monotonic(), True)
            self.failed = True
            self.thread.join(3 * self.silence)  # ends the process when it is found
        self.ended.set()
        self.thread.join()
        self.evidence.close()  # a good end; or an error, whose traceback says it all
        if kind is not None and kind is not Stopped and not is_of_communication(error):
            time.sleep(2 * self.interval)  # most errors come to all ranks at once: each ends with its own
            self.tell(error)
            if self.rank == 0:
                time.sleep(2 * self.interval)  # the store is in this process: the others have yet to ask it

    def connect(self) -> dist.Store:
        """A connection of this thread's own: on a shared one it would wait for the main thread's requests."""
        timeout = datetime.timedelta(seconds=self.silence)
        return dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
        )

    # ---- called by the main thread ----

    def note(self, doing: str, waits: bool) -> None:
        """What this rank does next, which may take `limit` seconds; a rank that waits for others may do so for as long as one
        of them gives signs of life (heartbeat's listener)."""
        self.state = (doing, time.monotonic(), waits)

    def tell(self, error: BaseException) -> None:
        """Tells all ranks why this one ends."""
        with contextlib.suppress(RuntimeError):
            message = f"rank {self.rank} on {self.host} ended with {type(error).__name__}: {error}"
            self.store.compare_set(FAILURE, "", message)

    # ---- the threads ----

    def look_after_store(self) -> None:
        """A store whose process stands still answers nothing, and a request to it does not time out."""
        while not self.ended.wait(self.interval):
            if time.monotonic() - self.round_began > self.silence + self.interval:
                self.leave_without_store("no answer")

    def leave_without_store(self, reason: str) -> None:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.leave(f"rank 0 is gone: the job's store at {where} does not answer ({reason})", tell=True)

    def run(self) -> None:
        right = (self.rank + 1) % self.ranks
        seen, changed = None, time.monotonic()
        while not self.ended.wait(self.interval):
            self.round_began = time.monotonic()
            try:
                self.report()
                failure = self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else ""
                if failure and not self.ended.is_set():
                    self.leave(failure)
                self.leave_if_asked()
                found = json.loads(self.store.get(f"rank-{right}"))
            except (RuntimeError, ValueError) as error:
                if self.ended.is_set():
                    return
                self.leave_without_store(str(error).splitlines()[0])
            if found != seen:
                seen, changed = found, time.monotonic()
            silent = time.monotonic() - changed
            who = f"rank {right} on {found['host']}"
            if found["doing"] == "done":
                continue
            if silent > (AT_FAULT * self.interval if self.failed else self.silence):
                state = post_mortem.process_state(found["pid"]) if found["host"] == self.host else ""
                self.accuse(
                    f"{who} has not been heard of for {silent:.0f} s; its last words: {found['doing']}{state and f'; {state}'}"
                )
            elif found["for"] > self.limit and not found["rests"] and not found["doing"].startswith(TOGETHER):
                self.accuse(f"{who} hangs: {found['for']:.0f} s in '{found['doing']}', the limit is {self.limit:.0f} s")
            elif found["for"] > self.limit + 2 * self.silence and (not found["rests"] or self.all_stand_still()):
                odd, long = post_mortem.out_of_step(self.entries()), f"{found['for']:.0f} s in '{found['doing']}'"
                self.accuse(f"no rank goes on: {odd or f'{who} has been ' + long}")

    def all_stand_still(self) -> bool:
        """Whether no rank has begun anything for `limit` seconds. Rank 0 alone asks all of them."""
        if self.rank:
            return False
        return all(entry["for"] > self.limit for entry in self.entries())

    def entries(self) -> list[dict[str, Any]]:
        """What all ranks have last reported."""
        return [json.loads(self.store.get(f"rank-{rank}")) for rank in range(self.ranks)]

    def leave_if_asked(self) -> None:
        """Where nothing is lost by it, the ranks leave as soon as one of them is asked to stop."""
        message = self.stop.at_once
        if message is None:
            return
        if self.stop.asked():
            self.store.set(STOP, "asked")
        if self.store.check([STOP]):
            if self.rank == 0:
                print(message, flush=True)
            self.evidence.close()
            time.sleep(3 * self.interval)  # the store is in rank 0's process, and the others have yet to ask it
            sys.stdout.flush()
            os._exit(ASKED_TO_STOP)

    def report(self) -> None:
        self.evidence.arm(self.silence / 2)
        doing, since, rests = self.state
        entry = {
            "host": self.host,
            "doing": doing,
            "for": round(time.monotonic() - since, 1),
            "rests": rests,
            "pid": os.getpid(),
            "collective": clock.last,
            "at": time.time(),
        }
        self.store.set(f"rank-{self.rank}", json.dumps(entry))

    def accuse(self, message: str) -> None:
        """Tells all ranks; the first message is the one that counts."""
        self.store.compare_set(FAILURE, "", message)
        self.leave(self.store.get(FAILURE).decode(), tell=True)

    def leave(self, message: str, tell: bool = False) -> None:
        """Ends this process; one rank of each machine says why."""
        if tell or os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"error: rank {self.rank} on {self.host} stops: {message} (stacks of the ranks that are left: {self.folder})",
                file=sys.stderr,
                flush=True,
            )
        (doing, since, _), failure = self.failed_in or (self.state, "")
        number, collective = clock.last
        facts = {"rank": f"{self.rank} on {self.host}, process {os.getpid()}"}
        facts |= {
            "doing": f"{doing}, for {time.monotonic() - since:.0f} s",
            "last collective": f"{collective}, the {number}th",
        }
        self.evidence.write(message, facts, failure)
        time.sleep(3 * self.interval)  # the store may be in this very process, and the others have yet to ask it
        sys.stdout.flush()
        os._exit(LOST_A_RANK)


def is_of_communication(error: BaseException) -> bool:
    """Whether a collective has failed, which is rarely the fault of the rank that it fails on."""
    marks = (
        "gloo",
        "NCCL",
        "Connection closed",
        "Connection reset",
        "Broken pipe",
        "timed out",
        "Timed out",
        "TCPStore",
    )
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
