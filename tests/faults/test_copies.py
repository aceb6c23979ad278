"""Checkpoints in two places: the run's directory goes, and the run goes on from the copy as if nothing had happened. The object store is a
real server."""

import importlib.metadata
import shutil
import time
from pathlib import Path

import pytest
from conftest import call, run_ranks, start_ranks
from faults.runs import command, wait_for

from vlmo_ds.config import RecipeError
from vlmo_ds.manifest import fault_of
from vlmo_ds.training.checkpoint_copy import Copies

SETTINGS = ["--stages", "image,text", "stages.image.steps=80", "stages.text.steps=4", "stages.image.checkpoint_every=8"]


def arguments(folder: Path, data: Path, *settings: str) -> list[str]:
    return [*command(folder, data, retrieval=None), "--output_dir", str(folder / "run"), *SETTINGS, *settings]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, synthetic) -> str:
    """The metrics of a run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(arguments(folder, synthetic), 2)
    return (folder / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_a_run_goes_on_from_the_copy_to_the_bit(tmp_path, synthetic, store, whole, kind):
    run = tmp_path / "run"
    url = f"s3://runs/{tmp_path.name}" if kind == "s3" else f"file://{tmp_path}/copy"
    words = arguments(tmp_path, synthetic, f"checkpoint_copy={url}", "keep_checkpoints=1")
    processes = start_ranks(words, 2, **store)
    wait_for(run / "metrics.jsonl", 45, processes)
    time.sleep(0.2)
    for process in processes:
        process.kill()
        process.communicate()
    assert (run / "checkpoints" / "image").is_dir() and not (run / "checkpoints" / "text" / "final").exists()
    shutil.rmtree(run)
    output = run_ranks(words, 2, **store)
    assert "files of the run brought back from" in output and "resumed at step" in output
    assert (run / "metrics.jsonl").read_text() == whole
    shutil.rmtree(run)  # and once more, when all is done
    output = run_ranks(words, 2, **store)
    assert "image: finished already" in output and "text: finished already" in output
    assert (run / "metrics.jsonl").read_text() == whole
    assert not fault_of(run / "checkpoints" / "text" / "final", (0, 1)) and not list(run.rglob("*.tmp"))


def copies_at(tmp_path: Path, keep: int = 2) -> Copies:
    return Copies(f"file://{tmp_path}/copy", tmp_path / "run", ("recipe.yaml",), keep)


def written(folder: Path, name: str, content: str) -> Path:
    """A folder as checkpoints are, with a manifest."""
    from vlmo_ds.manifest import crc32, write_manifest

    path = folder / "run" / "checkpoints" / "a" / name
    path.mkdir(parents=True)
    (path / "state.json").write_text(content)
    write_manifest(path, {"state.json": crc32(path / "state.json")})
    return path


class Stage:
    name = "a"


def test_the_newer_whole_one_is_taken_and_old_copies_go(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("x")
    copies = copies_at(tmp_path)
    paths = [written(tmp_path, f"step-{step:08d}", f"{step}") for step in (4, 8, 12)]
    for path in paths:
        copies.begin(path)
        copies.finish()
    assert copies.steps("a") == ["step-00000008", "step-00000012"]
    copies.restore([Stage()])
    assert "brought back" not in capsys.readouterr().out  # its own are as new
    shutil.rmtree(paths[2])
    copies.restore([Stage()])
    assert (paths[2] / "state.json").read_text() == "12" and "step-00000012: brought back" in capsys.readouterr().out
    (paths[2] / "state.json").write_text("13")  # damaged: the one that is whole comes back
    (tmp_path / "copy/checkpoints/a/step-00000012/manifest.json").rename(
        tmp_path / "gone"
    )  # one that was not copied to its end
    shutil.rmtree(paths[1])
    shutil.rmtree(paths[2])
    copies.restore([Stage()])
    assert (paths[1] / "state.json").read_text() == "8" and not paths[2].exists()
    shutil.rmtree(paths[1])
    (tmp_path / "copy/checkpoints/a/step-00000008/state.json").write_text("9")
    with pytest.raises(RecipeError, match=r"checkpoints/a/step-00000008 is damaged: state.json"):
        copies.restore([Stage()])


def test_a_copy_that_fails_is_told_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    copies = copies_at(tmp_path)
    path = written(tmp_path, "step-00000004", "4")
    (path / "state.json").unlink()
    copies.begin(path)
    copies.finish()
    assert "step-00000004 is not copied to file://" in capsys.readouterr().err and copies.steps("a") == []


@pytest.mark.parametrize("installed", ["0.4.2", "2023.12.0", None])
def test_an_object_store_needs_an_s3fs_of_these_years(tmp_path, monkeypatch, installed):
    def version(package):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        RecipeError, match=r"^checkpoint_copy: s3://a/b is of an object store, which s3fs 2024.6 or newer reads: pip"
    ):
        Copies("s3://a/b", tmp_path, [], 1)
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert setup.count('"s3fs>=2024.6"') == setup.count('"s3fs') > 0


@pytest.mark.parametrize(
    "url, words",
    [
        ("s3://no-such-bucket-of-mine/x", "cannot be written to"),
        ("nothing://x", "cannot be written to: Protocol not known"),
        ("file:///proc/x", "cannot be written to"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_at_the_start(tmp_path, synthetic, store, monkeypatch, url, words):
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    words_of = arguments(tmp_path, synthetic, f"checkpoint_copy={url}")[1:]
    done = call("vlmo_ds.training.command", *words_of, code=2)
    assert f"error: checkpoint_copy: {url} {words}" in done.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()
