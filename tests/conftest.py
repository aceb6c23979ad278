"""What the tests share: tiny data, a tiny recipe, real processes."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import preloaded
import pytest
import torch
import yaml

from vlmo_ds.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(Path(__file__).parent))


def reads(*tasks: str) -> frozenset[str]:
    """What VLMo's tasks read of a sample."""
    return frozenset().union(*(FAMILIES["vlmo"].tasks[task].reads for task in tasks))


def golden(name: str) -> Path:
    path = SHARED / "golden" / name
    if not path.exists():
        pytest.skip(f"needs the reference numbers {path}, which are not part of the repository")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = SHARED / "data"
    if not path.exists():
        pytest.skip(f"needs the sample data {path}, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> Path:
    """96 training scenes, 24 held-out ones and 96 sentences, 32 pixels a side."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    sizes = ["--train", 96, "--test", 24, "--text", 96, "--image_size", 32, "--samples_per_shard", 32]
    call("vlmo_ds.data.prepare", "synthetic", "--output", folder, *sizes)
    return folder


def tiny_recipe(data: Path, **changes) -> dict:
    """Three stages of a few steps of a very small model."""

    def stage(name: str, tasks: dict, shards: str, **more) -> dict:
        return {
            "name": name,
            "tasks": tasks,
            "data": {"shards": [str(data / shards)], "transform": "square_transform", "lanes": 8},
            "global_batch_size": 8,
            "steps": 3,
            "log_images_every": 0,
            "optimizer": {"lr": 1e-3, "gradient_clipping": 1.0},
            **more,
        }

    recipe = {
        "name": "tiny",
        "model": {
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "vlffn_start_layer_index": 2,
            "image_size": 32,
            "patch_size": 8,
            "max_text_len": 32,
            "max_text_len_of_initckpt": 32,
        },
        "tokenizer": {"name": "train", "vocab_size": 200},
        "stages": [
            stage("image", {"mim": None}, "train", trainable="image_only"),
            stage(
                "text",
                {"textmlm": None},
                "text",
                trainable="text_only",
                init={"fresh": ["mlm_score.*"], "drop": ["mim_score.*", "transformer.mask_token"]},
            ),
            stage(
                "joint",
                {"itc": None, "itm": None, "mlm": None},
                "train",
                init={"fresh": ["itc_*", "logit_*scale", "itm_score.*"], "vl_experts": "text"},
            ),
        ],
        "retrieval": {"shards": [str(data / "test")], "rerank": 4, "batch_size": 16, "gallery": 2},
    }
    recipe.update(changes)
    return recipe


def write_yaml(path: Path, value: dict) -> Path:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def refused(command: list[str]) -> str:
    """The one line of a run on one rank that cannot start."""
    (process,) = start_ranks(command, 1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in output, output
    return output[output.index("error: ") :]


def call(module: str, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    """Runs `python -m module`, which has to end with this exit status."""
    command = ["-m", module, *map(str, arguments)]
    process = preloaded.Process(command, ROOT, {**os.environ, "PYTHONPATH": str(ROOT)}, together=False)
    done = subprocess.CompletedProcess(command, process.wait(), *process.communicate())
    assert done.returncode == code, done.stdout + done.stderr
    return done


def free_port() -> int:
    """A port that nobody listens at, below those that the kernel gives to connections: none of these can take it until it is used."""
    import socket

    lowest = max(int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]), 12000)
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(lowest - 10000, lowest)
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(command: list[str], ranks: int, **environment: str) -> list[preloaded.Process]:
    """Starts `ranks` processes of `python *command` that find each other as under any launcher."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            **environment,
        }
        processes.append(preloaded.Process([str(word) for word in command], ROOT, env))
    return processes


def run_ranks(command: list[str], ranks: int, timeout: float = 240, **environment: str) -> str:
    """Runs a command on several ranks; returns rank 0's output; fails with all output if one fails."""
    processes = start_ranks(command, ranks, **environment)
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n".join(outputs)[-6000:]
    return outputs[0]


@pytest.fixture(scope="session")
def store():
    """The environment of an S3 server with a bucket "runs"."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            try:
                request = urllib.request.Request(f"{url}/runs", method="PUT")
                urllib.request.urlopen(request, timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(f"no S3 server at {url} (moto's has ended with {server.poll()})")
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
