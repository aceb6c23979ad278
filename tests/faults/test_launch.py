"""Launchers: starting again a bounded number of times, Slurm's script, and ranks started by srun and mpirun."""

import os
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT, free_port, start_ranks, tiny_recipe
from faults.runs import command, wait_for

from vlmo_ds.config import RecipeError
from vlmo_ds.planning import supervise
from vlmo_ds.planning.supervise import choose, replaced, value_of, with_living_hosts
from vlmo_ds.recipe_file import parse_recipe

BINARIES = os.path.dirname(sys.executable)
ENV = {**os.environ, "PATH": f"{BINARIES}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def ranks_of(process):
    """The training processes below a launcher."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if "train_ds.py" in p.cmdline() and "deepspeed.launcher.launch" not in p.cmdline()
            and not any("bin/deepspeed" in word for word in p.cmdline())]  # fmt: skip


def test_a_run_that_falls_is_started_again(tmp_path, synthetic, uninterrupted):
    launcher = [f"{BINARIES}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    arguments = [*launcher, *command(tmp_path, synthetic, retrieval=None), "--output_dir", str(tmp_path / "run")]
    supervisor = [sys.executable, "-m", "vlmo_ds.training.supervise", "--restarts", "2", "--", *arguments]
    process = subprocess.Popen(
        supervisor, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics, 60, [process])
    victims = ranks_of(process)
    assert len(victims) == 2
    victims[-1].kill()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:]
    assert "2 more starts" in output and "1 more starts" not in output
    assert metrics.read_text() == uninterrupted


@pytest.mark.parametrize("status, starts", [(0, 1), (2, 1), (3, 1), (75, 1), (69, 3), (1, 3)])
def test_only_what_another_start_may_mend_is_started_again(tmp_path, monkeypatch, status, starts):
    monkeypatch.setattr(supervise, "PAUSE", 0.0)
    script = f"open({str(tmp_path / 'log')!r}, 'a').write('x'); raise SystemExit({status})"
    assert supervise.supervise([sys.executable, "-c", script], restarts=2) == status
    assert (tmp_path / "log").read_text() == "x" * starts


def test_a_start_that_a_signal_ends_has_a_shells_status():
    killed = "import os; os.kill(os.getpid(), 9)"
    assert supervise.supervise([sys.executable, "-c", killed], restarts=0) == 137


@pytest.mark.parametrize("name", ["no_such_command", "", "a\0b", "hosts"])
def test_a_command_that_cannot_be_started(tmp_path, capsys, monkeypatch, name):
    (tmp_path / "hosts").touch(mode=0o644)  # a file that is no program
    monkeypatch.setenv("PATH", str(tmp_path))
    assert supervise.main(["--", name, "train_ds.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name!r} cannot be started: ") and error.count("\n") == 1


def test_a_hostfile_of_options_starts_nothing(tmp_path, capsys):
    (tmp_path / "hosts").write_text("-oProxyCommand=true slots=2\n")
    line = [sys.executable, "-c", f"open({str(tmp_path / 'started')!r}, 'w')", "--hostfile", str(tmp_path / "hosts")]
    assert supervise.main(["--", *line]) == 2 and not (tmp_path / "started").exists()
    assert "'-oProxyCommand=true' is not a host name" in capsys.readouterr().err


def test_the_machines_that_are_left(tmp_path):
    recipe = parse_recipe(tiny_recipe(ROOT), "tiny")  # batches of 8
    hosts = {f"n{i}": 2 for i in range(4)}
    assert choose(hosts, list(hosts), recipe) == hosts
    assert choose(hosts, ["n0", "n1", "n3"], recipe) == {"n0": 2, "n1": 2}  # 6 ranks do not divide 8
    assert choose(hosts, ["n2"], recipe) == {"n2": 2}
    assert choose(hosts, [], recipe) == {}
    line = ["deepspeed", "--hostfile=a", "train_ds.py", "--recipe", "r.yaml"]
    assert value_of(line, "--hostfile") == "a" and value_of(line, "--recipe") == "r.yaml"
    assert replaced(line, "--hostfile", "b")[1] == "--hostfile=b"
    assert replaced(["--hostfile", "a", "x"], "--hostfile", "b") == ["--hostfile", "b", "x"]
    file = tmp_path / "hosts"
    file.write_text("n0 slots=2\nn1 slots=2\nn2 slots=2\nn3 slots=2\n")
    line = ["deepspeed", "--hostfile", str(file), "train_ds.py"]
    assert with_living_hosts(line, lambda host: True) == line
    left = with_living_hosts(line, lambda host: host != "n0")  # the quickstart's batches: 32, 64, 128
    assert left[2] == f"{file}.left" and (tmp_path / "hosts.left").read_text() == "n1 slots=2\nn2 slots=2\n"
    with pytest.raises(RecipeError, match="0 answer: too few"):
        with_living_hosts(line, lambda host: False)


SRUN = """#!{python}
import os, subprocess, sys
names = [(str(r), {{"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_STEP_NUM_TASKS": "2"}}) for r in range(2)]
open({log!r}, "a").write(os.environ["MASTER_ADDR"] + "\\n")
ranks = [subprocess.Popen(sys.argv[2:], env={{**os.environ, **more}}) for _, more in names]
if os.path.exists({fail!r}):
    os.remove({fail!r})
    [p.kill() for p in ranks]
codes = [p.wait() for p in ranks]
sys.exit(next((c if c > 0 else 137 for c in codes if c), 0))
"""


def test_slurm_script(tmp_path, synthetic):
    """With stand-ins for srun and scontrol: the ranks find each other, a fall is followed by another start."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    log, fail = tmp_path / "srun.log", tmp_path / "fail"
    fail.touch()
    (binaries / "srun").write_text(SRUN.format(python=sys.executable, log=str(log), fail=str(fail)))
    (binaries / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/requeued\n'
    )
    for file in binaries.iterdir():
        file.chmod(0o755)
    arguments = [
        *command(tmp_path, synthetic, retrieval=None)[1:],
        "--output_dir",
        str(tmp_path / "run"),
        "--stages",
        "image",
    ]
    env = {**ENV, "PATH": f"{binaries}:{ENV['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(free_port()),
           "SLURM_JOB_NODELIST": "localhost", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    done = subprocess.run(
        ["bash", "launch/slurm.sbatch", *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "srun ended with status 137" in done.stderr and log.read_text().split() == ["127.0.0.1"] * 2
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 40
    (binaries / "srun").write_text("#!/bin/sh\nexit 75\n")
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert (tmp_path / "requeued").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"


def test_slurm_script_reads_the_environment_file_as_it_stands(tmp_path):
    """Values reach the ranks; none is run as a command."""
    (tmp_path / "srun").write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\nexit 2\n")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".deepspeed_env").write_text("NCCL_X=a b;touch pwned\ntouch pwned\nNCCL_Y=$(touch pwned)\nGLOO_Z=eth0")
    env = {**ENV, "PATH": f"{tmp_path}:{ENV['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1",
           "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "pwned").exists()
    seen = (tmp_path / "seen").read_text().split("\n")
    assert {"NCCL_X=a b;touch pwned", "NCCL_Y=$(touch pwned)", "GLOO_Z=eth0"} <= set(seen)


def test_ranks_started_by_mpirun(tmp_path, synthetic):
    """By their variables; without the address of rank 0 they say what is missing."""
    port, processes = str(free_port()), []
    arguments = [
        *command(tmp_path, synthetic, retrieval=None),
        "--output_dir",
        str(tmp_path / "run"),
        "--stages",
        "image",
    ]
    for address in ({}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}):
        processes = []
        for rank in range(2):
            names = {"RANK": rank, "LOCAL_RANK": rank, "SIZE": 2}
            env = {**ENV, **address, **{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}}
            processes.append(
                subprocess.Popen([sys.executable, *arguments, "stages.image.steps=3"], cwd=ROOT, env=env, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )  # fmt: skip
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        if not address:
            assert [p.returncode for p in processes] == [2, 2]
            assert "mpirun has started several ranks, but MASTER_ADDR" in outputs[0]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:]
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.long
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_starts_again(tmp_path, synthetic, uninterrupted, rendezvous):
    arguments = [
        *command(tmp_path, synthetic, retrieval=None),
        "--output_dir",
        str(tmp_path / "run"),
        "--timeout",
        "20",
    ]
    meeting = ["--standalone"] if rendezvous == "c10d" else ["--master_port", str(free_port())]
    launcher = [f"{BINARIES}/torchrun", *meeting, "--nproc_per_node", "2", "--max_restarts", "2"]
    process = subprocess.Popen(
        [*launcher, *arguments], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics, 50, [process])
    ranks_of(process)[-1].kill()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:]
    assert metrics.read_text() == uninterrupted


def test_several_ranks_without_a_launcher_are_not_taken_for_one(tmp_path):
    processes = start_ranks(["train_ds.py", "--recipe", "missing.yaml"], 2)
    assert all("does not exist" in p.communicate(timeout=60)[0] for p in processes[:1])
    assert [p.wait() for p in processes] == [2, 2]
