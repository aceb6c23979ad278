"""Arrow and parquet files: those of ViLT's scripts, and Hugging Face datasets as save_to_disk and the hub lay them out."""

import json

import pytest
from data.files import jpeg, png, prepare_here, samples

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_arrow(path, columns: dict, features: dict | None = None) -> None:
    """As `datasets` does: a stream of record batches, with what it knows of the columns in the schema's metadata."""
    found = pa.table(columns)
    if features:
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchStreamWriter(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)


def save_to_disk(folder, columns: dict, parts: int = 2, features: dict | None = None) -> None:
    rows = len(next(iter(columns.values())))
    names = [f"data-{i:05d}-of-{parts:05d}.arrow" for i in range(parts)]
    for i, name in enumerate(names):
        part = {key: values[i * rows // parts : (i + 1) * rows // parts] for key, values in columns.items()}
        write_arrow(folder / name, part, features)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "ab", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features or {}}))


def pictures(count: int) -> pa.Array:
    made = [{"bytes": jpeg(colour=(i * 50, 9, 9)), "path": "same.jpg"} for i in range(count)]
    return pa.array(made, IMAGE)


CAPTIONS = [["zero", "nought"], ["one"], ["two"], ["three"]]


def test_a_dataset_saved_to_disk(tmp_path, capsys):
    save_to_disk(tmp_path / "set", {"image": pictures(4), "captions": CAPTIONS, "other": [1, 2, 3, 4]})
    (tmp_path / "set/cache-12ab.arrow").write_bytes(b"what map() leaves")
    out = prepare_here(
        capsys, "arrow", "--input", tmp_path / "set", "--output", tmp_path / "out", "--samples_per_shard", 1
    )
    found = samples(tmp_path / "out")
    assert [s.captions for s in found] == CAPTIONS and "4 samples, 5 captions" in out
    assert found[1].image == jpeg(colour=(50, 9, 9)) and len({s.image_id for s in found}) == 4


def test_a_dict_of_splits(tmp_path, capsys):
    for split, count in (("train", 4), ("test", 1)):
        save_to_disk(tmp_path / "set" / split, {"image": pictures(count), "caption": ["a"] * count}, parts=1)
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    arguments = ["arrow", "--input", tmp_path / "set", "--output", tmp_path / "out"]
    refused = prepare_here(capsys, *arguments, code=2)
    assert "holds several sets: choose one with --split; accepted: train, test" in refused
    assert "--split dev is not in it" in prepare_here(capsys, *arguments, "--split", "dev", code=2)
    assert "1 samples" in prepare_here(capsys, *arguments, "--split", "test")


def test_a_download_from_the_hub_and_a_cache(tmp_path, capsys):
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        content = pa.table({"image": pictures(count), "text": ["a"] * count})
        parquet.write_table(content, tmp_path / f"hub/data/{split}-00000-of-00001-ab12.parquet")
        write_arrow(tmp_path / f"cache/name-{split}.arrow", {"img": pictures(count), "text": ["a"] * count})
    for name in ("hub", "cache"):
        arguments = ["arrow", "--input", tmp_path / name, "--output", tmp_path / f"out-{name}"]
        assert "several sets" in prepare_here(capsys, *arguments, code=2)
        assert "3 samples, 3 captions" in prepare_here(capsys, *arguments, "--split", "train")


def test_classes_and_named_columns(tmp_path, capsys):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    columns = {"img": pictures(3), "label": [1, 0, None], "alt": ["a", "b", "c"], "key": ["x", "x", "y"]}
    save_to_disk(tmp_path / "set", columns, 1, features)
    prepare_here(capsys, "arrow", "--input", tmp_path / "set", "--output", tmp_path / "classes")
    assert [s.meta for s in samples(tmp_path / "classes")] == [
        {"class": "dog", "label": 1},
        {"class": "cat", "label": 0},
        {},
    ]
    more = ["--caption", "alt", "--image_id", "key", "--output", tmp_path / "pairs"]
    prepare_here(capsys, "arrow", "--input", tmp_path / "set", *more)
    first, second, third = samples(tmp_path / "pairs")
    assert first.captions == ["a"] and first.image_id == second.image_id != third.image_id
    refused = prepare_here(
        capsys, "arrow", "--input", tmp_path / "set", "--image", "pic", "--output", tmp_path / "o", code=2
    )
    assert "has no column 'pic'; it has img, label, alt, key" in refused


def test_pictures_beside_the_file_and_rows_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(png())
    images = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": "no.png"}, {"bytes": b"x", "path": None}, None]
    write_arrow(tmp_path / "a.arrow", {"image": pa.array(images, IMAGE), "caption": ["zero", "one", "two", "three"]})
    out = prepare_here(capsys, "arrow", "--input", tmp_path / "a.arrow", "--output", tmp_path / "out")
    assert [s.captions for s in samples(tmp_path / "out")] == [["zero"]]
    assert all(f"rejected 1: {why}" in out for why in ("image file missing", "no image", "image: not a readable"))


def test_nlvr2_keeps_what_its_evaluation_reads(tmp_path, capsys):
    columns = {
        "image_0": pictures(3),
        "image_1": pictures(3),
        "questions": [["both dogs", "one cat"], ["both dogs"], ["a", "b"]],
        "answers": [["True", "False"], ["False"], ["True"]],
        "identifier": ["dev-7-0", "dev-7-1", "dev-8-0"],
    }
    write_arrow(tmp_path / "nlvr2_dev.arrow", columns)
    out = prepare_here(capsys, "arrow", "--input", tmp_path / "nlvr2_dev.arrow", "--output", tmp_path / "out")
    assert "rejected 1: row that cannot be used" in out  # two sentences, one answer
    rows = [e for s in samples(tmp_path / "out") for e in s.entries("sentences", ("sentence", "label", "identifier"))]
    assert [row["identifier"] for row in rows] == ["dev-7-0-0", "dev-7-0-1", "dev-7-1-0"]
    assert rows[0]["sentence_id"] == rows[2]["sentence_id"] != rows[1]["sentence_id"]


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_files_that_are_cut_short(tmp_path, capsys, name):
    columns = {"image": pictures(50), "caption": [f"of {i}" for i in range(50)]}
    write_arrow(tmp_path / "a.arrow", columns)
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = (tmp_path / name).read_bytes()
    for part in (0, 10, len(data) // 2):
        (tmp_path / name).write_bytes(data[:part])
        refused = prepare_here(capsys, "arrow", "--input", tmp_path / name, "--output", tmp_path / "out", code=2)
        assert name in refused


@pytest.mark.parametrize("content", ["{", "[]", '{"_data_files": 3}', '{"_data_files": [1]}', '{"_data_files": []}'])
def test_a_folder_whose_state_is_damaged(tmp_path, capsys, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/state.json").write_text(content)
    refused = prepare_here(capsys, "arrow", "--input", tmp_path / "set", "--output", tmp_path / "out", code=2)
    assert "state.json is not " in refused or "nothing to write" in refused


def test_a_folder_that_is_no_dataset(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    refused = prepare_here(capsys, "arrow", "--input", tmp_path / "set", "--output", tmp_path / "out", code=2)
    assert "holds no .arrow or .parquet files" in refused
