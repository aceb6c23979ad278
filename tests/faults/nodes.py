"""Two machines on one: network namespaces with their own addresses, host names and sshd, joined by a cable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def needs() -> str:
    """What this machine lacks for two nodes, or ""."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    lacking = [name for name in ("ip", "ssh", "ssh-keygen", "sshd", "pdsh", "unshare") if not which(name)]
    return f"needs {', '.join(lacking)} (Debian: iproute2 openssh-server pdsh)" if lacking else ""


def which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def sh(*command: object, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], check=check, capture_output=True, text=True)


class Nodes:
    """node1 and node2; a command is started on node1, as a person logged in there would."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spaces = [f"vlmo-{name}-{os.getpid()}" for name in NAMES]
        self.sshd: list[subprocess.Popen] = []
        try:
            self.up()
        except subprocess.CalledProcessError as error:
            self.down()
            pytest.skip(f"needs network namespaces and sshd: {' '.join(error.cmd)}: {error.stderr.strip()}")

    def up(self) -> None:
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key")
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "host_key")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        for space in self.spaces:
            sh("ip", "netns", "add", space)
            etc = Path("/etc/netns") / space
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(hosts)
        a, b = self.spaces
        sh("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            sh("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            sh("ip", "-n", space, "link", "set", "eth0", "up")
            sh("ip", "-n", space, "link", "set", "lo", "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        config = self.folder / "sshd_config"
        (self.folder / "authorized").write_bytes((self.folder / "key.pub").read_bytes())
        config.write_text(
            f"HostKey {self.folder / 'host_key'}\nAuthorizedKeysFile {self.folder / 'authorized'}\nStrictModes no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
        )
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder / 'key'}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        binaries = self.folder / "bin"
        binaries.mkdir()
        wrapper = binaries / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {which("ssh")} -F {self.folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)
        for space, name in zip(self.spaces, NAMES, strict=True):
            inside = f"hostname {name} && exec {which('sshd')} -D -e -f {config}"
            command = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", inside]
            self.sshd.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        (self.folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
        end = time.monotonic() + 15
        while time.monotonic() < end:
            if all(self.run("ssh", name, "true").returncode == 0 for name in NAMES):
                return
            time.sleep(0.2)
        pytest.skip("needs sshd in a network namespace: it does not answer")

    def down(self) -> None:
        for space in self.spaces:
            for pid in sh("ip", "netns", "pids", space, check=False).stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            sh("ip", "netns", "del", space, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        for process in self.sshd:
            process.wait()

    def command(self, *command: str) -> list[str]:
        return [
            "ip",
            "netns",
            "exec",
            self.spaces[0],
            "unshare",
            "--uts",
            "sh",
            "-c",
            'hostname node1 && exec "$@"',
            "sh",
            *command,
        ]

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}:/usr/sbin"
        return {**os.environ, "PATH": path, "DS_ENV_FILE": str(self.folder / "deepspeed_env"), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*command), cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=timeout
        )

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*command), cwd=ROOT, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def kill(self, number: int) -> int:
        """SIGKILL to DeepSpeed's launcher of a node and to its ranks (not to what started them); how many there were."""
        killed = 0
        for pid in sh("ip", "netns", "pids", self.spaces[number]).stdout.split():
            try:
                program, *arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "python" in program and ("deepspeed.launcher.launch" in arguments or "--local_rank=0" in arguments):
                    os.kill(int(pid), signal.SIGKILL)
                    killed += 1
            except (FileNotFoundError, ProcessLookupError):
                continue
        return killed

    def alive(self, text: str) -> int:
        """Processes of both nodes whose command line holds `text`."""
        count = 0
        for space in self.spaces:
            for pid in sh("ip", "netns", "pids", space).stdout.split():
                try:
                    count += text in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                except FileNotFoundError:
                    continue
        return count
