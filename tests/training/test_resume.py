"""Where a start goes on in a directory that holds a run: settings, results, shards, leftovers, and one start at a time."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_recipe

from vlmo_ds.config import RecipeError
from vlmo_ds.data import loader, shards
from vlmo_ds.manifest import fault_of, write_manifest
from vlmo_ds.recipe_file import parse_recipe
from vlmo_ds.training import resume
from vlmo_ds.training.command import Command
from vlmo_ds.training.lock import RunLock
from vlmo_ds.training.weights import write_result

PIECE = {"w": torch.zeros(3)}


def command_of(folder: Path, resume_from: str = "auto", stages=None, **changes) -> Command:
    recipe = parse_recipe({**tiny_recipe(folder / "data"), **changes}, "tiny")
    chosen = [s for s in recipe.stages if stages is None or s.name in stages]
    return Command(Namespace(resume=resume_from, output_dir=folder / "run", accept_data=None), recipe, {}, chosen)


def finish_stage(run: Path, stage: str, steps: int = 3) -> Path:
    folder = run / "checkpoints" / stage / "final"
    write_result(folder, PIECE, {"stage": stage, "steps": steps})
    return folder


def write_checkpoint(run: Path, stage: str, step: int, recipe=None) -> Path:
    folder = run / "checkpoints" / stage / f"step-{step:08d}"
    folder.mkdir(parents=True)
    resume.checkpoint.save_file({"weight/0/w": torch.zeros(3)}, folder / "rank-00000.safetensors")
    dumped = recipe.model_dump(mode="json") if recipe else {}
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": step, "recipe": dumped}))
    write_manifest(
        folder, {name: resume.checkpoint.crc32(folder / name) for name in ("rank-00000.safetensors", "state.json")}
    )
    return folder


# ---- one start at a time ----

HOLD = """
import sys, time
from pathlib import Path
from vlmo_ds.training import lock
if sys.argv[2] == "lease":
    def no_locks(*_): raise OSError(37, "No locks available")
    lock.fcntl.lockf = no_locks
held = lock.RunLock(Path(sys.argv[1])); held.take(); print("held", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["lock", "lease"])
def test_the_second_start_names_the_first_and_a_dead_one_holds_nothing(tmp_path, monkeypatch, kind):
    if kind == "lease":

        def no_locks(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr("vlmo_ds.training.lock.fcntl.lockf", no_locks)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(RecipeError, match=rf"is in use: process {first.pid} on \S+ has been at work in it since 20"):
        RunLock(tmp_path).take()
    first.kill()
    first.wait()
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_a_lease_of_another_host_counts_for_a_minute(tmp_path):
    entry = {"host": "node9", "pid": 1, "started": 1.0, "renewed": 1000.0}
    assert RunLock.lease_counts({**entry, "renewed": resume_time() - 5})
    assert not RunLock.lease_counts({**entry, "renewed": resume_time() - 61})
    assert not RunLock.lease_counts({})


def resume_time() -> float:
    import time

    return time.time()


# ---- settings and results ----


def test_settings_are_named_as_the_user_wrote_them(tmp_path):
    command = command_of(tmp_path, seed=1)
    old = tiny_recipe(tmp_path / "data")
    old["stages"][2]["optimizer"]["lr"] = 5.0
    with pytest.raises(RecipeError, match=r"seed: was 0, is 1\n  stages.joint.optimizer.lr: was 5.0, is 0.001$"):
        resume.compare_recipes(command.recipe, old, "the run was begun with")


def test_steps_may_be_raised_and_not_lowered(tmp_path):
    command, old = command_of(tmp_path), tiny_recipe(tmp_path / "data")
    old["stages"][2]["steps"] = 2
    resume.compare_recipes(command.recipe, old, "it was begun with")
    old["stages"][2]["steps"] = 4
    with pytest.raises(RecipeError, match="stages.joint.steps: was 4, is 3"):
        resume.compare_recipes(command.recipe, old, "it was begun with")


def test_a_finished_stage_is_made_longer_from_its_last_checkpoint(tmp_path, capsys):
    run, command = tmp_path / "run", command_of(tmp_path)
    finish_stage(run, "image", 2)
    with pytest.raises(
        RecipeError, match="stages.image.steps is 3, the stage has finished with 2, and there is no checkpoint"
    ):
        resume.check_results(command)
    write_checkpoint(run, "image", 2)
    resume.check_results(command)
    assert "image: goes on to 3 steps; its result so far is" in capsys.readouterr().out
    assert (run / "checkpoints/image/final.after-2-steps-1/model.safetensors").exists()
    assert not resume.is_finished(run, command.recipe.stages[0])
    finish_stage(run, "image", 2)
    write_checkpoint(run, "text", 1)
    with pytest.raises(RecipeError, match="and stage 'text' has begun from its result"):
        resume.check_results(command)


def test_a_damaged_result_is_set_aside_for_the_last_checkpoint(tmp_path, capsys):
    run, command = tmp_path / "run", command_of(tmp_path)
    final = finish_stage(run, "image")
    resume.check_results(command)
    data = bytearray((final / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (final / "model.safetensors").write_bytes(data)
    with pytest.raises(
        RecipeError, match="is damaged: model.safetensors does not hold what was written .* no checkpoint"
    ):
        resume.check_results(command)
    write_checkpoint(run, "image", 3)
    with pytest.raises(RecipeError, match="is damaged: .* add the stage to --stages"):
        resume.check_results(command_of(tmp_path, stages=["text"]))
    resume.check_results(command)
    assert "goes on from its last checkpoint" in capsys.readouterr().err
    assert (run / "checkpoints/image/final.damaged-1").is_dir() and not final.exists()


def test_a_result_that_the_next_stage_no_longer_needs_is_left_alone(tmp_path):
    run, command = tmp_path / "run", command_of(tmp_path)
    final = finish_stage(run, "image")
    (final / "model.safetensors").write_bytes(b"")
    write_checkpoint(run, "text", 2)
    resume.check_results(command)
    assert final.is_dir()


def test_resume_never_overwrites_what_is_finished(tmp_path):
    run, command = tmp_path / "run", command_of(tmp_path)
    path = write_checkpoint(run, "text", 2, command.recipe)
    newer = write_checkpoint(run, "text", 3, command.recipe)
    resume.check_checkpoint(path, command.recipe, command.stages, run)
    resume.set_newer_aside(path)
    assert path.is_dir() and not newer.exists() and newer.with_name("step-00000003.left-1").is_dir()
    finish_stage(run, "joint")
    with pytest.raises(RecipeError, match="stage 'joint' has finished in .*, and its result would be overwritten"):
        resume.check_checkpoint(path, command.recipe, command.stages, run)
    with pytest.raises(RecipeError, match="is no checkpoint; accepted: auto, never, or"):
        resume.check_checkpoint(run / "checkpoints/text/final", command.recipe, command.stages, run)


@pytest.mark.parametrize(
    "content, fault",
    [
        (b'{"files": {}}', "its manifest.json lists no file"),
        (b'{"files": {"../../x": {"bytes": 1, "crc32": 1}}}', "lists '../../x', which is no file name"),
        (b'{"files": {"a": {"bytes": "many", "crc32": 1}}}', r"its manifest.json cannot be read \(ValueError\)"),
        (b'{"files": 3}', r"its manifest.json cannot be read \(AttributeError\)"),
        (b"[" * 100_000, r"its manifest.json cannot be read \(RecursionError\)"),
        (b"\xff\xfe", r"its manifest.json cannot be read \(JSONDecodeError\)"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, content, fault):
    import re

    (tmp_path / "manifest.json").write_bytes(content)
    assert re.search(fault, fault_of(tmp_path))


def test_parts_that_should_not_be_there_are_not_read(tmp_path):
    path = write_checkpoint(tmp_path, "image", 1)
    (path / "rank-00007.safetensors").write_bytes(b"of another time")
    assert fault_of(path, (0, 1)) == ""
    assert resume.checkpoint.Reader(path).read("weight", "w", 0, 3).tolist() == [0, 0, 0]


# ---- leftovers ----


def test_leftovers_are_only_what_this_run_made(tmp_path):
    run, command = tmp_path / "run", command_of(tmp_path)
    others = [
        "notes.tmp",
        ".mine.txt.tmp",
        "checkpoints/notes.tmp",
        "checkpoints/image/notes.tmp",
        "other/checkpoints/image/step-00000001.tmp/x",
    ]
    own = [
        ".recipe.yaml.12-34.tmp",
        "tokenizer.tmp/x",
        "checkpoints/image/step-00000004.tmp/x",
        "checkpoints/joint/final.tmp/x",
    ]
    for name in (*others, *own):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    resume.clear_leftovers(run, command.recipe)
    assert all((run / name).exists() for name in others) and not any((run / name).exists() for name in own)


# ---- shards ----


@pytest.fixture(autouse=True)
def no_caches():
    yield
    for cached in (shards.read_index, shards.scan_once, shards.unpacked, shards.scanned):
        cached.cache_clear()


def write_shards(folder: Path, contents: dict[str, int]) -> Path:
    """Tars of ten captions; the number is in each caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, number in contents.items():
        with tarfile.open(folder / name, "w") as tar:
            for i in range(10):
                data = f"caption {number:04d} of {i}".encode()
                info = tarfile.TarInfo(f"{i}.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def check(tmp_path, folder: Path, accepted=()):
    for cached in (shards.read_index, shards.scan_once, shards.unpacked, shards.scanned):
        cached.cache_clear()
    recipe = tiny_recipe(folder)
    recipe["stages"] = recipe["stages"][1:2]
    recipe["stages"][0]["data"]["shards"] = [str(folder)]
    return resume.check_shards(parse_recipe(recipe, "r").stages, tmp_path / "run", accepted)


def test_shards_that_change_are_told_and_refused_unless_allowed(tmp_path):
    folder, run = tmp_path / "data" / "set", tmp_path / "run"
    run.mkdir()
    assert check(tmp_path, write_shards(folder, {"0.tar": 0, "1.tar": 1})) == {}
    write_checkpoint(run, "text", 1)
    assert check(tmp_path, write_shards(folder, {"0.tar": 0, "1.tar": 1})) == {}
    for contents, what in (
        ({"0.tar": 0, "1.tar": 1, "2.tar": 2}, r"source 'data': 1 added \(data/set/2.tar\)"),
        ({"1.tar": 1}, r"source 'data': 1 removed \(data/set/0.tar\)"),
        ({"0.tar": 0, "1.tar": 7}, r"source 'data': 1 rewritten \(data/set/1.tar\)"),
        ({"0.tar": 1, "1.tar": 0}, r"source 'data': 2 rewritten \(data/set/0.tar, data/set/1.tar\)"),
    ):
        with pytest.raises(RecipeError, match=rf"stages.text.data: the shards are not those .*\n  {what}\n  undo that"):
            check(tmp_path, write_shards(folder, contents))
    assert check(tmp_path, folder, accepted=["text"]) == {}
    assert check(tmp_path, folder) == {}


def test_moved_shards_are_known_by_their_contents(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    check(tmp_path, write_shards(tmp_path / "data" / "set", {"0.tar": 0, "1.tar": 1}))
    write_checkpoint(run, "text", 1)
    moved = write_shards(tmp_path / "elsewhere" / "x", {"a.tar": 0, "b.tar": 1})
    known = check(tmp_path, moved)
    assert known == {"text": {"": [["data/set/0.tar", "data/set/1.tar"]]}}
    data = parse_recipe(tiny_recipe(tmp_path), "r").stages[1].data.model_copy(update={"shards": [str(moved)]})
    spec = loader.spec_for({"text", "masked_text"}, 32, 8, 16, 0)
    dataset = loader.BatchDataset(data, spec, None, rank=0, world_size=1, batch_size=1, known_shards=known["text"][""])
    assert [s.name for s in dataset.shards[0]] == known["text"][""][0]
    assert dataset.shards[0][0].read(0).sample_id == shards.stable_id("data/set/0.tar:0")


def test_a_stage_that_has_not_begun_or_is_finished_may_have_other_shards(tmp_path):
    folder, run = tmp_path / "data" / "set", tmp_path / "run"
    run.mkdir()
    check(tmp_path, write_shards(folder, {"0.tar": 0}))
    check(tmp_path, write_shards(folder, {"0.tar": 1}))
    finish_stage(run, "text")
    check(tmp_path, write_shards(folder, {"0.tar": 2}))


def test_files_have_the_modes_that_the_umask_says(tmp_path):
    code = f"""
import os; os.umask(0o027)
import torch
from pathlib import Path
from vlmo_ds.training.weights import write_result, write_weights
from vlmo_ds.data.storage import write_atomically
folder = Path({str(tmp_path)!r})
write_result(folder / "final", {{"w": torch.zeros(3)}}, {{}})
write_weights(folder / "w.safetensors", {{"w": torch.zeros(3)}})
write_atomically(folder / "a.json", b"x")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 5 and {oct(os.stat(p).st_mode & 0o777) for p in files} == {"0o640"}
