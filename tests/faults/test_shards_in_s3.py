"""Training reads its shards from an object store, a real server, as from a folder; one that does not let it in, or is not there, is told in one
line."""

from pathlib import Path

import pytest
from conftest import run_ranks, start_ranks
from faults.runs import command

from vlmo_ds.data import storage
from vlmo_ds.data.storage import DataError, expand


def arguments(folder: Path, data: str, cache: Path, *settings: str) -> list[str]:
    folder.mkdir()
    words = command(folder, Path("data/synthetic"), retrieval=None)
    settings = (f"stages.joint.data.shards=[{data}]", f"stages.joint.data.cache={cache}", *settings)
    short = [
        "--stages",
        "joint",
        "stages.joint.steps=4",
        "stages.joint.init={weights: fresh}",
        "stages.joint.data.workers=1",
    ]
    return [*words, "--output_dir", str(folder / "run"), *short, "stages.image=null", "stages.text=null", *settings]


@pytest.fixture(scope="module")
def uploaded(synthetic, store) -> str:
    """The training shards in the store, under a path that ends as the folder's does."""
    import fsspec

    keys = {"key": store["AWS_ACCESS_KEY_ID"], "secret": store["AWS_SECRET_ACCESS_KEY"]}
    fs = fsspec.filesystem("s3", endpoint_url=store["AWS_ENDPOINT_URL"], **keys)
    for file in (synthetic / "train").iterdir():
        fs.put_file(str(file), f"runs/{synthetic.name}/train/{file.name}")
    return f"s3://runs/{synthetic.name}/train"


def test_a_run_is_the_same_from_the_store_as_from_the_folder(tmp_path, synthetic, store, uploaded):
    run_ranks(arguments(tmp_path / "local", str(synthetic / "train"), tmp_path / "none"), 2)
    run_ranks(arguments(tmp_path / "remote", uploaded, tmp_path / "cache"), 2, **store)
    local, remote = ((tmp_path / of / "run" / "metrics.jsonl").read_text() for of in ("local", "remote"))
    assert local == remote and local.count("\n") == 4
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(list((synthetic / "train").glob("*.tar")))


@pytest.mark.parametrize(
    "place, environment, words",
    [
        ("s3://no-such-bucket/train", {}, "error: shards: s3://no-such-bucket/train does not exist"),
        (
            "{}",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        ("{}/shard-000000.tar", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "set AWS_ACCESS_KEY_ID and"),
        ("s3://runs/empty", {}, "error: shards: s3://runs/empty does not exist"),
    ],
)
def test_a_store_that_cannot_be_read_ends_the_start_in_one_line(tmp_path, store, uploaded, place, environment, words):
    outside = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none"}
    command = arguments(tmp_path / "run", place.format(uploaded), tmp_path / "cache")
    (process,) = start_ranks(command, 1, **store | outside | environment)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and words in output and "Traceback" not in output, output
    assert output.count("error: ") == 1 and not (tmp_path / "run" / "run" / "metrics.jsonl").exists()


def test_a_folder_needs_s3fs_and_names_do_not(monkeypatch):
    monkeypatch.setattr(storage, "s3fs_is_there", lambda: False)
    with pytest.raises(DataError, match=r"pip install 'vlmo_ds\[s3\]', or name its tars"):
        expand(["s3://bucket/train"])
    assert expand(["s3://bucket/{0..1}.tar"]) == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
