"""A run that is killed and interrupted again and again ends with the metrics of a run that never was."""

import random
import signal
import time
from collections import Counter

import pytest
from conftest import start_ranks
from faults.runs import command, wait_for


def lines(path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_writing(folder, processes):
    """Until a checkpoint or a stage's result is being written."""
    end = time.monotonic() + 60
    while time.monotonic() < end and all(p.poll() is None for p in processes):
        if any(folder.glob("*/*.tmp")):
            return


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(tmp_path, synthetic, uninterrupted, kills):
    """SIGKILL or Ctrl-C to one rank or both: between steps, while a checkpoint is written, and at the change of stages.

    The ranks that are left have the documented status every time; TensorBoard has every step once.
    """
    rng = random.Random(kills)
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    arguments = [*command(tmp_path, synthetic, retrieval=None), "--output_dir", str(run)]
    killed = 0
    while True:
        processes = start_ranks(arguments, 2)
        number = signal.SIGINT if killed % 4 == 1 else signal.SIGKILL
        victims = rng.sample(processes, rng.choice((1, 2)))
        if killed < kills:
            before = lines(metrics)
            moment = ("any", "writing", "stage")[killed % 3]
            if moment == "stage":
                change = next(n for n in (40, 80, 120) if n > before)
                wait_for(metrics, min(change, before + 8), processes)
                time.sleep(rng.uniform(0, 0.5))
            else:
                wait_for(metrics, min(before + rng.randrange(1, 5), 119), processes)
                if moment == "writing":
                    wait_for_writing(run / "checkpoints", processes)
                else:
                    time.sleep(rng.uniform(0, 0.3))
            for process in victims:
                process.send_signal(number)
            killed += 1
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        codes = [p.returncode for p in processes]
        if codes == [0, 0]:
            break
        if number == signal.SIGINT:
            assert codes == [75, 75], outputs[0][-3000:] + outputs[1][-3000:]
        else:
            expected = [-9 if p in victims else 69 for p in processes]
            assert codes == expected, outputs[0][-3000:] + outputs[1][-3000:]
    assert killed == kills
    assert metrics.read_text() == uninterrupted
    assert not list(run.rglob("*.tmp"))
    assert tensorboard_steps(run / "tensorboard") == {step: 1 for step in range(1, 121)}


def tensorboard_steps(folder) -> Counter:
    """How often TensorBoard shows each step's loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    names = [name for name in found.Tags()["scalars"] if name.endswith("/loss")]
    return Counter(event.step for name in names for event in found.Scalars(name))
