"""What preflight makes of the machines' answers; tests/faults/test_two_nodes.py asks real ones."""

import pytest
from conftest import ROOT, tiny_recipe

from vlmo_ds.config import parse_recipe
from vlmo_ds.training.preflight import (
    PACKAGES,
    Row,
    common_interface,
    environment_of,
    rows_of,
    table,
    write_environment,
)

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
