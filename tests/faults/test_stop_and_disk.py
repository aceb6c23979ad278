"""Runs that are asked to stop, whose disk fills up, or whose checkpoints are damaged."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, free_port, run_ranks, start_ranks
from faults.runs import command, wait_for


@pytest.mark.parametrize(
    "number, ranks", [pytest.param(signal.SIGTERM, [0, 1], marks=pytest.mark.long), (signal.SIGUSR1, [1])]
)
def test_a_signal_leads_to_a_checkpoint_and_its_own_exit_status(tmp_path, synthetic, uninterrupted, number, ranks):
    """Asked at steps of the stages, on all ranks or one; the same command goes on, and nothing shows in the metrics."""
    arguments = [*command(tmp_path, synthetic, retrieval=None), "--output_dir", str(tmp_path / "run")]
    arguments.append("stages.*.data.workers=1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    for lines in (7, 53, 91) if number == signal.SIGTERM else (53,):
        processes = start_ranks(arguments, 2)
        wait_for(metrics, lines, processes)
        for rank in ranks:
            processes[rank].send_signal(number)
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        assert [p.returncode for p in processes] == [75, 75], outputs[0][-3000:]
        assert "the same command goes on from there" in outputs[0]
        assert not list((tmp_path / "run").rglob("*.tmp"))
    run_ranks(arguments, 2)
    assert metrics.read_text() == uninterrupted


def test_sigterm_to_the_launcher(tmp_path, synthetic):
    binaries = os.path.dirname(sys.executable)
    launcher = [f"{binaries}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    arguments = [*launcher, *command(tmp_path, synthetic, retrieval=None), "--output_dir", str(tmp_path / "run")]
    env = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(tmp_path / "run" / "metrics.jsonl", 7, [process])
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]  # to the end of the ranks, which have the same pipe
    assert process.returncode != 0 and "at step" in output and "the same command goes on" in output, output[-3000:]
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") < 100
    assert list((tmp_path / "run").rglob("manifest.json")) and not list((tmp_path / "run").rglob("*.tmp"))


def damage(folder, how):
    newest = sorted(folder.glob("step-*"))[-1]
    file = next(newest.glob("rank-00001.safetensors"))
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "missing":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    return newest


@pytest.mark.parametrize(
    "how, reason",
    [
        ("truncated", "bytes, "),
        pytest.param("missing", "is missing", marks=pytest.mark.long),
        pytest.param("manifest", "cannot be read", marks=pytest.mark.long),
    ],
)
def test_a_damaged_checkpoint_is_left_out(tmp_path, synthetic, uninterrupted, how, reason):
    arguments = [*command(tmp_path, synthetic, retrieval=None), "--output_dir", str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    processes = start_ranks(arguments, 2)
    wait_for(metrics, 18, processes)
    for process in processes:
        process.kill()
        process.communicate()
    newest = damage(tmp_path / "run/checkpoints/image", how)
    refused = start_ranks([*arguments, "--resume", str(newest)], 2)
    outputs = [p.communicate(timeout=120)[0] for p in refused]
    assert [p.returncode for p in refused] == [2, 2] and f"{newest} is damaged: " in outputs[0]
    output = run_ranks(arguments, 2)
    assert f"checkpoint {newest} is damaged and left out: " in output and reason in output
    assert "image: resumed at step" in output
    assert metrics.read_text() == uninterrupted


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a tmpfs of 64 MB")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    """To the last byte."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)


def remount(path, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", str(path)], check=True)


@pytest.mark.parametrize(
    "how, reason",
    [("full", "No space left"), pytest.param("read-only", "Read-only file system", marks=pytest.mark.long)],
)
def test_a_disk_that_cannot_be_written_is_told_of_and_training_goes_on(
    tmp_path, synthetic, uninterrupted, small_disk, how, reason
):
    filler = small_disk / "filler"
    if how == "full":
        fill(filler)
    else:
        remount(small_disk, "ro")
    arguments = [*command(tmp_path, synthetic, retrieval=None), "--output_dir", str(tmp_path / "run")]
    arguments.append("checkpoint_failures=3")
    processes = start_ranks(arguments, 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics, 12, processes)  # two checkpoints have failed
    if how == "full":
        filler.unlink()
    else:
        remount(small_disk, "rw")
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:]
    assert "step-00000005: " in outputs[0] and "training goes on, 2 more may fail" in outputs[0]
    assert reason in outputs[0]
    assert metrics.read_text() == uninterrupted
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_too_many_failures_end_the_run(tmp_path, synthetic, small_disk):
    fill(small_disk / "filler")
    arguments = [*command(tmp_path, synthetic, retrieval=None), "--output_dir", str(tmp_path / "run")]
    processes = start_ranks([*arguments, "checkpoint_failures=1"], 2)
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], outputs[0][-3000:]
    assert "2 in a row could not be written, checkpoint_failures is 1" in outputs[0]
