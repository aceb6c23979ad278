"""A run on two nodes over ssh and pdsh: preflight, three stages to a report, the death of a node, and going on."""

import re
import time

import pytest
from conftest import tiny_recipe, write_yaml
from faults.nodes import Nodes, needs
from faults.runs import wait_for

LIMIT = 15


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    if lacking := needs():
        pytest.skip(lacking)
    found = Nodes(tmp_path_factory.mktemp("nodes"))
    yield found
    found.down()


@pytest.fixture(scope="module")
def preflight(nodes, synthetic):
    recipe = write_yaml(nodes.folder / "recipe.yaml", tiny_recipe(synthetic))
    hosts = str(nodes.folder / "hosts")
    command = ["python", "-m", "vlmo_ds.training.preflight", "--hostfile", hosts, "--recipe", str(recipe)]
    return nodes.run(*command), command


def test_preflight_finds_the_nodes_ready(nodes, preflight):
    done, _ = preflight
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 machines, 2 ranks: ready" in done.stdout
    for check in ("ssh", "torch", "deepspeed", "code", "recipe", "data", "disk", "clock", "interface", "all-reduce"):
        assert re.search(rf"^ok  {check} ", done.stdout, re.M), check
    assert "image: 96 in 3, text: 96 in 3, joint: 96 in 3" in done.stdout
    assert re.search(r"2 ranks, 64 MB: \d+\.\d\d GB/s", done.stdout)
    written = (nodes.folder / "deepspeed_env").read_text().splitlines()
    assert "GLOO_SOCKET_IFNAME=eth0" in written and "NCCL_SOCKET_IFNAME=eth0" in written
    assert all(re.fullmatch(r"\w+=\S+", line) for line in written)


def test_preflight_names_a_node_that_does_not_answer(nodes, preflight):
    _, command = preflight
    hosts = nodes.folder / "more"
    hosts.write_text("node1 slots=1\nnode3 slots=1\n")
    done = nodes.run(*command[:4], str(hosts), *command[5:])
    assert done.returncode == 1
    assert "FIX ssh" in done.stdout and "-> node3: 'ssh node3' has to work without a password" in done.stdout
    assert "to fix: ssh" in done.stdout


def start(nodes, synthetic, *more):
    recipe = tiny_recipe(synthetic)
    for stage in recipe["stages"]:
        stage |= {"steps": 12, "checkpoint_every": 2}
    file = write_yaml(nodes.folder / "run.yaml", recipe)
    arguments = ["--recipe", str(file), "--output_dir", str(nodes.folder / "run"), "--timeout", str(LIMIT), *more]
    launcher = ["deepspeed", "--hostfile", str(nodes.folder / "hosts"), "train_ds.py"]
    return nodes.start(*launcher, "--deepspeed_config", "ds_configs/zero3.json", *arguments)


@pytest.mark.parametrize("victim", [pytest.param(1, id="worker", marks=pytest.mark.long), pytest.param(0, id="master")])
def test_the_death_of_a_node_ends_the_run_and_the_same_command_goes_on(nodes, preflight, synthetic, victim):
    assert preflight[0].returncode == 0
    run = nodes.folder / "run"
    first = start(nodes, synthetic)
    wait_for(run / "metrics.jsonl", 17 if victim else 29, [first])
    assert nodes.kill(victim) >= 2  # the launcher of the node and its rank
    died = time.monotonic()
    output = first.communicate(timeout=4 * LIMIT)[0]
    assert first.returncode != 0
    while nodes.alive("train_ds.py"):
        assert time.monotonic() - died < 4 * LIMIT
        time.sleep(0.2)
    if victim == 1:
        assert re.search(r"rank 0 on node1 stops: rank 1 on node2 has not been heard of for \d+ s", output), output[
            -3000:
        ]
    else:
        assert re.search(r"rank 1 on node2 stops: rank 0 is gone: the job's store at 10.77.0.1:\d+", output), output[
            -3000:
        ]
    if victim == 0:  # the second death; now to the end
        second = start(nodes, synthetic)
        output = second.communicate(timeout=240)[0]
        assert second.returncode == 0, output[-3000:]
        assert ": resumed at step" in output and (run / "report" / "index.html").exists()
        assert (run / "metrics.jsonl").read_text().count("\n") == 36
        assert not list(run.rglob("*.tmp"))
