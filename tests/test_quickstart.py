"""`vlmo quickstart` beside another run: DeepSpeed's own choice of a port, 29500, is taken."""

import contextlib
import os
import socket
import subprocess
import sys

from conftest import ROOT

from vlmo_ds.quickstart import port

SMALL = ["--stages", "image", "stages.image.steps=2", "stages.image.global_batch_size=8", "stages.image.data.lanes=4"]


def test_the_ranks_meet_where_nobody_else_does(tmp_path, synthetic, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "synthetic").symlink_to(synthetic)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # taken by somebody else: as good
            other.bind(("127.0.0.1", 29500))
        other.listen()
        command = [sys.executable, "-m", "vlmo_ds", "quickstart", *SMALL, "retrieval=null"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/quickstart/checkpoints/image/final/model.safetensors").exists()


def test_a_port_that_is_named_is_taken(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29777")
    assert port() == "29777"
