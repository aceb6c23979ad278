"""Broken controls: a restore that leaves something out must be seen by the comparison that the kill tests rely on, each for its own
reason."""

import json
import sys
from pathlib import Path

import pytest
from conftest import run_ranks, start_ranks
from faults.runs import command, wait_for

KILLED_AT = 8


def worker(broken: str, arguments: list[str]) -> None:
    """train_ds.py, whose restore leaves something out."""
    from vlmo_ds.training import checkpoint, loop
    from vlmo_ds.training.run import main

    restore, next_pass, batches = checkpoint.restore, loop.StageTraining.next_pass, loop.batches
    resumed = []

    def restored(engine, reader):
        resumed.append(reader.state["step"])
        if broken == "moments":
            read = reader.read
            reader.read = lambda kind, *part: read(kind, *part) * (kind == "weight")
        step = restore(engine, reader)
        if broken == "schedule":
            engine.lr_scheduler.last_epoch += 2
        return step

    def passed(self, *args):
        one = next_pass(self, *args)
        return one._replace(seed=one.seed + 1) if broken == "random state" and resumed else one

    def stream(dataset, begin, end, *args):
        late = int(broken == "data position" and bool(resumed))
        return batches(dataset, begin + late, end + late, *args)

    checkpoint.restore, loop.StageTraining.next_pass, loop.batches = restored, passed, stream
    sys.exit(main(arguments))


def metrics_of(folder: Path, data: Path, broken: str, killed: bool) -> list[dict]:
    folder.mkdir()
    changes = {"retrieval": None}
    arguments = command(folder, data, **changes)[1:]
    settings = [
        "--stages",
        "image",
        "stages.image.steps=16",
        "stages.image.checkpoint_every=4",
        "model.drop_path_rate=0.3",
    ]
    arguments += ["--output_dir", str(folder / "run"), *settings]
    ranks = ["-c", f"from faults.test_controls import worker; worker({broken!r}, {arguments!r})"]
    path = folder / "run" / "metrics.jsonl"
    if killed:
        processes = start_ranks(ranks, 1)
        wait_for(path, KILLED_AT, processes)
        for process in processes:
            process.kill()
            process.communicate()
    run_ranks(ranks, 1)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, synthetic):
    return metrics_of(tmp_path_factory.mktemp("whole") / "run", synthetic, "", killed=False)


# What of a step's metrics tells: Adam's moments show in the loss of a later step, all else at once.
@pytest.mark.parametrize(
    "broken, shows, same",
    [
        ("", None, ("loss", "lr", "grad_norm")),
        ("moments", "loss", ("lr",)),
        ("random state", "loss", ("lr",)),
        ("data position", "loss", ("lr",)),
        ("schedule", "lr", ()),
    ],
)
def test_a_broken_restore_is_seen(tmp_path, synthetic, whole, broken, shows, same):
    found = metrics_of(tmp_path / "run", synthetic, broken, killed=True)
    assert [record["step"] for record in found] == [record["step"] for record in whole] == list(range(1, 17))
    different = {
        name: [a["step"] for a, b in zip(found, whole, strict=True) if a[name] != b[name]]
        for name in ("loss", "lr", "grad_norm")
    }
    if shows is None:
        assert found == whole
        return
    assert found != whole and different[shows], different
    assert min(different[shows]) > 4, "it differs before it was restored"
    assert not any(different[name] for name in same), different
