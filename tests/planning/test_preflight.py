"""What preflight makes of the machines' answers; tests/faults/test_two_nodes.py asks real ones."""

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_recipe

from vlmo_ds.config import RecipeError
from vlmo_ds.planning import preflight
from vlmo_ds.planning.preflight import (
    MARK,
    PACKAGES,
    Row,
    ask,
    common_interface,
    environment_of,
    is_host,
    read_hostfile,
    rows_of,
    ssh,
    table,
    time_collective,
    write_environment,
)
from vlmo_ds.recipe_file import parse_recipe

HOSTS = {"n0": 2, "n1": 2}


def machine(address: str, **changes) -> dict:
    return {
        "python": "3.12.1",
        "packages": dict.fromkeys(PACKAGES, "1.0"),
        "code": "aa",
        "recipe": "bb",
        "data": "joint: 96 in 3",
        "free_gb": 100.0,
        "writable": True,
        "interfaces": {"eth0": f"{address}/255.255.255.0", "docker0": "172.17.0.1/255.255.0.0"},
        "gpus": [],
        "cores": 2,
        **changes,
    }


def found(skew: float = 0.1, **changes) -> dict[str, Row]:
    recipe = parse_recipe(tiny_recipe(ROOT) | {"model": {"vocab_size": 200}}, "tiny")
    rows = rows_of(HOSTS, [machine("10.0.0.1"), machine("10.0.0.2", **changes)], [0.0, skew], recipe)
    return {row.check: row for row in rows}


def test_machines_that_are_alike_need_nothing():
    assert [row.check for row in found().values() if row.fix] == []


@pytest.mark.parametrize(
    "check, changes, fix",
    [
        ("python", {"python": "3.11.2"}, "install the same Python"),
        ("deepspeed", {"packages": {**dict.fromkeys(PACKAGES, "1.0"), "deepspeed": "0.9"}}, "one version of deepspeed"),
        ("code", {"code": "cc"}, "copy the same vlmo_ds"),
        ("recipe", {"recipe": "cc"}, "copy the same recipe"),
        ("data", {"data": "joint: 64 in 2"}, "make the same shards visible"),
        ("data", {"data": "error: shard x is missing"}, "shard x is missing"),
        ("disk", {"free_gb": 0.0001}, "n1: checkpoints need"),
        ("disk", {"writable": False}, "n1: checkpoints need"),
        ("clock", {"skew": 9.0}, "n1: start a time service"),
        ("clock", {"skew": float("nan")}, "n1: start a time service"),
        ("devices", {"gpus": ["H200"]}, "n1: fewer GPUs than slots"),
        ("interface", {"interfaces": {"eth0": "10.9.0.2/255.255.255.0"}}, "no IPv4 network joins all machines"),
    ],
)
def test_what_differs_is_named_with_what_to_do(check, changes, fix):
    rows = found(**changes)
    assert fix in rows[check].fix
    assert [row.check for row in rows.values() if row.fix] == [check]


def test_a_bridge_with_the_same_address_everywhere_joins_nothing():
    probes = [machine("192.168.1.1"), machine("192.168.1.2")]
    assert common_interface(probes) == (["eth0", "eth0"], "")
    for probe in probes:
        del probe["interfaces"]["eth0"]
    names, fix = common_interface(probes)
    assert names == ["docker0 172.17.0.1/255.255.0.0"] * 2 and "no IPv4 network" in fix


def test_environment_names_the_interface_only_where_one_is_found(tmp_path):
    rows = list(found().values())
    assert environment_of(rows, 600)["GLOO_SOCKET_IFNAME"] == "eth0"
    broken = list(found(interfaces={}).values())
    assert "GLOO_SOCKET_IFNAME" not in environment_of(broken, 600)
    file = tmp_path / ".deepspeed_env"
    file.write_text("MINE=a=b\nGLOO_SOCKET_IFNAME=old\n")
    write_environment(file, {"GLOO_SOCKET_IFNAME": "eth0"})
    assert file.read_text() == "MINE=a=b\nGLOO_SOCKET_IFNAME=eth0\n"


def test_the_table_shows_what_to_fix():
    text = table(["n0", "n1"], [Row("python", ["3.12", "3.12"]), Row("code", ["a", "b"], "copy")])
    assert [line.split() for line in text.splitlines()] == [
        ["n0", "n1"],
        ["ok", "python", "3.12"],
        ["FIX", "code", "a", "b"],
        ["->", "copy"],
    ]


# ---- what reaches a remote shell ----


@pytest.mark.parametrize(
    "host", ["n0", "node-1.example.org", "a_b", "10.0.0.1", "fe80::1", "me@n0", "m.e-2@10.0.0.1", "N0."]
)
def test_host_names(host):
    assert is_host(host)


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch", "-v", "n0;touch", "$(touch)", "`touch`", "n0|x", "n0,n1", "n[0-3]", "^file", "ssh:n0", "a..b",
     "-a@n0", "me@-n0", "@n0", "me@", "", "n0\n", "n0-", "x" * 64, "fe80::1%$(touch)", "n'0", 'n"0', "/n0/", "ä"],
)  # fmt: skip
def test_what_is_no_host_name(host):
    assert not is_host(host)
    with pytest.raises(RecipeError, match="is not a host name"):
        ssh(host, "true", None, 5)


@pytest.mark.parametrize("line", ["-oProxyCommand=touch${IFS}here slots=1", "n0;touch slots=1", "n0 slots=0"])
def test_a_hostfile_that_would_run_a_command_is_refused(tmp_path, line):
    file = tmp_path / "hosts"
    file.write_text(f"n1 slots=2\n{line}\n")
    with pytest.raises(RecipeError, match=f"--hostfile: {file}: .*expected lines such as"):
        read_hostfile(file)


@pytest.fixture
def shell_as_ssh(tmp_path, monkeypatch):
    """An ssh that writes down its arguments and gives the last one to a shell, as a remote machine does."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "ssh").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\nexec sh -c "${{@: -1}}"\n')
    (binaries / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    return tmp_path


def test_paths_reach_the_remote_shell_as_they_are(shell_as_ssh, monkeypatch):
    folder = shell_as_ssh / "it's; touch pwned $(touch pwned)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    said = shell_as_ssh / "a b"
    said.write_text(f'#!/bin/sh\nprintf "%s" \'{MARK}\'\npwd -P | python3 -c "import json, sys; print(json.dumps(dict(at=input(), '
                    'given=sys.argv[1:])))" "$@"\n')  # fmt: skip
    said.chmod(0o755)
    monkeypatch.setattr(preflight.sys, "executable", str(said))
    found = ask("n0", ["--recipe=a; touch pwned.yaml", "--output_dir=it's"], None)
    assert found["at"] == str(folder) and found["given"][-2:] == ["--recipe=a; touch pwned.yaml", "--output_dir=it's"]
    assert not any(folder.iterdir())
    assert (shell_as_ssh / "arguments").read_text().split("\n")[4:6] == ["--", "n0"]
    assert time_collective(Path("hosts"), None, {"n0": 1}, 60).fix.endswith("without spaces and signs such as ; $ ' (")


def test_an_answer_that_is_no_answer(shell_as_ssh, monkeypatch):
    said = shell_as_ssh / "python"
    said.write_text(f"#!/bin/sh\necho '{MARK}[1'\n")
    said.chmod(0o755)
    monkeypatch.setattr(preflight.sys, "executable", str(said))
    assert "cannot be read" in ask("n0", [], None)["error"]


@pytest.mark.parametrize(
    "name, value", [("A", "eth0\nB=1"), ("A", "eth0;x"), ("A", "$(x)"), ("A B", "1"), ("A\n", "1")]
)
def test_values_that_a_remote_shell_would_run_are_not_written(tmp_path, name, value):
    with pytest.raises(RecipeError, match="is not written"):
        write_environment(tmp_path / ".deepspeed_env", {name: value})
    assert not (tmp_path / ".deepspeed_env").exists()


@pytest.mark.parametrize("line", ["A=$(touch x)", "A=`touch x`", 'A=x"; touch x', "A=x\\", "A; touch x=1"])
def test_an_environment_file_that_would_run_a_command_is_refused(tmp_path, line):
    file = tmp_path / ".deepspeed_env"
    file.write_text(f"GOOD=a b:$HOME\n{line}\n", newline="")
    with pytest.raises(RecipeError, match="line 2: .* would run as a command"):
        write_environment(file, {"GLOO_SOCKET_IFNAME": "eth0"})


# ---- one machine ----


def test_this_machine_is_looked_at_without_ssh(tmp_path, synthetic, monkeypatch, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(synthetic)))
    monkeypatch.setattr(preflight, "ssh", lambda *_: pytest.fail("no ssh on one machine"))
    monkeypatch.setattr(preflight, "time_collective", lambda *given: Row("all-reduce", [json.dumps(given[1:3])]))
    environment = tmp_path / ".deepspeed_env"
    arguments = ["--recipe", str(recipe), "--output_dir", str(tmp_path / "run"), "--env_file", str(environment)]
    assert preflight.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 machine, 1 ranks: ready" in out and "joint: 96 in 3" in out and not environment.exists()
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path / "nowhere")))
    assert preflight.main(arguments) == 1
    assert "to fix: data" in capsys.readouterr().out


def test_a_collective_on_this_machine():
    row = time_collective(None, None, {"here": 1}, 120)
    assert not row.fix and row.found[0].startswith("1 ranks, 64 MB")
