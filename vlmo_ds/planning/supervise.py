"""Starts a run again when it falls, a bounded number of times, on the machines that are left.

    python -m vlmo_ds.planning.supervise --restarts 3 -- deepspeed --hostfile hosts train_ds.py --recipe R ...

Every checkpoint can be read by any number of ranks, so a run goes on with fewer: before each start the machines of the
hostfile are asked over ssh, and the largest number of them is taken among which the recipe's batches can be split.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vlmo_ds.config import Recipe, RecipeError, number
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.planning.preflight import answers, of_all, read_hostfile
from vlmo_ds.recipe_file import QUICKSTART, load_recipe
from vlmo_ds.training.ds_config import micro_batch
from vlmo_ds.training.exit_status import ASKED_TO_STOP, DIVERGED, DONE, MISCOMPUTED, UNUSABLE

# Exit statuses after which another start would change nothing, or would compute wrongly again.
FINAL = (DONE, UNUSABLE, DIVERGED, MISCOMPUTED, ASKED_TO_STOP)
PAUSE = 5.0  # seconds before another start: ports and devices are given back


def value_of(command: list[str], option: str) -> str | None:
    """What a command line gives for an option, as `--option value` or `--option=value`."""
    for place, word in enumerate(command):
        if word == option and place + 1 < len(command):
            return command[place + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def replaced(command: list[str], option: str, value: str) -> list[str]:
    old = value_of(command, option)
    return [value if word == old else f"{option}={value}" if word == f"{option}={old}" else word for word in command]


def splits(recipe: Recipe, ranks: int) -> bool:
    try:
        for stage in recipe.stages:
            micro_batch(stage, ranks)
    except RecipeError:
        return False
    return True


def choose(hosts: dict[str, int], alive: list[str], recipe: Recipe) -> dict[str, int]:
    """The most machines, from the first on, whose ranks the recipe's batches can be split among; {} if none."""
    left = {host: slots for host, slots in hosts.items() if host in alive}
    while left and not splits(recipe, sum(left.values())):
        left.popitem()
    return left


def with_living_hosts(command: list[str], ask: Callable[[str], bool]) -> list[str]:
    """The command, with a hostfile of the machines that are left if some are gone. RecipeError if too few are."""
    file = value_of(command, "--hostfile")
    if file is None:
        return command
    hosts = read_hostfile(Path(file))
    alive = [host for host, there in zip(hosts, of_all(hosts, ask), strict=True) if there]
    settings = [word for word in command if "=" in word and not word.startswith("-")]
    recipe = load_recipe(value_of(command, "--recipe") or QUICKSTART, settings)
    chosen = choose(hosts, alive, recipe)
    if not chosen:
        raise RecipeError(f"of the machines in {file} {len(alive)} answer: too few to split the recipe's batches among")
    if chosen == hosts:
        return command
    gone = ", ".join(host for host in hosts if host not in chosen)
    print(f"supervise: goes on without {gone}: {sum(chosen.values())} of {sum(hosts.values())} ranks", flush=True)
    reduced = Path(f"{file}.left")
    write_atomically(reduced, "".join(f"{host} slots={slots}\n" for host, slots in chosen.items()).encode())
    return replaced(command, "--hostfile", str(reduced))


def started(command: list[str]) -> subprocess.Popen:
    """RecipeError if there is no such command."""
    try:
        return subprocess.Popen(command)
    except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{command[0]!r} cannot be started: {reason}") from None


def supervise(command: list[str], restarts: int) -> int:
    """The exit status of the last start; 128 and the signal's number for one that a signal has ended, as in a shell."""
    stopping: list[int] = []
    running: list[subprocess.Popen] = []

    def pass_on(asked: int, frame: object) -> None:
        stopping.append(asked)
        for process in running:
            process.send_signal(asked)

    for asked in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(asked, pass_on)
    for start in range(restarts + 1):
        line = with_living_hosts(command, answers)
        if stopping:
            return ASKED_TO_STOP
        running[:] = [started(line)]
        status = running[0].wait()
        status = status if status >= 0 else 128 - status
        running.clear()
        if status in FINAL or stopping:
            return status
        left = restarts - start
        print(f"supervise: the run ended with status {status}; {left} more starts", file=sys.stderr, flush=True)
        if left:
            time.sleep(PAUSE)
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlmo_ds.planning.supervise", description="Starts a run again when it falls."
    )
    parser.add_argument(
        "--restarts", type=number(int, 0), default=3, help="starts after the first (default: %(default)s)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command", help="what starts the run")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("the command that starts the run is missing")
    try:
        return supervise(command, args.restarts)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE


if __name__ == "__main__":
    sys.exit(main())
