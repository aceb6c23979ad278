"""Starts that go on: from a checkpoint that is named, twice at once, with a full disk, with damage, with ranks that hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import run_ranks, start_ranks, tiny_recipe, write_yaml
from faults.runs import command, wait_for


def places(run) -> list[tuple[str, int]]:
    return [(r["stage"], r["step"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, synthetic):
    """A finished run of three stages by one rank, (its arguments, its folder)."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = command(folder, synthetic, retrieval=None)
    run_ranks([*arguments, "--output_dir", str(folder / "run")], 1)
    return arguments, folder / "run"


@pytest.mark.parametrize("number, stage", [(0, "image"), (1, "text"), (2, "joint")])
def test_resume_names_a_checkpoint_of_any_stage(tmp_path, finished, number, stage):
    """It goes on in that stage; what the stages before it have left stays as it is."""
    arguments, done = finished
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for later in ("image", "text", "joint")[number:]:
        shutil.rmtree(run / "checkpoints" / later / "final")
    for later in ("image", "text", "joint")[number + 1 :]:
        shutil.rmtree(run / "checkpoints" / later)
    lines = (done / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: 40 * (number + 1)]))
    newest = run / "checkpoints" / stage / "step-00000035"
    settings = [] if stage == "joint" else ["--stages", "image,text,joint"[: {"image": 5, "text": 10}[stage]]]
    output = run_ranks([*arguments, "--output_dir", str(run), "--resume", str(newest), *settings], 1)
    assert f"{stage}: resumed at step 35 from {newest}" in output
    assert not [s for s in ("image", "text", "joint")[:number] if f"{s}: trains" in output]
    assert (run / "metrics.jsonl").read_text() == "".join(lines[: 40 * (number + 1)])
    assert (run / "checkpoints" / stage / "step-00000040.left-1").is_dir()


def test_the_same_command_twice(tmp_path, synthetic):
    """The second start ends at once, and names the first, which goes on as if nothing had happened."""
    arguments = [
        *command(tmp_path, synthetic, retrieval=None),
        "--output_dir",
        str(tmp_path / "run"),
        "--stages",
        "image",
    ]
    first = start_ranks(arguments, 2)
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, first)
    second = start_ranks(arguments, 1)[0]
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and f"is in use: process {first[0].pid} on " in output and "Traceback" not in output
    assert [p.communicate(timeout=120) and p.returncode for p in first] == [0, 0]
    assert places(tmp_path / "run") == [("image", step) for step in range(1, 41)]


def test_ctrl_c_writes_a_checkpoint(tmp_path, synthetic):
    """In a stage shorter than checkpoint_every, too."""
    arguments = [
        *command(tmp_path, synthetic, retrieval=None),
        "--output_dir",
        str(tmp_path / "run"),
        "--stages",
        "image",
    ]
    arguments += ["stages.image.checkpoint_every=1000"]
    processes = start_ranks(arguments, 2)
    wait_for(tmp_path / "run" / "metrics.jsonl", 6, processes)
    for process in processes:
        process.send_signal(signal.SIGINT)  # of the terminal, and then of a launcher that passes it on
        process.send_signal(signal.SIGINT)
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [75, 75], outputs[0][-2000:]
    assert "Ctrl-C again ends at once" in outputs[0] and "the same command goes on from there" in outputs[0]
    assert "resumed at step" in run_ranks(arguments, 2)
    assert places(tmp_path / "run") == [("image", step) for step in range(1, 41)]


def slow(doing: str, arguments: list[str]) -> None:
    """train_ds.py, in which something takes for ever on the ranks that SLOW names."""
    from vlmo_ds.evaluation import retrieval
    from vlmo_ds.training import loop, run

    def wait(*_, **__):
        while os.environ["RANK"] in os.environ["SLOW"]:
            time.sleep(0.1)

    module, name = {
        "start": (run, "check_samples"),
        "evaluation": (retrieval, "recalls"),
        "end": (loop, "full_state"),
    }[doing]
    real = getattr(module, name)
    setattr(module, name, lambda *args, **more: (wait(), real(*args, **more))[1])
    sys.exit(run.main(arguments))


def start_slow(folder, data, doing: str, ranks: int, slow_ranks: str, *more: str):
    """Ranks of a run of one step, of which those named never end what they do."""
    recipe = tiny_recipe(data)
    recipe["stages"] = recipe["stages"][2:]
    recipe["stages"][0] |= {"steps": 1, "init": {}}
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    file = write_yaml(folder / "r.yaml", recipe)
    arguments = [
        "--recipe",
        str(file),
        "--deepspeed_config",
        str(folder / "ds.json"),
        "--output_dir",
        str(folder / "run"),
    ]
    code = f"from faults.test_goes_on import slow; slow({doing!r}, {[*arguments, *more]!r})"
    return start_ranks(["-c", code], ranks, SLOW=slow_ranks)


def test_a_second_ctrl_c_ends_at_once(tmp_path, synthetic):
    """In a rank that would take for ever over what comes before its checkpoint."""
    (process,) = start_slow(tmp_path, synthetic, "end", 1, "0")
    wait_for(tmp_path / "run" / "metrics.jsonl", 1, [process])
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == 130 and "Ctrl-C again ends at once" in output and "Traceback" not in output


@pytest.mark.parametrize("doing, said", [("start", "before training"), ("evaluation", "in the evaluation")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_outside_of_the_stages(tmp_path, synthetic, doing, said, ranks):
    processes = start_slow(tmp_path, synthetic, doing, ranks, "0")
    if doing == "evaluation":
        wait_for(tmp_path / "run/checkpoints/joint/final/manifest.json", 1, processes)
    else:
        wait_for(tmp_path / "run/tokenizer/tokenizer.json", 0, processes)
    time.sleep(3)
    processes[-1].send_signal(signal.SIGINT)  # one rank alone
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [75] * ranks, outputs[0][-2000:]
    assert f"stopped {said}; the same command" in outputs[0] and "Traceback" not in "".join(outputs)


@pytest.mark.parametrize(
    "doing, said",
    [("start", "what rank 0 does for all"), ("evaluation", "evaluation"), ("end", "gathering the weights")],
)
def test_a_rank_that_hangs_outside_of_the_steps(tmp_path, synthetic, doing, said):
    processes = start_slow(tmp_path, synthetic, doing, 2, "0" if doing == "start" else "1", "--timeout", "8")
    outputs = [p.communicate(timeout=90)[0] for p in processes]
    assert [p.returncode for p in processes] == [69, 69], outputs[0][-2000:]
    assert f" s in '{said}" in "".join(outputs), outputs[0][-2000:]


def test_loader_processes_end_with_their_rank(tmp_path, synthetic):
    """Even one that stands still."""
    arguments = [
        *command(tmp_path, synthetic, retrieval=None),
        "--output_dir",
        str(tmp_path / "run"),
        "--stages",
        "image",
    ]
    process = start_ranks([*arguments, "stages.image.data.workers=1", "stages.image.steps=400"], 1)[0]
    wait_for(tmp_path / "run" / "metrics.jsonl", 3, [process])
    workers = psutil.Process(process.pid).children()
    assert workers
    for worker in workers:
        worker.suspend()
    process.kill()
    process.communicate(timeout=30)
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.fixture
def small_run(tmp_path):
    """A run's directory on a file system of 6 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a tmpfs of 6 MB")
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_under_the_whole_run(tmp_path, synthetic, small_run):
    """Training goes on; metrics and curves wait; what cannot be written in the end is an error, not a traceback; with room the
    same command goes on."""
    arguments = [*command(tmp_path, synthetic, retrieval=None), "--output_dir", str(small_run), "--stages", "image"]
    arguments += ["checkpoint_failures=1", "stages.image.checkpoint_every=20"]
    processes = start_ranks(arguments, 2)
    wait_for(small_run / "metrics.jsonl", 5, processes)
    with (small_run / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], outputs[0][-2000:]
    assert "metrics cannot be written: No space left on device; they wait, and training goes on" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    (small_run / "filler").unlink()
    run_ranks(arguments, 2)
    assert places(small_run) == [("image", step) for step in range(1, 41)]
    assert not list(small_run.rglob("*.tmp"))
