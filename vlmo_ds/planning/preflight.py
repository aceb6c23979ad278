"""Looks at all machines of a hostfile before a run is started on them, and says what to fix.

    python -m vlmo_ds.planning.preflight --hostfile hosts --recipe R --output_dir DIR
    python -m vlmo_ds.planning.preflight --recipe R --output_dir DIR                     # this machine alone, without ssh

Each machine is asked over ssh: does it answer, has it the same code, packages, recipe and data, room on its disk, the right
time; then a collective over all ranks is timed. What has to reach every machine is written to .deepspeed_env, which
DeepSpeed's launcher reads. Its values and the names of the hosts come to a remote shell: only what is harmless there is
let through.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import ipaddress
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from vlmo_ds.config import Recipe, RecipeError, number
from vlmo_ds.data.loader import source_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.recipe_file import QUICKSTART, load_recipe

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "numpy", "safetensors")
MOST_SKEW = 5.0  # seconds
MARK = "PREFLIGHT "  # before the line of JSON that a machine or the collective prints
MESSAGE_MB = 64  # of the timed all-reduce
LEAST_GBPS = {"cuda": 5.0, "cpu": 0.05}  # GB/s below which the network is suspected
HOST = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?\Z")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*\Z")  # what a shell takes as it is


class Row(NamedTuple):
    """One line of the table: what was looked at, what each machine has, and what to do about it ("" if it is well)."""

    check: str
    found: list[str]
    fix: str = ""


# ---- on each machine ----


def probe(recipe_file: str, output_dir: Path) -> dict[str, Any]:
    """What this machine has."""
    disk = output_dir
    while not disk.exists():
        disk = disk.parent
    return {
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "code": hash_of(sorted(Path(__file__).parents[1].rglob("*.py"))),
        "recipe": recipe_hash(recipe_file),
        "data": visible_data(recipe_file),
        "free_gb": shutil.disk_usage(disk).free / 1e9,
        "writable": os.access(disk, os.W_OK),
        "interfaces": interfaces(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cores": len(os.sched_getaffinity(0)),
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hash_of(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()


def recipe_hash(recipe_file: str) -> str:
    """Of a recipe with all that it extends."""
    try:
        return hashlib.blake2b(load_recipe(recipe_file).model_dump_json().encode(), digest_size=6).hexdigest()
    except RecipeError as error:
        return f"error: {str(error).splitlines()[0]}"


def visible_data(recipe_file: str) -> str:
    """Shards and samples of each stage, or what is wrong."""
    try:
        found = []
        for stage in load_recipe(recipe_file).stages:
            shards = [s for part in stage.parts.values() for source in source_shards(part.data) for s in source]
            found.append(f"{stage.name}: {sum(s.samples for s in shards)} in {len(shards)}")
        return ", ".join(found)
    except (RecipeError, DataError) as error:
        return f"error: {error}"


def interfaces() -> dict[str, str]:
    """IPv4 networks by interface, but for the loopback: {"eth0": "10.0.0.3/255.255.255.0"}."""
    return {
        name: f"{a.address}/{a.netmask}"
        for name, addresses in psutil.net_if_addrs().items()
        for a in addresses
        if a.family == socket.AF_INET and not a.address.startswith("127.") and a.netmask
    }


# ---- from the machine where it is started ----


def is_host(text: str) -> bool:
    """A host name (RFC 1123, and underscores, which container networks use), an IPv4 or an IPv6 address; user@ before it.

    Whatever else stands in a hostfile could be taken for an option of ssh or a command of the remote shell.
    """
    user, at, host = text.rpartition("@")
    if at and not USER.match(user):
        return False
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host).scope_id is None
        except ValueError:
            return False
    return bool(HOST.match(host))


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, as DeepSpeed's launcher reads them. RecipeError for what is no host name."""
    from deepspeed.launcher.runner import fetch_hostfile

    expected = "expected lines such as 'node1 slots=8'"
    if not path.is_file():
        raise RecipeError(f"--hostfile: {path} does not exist; {expected}")
    try:
        hosts = dict(fetch_hostfile(str(path)))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--hostfile: {path}: {error}; {expected}") from None
    for host, slots in hosts.items():
        if not is_host(host):
            raise RecipeError(
                f"--hostfile: {path}: {host!r} is not a host name; accepted: letters, digits, '-', '_' and '.', or an IP "
                f"address, with or without user@ before it; {expected}"
            )
        if slots < 1:
            raise RecipeError(f"--hostfile: {path}: {host} has {slots} slots; {expected}")
    return hosts


def ask(host: str, arguments: list[str], port: int | None) -> dict[str, Any]:
    """A machine's probe; {"error": ...} if it does not come."""
    probe_command = [sys.executable, "-m", "vlmo_ds.planning.preflight", "--probe", *arguments]
    try:
        done = ssh(host, f"cd {shlex.quote(os.getcwd())} && {shlex.join(probe_command)}", port, 180)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        return {"error": said[-1]}
    try:
        return dict(json.loads(lines[-1].removeprefix(MARK)))
    except (ValueError, TypeError):
        return {"error": "its answer cannot be read: is its vlmo_ds the same?"}


def ssh(host: str, command: str, port: int | None, timeout: float) -> subprocess.CompletedProcess:
    """Runs a line of shell on a machine; whoever calls quotes what is in it. RecipeError for what is no host name."""
    if not is_host(host):
        raise RecipeError(f"{host!r} is not a host name")
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *(["-p", str(port)] if port else [])]
    return subprocess.run(
        ["ssh", *options, "--", host, command], capture_output=True, text=True, errors="replace", timeout=timeout
    )


def answers(host: str, port: int | None = None) -> bool:
    """Whether a machine can be reached over ssh."""
    try:
        return ssh(host, "true", port, 30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def clock_skews(hosts: Sequence[str], port: int | None) -> list[float]:
    """Seconds that each machine's clock is ahead of this one's, halfway through a short request."""

    def skew(host: str) -> float:
        before = time.time()
        try:
            there = float(ssh(host, "date +%s.%N", port, 60).stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return float("nan")
        return there - (before + time.time()) / 2

    return of_all(hosts, skew)


def common_interface(probes: list[dict[str, Any]]) -> tuple[list[str], str]:
    """(each machine's interface in the first network that joins them all, what to fix).

    A bridge for containers has the same network on every machine, and the same address: it joins nothing.
    """
    networks = [
        {str(ipaddress.ip_interface(value).network): (name, value) for name, value in found["interfaces"].items()}
        for found in probes
    ]
    for network in sorted(set.intersection(*map(set, networks))):
        names, addresses = zip(*(of_machine[network] for of_machine in networks), strict=True)
        if len(set(addresses)) == len(probes):
            return list(names), ""
    found = ["; ".join(f"{n} {v}" for n, v in p["interfaces"].items()) or "none" for p in probes]
    return found, "no IPv4 network joins all machines: connect them, or set NCCL_SOCKET_IFNAME by hand"


def same(check: str, values: list[str], fix: str) -> Row:
    return Row(check, values, "" if len(set(values)) == 1 else fix)


def rows_of(hosts: dict[str, int], probes: list[dict[str, Any]], skews: list[float], recipe: Recipe) -> list[Row]:
    rows = [same("python", [p["python"] for p in probes], "install the same Python on all machines")]
    for name in PACKAGES:
        values = [p["packages"][name] for p in probes]
        rows.append(same(name, values, f"install one version of {name} everywhere"))
    rows.append(same("code", [p["code"] for p in probes], "copy the same vlmo_ds to the same path on all machines"))
    rows.append(same("recipe", [p["recipe"] for p in probes], "copy the same recipe to the same path on all machines"))
    rows += [data_row(probes), disk_row(hosts, probes, recipe)]
    far = [h for h, s in zip(hosts, skews, strict=True) if not abs(s) <= MOST_SKEW]
    fix = f"{', '.join(far)}: start a time service (chrony)" if far else ""
    rows.append(Row("clock", [f"{s:+.1f} s" for s in skews], fix))
    rows.append(devices_row(hosts, probes))
    names, fix = common_interface(probes)
    rows.append(Row("interface", names, fix))
    return rows


def rows_of_one(host: str, found: dict[str, Any], recipe: Recipe) -> list[Row]:
    """What can be said of a machine without others to compare it with."""
    missing = {name: "not installed" for name in PACKAGES if found["packages"][name] == "not installed"}
    rows = [Row("python", [found["python"]])]
    rows += [Row(n, [v], f"install {n}" if n in missing else "") for n, v in found["packages"].items()]
    rows += [data_row([found]), disk_row({host: 0}, [found], recipe), devices_row({host: 0}, [found])]
    return rows


def data_row(probes: list[dict[str, Any]]) -> Row:
    data = [p["data"] for p in probes]
    broken = next((d for d in data if d.startswith("error: ")), None)
    if broken:
        return Row("data", data, broken.removeprefix("error: "))
    return same("data", data, "make the same shards visible at the same path on all machines")


def disk_row(hosts: dict[str, int], probes: list[dict[str, Any]], recipe: Recipe) -> Row:
    disk = [f"{p['free_gb']:.0f} GB free" + ("" if p["writable"] else ", read-only") for p in probes]
    need = checkpoint_gb(recipe)
    short = [h for h, p in zip(hosts, probes, strict=True) if p["free_gb"] < need or not p["writable"]]
    return Row(
        "disk",
        disk,
        f"{', '.join(short)}: checkpoints need {need:.1f} GB of a disk that can be written" if short else "",
    )


def devices_row(hosts: dict[str, int], probes: list[dict[str, Any]]) -> Row:
    gpus = [f"{len(p['gpus'])} x {p['gpus'][0]}" if p["gpus"] else f"no GPU, {p['cores']} cores" for p in probes]
    few = [h for (h, slots), p in zip(hosts.items(), probes, strict=True) if p["gpus"] and len(p["gpus"]) < slots]
    return Row("devices", gpus, f"{', '.join(few)}: fewer GPUs than slots in the hostfile" if few else "")


def checkpoint_gb(recipe: Recipe) -> float:
    """Room for the checkpoints of a stage: 12 bytes per parameter, each kept one and the one that is being written."""
    from vlmo_ds.planning.plan import parameter_count

    return 12 * parameter_count(recipe) * (recipe.keep_checkpoints + 1) / 1e9


def environment_of(rows: list[Row], timeout: int) -> dict[str, str]:
    """What has to reach every machine."""
    row = next(row for row in rows if row.check == "interface")
    names = ",".join(dict.fromkeys(row.found))
    found = {} if row.fix else {"NCCL_SOCKET_IFNAME": names, "GLOO_SOCKET_IFNAME": names.split(",")[0]}
    return {**found, "DEEPSPEED_TIMEOUT": str(max(1, timeout // 60)), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}


def launcher_of(hostfile: Path | None, port: int | None, ranks: int) -> list[str]:
    """What starts ranks as a run's are: DeepSpeed's launcher on several machines, torchrun on this one."""
    if hostfile is None:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi"]
    return launcher + (["--ssh_port", str(port)] if port else [])


def time_collective(hostfile: Path | None, port: int | None, hosts: dict[str, int], timeout: int) -> Row:
    """An all-reduce over all ranks. hostfile: None for this machine alone."""
    unquoted = next((path for path in (os.getcwd(), sys.executable) if not PLAIN.match(path)), None)
    if hostfile and unquoted:  # DeepSpeed's launcher writes both into a line of shell as they are
        return Row(
            "all-reduce",
            ["not tried"],
            f"{unquoted!r}: DeepSpeed's launcher passes paths to the remote shell unquoted: use one without spaces and "
            "signs such as ; $ ' (",
        )
    command = [*launcher_of(hostfile, port, sum(hosts.values())), "--module", "vlmo_ds.planning.preflight"]
    try:
        done = subprocess.run([*command, "--collective"], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Row(
            "all-reduce",
            ["no answer"],
            f"the ranks did not find each other in {timeout} s: a firewall, or the wrong interface",
        )
    found = [line[line.index(MARK) + len(MARK) :] for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not found:
        last = [line for line in (done.stderr + done.stdout).splitlines() if "Error" in line or "error" in line]
        return Row("all-reduce", ["failed"], last[-1].strip() if last else f"exit status {done.returncode}")
    result = json.loads(found[-1])
    rate = result["bus_gb_per_s"]
    text = f"{result['ranks']} ranks, {MESSAGE_MB} MB: {rate:.2f} GB/s, small: {result['latency_us']:.0f} us"
    slow = len(hosts) > 1 and rate < LEAST_GBPS[result["device"]]
    return Row(
        "all-reduce", [text], "slow: is this the fast network? (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)" if slow else ""
    )


def collective() -> None:
    """On every rank: bus bandwidth as nccl-tests counts it, 2 (n - 1) / n of the bytes per rank over the time."""
    import torch.distributed as dist

    from vlmo_ds.training.engine import device, start_distributed

    start_distributed(120)
    ranks = dist.get_world_size()
    message = torch.ones(MESSAGE_MB * 2**20 // 4, device=device())
    small = torch.ones(1, device=device())

    def seconds(value: torch.Tensor, times: int) -> float:
        dist.all_reduce(value)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(value)
        if value.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    large, latency = seconds(message, 4), seconds(small, 20)
    if dist.get_rank() == 0:
        rate = 2 * (ranks - 1) / ranks * message.nbytes / large / 1e9
        result = {"ranks": ranks, "bus_gb_per_s": rate, "latency_us": latency * 1e6, "device": message.device.type}
        print(MARK + json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def table(hosts: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns of text; equal values are shown once."""
    lines = [("", *hosts)]
    for row in rows:
        found = row.found if len(set(row.found)) > 1 else [row.found[0], *[""] * (len(row.found) - 1)]
        lines.append((("FIX " if row.fix else "ok  ") + row.check, *found))
    columns = max(len(line) for line in lines)
    widths = [max((len(str(line[i])) for line in lines if i < len(line) - 1), default=0) for i in range(columns)]
    out = []
    for line, about in zip(lines, [None, *rows], strict=True):
        out.append("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())
        if about and about.fix:
            out.append(f"      -> {about.fix}")
    return "\n".join(out)


def write_environment(path: Path, values: dict[str, str]) -> None:
    """NAME=value lines, nothing else: DeepSpeed's parser fails on comments and blank lines. Other names are kept.

    DeepSpeed puts the values into double quotes of a remote shell. RecipeError for a value, new or kept, that would be
    a command there.
    """
    for name, value in values.items():
        if not NAME.match(name) or not PLAIN.match(value):
            raise RecipeError(f"{name}={value!r} is not written to {path}: a remote shell would not take it as it is")
    kept = read_environment(path) if path.is_file() else {}
    merged = {**kept, **values}
    write_atomically(path, "".join(f"{name}={value}\n" for name, value in merged.items()).encode())


def read_environment(path: Path) -> dict[str, str]:
    """What stands in a file for DeepSpeed's launcher. RecipeError for what would run as a command on the machines."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text().split("\n")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    for number_of_line, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if not equals:
            continue
        if not NAME.match(name.strip()) or "$(" in value or set('`"\\\0') & set(value):
            raise RecipeError(
                f"{path}, line {number_of_line}: {line!r} would run as a command on every machine; accepted: NAME=value, "
                "without $(, backquotes, double quotes and backslashes"
            )
        found[name.strip()] = value
    return found


def of_all(hosts: Iterable[str], function: Callable[[str], Any]) -> list:
    """What a function gives for every machine, asked at once."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(function, hosts))


def run(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe)
    if args.hostfile is None:
        hosts, rows = this_machine(args, recipe)
    else:
        hosts = read_hostfile(args.hostfile)
        rows = all_machines(hosts, args, recipe)
    print(table(list(hosts), rows))
    wrong = [row.check for row in rows if row.fix]
    machines = f"{len(hosts)} machines" if len(hosts) > 1 else "1 machine"
    print(f"to fix: {', '.join(wrong)}" if wrong else f"{machines}, {sum(hosts.values())} ranks: ready")
    return 1 if wrong else 0


def this_machine(args: argparse.Namespace, recipe: Recipe) -> tuple[dict[str, int], list[Row]]:
    """({its name: ranks}, what was found) where no hostfile is given: looked at directly, without ssh."""
    found = probe(args.recipe, args.output_dir)
    hosts = {socket.gethostname(): max(1, len(found["gpus"]))}
    rows = rows_of_one(next(iter(hosts)), found, recipe)
    return hosts, [*rows, time_collective(None, None, hosts, args.timeout)]


def all_machines(hosts: dict[str, int], args: argparse.Namespace, recipe: Recipe) -> list[Row]:
    """What was found on the machines of a hostfile; what has to reach all of them is written to args.env_file."""
    arguments = [f"--recipe={args.recipe}", f"--output_dir={args.output_dir}"]
    probes = of_all(hosts, lambda host: ask(host, arguments, args.ssh_port))
    answers = ["no: " + p["error"] if "error" in p else "yes" for p in probes]
    silent = [host for host, p in zip(hosts, probes, strict=True) if "error" in p]
    if silent:
        fix = f"{', '.join(silent)}: 'ssh {silent[0]}' has to work without a password, and {os.getcwd()} to be there"
        return [Row("ssh", answers, fix)]
    rows = [Row("ssh", answers), *rows_of(hosts, probes, clock_skews(list(hosts), args.ssh_port), recipe)]
    environment = environment_of(rows, args.timeout)
    write_environment(args.env_file, environment)
    print(f"{args.env_file}: {', '.join(f'{k}={v}' for k, v in environment.items())}")
    return [*rows, time_collective(args.hostfile, args.ssh_port, hosts, args.timeout)]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 ready, 1 something to fix, 2 a setting or file that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmo_ds.planning.preflight", description="Looks at all machines before a run."
    )
    parser.add_argument("--hostfile", type=Path, help="lines such as 'node1 slots=8'; without it: this machine alone")
    parser.add_argument("--recipe", default=QUICKSTART)
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="where the run will write")
    parser.add_argument("--ssh_port", type=number(int))
    parser.add_argument("--timeout", type=number(int), default=600, help="seconds that the collective may take")
    parser.add_argument(
        "--env_file",
        type=Path,
        default=Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env")),
        help="what DeepSpeed's launcher exports to every machine (default: %(default)s)",
    )
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--collective", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.collective:
        collective()
        return 0
    if args.probe:
        print(MARK + json.dumps(probe(args.recipe, args.output_dir)))
        return 0
    try:
        return run(args)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
