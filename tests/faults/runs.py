"""A tiny run of three stages for the tests of faults."""

import json
import signal
import time

from conftest import start_ranks, tiny_recipe, write_yaml

BF16 = {"bf16": {"enabled": True}, "steps_per_print": 10**9}


def command(folder, data, stage=2, **changes):
    recipe = tiny_recipe(data, **changes)
    for entry in recipe["stages"]:
        entry |= {"steps": 40, "checkpoint_every": 5}
    config = folder / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}, **BF16}))
    file = write_yaml(folder / "recipe.yaml", recipe)
    return ["train_ds.py", "--recipe", str(file), "--deepspeed_config", str(config), "--timeout", "30"]


def wait_for(path, lines, processes, timeout=120):
    """Until a file has so many lines; fails with the output of a process that ends before, or when none writes them in time (seconds)."""
    end = time.monotonic() + timeout
    while not (path.exists() and path.read_text().count("\n") >= lines):
        ended = [process for process in processes if process.poll() is not None]
        if (ended or time.monotonic() > end) and not (path.exists() and path.read_text().count("\n") >= lines):
            for process in processes:
                process.kill()
            outputs = [process.communicate()[0] or "" for process in processes]
            why = "a process has ended" if ended else f"{timeout} s are over"
            raise AssertionError(f"{path} has no {lines} lines and {why}:\n" + "\n".join(o[-3000:] for o in outputs))
        time.sleep(0.02)


def killed_at(command, ranks, metrics, lines, later=0.0):
    """Starts ranks, and kills them (SIGKILL) once the metrics have so many lines, some seconds later."""
    processes = start_ranks(command, ranks)
    wait_for(metrics, lines, processes)
    time.sleep(later)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=60)
    assert all(process.returncode == -signal.SIGKILL for process in processes)  # none was through before
    time.sleep(0.2)
